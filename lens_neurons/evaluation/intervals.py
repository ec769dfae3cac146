"""Bootstrap intervals: items are resampled with replacement, vectorised, from a seeded generator of their own.

A resample of n items is held as counts (how often each item was drawn), so a statistic that is a ratio of sums over
items is two matrix products for all resamples at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lens_neurons.errors import DataError, SettingError
from lens_neurons.storage import derive_seed

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]

RESAMPLES = 2000
CONFIDENCE = 0.95

# Resamples are made in pieces of at most this many counts (32 MB).
_COUNTS_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Interval:
    """A mean and its percentile bootstrap interval.

    Attributes:
        mean: The statistic on the items themselves.
        low: Lower end.
        high: Upper end.
        n: Number of items.
    """

    mean: float
    low: float
    high: float
    n: int


def resample_counts(n_items: int, n_resamples: int, seed: int, *names: str | int) -> Counts:
    """Return how often each item is drawn in each resample: counts [resample, item], rows summing to n_items.

    Args:
        n_items: Number of items.
        n_resamples: Number of resamples.
        seed: Seed.
        names: What is resampled; another name gives independent draws from the same seed.

    Raises:
        SettingError: Fewer than one resample.
        DataError: No item.
    """
    if n_resamples < 1:
        raise SettingError(f"n_resamples={n_resamples} is too few; use at least 1, better 1000 and more.")
    if n_items < 1:
        raise DataError("there is no item to resample; score at least one.")
    generator = np.random.default_rng(derive_seed(seed, "bootstrap", *names))
    pick = generator.integers(0, n_items, size=(n_resamples, n_items))
    offsets = np.arange(n_resamples, dtype=np.int64)[:, None] * n_items
    return np.bincount((pick + offsets).ravel(), minlength=n_resamples * n_items).reshape(n_resamples, n_items)


def percentiles(statistics: Floats, confidence: int | float = CONFIDENCE) -> tuple[float, float]:
    """Return the ends of the percentile interval of a statistic's resampled values; NaN values are left out.

    Raises:
        SettingError: The confidence is not between 0 and 1.
    """
    if not 0 < confidence < 1:
        raise SettingError(f"confidence={confidence} is not between 0 and 1; use 0.95 for a 95% interval.")
    kept = statistics[~np.isnan(statistics)]
    if not kept.size:
        return float("nan"), float("nan")
    low, high = np.quantile(kept, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def bootstrap_mean(
    values: Sequence[float | int] | Floats,
    n_resamples: int = RESAMPLES,
    seed: int = 0,
    confidence: int | float = CONFIDENCE,
) -> Interval:
    """Return the mean of some items and its percentile bootstrap interval.

    Args:
        values: One value an item.
        n_resamples: Number of resamples.
        seed: Seed.
        confidence: Share of the resampled means between the two ends.

    Raises:
        DataError: No item, or one that is NaN.
        SettingError: A wrong number of resamples or confidence.
    """
    items = np.asarray(values, dtype=np.float64)
    if items.ndim != 1 or not items.size or np.isnan(items).any():
        raise DataError("a bootstrap needs at least one value an item, and none may be NaN; drop those first.")
    at_once = max(1, _COUNTS_AT_ONCE // items.size)
    means = [
        resample_counts(items.size, min(at_once, n_resamples - start), seed, "items", start) @ items / items.size
        for start in range(0, max(n_resamples, 1), at_once)
    ]
    low, high = percentiles(np.concatenate(means), confidence)
    return Interval(float(items.mean()), low, high, items.size)


def bootstrap_difference(
    values: Sequence[float | int] | Floats,
    others: Sequence[float | int] | Floats,
    n_resamples: int = RESAMPLES,
    seed: int = 0,
    confidence: int | float = CONFIDENCE,
) -> Interval:
    """Return the mean of `values - others` over paired items, and its interval: both are resampled together.

    Raises:
        DataError: The two have not the same items, or there is none.
    """
    first, second = (np.asarray(part, dtype=np.float64) for part in (values, others))
    if first.shape != second.shape:
        raise DataError(f"paired items are needed, but there are {first.shape} and {second.shape} of them.")
    return bootstrap_mean(first - second, n_resamples, seed, confidence)


def resampled_cell_means(values: Floats, counts: Counts) -> Floats:
    """Return every cell's mean in every resample [resample, cell], items resampled jointly over all cells.

    Args:
        values: One value a cell and item [cell, item]; NaN where a cell does not have the item.
        counts: How often each item is drawn [resample, item].

    Returns:
        Means; NaN where a resample drew none of a cell's items.
    """
    there = ~np.isnan(values)
    sums = counts @ np.where(there, values, 0.0).T
    sizes = counts @ there.astype(np.float64).T
    with np.errstate(invalid="ignore", divide="ignore"):
        return sums / sizes


def cell_means(values: Floats) -> Floats:
    """Return every cell's mean over the items it has [cell]; NaN for a cell without any."""
    return resampled_cell_means(values, np.ones((1, values.shape[1]), dtype=np.int64))[0]


def mean_over_cells(means: Floats) -> Floats:
    """Return the unweighted mean over cells (the last axis), leaving out NaN; NaN where no cell has a value."""
    there = ~np.isnan(means)
    size = there.sum(axis=-1)
    return np.where(size > 0, np.where(there, means, 0.0).sum(axis=-1) / np.maximum(size, 1), np.nan)


def bootstrap_cells(
    values: Floats,
    n_resamples: int = RESAMPLES,
    seed: int = 0,
    confidence: int | float = CONFIDENCE,
) -> Interval:
    """Return the unweighted mean over cells of the cells' means, with items resampled jointly over all cells.

    A fact that is asked in many languages is one item, not many: it is drawn, or not, for all cells at once.

    Args:
        values: One value a cell and item [cell, item]; NaN where a cell does not have the item.
        n_resamples: Number of resamples.
        seed: Seed.
        confidence: Share of the resampled means between the two ends.

    Returns:
        The interval; `n` is the number of items that at least one cell has.
    """
    counts = resample_counts(values.shape[1], n_resamples, seed, "items")
    low, high = percentiles(mean_over_cells(resampled_cell_means(values, counts)), confidence)
    n = int((~np.isnan(values)).any(axis=0).sum())
    return Interval(float(mean_over_cells(cell_means(values))), low, high, n)
