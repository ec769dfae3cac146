"""Errors of the package: one sentence each that says what was wrong, what was expected and what to do."""


class LensNeuronsError(Exception):
    """Everything that this package raises on purpose."""


class ModelError(LensNeuronsError):
    """A model that cannot be loaded, or a hook that is not what it should be."""


class DataError(LensNeuronsError):
    """Texts, corpora, facts or recordings that do not hold what is asked of them."""


class StorageError(LensNeuronsError):
    """A file that is damaged, of an unknown kind, or of an unknown schema version."""


class ProvenanceError(LensNeuronsError):
    """Two things that do not belong together: another model, tokenizer, corpus or policy."""


class SettingError(LensNeuronsError, ValueError):
    """An argument with a value that is not allowed."""
