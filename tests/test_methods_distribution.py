import itertools
import math

import numpy as np
import pytest
import torch

from lens_neurons.activation_stats import ActivationStats
from lens_neurons.bins import Bins, NeuronBins
from lens_neurons.errors import DataError, SettingError
from lens_neurons.histograms import Histograms
from lens_neurons.methods import cite, collect_for, identify
from lens_neurons.methods.distribution import best_split, overlaps

BINS = Bins(n=30, low=-4.0, high=4.0, scale=1.0)
LANGUAGES = ("en", "fr", "sw", "th", "zh", "ja", "vi")


def make_values(seed, shape=(2, 23), languages=LANGUAGES):
    """Values [token layer neuron]: (0, 4) is Swahili's, (1, 3) Chinese and Japanese, (1, 7) is constant."""
    rng = np.random.default_rng(seed)
    values = {code: rng.normal(size=(int(rng.integers(80, 160)), *shape)) for code in languages}
    shift = 0.5 * rng.normal(size=(len(languages), *shape))
    for k, code in enumerate(languages):
        values[code] += shift[k]
        values[code][:, 0, 4] += 6.0 * (code == "sw")
        values[code][:, 1, 3] -= 6.0 * (code in ("zh", "ja"))
        values[code][:, 1, 7] = 0.3
    return {code: torch.from_numpy(table).float() for code, table in values.items()}


def splits(languages):
    """Every split in two sides, each once, as the set of one side."""
    for size in range(1, len(languages) // 2 + 1):
        for side in itertools.combinations(languages, size):
            if 2 * size < len(languages) or languages[0] in side:
                yield set(side)


def slow_distribution(histograms, percentile):
    """Steps 1 to 4, one unit and one split at a time: language to [(cost, layer, neuron, kind)]."""
    languages = histograms.languages
    counts = {code: histograms.counts[code].tolist() for code in languages}
    edges = histograms.bins.edges_of(0, 0).tolist()
    middles = [edges[0], *((a + b) / 2 for a, b in itertools.pairwise(edges)), edges[-1]]
    every, found = [], []
    for layer, neuron in itertools.product(range(histograms.n_layers), range(histograms.n_neurons)):
        share = {
            code: [n / sum(counts[code][layer][neuron]) for n in counts[code][layer][neuron]] for code in languages
        }
        overlap = {}
        for one, other in itertools.combinations(languages, 2):
            overlap[one, other] = overlap[other, one] = sum(map(min, share[one], share[other]))
            every.append(overlap[one, other])
        mean = {code: sum(map(math.prod, zip(share[code], middles))) for code in languages}
        best = []
        for side in splits(languages):
            rest = set(languages) - side
            cost = max(overlap[one, other] for one in side for other in rest)
            if 2 * len(side) == len(languages):
                side = max(side, rest, key=lambda part: sum(mean[code] for code in part))
            best.append((cost, len(side), sorted(side)))
        found.append((min(best, key=lambda entry: (round(entry[0], 9), entry[1])), layer, neuron))
    tau = sorted(every)[max(1, int(len(every) * percentile / 100)) - 1]
    result = {code: [] for code in languages}
    for (cost, size, side), layer, neuron in found:
        if cost <= tau + 1e-12 and cost < 1 - 1e-9:
            for code in side:
                result[code].append((cost, layer, neuron, "single" if size == 1 else "multi"))
    return {code: sorted(entries) for code, entries in result.items()}, tau


def as_lists(neurons):
    kinds = neurons.kinds
    return {
        code: list(
            zip(
                table.score.tolist(),
                table.layer.tolist(),
                table.index.tolist(),
                [] if table.kind is None else [kinds[i] for i in table.kind.tolist()],
            )
        )
        for code, table in neurons.tables.items()
    }


@pytest.mark.parametrize(
    ("seed", "languages", "percentile"),
    [
        (0, LANGUAGES, 3.0),
        (1, LANGUAGES, 20),
        (2, LANGUAGES[:4], 10.0),
        (3, LANGUAGES[:2], 25.0),
        (4, LANGUAGES[1:], 100.0),
    ],
)
def test_equals_a_slow_transcription(seed, languages, percentile):
    histograms = Histograms.from_values(make_values(seed, languages=languages), bins=BINS)
    found = identify(histograms, "distribution", tau_percentile=percentile)
    wanted, tau = slow_distribution(histograms, percentile)
    mine = as_lists(found)
    for code in languages:
        assert [entry[1:] for entry in mine[code]] == [entry[1:] for entry in wanted[code]]
        np.testing.assert_allclose([entry[0] for entry in mine[code]], [entry[0] for entry in wanted[code]], atol=1e-12)
    assert sum(found.counts().values()) > 0
    assert found.method["name"] == "distribution"
    assert found.method["tau"] == pytest.approx(tau)
    assert found.provenance == histograms.provenance


def test_blocks_change_nothing(monkeypatch):
    histograms = Histograms.from_values(make_values(5), bins=BINS)
    whole = identify(histograms, "distribution", tau_percentile=10.0)
    monkeypatch.setattr("lens_neurons.methods.distribution._BLOCK", 7 * 32 * 4)
    assert as_lists(identify(histograms, "distribution", tau_percentile=10.0)) == as_lists(whole)


@pytest.mark.parametrize("n", [2, 3, 4, 7])
@pytest.mark.parametrize("levels", [3, 1000])
def test_the_best_split_is_that_of_brute_force(n, levels):
    # With three levels of overlap nearly every unit has several best splits.
    rng = np.random.default_rng(n)
    drawn = rng.integers(levels, size=(400, n, n)) / levels
    overlap = torch.from_numpy(np.maximum(drawn, drawn.transpose(0, 2, 1)))
    overlap[:, range(n), range(n)] = 1.0
    mean = torch.from_numpy(rng.integers(4, size=(400, n)).astype(np.float64))
    names = [f"{chr(122 - i)}" for i in range(n)]
    order = torch.tensor([sorted(names).index(name) for name in names])
    cost, side = best_split(overlap, mean, order)
    for unit in range(400):
        table = overlap[unit].numpy()
        costs = {}
        for size in range(1, n):
            for part in itertools.combinations(range(n), size):
                rest = [k for k in range(n) if k not in part]
                costs[part] = table[np.ix_(part, rest)].max()
        lowest = min(costs.values())
        assert float(cost[unit]) == lowest
        candidates = [part for part, value in costs.items() if value == lowest]
        fewest = [part for part in candidates if len(part) == min(map(len, candidates))]
        means = [float(np.mean([mean[unit, k] for k in part])) for part in fewest]
        highest = [part for part, value in zip(fewest, means) if abs(value - max(means)) < 1e-12]
        wanted = min(highest, key=lambda part: min(names[k] for k in part))
        assert side[unit].nonzero()[:, 0].tolist() == list(wanted)


def test_overlaps_are_sums_of_minima():
    histograms = Histograms.from_values(make_values(6), bins=BINS)
    probability = histograms.probability(1)
    made = overlaps(probability)
    for unit in range(histograms.n_neurons):
        for k, j in itertools.product(range(len(LANGUAGES)), repeat=2):
            expected = sum(map(min, probability[k, unit].tolist(), probability[j, unit].tolist()))
            assert float(made[unit, k, j]) == pytest.approx(expected, abs=1e-12)
    assert torch.equal(made, made.transpose(1, 2))
    assert (made.diagonal(dim1=1, dim2=2) == 1).all()


def test_planted_units_are_found():
    for bins in (BINS, NeuronBins(torch.full((2, 23), -9.0), torch.full((2, 23), 9.0), 60), Bins()):
        found = identify(Histograms.from_values(make_values(7), bins=bins), "distribution", tau_percentile=2.0)
        for code in LANGUAGES:
            entries = [(layer, neuron, kind) for _, layer, neuron, kind in as_lists(found)[code]]
            assert ((0, 4, "single") in entries) == (code == "sw")
            assert ((1, 3, "multi") in entries) == (code in ("zh", "ja"))
        assert set(found.kinds) <= {"single", "multi"}
        assert found.of_kind("single").mask("sw")[0, 4]
        assert not found.of_kind("multi").mask("sw")[0, 4]


def test_a_unit_that_is_the_same_everywhere_is_never_taken():
    values = make_values(8)
    found = identify(Histograms.from_values(values, bins=BINS), "distribution", tau_percentile=100.0)
    taken = found.union_mask()
    assert not taken[1, 7]
    assert int(taken.sum()) == taken.numel() - 1
    constant = {code: torch.full((n, 1, 3), 0.2) for code, n in (("en", 7), ("fr", 11))}
    found = identify(Histograms.from_values(constant, bins=BINS), "distribution", tau_percentile=100.0)
    assert found.counts() == {"en": 0, "fr": 0}
    # The same shares of other numbers of tokens.
    counts = {"en": torch.tensor([[[3, 4, 0]]]), "fr": torch.tensor([[[30, 40, 0]]])}
    found = identify(Histograms.from_counts(counts, bins=Bins(n=1)), "distribution", tau_percentile=100.0)
    assert len(found) == 0


def test_permuted_languages_and_neurons_permute_the_answer():
    values = make_values(9)
    histograms = Histograms.from_values(values, bins=BINS)
    found = as_lists(identify(histograms, "distribution", tau_percentile=15.0))
    shuffled = histograms.select(["ja", "sw", "vi", "en", "zh", "th", "fr"])
    again = as_lists(identify(shuffled, "distribution", tau_percentile=15.0))
    assert again == found
    order = torch.from_numpy(np.random.default_rng(0).permutation(23))
    moved = Histograms.from_values({code: table[:, :, order] for code, table in values.items()}, bins=BINS)
    again = identify(moved, "distribution", tau_percentile=15.0)
    for code in LANGUAGES:
        back = [(layer, int(order[neuron]), kind) for _, layer, neuron, kind in as_lists(again)[code]]
        assert sorted(back) == sorted(entry[1:] for entry in found[code])


def test_equal_halves_and_several_best_splits_go_by_rule():
    # Four languages that share nothing, then two pairs: the highest mean decides; then, where means agree, the name.
    def one(*bins):
        return Histograms.from_counts(
            {code: torch.eye(5, dtype=torch.int64)[at][None, None] for code, at in zip(("fr", "sw", "en", "zh"), bins)},
            bins=Bins(n=3, low=-1.0, high=2.0, scale=1.0),
        )

    def owners(histograms):
        found = identify(histograms, "distribution", tau_percentile=100.0)
        return {code for code, n in found.counts().items() if n}

    assert owners(one(1, 4, 2, 3)) == {"sw"}
    assert owners(one(1, 3, 3, 1)) == {"sw", "en"}
    assert owners(one(1, 1, 3, 3)) == {"en", "zh"}
    costs, side = best_split(
        torch.eye(3, dtype=torch.float64)[None], torch.ones(1, 3).double(), torch.tensor([2, 0, 1])
    )
    assert (costs.tolist(), side.tolist()) == ([0.0], [[False, True, False]])


def test_bad_input_is_a_sentence():
    histograms = Histograms.from_values(make_values(0), bins=BINS)
    for value in (0, -1.0, 100.1):
        with pytest.raises(SettingError, match=r"tau_percentile=.* must be above 0"):
            identify(histograms, "distribution", tau_percentile=value)
    with pytest.raises(DataError, match="at least two"):
        identify(histograms.select(["en"]), "distribution")
    with pytest.raises(DataError, match="needs histograms"):
        identify(_counts(), "distribution")


def _counts():
    return ActivationStats.from_counts({"en": 2, "fr": 2}, {code: torch.ones(1, 2).long() for code in ("en", "fr")})


def test_the_registry_knows_what_to_record():
    assert collect_for(["distribution"]).histograms == Bins()
    assert "Distribution-aware" in cite("distribution")
