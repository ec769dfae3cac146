"""LAPE: language activation probability entropy (Tang et al. 2024, arXiv 2402.16438)."""

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from lens_neurons.activation_stats import ActivationStats
from lens_neurons.errors import DataError, SettingError
from lens_neurons.methods.registry import method
from lens_neurons.neurons import NeuronSet

_BIBTEX = """@inproceedings{tang2024language,
  title = {Language-Specific Neurons: The Key to Multilingual Capabilities in Large Language Models},
  author = {Tang, Tianyi and Luo, Wenyang and Huang, Haoyang and Zhang, Dongdong and Wang, Xiaolei and
            Zhao, Xin and Wei, Furu and Wen, Ji-Rong},
  booktitle = {Proceedings of the 62nd Annual Meeting of the Association for Computational Linguistics},
  year = {2024},
  eprint = {2402.16438},
  archivePrefix = {arXiv}
}"""


_DEFAULTS = {"top_rate": 0.01, "filter_rate": 0.95, "activation_bar_ratio": 0.95}

# What studies set. Language arithmetic (Gurgurov et al. 2025, arXiv 2507.22608) takes 1 to 5% of all neurons; the code
# study (Kargaran et al. 2025, arXiv 2506.01074) keeps LAPE's own rates over programming languages. "demo" was chosen
# for the packaged model, which is too small for 1%; its card says how.
PRESETS: dict[str, dict[str, float]] = {
    "original": {},
    **{f"language_arithmetic_{n}": {"top_rate": n / 100} for n in range(1, 6)},
    "code": {},
    "demo": {"top_rate": 0.14, "activation_bar_ratio": 0.9},
}


def activation_entropy(
    probability: Float64[Tensor, "language layer neuron"],
) -> Float64[Tensor, "layer neuron"]:
    """Return LAPE: -sum_k p'_k ln p'_k with p' = p / sum_k p, in [0, ln K]; 0 for a unit that never fires."""
    total = probability.sum(dim=0)
    share = torch.where(total > 0, probability / total, 0.0)
    return torch.special.entr(share).sum(dim=0)


def nth_smallest(values: Float64[Tensor, "language layer neuron"], rate: float) -> float:
    """Return the `round(rate * size)`-th smallest value, counted from 1 (Python's round, as the reference)."""
    ordered = values.flatten().sort().values
    position = min(max(round(rate * ordered.shape[0]), 1), ordered.shape[0])
    return float(ordered[position - 1])


@method("lape", reference="Tang et al. 2024, arXiv 2402.16438", bibtex=_BIBTEX, needs=("counts",))
def lape(
    stats: ActivationStats,
    top_rate: float = 0.01,
    filter_rate: float = 0.95,
    activation_bar_ratio: float = 0.95,
    preset: str | None = None,
) -> NeuronSet:
    """Return the units whose activation is most concentrated on few languages.

    With p the activation probability of every language and unit:

    1. A unit passes the filter if p > threshold for some language, the threshold being the `filter_rate` quantile
       (`round(rate * size)`-th smallest value) of all p.
    2. Of the units that pass, the `round(top_rate * all units)` with the lowest entropy are taken; ties by
       (layer, neuron). Where fewer pass, fewer are taken: units that pass no filter are never chosen.
    3. A taken unit belongs to every language whose p exceeds the `activation_bar_ratio` quantile.

    Args:
        stats: A recording; only counts are used.
        top_rate: Share of all units that is taken.
        filter_rate: Quantile of p that some language must exceed.
        activation_bar_ratio: Quantile of p that a language must exceed to be assigned the unit.
        preset: The rates of a study, one of `PRESETS`: "original" (the defaults), "language_arithmetic_1" to "_5",
            "code", or "demo".

    Returns:
        Languages to units, ordered by entropy (nats); languages without units are kept, empty.

    Raises:
        SettingError: A rate outside (0, 1] or too small for one unit; an unknown preset, or one that sets a rate to
            another value than given.
        DataError: Fewer than two languages.
    """
    rates = {"top_rate": top_rate, "filter_rate": filter_rate, "activation_bar_ratio": activation_bar_ratio}
    if preset is not None:
        rates = _of_preset(preset, rates)
    for name, rate in rates.items():
        if not 0 < rate <= 1:
            raise SettingError(f"{name}={rate} must be above 0 and at most 1.")
    if len(stats.languages) < 2:
        raise DataError("lape compares languages, so the recording needs at least two; record more languages.")
    probability = stats.probability()
    entropy = activation_entropy(probability)
    n_chosen = share_of(entropy.numel(), rates["top_rate"])
    passes = (probability > nth_smallest(probability, rates["filter_rate"])).any(dim=0)
    chosen = lowest(torch.where(passes, entropy, torch.inf), n_chosen)
    taken = torch.zeros_like(passes)
    taken.view(-1)[chosen] = True
    bar = nth_smallest(probability, rates["activation_bar_ratio"])
    masks = {code: taken & (probability[k] > bar) for k, code in enumerate(stats.languages)}
    return NeuronSet.from_masks(
        masks,
        site=stats.site,
        scores=dict.fromkeys(masks, entropy),
        provenance=stats.provenance,
        method={"name": "lape", **rates},
    )


def _of_preset(preset: str, given: dict[str, float]) -> dict[str, float]:
    if preset not in PRESETS:
        raise SettingError(f"preset={preset!r} is unknown; use one of {', '.join(PRESETS)}.")
    wanted = {**_DEFAULTS, **PRESETS[preset]}
    for name, rate in given.items():
        if rate not in (_DEFAULTS[name], wanted[name]):
            raise SettingError(f"preset={preset!r} sets {name}={wanted[name]}, not {rate}; leave one of them out.")
    return wanted


def share_of(n_units: int, top_rate: float) -> int:
    """Return `round(top_rate * n_units)`, the number of units that is taken.

    Raises:
        SettingError: It is 0.
    """
    if n := round(top_rate * n_units):
        return n
    raise SettingError(f"top_rate={top_rate} of {n_units} units is none; use a larger share.")


def lowest(scores: Float64[Tensor, "layer neuron"], n: int) -> Int64[Tensor, " unit"]:
    """Return the flat indices of the n lowest finite scores, ties by (layer, neuron)."""
    flat = scores.flatten()
    order = torch.argsort(flat, stable=True)[:n]
    return order[torch.isfinite(flat[order])]
