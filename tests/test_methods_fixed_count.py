import math

import pytest
import torch

from lens_neurons.activation_stats import ActivationStats
from lens_neurons.errors import DataError, SettingError
from lens_neurons.methods import identify
from lens_neurons.methods.fixed_count import fixed_count


def random_stats(seed, shape=(3, 40), languages=("c", "python", "rust", "en")):
    generator = torch.Generator().manual_seed(seed)
    tokens = dict.fromkeys(languages, 100)
    positive = {code: (torch.rand(shape, generator=generator) ** 3 * 100).long() for code in languages}
    return tokens, positive, ActivationStats.from_counts(tokens, positive)


@pytest.mark.parametrize("seed", range(3))
def test_equals_a_slow_transcription(seed):
    _tokens, positive, stats = random_stats(seed)
    n_layers, n_neurons = positive["c"].shape
    values = sorted(int(v) / 100 for counts in positive.values() for v in counts.flatten())
    bar = values[round(0.8 * len(values)) - 1]
    found = fixed_count(stats, units_per_language=7, activation_bar_ratio=0.8)
    for code in positive:
        ranked = []
        for i in range(n_layers):
            for j in range(n_neurons):
                p = [int(counts[i, j]) / 100 for counts in positive.values()]
                if int(positive[code][i, j]) / 100 > bar:
                    ranked.append((-sum(v / sum(p) * math.log(v / sum(p)) for v in p if v), i, j))
        wanted = {(i, j) for _, i, j in sorted(ranked)[:7]}
        assert set(zip(*(part.tolist() for part in found.units(code)), strict=True)) == wanted


def test_every_language_gets_as_many_and_groups_without_candidates_stay():
    tokens, positive, _ = random_stats(0)
    positive["rust"] = torch.zeros_like(positive["rust"])
    found = identify(ActivationStats.from_counts(tokens, positive), "fixed_count", units_per_language=5)
    assert found.counts() == {"c": 5, "python": 5, "rust": 0, "en": 5}
    (note,) = found.notes
    assert note.startswith("1 of 4 languages ")
    assert "fewer than 5 units" in note
    assert "the bar alone selects" in note
    assert fixed_count(random_stats(0)[2], units_per_language=2, activation_bar_ratio=0.5).notes == ()


def test_bad_settings_are_sentences():
    *_, stats = random_stats(0)
    with pytest.raises(SettingError, match="at least 1"):
        fixed_count(stats, units_per_language=0)
    with pytest.raises(SettingError, match="activation_bar_ratio=2"):
        fixed_count(stats, activation_bar_ratio=2.0)
    with pytest.raises(DataError, match="at least two"):
        fixed_count(stats.select(["c"]))
