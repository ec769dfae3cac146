"""What one pass over a corpus may record besides counts and sums: the face of a collector, and text responses.

Counts and sums are always taken (`collecting.RunningSums`); every further thing is a collector that reads the same
forward passes through hooks. A shard's part of it is a few named tensors, which are a file of their own on disk.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lens_neurons.adapter import Adapter
from lens_neurons.batching import Batch, Shard
from lens_neurons.collecting import weighted_sums
from lens_neurons.errors import ModelError, SettingError
from lens_neurons.responses import Rows, TextResponses
from lens_neurons.storage import Provenance

HookPair = tuple[str, Callable[..., None]]

# The outputs of all linear layers of a block, which Kojima et al. take as units; "up" where the MLP has a gate.
LINEAR_SITES = ("q", "k", "v", "attn_out", "gate_pre", "up", "mlp_out")


class Collector(ABC):
    """One more thing that is recorded in the same pass.

    Attributes:
        name: Name of the field of `Recording` that it fills, and of its folder on disk.
        keeps_rows: Whether its parts are rows of texts ("positions" and "rows"), which stay in their files; others
            are added up.
        needs_texts: Whether it must tell texts apart, so that packed rows, which hold several, are of no use to it.
    """

    name: str = ""
    keeps_rows: bool = False
    needs_texts: bool = False

    @property
    @abstractmethod
    def sites(self) -> tuple[str, ...]:
        """The sites that it reads, to be proved before the first pass."""

    @abstractmethod
    def pairs(self) -> list[HookPair]:
        """Return the hooks that read a forward pass; `begin` comes before each pass."""

    @abstractmethod
    def begin(self, batch: Batch) -> None:
        """Take note of what the next forward pass is about."""

    @abstractmethod
    def take(self, shard: Shard) -> dict[str, Tensor]:
        """Return what the passes over a shard gave, and start again.

        Raises:
            ModelError: A value is NaN or infinite.
        """

    @abstractmethod
    def add(self, first: dict[str, Tensor], second: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return two parts of one language as one; called in the order of the shards."""

    @abstractmethod
    def gather(self, parts: Mapping[str, Any], provenance: Provenance) -> Any:
        """Return the result.

        Args:
            parts: Language to its part, all shards added; or, with `keeps_rows`, to a tuple of `Rows`.
            provenance: Of the recording.
        """

    @abstractmethod
    def unit_bytes(self) -> int:
        """Return the bytes on disk that one text (with `keeps_rows`) or one shard takes."""


class RowCollector(Collector):
    """A collector of one row a text: a number for every unit of some sites, from each text's first piece."""

    keeps_rows = True
    needs_texts = True

    def __init__(
        self, adapter: Adapter, sites: Mapping[str, int], dtype: torch.dtype = torch.float32, statistic: str = "mean"
    ) -> None:
        """Start without a row.

        Args:
            adapter: The model.
            sites: Site to its number of units a layer, in the order of the flat numbers.
            dtype: What rows are stored in.
            statistic: What the numbers are.
        """
        self.adapter: Adapter = adapter
        self.widths: dict[str, int] = dict(sites)
        self.statistic: str = statistic
        self._dtype = dtype
        self._kept = torch.zeros(0, dtype=torch.int64)
        self._counted = torch.zeros(0, 0, dtype=torch.bool)
        self._clear()

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites in order."""
        return tuple(self.widths)

    def _clear(self) -> None:
        self._positions: list[Tensor] = []
        self._values: dict[tuple[str, int], list[Tensor]] = {
            (site, layer): [] for site in self.widths for layer in range(self.adapter.n_layers)
        }

    def begin(self, batch: Batch) -> None:
        """Take note of which rows are first pieces of texts with tokens that count."""
        kept = (batch.piece_index == 0) & batch.counted.any(dim=1)
        self._kept = kept.nonzero()[:, 0]
        self._counted = batch.counted[self._kept].to(self.adapter.device)
        self._positions.append(batch.text_index[self._kept])

    def put(self, site: str, layer: int, values: Float[Tensor, "text unit"]) -> None:
        """Keep the numbers of the current pass's texts at one site and layer."""
        self._values[site, layer].append(values.to(self._dtype).cpu())

    def take(self, shard: Shard) -> dict[str, Tensor]:
        """Return positions and rows of a shard's texts, by position.

        Raises:
            ModelError: A number is NaN or infinite, in the model or in the type that rows are stored in.
        """
        positions = torch.cat([torch.zeros(0, dtype=torch.int64), *self._positions])
        order = torch.argsort(positions, stable=True)
        columns: list[Tensor] = []
        for (site, layer), values in self._values.items():
            table = torch.cat([torch.zeros(0, self.widths[site], dtype=self._dtype), *values])[order]
            if not bool(torch.isfinite(table).all()):
                raise ModelError(
                    f"site '{site}' of layer {layer} holds NaN or infinite values in texts {shard.first} to "
                    f"{shard.last} of '{shard.language}', or ones too large for {self._dtype}; check the weights, or "
                    "keep rows in float32."
                )
            columns.append(table)
        self._clear()
        return {"positions": positions[order], "rows": torch.cat(columns, dim=1)}

    def add(self, first: dict[str, Tensor], second: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the rows of both."""
        return {name: torch.cat([first[name], second[name]]) for name in first}

    def gather(self, parts: Mapping[str, Any], provenance: Provenance) -> TextResponses:
        """Return the rows of all languages."""
        rows: dict[str, tuple[Rows, ...]] = dict(parts)
        sites = {site: (self.adapter.n_layers, width) for site, width in self.widths.items()}
        width = self.adapter.d_mlp if len(sites) > 1 else next(iter(self.widths.values()))
        known = provenance.replace(site="+".join(sites), d_mlp=width)
        return TextResponses(rows, sites, self.statistic, known)

    def unit_bytes(self) -> int:
        """Return the bytes of one text's row."""
        return sum(self.widths.values()) * self.adapter.n_layers * self._dtype.itemsize


class ResponseCollector(RowCollector):
    """Collects text responses: the mean of every unit over the counted tokens of each text.

    Kojima et al. 2024 (arXiv 2404.02431), selfcond/responses.py; padding never counts, special tokens as the token
    policy says (theirs counts those that the tokenizer adds).
    """

    name = "responses"

    def __init__(self, adapter: Adapter, sites: Sequence[str], dtype: torch.dtype = torch.float32) -> None:
        """Start without a row; see `RowCollector`."""
        super().__init__(adapter, {site: adapter.width(site) for site in sites}, dtype)

    def pairs(self) -> list[HookPair]:
        """Return one hook a site and layer."""
        made: list[HookPair] = []
        for site in self.widths:
            source = "gate_pre" if site == "gate_act" else site
            for layer in range(self.adapter.n_layers):
                made.append((self.adapter.hook_name(source, layer), partial(self._fire, site=site, layer=layer)))
        return made

    def _fire(self, tensor: Float[Tensor, "batch pos *unit"], hook: Any, site: str, layer: int) -> None:
        values = tensor.detach().flatten(2)[self._kept.to(tensor.device)]
        if site == "gate_act":
            values = self.adapter.act_fn(values)
        # Half precision is added up in float32; a model in float64 stays there.
        precise = torch.float64 if values.dtype == torch.float64 else torch.float32
        weights = self._counted.to(values.device, precise)
        means = weighted_sums(weights, values.to(precise)) / weights.sum(dim=1, keepdim=True)
        self.put(site, layer, means)


def response_sites(adapter: Adapter, asked: Sequence[str]) -> tuple[str, ...]:
    """Return sites with "linear" and "mlp" spelt out: all linear outputs of a block, or those of its MLP.

    Raises:
        SettingError: There is no such site.
        ModelError: The model has no hook that holds one.
    """
    if isinstance(asked, str):
        raise SettingError(f"responses={asked!r} is one string; give a tuple such as ('linear',).")
    found: list[str] = []
    for name in asked:
        spelt = LINEAR_SITES if name == "linear" else LINEAR_SITES[4:] if name == "mlp" else (name,)
        found += [site for site in spelt if site != "up" or adapter.gated or name == "up"]
    for site in found:
        adapter.hook_name("gate_pre" if site == "gate_act" else site, 0)
    return tuple(dict.fromkeys(found))
