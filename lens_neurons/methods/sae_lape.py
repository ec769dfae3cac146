"""SAE-LAPE: language-specific latents of sparse autoencoders (Andrylie et al. 2025, arXiv 2507.11230)."""

import torch
from jaxtyping import Bool, Float64
from torch import Tensor

from lens_neurons.errors import DataError, SettingError
from lens_neurons.features import FeatureStats
from lens_neurons.methods.lape import activation_entropy
from lens_neurons.methods.registry import method
from lens_neurons.neurons import NeuronSet

_BIBTEX = """@misc{andrylie2025sparse,
  title = {Sparse Autoencoders Can Capture Language-Specific Concepts Across Diverse Languages},
  author = {Andrylie, Lyzander Marciano and Rahmanisa, Inaya and Ihsani, Mahardika Krisna and
            Wicaksono, Alfan Farizki and Wibowo, Haryo Akbarianto and Aji, Alham Fikri},
  year = {2025},
  eprint = {2507.11230},
  archivePrefix = {arXiv}
}"""

# A rate times a count is exact on paper and not in floating point: 0.07 * 100 is more than 7.
_SLACK = 1e-9

_RANKS = ("entropy", "probability")


def passing_latents(stats: FeatureStats, example_rate: float, token_rate: float) -> Bool[Tensor, "place latent"]:
    """Return the latents active in enough texts of some language and on enough tokens of some, maybe another, one."""
    texts = stats.active_texts >= (example_rate * stats.texts.double() - _SLACK)[:, None, None]
    tokens = stats.active_tokens > (token_rate * stats.tokens.double() + _SLACK)[:, None, None]
    return texts.any(dim=0) & tokens.any(dim=0)


def owned_latents(
    probability: Float64[Tensor, "language place latent"], ratio: float
) -> Bool[Tensor, "language place latent"]:
    """Return where p_k is at least `ratio` of the largest p over the languages, and above 0."""
    return (probability >= ratio * probability.amax(dim=0) - _SLACK * probability) & (probability > 0)


@method("sae_lape", reference="Andrylie et al. 2025, arXiv 2507.11230", bibtex=_BIBTEX, needs=("features",))
def sae_lape(
    stats: FeatureStats,
    example_rate: float = 0.98,
    token_rate: float = 0.10,
    ratio: float = 0.5,
    shared: int = 1,
    per_layer: int | None = None,
    rank: str = "entropy",
) -> NeuronSet:
    """Return the latents of sparse autoencoders that are active mostly in one language, or in some few.

    With p the share of a language's tokens on which a latent is above 0:

    1. A latent is kept if it is active in at least `example_rate` of the texts of some language, and on more than
       `token_rate` of the tokens of some language, which need not be the same one.
    2. It belongs to every language k with p_k >= ratio * max p.
    3. Of these are returned the latents with exactly `shared` languages (1: language-specific), ordered by the entropy
       of p over the languages (as in LAPE); ties by (layer, latent).

    Args:
        stats: Features that were recorded.
        example_rate: Share of a language's texts.
        token_rate: Share of a language's tokens.
        ratio: How near to the largest p a language must be; 0.5 in the paper's scripts.
        shared: Number of languages of a latent.
        per_layer: Only the first so many of each language in each layer; default: all.
        rank: "entropy", lowest first, or "probability": the language's own p, highest first (scores are then -p).

    Returns:
        Languages to units, best first; languages without units are kept, empty. Scores are entropies in nats.

    Raises:
        SettingError: A rate outside [0, 1], a number of languages or latents that there are not, or another rank.
        DataError: Fewer than two languages, or packed texts, of which it is not known in how many a latent is active.
    """
    for name, rate in {"example_rate": example_rate, "token_rate": token_rate, "ratio": ratio}.items():
        if not 0 <= rate <= 1 or (name == "ratio" and rate == 0):
            raise SettingError(f"{name}={rate} must be {'above 0' if name == 'ratio' else 'at least 0'} and at most 1.")
    if rank not in _RANKS:
        raise SettingError(f"rank={rank!r} is unknown; use one of {', '.join(_RANKS)}.")
    if len(stats.languages) < 2:
        raise DataError("sae_lape compares languages, so the recording needs at least two; record more languages.")
    if not 1 <= shared <= len(stats.languages):
        raise SettingError(f"shared={shared} must be 1 to {len(stats.languages)}, the number of languages.")
    if per_layer is not None and (type(per_layer) is not int or not 1 <= per_layer <= stats.n_latents):
        raise SettingError(f"per_layer={per_layer!r} must be 1 to {stats.n_latents}, the latents of a layer, or None.")
    if stats.provenance.policy.get("pack"):
        raise DataError("the texts were packed, so active texts are not known; record features with pack=False.")
    probability = stats.probability()
    entropy = activation_entropy(probability)
    owned = owned_latents(probability, ratio)
    chosen = owned & passing_latents(stats, example_rate, token_rate) & (owned.sum(dim=0) == shared)
    numbers = stats.flat()
    units: dict[str, Tensor] = {}
    scores: dict[str, Tensor] = {}
    for k, code in enumerate(stats.languages):
        score = entropy if rank == "entropy" else -probability[k]
        place, latent = chosen[k].nonzero(as_tuple=True)
        order = torch.argsort(score[place, latent], stable=True)
        if per_layer is not None:
            order = _first_of_each(order, place[order], per_layer)
        units[code] = numbers[place, latent][order]
        scores[code] = score[place, latent][order]
    settings = {"example_rate": example_rate, "token_rate": token_rate, "ratio": ratio, "shared": shared}
    return NeuronSet.from_units(
        units,
        sites=stats.sites,
        scores=scores,
        provenance=stats.provenance,
        method={"name": "sae_lape", **settings, "per_layer": per_layer, "rank": rank},
    )


def _first_of_each(order: Tensor, place: Tensor, n: int) -> Tensor:
    """Return those of `order`, whose layers are given, that are among the first n of their layer."""
    kept = torch.zeros(len(order), dtype=torch.bool)
    for layer in place.unique():
        kept[(place == layer).nonzero()[:n, 0]] = True
    return order[kept]
