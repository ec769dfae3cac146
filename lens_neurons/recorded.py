"""A recording: everything that one pass over a corpus collected, which every identification method reads from."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import quote

import pandas as pd

from lens_neurons.activation_stats import FILE_NAME, ActivationStats
from lens_neurons.errors import DataError, StorageError
from lens_neurons.features import FeatureStats
from lens_neurons.histograms import Histograms
from lens_neurons.responses import ROWS_KIND, Rows, TextResponses, mapped_rows
from lens_neurons.sharing import CardFacts, Shareable
from lens_neurons.storage import SCHEMA, Provenance, load_json, load_tensors, save_json, save_tensors

# Parts whose rows of texts stay in files of their own, and those that are one file.
ROW_PARTS = ("responses", "importances")
_TABLES: dict[str, Any] = {"histograms": Histograms, "features": FeatureStats}


@dataclass(frozen=True, eq=False)
class Recording(Shareable):
    """What was recorded in one pass; a part that was not is None.

    Attributes:
        stats: Counts and sums of every neuron.
        responses: Means of units over each text.
        importances: Importance of units in each text (PLND).
        histograms: Distribution of every neuron's values.
        features: Counts of the latents of sparse autoencoders.
    """

    hub_files: ClassVar[tuple[str, ...]] = (
        FILE_NAME,
        *(f"{name}.safetensors" for name in _TABLES),
        *(f"{name}.json" for name in ROW_PARTS),
        *(f"{name}/*.safetensors" for name in ROW_PARTS),
    )

    stats: ActivationStats | None = None
    responses: TextResponses | None = None
    importances: TextResponses | None = None
    histograms: Histograms | None = None
    features: FeatureStats | None = None

    def __post_init__(self) -> None:
        """Check that there is anything.

        Raises:
            DataError: There is nothing.
        """
        if not self.parts:
            raise DataError("a recording needs at least one part; give stats= or another.")

    @property
    def parts(self) -> dict[str, Any]:
        """What was recorded, by name."""
        named = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return {name: value for name, value in named.items() if value is not None}

    @property
    def languages(self) -> tuple[str, ...]:
        """The languages."""
        return tuple(next(iter(self.parts.values())).languages)

    @property
    def provenance(self) -> Provenance:
        """Where it comes from."""
        return next(iter(self.parts.values())).provenance

    def __repr__(self) -> str:
        """Return one line a part."""
        return "Recording(\n" + "".join(f"  {name}={value!r},\n" for name, value in self.parts.items()) + ")"

    def part(self, name: str, method: str) -> Any:
        """Return a part, for a method that needs it.

        Raises:
            DataError: It was not recorded.
        """
        if name not in self.parts:
            raise DataError(
                f"method '{method}' needs {name}, and this recording has {', '.join(self.parts)}; record with "
                f"collect=collect_for(['{method}'])."
            )
        return self.parts[name]

    def select(self, languages: Iterable[str]) -> "Recording":
        """Return the recording of some languages, in the order given.

        Raises:
            DataError: One was not recorded.
        """
        chosen = list(languages)
        return replace(self, **{name: value.select(chosen) for name, value in self.parts.items()})

    def merge(self, *others: "Recording") -> "Recording":
        """Return this recording with those of other languages, made with the same model, settings and parts.

        Raises:
            DataError: A language is in two of them, or one has a part that another has not.
            ProvenanceError: Model, tokenizer, policy or site differ.
        """
        for other in others:
            if set(other.parts) != set(self.parts):
                raise DataError(
                    f"one recording has {', '.join(self.parts)} and another has {', '.join(other.parts)}; record both "
                    "with the same collect=."
                )
        merged = {name: value.merge(*(other.parts[name] for other in others)) for name, value in self.parts.items()}
        return replace(self, **merged)

    def card_facts(self) -> CardFacts:
        """Return what the card on the hub says of the recording."""
        shown = {f"Recorded: {name}": repr(value) for name, value in self.parts.items()}
        table = pd.DataFrame({"language": self.languages}) if self.stats is None else self.stats.to_frame()
        rows = {name: part.counts() for name in ROW_PARTS if (part := self.parts.get(name)) is not None}
        for name, counts in rows.items():
            table[f"texts with {name}"] = [counts[code] for code in table["language"]]
        return CardFacts(
            title=f"Recording of {self.provenance.model or 'an unknown model'}",
            summary=f"What one pass over text of {len(self.languages)} languages or other groups recorded "
            f"({', '.join(self.parts)}): every identification method reads from it, without the model.",
            variable="recording",
            languages=self.languages,
            table=table,
            provenance=self.provenance,
            settings=shown,
            example=("ln.list_methods()  # what each needs", "neurons = ln.identify(recording)"),
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a folder that `load` reads: one file a part, and one a language for rows of texts."""
        folder = Path(path)
        for name, value in self.parts.items():
            if name not in ROW_PARTS:
                value.save(folder / (FILE_NAME if name == "stats" else f"{name}.safetensors"))
                continue
            for code in value.languages:
                file = rows_file(folder, name, code, 0, value.counts()[code] - 1)
                tensors = {"positions": value.positions(code), "rows": value.rows(code)}
                save_tensors(file, tensors, {"schema": SCHEMA, "kind": ROWS_KIND, "language": code})
            save_rows_header(folder, name, value)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, verify: bool = False) -> "Recording":
        """Return the recording in a folder; rows of texts stay in their files and are read as they are needed.

        Args:
            path: A folder that `record` finished or `save` wrote.
            verify: Read every file of rows once and check its sum.

        Raises:
            StorageError: There is no finished recording, or a file is damaged.
        """
        folder = Path(path)
        found: dict[str, Any] = {}
        if (folder / FILE_NAME).exists():
            found["stats"] = ActivationStats.load(folder)
        for name in ROW_PARTS:
            if (folder / f"{name}.json").exists():
                header = load_json(folder / f"{name}.json")
                parts = {code: rows_of(folder, name, code, verify=verify) for code in header["languages"]}
                found[name] = TextResponses.from_header(header, parts)
        for name, kind in _TABLES.items():
            if (folder / f"{name}.safetensors").exists():
                found[name] = kind.load(folder / f"{name}.safetensors")
        if not found:
            raise StorageError(f"{path} holds no finished recording; finish it with record(model, corpus, path).")
        return cls(**found)


def rows_file(folder: Path, name: str, language: str, first: int, last: int) -> Path:
    """Return where the rows of texts first to last are kept."""
    # A group label may be anything: "C/C++" is no name of a file.
    return folder / name / f"{quote(language, safe='')}-{first}-{last}.safetensors"


def rows_of(folder: Path, name: str, language: str, *, verify: bool = False) -> tuple[Rows, ...]:
    """Return the rows of a language that are on disk, in the order of its texts.

    Raises:
        StorageError: There are none, or a file is damaged.
    """
    start = quote(language, safe="") + "-"
    files = [file for file in (folder / name).glob("*.safetensors") if _code_of(file) == start]
    if not files:
        raise StorageError(f"{folder / name} holds no rows of '{language}'; record or download it again.")
    files.sort(key=lambda file: int(file.stem.rsplit("-", 2)[1]))
    if verify:
        for file in files:
            load_tensors(file)
    return tuple(mapped_rows(file) for file in files)


def _code_of(file: Path) -> str:
    return file.stem.rsplit("-", 2)[0] + "-"


def save_rows_header(folder: Path, name: str, responses: TextResponses) -> None:
    """Write what `Recording.load` needs beside the files of rows."""
    header: Mapping[str, Any] = responses.header()
    save_json(folder / f"{name}.json", header)
