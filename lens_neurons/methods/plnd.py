"""PLND: neurons that matter on every document of one language and of no other (Zhao et al. 2024, arXiv 2402.18815)."""

import math
import numbers
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from lens_neurons.errors import DataError, SettingError
from lens_neurons.methods.registry import method
from lens_neurons.neurons import NeuronSet
from lens_neurons.responses import TextResponses

_BIBTEX = """@inproceedings{zhao2024large,
  title = {How do Large Language Models Handle Multilingualism?},
  author = {Zhao, Yiran and Zhang, Wenxuan and Chen, Guizhen and Kawaguchi, Kenji and Bing, Lidong},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2024},
  eprint = {2402.18815},
  archivePrefix = {arXiv}
}"""

_NEURONS = frozenset({"post", "up", "gate_pre"})
# The defaults of both shares: given where they have no meaning, they are let pass.
_SHARES = {"ffn": 0.14, "attention": 0.25}
# Numbers sorted at once.
_AT_ONCE = 1 << 22


@method("plnd", reference="Zhao et al. 2024, NeurIPS, arXiv 2402.18815", bibtex=_BIBTEX, needs=("importances",))
def plnd(
    importances: TextResponses,
    rule: str = "top_k",
    eps: float | None = None,
    ffn: float = 0.14,
    attention: float = 0.25,
    min_share: float = 1.0,
    specific: bool = True,
) -> NeuronSet:
    """Return the units that are important on a language's documents, and not on those of any other language.

    1. On every document some units are selected: under `rule="threshold"` those with an importance of at least `eps`
       (the paper's definition; its value of eps is unpublished, and importances grow with a document's length); under
       `rule="top_k"` (as the released code does), for every layer and site, the highest `round(share * width)`, ties
       by index. The shares are ours: those of the README of the released code, 2,000 of 14,336 neurons and 1,000 of
       4,096 attention dimensions. A unit with importance 0 is never selected.
    2. A unit is activated in a language where it is selected on at least `min_share` of its documents; the paper and
       its code want all of them.
    3. It is specific to a language if it is activated there and in no other.

    Units of "q" and "k" are dimensions of queries and keys as they enter the product, after any rotation, which the
    paper takes for the neurons of these projections.

    Units are ordered by how much higher they stand in their own language (ours): the score is the unit's mean rank on
    the language's documents, as a share of its layer and site (0 first, 1 last; equal importances share a rank), less
    its lowest in another language; ties by (site, layer, index).

    Args:
        importances: Importances of units on documents, as `record(..., collect=Collect(importances=...))` takes them;
            "released" ones are selected in the same way.
        rule: "top_k" or "threshold".
        eps: Lowest importance that is selected; for rule="threshold", which needs it.
        ffn: Share of a layer's neurons that a document selects, for rule="top_k"; 0 leaves neurons out.
        attention: Share of a layer's units at each attention site, likewise. To leave units out under "threshold",
            record without them, or take the sites wanted with `importances.only(...)`.
        min_share: Share of the documents on which a unit must be selected.
        specific: False: return all activated units, which may be of several languages, by mean rank alone.

    Returns:
        Languages to units; those without units are kept, empty.

    Raises:
        SettingError: An unknown rule, a share out of range, no eps for "threshold", or a setting of the other rule.
        DataError: Something else than importances, fewer than two languages or documents, or NaN.
    """
    shares = {"ffn": ffn, "attention": attention}
    _check(importances, rule, eps, shares, min_share)
    languages = importances.languages
    chosen: dict[str, list[Tensor]] = {code: [] for code in languages}
    scores: dict[str, list[Tensor]] = {code: [] for code in languages}
    first = 0
    for site, (layers, width) in importances.sites.items():
        share = _share(site, shares)
        k = 0 if share == 0 else max(1, round(share * width))
        for start in range(first, first + layers * width, width):
            if rule == "top_k" and k == 0:
                continue
            seen = [_tally(importances, code, site, (start, start + width), k, eps) for code in languages]
            activated = torch.stack([tally.count >= _needed(min_share, tally.documents) for tally in seen])
            ranks = torch.stack([tally.mean_rank for tally in seen])
            for i, code in enumerate(languages):
                others = torch.arange(len(languages)) != i
                mine, score = activated[i], ranks[i]
                if specific:
                    mine, score = mine & ~activated[others].any(dim=0), score - ranks[others].amin(dim=0)
                chosen[code].append(mine.nonzero()[:, 0] + start)
                scores[code].append(score[mine])
        first += layers * width
    units: dict[str, Int64[Tensor, " unit"]] = {}
    values: dict[str, Float64[Tensor, " unit"]] = {}
    for code in languages:
        # The sort is stable and flat numbers rise, so ties are broken by (site, layer, index).
        values[code], order = torch.cat(scores[code]).sort(stable=True)
        units[code] = torch.cat(chosen[code])[order]
    settings = {"rule": rule, **({"eps": eps} if rule == "threshold" else shares)}
    return NeuronSet.from_units(
        units,
        sites=importances.sites,
        scores=values,
        provenance=importances.provenance,
        method={
            "name": "plnd",
            "statistic": importances.statistic,
            **settings,
            "min_share": min_share,
            "specific": specific,
        },
        notes=_notes(importances),
    )


def _share(site: str, shares: dict[str, float]) -> float:
    return shares["ffn" if site in _NEURONS else "attention"]


@dataclass(frozen=True, eq=False)
class _Tally:
    """One language's selections in one layer of one site."""

    documents: int
    count: Int64[Tensor, " unit"]
    mean_rank: Float64[Tensor, " unit"]


def _tally(
    importances: TextResponses, language: str, site: str, span: tuple[int, int], k: int, eps: float | None
) -> _Tally:
    rows = importances.rows(language, *span)
    width = rows.shape[1]
    count = torch.zeros(width, dtype=torch.int64, device=rows.device)
    twice = torch.zeros_like(count)
    step = max(1, _AT_ONCE // width)
    for at in range(0, len(rows), step):
        part = rows[at : at + step]
        if not bool(torch.isfinite(part).all()):
            raise DataError(
                f"importances of '{language}' at site '{site}' hold NaN or infinite values; record them again, in "
                "float32."
            )
        ordered, order = part.sort(dim=1, descending=True, stable=True)
        selected: Bool[Tensor, "text unit"] = part > 0
        if eps is None:
            selected = selected & torch.zeros_like(selected).scatter_(1, order[:, :k], True)
        else:
            selected = selected & (part >= eps)
        count += selected.sum(dim=0)
        twice += _twice_ranks(part, ordered)
    return _Tally(len(rows), count.cpu(), twice.cpu().to(torch.float64) / (2 * len(rows) * width))


def _twice_ranks(values: Float[Tensor, "text unit"], ordered: Float[Tensor, "text unit"]) -> Int64[Tensor, " unit"]:
    """Return twice the sum of each unit's ranks over the rows, 0 for the highest; equal values share their mean."""
    rising = ordered.flip(1)
    lower = torch.searchsorted(rising, values)
    not_higher = torch.searchsorted(rising, values, right=True)
    return (2 * values.shape[1] - 1 - lower - not_higher).sum(dim=0)


def _needed(min_share: float, documents: int) -> int:
    """Return the smallest number of documents that is at least a share of them, whatever the product is rounded to."""
    return math.ceil(min_share * documents - 1e-9)


def _check(
    importances: TextResponses, rule: str, eps: float | None, shares: dict[str, float], min_share: float
) -> None:
    if rule not in ("top_k", "threshold"):
        raise SettingError(f"rule={rule!r} is unknown; use 'top_k' or 'threshold'.")
    if rule == "threshold" and eps is None:
        raise SettingError(
            "rule='threshold' needs eps=, the lowest importance that counts; it has no default, because the paper's "
            "value is unpublished."
        )
    if rule == "top_k" and eps is not None:
        raise SettingError(f"eps={eps} has no meaning under rule='top_k'; use rule='threshold' or leave it out.")
    if eps is not None and (not isinstance(eps, numbers.Real) or not 0 < eps < math.inf):
        raise SettingError(f"eps={eps!r} must be a number above 0.")
    for name, share in shares.items():
        if not 0 <= share <= 1:
            raise SettingError(f"{name}={share} must be from 0 to 1: a share of a layer's units.")
    for name, share in shares.items():
        if rule == "threshold" and share != _SHARES[name]:
            raise SettingError(
                f"{name}={share} has no meaning under rule='threshold'; use rule='top_k' or leave it out."
            )
    if rule == "top_k" and not any(_share(site, shares) for site in importances.sites):
        raise SettingError(
            f"ffn={shares['ffn']} and attention={shares['attention']} leave no unit to select at "
            f"{', '.join(importances.sites)}; give one of them a share above 0."
        )
    if not 0 < min_share <= 1:
        raise SettingError(f"min_share={min_share} must be above 0 and at most 1.")
    if not importances.statistic.startswith("plnd"):
        raise DataError(
            f"plnd needs importances, and these rows are of statistic '{importances.statistic}'; record with "
            "collect=Collect(importances='exact')."
        )
    if len(importances.languages) < 2:
        raise DataError("plnd compares languages, so the recording needs at least two; record more languages.")
    for code, count in importances.counts().items():
        if count < 2:
            raise DataError(
                f"'{code}' has {count} document{'s' * (count != 1)}, and plnd asks which units matter on all of them; "
                "record at least two."
            )


def _notes(importances: TextResponses) -> tuple[str, ...]:
    counts = importances.counts()
    fewest, most = min(counts, key=lambda code: counts[code]), max(counts, key=lambda code: counts[code])
    if counts[fewest] == counts[most]:
        return ()
    return (
        f"languages have {counts[fewest]} ({fewest}) to {counts[most]} ({most}) documents; more units are important on "
        "all of few documents than on all of many",
    )
