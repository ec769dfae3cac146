import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from results import make_partial

from lens_neurons.activation_stats import ActivationStats
from lens_neurons.errors import DataError, LensNeuronsError, SettingError
from lens_neurons.methods import cite, identify
from lens_neurons.methods.specialisation import overlap_by_layer
from lens_neurons.neurons import NeuronSet
from lens_neurons.storage import Provenance

SHAPE = (3, 11)
LANGUAGES = ("en", "fr", "sw")


def make_values(seed: int) -> dict[str, np.ndarray]:
    """Activations [token layer neuron]; (0, 4) is Swahili's, (1, 2) is dead, layer 2 is rounded."""
    rng = np.random.default_rng(seed)
    values = {
        code: rng.normal(size=(n, *SHAPE)) * rng.gamma(1, 1, size=SHAPE) for code, n in zip(LANGUAGES, (40, 25, 30))
    }
    for code, table in values.items():
        table[:, 0, 4] = 50.0 * (code == "sw") - 1
        table[:, 1, 2] = -0.5
        table[:, 2] = np.round(table[:, 2])
    return values


def make_stats(values: dict[str, np.ndarray]) -> ActivationStats:
    partials = {code: make_partial(own, []) for code, own in values.items()}
    return ActivationStats.from_partials(partials, provenance=Provenance.unknown(SHAPE, "gate_act"))


def slow(values: dict[str, np.ndarray], share: float, measure: str, over: str) -> dict[str, list]:
    """Take the largest, one after another, until the share is reached."""
    found: dict[str, list] = {}
    for code, table in values.items():
        part = table.clip(min=0) if measure == "positive" else (table > 0).astype(float)
        mass = part.sum(axis=0)
        layers = range(SHAPE[0])
        taken = []
        for group in [[layer] for layer in layers] if over == "layer" else [list(layers)]:
            total = sum(mass[layer].sum() for layer in group)
            ranked = sorted((-mass[layer, neuron], layer, neuron) for layer in group for neuron in range(SHAPE[1]))
            reached = 0.0
            for value, layer, neuron in ranked:
                if reached >= share * total * (1 - 1e-12) or value == 0:
                    break
                reached -= value
                taken.append((value / total, layer, neuron))
        found[code] = sorted(taken)
    return found


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("measure", ["positive", "counts"])
@pytest.mark.parametrize("over", ["layer", "model"])
@pytest.mark.parametrize("share", [0.1, 0.95, 1.0])
def test_equals_a_slow_transcription(seed, measure, over, share):
    values = make_values(seed)
    found = identify(make_stats(values), "specialisation", share=share, measure=measure, over=over)
    wanted = slow(values, share, measure, over)
    for code in LANGUAGES:
        table = found.tables[code]
        assert set(zip(table.layer.tolist(), table.index.tolist())) == {entry[1:] for entry in wanted[code]}
        np.testing.assert_allclose(table.score, [entry[0] for entry in wanted[code]], rtol=1e-12)
    assert found.method == {"name": "specialisation", "share": share, "measure": measure, "over": over}


def test_it_is_the_smallest_set_that_covers_the_share():
    values = {"en": make_values(4)["en"][:, :, :9]}
    stats = make_stats(values)
    found = identify(stats, "specialisation", share=0.7)
    mass = stats.sum_positive[0]
    for layer in range(SHAPE[0]):
        own = found.mask("en")[layer]
        total = float(mass[layer].sum())
        assert float(mass[layer][own].sum()) >= 0.7 * total
        fewer = itertools.combinations(range(9), int(own.sum()) - 1)
        assert all(float(mass[layer][list(part)].sum()) < 0.7 * total for part in fewer)


def test_ties_and_whole_shares():
    counts = {"en": torch.tensor([[5, 5, 5, 5], [0, 0, 0, 0], [7, 0, 0, 3]])}
    stats = ActivationStats.from_counts({"en": 10}, counts)
    found = identify(stats, "specialisation", share=0.5, measure="counts")
    assert found.mask("en").tolist() == [[True, True, False, False], [False] * 4, [True, False, False, False]]
    # 0.07 * 100 is above 7 in floating point, yet 7 of 100 are 7%.
    whole = ActivationStats.from_counts({"en": 100}, {"en": torch.tensor([[7] + [3] * 31])})
    assert identify(whole, "specialisation", share=0.07, measure="counts").counts() == {"en": 1}
    everything = identify(stats, "specialisation", share=1.0, measure="counts")
    assert everything.mask("en").tolist() == [[True] * 4, [False] * 4, [True, False, False, True]]
    model = identify(stats, "specialisation", share=7 / 30, measure="counts", over="model")
    assert model.mask("en").nonzero().tolist() == [[2, 0]]


def test_planted_and_dead_units():
    found = identify(make_stats(make_values(5)), "specialisation", share=0.5)
    assert [bool(found.mask(code)[0, 4]) for code in LANGUAGES] == [False, False, True]
    everything = identify(make_stats(make_values(5)), "specialisation", share=1.0)
    assert not everything.union_mask()[1, 2]


def test_the_order_of_languages_and_neurons_does_not_matter():
    values = make_values(6)
    found = identify(make_stats(values), "specialisation")
    again = identify(make_stats(values).select(["sw", "en", "fr"]), "specialisation")
    order = np.random.default_rng(0).permutation(SHAPE[1])
    moved = identify(make_stats({code: table[:, :, order] for code, table in values.items()}), "specialisation")
    for code in LANGUAGES:
        assert torch.equal(found.mask(code), again.mask(code))
        # Layer 2 has ties, which go by index.
        assert torch.equal(found.mask(code)[:2, order], moved.mask(code)[:2])


def test_bad_input_is_a_sentence():
    stats = make_stats(make_values(0))
    counts = ActivationStats.from_counts({"en": 2}, {"en": torch.ones(SHAPE, dtype=torch.int64)})
    broken = make_values(0)
    broken["fr"][0, 0, 0] = np.nan
    cases = [
        (SettingError, "share=0", stats, {"share": 0}),
        (SettingError, r"share=1\.1", stats, {"share": 1.1}),
        (SettingError, "measure='mean'", stats, {"measure": "mean"}),
        (SettingError, "over='head'", stats, {"over": "head"}),
        (DataError, "counts alone", counts, {"measure": "positive"}),
        (DataError, "NaN", make_stats(broken), {}),
    ]
    for kind, message, data, settings in cases:
        with pytest.raises(kind, match=message) as caught:
            identify(data, "specialisation", **settings)
        assert isinstance(caught.value, LensNeuronsError)
        assert str(caught.value).endswith(".")
    assert identify(counts, "specialisation", measure="counts").counts() == {"en": 33}


def test_the_measure_is_what_was_recorded():
    sums = make_stats(make_values(0))
    counts = ActivationStats.from_counts(
        dict(zip(sums.languages, sums.tokens.tolist(), strict=True)),
        dict(zip(sums.languages, sums.positive, strict=True)),
    )
    for stats, measure in ((sums, "positive"), (counts, "counts")):
        found, named = identify(stats, "specialisation"), identify(stats, "specialisation", measure=measure)
        assert found.method == named.method
        assert found.method["measure"] == measure
        assert all(torch.equal(found.mask(code), named.mask(code)) for code in LANGUAGES)
    # Of one language as of three: nothing is compared.
    assert torch.equal(identify(counts.select(["sw"]), "specialisation").mask("sw"), found.mask("sw"))


def test_it_is_cited():
    assert "Neuron Specialization" in cite("specialisation")


@pytest.mark.parametrize("metric", ["jaccard", "dice", "count"])
def test_overlap_by_layer(metric):
    rng = np.random.default_rng(1)
    sites = {"gate_act": (3, 11), "q": (2, 5)}
    units = {code: torch.from_numpy(rng.permutation(43)[: 12 + k]) for k, code in enumerate(LANGUAGES)}
    units["de"] = torch.zeros(0, dtype=torch.int64)
    made = overlap_by_layer(NeuronSet.from_units(units, sites=sites), metric)
    rows = []
    for site, start, (layers, width) in (("gate_act", 0, (3, 11)), ("q", 33, (2, 5))):
        for one, other in itertools.combinations(units, 2):
            for layer in range(layers):
                span = range(start + layer * width, start + (layer + 1) * width)
                a, b = ({n for n in units[code].tolist() if n in span} for code in (one, other))
                shared, joined = len(a & b), len(a | b)
                ratio = shared / joined if metric == "jaccard" and joined else 0.0
                if metric == "dice" and joined:
                    ratio = 2 * shared / (len(a) + len(b))
                rows.append((site, layer, one, other, metric, float(shared) if metric == "count" else ratio))
    wanted = pd.DataFrame(rows, columns=["site", "layer", "language", "other", "metric", "value"])
    pd.testing.assert_frame_equal(made, wanted)


def test_overlap_by_layer_of_bad_input_is_a_sentence():
    neurons = NeuronSet.from_masks({code: torch.ones(2, 3, dtype=torch.bool) for code in ("en", "fr")})
    with pytest.raises(SettingError, match="metric='iou'"):
        overlap_by_layer(neurons, "iou")
    with pytest.raises(DataError, match="at least two"):
        overlap_by_layer(neurons["en"])
    assert (overlap_by_layer(neurons).value == 1).all()


@pytest.mark.parametrize("metric", ["jaccard", "dice", "count"])
def test_overlap_by_layer_of_one_layer_is_the_overlap_of_the_set(metric):
    # One language has no unit, and two have none between them.
    units = {"en": [0, 3, 4], "fr": [3, 5], "sw": [], "th": []}
    neurons = NeuronSet.from_units(
        {code: torch.tensor(own, dtype=torch.int64) for code, own in units.items()}, sites={"post": (1, 7)}
    )
    whole = neurons.overlap(metric)
    by_layer = overlap_by_layer(neurons, metric).set_index(["language", "other"])["value"]
    assert by_layer["sw", "th"] == 0
    for (one, other), value in by_layer.items():
        assert value == whole.loc[one, other]
