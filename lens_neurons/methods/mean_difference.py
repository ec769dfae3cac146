"""Mean difference: units whose activation in one language stands out from all others. Ours; no paper."""

import torch
from jaxtyping import Float64
from torch import Tensor

from lens_neurons.activation_stats import ActivationStats
from lens_neurons.errors import DataError, SettingError
from lens_neurons.methods.lape import lowest
from lens_neurons.methods.registry import method
from lens_neurons.neurons import NeuronSet


def standardised_differences(stats: ActivationStats) -> Float64[Tensor, "language layer neuron"]:
    """Return Cohen's d of every language against the others, each language weighing the same.

    With m_j and v_j the mean and variance of the activation over the tokens of language j, and the others' text taken
    as one mixture of equal parts with mean M_k and variance V_k (within and between languages):

        d_k = (m_k - M_k) / sqrt((v_k + V_k) / 2)

    It is 0 where a unit is constant.

    Raises:
        DataError: Fewer than two languages, or counts alone.
    """
    n = len(stats.languages)
    if n < 2:
        raise DataError("mean_difference compares languages, so the recording needs at least two; record more.")
    mean, square = stats.mean(), stats.std().square() + stats.mean().square()
    others_mean = (mean.sum(dim=0) - mean) / (n - 1)
    others_variance = (square.sum(dim=0) - square) / (n - 1) - others_mean.square()
    pooled = ((stats.std().square() + others_variance.clamp(min=0)) / 2).sqrt()
    # Rounding leaves a constant unit a deviation of about 1e-8 of its value.
    constant = pooled <= 1e-6 * square.amax(dim=0).sqrt()
    return torch.where(constant, 0.0, (mean - others_mean) / pooled)


@method("mean_difference", reference="lens_neurons", needs=("sums",))
def mean_difference(stats: ActivationStats, units_per_language: int = 100) -> NeuronSet:
    """Return, for every language, the units whose mean activation exceeds that of the other languages the most.

    The measure is `standardised_differences`; units with a difference of 0 or below are never taken. Ties by (layer,
    neuron).

    Args:
        stats: A recording with sums.
        units_per_language: Units for each language; fewer where fewer have a positive difference.

    Returns:
        Languages to units, largest difference first; scores are the negated differences, in standard deviations.

    Raises:
        SettingError: A number below 1.
        DataError: Fewer than two languages, or counts alone.
    """
    if units_per_language < 1:
        raise SettingError(f"units_per_language={units_per_language} must be at least 1.")
    scores = -standardised_differences(stats)
    masks: dict[str, Tensor] = {}
    for k, code in enumerate(stats.languages):
        masks[code] = torch.zeros_like(scores[k], dtype=torch.bool)
        masks[code].view(-1)[lowest(torch.where(scores[k] < 0, scores[k], torch.inf), units_per_language)] = True
    return NeuronSet.from_masks(
        masks,
        site=stats.site,
        scores=dict(zip(stats.languages, scores, strict=True)),
        provenance=stats.provenance,
        method={"name": "mean_difference", "units_per_language": units_per_language},
    )
