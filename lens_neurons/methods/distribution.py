"""Distribution-aware language neurons (DLN, EMNLP 2026): units whose values separate two groups of languages."""

import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor

from lens_neurons.errors import DataError, SettingError
from lens_neurons.histograms import Histograms
from lens_neurons.methods.registry import method
from lens_neurons.neurons import NeuronSet

# Shares of one block of units, all languages and bins.
_BLOCK = 1 << 21

# Rounding leaves the overlap of equal distributions so far from 1 at most.
_EQUAL = 1 - 1e-9


def overlaps(probability: Float64[Tensor, "language neuron bin"]) -> Float64[Tensor, "neuron language language"]:
    """Return S[k, l] = sum_b min(P_k(b), P_l(b)) of every unit: 1 for equal distributions, 0 for separate ones.

    Computed as 1 - sum_b |P_k(b) - P_l(b)| / 2, which is the same for shares that add up to 1.
    """
    rows = probability.transpose(0, 1).contiguous()
    return (1 - torch.cdist(rows, rows, p=1.0) / 2).clamp(0, 1)


def best_split(
    overlap: Float64[Tensor, "neuron language language"],
    mean: Float64[Tensor, "neuron language"],
    order: Int64[Tensor, " language"],
) -> tuple[Float64[Tensor, " neuron"], Bool[Tensor, "neuron language"]]:
    """Return, for every unit, the cost of the best split of the languages in two, and which of them are on its side A.

    The cost of a split A | B is the largest overlap of a language in A with one in B. The lowest cost is the weakest
    edge of the maximum spanning tree, as in single linkage with two clusters, so no split has to be tried. With

        D[k, l] = max over paths from k to l of the weakest overlap on the path

    it is min D, and languages with D above it stay together. Where that leaves two groups, there is one best split.
    Where it leaves more, every way to put whole groups on two sides costs the same, and A is one group. Of the
    candidates A has the fewest languages; among equals, the highest mean value; then the first name.

    Args:
        overlap: Overlap of every two languages; 1 on the diagonal.
        mean: Mean value of each language.
        order: Rank of each language's name.
    """
    linked = overlap.clone()
    n = overlap.shape[1]
    for k in range(n):
        linked = torch.maximum(linked, torch.minimum(linked[:, :, k, None], linked[:, None, k]))
    cost = linked.amin(dim=(1, 2))
    same = (linked > cost[:, None, None]) | torch.eye(n, dtype=torch.bool)
    size = same.sum(dim=2)
    group_mean = torch.where(same, mean[:, None, :], 0.0).sum(dim=2) / size
    # Every language stands for its group; the rules leave the members of one.
    best = size == size.amin(dim=1, keepdim=True)
    group_mean = torch.where(best, group_mean, -torch.inf)
    best = group_mean == group_mean.amax(dim=1, keepdim=True)
    chosen = torch.where(best, order, n).argmin(dim=1)
    return cost, same[torch.arange(len(same)), chosen]


_BIBTEX = """@inproceedings{dln2026,
  title = {Distribution-aware Language Neuron Identification in Multilingual Large Language Models},
  booktitle = {Proceedings of the 2026 Conference on Empirical Methods in Natural Language Processing},
  year = {2026}
}"""


@method("distribution", reference="DLN, EMNLP 2026", bibtex=_BIBTEX, needs=("histograms",))
def distribution(histograms: Histograms, tau_percentile: float = 1.0) -> NeuronSet:
    """Return the units whose distribution in some languages is apart from that in all others.

    Source: "Distribution-aware Language Neuron Identification" (DLN, EMNLP 2026) and its code (select_neurons.py).

    1. S[k, l] is the overlap of a unit's histograms in two languages, sum_b min(P_k(b), P_l(b)).
    2. The best split A | B of the languages has the lowest cost, which is the largest S between the two sides.
    3. A unit is taken if its cost is at most tau, the lowest `tau_percentile` percent of all S of different languages
       and all units (of N numbers the one at place `int(N * tau_percentile / 100)`, from 1). Units with the same
       distribution in all languages are never taken.
    4. It belongs to the languages of A, the smaller side; of two equal halves the one with the higher mean (from the
       middles of the bins). Its kind is "single" where A is one language (the paper's SLN) and "multi" where it is
       several (MLN). The code takes of equal halves that with the first language, whichever that is; with seven
       languages there are none.

    The paper's bins are `NeuronBins`, which take two recordings; those of `Bins` take one.

    Args:
        histograms: A recording with histograms. The overlaps of all units take 8 bytes a pair of languages.
        tau_percentile: Percentile, above 0 and at most 100.

    Returns:
        Languages to units, ordered by cost, 0 to 1; languages without units are kept, empty. `method` holds tau.

    Raises:
        SettingError: A percentile outside (0, 100].
        DataError: Fewer than two languages.
    """
    if not 0 < tau_percentile <= 100:
        raise SettingError(f"tau_percentile={tau_percentile} must be above 0 and at most 100.")
    names = histograms.languages
    n = len(names)
    if n < 2:
        raise DataError("distribution compares languages, so the recording needs at least two; record more languages.")
    upper = torch.triu_indices(n, n, offset=1)
    order = torch.tensor([sorted(names).index(name) for name in names])
    step = max(1, _BLOCK // (n * (histograms.bins.n + 2)))
    shape = (histograms.n_layers, histograms.n_neurons)
    pairs = torch.empty(shape[0] * shape[1], upper.shape[1], dtype=torch.float64)
    costs = torch.empty(shape[0] * shape[1], dtype=torch.float64)
    sides = torch.empty(shape[0] * shape[1], n, dtype=torch.bool)
    for layer in range(shape[0]):
        for first in range(0, shape[1], step):
            last = min(first + step, shape[1])
            probability = histograms.probability(layer, slice(first, last))
            overlap = overlaps(probability)
            at = slice(layer * shape[1] + first, layer * shape[1] + last)
            pairs[at] = overlap[:, upper[0], upper[1]]
            middles = histograms.bins.middles_of(layer, first, last)
            costs[at], sides[at] = best_split(overlap, (probability * middles).sum(dim=2).T, order)
    at = max(1, int(pairs.numel() * tau_percentile / 100))
    ordered = pairs.view(-1).numpy()
    ordered.partition(at - 1)
    tau = float(ordered[at - 1])
    taken = (costs <= tau) & (costs < _EQUAL)
    single = (sides.sum(dim=1) == 1).view(shape)
    scores = costs.view(shape)
    return NeuronSet.from_masks(
        {name: (taken & sides[:, k]).view(shape) for k, name in enumerate(names)},
        site=histograms.site,
        scores=dict.fromkeys(names, scores),
        provenance=histograms.provenance,
        method={"name": "distribution", "tau_percentile": tau_percentile, "tau": tau},
        kinds={"single": single, "multi": ~single},
    )
