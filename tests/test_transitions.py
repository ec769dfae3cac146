"""One model against another: classes counted by hand, resamples drawn by hand, and what must not differ."""

import dataclasses
import functools
import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from models import SAMPLE_TEXTS, save_folder, tiny
from results import make_partial

from lens_neurons.activation_stats import ActivationStats
from lens_neurons.corpus import Corpus
from lens_neurons.errors import DataError, SettingError, StorageError
from lens_neurons.methods import identify
from lens_neurons.model import load_model
from lens_neurons.recorded import Recording
from lens_neurons.recording import record
from lens_neurons.resampling import drawable
from lens_neurons.responses import TextResponses
from lens_neurons.storage import Provenance, derive_seed, load_tensors
from lens_neurons.transitions import CLASSES, ModelComparison, compare_models

CODES = ("en", "fr", "sw", "ta")
SETTINGS = {"top_rate": 0.3, "lam": 0.1, "activation_bar_ratio": 0.8, "progress": False}


def made_up(seed: int, shape: tuple[int, int] = (3, 60)) -> np.ndarray:
    """Return activation probabilities [language, layer, neuron]: some units are of one language, or of two."""
    draw = np.random.default_rng(seed)
    p = 0.3 * draw.random((len(CODES), *shape)) ** 2
    p[:, draw.random(shape) < 0.15] += 0.5
    for some in ((0,), (1,), (2, 3)):
        mask = draw.random(shape) < 0.1
        p[np.ix_(some)] = np.where(mask, 0.6 + 0.2 * draw.random(shape), p[np.ix_(some)])
    return p


def stats_of(p: np.ndarray, tokens: int = 500, seed: int | None = None, **provenance) -> ActivationStats:
    """Return counts of given probabilities: rounded, or drawn."""
    positive = {}
    for code, part in zip(CODES, p, strict=True):
        exact = (part * tokens).round().astype(np.int64)
        drawn = exact if seed is None else np.random.default_rng([seed, len(positive)]).binomial(tokens, part)
        positive[code] = torch.from_numpy(drawn)
    known = Provenance(n_layers=p.shape[1], d_mlp=p.shape[2], **provenance)
    return ActivationStats.from_counts(dict.fromkeys(positive, tokens), positive, provenance=known)


def slow_class(masks, layer: int, neuron: int) -> str:
    owners = sum(bool(mask[layer, neuron]) for mask in masks)
    return "none" if not owners else "specific" if owners == 1 else "general" if owners == len(masks) else "related"


def slow_classes(stats: ActivationStats, method: str, **settings) -> dict[tuple[int, int], str]:
    found = identify(stats, method, **settings)
    masks = [found.mask(code) for code in found.languages]
    layers, width = found.shape
    return {(i, j): slow_class(masks, i, j) for i in range(layers) for j in range(width)}


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("ternary", {"top_rate": 0.3, "lam": 0.1, "activation_bar_ratio": 0.8}),
        ("ternary", {"top_rate": 0.6, "activation_bar_ratio": 0.7}),
        ("lape", {"top_rate": 0.3, "activation_bar_ratio": 0.7}),
    ],
)
def test_classes_are_counted_as_by_hand(method, settings):
    before, after = stats_of(made_up(0)), stats_of(made_up(1))
    found = compare_models(before, after, method, n_resamples=0, **settings)
    old, new = (slow_classes(stats, method, **settings) for stats in (before, after))
    assert len(set(old.values())) > 2
    for row in found.transitions.itertuples():
        assert row.units == sum((old[unit], new[unit]) == (row.before, row.after) for unit in old)
    for row in found.layers.itertuples():
        counts = [sum(u[0] == row.layer and kind == row.kind for u, kind in one.items()) for one in (old, new)]
        assert [row.before, row.after, row.change] == [*counts, counts[1] - counts[0]]
    for row in found.kinds.itertuples():
        counts = [list(one.values()).count(row.kind) for one in (old, new)]
        assert [row.before, row.after, row.change] == [*counts, counts[1] - counts[0]]
    sets = [identify(stats, method, **settings) for stats in (before, after)]
    for row in found.languages.itertuples():
        masks = [one.mask(row.language) for one in sets]
        assert (row.before, row.after) == (int(masks[0].sum()), int(masks[1].sum()))
        assert row.shared == int((masks[0] & masks[1]).sum())
    listed = {(row.layer, row.neuron): (row.before, row.after) for row in found.units.itertuples()}
    assert listed == {unit: (old[unit], new[unit]) for unit in old if (old[unit], new[unit]) != ("none", "none")}
    assert found.transitions["units"].sum() == found.matrix().to_numpy().sum() == 180
    assert found.matrix().loc["specific", "none"] == sum((old[u], new[u]) == ("specific", "none") for u in old)
    assert found.kinds[["low", "high"]].isna().all().all()


def test_the_other_way_round_everything_is_turned():
    before, after = stats_of(made_up(0)), stats_of(made_up(1))
    found, turned = (compare_models(*pair, n_resamples=0, **SETTINGS) for pair in ((before, after), (after, before)))
    pd.testing.assert_frame_equal(
        found.matrix(), turned.matrix().T.rename_axis(index="before", columns="after"), check_names=True
    )
    for name in ("kinds", "layers", "languages"):
        assert (getattr(found, name)["change"] == -getattr(turned, name)["change"]).all()


def test_permuted_languages_and_neurons_change_nothing_but_their_places():
    a, b = made_up(0), made_up(1)
    found = compare_models(stats_of(a), stats_of(b), n_resamples=0, **SETTINGS)
    order = np.random.default_rng(0).permutation(60)
    moved = compare_models(stats_of(a[:, :, order]), stats_of(b[:, :, order]), n_resamples=0, **SETTINGS)
    pd.testing.assert_frame_equal(found.transitions, moved.transitions)
    pd.testing.assert_frame_equal(found.layers, moved.layers)
    turned = compare_models(stats_of(a), stats_of(b).select(CODES[::-1]), n_resamples=0, **SETTINGS)
    pd.testing.assert_frame_equal(found.languages, turned.languages)


def test_planted_changes_are_found():
    p = np.full((4, 4, 100), 0.1) + 0.01 * np.random.default_rng(0).random((4, 4, 100))
    p[0, 1, :5] = p[1, 2, :3] = 0.9
    after = p.copy()
    after[2, 1, 0] = 0.9  # becomes related
    after[0, 1, 4] = 0.1  # is nothing any more
    settings = {"top_rate": 0.02, "lam": 0.1, "activation_bar_ratio": 0.995, "progress": False}
    found = compare_models(stats_of(p, 2000), stats_of(after, 2000), n_resamples=20, **settings)
    moved = found.matrix().loc[["specific", "related"]]
    assert moved.to_numpy().tolist() == [[1, 6, 1, 0], [0, 0, 0, 0]]
    kinds = found.kinds.set_index("kind")
    assert kinds["change"].tolist() == [-2, 1, 0]
    assert (kinds.loc["specific", "low"], kinds.loc["specific", "high"]) == (-2, -2)
    layer = found.layers[(found.layers["layer"] == 1) & (found.layers["kind"] == "related")]
    assert layer[["before", "after", "change", "low", "high"]].to_numpy().tolist() == [[0, 1, 1, 1, 1]]


def test_intervals_are_those_of_counts_drawn_by_hand():
    before, after = stats_of(made_up(0)), stats_of(made_up(1))
    n, effect = 12, 2.0
    found = compare_models(before, after, n_resamples=n, design_effect=effect, seed=5, confidence=0.9, **SETTINGS)
    settings = {name: value for name, value in SETTINGS.items() if name != "progress"}
    classes: list[list[list[str]]] = []
    for number in range(n):
        row = []
        for stats, place in ((before, "before"), (after, "after")):
            positive = {}
            for k, code in enumerate(CODES):
                seed = derive_seed(derive_seed(5, "transitions", number, place), code)
                share = stats.positive[k].numpy() / 500
                positive[code] = torch.from_numpy(np.random.default_rng(seed).binomial(250, share))
            drawn = ActivationStats.from_counts(dict.fromkeys(positive, 250), positive)
            row.append(list(slow_classes(drawn, "ternary", **settings).values()))
        classes.append(row)
    for row in found.transitions.itertuples():
        counts = [list(zip(*pair)).count((row.before, row.after)) for pair in classes]
        assert (row.low, row.high) == pytest.approx(np.quantile(counts, [0.05, 0.95]))
        noise = [
            list(zip(one[place], other[place])).count((row.before, row.after))
            for one, other in itertools.pairwise(classes)
            for place in (0, 1)
        ]
        assert row.noise == pytest.approx(np.mean(noise))
    for row in found.kinds.itertuples():
        changes = [new.count(row.kind) - old.count(row.kind) for old, new in classes]
        assert (row.low, row.high) == pytest.approx(np.quantile(changes, [0.05, 0.95]))


def test_a_design_effect_widens_the_intervals():
    pair = stats_of(made_up(0), seed=0), stats_of(made_up(1), seed=1)
    widths = []
    for effect in (1, 10):
        kinds = compare_models(*pair, n_resamples=60, design_effect=effect, **SETTINGS).kinds
        widths.append(float((kinds["high"] - kinds["low"]).sum()))
    assert widths[1] > 1.5 * widths[0]


def test_a_model_measured_twice_shows_no_change():
    """The intervals of the changes hold 0 in nearly all cases, and the units that move are as many as noise says."""
    p, held, trials = made_up(0), 0, 8
    moved, noise = [], []
    for trial in range(trials):
        pair = stats_of(p, 1000, seed=2 * trial), stats_of(p, 1000, seed=2 * trial + 1)
        found = compare_models(*pair, n_resamples=40, **SETTINGS)
        held += int(((found.kinds["low"] <= 0) & (found.kinds["high"] >= 0)).sum())
        off = found.transitions["before"] != found.transitions["after"]
        moved.append(found.transitions.loc[off, "units"].sum())
        noise.append(found.transitions.loc[off, "noise"].sum())
    assert held >= 0.8 * 3 * trials
    assert np.mean(moved) == pytest.approx(np.mean(noise), rel=0.4)


# From the shards of recordings.


@functools.cache
def loaded(seed: int):
    folder = tiny("llama").folder if not seed else tiny("llama").folder.parent / f"tiny-llama-{seed}"
    if seed and not folder.exists():
        save_folder(folder, "llama", seed=seed)
    return load_model(folder)


TEXTS = {"en": [f"{text} {text[::-1]}" for text in SAMPLE_TEXTS], "fr": [text.upper() for text in SAMPLE_TEXTS]}
SHARDED = {"shard_tokens": 30, "progress": False}
WIDE = {"top_rate": 0.3, "lam": 0.1, "activation_bar_ratio": 0.7, "progress": False}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("recordings")
    for seed in (0, 1):
        record(loaded(seed), Corpus.from_texts(TEXTS), root / str(seed), **SHARDED)
    record(loaded(0), Corpus.from_texts({code: own[::-1] for code, own in TEXTS.items()}), root / "turned", **SHARDED)
    return root


def test_shards_of_the_same_texts_are_drawn_together(folders):
    same = compare_models(folders / "0", folders / "0", n_resamples=8, **WIDE)
    assert same.settings["paired"]
    assert same.settings["drawn"] == ["shards", "shards"]
    off = same.transitions["before"] != same.transitions["after"]
    assert (same.transitions.loc[off, ["units", "low", "high"]] == 0).all().all()
    assert same.transitions.loc[off, "noise"].sum() > 0
    assert "the same weights" in same.notes[0]
    other = compare_models(folders / "0", folders / "1", n_resamples=8, **WIDE)
    assert other.settings["paired"]
    assert other.matrix().loc["none", "specific"] > 0
    assert not any("differ in" in note for note in other.notes)
    turned = compare_models(folders / "0", folders / "turned", n_resamples=8, **WIDE)
    assert not turned.settings["paired"]
    assert any("differ in corpus" in note for note in turned.notes)


def test_a_resample_is_the_sum_of_whole_shards(folders):
    side = drawable(folders / "0", "ternary", 1.0, intervals=True)
    drawn = side.resample(("fr", "en"), 3)
    whole = ActivationStats.load(folders / "0")
    assert torch.equal(side.whole.positive, whole.positive)
    assert drawn.languages == ("fr", "en")
    for code in ("en", "fr"):
        n = side.sizes[code]
        pick = np.random.default_rng(derive_seed(3, code)).integers(0, n, n)
        files = sorted((folders / "0" / "shards").glob(f"{code}-*"), key=lambda file: int(file.stem.split("-")[1]))
        assert len(files) == n
        parts = [load_tensors(files[i])[0] for i in pick]
        assert torch.equal(drawn.positive[drawn.index(code)], sum(part["positive"] for part in parts))


def test_the_folder_and_the_statistics_in_it_say_the_same(folders):
    pair = [ActivationStats.load(folders / name) for name in ("0", "1")]
    found = compare_models(folders / "0", folders / "1", n_resamples=0, **WIDE)
    for data in (pair, [Recording(stats=stats) for stats in pair]):
        other = compare_models(*data, n_resamples=0, **WIDE)
        for name in ("transitions", "kinds", "layers", "languages", "units"):
            pd.testing.assert_frame_equal(getattr(found, name), getattr(other, name))
    mixed = compare_models(folders / "0", pair[1], n_resamples=6, **WIDE)
    assert mixed.settings["drawn"] == ["shards", "tokens"]
    assert any("independent tokens" in note for note in mixed.notes)


def test_methods_that_need_sums_or_responses(folders):
    found = compare_models(
        folders / "0", folders / "1", "mean_difference", n_resamples=5, units_per_language=10, progress=False
    )
    assert found.languages["before"].tolist() == [10, 10]
    stats = ActivationStats.load(folders / "0")
    assert len(compare_models(stats, stats, "mean_difference", n_resamples=0).units) > 0
    with pytest.raises(SettingError, match="only counts can be drawn anew"):
        compare_models(stats, stats, "mean_difference")
    rows = torch.rand(2, 9, 10, generator=torch.Generator().manual_seed(0))
    sites = {"gate_pre": (2, 3), "q": (1, 4)}
    one, other = (TextResponses.from_rows({"en": own, "fr": 1 - own}, sites=sites, statistic="mean") for own in rows)
    found = compare_models(one, other, "average_precision", n_resamples=5, progress=False, k=2)
    assert found.settings["drawn"] == ["texts", "texts"]
    assert list(dict.fromkeys(found.layers["site"])) == ["gate_pre", "q"]
    assert len(found.layers) == 3 * (2 + 1)
    with pytest.raises(DataError, match="not statistics"):
        compare_models(stats, stats, "average_precision")


def test_sums_of_shards_in_memory():
    draw = np.random.default_rng(0)
    parts = {
        code: [make_partial(draw.normal(size=(40, 2, 30)) + shift, positions=[]) for _ in range(6)]
        for code, shift in (("en", 0.0), ("fr", 0.8))
    }
    found = compare_models(parts, parts, n_resamples=4, top_rate=0.3, activation_bar_ratio=0.5, progress=False)
    assert found.settings["sizes"] == [{"en": 6, "fr": 6}] * 2
    # Nothing says that these are the same texts.
    assert not found.settings["paired"]
    few = {code: own[:4] for code, own in parts.items()}
    with pytest.raises(DataError, match=r"at least 5 shards a language \(en: 4, fr: 4\)"):
        compare_models(few, parts, top_rate=0.3)
    assert any("6 shards only" in note for note in found.notes)


def test_what_must_agree():
    stats = stats_of(made_up(0))
    for other, message in {
        "languages": (stats.select(CODES[:3]), "select\\(\\) the same"),
        "shape": (stats_of(made_up(0, (2, 90))), "one shape"),
        "site": (dataclasses.replace(stats, site="post"), "same site"),
    }.values():
        with pytest.raises(DataError, match=message):
            compare_models(stats, other, **SETTINGS)


def test_bad_settings_are_sentences():
    stats = stats_of(made_up(0))
    for wrong in ({"n_resamples": -1}, {"design_effect": 0.5}, {"confidence": 1.0}):
        with pytest.raises(SettingError, match=f"{next(iter(wrong))}="):
            compare_models(stats, stats, **SETTINGS, **wrong)
    with pytest.raises(SettingError, match="method='nope' is unknown"):
        compare_models(stats, stats, "nope")
    with pytest.raises(SettingError, match="no setting 'rate'"):
        compare_models(stats, stats, rate=1, n_resamples=0)
    found = compare_models(stats, stats, n_resamples=0, **SETTINGS)
    with pytest.raises(SettingError, match="column='p' is unknown"):
        found.matrix("p")
    with pytest.raises(StorageError, match="nowhere"):
        compare_models("nowhere", stats)


def test_notes_say_what_differs():
    one = stats_of(made_up(0), corpus="a", weights="w", policy={"bos": "never"}, tokenizer="t")
    other = stats_of(made_up(1), corpus="b", weights="v", policy={"bos": "always"}, tokenizer="t")
    found = compare_models(one, other, n_resamples=0, top_rate=0.6, activation_bar_ratio=0.7, progress=False)
    assert any("differ in corpus, policy" in note for note in found.notes)
    lams = found.settings["before"]["lam"], found.settings["after"]["lam"]
    assert lams[0] != lams[1]
    assert any("lambda was searched in each model" in note for note in found.notes)
    assert compare_models(one, one, n_resamples=0, **SETTINGS).notes[0].startswith("both are of the same weights")


def test_saved_and_shown(tmp_path):
    one, other = stats_of(made_up(0), model="a"), stats_of(made_up(1), model="b")
    found = compare_models(one, other, n_resamples=4, **SETTINGS)
    found.save(tmp_path / "changes.json")
    again = ModelComparison.load(tmp_path / "changes.json")
    for name in ("transitions", "kinds", "layers", "languages", "units"):
        pd.testing.assert_frame_equal(getattr(found, name), getattr(again, name), check_dtype=False)
    assert (again.notes, dict(again.settings)) == (found.notes, dict(found.settings))
    assert (again.before.model, again.after.model) == ("a", "b")
    assert repr(again) == repr(found)
    assert repr(found).startswith("ModelComparison(ternary; specific: ")
    assert " to " in repr(found)
    assert list(found.to_frame()["before"].unique()) == list(CLASSES)


def test_resamples_do_not_depend_on_their_number():
    pair = stats_of(made_up(0)), stats_of(made_up(1))
    first = compare_models(*pair, n_resamples=5, confidence=0.999999, **SETTINGS)
    more = compare_models(*pair, n_resamples=9, confidence=0.999999, **SETTINGS)
    assert (more.kinds["low"] <= first.kinds["low"] + 1e-3).all()
    assert (more.kinds["high"] >= first.kinds["high"] - 1e-3).all()
    pd.testing.assert_frame_equal(
        first.transitions, compare_models(*pair, n_resamples=5, confidence=0.999999, **SETTINGS).transitions
    )
