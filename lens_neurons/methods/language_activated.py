"""Language-activated units: the baseline of the amplification study (Rahmanisa et al. 2025, arXiv 2507.22581)."""

import torch
from torch import Tensor

from lens_neurons.errors import DataError, SettingError
from lens_neurons.methods.citations import RAHMANISA_2025
from lens_neurons.methods.registry import method
from lens_neurons.neurons import NeuronSet
from lens_neurons.responses import TextResponses

# Responses read at once.
_BLOCK = 1 << 24


@method(
    "language_activated",
    reference="Rahmanisa et al. 2025, arXiv 2507.22581",
    bibtex=RAHMANISA_2025,
    needs=("responses",),
    sites=("gate_act",),
)
def language_activated(
    responses: TextResponses, texts: int = 100, site: str = "gate_act", exclusive: bool = False
) -> NeuronSet:
    """Return, for every language, the units whose mean over a text is above 0 on every one of its first texts.

    Source: the amplification study, section on the baseline; raw_act_neurons.py of its code takes 100 sentences. As
    there, a unit may belong to any number of languages, so that units which are always on belong to all of them. No
    language is compared with another, so a recording of one is enough.

    Args:
        responses: A recording with text responses at `site`.
        texts: How many texts of each language, by their position in the corpus. More texts are a stricter rule, so
            every language must have as many.
        site: Where the units live. At "gate_pre" the rule is another one: the mean of act(gate) is above 0 more often.
        exclusive: Leave out the units that belong to several languages; not in the paper.

    Returns:
        Languages to units, ordered by the negated smallest response over the texts; languages without units are kept,
        empty.

    Raises:
        SettingError: A number below 1.
        DataError: The site was not recorded, a language has too few texts, a response is NaN or infinite, or the rows
            are no means.
    """
    if texts < 1:
        raise SettingError(f"texts={texts} must be at least 1.")
    if responses.statistic != "mean":
        raise DataError(f"language_activated needs means over texts, and these are '{responses.statistic}'.")
    if site not in responses.sites:
        raise DataError(
            f"responses at '{site}' were not recorded; there are those at {', '.join(responses.sites)}: record with "
            f"Collect(responses=('{site}',)), or name another site."
        )
    short = {code: n for code, n in responses.counts().items() if n < texts}
    if short:
        counts = ", ".join(f"'{code}' {n}" for code, n in short.items())
        raise DataError(f"texts={texts} are needed of every language, and there are of {counts}; use fewer texts.")
    shape = responses.sites[site]
    smallest = {code: _smallest(responses, code, texts, site).view(shape) for code in responses.languages}
    chosen = NeuronSet.from_masks(
        {code: values > 0 for code, values in smallest.items()},
        site=site,
        scores={code: -values for code, values in smallest.items()},
        provenance=responses.provenance.replace(site=site, n_layers=shape[0], d_mlp=shape[1]),
        method={"name": "language_activated", "texts": texts, "site": site, "exclusive": exclusive},
    )
    return chosen.exclusive() if exclusive else chosen


def _smallest(responses: TextResponses, language: str, texts: int, site: str) -> Tensor:
    """Return the smallest response of every unit of a site over a language's first texts [unit], in float64."""
    first, last = responses.span(site)
    rows = torch.argsort(responses.positions(language), stable=True)[:texts]
    found: list[Tensor] = []
    step = max(1, _BLOCK // responses.counts()[language])
    for start in range(first, last, step):
        values = responses.rows(language, start, min(start + step, last))[rows].double()
        if not bool(torch.isfinite(values).all()):
            raise DataError(f"responses of '{language}' at '{site}' are NaN or infinite; record again, in float32.")
        found.append(values.amin(dim=0))
    return torch.cat(found)
