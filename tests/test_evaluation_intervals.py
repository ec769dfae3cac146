"""Bootstrap intervals against scipy, exact enumeration and plain loops."""

import itertools

import numpy as np
import pytest
import scipy.stats
from oracle import sentence

from lens_neurons.errors import DataError, SettingError
from lens_neurons.evaluation import intervals
from lens_neurons.evaluation.intervals import (
    bootstrap_cells,
    bootstrap_difference,
    bootstrap_mean,
    cell_means,
    mean_over_cells,
    percentiles,
    resample_counts,
    resampled_cell_means,
)

VALUES = np.random.default_rng(0).gamma(2.0, size=40)


def test_agrees_with_scipy() -> None:
    found = bootstrap_mean(VALUES, n_resamples=20_000, seed=1)
    expected = scipy.stats.bootstrap(
        (VALUES,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(5)
    ).confidence_interval
    spread = expected.high - expected.low
    assert found.mean == pytest.approx(VALUES.mean())
    assert found.n == 40
    assert found.low == pytest.approx(expected.low, abs=0.03 * spread)
    assert found.high == pytest.approx(expected.high, abs=0.03 * spread)


def test_agrees_with_all_resamples_of_three_items() -> None:
    items = np.array([0.0, 1.0, 5.0])
    means = [np.mean(draw) for draw in itertools.product(items, repeat=3)]
    found = bootstrap_mean(items, n_resamples=40_000, seed=0, confidence=0.6)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(means, [0.2, 0.8])))


def test_confidence_widens() -> None:
    narrow, wide = (bootstrap_mean(VALUES, confidence=level) for level in (0.5, 0.99))
    assert wide.low < narrow.low < narrow.mean < narrow.high < wide.high


def test_counts_are_draws_with_replacement() -> None:
    counts = resample_counts(7, 3000, 0)
    assert counts.shape == (3000, 7)
    assert (counts.sum(axis=1) == 7).all()
    # Each item is drawn Binomial(7, 1/7) times.
    expected = scipy.stats.binom.pmf(np.arange(8), 7, 1 / 7)
    found = np.bincount(counts[:, 0], minlength=8) / 3000
    assert np.abs(found - expected).max() < 0.03


def test_seed_and_name_decide_the_draws() -> None:
    assert (resample_counts(9, 50, 3, "a") == resample_counts(9, 50, 3, "a")).all()
    assert (resample_counts(9, 50, 3, "a") != resample_counts(9, 50, 3, "b")).any()
    assert (resample_counts(9, 50, 3, "a") != resample_counts(9, 50, 4, "a")).any()
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    bootstrap_mean(VALUES)
    assert (np.random.get_state()[1] == before).all()  # noqa: NPY002


def test_many_items_are_resampled_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = bootstrap_mean(VALUES, n_resamples=4000)
    monkeypatch.setattr(intervals, "_COUNTS_AT_ONCE", 400)
    pieces = bootstrap_mean(VALUES, n_resamples=4000)
    assert pieces.low == pytest.approx(whole.low, abs=0.05)
    assert pieces.high == pytest.approx(whole.high, abs=0.05)


def test_pairs_are_resampled_together() -> None:
    shift = 0.2 + 0.01 * np.random.default_rng(1).standard_normal(40)
    found = bootstrap_difference(VALUES + shift, VALUES)
    # Unpaired, the interval would be as wide as that of VALUES, 0.5 on either side.
    assert found.mean == pytest.approx(shift.mean())
    assert found.high - found.low < 0.01
    with pytest.raises(DataError) as caught:
        bootstrap_difference(VALUES, VALUES[:-1])
    sentence(caught.value)


def test_cells_share_each_draw_of_items() -> None:
    generator = np.random.default_rng(2)
    facts = generator.random(12)
    # The same facts asked in 50 languages are no more facts: the interval is that of 12 items.
    repeated = np.repeat(facts[None, :], 50, axis=0)
    joint = bootstrap_cells(repeated, n_resamples=4000)
    single = bootstrap_mean(facts, n_resamples=4000)
    assert joint.n == 12
    assert joint.mean == pytest.approx(single.mean)
    assert joint.high - joint.low == pytest.approx(single.high - single.low, rel=0.08)


def test_cells_against_a_plain_loop() -> None:
    generator = np.random.default_rng(3)
    values = generator.random((5, 6))
    values[generator.random((5, 6)) < 0.4] = np.nan
    values[4] = np.nan
    counts = resample_counts(6, 200, 0, "facts")
    found = resampled_cell_means(values, counts)
    for r, row in enumerate(counts):
        drawn = np.repeat(np.arange(6), row)
        means = []
        for cell in range(5):
            there = [values[cell, item] for item in drawn if not np.isnan(values[cell, item])]
            if there:
                means.append(np.mean(there))
                assert found[r, cell] == pytest.approx(means[-1])
            else:
                assert np.isnan(found[r, cell])
        assert mean_over_cells(found)[r] == pytest.approx(np.mean(means))
    with np.errstate(all="ignore"):
        expected = [np.nanmean(cell) if not np.isnan(cell).all() else np.nan for cell in values]
    assert cell_means(values) == pytest.approx(np.array(expected), nan_ok=True)
    # Unweighted over cells, however many items each has.
    assert bootstrap_cells(values).mean == pytest.approx(np.nanmean(expected))


def test_percentiles_leave_out_nan() -> None:
    values = np.array([np.nan, 1.0, 2.0, 3.0, np.nan])
    assert percentiles(values, 0.5) == (1.5, 2.5)
    assert np.isnan(percentiles(np.array([np.nan]))).all()


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: bootstrap_mean([]), DataError),
        (lambda: bootstrap_mean([1.0, float("nan")]), DataError),
        (lambda: bootstrap_mean([1.0, 2.0], n_resamples=0), SettingError),
        (lambda: bootstrap_mean([1.0, 2.0], confidence=95), SettingError),
        (lambda: resample_counts(0, 10, 0), DataError),
    ],
)
def test_wrong_arguments(call, error) -> None:
    with pytest.raises(error) as caught:
        call()
    sentence(caught.value)
