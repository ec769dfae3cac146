"""Stability: halves against a transcription that adds counts by hand; planted units, chance level, stop rule."""

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch
from models import SAMPLE_TEXTS, tiny_llama
from oracle import sentence

from lens_neurons.activation_stats import ActivationStats
from lens_neurons.collecting import PartialSums
from lens_neurons.corpus import Corpus
from lens_neurons.errors import DataError, SettingError, StorageError
from lens_neurons.methods import identify
from lens_neurons.methods.lape import lape
from lens_neurons.methods.registry import method
from lens_neurons.model import load_model
from lens_neurons.neurons import NeuronSet
from lens_neurons.recorded import Recording
from lens_neurons.recording import record
from lens_neurons.responses import TextResponses
from lens_neurons.split_halves import Stability, UntilStable, stability, until_stable
from lens_neurons.storage import derive_seed, save_json

LAYERS, WIDTH = 2, 60
SETTINGS = {"top_rate": 0.2, "filter_rate": 0.5, "activation_bar_ratio": 0.8}


def shards(
    probability: Mapping[str, np.ndarray], numbers: Mapping[str, int], tokens: int = 40, seed: int = 0
) -> dict[str, list[PartialSums]]:
    """Return shards whose counts are drawn from the activation probabilities of each language [layer neuron]."""
    draw = np.random.default_rng(seed)
    found: dict[str, list[PartialSums]] = {}
    for code, chances in probability.items():
        found[code] = []
        for k in range(numbers[code]):
            counted = tokens + k % 3
            fired = torch.from_numpy(draw.binomial(counted, chances))
            means = torch.zeros(1, *chances.shape)
            found[code].append(
                PartialSums(
                    tokens=counted,
                    texts=2,
                    positive=fired,
                    sum=fired.double(),
                    sum_sq=fired.double() * 2,
                    sum_positive=fired.double(),
                    # Only the first shards keep means of texts, as in a recording.
                    row_positions=torch.tensor([0]) if k < 2 else torch.zeros(0, dtype=torch.int64),
                    rows=means if k < 2 else means[:0],
                )
            )
    return found


def different(strength: float = 0.5) -> dict[str, np.ndarray]:
    """Return probabilities: ten units of each of three languages fire there alone, all others everywhere alike."""
    usual = np.random.default_rng(1).uniform(0.1, 0.3, (LAYERS, WIDTH))
    made = {code: usual.copy() for code in ("en", "nl", "ja")}
    for k, chances in enumerate(made.values()):
        chances[1, 10 * k : 10 * k + 10] += strength
    return made


PARTS = shards(different(0.15), {"en": 9, "nl": 8, "ja": 12})


def by_hand(parts: Mapping[str, Sequence[PartialSums]], split: int, fraction: float, seed: int) -> list[NeuronSet]:
    sets = []
    for side in range(2):
        tokens, positive = {}, {}
        for code, own in parts.items():
            order = np.random.default_rng(derive_seed(seed, "split", split, code)).permutation(len(own))
            half = len(own) // 2
            mine = order[side * half :][: max(1, round(fraction * half))]
            tokens[code] = sum(own[i].tokens for i in mine)
            positive[code] = sum(own[i].positive for i in mine)
        sets.append(lape(ActivationStats.from_counts(tokens, positive), **SETTINGS))
    return sets


def test_halves_are_those_added_by_hand() -> None:
    found = stability(PARTS, "lape", **SETTINGS, n_splits=3, fractions=(0.5, 1.0), seed=7)
    table = found.splits.set_index(["split", "fraction", "language"])
    assert len(table) == 3 * 2 * 3
    for split in range(3):
        for fraction in (0.5, 1.0):  # of 4, 4 and 6 shards, so exactly that
            one, other = by_hand(PARTS, split, fraction, 7)
            for code in PARTS:
                mine, theirs = set(one.flat(code).tolist()), set(other.flat(code).tolist())
                row = table.loc[(split, fraction, code)]
                assert row["shared"] == len(mine & theirs)
                assert row["jaccard"] == pytest.approx(len(mine & theirs) / len(mine | theirs))
                assert row["units"] == (len(mine) + len(theirs)) / 2
    half_of = {"en": 4, "nl": 4, "ja": 6}
    for code, n in half_of.items():
        rows = found.splits[(found.splits["language"] == code) & (found.splits["fraction"] == 1.0)]
        assert (rows["texts"] == 2 * n).all()
        assert rows["tokens"].between(40 * n, 42 * n).all()


def test_summaries_are_over_splits() -> None:
    found = stability(PARTS, **SETTINGS, n_splits=8, fractions=(0.25, 1.0))
    rows = found.splits
    curve = found.curve(confidence=0.8).set_index(["fraction", "language"])
    # One of 4, one of 4 and two of 6 shards are drawn.
    quarter = (1 / 4 + 1 / 4 + 2 / 6) / 3
    assert found.fractions == pytest.approx((quarter, 1.0))
    for fraction in found.fractions:
        for code in PARTS:
            own = rows[(rows["fraction"] == fraction) & (rows["language"] == code)]
            row = curve.loc[(fraction, code)]
            assert row["mean"] == pytest.approx(own["jaccard"].mean())
            assert [row["low"], row["high"]] == pytest.approx(np.quantile(own["jaccard"], [0.1, 0.9]))
            assert row["chance"] == pytest.approx(own["chance"].mean())
        own = rows[rows["fraction"] == fraction].groupby("split")["jaccard"].mean()
        overall = found.overall().set_index("fraction").loc[fraction]
        assert overall["mean"] == pytest.approx(own.mean())
        assert [overall["low"], overall["high"]] == pytest.approx(np.quantile(own, [0.025, 0.975]))
    assert found.halves().loc["ja", "mean"] == pytest.approx(curve.loc[(1.0, "ja"), "mean"])
    assert found.overall()["languages"].tolist() == [3, 3]
    assert found.languages == ("en", "nl", "ja")
    assert "8 splits" in repr(found)
    assert f"{found.overall()['mean'].iloc[-1]:.3f}" in repr(found)


def test_planted_units_are_found_in_both_halves() -> None:
    found = stability(
        shards(different(0.6), dict.fromkeys(("en", "nl", "ja"), 20), tokens=200),
        top_rate=0.25,
        filter_rate=0.5,
        activation_bar_ratio=0.9,
        n_splits=5,
    )
    assert (found.halves()["mean"] > 0.95).all()


def test_more_tokens_agree_better_up_to_twenty_times_chance() -> None:
    parts = shards(different(0.1), dict.fromkeys(("en", "nl", "ja"), 40), tokens=60)
    found = stability(parts, **SETTINGS, n_splits=12, fractions=(0.05, 0.2, 1.0))
    means = found.overall()["mean"].tolist()
    assert means == sorted(means)
    assert means[-1] > means[0] + 0.1


def test_languages_that_do_not_differ_give_chance() -> None:
    """Every unit fires alike in every language, so that a half says nothing of the other."""
    alike = dict.fromkeys(("en", "nl", "ja"), np.full((2, 1500), 0.3))
    parts = shards(alike, dict.fromkeys(alike, 10))
    found = stability(parts, "mean_difference", units_per_language=500, n_splits=10, fractions=(1,))
    for code in alike:
        row = found.halves().loc[code]
        # 500 of 3000 units are drawn twice: 83 of them are shared.
        assert row["chance"] == pytest.approx(83.3 / (1000 - 83.3), rel=0.02)
        assert row["mean"] == pytest.approx(row["chance"], abs=0.02)


def test_the_order_of_languages_changes_nothing() -> None:
    shuffled = {code: PARTS[code] for code in ("ja", "en", "nl")}
    one, other = (stability(p, **SETTINGS, n_splits=3).halves() for p in (PARTS, shuffled))
    assert one.to_numpy() == pytest.approx(other.loc[["en", "nl", "ja"]].to_numpy())
    again = stability(PARTS, **SETTINGS, n_splits=3).splits
    assert again.equals(stability(PARTS, **SETTINGS, n_splits=3).splits)
    assert not again.equals(stability(PARTS, **SETTINGS, n_splits=3, seed=1).splits)


def test_tokens_needed_is_where_the_curve_stays_above() -> None:
    found = stability(PARTS, **SETTINGS, n_splits=1, fractions=(0.25, 0.5, 0.75, 1.0))
    values = {"en": [0.2, 0.9, 0.7, 0.8], "nl": [0.8, 0.8, 0.9, 0.9], "ja": [0.9, 0.9, 0.9, 0.1]}
    for code, jaccards in values.items():
        found.splits.loc[found.splits["language"] == code, "jaccard"] = jaccards
    tokens = found.splits.set_index(["language", "fraction"])["tokens"]
    needed = found.tokens_needed(0.7)
    assert needed["en"] == tokens["en"].iloc[1]
    assert needed["nl"] == tokens["nl"].iloc[0]
    assert np.isnan(needed["ja"])
    # Means over languages: 0.63, 0.87, 0.83, 0.6.
    assert np.isnan(needed[""])
    assert found.tokens_needed(0.55)[""] == pytest.approx(tokens.xs(found.fractions[0], level="fraction").mean())


def test_fractions_of_few_shards_are_made_once_and_named_after_what_was_drawn() -> None:
    found = stability({code: own[:5] for code, own in PARTS.items()}, **SETTINGS, n_splits=2)
    assert found.fractions == (0.5, 1.0)
    assert found.settings["sizes"] == dict.fromkeys(PARTS, 5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    tiny = tiny_llama()
    model = load_model(str(tiny.folder), hf_model=tiny.hf_model)
    texts = {code: [SAMPLE_TEXTS[(i + k) % 12] for i in range(18)] for k, code in enumerate(("en", "nl", "ja"))}
    path = tmp_path_factory.mktemp("recording") / "recording"
    record(model, Corpus.from_texts(texts), path, shard_tokens=60, progress=False)
    return path


def test_shards_on_disk_are_those_of_the_recording(folder) -> None:
    settings = {"top_rate": 0.2, "filter_rate": 0.5, "activation_bar_ratio": 0.5}
    found = stability(folder, **settings, n_splits=2)
    whole = ActivationStats.load(folder)
    assert found.settings["drawn"] == "shards"
    assert min(found.settings["sizes"].values()) >= 4
    assert found.provenance.weights == whole.provenance.weights
    # All shards of a language together are the recording: so are two halves of an even number of them.
    even = {code: n for code, n in found.settings["sizes"].items() if n % 2 == 0}
    rows = found.splits[(found.splits["fraction"] == 1.0) & (found.splits["split"] == 0)].set_index("language")
    for code in even:
        assert 2 * rows.loc[code, "tokens"] == int(whole.tokens[whole.index(code)])
    assert len(identify(whole, "lape", **settings))


def test_a_folder_that_is_no_recording(folder, tmp_path) -> None:
    with pytest.raises(StorageError, match="does not exist"):
        stability(tmp_path)
    save_json(tmp_path / "manifest.json", {"kind": "other"})
    with pytest.raises(StorageError, match="holds no recording"):
        stability(tmp_path)


@pytest.fixture
def by_text(monkeypatch):
    """Register a method of responses: for every language the units whose mean exceeds that of all others most."""
    monkeypatch.setattr("lens_neurons.methods.registry._METHODS", {**_methods()})

    @method("by_text", reference="a test", needs=("responses",))
    def by_text(responses: TextResponses, units: int = 3) -> NeuronSet:
        means = torch.stack([responses.rows(code).float().mean(dim=0) for code in responses.languages])
        chosen = {
            code: (means[k] - (means.sum(dim=0) - means[k]) / (len(means) - 1)).topk(units).indices
            for k, code in enumerate(responses.languages)
        }
        return NeuronSet.from_units(chosen, sites=responses.sites, provenance=responses.provenance)


def _methods():
    from lens_neurons.methods import registry

    return registry._METHODS


def test_texts_are_drawn_for_methods_that_need_them(by_text) -> None:
    draw = np.random.default_rng(2)
    rows = {code: draw.normal(size=(n, 10)).astype(np.float32) for code, n in (("en", 20), ("nl", 31))}
    rows["en"][:, 3:6] += 5
    responses = TextResponses.from_rows(
        {code: torch.from_numpy(table) for code, table in rows.items()}, sites={"gate_act": (2, 5)}
    )
    found = stability(responses, "by_text", n_splits=4)
    assert found.settings["drawn"] == "texts"
    assert found.halves().loc["en", "mean"] == 1.0
    assert found.halves().loc["nl", "texts"] == 15
    assert found.halves()["tokens"].isna().all()
    assert found.tokens_needed(0.9).name == "texts"
    assert found.tokens_needed(0.9)["en"] <= 10
    assert "15" not in repr(found)
    assert "halves of 12 texts" in repr(found)  # (10 + 15) / 2
    split = found.splits.set_index(["split", "fraction", "language"]).loc[(2, 1.0, "nl")]
    sides = []
    for side in range(2):
        means = []
        for code, table in rows.items():
            order = np.random.default_rng(derive_seed(0, "split", 2, code)).permutation(len(table))
            half = len(table) // 2
            means.append(table[order[side * half : (side + 1) * half]].mean(axis=0))
        sides.append(set(np.argsort(means[0] - means[1])[:3].tolist()))
    assert split["shared"] == len(sides[0] & sides[1])
    assert stability(Recording(responses=responses), "by_text", n_splits=4).splits.equals(found.splits)


def test_what_cannot_be_split_is_said(by_text, folder) -> None:
    responses = TextResponses.from_rows({"en": torch.zeros(3, 4), "nl": torch.zeros(9, 4)}, sites={"gate_act": (2, 2)})
    stats = ActivationStats.load(folder)
    few = {**PARTS, "nl": PARTS["nl"][:3]}
    wrong = [
        (DataError, "nl: 3", lambda: stability(few)),
        (DataError, "smaller shard_tokens", lambda: stability(few)),
        (DataError, "more texts", lambda: stability(responses, "by_text")),
        (DataError, "no shard", lambda: stability({"en": []})),
        (DataError, "give the folder", lambda: stability(Recording(stats=stats))),
        (DataError, "not rows of texts", lambda: stability(responses, "lape")),
        (DataError, "not the sums of shards", lambda: stability(PARTS, "by_text")),
        (DataError, "needs responses", lambda: stability(folder, "by_text")),
        (SettingError, "is unknown", lambda: stability(PARTS, "lapse")),
        (SettingError, "top_rat", lambda: stability(PARTS, top_rat=0.1)),
        (SettingError, "n_splits=0", lambda: stability(PARTS, n_splits=0)),
        (SettingError, "fraction of 1.5", lambda: stability(PARTS, fractions=(0.5, 1.5))),
        (SettingError, "threshold of 0", lambda: stability(PARTS, n_splits=1).tokens_needed(0)),
        (SettingError, "threshold of 2", lambda: until_stable(2.0)),
        (SettingError, "min_languages=0", lambda: until_stable(0.9, min_languages=0)),
        (SettingError, "check_every=0", lambda: until_stable(0.9, check_every=0)),
        (SettingError, "by its counts", lambda: until_stable(0.9, "by_text")),
        (SettingError, "is unknown", lambda: until_stable(0.9, "lapse")),
    ]
    for kind, words, call in wrong:
        with pytest.raises(kind) as caught:
            call()
        assert words in str(caught.value)
        sentence(caught.value)


def test_a_language_without_units_is_noted() -> None:
    made = {**different(0.6), "qu": np.full((LAYERS, WIDTH), 0.02)}
    parts = shards(made, dict.fromkeys(made, 8), tokens=200)
    settings = {"top_rate": 0.25, "filter_rate": 0.5, "activation_bar_ratio": 0.9}
    found = stability(parts, **settings, n_splits=3)
    assert np.isnan(found.halves().loc["qu", "mean"])
    assert found.overall()["mean"].iloc[-1] > 0.8
    assert any(note.startswith("qu has no unit") and "3 of 4 languages" in note for note in found.notes)
    assert found.overall()["languages"].tolist()[-1] == 3
    assert "3 of 4 languages" in repr(found)
    assert np.isnan(found.tokens_needed(0.5)["qu"])


def test_a_language_with_units_in_some_splits_is_noted() -> None:
    """In half of the splits Dutch has none: the count over splits is a mean."""
    found = stability(PARTS, **SETTINGS, n_splits=4, fractions=(1.0,))
    table = found.splits
    table.loc[(table["language"] == "nl") & (table["split"] < 2), ["jaccard", "chance", "units"]] = [np.nan, np.nan, 0]
    assert found.overall()["languages"].tolist() == [2.5]
    # One unit of Quechua that fires about as often as the bar asks.
    made = {**different(0.3), "qu": np.full((LAYERS, WIDTH), 0.02)}
    for code, chances in made.items():
        chances[1, 50] = 0.28 if code == "qu" else 0.02
    rare = shards(made, dict.fromkeys(made, 8))
    found = stability(rare, n_splits=12, fractions=(1.0,), top_rate=0.3, filter_rate=0.5, activation_bar_ratio=0.9)
    known = found.splits[found.splits["language"] == "qu"]["jaccard"].notna()
    assert 0 < known.mean() < 1
    assert "qu has no unit in some splits, and counts in the others alone." in found.notes


def test_fractions_too_small_for_a_method_are_left_out(by_text) -> None:
    """PLND needs two documents of a language; of ten texts a tenth of a half is one."""
    draw = torch.Generator().manual_seed(0)
    rows = {code: torch.rand(20, 12, generator=draw) for code in ("en", "nl")}
    importances = TextResponses.from_rows(rows, sites={"gate_act": (2, 6)}, statistic="plnd")
    found = stability(importances, "plnd", n_splits=3, ffn=0.5)
    assert found.fractions == (0.2, 0.4, 0.6, 0.8, 1.0)
    assert set(found.splits.groupby("fraction").size()) == {3 * 2}
    said = [note for note in found.notes if note.startswith("The part 0.1 of a half is too small")]
    assert len(said) == 1
    assert "at least two" in said[0]
    with pytest.raises(DataError, match="at least two"):
        stability(importances, "plnd", n_splits=1, fractions=(0.05, 0.1))
    with pytest.raises(SettingError, match="eps"):
        stability(importances, "plnd", n_splits=1, rule="threshold")


def test_saved_and_loaded(tmp_path) -> None:
    found = stability(PARTS, **SETTINGS, n_splits=2)
    found.save(tmp_path / "stability.json")
    again = Stability.load(tmp_path / "stability.json")
    assert again.splits.equals(found.splits)
    assert (again.notes, again.settings, again.provenance) == (found.notes, found.settings, found.provenance)
    assert again.curve().equals(found.curve())


def growing(strength: float, rounds: int, every: int = 4) -> list[dict[str, list[PartialSums]]]:
    """Return what a recording has after each round of `every` shards; Japanese has ten shards and no more."""
    whole = shards(different(strength), {"en": rounds * every, "nl": rounds * every, "ja": 10}, tokens=100)
    return [{code: own[: every * (k + 1)] for code, own in whole.items()} for k in range(rounds)]


def test_a_recording_stops_once_two_checks_agree() -> None:
    rule = until_stable(0.8, top_rate=0.25, filter_rate=0.5, activation_bar_ratio=0.9)
    checks = [rule.check(parts) for parts in growing(0.3, 8)]
    assert not checks[0].stop
    assert "too few shards" in checks[0].reason
    assert checks[-1].stop
    assert f"{np.mean(list(checks[-1].values.values())):.3f}" in checks[-1].reason
    means = [float(np.mean(list(check.values.values()))) for check in checks]
    for k in range(2, 8):
        assert checks[k].stop == (min(means[k], means[k - 1]) >= 0.8)


def test_one_good_check_is_not_enough() -> None:
    """A threshold that the last round reaches and the one before does not."""
    rounds = growing(0.15, 3)
    settings = {**SETTINGS, "n_splits": 3}
    before, now = (float(stability(parts, **settings).halves()["mean"].mean()) for parts in rounds[1:])
    assert before < now
    assert not until_stable((before + now) / 2, **settings).check(rounds[2]).stop
    assert until_stable(before, **settings).check(rounds[2]).stop


def test_a_check_is_that_of_stability_now_and_a_round_before() -> None:
    parts = growing(0.2, 5)
    rule = until_stable(0.5, **SETTINGS, n_splits=3, seed=4)
    now, before = (stability(p, **SETTINGS, n_splits=3, seed=4).halves()["mean"] for p in (parts[4], parts[3]))
    check = rule.check(parts[4])
    assert check.values == pytest.approx(now.to_dict())
    assert f"index of {now.mean():.3f}, one round before {before.mean():.3f}" in check.reason
    assert rule.check(parts[4]) == check
    assert (len(parts[4]["ja"]), len(parts[3]["ja"])) == (10, 10)


def test_a_rule_never_stops_what_has_no_units_or_too_few_shards() -> None:
    rule = UntilStable(0.01, settings={"top_rate": 0.01, "filter_rate": 1.0})
    silent = shards(dict.fromkeys(("en", "nl"), np.zeros((LAYERS, WIDTH))), {"en": 8, "nl": 8})
    assert not rule.check(silent).stop
    few = {**PARTS, "nl": PARTS["nl"][:2]}
    assert rule.check(few).reason.startswith("nl has too few shards")
    assert not rule.check({}).stop


def test_a_rule_waits_for_languages_without_units() -> None:
    """The other languages agree well, and Quechua has no units: it is in no mean."""
    made = {**different(0.6), "qu": np.full((LAYERS, WIDTH), 0.02)}
    parts = shards(made, dict.fromkeys(made, 12), tokens=200)
    settings = {"top_rate": 0.25, "filter_rate": 0.5, "activation_bar_ratio": 0.9}
    check = until_stable(0.5, **settings).check(parts)
    assert np.nanmean(list(check.values.values())) > 0.8
    assert np.isnan(check.values["qu"])
    assert not check.stop
    assert "3 of 4 languages: without units is qu, and 4 are wanted." in check.reason
    check = until_stable(0.5, min_languages=3, **settings).check(parts)
    assert check.stop
    assert check.reason.endswith("3 of 4 languages: without units is qu.")
    full = {code: own for code, own in parts.items() if code != "qu"}
    assert until_stable(0.5, **settings).check(full).stop
    assert until_stable(0.5, min_languages=9, **settings).check(full).stop


def test_a_rule_says_what_it_is() -> None:
    rule = until_stable(0.8, "fixed_count", units_per_language=5, check_every=2)
    assert rule.to_dict() == {
        "rule": "until_stable",
        "threshold": 0.8,
        "method": "fixed_count",
        "settings": {"units_per_language": 5},
        "check_every": 2,
        "n_splits": 5,
        "min_languages": None,
        "seed": 0,
    }
    assert rule == UntilStable(**{name: value for name, value in rule.to_dict().items() if name != "rule"})


def test_a_recording_with_a_rule_ends_early_and_goes_on_where_it_was(tmp_path) -> None:
    tiny = tiny_llama()
    model = load_model(str(tiny.folder), hf_model=tiny.hf_model)
    corpus = Corpus.from_texts(
        {code: [SAMPLE_TEXTS[6 * k + i % 4] for i in range(80)] for k, code in enumerate(("en", "ja"))}
    )
    settings = {"top_rate": 0.2, "filter_rate": 0.5, "activation_bar_ratio": 0.5}
    rule = until_stable(0.5, **settings, check_every=2, n_splits=2)
    options = {"shard_tokens": 60, "stop_when": rule, "progress": False}
    stopped = record(model, corpus, tmp_path / "stopped", **options)
    assert int(stopped.tokens.min()) > 4 * 60
    assert int(stopped.texts.max()) < 80
    assert "agree with a mean Jaccard index" in stopped.notes["stopped"]
    again = record(model, corpus, **options)
    assert again.positive.equal(stopped.positive)
    assert again.notes["stopped"] == stopped.notes["stopped"]
    assert stability(tmp_path / "stopped", **settings, n_splits=2).halves()["mean"].mean() >= 0.5
