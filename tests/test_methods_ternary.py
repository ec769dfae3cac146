"""Ternary classification against the paper's formula in plain loops, its search for lambda, and layer stages."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from test_methods_lape import as_lists, random_counts

from lens_neurons.activation_stats import ActivationStats
from lens_neurons.errors import DataError, SettingError
from lens_neurons.methods import cite, identify
from lens_neurons.methods.lape import lape
from lens_neurons.methods.ternary import (
    KINDS,
    STAGES,
    flatness,
    largest_lambda,
    layer_stages,
    scaled_maximum,
    segments,
    ternary,
)
from lens_neurons.neurons import NeuronSet

LANGUAGES = [f"group{i}" for i in range(10)]


def slow_scores(p, lam):
    """The score of methods.md section 6, one unit at a time; p[k][i][j]."""
    n, n_layers, n_neurons = len(p), len(p[0]), len(p[0][0])
    norm = sum(1 / k for k in range(1, n + 1)) / n
    scores = {}
    for i in range(n_layers):
        for j in range(n_neurons):
            values = [p[k][i][j] for k in range(n)]
            shares = [value / sum(values) for value in values] if sum(values) > 0 else [1 / n] * n
            entropy = -sum(max(share, 1e-12) * math.log(max(share, 1e-12)) for share in shares)
            scores[i, j] = entropy / math.log(n) - lam * max(values) / norm
    return scores


def slow_ternary(tokens, positive, top_rate, lam, bar_ratio):
    """Return the units of every language, and of every kind."""
    languages = list(positive)
    p = [(positive[k].double() / tokens[k]).tolist() for k in languages]
    ordered = sorted(value for own in p for row in own for value in row)
    bar = ordered[round(bar_ratio * len(ordered)) - 1]
    scores = slow_scores(p, lam)
    chosen = sorted(scores, key=lambda unit: (scores[unit], unit))[: round(top_rate * len(scores))]
    owned = {k: [] for k in languages}
    kinds = {name: set() for name in KINDS}
    for i, j in chosen:
        over = [k for number, k in enumerate(languages) if p[number][i][j] > bar]
        for k in over:
            owned[k].append((i, j))
        if over:
            kinds["specific" if len(over) == 1 else "general" if len(over) == len(languages) else "related"].add((i, j))
    return owned, kinds


def kinds_of(found: NeuronSet) -> dict[str, set]:
    frame = found.to_frame()
    return {
        name: {(int(i), int(j)) for i, j in frame.loc[frame["kind"] == name, ["layer", "neuron"]].to_numpy()}
        for name in KINDS
    }


def counts_of(p: np.ndarray, tokens: int = 1000) -> ActivationStats:
    """Return statistics with given activation probabilities [language, layer, neuron]."""
    positive = {code: torch.from_numpy((part * tokens).round().astype(np.int64)) for code, part in zip(LANGUAGES, p)}
    return ActivationStats.from_counts(dict.fromkeys(positive, tokens), positive)


def noisy(seed: int, shape: tuple[int, int, int], general: float = 0.1) -> np.ndarray:
    """Return probabilities of units that fire rarely or often, alike for all languages or not."""
    draw = np.random.default_rng(seed)
    usual = draw.random(shape[1:]) ** 3 * 0.6
    usual = np.where(draw.random(shape[1:]) < general, 0.7 + 0.25 * draw.random(shape[1:]), usual)
    return np.clip(usual * np.exp(0.7 * draw.standard_normal(shape) * (usual < 0.7)), 0, 0.99)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("shape", "n_languages", "settings"),
    [
        ((3, 37), 5, (0.1, 0.0, 0.95)),
        ((3, 37), 10, (0.1, 0.08, 0.9)),
        ((1, 101), 2, (0.3, 0.3, 0.8)),
        ((7, 11), 4, (1.0, 0.15, 0.6)),
    ],
)
def test_equals_a_slow_transcription(seed, shape, n_languages, settings):
    top_rate, lam, bar_ratio = settings
    tokens, positive = random_counts(seed, shape, LANGUAGES[:n_languages], sparse=0.3)
    found = ternary(ActivationStats.from_counts(tokens, positive), top_rate, lam, bar_ratio)
    owned, kinds = slow_ternary(tokens, positive, top_rate, lam, bar_ratio)
    assert {k: set(v) for k, v in as_lists(found).items()} == {k: set(v) for k, v in owned.items()}
    assert kinds_of(found) == kinds
    scores = slow_scores([(positive[k].double() / tokens[k]).tolist() for k in positive], lam)
    for code in found.languages:
        table = found.tables[code]
        wanted = [scores[unit] for unit in zip(table.layer.tolist(), table.index.tolist())]
        assert table.score.tolist() == pytest.approx(wanted, abs=1e-9)
        assert torch.equal(table.score, table.score.sort().values)


def test_the_norm_is_the_papers():
    p = torch.zeros(10, 1, 2, dtype=torch.float64)
    p[3, 0, 0] = 0.2929
    assert float(scaled_maximum(p)[0, 0]) == pytest.approx(1, abs=1e-4)
    assert flatness(p)[0].tolist() == pytest.approx([0, 1])


@pytest.mark.parametrize("seed", range(5))
def test_the_largest_lambda_is_that_of_a_grid(seed):
    draw = np.random.default_rng(seed)
    ends = set()
    for trial in range(60):
        size, steps, most = int(draw.integers(3, 30)), int(draw.choice([50, 200])), float(draw.choice([0.2, 1.0]))
        flat, height = draw.random(size), 3 * draw.random(size)
        if trial % 2:  # heavy ties, also on steps of the grid
            flat, height = (flat * 5).round() / 5, height.round()
        general, n = draw.random(size) < draw.choice([0.1, 0.3]), int(draw.integers(1, max(2, size // 2)))
        wanted = None
        for step in range(round(most * steps), -1, -1):
            scores = flat - step / steps * height
            chosen = sorted(range(size), key=lambda i: (scores[i], i))[:n]
            if not general[chosen].any():
                wanted = step / steps
                break
        parts = (torch.from_numpy(part) for part in (flat, height, general))
        assert largest_lambda(*parts, n, most, steps) == wanted
        ends.add("none" if wanted is None else "most" if wanted == most else "inside")
    assert ends == {"none", "most", "inside"}


def test_a_general_unit_may_come_and_go():
    # It is best between 0.05 and 0.1 alone, so a bisection that looks at 0.1, 0.05, 0.075 would end at 0.05.
    flat = torch.tensor([0.30, 0.40, 0.60], dtype=torch.float64)
    height = torch.tensor([0.0, 2.0, 4.0], dtype=torch.float64)
    general = torch.tensor([False, True, False])
    best = [int((flat - lam * height).argmin()) for lam in (0.04, 0.06, 0.09, 0.11, 0.2)]
    assert best == [0, 1, 1, 2, 2]
    assert largest_lambda(flat, height, general, 1) == 0.2
    assert largest_lambda(flat, height, general, 1, most=0.09) == pytest.approx(0.05, abs=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_the_searched_lambda_leaves_no_general_unit_and_no_larger_one_does(seed):
    stats = counts_of(noisy(seed, (4, 6, 50), general=0.3))
    found = identify(stats, method="ternary", top_rate=0.35, activation_bar_ratio=0.7)
    lam = found.method["lam"]
    assert 0 < lam < 0.2
    assert found.method["lam_searched"]
    assert found.notes == ()
    assert not kinds_of(found)["general"]
    later = [lam + 1e-6, *np.arange(math.floor(lam * 1000 + 1) / 1000, 0.2005, 1e-3)]
    for larger in later:
        assert kinds_of(ternary(stats, 0.35, float(larger), 0.7))["general"]


def test_where_general_units_cannot_be_kept_out_lambda_is_0_and_says_so():
    found = ternary(counts_of(noisy(0, (3, 2, 50), general=0.3)), top_rate=1.0, activation_bar_ratio=0.5)
    assert (found.method["lam"], found.method["lam_searched"]) == (0.0, True)
    assert kinds_of(found)["general"]
    assert "at every lam" in found.notes[0]


def test_planted_units_of_the_three_kinds_are_found():
    draw = np.random.default_rng(0)
    p = 0.05 + 0.1 * draw.random((10, 4, 100)) * np.ones(1)
    p[2, 1, 7] = 0.9
    p[[0, 4, 5], 2, 8] = 0.9
    p[:, 3, 9] = 0.9
    stats = counts_of(p)
    found = ternary(stats, top_rate=0.005, activation_bar_ratio=0.98)
    assert kinds_of(found) == {"specific": {(1, 7)}, "related": {(2, 8)}, "general": set()}
    assert as_lists(found)[LANGUAGES[4]] == [(2, 8)]
    found = ternary(stats, top_rate=0.0075, lam=0.15, activation_bar_ratio=0.98)
    assert kinds_of(found) == {"specific": {(1, 7)}, "related": {(2, 8)}, "general": {(3, 9)}}
    assert all((3, 9) in own for own in as_lists(found).values())
    assert found.of_kind("general").counts() == dict.fromkeys(LANGUAGES, 1)


def test_dead_and_constant_units_are_never_found():
    p = noisy(1, (5, 3, 80))
    p[:, 0, :30] = 0
    p[:, 1, :30] = 0.7
    for top_rate in (0.05, 0.3):
        found = ternary(counts_of(p), top_rate=top_rate, activation_bar_ratio=0.9)
        assert len(found)
        assert not found.union_mask()[:2, :30].any()
    assert not ternary(counts_of(p), 1.0, 0.1, 0.9).union_mask()[0, :30].any()


def test_permuted_languages_and_neurons_permute_the_answer():
    p = noisy(2, (5, 3, 70))
    found = ternary(counts_of(p), top_rate=0.2)
    rng = np.random.default_rng(0)
    languages, neurons = rng.permutation(5), rng.permutation(70)
    codes = [LANGUAGES[k] for k in languages]
    stats = counts_of(p)
    other = ternary(stats.select(codes), top_rate=0.2)
    assert other.method == found.method
    assert as_lists(other) == {code: as_lists(found)[code] for code in codes}
    moved = ternary(counts_of(p[:, :, neurons]), top_rate=0.2)
    for code in found.languages:
        assert torch.equal(moved.mask(code), found.mask(code)[:, neurons])


def test_scores_are_bit_equal_in_any_order_of_the_languages():
    p = torch.rand(10, 20, 100, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(10, generator=torch.Generator().manual_seed(1))
    assert torch.equal(flatness(p), flatness(p[order]))
    assert torch.equal(scaled_maximum(p), scaled_maximum(p[order]))


def test_ties_go_to_the_first_layer_and_neuron():
    p = np.zeros((2, 2, 10))
    p[0] = 0.5
    p[1, 1, 9] = 0.01
    # Everything is above the bar, a language that never fires apart.
    found = ternary(counts_of(p), top_rate=0.15, lam=0.0, activation_bar_ratio=0.3)
    assert as_lists(found)[LANGUAGES[0]] == [(0, 0), (0, 1), (0, 2)]
    assert found.counts()[LANGUAGES[1]] == 0


def test_the_set_is_saved_with_its_kinds_and_cited(tmp_path):
    found = ternary(counts_of(noisy(3, (4, 3, 60))), top_rate=0.2, lam=0.05)
    found.save(tmp_path / "set.safetensors")
    assert kinds_of(NeuronSet.load(tmp_path / "set.safetensors")) == kinds_of(found)
    assert json.loads(json.dumps(found.method)) == found.method
    assert "2505.21505" in cite(found)


def test_bad_settings_are_sentences():
    stats = counts_of(noisy(0, (3, 2, 20)))
    for setting, message in {
        "top_rate": "top_rate=0",
        "activation_bar_ratio": "activation_bar_ratio=0",
    }.items():
        with pytest.raises(SettingError, match=message):
            ternary(stats, **{setting: 0})
    with pytest.raises(SettingError, match=r"top_rate=0\.01 of 40 units is none"):
        ternary(stats)
    with pytest.raises(DataError, match="at least two"):
        ternary(stats.select(LANGUAGES[:1]))
    for lam in (-0.1, math.inf, math.nan):
        with pytest.raises(SettingError, match="lam="):
            ternary(stats, top_rate=0.5, lam=lam)
    for lam in ("a", True):
        with pytest.raises(SettingError, match=r"lam=.* must be a number"):
            identify(stats, method="ternary", top_rate=0.5, lam=lam)


def staged(shares: list[float], width: int = 400) -> NeuronSet:
    """Return units of two languages whose share of each layer is given, every other one of both."""
    mask = torch.zeros(len(shares), width, dtype=torch.bool)
    for layer, share in enumerate(shares):
        mask[layer, : round(share * width)] = True
    odd = mask & (torch.arange(width) % 2 == 1)
    empty = torch.zeros_like(mask)
    return NeuronSet.from_masks(
        {"en": mask, "fr": odd, "sw": empty}, kinds={"specific": mask & ~odd, "related": odd, "general": empty}
    )


def test_stages_are_the_planted_ones():
    shares = [0.3] * 3 + [0.02] * 9 + [0.15] * 5 + [0.05] * 2
    noise = 0.005 * np.random.default_rng(0).standard_normal(len(shares))
    stages = layer_stages(staged([a + b for a, b in zip(shares, noise)]))
    assert [tuple(stage) for stage in stages] == list(zip(STAGES, (0, 3, 12, 17), (2, 11, 16, 18)))
    assert stages[0].name == "multilingual understanding"


def test_general_units_have_no_part_in_the_stages():
    neurons = staged([0.3] * 3 + [0.02] * 9 + [0.15] * 5 + [0.05] * 2)
    everywhere = torch.zeros(neurons.shape, dtype=torch.bool)
    everywhere[5:8, 300:] = True
    masks = {code: neurons.mask(code) | everywhere for code in neurons.languages}
    kinds = {name: neurons.of_kind(name).union_mask() for name in ("specific", "related")}
    assert layer_stages(NeuronSet.from_masks(masks, kinds={**kinds, "general": everywhere})) == layer_stages(neurons)
    # A method without kinds: by the number of languages that a unit belongs to.
    assert layer_stages(NeuronSet.from_masks(masks)) == layer_stages(neurons)


@pytest.mark.parametrize("seed", range(5))
def test_segments_are_the_best_of_all(seed):
    values = np.random.default_rng(seed).random(9)
    least = 1 + seed % 2
    errors, firsts = segments(values, 4, least)
    for runs in range(1, 5):
        costs = {}
        for cuts in itertools.combinations(range(1, 9), runs - 1):
            bounds = [0, *cuts, 9]
            if min(b - a for a, b in itertools.pairwise(bounds)) < least:
                continue
            parts = [values[a:b] for a, b in itertools.pairwise(bounds)]
            costs[tuple(bounds[:-1])] = sum(((part - part.mean()) ** 2).sum() for part in parts)
        assert errors[runs - 1] == pytest.approx(min(costs.values()))
    assert tuple(firsts) == min(costs, key=costs.get)


def test_stages_that_cannot_be_told_are_sentences():
    with pytest.raises(DataError, match="7 layers are too few"):
        layer_stages(staged([0.1, 0.2, 0.3, 0.4, 0.1, 0.2, 0.3]))
    for shares in ([0.0] * 12, [0.3] * 4 + [0.1] * 8):
        with pytest.raises(DataError, match="too few layers to tell four stages apart"):
            layer_stages(staged(shares))


def test_stages_of_a_published_set(shared):
    path = shared / "golden" / "LLaMA-2-7B.neuron.pth"
    languages = ["en", "zh", "fr", "es", "vi", "id", "ja"]
    stages = layer_stages(NeuronSet.from_published(path, languages=languages, shape=(32, 11008)))
    # 1144 units in layer 0, few in layers 2 to 18, many from 19 on.
    assert [(stage.first, stage.last) for stage in stages] == [(0, 1), (2, 18), (19, 21), (22, 31)]


def test_counts_of_a_language_without_text_are_refused_before():
    with pytest.raises(DataError, match="at least 1"):
        ActivationStats.from_counts({"en": 10, "fr": 0}, dict.fromkeys(("en", "fr"), torch.zeros(1, 4).long()))


def test_takes_what_lape_takes():
    stats = counts_of(noisy(0, (3, 2, 50)))
    assert lape(stats, top_rate=0.1).shape == ternary(stats, top_rate=0.1).shape
