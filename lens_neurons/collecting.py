"""Collectors: what a recording takes from each forward pass, reduced on the device while the pass runs.

The values of a site are a tensor [batch, pos, neuron] a layer; kept of them are four sums over the counted tokens and
the mean of each of the first texts. The sums are made in blocks that stay in the processor's cache, in float32 within
a batch and float64 across batches.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Float32, Float64, Int64
from torch import Tensor

from lens_neurons.adapter import Adapter
from lens_neurons.batching import Batch, Shard
from lens_neurons.errors import ModelError

SUMS = ("sum", "sum_sq", "sum_positive")

# Values in one block: four float32 buffers of this size stay in the last cache of a CPU or a GPU.
_BLOCK = {"cpu": 1 << 18, "cuda": 1 << 22}


@dataclass(frozen=True, eq=False)
class PartialSums:
    """What one shard, or several, of one language adds to its statistics.

    Attributes:
        tokens: Tokens counted.
        texts: Texts read.
        positive: Number of tokens with an activation above 0.
        sum: Sum of activations.
        sum_sq: Sum of their squares.
        sum_positive: Sum of those above 0.
        row_positions: Position in the corpus of each text whose token mean is kept.
        rows: Mean over the counted tokens of these texts' first pieces.
        truncated: Texts that were cut.
        split: Texts that became several pieces.
    """

    tokens: int
    texts: int
    positive: Int64[Tensor, "layer neuron"]
    sum: Float64[Tensor, "layer neuron"]
    sum_sq: Float64[Tensor, "layer neuron"]
    sum_positive: Float64[Tensor, "layer neuron"]
    row_positions: Int64[Tensor, " text"]
    rows: Float32[Tensor, "text layer neuron"]
    truncated: int = 0
    split: int = 0

    def add(self, other: "PartialSums") -> "PartialSums":
        """Return both together, rows by corpus position. Floating sums depend on the order, so add in shard order."""
        if not len(other.row_positions):
            positions, rows = self.row_positions, self.rows
        else:
            positions = torch.cat([self.row_positions, other.row_positions])
            order = torch.argsort(positions, stable=True)
            positions, rows = positions[order], torch.cat([self.rows, other.rows])[order]
        return PartialSums(
            tokens=self.tokens + other.tokens,
            texts=self.texts + other.texts,
            positive=self.positive + other.positive,
            sum=self.sum + other.sum,
            sum_sq=self.sum_sq + other.sum_sq,
            sum_positive=self.sum_positive + other.sum_positive,
            row_positions=positions,
            rows=rows,
            truncated=self.truncated + other.truncated,
            split=self.split + other.split,
        )

    def without_rows(self) -> "PartialSums":
        """Return the sums without the means of single texts."""
        return replace(self, row_positions=self.row_positions[:0], rows=self.rows[:0])

    def to_tensors(self) -> dict[str, Tensor]:
        """Return everything as named tensors."""
        counts = [self.tokens, self.texts, self.truncated, self.split]
        tensors = {"counts": torch.tensor(counts, dtype=torch.int64), "positive": self.positive}
        tensors |= {name: getattr(self, name) for name in (*SUMS, "row_positions", "rows")}
        return tensors

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> "PartialSums":
        """Return what `to_tensors` gave."""
        parts = dict(tensors)
        tokens, texts, truncated, split = (int(n) for n in parts.pop("counts"))
        return cls(tokens=tokens, texts=texts, truncated=truncated, split=split, **parts)


class RunningSums:
    """The sums of one site over the forward passes since they were last taken.

    Both ways of recording use it: the fast one calls `reduce` from hooks, the reference with cached tensors. So the
    two differ in how they get the activations, never in how they add them up.
    """

    def __init__(self, adapter: Adapter, site: str = "gate_act", texts_kept: int = 100) -> None:
        """Start at zero.

        Args:
            adapter: The model.
            site: Where to record.
            texts_kept: Token means are kept of texts with a position in the corpus below this.
        """
        self.site = site
        # No hook holds act(gate): it is computed from the gate (design rule 1).
        self.source: str = "gate_pre" if site == "gate_act" else site
        self._adapter = adapter
        self._activate: Callable[[Tensor], Tensor] | None = adapter.act_fn if site == "gate_act" else None
        self._texts_kept = texts_kept
        self._shape = (adapter.n_layers, adapter.width(site))
        self._weights = torch.zeros(0, 0)
        self._kept = torch.zeros(0, dtype=torch.int64)
        self._scratch: dict[torch.device, Tensor] = {}
        self._clear()

    def _clear(self) -> None:
        # Float64 wherever the device has it. Counts stay exact there up to 2**53.
        device = torch.device("cpu") if self._adapter.device.type == "mps" else self._adapter.device
        self._totals = torch.zeros(4, *self._shape, dtype=torch.float64, device=device)
        self._tokens = 0
        self._positions: list[Tensor] = []
        self._rows: list[list[Tensor]] = [[] for _ in range(self._shape[0])]

    def pairs(self) -> list[tuple[str, Callable[..., None]]]:
        """Return the hooks that reduce every layer of a forward pass; `begin` comes before each pass."""

        def fire(tensor: Tensor, hook: Any, layer: int) -> None:
            self.reduce(layer, tensor)

        names = (self._adapter.hook_name(self.source, layer) for layer in range(self._shape[0]))
        return [(name, partial(fire, layer=layer)) for layer, name in enumerate(names)]

    def begin(self, batch: Batch) -> None:
        """Take note of what the next forward pass is about."""
        counted = batch.counted.sum(dim=1)
        first = (batch.piece_index == 0) & (batch.text_index < self._texts_kept) & (counted > 0)
        device = self._adapter.device
        self._weights = batch.counted.to(device, torch.float32)
        self._kept = first.nonzero()[:, 0].to(device)
        self._lengths = counted.to(device, torch.float32)[self._kept, None]
        self._positions.append(batch.text_index[first])
        self._tokens += int(counted.sum())

    def reduce(self, layer: int, tensor: Float[Tensor, "batch pos *unit"]) -> None:
        """Add one layer's values in the current pass to the sums."""
        values = tensor.detach().flatten(2)
        batch, pos, width = values.shape
        # Half precision is added up in float32; a model in float64 stays there.
        precise = torch.float64 if values.dtype == torch.float64 else torch.float32
        weights = self._weights.to(values.device, precise)
        block = _BLOCK.get(values.device.type, 1 << 20)
        rows, cells = max(1, block // (pos * width)), max(1, min(pos, block // width))
        text_sums = torch.zeros(batch, width, dtype=precise, device=values.device)
        others = torch.zeros(3, width, dtype=precise, device=values.device)
        for i in range(0, batch, rows):
            for j in range(0, pos, cells):
                part = values[i : i + rows, j : j + cells]
                self._reduce_block(part, weights[i : i + rows, j : j + cells], text_sums[i : i + rows], others)
        sums = torch.cat([text_sums.sum(dim=0, keepdim=True), others])
        self._totals[:, layer] += sums.to(self._totals.device, torch.float64)
        if len(self._kept):
            kept = self._kept.to(values.device)
            self._rows[layer].append((text_sums[kept] / self._lengths.to(values.device)).float().cpu())

    def _reduce_block(
        self,
        values: Float[Tensor, "row cell neuron"],
        weights: Float[Tensor, "row cell"],
        text_sums: Float[Tensor, "row neuron"],
        others: Float[Tensor, "three neuron"],
    ) -> None:
        """Add a block's sum to `text_sums`, and its squares, positive parts and count of positives to `others`."""
        active = (values if self._activate is None else self._activate(values)).to(weights.dtype)
        made = self._buffer(active)
        torch.mul(active, active, out=made[0])
        torch.clamp_min(active, 0, out=made[1])
        torch.gt(active, 0, out=made[2])
        text_sums += weighted_sums(weights, active)
        others += weighted_sums(weights.reshape(1, -1).expand(3, -1), made.flatten(1, 2))

    def _buffer(self, like: Float[Tensor, "row cell neuron"]) -> Float[Tensor, "three row cell neuron"]:
        """Return room for three tensors of a shape, the same memory each time."""
        size = 3 * like.numel()
        held = self._scratch.get(like.device)
        if held is None or held.numel() < size or held.dtype != like.dtype:
            held = self._scratch[like.device] = torch.empty(size, dtype=like.dtype, device=like.device)
        return held[:size].view(3, *like.shape)

    def take(self, shard: Shard) -> PartialSums:
        """Return what the passes over a shard added up to, and start again at zero.

        Raises:
            ModelError: An activation is NaN or infinite.
        """
        totals = self._totals.cpu()
        finite = torch.isfinite(totals).all(dim=2).all(dim=0)
        if not bool(finite.all()):
            layer = int((~finite).nonzero()[0])
            raise ModelError(
                f"hook '{self._adapter.hook_name(self.source, layer)}' (layer {layer}) holds NaN or infinite values in "
                f"texts {shard.first} to {shard.last} of '{shard.language}'; check the weights, or load the model in "
                "bfloat16 or float32, which do not overflow as float16 does."
            )
        positions = torch.cat([torch.zeros(0, dtype=torch.int64), *self._positions])
        order = torch.argsort(positions, stable=True)
        rows = torch.zeros(len(positions), *self._shape)
        for layer, parts in enumerate(self._rows):
            if parts:
                rows[:, layer] = torch.cat(parts)[order]
        made = PartialSums(
            tokens=self._tokens,
            texts=shard.last - shard.first + 1,
            positive=totals[3].round().to(torch.int64),
            sum=totals[0].clone(),
            sum_sq=totals[1].clone(),
            sum_positive=totals[2].clone(),
            row_positions=positions[order],
            rows=rows,
            truncated=shard.truncated,
            split=shard.split,
        )
        self._clear()
        return made


def weighted_sums(
    weights: Float[Tensor, "group cell"], values: Float[Tensor, "group cell neuron"]
) -> Float[Tensor, "group neuron"]:
    """Return sum_cell weights * values, in the type of both."""
    if values.is_cuda:
        # A matrix product there may run in TF32, which keeps 10 bits of each value.
        return (weights[:, :, None] * values).sum(dim=1)
    return torch.bmm(weights[:, None], values)[:, 0]
