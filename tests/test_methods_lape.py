import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lens_neurons.activation_stats import ActivationStats
from lens_neurons.errors import DataError, SettingError
from lens_neurons.methods import cite, identify, list_methods
from lens_neurons.methods.lape import lape


def slow_lape(tokens, positive, top_rate, filter_rate, bar_ratio):
    """The formula of methods.md section 1, one unit at a time."""
    languages = list(positive)
    n_layers, n_neurons = positive[languages[0]].shape
    p = {
        k: [[int(positive[k][i, j]) / tokens[k] for j in range(n_neurons)] for i in range(n_layers)] for k in languages
    }
    ordered = sorted(p[k][i][j] for k in languages for i in range(n_layers) for j in range(n_neurons))
    threshold = ordered[round(filter_rate * len(ordered)) - 1]
    bar = ordered[round(bar_ratio * len(ordered)) - 1]
    ranked = []
    for i in range(n_layers):
        for j in range(n_neurons):
            values = [p[k][i][j] for k in languages]
            if max(values) > threshold:
                shares = [value / sum(values) for value in values]
                ranked.append((-sum(s * math.log(s) for s in shares if s > 0), i, j))
    ranked.sort()
    chosen = ranked[: round(top_rate * n_layers * n_neurons)]
    return {k: [(i, j) for _, i, j in chosen if p[k][i][j] > bar] for k in languages}


def random_counts(seed, shape, languages, low=0, sparse=0.0):
    generator = torch.Generator().manual_seed(seed)
    tokens = {code: int(torch.randint(50, 200, (), generator=generator)) for code in languages}
    positive = {}
    for code in languages:
        rate = torch.rand(shape, generator=generator) ** 3
        rate[torch.rand(shape, generator=generator) < sparse] = 0
        positive[code] = (rate * tokens[code]).to(torch.int64)
    return tokens, positive


def as_lists(neurons):
    return {
        code: list(zip(*(part.tolist() for part in neurons.units(code)), strict=True)) for code in neurons.languages
    }


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("shape", "n_languages", "rates"),
    [
        ((3, 37), 5, (0.1, 0.95, 0.95)),
        ((1, 101), 2, (0.05, 0.9, 0.8)),
        ((7, 11), 18, (0.3, 0.5, 0.9)),
        ((2, 53), 3, (1.0, 0.99, 0.95)),  # fewer survivors than the rate asks for
    ],
)
def test_equals_a_slow_transcription(seed, shape, n_languages, rates):
    languages = [f"group{i}" for i in range(n_languages)]
    tokens, positive = random_counts(seed, shape, languages, sparse=0.3)
    found = lape(ActivationStats.from_counts(tokens, positive), *rates)
    wanted = slow_lape(tokens, positive, *rates)
    assert {k: set(v) for k, v in as_lists(found).items()} == {k: set(v) for k, v in wanted.items()}
    # Entropies computed in another order may differ in the last bit, so only scores' order is compared.
    for code in languages:
        scores = found.tables[code].score
        assert torch.equal(scores, scores.sort().values)


def test_dead_neurons_are_never_chosen():
    tokens, positive = random_counts(0, (2, 40), ["en", "fr", "sw"])
    for counts in positive.values():
        counts[0, :20] = 0
    found = lape(
        ActivationStats.from_counts(tokens, positive), top_rate=1.0, filter_rate=0.01, activation_bar_ratio=0.01
    )
    assert not found.union_mask()[0, :20].any()


def test_a_language_without_neurons_keeps_its_place():
    # The reference code's split(bincount) drops trailing languages without neurons.
    tokens, positive = random_counts(1, (2, 50), ["en", "fr", "sw"])
    positive["sw"] = torch.zeros_like(positive["sw"])
    found = lape(ActivationStats.from_counts(tokens, positive), top_rate=0.2)
    assert found.languages == ("en", "fr", "sw")
    assert found.counts()["sw"] == 0


def test_ties_go_to_the_first_layer_and_neuron():
    positive = {"en": torch.full((2, 10), 50), "fr": torch.zeros(2, 10, dtype=torch.int64)}
    positive["fr"][1, 9] = 1
    stats = ActivationStats.from_counts({"en": 100, "fr": 100}, positive)
    found = lape(stats, top_rate=0.15, filter_rate=0.25, activation_bar_ratio=0.25)
    assert as_lists(found)["en"] == [(0, 0), (0, 1), (0, 2)]


def test_scores_are_entropies_in_nats():
    positive = {"en": torch.tensor([[50, 10]]), "fr": torch.tensor([[50, 0]])}
    stats = ActivationStats.from_counts({"en": 100, "fr": 100}, positive)
    found = lape(stats, top_rate=1.0, filter_rate=0.25, activation_bar_ratio=0.25)
    assert found.tables["en"].score.tolist() == pytest.approx([0.0, math.log(2)])


def test_bad_settings_are_sentences():
    tokens, positive = random_counts(0, (2, 10), ["en", "fr"])
    stats = ActivationStats.from_counts(tokens, positive)
    with pytest.raises(SettingError, match="top_rate=0"):
        lape(stats, top_rate=0)
    for method in ("lape", "culture", "ternary"):
        with pytest.raises(SettingError, match=r"top_rate=1e-09 of 20 units is none; use a larger share\.$"):
            identify(stats, method, top_rate=1e-9)
    with pytest.raises(DataError, match="at least two"):
        lape(stats.select(["en"]))
    with pytest.raises(SettingError, match="method='nope' is unknown"):
        identify(stats, method="nope")
    with pytest.raises(SettingError, match="no setting 'rate'; it has top_rate"):
        identify(stats, method="lape", rate=0.1)


def test_settings_must_be_numbers():
    tokens, positive = random_counts(0, (2, 10), ["en", "fr"])
    stats = ActivationStats.from_counts(tokens, positive)
    for setting in ({"top_rate": "abc"}, {"top_rate": True}, {"filter_rate": None}):
        with pytest.raises(SettingError, match="must be a number"):
            identify(stats, "lape", **setting)
    with pytest.raises(SettingError, match=r"units_per_language=0\.5 .* must be a whole number"):
        identify(stats, "fixed_count", units_per_language=0.5)
    found = identify(stats, "fixed_count", units_per_language=np.int64(2), activation_bar_ratio=np.float32(0.5))
    assert json.loads(json.dumps(found.method)) == found.method


def test_the_registry_lists_and_cites():
    assert "lape" in list_methods().index
    tokens, positive = random_counts(0, (2, 10), ["en", "fr"])
    found = identify(ActivationStats.from_counts(tokens, positive), method="lape", top_rate=0.1)
    assert found.method["name"] == "lape"
    assert "2402.16438" in cite(found)
    assert cite(found.random_like(0)) == cite(found)
    scores = SimpleNamespace(task="lss", settings={"method": found.method})
    assert cite(scores) == "\n\n".join([cite("lss"), cite(found)])


def test_presets_are_the_rates_of_the_studies():
    tokens, positive = random_counts(3, (4, 200), ("en", "de", "fr"))
    stats = ActivationStats.from_counts(tokens, positive)
    assert as_lists(identify(stats, "lape", preset="original")) == as_lists(identify(stats, "lape"))
    for n in range(1, 6):
        found = identify(stats, "lape", preset=f"language_arithmetic_{n}")
        assert as_lists(found) == as_lists(identify(stats, "lape", top_rate=n / 100))
        assert found.method["top_rate"] == n / 100
    found = identify(stats, "lape", preset="demo")
    assert as_lists(found) == as_lists(identify(stats, "lape", top_rate=0.14, activation_bar_ratio=0.9))
    for wrong in ({"preset": "mine"}, {"preset": "demo", "top_rate": 0.2}):
        with pytest.raises(SettingError) as caught:
            identify(stats, "lape", **wrong)
        assert str(caught.value).endswith(".")


def test_optional_numbers_are_checked_too():
    tokens, positive = random_counts(3, (4, 200), ("en", "de", "fr"))
    stats = ActivationStats.from_counts(tokens, positive)
    with pytest.raises(SettingError, match="must be a number"):
        identify(stats, "ternary", lam="0" + ".1")
    assert identify(stats, "ternary", lam=None).languages == ("en", "de", "fr")
