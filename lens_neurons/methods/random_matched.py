"""Random units that match a set in number, or in number and activation probability: a control, in a method's place."""

import bisect
from dataclasses import replace

import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor

from lens_neurons.activation_stats import ActivationStats
from lens_neurons.errors import DataError, ProvenanceError, SettingError
from lens_neurons.methods.registry import method
from lens_neurons.neurons import NeuronSet
from lens_neurons.storage import derive_seed


@method("random_matched", reference="lens_neurons", needs=("counts",))
def random_matched(
    stats: ActivationStats,
    like: NeuronSet,
    seed: int = 0,
    match: str = "probability",
    neighbours: int = 10,
) -> NeuronSet:
    """Return random units that stand in for those of a set: as many in every layer, and as often active.

    Every drawn unit lies outside the units of all languages of the set. Under `match="probability"` the units of a
    language and layer are visited in random order, and for each one of the `neighbours` free units that are closest to
    it in the language's activation probability is drawn, without replacement. A set that is compared with such a
    control owes nothing to how often its units fire. `match="count"` is `NeuronSet.random_like`, which needs no
    probabilities, so that the set may be of several sites and of others than the recording's.

    Args:
        stats: The recording that the set comes from.
        like: The set; under "probability" of one site, the recording's.
        seed: Seed. A language's draw depends on it, on the language's name and on which units are free, not on which
            other languages there are besides.
        match: "probability", or "count": as many in every layer and nothing else.
        neighbours: How many candidates there are for each draw. With 1 it is the closest free unit, and seeds differ
            in little but ties.

    Returns:
        The languages of the set to as many units. Scores are the differences in activation probability between each
        unit and the one that it stands in for (0 under "count"). `method["mean_difference"]` has, by language, how far
        the two sets' activation probabilities are apart on average, when both are sorted within each layer; under
        "count" of the units at the recording's site, and None where the set has no such site.

    Raises:
        SettingError: Another `match`, or fewer than one neighbour.
        DataError: Several sites under "probability", a layer with fewer free units than asked for, or a language of
            the set that was not recorded.
        ProvenanceError: The set has another site, shape or model than the recording; under "count", another number
            of layers, another shape at the recording's site, or another model.
    """
    if match not in ("count", "probability"):
        raise SettingError(f"match={match!r} is unknown; use 'probability' or 'count'.")
    if neighbours < 1:
        raise SettingError(f"neighbours={neighbours} must be at least 1.")
    _require_fit(stats, like, match)
    every = stats.probability()
    probability = {code: every[stats.index(code)] for code in like.languages}
    settings = {
        "name": "random_matched",
        "like": dict(like.method),
        "seed": seed,
        "match": match,
        "neighbours": neighbours,
    }
    if match == "count":
        drawn = like.random_like(seed)
        difference = _mean_differences(probability, like, drawn, stats.site) if stats.site in like.sites else None
        return replace(drawn, method={**settings, "mean_difference": difference})
    free = ~like.union_mask()
    masks: dict[str, Tensor] = {}
    scores: dict[str, Tensor] = {}
    for code in like.languages:
        _require_enough(code, like.mask(code), free)
    for code in like.languages:
        generator = torch.Generator().manual_seed(derive_seed(seed, "random_matched", code))
        masks[code], scores[code] = _draw(probability[code], like.mask(code), free, neighbours, generator)
    drawn = NeuronSet.from_masks(masks, site=like.site, scores=scores, provenance=like.provenance)
    difference = _mean_differences(probability, like, drawn, stats.site)
    return replace(drawn, method={**settings, "mean_difference": difference})


def _require_fit(stats: ActivationStats, like: NeuronSet, match: str) -> None:
    shape = (stats.n_layers, stats.n_neurons)
    if match == "probability" and (like.site, like.shape) != (stats.site, shape):
        raise ProvenanceError(
            f"the set is at {like.site} {like.shape} and the recording at {stats.site} {shape}; give the recording "
            "that the set comes from."
        )
    for site, (layers, width) in like.sites.items():
        if layers != stats.n_layers or (site == stats.site and width != stats.n_neurons):
            raise ProvenanceError(
                f"the set has shape {(layers, width)} at {site}, and the recording is at {stats.site} {shape}; give "
                "the recording that the set comes from."
            )
    if like.provenance.known and stats.provenance.known:
        stats.provenance.require_same(like.provenance, ("weights",), what="the recording and the set")


def _require_enough(language: str, wanted: Bool[Tensor, "layer neuron"], free: Bool[Tensor, "layer neuron"]) -> None:
    for layer, (n, there) in enumerate(zip(wanted.sum(dim=1).tolist(), free.sum(dim=1).tolist(), strict=True)):
        if n > there:
            raise DataError(f"layer {layer} has {there} free units, but '{language}' needs {n}; use a smaller set.")


def _draw(
    probability: Float64[Tensor, "layer neuron"],
    wanted: Bool[Tensor, "layer neuron"],
    free: Bool[Tensor, "layer neuron"],
    neighbours: int,
    generator: torch.Generator,
) -> tuple[Bool[Tensor, "layer neuron"], Float64[Tensor, "layer neuron"]]:
    """Return the drawn units as a mask, and how far each is from the unit that it stands in for."""
    mask, distance = torch.zeros_like(wanted), torch.zeros_like(probability)
    for layer in wanted.any(dim=1).nonzero()[:, 0].tolist():
        targets = _shuffled(wanted[layer], generator)
        # In random order first, so that units with equal probabilities have equal chances.
        pool = _shuffled(free[layer], generator)
        pool = pool[torch.argsort(probability[layer, pool], stable=True)]
        numbers, values = pool.tolist(), probability[layer, pool].tolist()
        luck = torch.rand(len(targets), generator=generator, dtype=torch.float64).tolist()
        for goal, chance in zip(probability[layer, targets].tolist(), luck, strict=True):
            first, last = _closest(values, goal, neighbours)
            at = first + int(chance * (last - first))
            mask[layer, numbers[at]] = True
            distance[layer, numbers[at]] = abs(values[at] - goal)
            del numbers[at], values[at]
    return mask, distance


def _shuffled(mask: Bool[Tensor, " neuron"], generator: torch.Generator) -> Int64[Tensor, " unit"]:
    found = mask.nonzero()[:, 0]
    return found[torch.randperm(len(found), generator=generator)]


def _closest(values: list[float], goal: float, n: int) -> tuple[int, int]:
    """Return where the n ascending values closest to a goal begin and end; of two as close the lower one."""
    first = last = bisect.bisect_left(values, goal)
    while last - first < min(n, len(values)):
        if last == len(values) or (first > 0 and goal - values[first - 1] <= values[last] - goal):
            first -= 1
        else:
            last += 1
    return first, last


def _mean_differences(probability: dict[str, Tensor], like: NeuronSet, drawn: NeuronSet, site: str) -> dict[str, float]:
    one, other = like.at(site), drawn.at(site)
    return {code: _mean_difference(values, one.mask(code), other.mask(code)) for code, values in probability.items()}


def _mean_difference(
    probability: Float64[Tensor, "layer neuron"], one: Bool[Tensor, "layer neuron"], other: Bool[Tensor, "layer neuron"]
) -> float:
    """Return the mean difference between two sets' sorted activation probabilities, layer by layer; 0 if empty."""
    total = sum(
        float((row[mine].sort().values - row[theirs].sort().values).abs().sum())
        for row, mine, theirs in zip(probability, one, other, strict=True)
    )
    return total / max(1, int(one.sum()))
