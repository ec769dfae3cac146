"""What stability draws from: the shards of a recording for methods that need counts or sums, else single texts."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lens_neurons.activation_stats import ActivationStats
from lens_neurons.collecting import PartialSums
from lens_neurons.errors import DataError, SettingError, StorageError
from lens_neurons.methods import list_methods
from lens_neurons.recorded import Recording
from lens_neurons.recording_files import RecordingFolder
from lens_neurons.responses import TextResponses
from lens_neurons.storage import Provenance, load_json

# Fewer shards or texts of a language than this have no two halves worth the name.
LEAST = 4

FROM_SHARDS = ("counts", "sums")
FROM_TEXTS = ("responses", "importances")

# Shards are kept in memory up to this many bytes, and read again for every split beyond.
_KEPT_BYTES = 1 << 30

Integers = npt.NDArray[np.int64]


class Half(ABC):
    """One half of what was recorded, of which more and more is looked at."""

    @abstractmethod
    def grow(self, counts: Mapping[str, int]) -> ActivationStats | TextResponses:
        """Return the first so many shards or texts of the half; never fewer than before."""


class Source(ABC):
    """Shards or texts to draw from.

    Attributes:
        drawn: What is drawn, in words.
        sizes: Language to their number.
        provenance: Of the data.
    """

    drawn: str
    sizes: dict[str, int]
    provenance: Provenance

    @abstractmethod
    def half(self, order: Mapping[str, Integers]) -> Half:
        """Return a half of these shards or texts, in this order."""

    @abstractmethod
    def size(self, data: Any, language: str, name: str) -> float:
        """Return the number of tokens or texts of a language, NaN where it is unknown."""

    def require_enough(self) -> None:
        """Raise where a language has too few to be split."""
        few = {code: number for code, number in self.sizes.items() if number < LEAST}
        if few:
            found = ", ".join(f"{code}: {number}" for code, number in few.items())
            remedy = "give it more texts" if self.drawn == "texts" else "record it with a smaller shard_tokens"
            raise DataError(f"stability needs at least {LEAST} {self.drawn} a language ({found}); {remedy}.")


class _Texts(Source):
    drawn = "texts"

    def __init__(self, responses: TextResponses) -> None:
        self._responses = responses
        self.sizes = responses.counts()
        self.provenance = responses.provenance

    def half(self, order: Mapping[str, Integers]) -> Half:
        return _HalfOfTexts(self._responses, order)

    def size(self, data: Any, language: str, name: str) -> float:
        return float(data.counts()[language]) if name == "texts" else float("nan")


class _HalfOfTexts(Half):
    def __init__(self, responses: TextResponses, order: Mapping[str, Integers]) -> None:
        self._responses, self._order = responses, order

    def grow(self, counts: Mapping[str, int]) -> TextResponses:
        return self._responses.texts({code: np.sort(self._order[code][:n]).tolist() for code, n in counts.items()})


class _Shards(Source):
    drawn = "shards"

    def __init__(self, parts: Mapping[str, Sequence[PartialSums]], provenance: Provenance) -> None:
        self._parts = {code: [part.without_rows() for part in own] for code, own in parts.items()}
        self.sizes = {code: len(own) for code, own in parts.items()}
        self.provenance = provenance

    def load(self, language: str, number: int) -> PartialSums:
        """Return the sums of a shard."""
        return self._parts[language][number]

    def half(self, order: Mapping[str, Integers]) -> Half:
        return _HalfOfShards(self, order)

    def size(self, data: Any, language: str, name: str) -> float:
        return float(getattr(data, name)[data.index(language)])


class _SavedShards(_Shards):
    """Shards in the folder of a recording, kept in memory where they fit."""

    def __init__(self, path: Path) -> None:
        manifest = load_json(path / "manifest.json")
        if not isinstance(manifest, dict) or manifest.get("kind") != "recording":
            raise StorageError(f"{path} holds no recording; give the folder that record(model, corpus, path) made.")
        self.provenance = Provenance.from_dict(manifest["provenance"])
        self._folder = RecordingFolder(path, self.provenance, manifest["languages"])
        # This looks at the manifest's checksum.
        self._folder.plan()
        self._files = {code: self._ordered(code) for code in manifest["languages"]}
        self.sizes = {code: len(files) for code, files in self._files.items()}
        self._kept: dict[tuple[str, int], PartialSums] = {}
        self._free = _KEPT_BYTES

    def _ordered(self, language: str) -> list[Path]:
        return [file for _, file in sorted(self._folder.shards(language).items())]

    def load(self, language: str, number: int) -> PartialSums:
        if (language, number) in self._kept:
            return self._kept[language, number]
        part = self._folder.load_shard(self._files[language][number])[0].without_rows()
        size = 4 * 8 * part.positive.numel()
        if size <= self._free:
            self._free -= size
            self._kept[language, number] = part
        return part


class _HalfOfShards(Half):
    def __init__(self, source: _Shards, order: Mapping[str, Integers]) -> None:
        self._source, self._order = source, order
        self._sums: dict[str, PartialSums] = {}
        self._had = dict.fromkeys(order, 0)

    def grow(self, counts: Mapping[str, int]) -> ActivationStats:
        for code, n in counts.items():
            # In the order of the texts, as a recording adds its shards.
            for number in np.sort(self._order[code][self._had[code] : n]).tolist():
                part = self._source.load(code, number)
                self._sums[code] = self._sums[code].add(part) if code in self._sums else part
            self._had[code] = n
        return ActivationStats.from_partials(self._sums, provenance=self._source.provenance)


def source_of(data: Any, method: str) -> Source:
    """Return what to draw from, for a method that needs it."""
    needs = need_of(method)
    if isinstance(data, Recording):
        if needs in FROM_TEXTS:
            return _Texts(data.part(needs, method))
        raise DataError(
            f"method '{method}' needs {needs}, which a recording in memory has for whole languages alone; give the "
            "folder that it was recorded into, where its shards are."
        )
    if isinstance(data, TextResponses):
        if needs in FROM_TEXTS:
            return _Texts(data)
        raise DataError(f"method '{method}' needs {needs}, not rows of texts; give the folder of a recording.")
    if isinstance(data, Mapping):
        if needs in FROM_SHARDS:
            return _Shards(data, Provenance.unknown(_shape(data)))
        raise DataError(f"method '{method}' needs {needs}, not the sums of shards; give the folder of a recording.")
    if needs in FROM_TEXTS:
        return _Texts(Recording.load(data).part(needs, method))
    return _SavedShards(Path(data))


def _shape(parts: Mapping[str, Sequence[PartialSums]]) -> tuple[int, int]:
    for own in parts.values():
        for part in own:
            return part.positive.shape[0], part.positive.shape[1]
    raise DataError("there is no shard; record at least one of every language.")


def need_of(method: str) -> str:
    """Return what a method is given from a recording."""
    known = list_methods()["needs"]
    if method not in known.index:
        raise SettingError(f"method={method!r} is unknown; use one of {', '.join(known.index)}.")
    needs = str(known[method]).split(", ")[0]
    if needs not in (*FROM_SHARDS, *FROM_TEXTS):
        allowed = ", ".join(str(name) for name in known.index if str(known[name]).split(", ")[0] in FROM_SHARDS)
        raise SettingError(
            f"method '{method}' needs {needs}, of which no shards or texts are kept apart; use one of {allowed}."
        )
    return needs
