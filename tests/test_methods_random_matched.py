import dataclasses
import json

import numpy as np
import pytest
import torch

from lens_neurons.activation_stats import ActivationStats
from lens_neurons.errors import DataError, LensNeuronsError, ProvenanceError, SettingError
from lens_neurons.methods import cite, identify
from lens_neurons.neurons import NeuronSet
from lens_neurons.storage import Provenance

SHAPE = (3, 120)
LANGUAGES = ("en", "fr", "sw")


def make_stats(seed: int = 0, languages=LANGUAGES) -> ActivationStats:
    rng = np.random.default_rng(seed)
    positive = {code: torch.from_numpy(rng.integers(0, 1001, size=SHAPE)) for code in languages}
    return ActivationStats.from_counts(dict.fromkeys(languages, 1000), positive)


def make_set(stats: ActivationStats, each: int = 9) -> NeuronSet:
    """Return units that fire much more often than others, so that a match in number alone is a poor one."""
    score = -stats.probability() + torch.from_numpy(np.random.default_rng(1).random(stats.positive.shape)) * 0.3
    masks = {}
    for k, code in enumerate(stats.languages):
        masks[code] = torch.zeros(SHAPE, dtype=torch.bool)
        for layer, n in enumerate((each, 0, each + k)):
            masks[code][layer, score[k, layer].argsort()[:n]] = True
    return NeuronSet.from_masks(masks, method={"name": "lape", "top_rate": 0.1})


def slow_closest(free: dict[int, float], goal: float, n: int) -> set[float]:
    return set(sorted(abs(value - goal) for value in free.values())[:n])


@pytest.mark.parametrize("match", ["probability", "count"])
@pytest.mark.parametrize("seed", range(3))
def test_as_many_in_every_layer_and_none_of_the_set(match, seed):
    stats = make_stats()
    like = make_set(stats)
    found = identify(stats, "random_matched", like=like, seed=seed, match=match)
    assert found.languages == like.languages
    for code in LANGUAGES:
        assert torch.equal(found.mask(code).sum(dim=1), like.mask(code).sum(dim=1))
        # A mask would hide a unit that was drawn twice.
        assert found.counts()[code] == int(found.mask(code).sum())
    assert not (found.union_mask() & like.union_mask()).any()
    assert (found.site, found.shape, found.provenance) == (like.site, like.shape, like.provenance)


def test_matched_in_number_is_random_like():
    stats = make_stats()
    like = make_set(stats)
    found = identify(stats, "random_matched", like=like, seed=4, match="count")
    for code in LANGUAGES:
        assert torch.equal(found.mask(code), like.random_like(4).mask(code))
    assert set(found.tables["en"].score.tolist()) == {0.0}


def test_a_set_of_several_sites_is_matched_in_number():
    stats = make_stats()
    one = make_set(stats)
    sites = {"q": (3, 30), "gate_act": SHAPE}
    units = {code: torch.cat([torch.tensor([4, 5, 70]), 90 + one.flat(code)]) for code in LANGUAGES}
    like = NeuronSet.from_units(units, sites=sites, method={"name": "average_precision"})
    found = identify(stats, "random_matched", like=like, seed=4, match="count")
    again = like.random_like(4)
    assert dict(found.sites) == sites
    for code in LANGUAGES:
        assert torch.equal(found.flat(code), again.flat(code))
        for site in sites:
            drawn, wanted = found.at(site).mask(code), like.at(site).mask(code)
            assert torch.equal(drawn.sum(dim=1), wanted.sum(dim=1))
            assert not (drawn & like.at(site).union_mask()).any()
    # The probabilities are those of the recording's site, where the set is as it is alone.
    inside = identify(stats, "random_matched", like=one, match="count", seed=4)
    assert set(found.method["mean_difference"]) == set(inside.method["mean_difference"])
    drawn = found.at("gate_act")
    differences = []
    for layer in range(SHAPE[0]):
        a, b = (stats.probability()[0, layer][own.mask("en")[layer]].sort().values for own in (one, drawn))
        differences += (a - b).abs().tolist()
    assert found.method["mean_difference"]["en"] == pytest.approx(np.mean(differences))
    away = identify(stats, "random_matched", like=like.at("q"), match="count")
    assert away.method["mean_difference"] is None
    assert json.loads(json.dumps(away.method)) == away.method


@pytest.mark.parametrize("neighbours", [1, 4])
def test_every_unit_is_among_the_closest_that_were_free(neighbours):
    # The order in which units are visited is the draw's own, so what is checked holds in any order: the n-th drawn of
    # a layer is one of the (neighbours + n) closest at most.
    stats = make_stats(2)
    like = make_set(stats)
    found = identify(stats, "random_matched", like=like, seed=7, neighbours=neighbours)
    taken = like.union_mask()
    for k, code in enumerate(LANGUAGES):
        probability = stats.probability()[k]
        table = found.tables[code]
        assert torch.equal(table.score, table.score.sort().values)
        for layer in range(SHAPE[0]):
            goals = probability[layer][like.mask(code)[layer]].tolist()
            free = {n: float(probability[layer, n]) for n in range(SHAPE[1]) if not taken[layer, n]}
            for index, score in zip(
                table.index[table.layer == layer].tolist(), table.score[table.layer == layer].tolist()
            ):
                assert any(
                    abs(abs(free[index] - goal) - score) < 1e-12
                    and round(score, 9) <= round(max(slow_closest(free, goal, neighbours + len(goals) - 1)), 9)
                    for goal in goals
                )


def test_the_first_choice_is_among_the_closest():
    # With one unit a layer nothing is taken away, so the candidates are known.
    stats = make_stats(3)
    like = make_set(stats, each=1).select(["en"])
    for neighbours in (1, 5):
        drawn: set[int] = set()
        for seed in range(60):
            found = identify(stats, "random_matched", like=like, seed=seed, neighbours=neighbours)
            drawn.add(int(found.mask("en")[2].nonzero()))
        probability = stats.probability()[0, 2]
        (goal,) = probability[like.mask("en")[2]].tolist()
        distance = (probability - goal).abs()
        distance[like.union_mask()[2]] = torch.inf
        assert drawn <= set((distance <= distance.sort().values[neighbours - 1]).nonzero()[:, 0].tolist())
        assert len(drawn) >= min(neighbours, 4)


def test_the_match_is_much_closer_than_that_of_numbers():
    stats = make_stats(4)
    like = make_set(stats)
    close = identify(stats, "random_matched", like=like)
    far = identify(stats, "random_matched", like=like, match="count")
    for k, code in enumerate(LANGUAGES):
        assert close.method["mean_difference"][code] < 0.25 * far.method["mean_difference"][code]
        differences = []
        for found in (close, far):
            total = 0.0
            for layer in range(SHAPE[0]):
                mine, theirs = (
                    sorted(stats.probability()[k, layer][s.mask(code)[layer]].tolist()) for s in (like, found)
                )
                total += sum(abs(a - b) for a, b in zip(mine, theirs))
            differences.append(total / like.counts()[code])
        assert differences == pytest.approx([s.method["mean_difference"][code] for s in (close, far)])
    # Sorted pairs are never further apart than the pairs that were drawn.
    assert close.method["mean_difference"]["en"] <= float(close.tables["en"].score.mean()) + 1e-12


def test_seeds_and_names_decide_and_nothing_else():
    stats = make_stats()
    like = make_set(stats)
    one, again, other = (identify(stats, "random_matched", like=like, seed=seed) for seed in (0, 0, 1))
    shuffled = identify(stats.select(["sw", "fr", "en"]), "random_matched", like=like.select(["fr", "sw", "en"]))
    state = torch.random.get_rng_state()
    identify(stats, "random_matched", like=like)
    assert torch.equal(torch.random.get_rng_state(), state)
    for code in LANGUAGES:
        assert torch.equal(one.mask(code), again.mask(code))
        assert torch.equal(one.mask(code), shuffled.mask(code))
        assert not torch.equal(one.mask(code), other.mask(code))
        assert torch.equal(one.tables[code].score, shuffled.tables[code].score)


def test_equal_probabilities_have_equal_chances():
    positive = {"en": torch.full((1, 12), 5), "fr": torch.full((1, 12), 5)}
    stats = ActivationStats.from_counts({"en": 10, "fr": 10}, positive)
    mask = torch.zeros(1, 12, dtype=torch.bool)
    mask[0, 3] = True
    like = NeuronSet.from_masks({"en": mask})
    drawn = [
        int(identify(stats, "random_matched", like=like, seed=seed, neighbours=1).mask("en").nonzero()[0, 1])
        for seed in range(150)
    ]
    assert set(drawn) == set(range(12)) - {3}


def test_what_comes_out_is_saved_and_cited(tmp_path):
    stats = make_stats()
    found = identify(stats, "random_matched", like=make_set(stats), seed=3)
    assert json.loads(json.dumps(found.method)) == found.method
    assert found.method["like"] == {"name": "lape", "top_rate": 0.1}
    found.save(tmp_path / "n.safetensors")
    assert torch.equal(NeuronSet.load(tmp_path / "n.safetensors").mask("sw"), found.mask("sw"))
    assert cite(found) == cite("lape")
    empty = NeuronSet.from_masks({code: torch.zeros(SHAPE, dtype=torch.bool) for code in LANGUAGES})
    assert identify(stats, "random_matched", like=empty).counts() == dict.fromkeys(LANGUAGES, 0)


def test_a_layer_may_be_used_up_but_not_more():
    stats = make_stats()
    masks = {code: torch.zeros(SHAPE, dtype=torch.bool) for code in ("en", "fr")}
    masks["en"][1, :60] = True
    found = identify(stats, "random_matched", like=NeuronSet.from_masks(masks))
    assert torch.equal(found.mask("en")[1], ~masks["en"][1])
    masks["fr"][1, 60] = True
    for match in ("probability", "count"):
        with pytest.raises(DataError, match="layer 1 has 59 free units, but 'en' needs 60"):
            identify(stats, "random_matched", like=NeuronSet.from_masks(masks), match=match)


def test_bad_input_is_a_sentence():
    stats = make_stats()
    like = make_set(stats)
    narrow = NeuronSet.from_masks({"en": torch.ones(3, 5, dtype=torch.bool)})
    shallow = NeuronSet.from_units({"en": torch.tensor([1])}, sites={"gate_act": SHAPE, "q": (2, 9)})
    elsewhere = NeuronSet.from_masks({"en": torch.zeros(SHAPE, dtype=torch.bool)}, site="post")
    several = NeuronSet.from_units({"en": torch.tensor([1])}, sites={"gate_act": SHAPE, "up": SHAPE})
    known = Provenance(model="m", weights="a", n_layers=3, d_mlp=120)
    cases = [
        (SettingError, "needs like=, a neuron set", stats, {}),
        (SettingError, "match='mean'", stats, {"like": like, "match": "mean"}),
        (SettingError, "neighbours=0", stats, {"like": like, "neighbours": 0}),
        (SettingError, "must be a whole number", stats, {"like": like, "seed": 0.5}),
        (ProvenanceError, r"\(3, 5\)", stats, {"like": narrow}),
        (ProvenanceError, r"\(3, 5\)", stats, {"like": narrow, "match": "count"}),
        (ProvenanceError, r"\(2, 9\) at q", stats, {"like": shallow, "match": "count"}),
        (ProvenanceError, "at post", stats, {"like": elsewhere}),
        (DataError, "gate_act, up", stats, {"like": several}),
        (DataError, "'sw' was not recorded", stats.select(["en", "fr"]), {"like": like}),
        (
            ProvenanceError,
            "weights",
            dataclasses.replace(stats, provenance=known),
            {"like": dataclasses.replace(like, provenance=known.replace(weights="b"))},
        ),
    ]
    for kind, message, data, settings in cases:
        with pytest.raises(kind, match=message) as caught:
            identify(data, "random_matched", **settings)
        assert isinstance(caught.value, LensNeuronsError)
        assert str(caught.value).endswith(".")
