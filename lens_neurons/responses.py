"""Text responses: one row a text, one number a unit, in memory or memory-mapped from files.

A response is the mean of a unit's value over the counted tokens of a text (Kojima et al. 2024). Other methods keep
another number a text and unit; `statistic` says which. Units are numbered flat: sites in their order, then layer, then
index. Large recordings stay on disk: rows are read file by file and only the units that are asked for.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Float32, Int64
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lens_neurons.errors import DataError, SettingError, StorageError
from lens_neurons.languages import canonical
from lens_neurons.storage import SCHEMA, Provenance, load_tensors, require_kind, save_tensors

KIND = "text_responses"
ROWS_KIND = "text_rows"

# What must agree before rows go together.
_SAME = (
    *("n_layers", "model", "revision", "dtype", "processing", "backend"),
    *("weights", "tokenizer", "policy"),
)


@dataclass(frozen=True, eq=False)
class Rows:
    """Some rows of one language: in memory, or in a file from which only what is asked for is read.

    Attributes:
        positions: Number of each row's text in its corpus.
        values: The rows, or the file that holds them under the name "rows".
    """

    positions: Int64[Tensor, " text"]
    values: Float[Tensor, "text unit"] | Path

    def read(self, start: int, stop: int) -> Float[Tensor, "text part"]:
        """Return the columns start to stop of all rows.

        Raises:
            StorageError: The file is gone or damaged.
        """
        if isinstance(self.values, Tensor):
            return self.values[:, start:stop]
        try:
            with safe_open(self.values, framework="pt") as stream:
                # A copy, for a slice keeps its file mapped: with those of many files at once, most of them in memory.
                return stream.get_slice("rows")[:, start:stop].clone()
        except (OSError, SafetensorError) as error:
            raise StorageError(f"{self.values} cannot be read ({error}); record or download it again.") from None


@dataclass(frozen=True, eq=False)
class TextResponses:
    """One number for every text and unit.

    Attributes:
        parts: Language to its rows, in any number of parts.
        sites: Site to its number of layers and of units a layer, in the order of the flat numbers.
        statistic: What the number is: "mean" over the counted tokens, or what a method says.
        provenance: Model, tokenizer, policy and corpus.
        notes: What else is known, by language.
    """

    parts: Mapping[str, tuple[Rows, ...]]
    sites: Mapping[str, tuple[int, int]]
    statistic: str = "mean"
    provenance: Provenance = field(default_factory=Provenance)
    notes: dict[str, Any] = field(default_factory=dict[str, Any])

    @classmethod
    def from_rows(
        cls,
        rows: Mapping[str, Float[Tensor, "_ unit"]],
        *,
        sites: Mapping[str, tuple[int, int]],
        statistic: str = "mean",
        positions: Mapping[str, Int64[Tensor, " _"]] | None = None,
        provenance: Provenance | None = None,
    ) -> "TextResponses":
        """Return responses from tables in memory.

        Args:
            rows: Language to its table [text, flat unit], float16 or float32.
            sites: Site to its number of layers and of units a layer.
            statistic: What the numbers are.
            positions: Language to the number of each text in its corpus; default: counted from 0.
            provenance: What the rows come from.

        Raises:
            DataError: A table with another number of units than the sites have, or without a row.
        """
        total = sum(layers * width for layers, width in sites.values())
        parts: dict[str, tuple[Rows, ...]] = {}
        for label, table in rows.items():
            if table.shape[1] != total or not table.shape[0]:
                raise DataError(
                    f"rows of '{label}' have shape {tuple(table.shape)}; expected at least one text, {total} units."
                )
            numbers = torch.arange(len(table)) if positions is None else positions[label]
            parts[canonical(label)] = (Rows(numbers, table),)
        known = provenance or Provenance.unknown(next(iter(sites.values())), "+".join(sites))
        return cls(parts, dict(sites), statistic, known)

    @property
    def languages(self) -> tuple[str, ...]:
        """The languages."""
        return tuple(self.parts)

    @property
    def n_units(self) -> int:
        """Number of units of all sites."""
        return sum(layers * width for layers, width in self.sites.values())

    def __repr__(self) -> str:
        """Return statistic, sites and texts a language."""
        counts = ", ".join(f"{code}: {n}" for code, n in self.counts().items())
        return f"TextResponses({self.statistic}, {'+'.join(self.sites)}, {self.n_units:,} units; texts {counts})"

    def _own(self, language: str) -> tuple[Rows, ...]:
        code = canonical(language)
        if code not in self.parts:
            raise DataError(f"'{language}' was not recorded; this recording has {', '.join(self.languages)}.")
        return self.parts[code]

    def counts(self) -> dict[str, int]:
        """Return the number of texts a language."""
        return {code: sum(len(part.positions) for part in own) for code, own in self.parts.items()}

    def positions(self, language: str) -> Int64[Tensor, " text"]:
        """Return the number in the corpus of each of a language's texts, in the order of the rows."""
        return torch.cat([part.positions for part in self._own(language)])

    def span(self, site: str) -> tuple[int, int]:
        """Return the first flat unit of a site and the one after its last.

        Raises:
            DataError: The site was not recorded.
        """
        first = 0
        for name, (layers, width) in self.sites.items():
            if name == site:
                return first, first + layers * width
            first += layers * width
        raise DataError(f"responses at '{site}' were not recorded; there are those at {', '.join(self.sites)}.")

    def rows(self, language: str, start: int = 0, stop: int | None = None) -> Float[Tensor, "text unit"]:
        """Return the rows of a language, or some flat units of them, as they are stored."""
        end = self.n_units if stop is None else stop
        return torch.cat([part.read(start, end) for part in self._own(language)])

    def labels(self) -> Int64[Tensor, " text"]:
        """Return the position in `languages` of every text, in the order of `blocks`."""
        counts = torch.tensor(list(self.counts().values()))
        return torch.repeat_interleave(torch.arange(len(counts)), counts)

    def blocks(self, units_per_block: int) -> Iterator[tuple[int, Float32[Tensor, "text unit"]]]:
        """Yield the rows of all languages, some units at a time: first flat unit, and the table."""
        if units_per_block < 1:
            raise SettingError(f"units_per_block={units_per_block} must be at least 1 unit.")
        for first in range(0, self.n_units, units_per_block):
            last = min(first + units_per_block, self.n_units)
            yield first, torch.cat([self.rows(code, first, last).float() for code in self.languages])

    def at(self, site: str) -> "TextResponses":
        """Return the responses at one site.

        Raises:
            DataError: The site was not recorded.
        """
        return self.only(site)

    def only(self, *sites: str) -> "TextResponses":
        """Return the responses at some sites, in memory, in the order given.

        Raises:
            DataError: A site was not recorded.
        """
        if tuple(sites) == tuple(self.sites):
            return self
        spans = [self.span(site) for site in sites]
        parts = {
            code: tuple(
                Rows(part.positions, torch.cat([part.read(first, last) for first, last in spans], dim=1))
                for part in own
            )
            for code, own in self.parts.items()
        }
        chosen = {site: self.sites[site] for site in sites}
        width = chosen[sites[0]][1] if len(sites) == 1 else self.provenance.d_mlp
        known = self.provenance.replace(site="+".join(sites), d_mlp=width)
        return replace(self, parts=parts, sites=chosen, provenance=known)

    def quantile(self, language: str, q: float, site: str | None = None) -> Float32[Tensor, "layer unit"]:
        """Return a quantile over a language's texts of every unit of a site, interpolated linearly.

        Kojima et al. override with the median (`q=0.5`, their on_p50) or `q=0.9` (on_p90).

        Raises:
            SettingError: q outside [0, 1].
            DataError: The site was not recorded, or there are several and none is named.
        """
        if not 0 <= q <= 1:
            raise SettingError(f"q={q} must be between 0 and 1; 0.5 is the median.")
        if site is None and len(self.sites) > 1:
            raise DataError(f"there are responses at {', '.join(self.sites)}; name one of them with site=.")
        name = site or next(iter(self.sites))
        first, last = self.span(name)
        ordered = self.rows(language, first, last).float().sort(dim=0).values
        rank = q * (len(ordered) - 1)
        low, high = ordered[int(rank)], ordered[min(int(rank) + 1, len(ordered) - 1)]
        return torch.lerp(low, high, rank - int(rank)).reshape(self.sites[name])

    def median(self, language: str, site: str | None = None) -> Float32[Tensor, "layer unit"]:
        """Return the median over a language's texts of every unit of a site (of an even number the middle two's mean).

        Raises:
            DataError: The site was not recorded, or there are several and none is named.
        """
        return self.quantile(language, 0.5, site)

    def select(self, languages: Iterable[str]) -> "TextResponses":
        """Return the responses of some languages, in the order given.

        Raises:
            DataError: One was not recorded.
        """
        return replace(self, parts={canonical(label): self._own(label) for label in languages})

    def texts(self, chosen: Mapping[str, Sequence[int] | Int64[Tensor, " _"]]) -> "TextResponses":
        """Return some rows of each language, in memory.

        Args:
            chosen: Language to the rows to keep, counted in the order of `rows`.
        """
        parts: dict[str, tuple[Rows, ...]] = {}
        for label, wanted in chosen.items():
            at = torch.as_tensor(wanted, dtype=torch.int64)
            parts[canonical(label)] = (Rows(self.positions(label)[at], self.rows(label)[at]),)
        return replace(self, parts=parts)

    def merge(self, *others: "TextResponses") -> "TextResponses":
        """Return these rows with those of other languages, or of further texts of the same, of the same model.

        Raises:
            DataError: Other sites or another statistic; or a text of a language twice.
            ProvenanceError: Model, tokenizer or policy differ.
        """
        parts = dict(self.parts)
        for other in others:
            if dict(other.sites) != dict(self.sites) or other.statistic != self.statistic:
                raise DataError(
                    f"responses ({self.statistic}) at {dict(self.sites)} and ({other.statistic}) at "
                    f"{dict(other.sites)} cannot be merged; record both with the same sites."
                )
            if self.provenance.known and other.provenance.known:
                self.provenance.require_same(other.provenance, _SAME, what="the recordings")
            for code, own in other.parts.items():
                parts[code] = (*parts.get(code, ()), *own)
        made = replace(self, parts=parts)
        for code in made.languages:
            numbers = made.positions(code)
            if len(numbers.unique()) != len(numbers):
                raise DataError(f"a text of '{code}' is in more than one recording; leave one of the two out.")
        return made

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to one safetensors file, atomically, with a checksum."""
        tensors: dict[str, Tensor] = {}
        for number, code in enumerate(self.languages):
            tensors[f"{number}.rows"], tensors[f"{number}.positions"] = self.rows(code), self.positions(code)
        save_tensors(path, tensors, {"kind": KIND, **self.header()})

    def header(self) -> dict[str, Any]:
        """Return everything but the rows as JSON values."""
        return {
            "schema": SCHEMA,
            "languages": list(self.languages),
            "sites": [[site, *shape] for site, shape in self.sites.items()],
            "statistic": self.statistic,
            "provenance": self.provenance.to_dict(),
            "notes": self.notes,
        }

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "TextResponses":
        """Return the responses in a file that `save` wrote, in memory.

        Raises:
            StorageError: The file is damaged or of another kind.
        """
        tensors, header = load_tensors(path)
        require_kind(path, header, KIND)
        parts = {
            code: (Rows(tensors[f"{number}.positions"], tensors[f"{number}.rows"]),)
            for number, code in enumerate(header["languages"])
        }
        return cls.from_header(header, parts)

    @classmethod
    def from_header(cls, header: Mapping[str, Any], parts: Mapping[str, tuple[Rows, ...]]) -> "TextResponses":
        """Return responses from what `header` gave, and their rows."""
        sites = {site: (int(layers), int(width)) for site, layers, width in header["sites"]}
        known = Provenance.from_dict(header["provenance"])
        return cls(parts, sites, header["statistic"], known, dict(header["notes"]))


def mapped_rows(path: Path) -> Rows:
    """Return the rows in a file of a recording; its positions are read, its rows stay where they are.

    Raises:
        StorageError: The file is damaged or of another kind.
    """
    try:
        with safe_open(path, framework="pt") as stream:
            header = json.loads((stream.metadata() or {})["lens_neurons"])
            require_kind(path, header, ROWS_KIND)
            return Rows(stream.get_tensor("positions"), path)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise StorageError(f"{path} is damaged or no file of rows ({error}); record it again.") from None
