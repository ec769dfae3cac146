"""Culture neurons: LAPE over cultures, set algebra against numpy, the four-way matrix against plain transformers."""

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from evaluation_oracle import continuation_logprob, set_to, steered, tiny_model
from oracle import sentence

from lens_neurons.activation_stats import ActivationStats
from lens_neurons.corpus import Corpus
from lens_neurons.errors import DataError, LensNeuronsError, ProvenanceError, SettingError
from lens_neurons.evaluation.cultures import CulturePerplexity, culture_perplexity
from lens_neurons.evaluation.intervals import resample_counts
from lens_neurons.evaluation.tables import COLUMNS, chosen
from lens_neurons.methods import cite, identify, list_methods
from lens_neurons.methods.culture import culture_sets
from lens_neurons.neurons import NeuronSet
from lens_neurons.storage import Provenance, derive_seed

CULTURES = ("culture:fr", "culture:ja", "culture:tr")
SHAPE = (3, 17)


def counts(seed, groups=CULTURES, shape=SHAPE, tokens=100):
    draw = np.random.default_rng(seed)
    positive = {code: (draw.random(shape) ** 3 * tokens).astype(np.int64) for code in groups}
    return positive, from_counts(positive, tokens)


def from_counts(positive, tokens=100):
    return ActivationStats.from_counts(
        dict.fromkeys(positive, tokens), {code: torch.from_numpy(n) for code, n in positive.items()}
    )


def slow(positive, top, keep, bar, tokens=100):
    """LAPE, one unit at a time (methods.md sections 1 and 7)."""
    p = {code: n / tokens for code, n in positive.items()}
    everything = sorted(float(v) for table in p.values() for v in table.flat)
    threshold, limit = (everything[round(rate * len(everything)) - 1] for rate in (keep, bar))
    ranked = []
    for place in np.ndindex(*next(iter(p.values())).shape):
        values = [float(table[place]) for table in p.values()]
        if max(values) > threshold:
            shares = [v / sum(values) for v in values if v]
            ranked.append((-sum(s * math.log(s) for s in shares), place))
    taken = [place for _, place in sorted(ranked)[: round(top * len(everything) / len(p))]]
    return {code: {place for place in taken if p[code][place] > limit} for code in p}


def places(neurons, code):
    return set(zip(*(part.tolist() for part in neurons.units(code)), strict=True))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("rates", [(0.01, 0.95, 0.95), (0.3, 0.9, 0.8), (1.0, 0.5, 0.6)])
def test_culture_is_lape_with_cultures_as_groups(seed, rates):
    positive, stats = counts(seed, shape=(4, 41))
    found = identify(stats, "culture", top_rate=rates[0], filter_rate=rates[1], activation_bar_ratio=rates[2])
    assert found.languages == CULTURES
    assert {code: places(found, code) for code in CULTURES} == slow(positive, *rates)
    assert found.method["name"] == "culture"
    assert json.loads(json.dumps(found.method)) == found.method


def test_the_constants_are_the_papers():
    _, stats = counts(0, shape=(4, 250))
    found = identify(stats, "culture")
    assert (found.method["top_rate"], found.method["filter_rate"], found.method["activation_bar_ratio"]) == (
        0.01,
        0.95,
        0.95,
    )
    assert len(found) == 10
    assert "2508.02241" in list_methods().loc["culture", "reference"]
    assert "Isolating Culture Neurons" in cite(found)


def test_permuting_cultures_and_neurons_permutes_the_answer():
    positive, stats = counts(1)
    found = identify(stats, "culture", top_rate=0.3, activation_bar_ratio=0.8)
    turned = identify(stats.select(list(CULTURES[::-1])), "culture", top_rate=0.3, activation_bar_ratio=0.8)
    assert {code: places(turned, code) for code in CULTURES} == {code: places(found, code) for code in CULTURES}
    order = np.random.default_rng(0).permutation(SHAPE[1])
    moved = from_counts({code: n[:, order] for code, n in positive.items()})
    other = identify(moved, "culture", top_rate=0.3, activation_bar_ratio=0.8)
    for code in CULTURES:
        assert {(layer, int(order[index])) for layer, index in places(other, code)} == places(found, code)


def test_a_planted_unit_is_found_and_a_constant_one_never():
    positive, _ = counts(2, shape=(4, 250))
    for code, n in positive.items():
        n[1, 5] = 99 if code == "culture:ja" else 0
        n[2, 7] = 95
    found = identify(from_counts(positive), "culture", top_rate=0.05)
    assert [code for code in CULTURES if (1, 5) in places(found, code)] == ["culture:ja"]
    assert len(found) == 50
    assert not any((2, 7) in places(found, code) for code in CULTURES)


# Set algebra.


def random_masks(seed, groups, share=0.4):
    draw = np.random.default_rng(seed)
    return {code: draw.random(SHAPE) < share for code in groups}


def as_set(masks, name="made up", **more):
    tensors = {code: torch.from_numpy(mask) for code, mask in masks.items()}
    draw = np.random.default_rng(9)
    scores = {code: torch.from_numpy(draw.random(SHAPE)) for code in masks}
    return NeuronSet.from_masks(tensors, scores=scores, method={"name": name}, **more)


def masks_of(neurons):
    return {code: neurons.mask(code).numpy() for code in neurons.languages}


def equal(found, wanted):
    assert list(found.languages) == list(wanted)
    for code, mask in masks_of(found).items():
        np.testing.assert_array_equal(mask, wanted[code])


def test_set_algebra_is_that_of_numpy():
    of_language, of_culture = random_masks(0, ("en", "fr", "ja", "tr")), random_masks(1, CULTURES)
    found = culture_sets(as_set(of_language), as_set(of_culture))
    own = {code: of_language[code.removeprefix("culture:")] for code in CULTURES}
    assert list(found) == ["language", "culture", "compound", "pure"]
    equal(found["language"], own)
    equal(found["culture"], of_culture)
    equal(found["compound"], {code: own[code] & of_culture[code] for code in CULTURES})
    equal(found["pure"], {code: of_culture[code] & ~own[code] for code in CULTURES})
    # Only the culture's own language is taken away: neurons of another language stay.
    assert (found["pure"].mask("culture:fr").numpy() & of_language["ja"]).any()


def test_all_languages_may_be_taken_away():
    of_language, of_culture = random_masks(2, ("en", "fr", "ja", "tr"), 0.2), random_masks(3, CULTURES)
    found = culture_sets(as_set(of_language), as_set(of_culture), subtract="all")
    anywhere = np.any(list(of_language.values()), axis=0)
    equal(found["pure"], {code: of_culture[code] & ~anywhere for code in CULTURES})
    equal(found["language"], {code: of_language[code[-2:]] for code in CULTURES})
    assert found["pure"].method["subtract"] == "all"


def test_a_culture_may_have_several_languages_and_any_label():
    of_language, of_culture = random_masks(4, ("fr", "it", "ja")), random_masks(5, ("swiss", "japan"))
    mapping = {"japan": "Japanese", "swiss": ["fra_Latn", "it"]}
    found = culture_sets(as_set(of_language), as_set(of_culture), mapping)
    own = {"swiss": of_language["fr"] | of_language["it"], "japan": of_language["ja"]}
    equal(found["language"], own)
    equal(found["compound"], {code: own[code] & of_culture[code] for code in own})
    equal(found["pure"], {code: of_culture[code] & ~own[code] for code in own})


def test_sets_keep_the_order_of_the_culture_neurons_and_empty_entries():
    of_language, of_culture = random_masks(6, ("fr", "ja", "tr")), random_masks(7, CULTURES)
    of_culture["culture:tr"][:] = False
    cultures = as_set(of_culture)
    for part in ("compound", "pure"):
        found = culture_sets(as_set(of_language), cultures)[part]
        assert found.counts()["culture:tr"] == 0
        for code in CULTURES:
            score = found.tables[code].score
            assert torch.equal(score, score.sort().values)
            assert set(score.tolist()) <= set(cultures.tables[code].score.tolist())


def test_sets_save_load_and_cite(tmp_path):
    _, stats = counts(3)
    cultures = identify(stats, "culture", top_rate=0.5, activation_bar_ratio=0.7)
    found = culture_sets(as_set(random_masks(8, ("fr", "ja", "tr")), "lape"), cultures)
    for name, neurons in found.items():
        neurons.save(tmp_path / f"{name}.safetensors")
        again = NeuronSet.load(tmp_path / f"{name}.safetensors")
        equal(again, masks_of(neurons))
        assert again.method == neurons.method
    assert "2508.02241" in cite(found["pure"])
    assert found["pure"].method["language_method"] == {"name": "lape"}


def test_bad_input_is_a_sentence():
    _, stats = counts(0)
    language, of_culture = as_set(random_masks(0, ("fr", "ja"))), as_set(random_masks(1, CULTURES))
    known = [Provenance(model="m", weights=digit * 64, n_layers=3, d_mlp=17) for digit in "ab"]
    cases = (
        (DataError, lambda: identify(stats.select(["culture:fr"]), "culture")),
        (SettingError, lambda: identify(stats, "culture", top_rate=2.0)),
        (SettingError, lambda: culture_sets(language, of_culture, subtract="some")),
        (DataError, lambda: culture_sets(language, of_culture)),  # no Turkish neurons
        (DataError, lambda: culture_sets(language, of_culture, {"culture:fr": "fr", "culture:ja": "ja"})),
        (DataError, lambda: culture_sets(language, of_culture, dict.fromkeys([*CULTURES, "culture:it"], "fr"))),
        (DataError, lambda: culture_sets(language, of_culture, dict.fromkeys(CULTURES, ()))),
        (
            ProvenanceError,
            lambda: culture_sets(
                as_set(random_masks(0, ("fr",)), provenance=known[0]),
                as_set(random_masks(1, ("culture:fr",)), provenance=known[1]),
            ),
        ),
        (
            ProvenanceError,
            lambda: culture_sets(
                as_set(random_masks(0, ("fr",)), site="post"), as_set(random_masks(1, ("culture:fr",)))
            ),
        ),
    )
    for error, call in cases:
        with pytest.raises(error) as caught:
            call()
        sentence(caught.value)


# The four-way matrix.

CULTURE_TEXTS = {
    "culture:fr": [
        "Le chat est le roi de la rue.",
        "La fête du pain.",
        "Il pleut sur le pont et sur le quai de la ville.",
    ],
    "culture:ja": ["猫は祭りを見た。", "雨が降る。", "神社に猫がいた。"],
}
PLAIN_TEXTS = {
    "fr": ["Le chat est assis sur le tapis.", "Un bon pain.", "Il pleut sur la route et sur le toit de la maison."],
    "ja": ["猫は雨を見た。", "水が出る。", "部屋に猫がいた。"],
}
SETS = ("language", "culture", "compound", "pure")


@pytest.fixture(scope="module")
def parts():
    tiny, model, adapter = tiny_model(add_bos=True)
    shape = (adapter.n_layers, adapter.d_mlp)
    draw = np.random.default_rng(5)

    def some(groups):
        masks = {code: torch.from_numpy(draw.random(shape) < 0.15) for code in groups}
        return NeuronSet.from_masks(masks, provenance=adapter.provenance(), method={"name": "culture"})

    return tiny, model, culture_sets(some(("fr", "ja")), some(CULTURE_TEXTS))


@pytest.fixture(scope="module")
def scores(parts) -> CulturePerplexity:
    _, model, sets = parts
    corpora = Corpus.from_texts(CULTURE_TEXTS), Corpus.from_texts(PLAIN_TEXTS)
    return culture_perplexity(model, sets, *corpora, random_draws=2, seed=3, progress=False)


def nll(tiny, texts):
    """Return each text's summed NLL and number of scored tokens, by plain transformers."""
    rows = []
    for text in texts:
        ids = [tiny.tokenizer.bos_token_id, *tiny.tokenizer(text, add_special_tokens=False)["input_ids"]]
        rows.append((-continuation_logprob(tiny.hf_model, ids, 1), len(ids) - 1))
    return np.array(rows)


def texts_of(kind, culture):
    return CULTURE_TEXTS[culture] if kind == "culture" else PLAIN_TEXTS[culture.removeprefix("culture:")]


def change(tiny, units, silenced, kind, tested):
    before = nll(tiny, texts_of(kind, tested))
    with steered(tiny.hf_model, set_to(units, silenced, "=0", None)):
        after = nll(tiny, texts_of(kind, tested))
    return after[:, 0] - before[:, 0], before[:, 1]


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("kind", ["culture", "plain"])
def test_every_cell_is_that_of_plain_transformers(scores: CulturePerplexity, parts, name, kind) -> None:
    tiny, _, sets = parts
    table = scores.matrix(name, kind).change()
    for silenced in CULTURE_TEXTS:
        for tested in CULTURE_TEXTS:
            delta, tokens = change(tiny, sets[name], silenced, kind, tested)
            assert table.loc[silenced, tested] == pytest.approx(delta.sum() / tokens.sum(), abs=2e-4)


def test_the_control_avoids_every_set(scores: CulturePerplexity, parts) -> None:
    tiny, _, sets = parts
    union = torch.stack([neurons.union_mask() for neurons in sets.values()]).any(dim=0)
    found = []
    for draw in range(2):
        drawn = sets["pure"].random_like(derive_seed(3, "control", "pure", draw), avoid=union)
        assert not (drawn.union_mask() & union).any()
        assert (drawn.by_layer().to_numpy() == sets["pure"].by_layer().to_numpy()).all()
        delta, tokens = change(tiny, drawn, "culture:fr", "plain", "culture:fr")
        found.append(delta.sum() / tokens.sum())
        matrix = scores.matrix("pure", "plain").change(condition=f"random-{draw}")
        assert matrix.loc["culture:fr", "culture:fr"] == pytest.approx(found[-1], abs=2e-4)
    row = scores.by_culture(n_resamples=50).loc[("pure", "culture:fr", "plain")]
    assert row["control"] == pytest.approx(np.mean(found), abs=2e-4)
    assert row["excess"] == pytest.approx(row["mean"] - row["control"])


def test_the_difference_is_resampled_in_pairs(scores: CulturePerplexity, parts) -> None:
    tiny, _, sets = parts
    table = scores.summary(n_resamples=60)
    counts = resample_counts(3, 60, 3, "texts")
    cells = {
        (kind, culture): change(tiny, sets["culture"], culture, kind, culture)
        for kind in ("culture", "plain")
        for culture in CULTURE_TEXTS
    }

    def gap(weights):
        value = {key: (weights @ delta) / (weights @ tokens) for key, (delta, tokens) in cells.items()}
        return np.mean([value["culture", code] - value["plain", code] for code in CULTURE_TEXTS])

    row = table.loc[("culture", "difference")]
    assert row["mean"] == pytest.approx(gap(np.ones(3)), abs=2e-4)
    low, high = np.quantile([gap(weights) for weights in counts], [0.025, 0.975])
    assert (row["low"], row["high"]) == pytest.approx((low, high), abs=4e-4)
    assert row["n"] == 6


def test_summary_is_over_cultures(scores: CulturePerplexity) -> None:
    table, single = scores.summary(n_resamples=40), scores.by_culture(n_resamples=40)
    assert list(table.index) == [(name, text) for name in SETS for text in ("culture", "plain", "difference")]
    for (name, text), row in table.iterrows():
        mine = single.xs((name, text), level=("set", "text"))
        for column in ("neurons", "mean", "control", "excess", "others"):
            assert row[column] == pytest.approx(mine[column].mean()), column
        assert row["low"] <= row["mean"] <= row["high"]
        assert row["control_low"] <= row["control_high"]
        if text != "difference":
            matrix = scores.matrix(name, text).change().to_numpy()
            assert row["mean"] == pytest.approx(np.trace(matrix) / 2)
            assert row["others"] == pytest.approx((matrix.sum() - np.trace(matrix)) / 2)


def test_cells_are_ready_for_a_figure(scores: CulturePerplexity) -> None:
    table = scores.cells(n_resamples=40)
    assert list(table.columns) == ["set", "text", "silenced", "tested", "change", "low", "high", "control"]
    assert len(table) == 4 * 2 * 2 * 2
    row = table.query("set == 'compound' and text == 'plain' and silenced == 'culture:ja' and tested == 'culture:fr'")
    matrix = scores.matrix("compound", "plain")
    assert row["change"].item() == pytest.approx(matrix.change().loc["culture:ja", "culture:fr"])
    assert row["control"].item() == pytest.approx(matrix.change(condition="random").loc["culture:ja", "culture:fr"])
    assert (table["low"] <= table["high"]).all()


def test_the_table_is_tidy_and_round_trips(scores: CulturePerplexity, tmp_path) -> None:
    assert tuple(scores.items.columns) == COLUMNS
    assert len(chosen(scores.items, metric="nll")) == (1 + 4 * 3 * 2) * 12
    assert "culture_perplexity" not in cite(scores)
    assert "2508.02241" in cite(scores)
    assert "culture text minus plain" in repr(scores)
    for name in ("scores.parquet", "scores.jsonl"):
        scores.save(tmp_path / name)
        again = CulturePerplexity.load(tmp_path / name)
        pd.testing.assert_frame_equal(again.summary(), scores.summary(), check_exact=True)
        assert (again.notes, again.settings, again.provenance) == (scores.notes, scores.settings, scores.provenance)


def test_empty_sets_unequal_texts_and_no_control(parts) -> None:
    _, model, sets = parts
    masks = {code: sets["pure"].mask(code) & (code == "culture:fr") for code in CULTURE_TEXTS}
    lonely = NeuronSet.from_masks(masks, provenance=sets["pure"].provenance)
    longer = {**PLAIN_TEXTS, "ja": [*PLAIN_TEXTS["ja"], "雨。"]}
    plain = Corpus.from_texts({"culture:fr": longer["fr"], "culture:ja": longer["ja"]})
    found = culture_perplexity(
        model, {"lonely": lonely}, Corpus.from_texts(CULTURE_TEXTS), plain, random_draws=0, progress=False
    )
    assert found.notes == ("lonely: no neurons for culture:ja, so nothing is silenced there.",)
    table = found.by_culture(n_resamples=30)
    assert table.loc[("lonely", "culture:ja", "plain"), "n"] == 4
    assert table.xs("culture:ja", level="culture")["mean"].tolist() == [0, 0, 0]
    french = table.loc[("lonely", "culture:fr", "culture")]
    assert french["low"] < french["high"]
    assert table["control"].isna().all()
    assert found.cells(n_resamples=30)["control"].isna().all()
    assert math.isfinite(found.summary(n_resamples=30).loc[("lonely", "difference"), "mean"])


def test_wrong_arguments_are_sentences(parts, scores: CulturePerplexity) -> None:
    _, model, sets = parts
    texts, plain = Corpus.from_texts(CULTURE_TEXTS), Corpus.from_texts(PLAIN_TEXTS)

    def score(sets=sets, texts=texts, plain=plain, **settings):
        return culture_perplexity(model, sets, texts, plain, progress=False, **settings)

    cases = (
        (DataError, lambda: score({})),
        (DataError, lambda: score({"a": sets["pure"], "b": sets["pure"].select(["culture:fr"])})),
        (DataError, lambda: score(texts=texts.select(["culture:fr"]))),
        (DataError, lambda: score(plain=plain.select(["fr"]))),
        (DataError, lambda: score(mapping={"culture:fr": "fr"})),
        (SettingError, lambda: score(random_draws=-1)),
        (SettingError, lambda: scores.matrix("impure")),
        (SettingError, lambda: scores.matrix("pure", "poetry")),
    )
    for error, call in cases:
        with pytest.raises(error) as caught:
            call()
        assert isinstance(caught.value, LensNeuronsError)
        sentence(caught.value)
