"""Histograms: how the values of every unit are distributed in every language, in bins fixed in advance.

Distribution-aware methods compare languages by the whole distribution of a unit's values. The bins are the same for
every unit, language and shard, so that parts of a recording add up exactly.
"""

import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Float32, Float64, Int32, Int64
from torch import Tensor

from lens_neurons.adapter import Adapter
from lens_neurons.batching import Batch, Shard
from lens_neurons.bins import Binning, Bins, binning_of
from lens_neurons.collectors import Collector, HookPair
from lens_neurons.errors import DataError, ModelError, SettingError
from lens_neurons.languages import canonical, recorded_index, require_once_each
from lens_neurons.storage import (
    SAME_MODEL,
    SCHEMA,
    Provenance,
    load_tensors,
    reading,
    require_fields,
    require_kind,
    require_tables,
    save_tensors,
)

KIND = "histograms"

# What a count of one bin may reach in a file.
MOST_TOKENS = 2**31 - 1

# What must agree before two recordings go together.
_SAME = (*SAME_MODEL, "d_mlp", "site")

# Values binned at once, and neurons: on a CPU the counts of a block of neurons stay in its second-level cache.
_BLOCK = {"cpu": (1 << 18, 512), "cuda": (1 << 22, 1 << 22)}


@dataclass(frozen=True, eq=False)
class Histograms:
    """How many counted tokens of every language fall into each bin, for every neuron.

    Attributes:
        counts: Language to its counts; one language of a 7B model takes 0.6 GB.
        tokens: Tokens counted.
        bins: The bins.
        site: Where the neurons were recorded.
        provenance: Model, tokenizer, policy and corpus.
        notes: What else is known.
    """

    counts: Mapping[str, Int32[Tensor, "layer neuron bin"]]
    tokens: Int64[Tensor, " language"]
    bins: Binning
    site: str
    provenance: Provenance
    notes: dict[str, Any] = field(default_factory=dict[str, Any])

    @classmethod
    def from_counts(
        cls,
        counts: Mapping[str, Tensor],
        *,
        bins: Binning | None = None,
        site: str = "gate_act",
        provenance: Provenance | None = None,
    ) -> "Histograms":
        """Return histograms from counts.

        Args:
            counts: Language to integers [layer, neuron, bin]; every neuron's add up to the tokens of the language.
            bins: Their bins.
            site: Where the counts were taken.
            provenance: Model and corpus, where known.

        Raises:
            DataError: Shapes that differ or do not fit the bins, counts that are no integers, negative or beyond
                int32, neurons that saw different numbers of tokens, a language without tokens, or none.
        """
        made = bins or Bins()
        shapes = {tuple(table.shape) for table in counts.values()}
        if len(shapes) != 1 or len(shape := shapes.pop()) != 3 or shape[2] != made.n + 2 or 0 in shape:
            raise DataError(
                f"counts must all have one shape [layer, neuron, {made.n + 2} bins]; got "
                f"{sorted({tuple(table.shape) for table in counts.values()}) or 'no language'}."
            )
        tables: dict[str, Tensor] = {}
        tokens: list[int] = []
        for label, table in counts.items():
            if table.is_floating_point() or table.is_complex() or table.dtype == torch.bool:
                raise DataError(f"counts of '{label}' are {table.dtype}; integers were expected.")
            seen = table.sum(dim=2, dtype=torch.int64)
            if int(table.min()) < 0 or int(seen.min()) != int(seen.max()):
                raise DataError(
                    f"counts of '{label}' must be 0 or more and add up to the same number of tokens for every neuron; "
                    "check that every neuron was counted on the same tokens."
                )
            tokens.append(int(seen.max()))
            _require_countable(label, tokens[-1])
            tables[canonical(label)] = table.cpu().to(torch.int32)
        if len(tables) != len(counts):
            raise DataError(f"languages {list(counts)} must each come once; give each one name.")
        known = provenance or Provenance.unknown((shape[0], shape[1]), site)
        return cls(tables, torch.tensor(tokens, dtype=torch.int64), made, site, known)

    @classmethod
    def from_values(
        cls,
        values: Mapping[str, Float[Tensor, "_ layer neuron"]],
        *,
        bins: Binning | None = None,
        site: str = "gate_act",
        provenance: Provenance | None = None,
    ) -> "Histograms":
        """Return histograms of values at hand.

        Args:
            values: Language to values [token, layer, neuron].
            bins: The bins.
            site: Where the values were taken.
            provenance: Model and corpus, where known.

        Raises:
            DataError: A language without tokens, or values that are NaN or infinite.
        """
        made = bins or Bins()
        counts: dict[str, Tensor] = {}
        for label, table in values.items():
            if not bool(torch.isfinite(table).all()):
                raise DataError(f"values of '{label}' are NaN or infinite; record again, in float32.")
            layers = [made.place(table[:, layer].float().cpu(), layer, 0) for layer in range(table.shape[1])]
            index = torch.stack(layers).movedim(1, 2)
            empty = torch.zeros(*index.shape[:2], made.n + 2, dtype=torch.int32)
            counts[label] = empty.scatter_add_(2, index, torch.ones_like(index, dtype=torch.int32))
        return cls.from_counts(counts, bins=made, site=site, provenance=provenance)

    @property
    def languages(self) -> tuple[str, ...]:
        """The languages."""
        return tuple(self.counts)

    @property
    def n_layers(self) -> int:
        """Number of layers."""
        return next(iter(self.counts.values())).shape[0]

    @property
    def n_neurons(self) -> int:
        """Neurons a layer."""
        return next(iter(self.counts.values())).shape[1]

    def __repr__(self) -> str:
        """Return site, shape, and tokens a language."""
        counts = ", ".join(f"{code}: {int(n)}" for code, n in zip(self.languages, self.tokens, strict=True))
        shape = f"{self.n_layers} layers x {self.n_neurons} neurons x {self.bins.n + 2} bins"
        return f"Histograms({self.site}, {shape}; tokens {counts})"

    def index(self, language: str) -> int:
        """Return the position of a language.

        Raises:
            DataError: It was not recorded.
        """
        return recorded_index(language, self.languages)

    def probability(
        self, layer: int | slice | None = None, neurons: slice | None = None
    ) -> Float64[Tensor, "language *layer neuron bin"]:
        """Return the share of counted tokens in each bin; of a large model ask for a part at a time.

        Args:
            layer: One layer, which leaves the axis of layers out, or several; default: all.
            neurons: Some neurons; default: all.
        """
        at = (slice(None) if layer is None else layer, slice(None) if neurons is None else neurons)
        counts = torch.stack([table[at] for table in self.counts.values()]).double()
        return counts / self.tokens.double().view(-1, *[1] * (counts.dim() - 1))

    def to_frame(self, layer: int, neuron: int) -> pd.DataFrame:
        """Return one row a language and bin of one neuron: language, low, high, tokens, share."""
        edges = self.bins.edges_of(layer, neuron).tolist()
        parts = [
            pd.DataFrame(
                {
                    "language": code,
                    "low": [-math.inf, *edges],
                    "high": [*edges, math.inf],
                    "tokens": table[layer, neuron].numpy(),
                    "share": table[layer, neuron].numpy() / int(n),
                }
            )
            for (code, table), n in zip(self.counts.items(), self.tokens, strict=True)
        ]
        return pd.concat(parts, ignore_index=True)

    def select(self, languages: Iterable[str]) -> "Histograms":
        """Return the histograms of some languages, in the order given.

        Raises:
            DataError: One was not recorded, or none is named.
        """
        rows = [self.index(label) for label in languages]
        if not rows:
            raise DataError(f"select at least one language of {', '.join(self.languages)}.")
        codes = self.languages
        return replace(self, counts={codes[i]: self.counts[codes[i]] for i in rows}, tokens=self.tokens[rows])

    def merge(self, *others: "Histograms") -> "Histograms":
        """Return these histograms together with those of other languages, made with the same model and policy.

        Raises:
            DataError: Other bins, or a language that is in two of them.
            ProvenanceError: Model, tokenizer, policy or site differ.
        """
        counts, tokens, corpus = dict(self.counts), [self.tokens], self.provenance.corpus
        for other in others:
            self.provenance.require_same(other.provenance, _SAME, what="the recordings")
            mine, theirs = self.bins.to_dict(), other.bins.to_dict()
            if mine != theirs:
                raise DataError(
                    f"histograms with bins {mine} and {theirs} cannot be merged; record both with the same."
                )
            require_once_each([*counts, *other.counts])
            counts |= other.counts
            tokens.append(other.tokens)
            corpus = corpus if corpus == other.provenance.corpus else ""
        return replace(self, counts=counts, tokens=torch.cat(tokens), provenance=self.provenance.replace(corpus=corpus))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to one safetensors file, atomically, with a checksum."""
        tensors = {f"{number}.counts": table for number, table in enumerate(self.counts.values())}
        header = {
            "schema": SCHEMA,
            "kind": KIND,
            "languages": list(self.languages),
            "site": self.site,
            "bins": self.bins.to_dict(),
            "provenance": self.provenance.to_dict(),
            "notes": self.notes,
        }
        save_tensors(path, {**tensors, "tokens": self.tokens, **self.bins.tensors()}, header)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Histograms":
        """Return the histograms in a file that `save` wrote.

        Raises:
            StorageError: The file is damaged or of another kind.
        """
        tensors, header = load_tensors(path)
        require_kind(path, header, KIND)
        with reading(path):
            fields = {"languages": list, "site": str, "bins": dict, "notes": dict, "provenance": dict}
            require_fields(header, fields)
            names = [f"{number}.counts" for number in range(len(header["languages"]))]
            shapes: dict[str, Any] = dict.fromkeys(names, Int32[Tensor, "layer neuron bin"])
            if "ranges" in header["bins"]:
                shapes |= dict.fromkeys(("low", "high"), Float32[Tensor, "layer neuron"])
            require_tables(tensors, {"tokens": Int64[Tensor, " language"], **shapes}, header["languages"])
            counts = {code: tensors[name] for code, name in zip(header["languages"], names, strict=True)}
            provenance, bins = Provenance.from_dict(header["provenance"]), binning_of(header["bins"], tensors)
            if not counts or next(iter(counts.values())).shape[2] != bins.n + 2:
                raise DataError(f"it needs a language, and counts of {bins.n + 2} bins; count again.")
            return cls(counts, tensors["tokens"], bins, header["site"], provenance, header["notes"])


def _require_countable(language: str, tokens: int) -> None:
    if tokens < 1:
        raise DataError(f"language '{language}' has no token that counts; give it a text or leave it out.")
    if tokens > MOST_TOKENS:
        raise DataError(f"'{language}' has {tokens:,} tokens, and a bin counts up to {MOST_TOKENS:,}; record fewer.")


class HistogramCollector(Collector):
    """Collects histograms of the values of one site over the counted tokens.

    Counts stay on the device in int32 until a shard is done, four bytes for every layer, neuron and bin; they are whole
    numbers, so the order of passes and shards never shows.
    """

    name = "histograms"

    def __init__(self, adapter: Adapter, bins: Binning | None = None, site: str = "gate_act") -> None:
        """Start at zero.

        Args:
            adapter: The model.
            bins: The bins.
            site: Where to record.

        Raises:
            SettingError: The bins were made for another model or site.
        """
        self.adapter: Adapter = adapter
        self.bins: Binning = bins or Bins()
        self.site: str = site
        self._bins = self.bins.to(adapter.device)
        # No hook holds act(gate): it is computed from the gate (design rule 1).
        self._source = "gate_pre" if site == "gate_act" else site
        self._activate: Callable[[Tensor], Tensor] | None = adapter.act_fn if site == "gate_act" else None
        self._width = adapter.width(site)
        for table in self.bins.tensors().values():
            if tuple(table.shape) != (adapter.n_layers, self._width):
                raise SettingError(
                    f"bins for {tuple(table.shape)} neurons do not fit the ({adapter.n_layers}, {self._width}) at "
                    f"'{site}'; make them from a recording of this model and site."
                )
        self._rows = torch.zeros(0, dtype=torch.int64)
        self._ones = torch.zeros(0, dtype=torch.int32)
        self._clear()

    @property
    def sites(self) -> tuple[str, ...]:
        """The site."""
        return (self.site,)

    def _clear(self) -> None:
        layers, device = self.adapter.n_layers, self.adapter.device
        self._counts = torch.zeros(layers, self._width, self.bins.n + 2, dtype=torch.int32, device=device)
        # The sum of a layer's values is NaN or infinite where one of them is.
        self._sums = torch.zeros(layers, dtype=torch.float32, device=device)
        self._tokens = 0

    def pairs(self) -> list[HookPair]:
        """Return one hook a layer."""
        layers = range(self.adapter.n_layers)
        return [(self.adapter.hook_name(self._source, layer), partial(self._fire, layer=layer)) for layer in layers]

    def begin(self, batch: Batch) -> None:
        """Take note of which tokens count."""
        rows = batch.counted.flatten().nonzero()[:, 0]
        self._tokens += len(rows)
        self._rows = rows.to(self.adapter.device)

    def _fire(self, tensor: Float[Tensor, "batch pos *unit"], hook: Any, layer: int) -> None:
        values = tensor.detach().flatten(2).flatten(0, 1)
        rows = self._rows.to(values.device)
        block, most = _BLOCK.get(values.device.type, (1 << 20, 1 << 20))
        columns = min(self._width, most)
        tokens = max(1, block // columns)
        bins = self._bins
        for j in range(0, self._width, columns):
            counts = self._counts[layer, j : j + columns]
            starts = torch.arange(len(counts), device=values.device) * (self.bins.n + 2)
            for i in range(0, len(rows), tokens):
                part = values[:, j : j + columns].index_select(0, rows[i : i + tokens])
                active = (part if self._activate is None else self._activate(part)).float()
                self._sums[layer] += active.sum()
                places = bins.place(active, layer, j)
                places += starts
                counts.view(-1).scatter_add_(0, places.view(-1), self._one_each(places.view(-1)))

    def _one_each(self, places: Int64[Tensor, " value"]) -> Int32[Tensor, " value"]:
        """Return a 1 for every place, the same memory each time."""
        if len(self._ones) < len(places) or self._ones.device != places.device:
            self._ones = torch.ones(len(places), dtype=torch.int32, device=places.device)
        return self._ones[: len(places)]

    def take(self, shard: Shard) -> dict[str, Tensor]:
        """Return the counts and tokens of a shard, and start again at zero.

        Raises:
            ModelError: A value is NaN or infinite.
        """
        finite = torch.isfinite(self._sums).cpu()
        made = {"tokens": torch.tensor(self._tokens), "counts": self._counts.cpu()}
        self._clear()
        if not bool(finite.all()):
            layer = int((~finite).nonzero()[0])
            raise ModelError(
                f"site '{self.site}' of layer {layer} holds NaN or infinite values in texts {shard.first} to "
                f"{shard.last} of '{shard.language}'; check the weights, or load the model in bfloat16 or float32, "
                "which do not overflow as float16 does."
            )
        return made

    def add(self, first: dict[str, Tensor], second: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the counts of both.

        Raises:
            DataError: More tokens than a bin can count.
        """
        _require_countable("the texts so far", int(first["tokens"] + second["tokens"]))
        return {name: first[name] + second[name] for name in first}

    def gather(self, parts: Mapping[str, Any], provenance: Provenance) -> Histograms:
        """Return the histograms of all languages.

        Raises:
            DataError: A language has no token that counts.
        """
        for code, part in parts.items():
            _require_countable(code, int(part["tokens"]))
        counts = {code: part["counts"] for code, part in parts.items()}
        tokens = torch.tensor([int(part["tokens"]) for part in parts.values()])
        known = provenance.replace(site=self.site, d_mlp=self._width)
        return Histograms(counts, tokens, self.bins, self.site, known)

    def unit_bytes(self) -> int:
        """Return the bytes of one shard."""
        return self.adapter.n_layers * self._width * (self.bins.n + 2) * 4
