import dataclasses
import math
from fractions import Fraction

import pytest
import torch
from results import PROVENANCE

from lens_neurons.errors import DataError, SettingError
from lens_neurons.features import FeatureStats
from lens_neurons.methods import cite, identify, list_methods
from lens_neurons.methods.sae_lape import sae_lape


def slow_sae_lape(stats: FeatureStats, example_rate, token_rate, ratio, shared, per_layer=None):
    """methods.md section 8, one latent at a time, in whole numbers and fractions."""
    languages = range(len(stats.languages))
    found = {code: [] for code in stats.languages}
    for place, layer in enumerate(stats.layers):
        for j in range(stats.n_latents):
            tokens = [int(stats.active_tokens[k, place, j]) for k in languages]
            texts = [int(stats.active_texts[k, place, j]) for k in languages]
            often = any(texts[k] >= Fraction(str(example_rate)) * int(stats.texts[k]) for k in languages)
            much = any(tokens[k] > Fraction(str(token_rate)) * int(stats.tokens[k]) for k in languages)
            if not (often and much):
                continue
            p = [Fraction(tokens[k], int(stats.tokens[k])) for k in languages]
            owners = [k for k in languages if p[k] >= Fraction(str(ratio)) * max(p)]
            if len(owners) != shared:
                continue
            shares = [float(value / sum(p)) for value in p]
            entropy = -math.fsum(share * math.log(share) for share in shares if share)
            for k in owners:
                found[stats.languages[k]].append((round(entropy, 12), layer, j))
    kept = {}
    for code, units in found.items():
        units.sort()
        by_layer = {layer: [unit for unit in units if unit[1] == layer][:per_layer] for layer in stats.layers}
        kept[code] = [unit for unit in units if unit in by_layer[unit[1]]]
    return kept


def random_features(seed: int, n_languages: int = 5, latents: int = 60, layers=(1, 3), n_layers: int = 5):
    """Return counts of sparse latents, some of one language and some of several, with ties and latents never active."""
    draw = torch.Generator().manual_seed(seed)
    tokens, texts, active_tokens, active_texts = {}, {}, {}, {}
    shape = (len(layers), latents)
    common = torch.rand(shape, generator=draw) ** 2
    for k in range(n_languages):
        code = f"group{k}"
        texts[code] = int(torch.randint(4, 30, (), generator=draw))
        tokens[code] = texts[code] * int(torch.randint(3, 9, (), generator=draw))
        own = torch.rand(shape, generator=draw) < 0.4
        rate = torch.where(own, common, 0.15 * common * torch.rand(shape, generator=draw))
        rate[torch.rand(shape, generator=draw) < 0.3] = 0
        counts = (rate * tokens[code]).round().long()
        most = torch.minimum(counts, torch.tensor(texts[code]))
        least = (counts > 0).long()
        share = torch.rand(shape, generator=draw) ** 0.2
        active_tokens[code] = counts
        active_texts[code] = torch.maximum(least, (share * most).round().long())
    return FeatureStats.from_counts(
        tokens, texts, active_tokens, active_texts, layers=layers, n_layers=n_layers, site="sae:mlp_out"
    )


def units_of(neurons):
    frame = neurons.to_frame()
    return {
        code: [
            (round(float(row.score), 12), int(row.layer), int(row.neuron))
            for row in frame[frame["language"] == code].itertuples()
        ]
        for code in neurons.languages
    }


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "settings",
    [
        (0.98, 0.10, 0.5, 1),
        (0.8, 0.10, 0.5, 1),
        (0.7, 0.07, 0.8, 2),
        (0.5, 0.0, 0.3, 3),
        (0.0, 0.0, 1.0, 1),
        (0.5, 0.05, 0.5, 1, 2),
        (0.5, 0.05, 0.25, 2, 1),
    ],
)
def test_equals_a_slow_transcription(seed, settings):
    stats = random_features(seed)
    found = sae_lape(stats, *settings)
    wanted = slow_sae_lape(stats, *settings)
    assert found.languages == stats.languages
    assert found.sites == {"sae:mlp_out": (5, 60)}
    assert units_of(found) == wanted
    assert settings[0] > 0.9 or any(wanted.values())


def test_the_two_filters_may_be_met_by_different_languages():
    # The latent fires in every text of en, on few tokens, and on many tokens of fr, in few texts.
    stats = FeatureStats.from_counts(
        {"en": 1000, "fr": 100},
        {"en": 10, "fr": 10},
        {"en": torch.tensor([[10]]), "fr": torch.tensor([[90]])},
        {"en": torch.tensor([[10]]), "fr": torch.tensor([[2]])},
    )
    assert sae_lape(stats).counts() == {"en": 0, "fr": 1}


def test_bounds_are_met_exactly():
    def stats(texts: int, tokens: int) -> FeatureStats:
        return FeatureStats.from_counts(
            {"en": 1000, "fr": 1000},
            {"en": 100, "fr": 100},
            {"en": torch.tensor([[tokens]]), "fr": torch.tensor([[0]])},
            {"en": torch.tensor([[texts]]), "fr": torch.tensor([[0]])},
        )

    # "At least 98% of the texts" and "more than 10% of the tokens".
    assert sae_lape(stats(98, 101)).counts()["en"] == 1
    assert sae_lape(stats(97, 101)).counts()["en"] == 0
    assert sae_lape(stats(98, 100)).counts()["en"] == 0
    # 0.07 * 100 is more than 7 in floating point.
    assert sae_lape(stats(7, 101), example_rate=0.07).counts()["en"] == 1
    assert sae_lape(stats(98, 70), token_rate=0.07).counts()["en"] == 0


def test_the_ratio_counts_a_language_in():
    tokens, texts = {"en": 100, "fr": 100, "sw": 100}, {"en": 1, "fr": 1, "sw": 1}
    table = {"en": torch.tensor([[60]]), "fr": torch.tensor([[30]]), "sw": torch.tensor([[29]])}
    ever = dict.fromkeys(table, torch.tensor([[1]]))
    stats = FeatureStats.from_counts(tokens, texts, table, ever)
    assert sae_lape(stats, shared=2).counts() == {"en": 1, "fr": 1, "sw": 0}
    assert sae_lape(stats, shared=1).counts() == {"en": 0, "fr": 0, "sw": 0}
    assert sae_lape(stats, ratio=0.51).counts() == {"en": 1, "fr": 0, "sw": 0}


def planted() -> FeatureStats:
    """Return features in which latent 7 of layer 3 is of group1 alone, and latent 8 active everywhere alike."""
    stats = random_features(0)
    tokens, texts = stats.active_tokens.clone(), stats.active_texts.clone()
    tokens[:, 1, 7], texts[:, 1, 7] = 0, 0
    tokens[1, 1, 7], texts[1, 1, 7] = int(stats.tokens[1]) // 2, int(stats.texts[1])
    tokens[:, 1, 8], texts[:, 1, 8] = stats.tokens, stats.texts
    return dataclasses.replace(stats, active_tokens=tokens, active_texts=texts)


def test_a_planted_latent_is_found_and_a_constant_one_never():
    stats = planted()
    found = units_of(sae_lape(stats))
    assert (0.0, 3, 7) in found["group1"]
    assert found["group1"][0] == (0.0, 3, 7)
    assert not any((layer, latent) == (3, 8) for units in found.values() for _, layer, latent in units)
    everywhere = units_of(sae_lape(stats, shared=5))
    assert all((3, 8) in {unit[1:] for unit in units} for units in everywhere.values())


@pytest.mark.parametrize("settings", [{}, {"example_rate": 0.5, "shared": 2}, {"example_rate": 0.5, "per_layer": 2}])
def test_permuting_languages_and_latents_permutes_the_answer(settings):
    stats = random_features(3)
    usual = units_of(sae_lape(stats, **settings))
    order = ["group3", "group0", "group4", "group2", "group1"]
    assert units_of(sae_lape(stats.select(order), **settings)) == {code: usual[code] for code in order}
    if "per_layer" in settings:
        return  # which of two equally good latents is first depends on their numbers
    permutation = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    moved = {
        name: getattr(stats, name)[:, :, permutation]
        for name in ("active_tokens", "active_texts", "sum", "largest", "smallest")
    }
    found = units_of(sae_lape(dataclasses.replace(stats, **moved), **settings))
    back = {code: {(s, layer, int(permutation[j])) for s, layer, j in units} for code, units in found.items()}
    assert back == {code: set(units) for code, units in usual.items()}


def test_probability_ranks_by_the_language_itself():
    stats = random_features(1)
    by_entropy = sae_lape(stats, example_rate=0.5)
    by_share = sae_lape(stats, example_rate=0.5, rank="probability")
    p = stats.probability()
    for k, code in enumerate(stats.languages):
        table = by_share.tables[code]
        shares = [-float(p[k, stats.layers.index(int(i)), int(j)]) for i, j in zip(table.layer, table.index)]
        assert table.score.tolist() == shares == sorted(shares)
        assert set(by_share.flat(code).tolist()) == set(by_entropy.flat(code).tolist())


def test_bad_settings_are_sentences():
    stats = random_features(0)
    for setting, message in [
        ({"example_rate": 1.1}, "example_rate=1.1 must be at least 0"),
        ({"token_rate": -0.1}, "token_rate=-0.1"),
        ({"ratio": 0}, "ratio=0.* must be above 0"),
        ({"shared": 0}, "shared=0 must be 1 to 5"),
        ({"shared": 6}, "shared=6 must be 1 to 5"),
        ({"per_layer": 0}, "per_layer=0 must be 1 to 60"),
        ({"per_layer": 61}, "per_layer=61 must be 1 to 60"),
        ({"per_layer": True}, "per_layer=True"),
        ({"rank": "size"}, "rank='size' is unknown"),
    ]:
        with pytest.raises(SettingError, match=message):
            sae_lape(stats, **setting)
    with pytest.raises(DataError, match="at least two"):
        sae_lape(stats.select(["group0"]))
    packed = dataclasses.replace(stats, provenance=PROVENANCE.replace(policy={"pack": True}))
    with pytest.raises(DataError, match="packed"):
        sae_lape(packed)
    with pytest.raises(SettingError, match="must be a whole number"):
        identify(stats, "sae_lape", shared=1.5)


def test_the_registry_knows_it():
    assert list_methods().loc["sae_lape", "needs"] == "features"
    found = identify(planted(), "sae_lape", per_layer=1)
    assert found.method == {
        "name": "sae_lape",
        "example_rate": 0.98,
        "token_rate": 0.1,
        "ratio": 0.5,
        "shared": 1,
        "per_layer": 1,
        "rank": "entropy",
    }
    assert "2507.11230" in cite(found)
