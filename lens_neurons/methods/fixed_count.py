"""Equally many units for every group: the selection of the code-language study (Kargaran et al. 2025)."""

import dataclasses

import torch

from lens_neurons.activation_stats import ActivationStats
from lens_neurons.errors import DataError, SettingError
from lens_neurons.methods.lape import activation_entropy, lowest, nth_smallest
from lens_neurons.methods.registry import method
from lens_neurons.neurons import NeuronSet

_BIBTEX = """@misc{kargaran2025programming,
  title = {How Programming Concepts and Neurons Are Shared in Code Language Models},
  author = {Kargaran, Amir Hossein and Liu, Yihong and Yvon, Fran{\\c{c}}ois and Sch{\\"u}tze, Hinrich},
  year = {2025},
  eprint = {2506.01074},
  archivePrefix = {arXiv}
}"""


@method("fixed_count", reference="Kargaran et al. 2025, arXiv 2506.01074", bibtex=_BIBTEX, needs=("counts",))
def fixed_count(stats: ActivationStats, units_per_language: int = 400, activation_bar_ratio: float = 0.95) -> NeuronSet:
    """Return, for every language, the same number of units: the lowest in LAPE among those that it activates.

    With p the activation probability, the candidates of language k are the units with p_k above the
    `activation_bar_ratio` quantile of all p (which leaves dead units out); of them the `units_per_language` with the
    lowest activation probability entropy are taken, ties by (layer, neuron). A unit may belong to several languages.

    Args:
        stats: A recording; only counts are used.
        units_per_language: Number of units for each language; fewer where fewer are candidates, which `notes` says.
        activation_bar_ratio: Quantile of p that a candidate must exceed.

    Raises:
        SettingError: A number below 1, or a ratio outside (0, 1].
        DataError: Fewer than two languages.
    """
    if units_per_language < 1:
        raise SettingError(f"units_per_language={units_per_language} must be at least 1.")
    if not 0 < activation_bar_ratio <= 1:
        raise SettingError(f"activation_bar_ratio={activation_bar_ratio} must be above 0 and at most 1.")
    if len(stats.languages) < 2:
        raise DataError("fixed_count compares languages, so the recording needs at least two; record more languages.")
    probability = stats.probability()
    entropy = activation_entropy(probability)
    bar = nth_smallest(probability, activation_bar_ratio)
    masks: dict[str, torch.Tensor] = {}
    short = 0
    for k, code in enumerate(stats.languages):
        mask = torch.zeros_like(entropy, dtype=torch.bool)
        mask.view(-1)[lowest(torch.where(probability[k] > bar, entropy, torch.inf), units_per_language)] = True
        masks[code] = mask
        short += int(mask.sum()) < units_per_language
    settings = {"units_per_language": units_per_language, "activation_bar_ratio": activation_bar_ratio}
    chosen = NeuronSet.from_masks(
        masks,
        site=stats.site,
        scores=dict.fromkeys(masks, entropy),
        provenance=stats.provenance,
        method={"name": "fixed_count", **settings},
    )
    if not short:
        return chosen
    note = (
        f"{short} of {len(masks)} languages have fewer than {units_per_language} units above the activation bar, so "
        "there the bar alone selects"
    )
    return dataclasses.replace(chosen, notes=(note,))
