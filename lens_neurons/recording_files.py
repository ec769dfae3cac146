"""The folder of a recording: a manifest, immutable shards, one file a finished language, and the result.

- `manifest.json`: what is recorded; written first.
- `shards/{language}-{first}-{last}.safetensors`: the sums of texts first to last; written last of a shard's files.
- `responses/{language}-{first}-{last}.safetensors`, and so on: what a collector took from the same texts.
- `languages/{language}.safetensors`: statistics of a language whose shards are all there.
- `responses.json` or `histograms.safetensors`, and so on: the results of the collectors.
- `stats.safetensors`: statistics of all languages; written last.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from lens_neurons.activation_stats import FILE_NAME, ActivationStats
from lens_neurons.batching import Shard
from lens_neurons.collecting import PartialSums
from lens_neurons.errors import ProvenanceError, StorageError
from lens_neurons.recorded import ROW_PARTS, Recording, missing_parts
from lens_neurons.responses import ROWS_KIND, Rows
from lens_neurons.row_files import Span, file_name, rows_file, rows_of, save_rows
from lens_neurons.storage import (
    SCHEMA,
    Provenance,
    is_leftover,
    load_json,
    load_tensors,
    require_kind,
    save_json,
    save_tensors,
    sha256_of,
)

_MANIFEST = "manifest.json"
_SHARD_KIND = "recording_shard"

# What must be the same for a call to go on with a recording. Names and versions may change; what is computed may not.
_SAME = ("dtype", "n_layers", "d_mlp", "processing", "backend", "site", "policy", "corpus", "tokenizer", "weights")


class RecordingFolder:
    """One recording on disk, made by any number of calls."""

    def __init__(self, path: str | os.PathLike[str], provenance: Provenance, languages: Sequence[str]) -> None:
        """Name the folder; nothing is read or written yet.

        Args:
            path: The folder.
            provenance: What this call would record.
            languages: Its languages in order.
        """
        self.path: Path = Path(path)
        self._provenance = provenance
        self._languages = list(languages)
        identity = {name: getattr(provenance, name) for name in _SAME}
        settings = provenance.extra["recording"]
        self.identity: str = sha256_of(json.dumps([identity, settings, self._languages], sort_keys=True))

    def open(self) -> Recording | None:
        """Return the result if the recording is finished; it has a checksum of its own, so no shard is read for it.

        Raises:
            ProvenanceError: It is of another model, corpus, data type, policy or plan; both values are named.
            StorageError: The manifest or the result is damaged, or the folder holds something else.
        """
        if not (self.path / _MANIFEST).exists():
            # A call that was killed while it wrote the manifest leaves nothing else.
            foreign = self.path.exists() and (
                not self.path.is_dir() or any(not is_leftover(entry) for entry in self.path.iterdir())
            )
            if foreign:
                raise StorageError(
                    f"{self.path} holds something that is no recording; give a new folder, or one made by record."
                )
            return None
        self._require_same()
        # What is missing of a finished recording is made again from its shards.
        return None if missing_parts(self.path) else Recording.load(self.path)

    def _require_same(self) -> None:
        manifest = self._manifest()
        mine, theirs = self._provenance, Provenance.from_dict(manifest["provenance"])
        what = f"the recording in {self.path} (of {theirs.model}) and this call (with {mine.model})"
        theirs.require_same(mine, _SAME, what=what)
        pairs: list[tuple[str, Any, Any]] = [("languages", manifest["languages"], self._languages)]
        old_settings, new_settings = _spread(theirs.extra["recording"]), _spread(mine.extra["recording"])
        for name in dict.fromkeys([*old_settings, *new_settings]):
            pairs.append((name, old_settings.get(name), new_settings.get(name)))
        for name, old, new in pairs:
            if old != new:
                raise ProvenanceError(
                    f"{what} do not belong together: {name} is {_short(old)} in one and {_short(new)} in the other; "
                    "use the same, or another path."
                )

    def _manifest(self) -> dict[str, Any]:
        file = self.path / _MANIFEST
        manifest = load_json(file)
        if not isinstance(manifest, dict) or manifest.get("kind") != "recording":
            raise StorageError(f"{file} is not the manifest of a recording; give another path.")
        if manifest.get("schema", SCHEMA + 1) > SCHEMA:
            raise StorageError(f"{file} has schema {manifest.get('schema')}, above {SCHEMA}; upgrade lens_neurons.")
        if manifest.pop("sha256", None) != _checksum(manifest):
            raise StorageError(f"{file} fails its checksum: it was changed or damaged; record into another path.")
        return manifest

    def plan(self) -> dict[str, Any] | None:
        """Return the plan of an earlier call, None where there was none."""
        if not (self.path / _MANIFEST).exists():
            return None
        values = self._manifest()["plan"]
        return {**values, "languages": tuple(values["languages"])}

    def start(self, plan: Mapping[str, Any]) -> None:
        """Write the manifest; it comes before anything else."""
        manifest = {
            "schema": SCHEMA,
            "kind": "recording",
            "languages": self._languages,
            "plan": {**plan, "languages": self._languages},
            "provenance": self._provenance.to_dict(),
        }
        save_json(self.path / _MANIFEST, {**manifest, "sha256": _checksum(manifest)})

    def shards(self, language: str) -> dict[int, Path]:
        """Return the shards of a language that are on disk, by their first text."""
        found: dict[int, Path] = {}
        for file in (self.path / "shards").glob("*.safetensors"):
            code, *numbers = file.stem.rsplit("-", 2)
            if len(numbers) != 2 or not all(number.isdigit() for number in numbers):
                raise StorageError(f"{file} is no shard of a recording; move it elsewhere.")
            first = numbers[0]
            if code == file_name(language):
                found[int(first)] = file
        return found

    def load_shard(self, file: Path, last: int | None = None) -> tuple[PartialSums, int]:
        """Return the sums in a shard and the position of its last text, which must be `last` where that is given.

        Raises:
            StorageError: It is damaged, or belongs to another recording.
        """
        tensors, header = load_tensors(file)
        require_kind(file, header, _SHARD_KIND)
        name = self._shard_path(header["language"], header["first"], header["last"]).name
        moved = file.name != name or last not in (None, header["last"])
        if header["recording"] != self.identity or moved:
            raise StorageError(f"{file} belongs to another recording or was renamed; delete it and run again.")
        return PartialSums.from_tensors(tensors), int(header["last"])

    def save_shard(self, shard: Shard, part: PartialSums) -> None:
        """Write the sums of a shard."""
        file = self._shard_path(shard.language, shard.first, shard.last)
        save_tensors(file, part.to_tensors(), self._header(_SHARD_KIND, shard))

    def _header(self, kind: str, shard: Shard) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "kind": kind,
            "recording": self.identity,
            "language": shard.language,
            "first": shard.first,
            "last": shard.last,
        }

    def save_extra(self, name: str, shard: Shard, part: Mapping[str, Tensor]) -> None:
        """Write what a collector took from a shard; it comes before the shard's sums, which say that all is there."""
        file = rows_file(self.path, name, shard.language, shard.first, shard.last)
        save_tensors(file, part, self._header(ROWS_KIND, shard))

    def load_extra(self, name: str, language: str, first: int, last: int) -> dict[str, Tensor]:
        """Return what a collector took from a shard.

        Raises:
            StorageError: It is gone or damaged, or belongs to another recording.
        """
        file = rows_file(self.path, name, language, first, last)
        return self._own(file, (language, first, last))

    def _own(self, file: Path, place: tuple[str, int, int]) -> dict[str, Tensor]:
        tensors, header = load_tensors(file)
        require_kind(file, header, ROWS_KIND)
        if header["recording"] != self.identity or (header["language"], header["first"], header["last"]) != place:
            raise StorageError(f"{file} belongs to another recording or was renamed; delete it and run again.")
        return tensors

    def complete(self, language: str, names: Sequence[str]) -> dict[int, Path]:
        """Return the shards of a language of which everything is on disk, what collectors took included."""
        found = self.shards(language)
        return {first: file for first, file in found.items() if self._has(language, _span(file), names)}

    def _has(self, language: str, span: Span, names: Sequence[str]) -> bool:
        return all(rows_file(self.path, name, language, *span).exists() for name in names)

    def rows(self, name: str, language: str, corpus: str) -> tuple[Rows, ...]:
        """Return the rows of a language whose shards are all there."""
        return rows_of(self.path, name, language, self.spans(language), recording=self.identity, corpus=corpus)

    def spans(self, language: str) -> list[Span]:
        """Return first and last text of every shard of a language, in order."""
        return sorted(_span(file) for file in self.shards(language).values())

    def save_total(self, name: str, language: str, total: Mapping[str, Tensor]) -> None:
        """Write what a collector added up over a finished language, and delete its shards' files, which it replaces."""
        span = (0, max((last for _, last in self.spans(language)), default=0))
        header = self._header(ROWS_KIND, Shard(language, *span, ()))
        save_tensors(self._total_path(name, language), total, header)
        for first, last in self.spans(language):
            rows_file(self.path, name, language, first, last).unlink(missing_ok=True)

    def total(self, name: str, language: str) -> dict[str, Tensor] | None:
        """Return what a collector added up over a language, None where it has not finished or lost a shard since."""
        file = self._total_path(name, language)
        if not file.exists():
            return None
        return self._own(file, (language, 0, max((last for _, last in self.spans(language)), default=0)))

    def _total_path(self, name: str, language: str) -> Path:
        return self.path / "languages" / f"{file_name(language)}.{name}.safetensors"

    def _shard_path(self, language: str, first: int, last: int) -> Path:
        return self.path / "shards" / f"{file_name(language)}-{first}-{last}.safetensors"

    def language(self, language: str) -> ActivationStats | None:
        """Return the statistics of a finished language, None if it is not."""
        file = self._language_path(language)
        if not file.exists():
            return None
        stats = ActivationStats.load(file)
        # A language of which a shard is gone is not finished: the others cannot say what was in it.
        if _gaps(self.spans(language)) or int(stats.texts.sum()) != sum(
            last - first + 1 for first, last in self.spans(language)
        ):
            return None
        stats.provenance.require_same(self._provenance, set(_SAME) - {"corpus"}, what=f"{file} and this call")
        return stats

    def save_language(self, language: str, stats: ActivationStats) -> None:
        """Write the statistics of a language whose shards are all there."""
        stats.save(self._language_path(language))

    def _language_path(self, language: str) -> Path:
        return self.path / "languages" / f"{file_name(language)}.safetensors"

    def finish(self, made: Recording) -> None:
        """Clear away what killed calls left half-written, and write the result, the statistics last."""
        # In this order: a call that finds the statistics returns at once and clears nothing.
        for file in self.path.rglob(".*.part"):
            file.unlink(missing_ok=True)
        parts = made.parts
        stats = parts.pop("stats")
        for name, value in parts.items():
            if name in ROW_PARTS:
                spans = {code: self.spans(code) for code in value.languages}
                save_rows(self.path, name, value, spans, self.identity)
            else:
                value.save(self.path / f"{name}.safetensors")
        stats.save(self.path / FILE_NAME)


def _spread(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with those of the collectors beside the others."""
    inner = {f"collect.{name}": value for name, value in settings.get("collect", {}).items()}
    return {**{name: value for name, value in settings.items() if name != "collect"}, **inner}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:40]}...{text[-15:]}"


def _span(file: Path) -> Span:
    _, first, last = file.stem.rsplit("-", 2)
    return int(first), int(last)


def _gaps(spans: Sequence[Span]) -> bool:
    return any(first != end for (first, _), end in zip(spans, [0, *(last + 1 for _, last in spans)], strict=False))


def _checksum(manifest: Mapping[str, Any]) -> str:
    return sha256_of(json.dumps(manifest, sort_keys=True, ensure_ascii=False))
