"""Bins for histograms, fixed before the first value is seen, so that counts of any parts of a recording add up."""

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float32, Float64, Int64
from torch import Tensor

from lens_neurons.activation_stats import ActivationStats
from lens_neurons.errors import SettingError
from lens_neurons.storage import sha256_of

# Bits of a float32 that an edge of `Bins` may not use: it keeps 9 significant ones, and a table of 2**17 entries tells
# a value's bin exactly, about 15 times as fast as a binary search among the edges.
_DROPPED = 15
_CELLS = 1 << (32 - _DROPPED)

# A neuron whose range is narrower than this gets so much on either side of its mean (DLN, build_hist_cache.py).
_NARROW, _ROOM = 1e-3, 0.05


class Binning(ABC):
    """Which bin a value of a neuron belongs to: 0 below the first edge, n + 1 from the last edge on."""

    n: int

    @abstractmethod
    def place(self, values: Float32[Tensor, "token part"], layer: int, first: int) -> Int64[Tensor, "token part"]:
        """Return the bin of each value of the neurons from `first` on in a layer; NaN gets any bin."""

    @abstractmethod
    def edges_of(self, layer: int, neuron: int) -> Float32[Tensor, " edge"]:
        """Return the n + 1 edges of a neuron's bins."""

    @abstractmethod
    def middles_of(self, layer: int, first: int, last: int) -> Float64[Tensor, "part bin"]:
        """Return one value for each of n + 2 bins of some neurons: its middle, or the edge of a bin without an end."""

    @abstractmethod
    def to(self, device: torch.device) -> "Binning":
        """Return the same bins on a device."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values that are equal for equal bins."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Return what `to_dict` leaves out."""


@dataclass(frozen=True)
class Bins(Binning):
    """The same bins for every neuron, of equal width in asinh(value / scale).

    Bins are of equal width below `scale` and of equal ratio far above it: with the defaults 0.0008 wide near 0 and 4%
    of the value from 0.1 on, so that one choice fits sites and models whose values differ by orders of magnitude, and
    one pass is enough. Ours; DLN has as many bins, in a range of each neuron's own that takes a pass of its own to find
    (`NeuronBins`).

    Attributes:
        n: Number of bins between the edges; two more hold what lies outside.
        low: First edge.
        high: Last edge.
        scale: Where bins of equal width become bins of equal ratio.
    """

    n: int = 400
    low: float = -32.0
    high: float = 32.0
    scale: float = 0.02

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            SettingError: No bin, no range, no positive scale, or bins too narrow to tell apart.
        """
        _require_bins(self.n)
        if not all(map(math.isfinite, (self.low, self.high, self.scale))) or self.low >= self.high or self.scale <= 0:
            raise SettingError(
                f"bins from low={self.low} to high={self.high} with scale={self.scale} are impossible; use finite "
                "numbers, low below high, and a scale above 0."
            )
        if not bool((self.edges().diff() > 0).all()):
            raise SettingError(
                f"{self.n} bins from {self.low} to {self.high} with scale={self.scale} are narrower than 9 significant "
                "bits can tell apart; use fewer bins or a wider range."
            )

    def edges(self) -> Float32[Tensor, " edge"]:
        """Return the n + 1 edges: uniform in asinh(value / scale), rounded to 9 significant bits.

        The rounding changes the width of a bin by a tenth at most with the default settings. An edge at 0 is exact.
        """
        first, last = math.asinh(self.low / self.scale), math.asinh(self.high / self.scale)
        places = torch.linspace(first, last, self.n + 1, dtype=torch.float64)
        mantissa, exponent = torch.frexp(torch.sinh(places) * self.scale)
        rounded = torch.ldexp((mantissa * 512).round() / 512, exponent)
        rounded[places.abs() < 1e-9] = 0.0
        return rounded.float()

    def index(self, values: Float32[Tensor, "*shape"]) -> Int64[Tensor, "*shape"]:
        """Return the bin of each value; -0 equals 0.

        It equals `torch.bucketize(values, edges, right=True)`: bin i holds the values from edge i - 1 up to edge i.
        """
        bits = values.contiguous().view(torch.int32)
        # The bits of a float, negated as a whole number where it is negative, order as the float does.
        sign = bits >> 31
        cell = bits & 0x7FFFFFFF
        cell ^= sign
        cell -= sign
        cell >>= _DROPPED
        cell += _CELLS // 2
        return _table(self, values.device).index_select(0, cell.flatten()).view(values.shape)

    def place(self, values: Float32[Tensor, "token part"], layer: int, first: int) -> Int64[Tensor, "token part"]:
        """Return `index` of the values, whatever the neuron."""
        return self.index(values)

    def edges_of(self, layer: int, neuron: int) -> Float32[Tensor, " edge"]:
        """Return `edges`, whatever the neuron."""
        return self.edges()

    def middles_of(self, layer: int, first: int, last: int) -> Float64[Tensor, "part bin"]:
        """Return one value for each of the n + 2 bins, the same for all neurons."""
        return _middles(self.edges().double().expand(last - first, -1))

    def to(self, device: torch.device) -> "Bins":
        """Return the bins; they hold no tensor."""
        return self

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return {"n": self.n, "low": self.low, "high": self.high, "scale": self.scale}

    def tensors(self) -> dict[str, Tensor]:
        """Return nothing."""
        return {}


@functools.lru_cache(maxsize=8)
def _table(bins: Bins, device: torch.device) -> Int64[Tensor, " cell"]:
    """Return the bin of every run of float32 values that share all but the dropped bits, lowest run first."""
    keys = torch.arange(-(_CELLS // 2), _CELLS // 2) << _DROPPED
    magnitude = keys.abs().clamp(max=2**31 - 1).to(torch.int32).view(torch.float32)
    starts = torch.where(keys < 0, -magnitude, magnitude).nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf)
    return torch.bucketize(starts, bins.edges(), right=True).to(device)


@dataclass(frozen=True, eq=False)
class NeuronBins(Binning):
    """Bins of equal width in a range of each neuron's own, as DLN (EMNLP 2026) has them.

    The range must be known before values are counted, so it takes a recording of its own: record once, then again with
    `Collect(histograms=NeuronBins.around(stats))`.

    Attributes:
        low: First edge of each neuron's bins.
        high: Last edge.
        n: Number of bins between the edges; two more hold what lies outside.
    """

    low: Float32[Tensor, "layer neuron"]
    high: Float32[Tensor, "layer neuron"]
    n: int = 400

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            SettingError: No bin, or a neuron without a range.
        """
        _require_bins(self.n)
        if not bool((torch.isfinite(self.low) & torch.isfinite(self.high) & (self.low < self.high)).all()):
            raise SettingError("every neuron's bins need a finite range, low below high; give other ranges.")

    @classmethod
    def around(
        cls, stats: ActivationStats, *, n: int = 400, deviations: float = 3.0, floor: float | None = -0.4
    ) -> "NeuronBins":
        """Return the bins of DLN's code (build_hist_cache.py): from 3 standard deviations below the mean to 3 above.

        Mean and deviation are over the tokens of all languages together. A range narrower than 0.001 becomes 0.05 on
        either side of the mean.

        Args:
            stats: A recording with sums, at the same site.
            n: Number of bins.
            deviations: Standard deviations on either side.
            floor: No first edge is below this, as SiLU has no value below -0.28; used at the site "gate_act" alone.

        Raises:
            SettingError: No bin, or no positive number of deviations.
            DataError: Counts alone.
        """
        if not 0 < deviations < math.inf:
            raise SettingError(f"deviations={deviations} must be a number above 0.")
        share = (stats.tokens.double() / stats.tokens.sum())[:, None, None]
        mean = (share * stats.mean()).sum(dim=0)
        square = (share * (stats.std().square() + stats.mean().square())).sum(dim=0)
        reach = deviations * (square - mean.square()).clamp(min=0).sqrt()
        low, high = mean - reach, mean + reach
        if floor is not None and stats.site == "gate_act":
            low = low.clamp(min=floor)
        narrow = high - low < _NARROW
        low, high = torch.where(narrow, mean - _ROOM, low), torch.where(narrow, mean + _ROOM, high)
        return cls(low.float(), high.float(), n)

    def place(self, values: Float32[Tensor, "token part"], layer: int, first: int) -> Int64[Tensor, "token part"]:
        """Return floor((value - low) / width) + 1 in float32, between 0 and n + 1."""
        part = slice(first, first + values.shape[1])
        low = self.low[layer, part]
        places = (values - low) / ((self.high[layer, part] - low) / self.n)
        # A NaN would become any whole number.
        return places.floor_().clamp_(-1, self.n).nan_to_num_(nan=-1.0).to(torch.int64) + 1

    def edges_of(self, layer: int, neuron: int) -> Float32[Tensor, " edge"]:
        """Return the n + 1 edges of a neuron's bins."""
        return torch.linspace(float(self.low[layer, neuron]), float(self.high[layer, neuron]), self.n + 1)

    def middles_of(self, layer: int, first: int, last: int) -> Float64[Tensor, "part bin"]:
        """Return one value for each of n + 2 bins of some neurons."""
        low, high = self.low[layer, first:last].double(), self.high[layer, first:last].double()
        return _middles(low[:, None] + (high - low)[:, None] * torch.linspace(0, 1, self.n + 1, dtype=torch.float64))

    def to(self, device: torch.device) -> "NeuronBins":
        """Return the same bins on a device."""
        return NeuronBins(self.low.to(device), self.high.to(device), self.n)

    def to_dict(self) -> dict[str, Any]:
        """Return the number of bins and the sha256 of the ranges."""
        ranges = torch.stack([self.low, self.high]).cpu().contiguous()
        return {"n": self.n, "ranges": sha256_of(ranges.numpy().tobytes())}

    def tensors(self) -> dict[str, Tensor]:
        """Return the ranges."""
        return {"low": self.low, "high": self.high}


def binning_of(values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Binning:
    """Return bins from what `to_dict` and `tensors` gave."""
    return NeuronBins(tensors["low"], tensors["high"], values["n"]) if "ranges" in values else Bins(**values)


def _require_bins(n: int) -> None:
    if n < 1:
        raise SettingError(f"n={n} bins are too few; use at least 1.")


def _middles(edges: Float64[Tensor, "part edge"]) -> Float64[Tensor, "part bin"]:
    return torch.cat([edges[:, :1], (edges[:, :-1] + edges[:, 1:]) / 2, edges[:, -1:]], dim=1)
