"""All units whose average precision passes a bar: the variant in the amplification study (Rahmanisa et al. 2025)."""

from lens_neurons.errors import SettingError
from lens_neurons.methods.average_precision import chosen_sites, neuron_set, scan
from lens_neurons.methods.citations import RAHMANISA_2025
from lens_neurons.methods.registry import method
from lens_neurons.neurons import NeuronSet
from lens_neurons.responses import TextResponses


@method(
    "average_precision_threshold",
    reference="Rahmanisa et al. 2025, arXiv 2507.22581 (code)",
    bibtex=RAHMANISA_2025,
    needs=("responses",),
    sites=("gate_act",),
)
def average_precision_threshold(
    responses: TextResponses, threshold: float = 0.95, exclusive: bool = True, units: str = "gate_act"
) -> NeuronSet:
    """Return, for every language, all units whose average precision is above a threshold.

    The study's code tries 0.99, 0.95, 0.90 and 0.3 on the mean of act(gate) over the tokens of 100 sentences a
    language, and drops units that pass for several languages. Its other variant, the units with
    the highest average precision, as many as LAPE finds for its largest language, is
    `method="average_precision", units="gate_act", which="top", k=...`. Constant units are never taken.

    Args:
        responses: A recording of at least two languages.
        threshold: Average precision that a unit must exceed.
        exclusive: Drop the units that pass for more than one language.
        units: One site, or "linear", "mlp" or "all" sites recorded, as for `average_precision`.

    Returns:
        Languages to units, highest average precision, which is the score, first; ties by (site, layer, index). A
        language without such units is kept, empty.

    Raises:
        SettingError: A threshold outside [0, 1), or sites that were not recorded.
        DataError: Fewer than two languages, a language without texts, or a response that is NaN or infinite.
    """
    if not 0 <= threshold < 1:
        raise SettingError(f"threshold={threshold} must be at least 0 and below 1.")
    sites = chosen_sites(responses, units)
    table, constant = scan(responses, sites)
    passes = (table > threshold) & ~constant
    if exclusive:
        passes &= passes.sum(dim=0) == 1
    scores = dict(zip(responses.languages, table, strict=True))
    found = {}
    for code, own in zip(responses.languages, passes, strict=True):
        numbers = own.nonzero()[:, 0]
        found[code] = numbers[scores[code][numbers].argsort(descending=True, stable=True)]
    settings = {"threshold": threshold, "exclusive": exclusive, "units": units}
    return neuron_set(responses, found, scores, sites=sites, method={"name": "average_precision_threshold", **settings})
