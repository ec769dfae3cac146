"""Ternary classification: language-specific, language-related and general neurons (Zhang et al. 2026, 2505.21505)."""

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor

from lens_neurons.activation_stats import ActivationStats
from lens_neurons.errors import DataError, SettingError
from lens_neurons.methods.lape import lowest, nth_smallest, share_of
from lens_neurons.methods.registry import method
from lens_neurons.neurons import NeuronSet

_BIBTEX = """@inproceedings{zhang2026alignment,
  title = {How does Alignment Enhance LLMs' Multilingual Capabilities? A Language Neurons Perspective},
  author = {Zhang, Shimao and others},
  booktitle = {Proceedings of the AAAI Conference on Artificial Intelligence},
  year = {2026},
  eprint = {2505.21505},
  archivePrefix = {arXiv}
}"""

KINDS = ("specific", "related", "general")

# The stages of a model, from its first layer to its last (the paper's abstract).
STAGES = (
    "multilingual understanding",
    "shared semantic reasoning",
    "output space transformation",
    "vocabulary outputting",
)

# Where lambda is searched: from 0 to this, as in the released code, in steps that are this part of 1.
LARGEST_LAMBDA = 0.2
_STEPS = 1_000_000
_ROUNDING = 1e-9

# A stage has at least so many layers: one layer that stands out is no stage.
_LEAST_LAYERS = 2


class Stage(NamedTuple):
    """A run of layers with about the same share of language neurons.

    Attributes:
        name: What the paper calls it.
        first: Its first layer.
        last: Its last layer.
    """

    name: str
    first: int
    last: int


def flatness(probability: Float64[Tensor, "language layer neuron"]) -> Float64[Tensor, "layer neuron"]:
    """Return H(p') / ln K with p' = p / sum_k p, in [0, 1]; 1 for a unit that never fires (p' uniform).

    The released code bounds p' below by 1e-12, so that ln 0 does not occur; here 0 ln 0 is 0, which is less by 3e-11
    at most a language.
    """
    # Sorted, so that the last bit of a sum does not depend on the order of the languages.
    ordered = probability.sort(dim=0).values
    total = ordered.sum(dim=0)
    share = torch.where(total > 0, ordered / total, 1 / len(probability))
    return torch.special.entr(share).sum(dim=0) / math.log(len(probability))


def scaled_maximum(probability: Float64[Tensor, "language layer neuron"]) -> Float64[Tensor, "layer neuron"]:
    """Return max_k p / norm with norm = H_K / K, H_K the K-th harmonic number (0.2929 for K = 10)."""
    n = len(probability)
    return probability.amax(dim=0) / (sum(1 / k for k in range(1, n + 1)) / n)


def largest_lambda(
    flat: Float64[Tensor, " unit"],
    height: Float64[Tensor, " unit"],
    general: Bool[Tensor, " unit"],
    n_chosen: int,
    most: float = LARGEST_LAMBDA,
    steps: int = _STEPS,
) -> float | None:
    """Return the largest lambda, a multiple of 1 / steps, at which no general unit is chosen; None if there is none.

    Chosen are the `n_chosen` units with the lowest `flat - lambda * height`, ties by number. These scores are straight
    lines in lambda, and a general unit that one lambda lets in may be crowded out again at a larger one; so whether
    one is chosen is not monotone, and the bisection of the released code may stop short of the largest lambda. Here
    the search goes down from `most` and jumps: the best general unit that is chosen rules out every lambda at which it
    still is, and where that ends follows from where its line crosses the others.

    Args:
        flat: Score at lambda 0.
        height: What lambda multiplies.
        general: The units that must not be chosen.
        n_chosen: Number of units that are chosen.
        most: Upper end of the search.
        steps: Steps of the search in an interval of length 1.
    """
    intercepts, slopes, order_of_units = flat.numpy(), height.numpy(), np.arange(len(flat))
    step = math.floor(most * steps + 1e-6)
    while step >= 0:
        now = step / steps
        chosen = lowest((flat - now * height)[None], n_chosen)
        inside = chosen[general[chosen]]
        if not len(inside):
            return now
        best = int(inside[0])
        # A unit is before the best general one where lambda * slope < gap: below the crossing of their lines if the
        # slope is positive, above it if it is negative. What crosses within rounding of here counts as below.
        slope, gap = slopes[best] - slopes, intercepts[best] - intercepts
        parallel = slope == 0
        crossing = np.divide(gap, slope, out=np.full_like(gap, -1.0), where=~parallel)
        before = np.where(slope > 0, crossing > now + _ROUNDING, crossing < now - _ROUNDING)
        passed = (crossing >= 0) & ~parallel & np.where(slope > 0, ~before, before)
        before = np.where(parallel, (gap > 0) | ((gap == 0) & (order_of_units < best)), before)
        where, change = crossing[passed], np.sign(slope[passed])
        order = np.lexsort((-change, -where))
        enough = before.sum() + np.cumsum(change[order]) >= n_chosen
        if not enough.any():
            return None
        # On the crossing itself the units' numbers decide, so it is tried where it is a step.
        step = min(step - 1, math.floor(float(where[order][int(np.argmax(enough))]) * steps + 1e-6))
    return None


@method("ternary", reference="Zhang et al. 2026, arXiv 2505.21505", bibtex=_BIBTEX, needs=("counts",))
def ternary(
    stats: ActivationStats,
    top_rate: float = 0.01,
    lam: float | None = None,
    activation_bar_ratio: float = 0.95,
) -> NeuronSet:
    """Return language neurons of three kinds: specific to one language, related to several, general to all.

    With p the activation probability of every language and unit, K languages, and p' = p / sum_k p:

        e = H(p') / ln K - lam * max_k p / (H_K / K)

    1. The `round(top_rate * all units)` with the lowest e are taken, ties by (layer, neuron).
    2. A taken unit belongs to every language whose p exceeds the `activation_bar_ratio` quantile of all p. It is
       "specific" to one language, "related" to more, "general" to all K; without any language it is dropped.

    The second term does what LAPE's filter does: it keeps out units that hardly ever fire, which a small entropy alone
    would put first. The paper takes the largest lam at which no taken unit is general; so general units appear where
    `lam` is given, and what the paper calls general beyond the taken units is not in the set. The released code has 10
    languages built in; here K is any. Counts on generated tokens alone, as in the paper, come from
    `record(model, complete(model, prompts))`.

    Args:
        stats: A recording, or `ActivationStats.from_counts`; only counts are used.
        top_rate: Share of all units that is taken.
        lam: Weight of the largest probability, 0 or more; None: the largest in [0, 0.2] at which no general unit is
            taken, to 1e-6 (see `largest_lambda`).
        activation_bar_ratio: Quantile of p that a language must exceed to be assigned the unit.

    Returns:
        Languages to units of the three kinds, ordered by e; `method["lam"]` is what was used.

    Raises:
        SettingError: A rate outside (0, 1] or too small for one unit, or a lam that is no number from 0 on.
        DataError: Fewer than two languages.
    """
    for name, rate in {"top_rate": top_rate, "activation_bar_ratio": activation_bar_ratio}.items():
        if not 0 < rate <= 1:
            raise SettingError(f"{name}={rate} must be above 0 and at most 1.")
    searched = lam is None
    if lam is not None and not 0 <= lam < math.inf:
        raise SettingError(f"lam={lam!r} must be a number from 0 on, or None to search for it.")
    if len(stats.languages) < 2:
        raise DataError("ternary compares languages, so the recording needs at least two; record more languages.")
    probability = stats.probability()
    flat, height = flatness(probability), scaled_maximum(probability)
    n_chosen = share_of(flat.numel(), top_rate)
    over = probability > nth_smallest(probability, activation_bar_ratio)
    notes: tuple[str, ...] = ()
    if lam is None:
        lam = largest_lambda(flat.flatten(), height.flatten(), over.all(dim=0).flatten(), n_chosen)
        if lam is None:
            notes = (f"a general unit is taken at every lam in [0, {LARGEST_LAMBDA}], so lam is 0 and some are in it",)
    weight = float(lam or 0.0)
    score = flat - weight * height
    taken = torch.zeros_like(over[0])
    taken.view(-1)[lowest(score, n_chosen)] = True
    owners = torch.where(taken, over.sum(dim=0), 0)
    masks = {code: taken & over[k] for k, code in enumerate(stats.languages)}
    return NeuronSet.from_masks(
        masks,
        site=stats.site,
        scores=dict.fromkeys(masks, score),
        provenance=stats.provenance,
        method={
            "name": "ternary",
            "top_rate": top_rate,
            "lam": weight,
            "lam_searched": searched,
            "activation_bar_ratio": activation_bar_ratio,
        },
        kinds={
            "specific": owners == 1,
            "related": (owners > 1) & (owners < len(masks)),
            "general": owners == len(masks),
        },
        notes=notes,
    )


def owner_counts(neurons: NeuronSet) -> Int64[Tensor, "layer neuron"]:
    """Return the number of languages that each unit belongs to."""
    return torch.stack([neurons.mask(code) for code in neurons.languages]).sum(dim=0)


def layer_stages(neurons: NeuronSet) -> list[Stage]:
    """Return the four stages of a model: runs of layers that differ in their share of language neurons. Ours.

    The paper tells four stages apart and reads their bounds off a plot. Here the layers are cut into four runs of at
    least two, so that the share of specific and related units is as constant as possible in each: least squares over
    all cuts, ties to the earlier layer. The names are given in the order of the layers; whether a stage does what its
    name says, or is there at all in a model whose language neurons are in the last layers alone, the cut cannot tell.

    Args:
        neurons: What `ternary` returned; of a method without kinds, the units of at least one language and not of all.

    Raises:
        DataError: Fewer than 8 layers, several sites, no such unit, or shares so alike that fewer than four runs fit
            as well.
    """
    layers, width = neurons.shape
    needed = _LEAST_LAYERS * len(STAGES)
    if layers < needed:
        raise DataError(f"{layers} layers are too few to tell four stages apart; use a model with at least {needed}.")
    if neurons.kinds:
        parts = [neurons.of_kind(name).union_mask() for name in KINDS[:2] if name in neurons.kinds]
        mask = torch.stack([torch.zeros(layers, width, dtype=torch.bool), *parts]).any(dim=0)
    else:
        owners = owner_counts(neurons)
        mask = (owners > 0) & (owners < len(neurons.languages))
    errors, firsts = segments(mask.sum(dim=1).numpy() / width, len(STAGES), _LEAST_LAYERS)
    if errors[-2] - errors[-1] <= 1e-12:
        raise DataError(
            "the share of language neurons differs between too few layers to tell four stages apart; use a larger "
            "model, or a larger top_rate."
        )
    lasts = [*(first - 1 for first in firsts[1:]), layers - 1]
    return [Stage(*one) for one in zip(STAGES, firsts, lasts, strict=True)]


def segments(values: npt.NDArray[np.float64], most: int, least: int = 1) -> tuple[list[float], list[int]]:
    """Return the squared error of the best cut into 1, 2, ... `most` runs, and where the runs of the last cut begin.

    The best cut is exact, by dynamic programming; of equally good ones that whose last run begins first.

    Args:
        values: What is cut; at least `most * least` of them.
        most: Number of runs.
        least: Shortest run.
    """
    n = len(values)
    sums, squares = np.cumsum([0.0, *values]), np.cumsum([0.0, *values**2])

    def error(first: int, end: int) -> float:
        return max(float(squares[end] - squares[first] - (sums[end] - sums[first]) ** 2 / (end - first)), 0.0)

    best = [[math.inf] * (n + 1) for _ in range(most + 1)]
    start = [[0] * (n + 1) for _ in range(most + 1)]
    best[0][0] = 0.0
    for runs in range(1, most + 1):
        for end in range(runs * least, n + 1):
            low = (runs - 1) * least
            found = [best[runs - 1][first] + error(first, end) for first in range(low, end - least + 1)]
            best[runs][end] = min(found)
            start[runs][end] = low + found.index(best[runs][end])
    firsts, end = list[int](), n
    for runs in range(most, 0, -1):
        end = start[runs][end]
        firsts.insert(0, end)
    return [best[runs][n] for runs in range(1, most + 1)], firsts
