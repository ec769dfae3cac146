import numpy as np
import pytest
import torch
from results import make_partial

from lens_neurons.activation_stats import ActivationStats
from lens_neurons.errors import DataError, SettingError
from lens_neurons.methods import identify
from lens_neurons.storage import Provenance

SHAPE = (2, 9)
LANGUAGES = ("en", "fr", "sw")
LENGTHS = (40, 25, 30)


def make_values(seed: int) -> dict[str, np.ndarray]:
    """Activations [token layer neuron]; neuron (1, 3) is constant, neuron (0, 4) is Swahili's."""
    rng = np.random.default_rng(seed)
    values = {code: rng.normal(size=(n, *SHAPE)) for code, n in zip(LANGUAGES, LENGTHS, strict=True)}
    for code in LANGUAGES:
        values[code][:, 1, 3] = 0.7
        values[code][:, 0, 4] += 3.0 * (code == "sw")
    return values


def make_stats(values: dict[str, np.ndarray]) -> ActivationStats:
    partials = {code: make_partial(own, []) for code, own in values.items()}
    return ActivationStats.from_partials(partials, provenance=Provenance.unknown(SHAPE, "gate_act"))


def slow_differences(values: dict[str, np.ndarray], language: str, layer: int, neuron: int) -> float:
    own = values[language][:, layer, neuron]
    others = [values[code][:, layer, neuron] for code in values if code != language]
    centre = sum(o.mean() for o in others) / len(others)
    spread = sum(((o - centre) ** 2).mean() for o in others) / len(others)
    return (own.mean() - centre) / np.sqrt((own.var() + spread) / 2)


@pytest.mark.parametrize("seed", range(3))
def test_equals_a_slow_transcription(seed):
    values = make_values(seed)
    found = identify(make_stats(values), "mean_difference", units_per_language=4)
    assert found.method == {"name": "mean_difference", "units_per_language": 4}
    for code in LANGUAGES:
        ranked = sorted(
            (-slow_differences(values, code, i, j), i, j)
            for i in range(SHAPE[0])
            for j in range(SHAPE[1])
            if (i, j) != (1, 3)
        )
        wanted = [entry for entry in ranked[:4] if entry[0] < 0]
        table = found.tables[code]
        assert list(zip(table.layer.tolist(), table.index.tolist(), strict=True)) == [(i, j) for _, i, j in wanted]
        np.testing.assert_allclose(table.score, [score for score, _, _ in wanted])
    assert [part[0] for part in found.units("sw")] == [0, 4]


def test_a_constant_unit_is_never_taken():
    found = identify(make_stats(make_values(0)), "mean_difference", units_per_language=18)
    assert not found.union_mask()[1, 3]
    # Only what stands out upwards is taken, so a language gets fewer than all others.
    assert max(found.counts().values()) < 17


def test_the_order_of_languages_does_not_matter():
    stats = make_stats(make_values(1))
    found = identify(stats, "mean_difference", units_per_language=3)
    again = identify(stats.select(["sw", "en", "fr"]), "mean_difference", units_per_language=3)
    for code in LANGUAGES:
        assert torch.equal(found.mask(code), again.mask(code))


def test_bad_input_is_a_sentence():
    stats = make_stats(make_values(0))
    with pytest.raises(SettingError, match="units_per_language=0"):
        identify(stats, "mean_difference", units_per_language=0)
    with pytest.raises(DataError, match="at least two"):
        identify(stats.select(["en"]), "mean_difference")
    counts = {"en": torch.ones(SHAPE, dtype=torch.int64), "fr": torch.ones(SHAPE, dtype=torch.int64)}
    with pytest.raises(DataError, match="counts alone"):
        identify(ActivationStats.from_counts({"en": 2, "fr": 2}, counts), "mean_difference")
