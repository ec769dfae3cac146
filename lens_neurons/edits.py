"""One change of some neurons of one layer, and the statistics of a running forward that such a change may use."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from lens_neurons.adapter import Adapter
from lens_neurons.errors import SettingError
from lens_neurons.neurons import NeuronSet
from lens_neurons.storage import Provenance

Operation = Literal["set", "add", "scale"]
EditSite = Literal["gate_act", "post"]
Positions = Literal["all", "prompt", "generated"]

STATISTICS = ("max", "mean", "median", "std", "iqr", "mad")
# Sorting whole layers is done in pieces of at most this many values.
_SORTED_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class Edit:
    """One change of some neurons of one layer.

    Attributes:
        layer: The layer.
        indices: Its neurons, each once.
        operation: What happens to their values.
        values: v, c or m; multiples of `statistic` where one is named.
        statistic: Name of a statistic of act(gate), see `row_statistic`; None: the values are plain numbers.
        site: Where they are changed.
        positions: At which tokens.
    """

    layer: int
    indices: Int64[Tensor, " unit"]
    operation: Operation
    values: Float64[Tensor, " unit"]
    statistic: str | None = None
    site: EditSite = "gate_act"
    positions: Positions = "all"


@dataclass(frozen=True)
class TestTime:
    """A value that is known only during the forward: a statistic of the layer's act(gate).

    It is taken for each row by itself over all neurons of the layer and the row's real tokens in the running
    forward: prompt and answer in scoring; the prompt first and then each single token in generation. Several
    interventions of one condition apply in order, and a statistic sees what the earlier ones left.

    Attributes:
        statistic: "max", "mean", "median", "std", "iqr", "mad" or "percentile:q" (q from 0 to 100).
        multiple: What it is multiplied by.
    """

    # Keeps pytest from taking the class for a test.
    __test__: ClassVar[bool] = False

    statistic: str
    multiple: int | float = 1.0

    def __post_init__(self) -> None:
        """Check the name.

        Raises:
            SettingError: An unknown statistic.
        """
        check_statistic(self.statistic)


@runtime_checkable
class EditSource(Protocol):
    """Something that says what is done to which neurons: a `Condition`."""

    def edits(self, adapter: Adapter) -> Sequence[Edit]:
        """Return the edits in the order in which they apply."""
        ...


def check_statistic(name: str) -> None:
    """Raise a SettingError unless a name is one that `row_statistic` knows."""
    kind, _, percent = name.partition(":")
    if kind == "percentile":
        try:
            known = 0 <= float(percent) <= 100
        except ValueError:
            known = False
    else:
        known = name in STATISTICS
    if not known:
        raise SettingError(
            f"statistic {name!r} is unknown; use {', '.join(STATISTICS)}, or 'percentile:q' with q between 0 and 100."
        )


def row_statistic(
    values: Float[Tensor, "batch pos neuron"], mask: Bool[Tensor, "batch pos"], name: str
) -> Float[Tensor, " batch"]:
    """Return one number a row: a statistic over all neurons at the row's real positions.

    Args:
        values: act(gate) of a whole layer.
        mask: True at real positions; every row has at least one.
        name: "max", "mean", "median", "std" (n - 1), "iqr" (75% - 25%), "mad" (median distance from the median),
            or "percentile:q". Quantiles interpolate linearly between order statistics.
    """
    exact = values if values.dtype == torch.float64 else values.to(torch.float32)
    real = mask[:, :, None]
    if name == "max":
        return exact.masked_fill(~real, -torch.inf).amax(dim=(1, 2)).to(values.dtype)
    count = mask.sum(dim=1) * values.shape[2]
    if name in ("mean", "std"):
        mean = exact.masked_fill(~real, 0).sum(dim=(1, 2)) / count
        if name == "mean":
            return mean.to(values.dtype)
        squares = (exact - mean[:, None, None]).masked_fill(~real, 0).square().sum(dim=(1, 2))
        return (squares / (count - 1)).sqrt().to(values.dtype)
    at_once = max(1, _SORTED_AT_ONCE // max(1, values[0].numel()))
    parts = [
        _by_rank(exact[at : at + at_once].masked_fill(~real[at : at + at_once], torch.inf).flatten(1), n, name)
        for at, n in zip(range(0, len(exact), at_once), count.split(at_once), strict=True)
    ]
    return torch.cat(parts).to(values.dtype)


def _by_rank(values: Float[Tensor, "batch n"], count: Int64[Tensor, " batch"], name: str) -> Float[Tensor, " batch"]:
    ordered = values.sort(dim=1).values
    if name == "iqr":
        return _quantile(ordered, count, 0.75) - _quantile(ordered, count, 0.25)
    if name == "mad":
        median = _quantile(ordered, count, 0.5)
        return _quantile((ordered - median[:, None]).abs().sort(dim=1).values, count, 0.5)
    return _quantile(ordered, count, 0.5 if name == "median" else float(name.partition(":")[2]) / 100)


def _quantile(ordered: Float[Tensor, "batch n"], count: Int64[Tensor, " batch"], q: float) -> Float[Tensor, " batch"]:
    # Beyond `count` the rows hold +inf from padding, which is never reached. Ranks are found in float64: float32
    # has too few digits for a layer's millions of values.
    rank = q * (count - 1).to(torch.float64)
    low = rank.floor()
    below = ordered.gather(1, low.to(torch.int64)[:, None]).squeeze(1)
    above = ordered.gather(1, rank.ceil().to(torch.int64)[:, None]).squeeze(1)
    return torch.lerp(below, above, (rank - low).to(ordered.dtype))


def units_to_dict(units: NeuronSet) -> dict[str, Any]:
    """Return units as plain JSON values."""
    languages = {code: [part.tolist() for part in units.units(code)] for code in units.languages}
    origin = {"method": dict(units.method), "provenance": units.provenance.to_dict()}
    return {"languages": languages, "site": units.site, "shape": list(units.shape), **origin}


def units_from_dict(values: Mapping[str, Any]) -> NeuronSet:
    """Return the units that `units_to_dict` described."""
    masks: dict[str, Tensor] = {}
    for code, (layers, indices) in values["languages"].items():
        masks[code] = torch.zeros(tuple(values["shape"]), dtype=torch.bool)
        masks[code][torch.tensor(layers, dtype=torch.int64), torch.tensor(indices, dtype=torch.int64)] = True
    provenance = Provenance.from_dict(values["provenance"])
    return NeuronSet.from_masks(masks, site=values["site"], provenance=provenance, method=values["method"])
