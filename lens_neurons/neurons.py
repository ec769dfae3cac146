"""Neuron sets: which units belong to which language; set algebra, tables, files, random controls."""

import os
import pickle
import struct
import tarfile
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor

from lens_neurons.errors import DataError, ProvenanceError, SettingError, StorageError
from lens_neurons.languages import canonical
from lens_neurons.storage import SCHEMA, Provenance, derive_seed, load_tensors, require_kind, save_tensors

Metric = Literal["jaccard", "count", "dice"]

# What must agree between a neuron set and the model it is used on (design rule 10).
_SHAPE_FIELDS = ("n_layers", "d_mlp")
_MODEL_FIELDS = ("weights", "dtype", "revision", "tokenizer")

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)

# What torch.load raises on bytes that are no file of its own, or only the beginning of one.
_UNREADABLE = (
    pickle.UnpicklingError,
    struct.error,
    tarfile.TarError,
    AssertionError,
    AttributeError,
    EOFError,
    ImportError,
    IndexError,
    KeyError,
    MemoryError,
    OSError,
    OverflowError,
    RuntimeError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True)
class UnitTable:
    """The units of one language, best first.

    Attributes:
        layer: Layer of each unit.
        index: Index of each unit within its layer.
        score: What the method ranked it by (its meaning is the method's).
    """

    layer: Int64[Tensor, " unit"]
    index: Int64[Tensor, " unit"]
    score: Float64[Tensor, " unit"]

    def __len__(self) -> int:
        """Return the number of units."""
        return self.layer.shape[0]


@dataclass(frozen=True)
class NeuronSet:
    """The units that belong to each language, as an identification method returned them.

    Languages are keyed by name; one without units has an empty entry. A unit may belong to several languages.

    Attributes:
        tables: Language to units.
        site: Where the units live.
        shape: Number of layers, and units a layer at this site.
        provenance: What it was identified on.
        method: Name and settings of the method.
        notes: Exceptions worth reading, such as layers short of free units.
    """

    tables: Mapping[str, UnitTable]
    site: str
    shape: tuple[int, int]
    provenance: Provenance
    method: Mapping[str, Any] = field(default_factory=dict[str, Any])
    notes: tuple[str, ...] = ()

    @classmethod
    def from_masks(
        cls,
        masks: Mapping[str, Bool[Tensor, "layer neuron"]],
        *,
        site: str = "gate_act",
        scores: Mapping[str, Float64[Tensor, "layer neuron"]] | None = None,
        provenance: Provenance | None = None,
        method: Mapping[str, Any] | None = None,
    ) -> "NeuronSet":
        """Return a set from one boolean mask a language.

        Args:
            masks: Language to mask.
            site: Where the units live.
            scores: Language to score, lower is better; units are ordered by (score, layer, index).
            provenance: What the masks come from.
            method: Name and settings of the method.

        Raises:
            DataError: No mask, or masks of different shapes.
        """
        shapes = {tuple(mask.shape) for mask in masks.values()}
        if len(shapes) != 1:
            raise DataError(f"masks must all have one shape [layer, neuron]; got {sorted(shapes) or 'none'}.")
        shape = shapes.pop()
        tables: dict[str, UnitTable] = {}
        for label, mask in masks.items():
            layer, index = (part.to(torch.int64).cpu() for part in torch.nonzero(mask, as_tuple=True))
            score = torch.zeros(layer.shape[0], dtype=torch.float64)
            if scores is not None:
                score = scores[label].cpu().to(torch.float64)[layer, index]
            # nonzero gives (layer, index) order and the sort is stable, so ties are broken by rule 8.
            order = torch.argsort(score, stable=True)
            tables[canonical(label)] = UnitTable(layer[order], index[order], score[order])
        known = provenance or Provenance.unknown((shape[0], shape[1]), site)
        return cls(tables, site, (shape[0], shape[1]), known, dict(method or {}))

    @property
    def languages(self) -> tuple[str, ...]:
        """The languages, those without units included."""
        return tuple(self.tables)

    def __getitem__(self, language: str) -> "NeuronSet":
        """Return the set with one language."""
        return replace(self, tables={canonical(language): self._table(language)})

    def __len__(self) -> int:
        """Return the number of distinct units."""
        return int(self.union_mask().sum())

    def __repr__(self) -> str:
        """Return method, size and counts."""
        counts = ", ".join(f"{code}: {n}" for code, n in self.counts().items())
        total = self.shape[0] * self.shape[1]
        return f"NeuronSet({self.method.get('name', '?')}, {self.site}, {len(self)} of {total} units; {counts})"

    def _table(self, language: str) -> UnitTable:
        code = canonical(language)
        if code not in self.tables:
            raise DataError(f"the neuron set has no '{language}'; it has {', '.join(self.languages)}.")
        return self.tables[code]

    def units(self, language: str) -> tuple[Int64[Tensor, " unit"], Int64[Tensor, " unit"]]:
        """Return layers and indices of one language's units, best first."""
        table = self._table(language)
        return table.layer, table.index

    def mask(self, language: str) -> Bool[Tensor, "layer neuron"]:
        """Return one language's units as a boolean mask."""
        mask = torch.zeros(self.shape, dtype=torch.bool)
        table = self._table(language)
        mask[table.layer, table.index] = True
        return mask

    def union_mask(self) -> Bool[Tensor, "layer neuron"]:
        """Return the units of any language as a boolean mask."""
        mask = torch.zeros(self.shape, dtype=torch.bool)
        for table in self.tables.values():
            mask[table.layer, table.index] = True
        return mask

    def counts(self) -> dict[str, int]:
        """Return the number of units a language."""
        return {code: len(table) for code, table in self.tables.items()}

    def select(self, languages: Iterable[str]) -> "NeuronSet":
        """Return the set with some of its languages, in the order given."""
        return replace(self, tables={canonical(code): self._table(code) for code in languages})

    def _filtered(self, keep: Callable[[str, UnitTable], Tensor], note: str) -> "NeuronSet":
        tables: dict[str, UnitTable] = {}
        for code, table in self.tables.items():
            chosen = keep(code, table)
            tables[code] = UnitTable(table.layer[chosen], table.index[chosen], table.score[chosen])
        return replace(self, tables=tables, method={**self.method, "then": [*self.method.get("then", []), note]})

    def restrict(self, layers: Collection[int]) -> "NeuronSet":
        """Return the set with the units of some layers only."""
        wanted = torch.tensor(sorted(layers), dtype=torch.int64)
        return self._filtered(lambda _, table: torch.isin(table.layer, wanted), f"layers {sorted(layers)}")

    def exclusive(self) -> "NeuronSet":
        """Return the set without the units that belong to more than one language."""
        owners = torch.stack([self.mask(code) for code in self.languages]).sum(dim=0)
        return self._filtered(lambda _, table: owners[table.layer, table.index] == 1, "exclusive")

    def __and__(self, other: "NeuronSet") -> "NeuronSet":
        """Return, language by language, the units in both sets."""
        return self._combined(other, "and")

    def __sub__(self, other: "NeuronSet") -> "NeuronSet":
        """Return, language by language, the units of this set that are not in the other."""
        return self._combined(other, "minus")

    def __or__(self, other: "NeuronSet") -> "NeuronSet":
        """Return, language by language, the units in either set; this set's order and scores come first."""
        return self._combined(other, "or")

    def _combined(self, other: "NeuronSet", operation: str) -> "NeuronSet":
        if (self.site, self.shape) != (other.site, other.shape):
            raise ProvenanceError(
                f"neuron sets at {self.site} {self.shape} and {other.site} {other.shape} cannot be combined; "
                "both must be of the same site and shape."
            )
        if self.provenance.known and other.provenance.known:
            self.provenance.require_same(other.provenance, ("weights",), what="the two neuron sets")
        note = f"{operation} {other.method.get('name', 'set')}"
        if operation != "or":
            keep_shared = operation == "and"
            empty = torch.zeros(self.shape, dtype=torch.bool)
            theirs = {code: other.mask(code) if code in other.tables else empty for code in self.tables}
            return self._filtered(lambda code, table: theirs[code][table.layer, table.index] == keep_shared, note)
        tables = dict(self.tables)
        for code, table in other.tables.items():
            if code in tables:
                fresh = ~self.mask(code)[table.layer, table.index]
                mine = tables[code]
                tables[code] = UnitTable(
                    torch.cat([mine.layer, table.layer[fresh]]),
                    torch.cat([mine.index, table.index[fresh]]),
                    torch.cat([mine.score, table.score[fresh]]),
                )
            else:
                tables[code] = table
        return replace(self, tables=tables, method={**self.method, "then": [*self.method.get("then", []), note]})

    def overlap(self, metric: str = "jaccard") -> pd.DataFrame:
        """Return a language x language table of shared units.

        Args:
            metric: "count" of shared units; "jaccard": shared / union; "dice": 2 shared / (sum of sizes). Two
                empty languages give 0.

        Raises:
            SettingError: Another metric.
        """
        if metric not in ("jaccard", "count", "dice"):
            raise SettingError(f"metric={metric!r} is unknown; use 'jaccard', 'count' or 'dice'.")
        masks = torch.stack([self.mask(code).flatten() for code in self.languages]).to(torch.float64)
        shared = masks @ masks.T
        sizes = masks.sum(dim=1)
        total = sizes[:, None] + sizes[None, :]
        if metric == "count":
            values = shared.to(torch.int64)
        else:
            values = (shared / (total - shared) if metric == "jaccard" else 2 * shared / total).nan_to_num(0.0)
        return pd.DataFrame(values.numpy(), index=list(self.languages), columns=list(self.languages))

    def to_frame(self) -> pd.DataFrame:
        """Return one row a language and unit: language, site, layer, neuron, score, rank."""
        parts = [
            pd.DataFrame(
                {
                    "language": code,
                    "site": self.site,
                    "layer": table.layer.numpy(),
                    "neuron": table.index.numpy(),
                    "score": table.score.numpy(),
                    "rank": range(len(table)),
                }
            )
            for code, table in self.tables.items()
            if len(table)
        ]
        columns = ["language", "site", "layer", "neuron", "score", "rank"]
        return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=columns)

    def by_layer(self) -> pd.DataFrame:
        """Return the number of units by layer (rows) and language (columns)."""
        counts = {
            code: torch.bincount(table.layer, minlength=self.shape[0]).numpy() for code, table in self.tables.items()
        }
        return pd.DataFrame(counts).rename_axis(index="layer")

    def summary(self) -> pd.DataFrame:
        """Return one row a language: units, share of all units, exclusive units, first, median and last layer."""
        exclusive = self.exclusive().counts()
        total = self.shape[0] * self.shape[1]
        rows: list[dict[str, Any]] = []
        for code, table in self.tables.items():
            layers = table.layer.to(torch.float64)
            rows.append(
                {
                    "language": code,
                    "units": len(table),
                    "share": len(table) / total,
                    "exclusive": exclusive[code],
                    "first_layer": int(layers.min()) if len(table) else None,
                    "median_layer": float(layers.median()) if len(table) else None,
                    "last_layer": int(layers.max()) if len(table) else None,
                }
            )
        return pd.DataFrame(rows).set_index("language")

    def random_like(
        self, seed: int, *, avoid: Bool[Tensor, "layer neuron"] | None = None, allow_short: bool = False
    ) -> "NeuronSet":
        """Return a random control: as many units in every layer for every language, none of them in this set.

        Args:
            seed: Seed; each language's draw depends on it and on the language's name alone.
            avoid: Further units that must not be drawn, such as those of languages that were selected away.
            allow_short: In a layer with too few free units draw those there are, and say so in `notes`.

        Raises:
            DataError: A layer has fewer free units than asked for.
        """
        taken = self.union_mask() if avoid is None else self.union_mask() | avoid
        free = [torch.nonzero(~taken[layer]).flatten() for layer in range(self.shape[0])]
        tables: dict[str, UnitTable] = {}
        notes: list[str] = []
        for code, table in self.tables.items():
            generator = torch.Generator().manual_seed(derive_seed(seed, "random_like", code))
            layers: list[Tensor] = []
            indices: list[Tensor] = []
            for layer, wanted in enumerate(torch.bincount(table.layer, minlength=self.shape[0]).tolist()):
                there = free[layer].shape[0]
                if wanted > there:
                    message = f"layer {layer} has {there} free units, but '{code}' needs {wanted}"
                    if not allow_short:
                        raise DataError(f"{message}; use a smaller set, or allow_short=True and report it.")
                    notes.append(message)
                order = torch.randperm(there, generator=generator)[:wanted]
                chosen = free[layer][order].sort().values
                indices.append(chosen)
                layers.append(torch.full_like(chosen, layer))
            index = torch.cat(indices)
            tables[code] = UnitTable(torch.cat(layers), index, torch.zeros(index.shape[0], dtype=torch.float64))
        method = {"name": "random", "like": dict(self.method), "seed": seed}
        return replace(self, tables=tables, method=method, notes=tuple(notes))

    def require_fit(self, model: Provenance, allow: Collection[str] = ()) -> None:
        """Raise unless the set may be used on a model.

        Args:
            model: The model's provenance.
            allow: Fields that may differ: "weights", "dtype", "revision", "tokenizer".

        Raises:
            ProvenanceError: Another shape; or another model, unless allowed.
        """
        self.provenance.require_same(model, _SHAPE_FIELDS, what="the neuron set and the model")
        if not self.provenance.known:
            warnings.warn(
                "the neuron set does not say which model it comes from; only its shape was checked.", stacklevel=2
            )
            return
        self.provenance.require_same(model, _MODEL_FIELDS, allow, what="the neuron set and the model")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the set as one safetensors file with a JSON header."""
        tensors: dict[str, Tensor] = {}
        for number, table in enumerate(self.tables.values()):
            tensors |= {f"{number}.layer": table.layer, f"{number}.index": table.index, f"{number}.score": table.score}
        header = {
            "kind": "neuron_set",
            "schema": SCHEMA,
            "languages": list(self.languages),
            "sites": {self.site: list(self.shape)},
            "method": dict(self.method),
            "notes": list(self.notes),
            "provenance": self.provenance.to_dict(),
        }
        save_tensors(path, tensors, header)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "NeuronSet":
        """Return the set in a file written by `save`.

        Raises:
            StorageError: The file is damaged or of another kind.
        """
        tensors, header = load_tensors(path)
        require_kind(path, header, "neuron_set")
        ((site, shape),) = header["sites"].items()
        tables = {
            code: UnitTable(*(tensors[f"{number}.{name}"] for name in ("layer", "index", "score")))
            for number, code in enumerate(header["languages"])
        }
        provenance = Provenance.from_dict(header["provenance"])
        return cls(tables, site, (shape[0], shape[1]), provenance, header["method"], tuple(header["notes"]))

    @classmethod
    def from_published(
        cls, path: str | os.PathLike[str], *, languages: Sequence[str], shape: tuple[int, int], site: str = "gate_act"
    ) -> "NeuronSet":
        """Return the set in a `.pth` file published with a paper: list[language][layer] of index tensors.

        Args:
            path: The file; read with `torch.load(weights_only=True)`.
            languages: The file's languages in its order (the files do not say).
            shape: Number of layers and neurons a layer.
            site: Where the units live.

        Raises:
            StorageError: The file does not exist, is damaged, or does not hold such lists of integers.
            DataError: Its numbers of languages or layers, or its indices, do not fit.
        """
        if not Path(path).is_file():
            raise StorageError(f"{path} does not exist; give the path of a published .pth file.")
        try:
            entries: Any = torch.load(path, map_location="cpu", weights_only=True)
        except _UNREADABLE as error:
            raise StorageError(
                f"{path} cannot be read as a .pth file ({type(error).__name__}); it is damaged or of another kind."
            ) from error
        if not isinstance(entries, list) or not all(isinstance(entry, list) for entry in entries):
            raise StorageError(f"{path} holds no list[language][layer] of tensors; expected a published neuron file.")
        if len(entries) != len(languages):
            raise DataError(
                f"{path} holds {len(entries)} languages, but {len(languages)} were named; name each in order."
            )
        masks: dict[str, Tensor] = {}
        for label, layers in zip(languages, entries, strict=True):
            if len(layers) != shape[0]:
                raise DataError(f"{path} has {len(layers)} layers for '{label}', but shape says {shape[0]}.")
            mask = torch.zeros(shape, dtype=torch.bool)
            for layer, indices in enumerate(layers):
                mask[layer, _published_indices(path, indices, shape[1])] = True
            masks[label] = mask
        return cls.from_masks(masks, site=site, method={"name": "published", "file": Path(path).name})


def _published_indices(path: str | os.PathLike[str], entry: Any, width: int) -> Int64[Tensor, " unit"]:
    # An empty list becomes a float tensor where nobody says otherwise.
    if isinstance(entry, Tensor) and entry.numel() == 0:
        return torch.zeros(0, dtype=torch.int64)
    if not isinstance(entry, Tensor) or entry.dtype not in _INTEGERS or entry.dim() != 1:
        raise StorageError(f"{path} holds an entry that is no list of integers; expected a published neuron file.")
    indices = entry.to(torch.int64)
    for index in (int(indices.min()), int(indices.max())):
        if not 0 <= index < width:
            raise DataError(f"{path}: index {index} does not fit a layer of {width} neurons; check shape and file.")
    return indices
