"""Specialisation: the fewest units that carry a share of a language's activation, for overlap analyses."""

import itertools

import pandas as pd
import torch
from jaxtyping import Bool, Float64
from torch import Tensor

from lens_neurons.activation_stats import ActivationStats
from lens_neurons.errors import DataError, SettingError
from lens_neurons.methods.registry import method
from lens_neurons.neurons import NeuronSet

_BIBTEX = """@inproceedings{tan2024neuron,
  title = {Neuron Specialization: Leveraging Intrinsic Task Modularity for Multilingual Machine Translation},
  author = {Tan, Shaomu and Wu, Di and Monz, Christof},
  booktitle = {Proceedings of the 2024 Conference on Empirical Methods in Natural Language Processing},
  year = {2024}
}"""

_MEASURES = (None, "positive", "counts")


def fewest_covering(mass: Float64[Tensor, "group neuron"], share: float) -> Bool[Tensor, "group neuron"]:
    """Return the fewest neurons of every group whose mass adds up to a share of the group's; ties by index.

    A group without mass has none, and a neuron without mass is never among them.

    Args:
        mass: 0 or more.
        share: Above 0 and at most 1.
    """
    ordered, order = mass.sort(dim=1, descending=True, stable=True)
    reached = ordered.cumsum(dim=1)
    # Rounding of share * total must not ask for one neuron more.
    wanted = share * reached[:, -1:] * (1 - 1e-12)
    taken = reached - ordered < wanted
    return torch.zeros_like(taken).scatter_(1, order, taken)


@method(
    "specialisation",
    reference="Tan et al. 2024, EMNLP; Trinley et al. 2025, arXiv 2507.20279",
    bibtex=_BIBTEX,
    needs=("counts",),
)
def specialisation(
    stats: ActivationStats, share: float = 0.95, measure: str | None = None, over: str = "layer"
) -> NeuronSet:
    """Return, for every language, the fewest neurons that carry a share of its activation.

    In every layer the neurons are taken in descending order of their activation in the language until `share` of the
    layer's is reached (Tan et al. 2024, there of tasks). What a language does not share with another shows in
    `overlap_by_layer`, as Trinley et al. 2025 compare languages and code-mixed text; the sets alone are not
    language-specific, and a neuron that is always active is in all of them. No language is compared with another, so
    a recording of one is enough.

    Args:
        stats: A recording.
        share: Share of the activation, above 0 and at most 1.
        measure: "positive": the sum of activations above 0; "counts": the number of tokens with one, which is all that
            counts alone can tell. Default: "positive" where sums were recorded, else "counts".
        over: "layer": every layer by itself; "model": all layers together.

    Returns:
        Languages to units, largest first; the score is the negated share of the layer's (or model's) activation.
        `method["measure"]` is the measure that was used.

    Raises:
        SettingError: A share outside (0, 1], or another measure or `over`.
        DataError: Counts alone with `measure="positive"`, or sums that are NaN.
    """
    if not 0 < share <= 1:
        raise SettingError(f"share={share} must be above 0 and at most 1.")
    if measure not in _MEASURES or over not in ("layer", "model"):
        raise SettingError(
            f"measure={measure!r} and over={over!r} are not both known; use measure='positive' or 'counts', and "
            "over='layer' or 'model'."
        )
    if measure is None:
        measure = "counts" if stats.sum_positive is None else "positive"
    mass = stats.positive.double() if measure == "counts" else stats.sum_positive
    if mass is None:
        raise DataError(
            "these statistics are counts alone; use measure='counts', leave it out, or record them with lens_neurons."
        )
    if not bool(torch.isfinite(mass).all()):
        raise DataError("sums of activations are NaN or infinite; record again, in float32.")
    shape = (stats.n_layers, stats.n_neurons)
    masks: dict[str, Tensor] = {}
    scores: dict[str, Tensor] = {}
    for code, values in zip(stats.languages, mass, strict=True):
        groups = values if over == "layer" else values.reshape(1, -1)
        masks[code] = fewest_covering(groups, share).view(shape)
        scores[code] = -(groups / groups.sum(dim=1, keepdim=True).clamp(min=1e-300)).view(shape)
    return NeuronSet.from_masks(
        masks,
        site=stats.site,
        scores=scores,
        provenance=stats.provenance,
        method={"name": "specialisation", "share": share, "measure": measure, "over": over},
    )


def overlap_by_layer(neurons: NeuronSet, metric: str = "jaccard") -> pd.DataFrame:
    """Return how much every two languages share in every layer: site, layer, language, other, metric, value.

    Source: Trinley et al. 2025 (arXiv 2507.20279) compare languages layer by layer by intersection over union.

    Args:
        neurons: A set of any method.
        metric: "jaccard": shared / union (the papers' IoU); "dice": 2 shared / (sum of sizes); "count" of shared
            units. Two languages without units in a layer give 0, as in `NeuronSet.overlap`.

    Raises:
        SettingError: Another metric.
        DataError: Fewer than two languages.
    """
    if metric not in ("jaccard", "dice", "count"):
        raise SettingError(f"metric={metric!r} is unknown; use 'jaccard', 'count' or 'dice'.")
    if len(neurons.languages) < 2:
        raise DataError("overlap_by_layer compares languages, so the set needs at least two; identify more.")
    parts: list[pd.DataFrame] = []
    for site, (layers, _) in neurons.sites.items():
        own = neurons.at(site)
        masks = {code: own.mask(code) for code in own.languages}
        for one, other in itertools.combinations(own.languages, 2):
            shared = (masks[one] & masks[other]).sum(dim=1).double()
            sizes = masks[one].sum(dim=1) + masks[other].sum(dim=1)
            if metric != "count":
                scale = 2.0 if metric == "dice" else 1.0
                shared = (scale * shared / (sizes if metric == "dice" else sizes - shared)).nan_to_num(0.0)
            columns = {"site": site, "layer": range(layers), "language": one, "other": other, "metric": metric}
            parts.append(pd.DataFrame({**columns, "value": shared.numpy()}))
    return pd.concat(parts, ignore_index=True)
