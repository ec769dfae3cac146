"""Recorded data drawn anew: shards or texts with replacement, or counts from a binomial distribution."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lens_neurons.activation_stats import ActivationStats
from lens_neurons.collecting import PartialSums
from lens_neurons.errors import DataError, SettingError
from lens_neurons.recorded import Recording
from lens_neurons.responses import TextResponses
from lens_neurons.split_sources import FROM_SHARDS, Source, need_of, source_of
from lens_neurons.storage import Provenance, derive_seed

# What is drawn of statistics in memory; of everything else it is what `Source.drawn` says.
TOKENS = "tokens"

# A bootstrap over fewer shards or texts than this is refused.
_LEAST = 5

Data = ActivationStats | Recording | TextResponses | str | os.PathLike[str] | Mapping[str, Sequence[PartialSums]]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Drawable:
    """What was recorded of one model, and a way to draw such data anew.

    Attributes:
        whole: What the method is run on.
        resample: Languages and a seed to data of the same size.
        drawn: What is drawn, in words.
        sizes: Language to the number of these.
        provenance: Of the data.
    """

    whole: Any
    resample: Callable[[Sequence[str], int], Any]
    drawn: str
    sizes: Mapping[str, int]
    provenance: Provenance


def drawable(data: Data, method: str, design_effect: float, *, intervals: bool) -> Drawable:
    """Return recorded data with a way to draw it anew, for a method.

    Args:
        data: Statistics in memory (their counts are drawn), a recording or rows of texts (texts are drawn), the folder
            of a recording or the sums of its shards (shards are drawn).
        method: Name of the method.
        design_effect: How many times the variance of a count is that of independent tokens.
        intervals: Whether it is to be drawn at all, so that there must be enough to draw from.

    Raises:
        SettingError: An unknown method, or one that needs what cannot be drawn anew.
        DataError: The method needs something else, or there are too few shards or texts.
    """
    needs = need_of(method)
    if isinstance(data, Recording) and needs in FROM_SHARDS:
        data = data.part("stats", method)
    if isinstance(data, ActivationStats):
        if needs not in FROM_SHARDS:
            raise DataError(f"method '{method}' needs {needs}, not statistics; give the folder of a recording.")
        if intervals and needs != "counts":
            raise SettingError(
                f"method '{method}' needs {needs}, and of statistics in memory only counts can be drawn anew; give the "
                "folders of the recordings, or use n_resamples=0."
            )
        return _of_counts(data, design_effect)
    return _of_source(source_of(data, method), intervals=intervals)


def _of_source(source: Source, *, intervals: bool) -> Drawable:
    sizes = source.sizes
    few = ", ".join(f"{code}: {n}" for code, n in sizes.items() if n < _LEAST)
    if intervals and few:
        raise DataError(
            f"intervals need at least {_LEAST} {source.drawn} a language ({few}); record more text or with a smaller "
            "shard_tokens, or use n_resamples=0."
        )

    def resample(languages: Sequence[str], seed: int) -> Any:
        order: dict[str, Integers] = {}
        for code in languages:
            generator = np.random.default_rng(derive_seed(seed, code))
            order[code] = np.sort(generator.integers(0, sizes[code], sizes[code]))
        return source.half(order).grow({code: sizes[code] for code in languages})

    whole = source.half({code: np.arange(n) for code, n in sizes.items()}).grow(sizes)
    return Drawable(whole, resample, source.drawn, sizes, source.provenance)


def _of_counts(stats: ActivationStats, design_effect: float) -> Drawable:
    sizes = dict(zip(stats.languages, stats.tokens.tolist(), strict=True))

    def resample(languages: Sequence[str], seed: int) -> ActivationStats:
        tokens = {code: max(1, round(sizes[code] / design_effect)) for code in languages}
        positive: dict[str, Tensor] = {}
        for code in languages:
            generator = np.random.default_rng(derive_seed(seed, code))
            share = stats.positive[stats.index(code)].numpy() / sizes[code]
            positive[code] = torch.from_numpy(generator.binomial(tokens[code], share))
        return ActivationStats.from_counts(tokens, positive, site=stats.site, provenance=stats.provenance)

    return Drawable(stats, resample, TOKENS, sizes, stats.provenance)


def read_the_same(one: Drawable, other: Drawable) -> bool:
    """Return whether both models read the same texts in the same shards, so that both can be drawn together."""
    if one.drawn == TOKENS or one.drawn != other.drawn or dict(one.sizes) != dict(other.sizes):
        return False
    mine, theirs = one.provenance, other.provenance
    same = all(getattr(mine, name) == getattr(theirs, name) for name in ("corpus", "tokenizer", "policy"))
    return bool(mine.corpus) and same and mine.extra.get("recording") == theirs.extra.get("recording")
