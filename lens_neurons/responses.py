"""Text responses: one row a text, one number a unit, in memory or memory-mapped from files.

A response is the mean of a unit's value over the counted tokens of a text (Kojima et al. 2024). Other methods keep
another number a text and unit; `statistic` says which. Units are numbered flat: sites in their order, then layer, then
index. Large recordings stay on disk: rows are read file by file and only the units that are asked for.
"""

import itertools
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
from lens_neurons.storage import (
    SAME_MODEL,
    SCHEMA,
    Provenance,
    corpus_of,
    load_tensors,
    reading,
    require_kind,
    save_tensors,
)

KIND = "text_responses"
ROWS_KIND = "text_rows"

# Units whose quantiles are found at once.
_UNITS_AT_ONCE = 1 << 16


@dataclass(frozen=True, eq=False)
class Rows:
    """Some rows of one language: in memory, or in a file from which only what is asked for is read.

    Attributes:
        positions: Number of each row's text in its corpus.
        values: A table of rows, or the file that holds it under the name "rows".
        chosen: Which rows of the table these are, in order; None: all.
        corpus: Fingerprint of the texts, "" where it is unknown.
    """

    positions: Int64[Tensor, " text"]
    values: Float[Tensor, "all unit"] | Path
    chosen: Int64[Tensor, " text"] | None = None
    corpus: str = ""

    def read(self, start: int, stop: int) -> Float[Tensor, "text part"]:
        """Return the columns start to stop of all rows.

        Raises:
            StorageError: The file is gone or damaged.
        """
        found = self._table(start, stop)
        return found if self.chosen is None else found[self.chosen]

    def _table(self, start: int, stop: int) -> Float[Tensor, "all part"]:
        if isinstance(self.values, Tensor):
            return self.values[:, start:stop]
        try:
            with safe_open(self.values, framework="pt") as stream:
                # The slice is a view into the whole file, which would stay mapped as long as the rows live.
                return stream.get_slice("rows")[:, start:stop].clone()
        except (OSError, SafetensorError) as error:
            raise StorageError(f"{self.values} cannot be read ({error}); record or download it again.") from None

    def take(self, rows: Int64[Tensor, " taken"]) -> "Rows":
        """Return some of the rows, in the order given; nothing is read for it."""
        return replace(self, positions=self.positions[rows], chosen=rows if self.chosen is None else self.chosen[rows])


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
        corpora: Mapping[str, str] | None = None,
        provenance: Provenance | None = None,
    ) -> "TextResponses":
        """Return responses from tables in memory.

        Args:
            rows: Language to its table [text, flat unit], float16 or float32.
            sites: Site to its number of layers and of units a layer.
            statistic: What the numbers are.
            positions: Language to the number of each text in its corpus; default: counted from 0.
            corpora: Language to a name of its texts: rows of one corpus are merged with those of another, but never a
                text of the same twice.
            provenance: What the rows come from.

        Raises:
            DataError: A table with another number of units than the sites have, or without a row; a language twice.
        """
        total = sum(layers * width for layers, width in sites.values())
        parts: dict[str, tuple[Rows, ...]] = {}
        for label, table in rows.items():
            if table.dim() != 2 or table.shape[1] != total or not table.shape[0]:
                raise DataError(
                    f"rows of '{label}' have shape {tuple(table.shape)}; expected at least one text, {total} units."
                )
            numbers = torch.arange(len(table)) if positions is None else positions[label]
            if len(numbers) != len(table):
                raise DataError(f"'{label}' has {len(table)} rows and {len(numbers)} positions; give one for each row.")
            code = canonical(label)
            if code in parts:
                raise DataError(f"'{label}' is language '{code}', which is given twice; name each language once.")
            parts[code] = (Rows(numbers, table, corpus=(corpora or {}).get(label, "")),)
        if not parts:
            raise DataError("there are no rows; give the table of at least one language.")
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
        if not spans:
            raise DataError(f"name at least one site; there are responses at {', '.join(self.sites)}.")

        def reduced(part: Rows) -> Rows:
            table = torch.cat([part.read(first, last) for first, last in spans], dim=1)
            return replace(part, values=table, chosen=None)

        parts = {code: tuple(reduced(part) for part in own) for code, own in self.parts.items()}
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
        begin, end = self.span(name)
        found: list[Tensor] = []
        for first in range(begin, end, _UNITS_AT_ONCE):
            ordered = self.rows(language, first, min(first + _UNITS_AT_ONCE, end)).float().sort(dim=0).values
            rank = q * (len(ordered) - 1)
            low, high = ordered[int(rank)], ordered[min(int(rank) + 1, len(ordered) - 1)]
            found.append(torch.lerp(low, high, rank - int(rank)))
        return torch.cat(found).reshape(self.sites[name])

    def median(self, language: str, site: str | None = None) -> Float32[Tensor, "layer unit"]:
        """Return the median over a language's texts of every unit of a site (of an even number the middle two's mean).

        Raises:
            DataError: The site was not recorded, or there are several and none is named.
        """
        return self.quantile(language, 0.5, site)

    def select(self, languages: Iterable[str]) -> "TextResponses":
        """Return the responses of some languages, in the order given.

        Raises:
            DataError: One was not recorded, or none is named.
        """
        return self._with({canonical(label): self._own(label) for label in languages})

    def _with(self, parts: Mapping[str, tuple[Rows, ...]]) -> "TextResponses":
        if not parts:
            raise DataError(f"name at least one language; there are {', '.join(self.languages)}.")
        corpora = {code: "+".join(sorted({part.corpus for part in own})) for code, own in parts.items()}
        return replace(self, parts=parts, provenance=self.provenance.replace(corpus=corpus_of(corpora)))

    def texts(self, chosen: Mapping[str, Sequence[int] | Int64[Tensor, " _"]]) -> "TextResponses":
        """Return some rows of each language; nothing is read for it.

        Args:
            chosen: Language to the rows to keep, counted in the order of `rows`.

        Raises:
            DataError: There is no such row, or no such language.
        """
        parts: dict[str, tuple[Rows, ...]] = {}
        for label, wanted in chosen.items():
            at, own = torch.as_tensor(wanted, dtype=torch.int64), self._own(label)
            ends = torch.tensor([len(part.positions) for part in own]).cumsum(dim=0)
            if len(at) and not 0 <= int(at.min()) <= int(at.max()) < int(ends[-1]):
                raise DataError(f"'{label}' has rows 0 to {int(ends[-1]) - 1}; {wanted} names another.")
            owner = torch.searchsorted(ends, at, right=True)
            # Runs of rows of one part stay together, so that the order asked for is kept.
            runs = [0, *(1 + (owner[1:] != owner[:-1]).nonzero()[:, 0]).tolist(), len(at)]
            parts[canonical(label)] = tuple(
                own[int(owner[i])].take(at[i:j] - (ends[owner[i]] - len(own[int(owner[i])].positions)))
                for i, j in itertools.pairwise(runs)
                if i < j
            )
        return self._with(parts)

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
            self.provenance.require_same(other.provenance, SAME_MODEL, what="the recordings")
            for code, own in other.parts.items():
                parts[code] = (*parts.get(code, ()), *own)
        for code, own in parts.items():
            known = [(part.corpus, position) for part in own for position in part.positions.tolist()]
            if len(set(known)) != len(known):
                raise DataError(
                    f"a text of '{code}' is in more than one recording; leave one of the two out, or name the corpora."
                )
        return self._with(parts)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to one safetensors file, atomically, with a checksum."""
        tensors: dict[str, Tensor] = {}
        for number, own in enumerate(self.parts.values()):
            for i, part in enumerate(own):
                tensors[f"{number}.{i}.rows"] = part.read(0, self.n_units)
                tensors[f"{number}.{i}.positions"] = part.positions
        corpora = [[part.corpus for part in own] for own in self.parts.values()]
        save_tensors(path, tensors, {"kind": KIND, **self.header(), "corpora": corpora})

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
        with reading(path):
            parts = {
                code: tuple(
                    Rows(tensors[f"{number}.{i}.positions"], tensors[f"{number}.{i}.rows"], corpus=corpus)
                    for i, corpus in enumerate(header["corpora"][number])
                )
                for number, code in enumerate(header["languages"])
            }
            return cls.from_header(header, parts)

    @classmethod
    def from_header(cls, header: Mapping[str, Any], parts: Mapping[str, tuple[Rows, ...]]) -> "TextResponses":
        """Return responses from what `header` gave, and their rows."""
        sites = {site: (int(layers), int(width)) for site, layers, width in header["sites"]}
        known = Provenance.from_dict(header["provenance"])
        return cls(parts, sites, header["statistic"], known, dict(header["notes"]))


def mapped_rows(path: Path, expected: Mapping[str, Any] | None = None) -> Rows:
    """Return the rows in a file of a recording; its positions are read, its rows stay where they are.

    Args:
        path: The file.
        expected: What its header must say.

    Raises:
        StorageError: The file is gone, damaged or of another kind, or its header says something else.
    """
    try:
        with safe_open(path, framework="pt") as stream:
            header = json.loads((stream.metadata() or {})["lens_neurons"])
            require_kind(path, header, ROWS_KIND)
            found = Rows(stream.get_tensor("positions").clone(), path)
    except FileNotFoundError:
        raise StorageError(f"{path} is gone; call record again with the same path, or download it again.") from None
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise StorageError(f"{path} is damaged or no file of rows ({error}); record it again.") from None
    for name, value in (expected or {}).items():
        if header.get(name) != value:
            raise StorageError(f"{path} is of another recording or another place in it ({name}); delete it.")
    return found
