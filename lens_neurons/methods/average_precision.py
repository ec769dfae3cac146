"""Average precision: units whose response tells one language's texts from all others (Kojima et al. 2024)."""

from math import inf

import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor

from lens_neurons.collectors import LINEAR_SITES
from lens_neurons.errors import DataError, SettingError
from lens_neurons.methods.citations import KOJIMA_2024
from lens_neurons.methods.ranking import average_precisions
from lens_neurons.methods.registry import method
from lens_neurons.neurons import NeuronSet
from lens_neurons.responses import TextResponses

_WHICH = ("top", "bottom", "both", "medium")

# Values in one block of units: 128 MiB in float32, whatever the number of texts.
_BLOCK = 1 << 25


@method(
    "average_precision",
    reference="Kojima et al. 2024, arXiv 2404.02431",
    bibtex=KOJIMA_2024,
    needs=("responses",),
    sites=("linear",),
)
def average_precision(responses: TextResponses, k: int = 2000, which: str = "both", units: str = "linear") -> NeuronSet:
    """Return, for every language, k units that rank its texts highest or lowest among the texts of all languages.

    The ranking is by average precision (`average_precision_table`): near 1 where the language's texts have the
    largest responses, their share of all texts where the response says nothing, and least where they have the
    smallest. Ties are broken by (site in the order recorded, layer, index). A constant unit, whose response is the
    same on every text, is never taken, nor does it count in the ranking. A unit may be taken for several languages;
    `.exclusive()` drops these.

    The paper overrides the units of a language with the median of their responses on its texts (on_p50 in its code),
    which is `responses.median(language, site)`; `responses.quantile(language, 0.9, site)` is its on_p90. Its default,
    k=2000 of all linear outputs, hardly steers Llama-2, which took about 20,000.

    Args:
        responses: A recording of at least two languages.
        k: Units for each language, in total.
        which: "top"; "bottom"; "both", half of k each; or "medium", the k in the middle of the ranking, the paper's
            control.
        units: "linear", the outputs of all linear layers that were recorded, as in the paper; "mlp", those of the MLP
            alone; "all" sites that were recorded, also those made from linear outputs, such as gate_act; or one site.

    Returns:
        Languages to units, whose kinds are "top", "bottom" and "medium" and whose scores are the average precision.
        Order: top units, highest first; then bottom units, lowest first; medium units highest first.

    Raises:
        SettingError: An unknown choice, sites that were not recorded, k below 1, odd for "both", or above the number
            of units that are not constant.
        DataError: Fewer than two languages, a language without texts, or a response that is NaN or infinite.
    """
    if which not in _WHICH:
        raise SettingError(f"which={which!r} is unknown; use one of {', '.join(_WHICH)}.")
    if k < 1:
        raise SettingError(f"k={k} must be at least 1.")
    if which == "both" and k % 2:
        raise SettingError(f"k={k} must be even for which='both', which takes k/2 top and k/2 bottom units.")
    sites = chosen_sites(responses, units)
    n_units = sum(layers * width for layers, width in (responses.sites[site] for site in sites))
    if k > n_units:
        raise SettingError(f"k={k} is more than the {n_units} units at {', '.join(sites)}; use a smaller k.")
    table, constant = scan(responses, sites)
    usable = (~constant).nonzero()[:, 0]
    if k > len(usable):
        raise SettingError(
            f"k={k} is more than the {len(usable)} units that can be ranked: of {n_units} units at "
            f"{', '.join(sites)}, {n_units - len(usable)} are constant; use a smaller k."
        )
    found: dict[str, Tensor] = {}
    kinds: dict[str, list[str]] = {}
    for code, scores in zip(responses.languages, table, strict=True):
        taken, kinds[code] = _taken(scores[usable], k, which)
        found[code] = usable[taken]
    return neuron_set(
        responses,
        found,
        dict(zip(responses.languages, table, strict=True)),
        kinds=kinds,
        sites=sites,
        method={"name": "average_precision", "k": k, "which": which, "units": units},
    )


def average_precision_table(responses: TextResponses, units: str = "all") -> Float64[Tensor, "language unit"]:
    """Return the average precision of every unit for every language, in the order of `responses.languages`.

    With the texts of one language as positives and those of all others as negatives, it is the area under the
    precision-recall curve of the unit's response, summed over the distinct responses (`ranking.average_precisions`).
    A constant unit gets the language's share of the texts.

    Args:
        responses: A recording of at least two languages. Units are read in blocks, so it may be larger than memory.
        units: "all" sites, so that units are numbered as in `responses`; or "linear", "mlp" or one site.

    Raises:
        SettingError: Sites that were not recorded.
        DataError: Fewer than two languages, a language without texts, or a response that is NaN or infinite.
    """
    return scan(responses, chosen_sites(responses, units))[0]


def chosen_sites(responses: TextResponses, units: str) -> tuple[str, ...]:
    """Return the recorded sites that "all", "linear", "mlp" or the name of a site stands for, in the order recorded.

    Raises:
        SettingError: None was recorded.
    """
    named = {"all": tuple(responses.sites), "linear": LINEAR_SITES, "mlp": LINEAR_SITES[4:]}.get(units, (units,))
    sites = tuple(site for site in responses.sites if site in named)
    if not sites:
        there = ", ".join(map(repr, responses.sites))
        wanted = there if len(responses.sites) == 1 else f"'all', or one of {there}"
        raise SettingError(f"units={units!r} was not recorded; pass units={wanted}.")
    return sites


def scan(
    responses: TextResponses, sites: tuple[str, ...]
) -> tuple[Float64[Tensor, "language unit"], Bool[Tensor, " unit"]]:
    """Return the average precision of every unit at some sites, and which units are constant over all texts.

    Both are on the CPU, wherever the responses are.

    Raises:
        DataError: Fewer than two languages, a language without texts, or a response that is NaN or infinite.
    """
    counts = responses.counts()
    if len(counts) < 2:
        raise DataError("average precision compares languages, so responses of at least two are needed; record more.")
    for code, n in counts.items():
        if not n:
            raise DataError(f"'{code}' has no text to rank; record some, or select the other languages.")
    labels = responses.labels()
    wanted = torch.zeros(responses.n_units, dtype=torch.bool)
    for site in sites:
        wanted[slice(*responses.span(site))] = True
    place = wanted.cumsum(0) - 1
    n_units = int(wanted.sum())
    table = torch.empty(len(counts), n_units, dtype=torch.float64)
    constant = torch.empty(n_units, dtype=torch.bool)
    for first, block in responses.blocks(max(1, _BLOCK // len(labels))):
        own = wanted[first : first + block.shape[1]]
        if not own.any():
            continue
        # Only the work on all texts is done where the responses are.
        low, high = block.amin(dim=0).cpu(), block.amax(dim=0).cpu()
        if not bool((own <= ((low > -inf) & (high < inf))).all()):
            _refuse(responses, first, block.cpu(), own)
        to = place[first : first + block.shape[1]][own]
        constant[to] = (low == high)[own]
        chosen = block if bool(own.all()) else block[:, own.to(block.device)]
        table[:, to] = average_precisions(chosen, labels, len(counts)).cpu()
    return table, constant


def _refuse(responses: TextResponses, first: int, block: Tensor, own: Bool[Tensor, " unit"]) -> None:
    text, column = ((~torch.isfinite(block) & own).nonzero()[0]).tolist()
    language = responses.languages[int(responses.labels()[text])]
    spans = {site: responses.span(site) for site in responses.sites}
    site = next(site for site, (start, stop) in spans.items() if start <= first + column < stop)
    layer = (first + column - spans[site][0]) // responses.sites[site][1]
    what = "NaN" if block[text, column].isnan() else "infinite"
    raise DataError(
        f"a response of '{language}' at {site}, layer {layer}, is {what}, so its texts cannot be ranked; record "
        "again with responses_dtype='float32', or leave that site out."
    )


def _taken(scores: Float64[Tensor, " unit"], k: int, which: str) -> tuple[Int64[Tensor, " taken"], list[str]]:
    """Return the positions of the units to take, and their kinds; equal scores stay in order of position."""
    if which == "bottom":
        return scores.argsort(stable=True)[:k], ["bottom"] * k
    falling = scores.argsort(descending=True, stable=True)
    if which == "medium":
        start = (len(scores) - k) // 2
        return falling[start : start + k], ["medium"] * k
    if which == "top":
        return falling[:k], ["top"] * k
    half = k // 2
    # With enough equal scores the first units would be top and bottom at once; they are top.
    rest = torch.ones_like(scores, dtype=torch.bool)
    rest[falling[:half]] = False
    rising = scores.argsort(stable=True)
    return torch.cat([falling[:half], rising[rest[rising]][:half]]), ["top"] * half + ["bottom"] * half


def neuron_set(
    responses: TextResponses,
    found: dict[str, Tensor],
    scores: dict[str, Tensor],
    *,
    sites: tuple[str, ...],
    method: dict[str, object],
    kinds: dict[str, list[str]] | None = None,
) -> NeuronSet:
    """Return the set of some units at some recorded sites.

    Args:
        responses: What they were found in.
        found: Language to unit numbers, counted over the sites chosen, best first.
        scores: Language to the scores of all units at these sites.
        sites: The sites chosen, in the order recorded.
        method: Name and settings of the method.
        kinds: Language to the kinds of its units.
    """
    width = responses.sites[sites[0]][1] if len(sites) == 1 else responses.provenance.d_mlp
    return NeuronSet.from_units(
        found,
        sites={site: responses.sites[site] for site in sites},
        scores={code: scores[code][numbers] for code, numbers in found.items()},
        kinds=kinds,
        provenance=responses.provenance.replace(site="+".join(sites), d_mlp=width),
        method=method,
    )
