import dataclasses
import functools
from typing import Any

import numpy as np
import pytest
import torch
from models import SAMPLE_TEXTS, tiny
from saes import make_sae
from sklearn.metrics import accuracy_score, f1_score, precision_recall_fscore_support

from lens_neurons.batching import TokenPolicy
from lens_neurons.collect import Collect
from lens_neurons.corpus import PACKAGED, Corpus
from lens_neurons.errors import DataError, ProvenanceError, SettingError, StorageError
from lens_neurons.evaluation.feature_lid import (
    FASTTEXT,
    LanguageIdScores,
    feature_language_id,
    latent_scores,
    named_languages,
)
from lens_neurons.evaluation.lid import identify_language
from lens_neurons.evaluation.tables import NEURONS, tidy
from lens_neurons.features import FeatureStats
from lens_neurons.methods import collect_for, identify
from lens_neurons.methods.sae_lape import sae_lape
from lens_neurons.model import adapt, load_model
from lens_neurons.neurons import NeuronSet
from lens_neurons.recording import record
from lens_neurons.sae import PlacedSAE, load_sae, place_saes
from lens_neurons.topk_sae import TopKSAE

TEXTS = {"en": [*SAMPLE_TEXTS[:3], "x"], "fr": list(SAMPLE_TEXTS[3:7]), "sw": list(SAMPLE_TEXTS[8:12])}
LAYERS = (0, 2)


@functools.cache
def model_of(seed: int = 0) -> Any:
    return load_model(tiny("llama").folder, dtype=torch.float64)


@functools.cache
def saes_of(seed: int = 0) -> tuple[PlacedSAE, ...]:
    return place_saes(
        [make_sae(seed + layer, d_in=32, latents=40, k=6, layer=layer).to("cpu", torch.float64) for layer in LAYERS]
    )


@functools.cache
def stats_of(seed: int = 0) -> FeatureStats:
    found = record(
        model_of(), Corpus.from_texts(TEXTS), bos="always", collect=Collect(saes=saes_of(seed)), progress=False
    )
    return found.features


@functools.cache
def neurons_of() -> NeuronSet:
    found = sae_lape(stats_of(), example_rate=0.3, token_rate=0.02, ratio=0.9)
    assert all(found.counts().values())
    assert set(found.to_frame()["layer"]) == set(LAYERS)
    return found


def slow_scores(texts: list[str]) -> tuple[list[dict[str, int]], list[dict[str, float]]]:
    """Count and min-max of every text and language: one text, token and latent at a time, through run_with_cache."""
    model, stats, neurons = model_of(), stats_of(), neurons_of()
    tokens = adapt(model).tokens
    counts, sums = [], []
    for text in texts:
        ids = [tokens.bos_id, *tokens.tokenizer(text, add_special_tokens=False)["input_ids"]]
        _, cache = model.run_with_cache(torch.tensor([ids]))
        count, total = dict.fromkeys(neurons.languages, 0), dict.fromkeys(neurons.languages, 0.0)
        for position in range(1, len(ids)):
            for place, layer in enumerate(LAYERS):
                latents = saes_of()[place].coder.encode(cache[f"blocks.{layer}.hook_mlp_out"][0, position]).tolist()
                for code in neurons.languages:
                    for unit_layer, j in zip(*(part.tolist() for part in neurons.units(code)), strict=True):
                        if unit_layer == layer and latents[j] > 0:
                            active = [k for k in range(3) if stats.active_tokens[k, place, j]]
                            low = min(float(stats.smallest[k, place, j]) for k in active)
                            high = max(float(stats.largest[k, place, j]) for k in active)
                            count[code] += 1
                            total[code] += (latents[j] - low) / (high - low + 1e-6)
        counts.append(count)
        sums.append(total)
    return counts, sums


ALL_TEXTS = [*SAMPLE_TEXTS, "x", ""]


@pytest.mark.parametrize("batch_tokens", [1, 60, 4096])
def test_scores_equal_a_loop_over_texts(batch_tokens, monkeypatch):
    monkeypatch.setattr("lens_neurons.evaluation.feature_lid.VALUES_AT_ONCE", 200)  # five tokens at once
    policy = TokenPolicy(bos="always")
    (found,) = latent_scores(
        adapt(model_of()), saes_of(), [neurons_of()], stats_of(), ALL_TEXTS[:-1], policy, batch_tokens
    )
    counts, sums = slow_scores(ALL_TEXTS[:-1])
    for i, (count, total) in enumerate(zip(counts, sums, strict=True)):
        assert found[0, i].tolist() == list(count.values())
        assert found[1, i].tolist() == pytest.approx(list(total.values()), rel=1e-6, abs=1e-9)
    assert found[0].any()


@pytest.mark.parametrize("rule", ["count", "min-max"])
def test_the_language_with_the_largest_score_is_named(rule):
    counts, sums = slow_scores(ALL_TEXTS[:-1])
    wanted = []
    for count, total in zip(counts, sums, strict=True):
        score = count if rule == "count" else {code: total[code] for code in total if count[code]}
        wanted.append(max(score, key=score.get) if any(count.values()) else None)
    found = named_languages(model_of(), saes_of(), neurons_of(), stats_of(), ALL_TEXTS, rule=rule, bos="always")
    assert found == [*wanted, None]  # the empty text has no token
    # A text's score is its own, whatever stands beside it: the released script adds up over the texts.
    for text, name in list(zip(ALL_TEXTS, found, strict=True))[:4]:
        alone = named_languages(model_of(), saes_of(), neurons_of(), stats_of(), [text], rule=rule, bos="always")
        assert alone == [name]


def token_detector(words: dict[str, str]) -> tuple[TopKSAE, dict[str, list[int]]]:
    """Return an autoencoder on the embedding with one latent a token: active on that token and hardly on another."""
    adapter = adapt(model_of())
    rows = adapter.model.W_E.detach().double()
    ids = {code: adapter.tokens.tokenizer(text, add_special_tokens=False)["input_ids"] for code, text in words.items()}
    wanted = sorted({token for own in ids.values() for token in own})
    scale = rows[wanted] / rows[wanted].square().sum(dim=1, keepdim=True)
    sae = TopKSAE(
        w_enc=scale,
        b_enc=torch.full((len(wanted),), -0.99, dtype=torch.float64),
        w_dec=rows[wanted],
        b_dec=torch.zeros(32, dtype=torch.float64),
        k=1,
        layer=0,
        site="resid_pre",
    )
    return sae, {code: [wanted.index(token) for token in own] for code, own in ids.items()}


WORDS = {"en": " the cat sat", "fr": " chat assis tapis", "th": "แมวนั่งบน"}


def test_planted_tokens_name_their_language_and_random_latents_do_not():
    sae, _ = token_detector(WORDS)
    corpus = Corpus.from_texts({code: [text] * 6 for code, text in WORDS.items()}, "planted")
    found = record(model_of(), corpus, bos="always", collect=Collect(saes=sae), progress=False, texts_kept=0)
    assert found.features.site == "sae:resid_pre"
    neurons = sae_lape(found.features, token_rate=0.01)
    assert all(neurons.counts().values())
    scores = feature_language_id(
        model_of(), sae, neurons, found.features, corpus, bos="always", random_draws=2, progress=False
    )
    table = scores.summary(n_resamples=50)
    assert table["mean"].tolist()[:2] == [1.0, 1.0]
    assert table["macro_f1"].tolist()[:2] == [1.0, 1.0]
    assert (table["control"][:2] < 0.5).all()
    assert list(table.index) == ["count", "min-max", "fasttext"]
    assert scores.named("fasttext")["named"].tolist() == [
        guess.language or "" for text in WORDS.values() for guess in identify_language([text] * 6)
    ]
    assert scores.draws == ("random-0", "random-1")


def test_a_text_without_a_specific_latent_is_not_named():
    sae, _ = token_detector(WORDS)
    corpus = Corpus.from_texts({code: [text] * 3 for code, text in WORDS.items()}, "planted")
    found = record(model_of(), corpus, bos="always", collect=Collect(saes=sae), progress=False, texts_kept=0)
    neurons = sae_lape(found.features, token_rate=0.01).select(["en", "fr"])
    names = named_languages(model_of(), sae, neurons, found.features, ["猫坐在", WORDS["fr"]], bos="always")
    assert names == [None, "fr"]


def made_up(seed: int, sizes: dict[str, int], named: list[str]) -> LanguageIdScores:
    """Return scores in which texts are named at random, three times in four rightly."""
    draw = np.random.default_rng(seed)
    blocks = []
    for condition, factor in ((NEURONS, "count"), ("random-0", "count"), ("random-1", "count"), (FASTTEXT, "")):
        for code, n in sizes.items():
            chance = draw.choice(named, size=n)
            target = [code if hit else str(other) for hit, other in zip(draw.random(n) < 0.6, chance)]
            value = [float(name == code) for name in target]
            shared = {"task": "language_id", "metric": "correct", "item": range(n), "value": value}
            blocks.append({**shared, "condition": condition, "factor": factor, "language": code, "target": target})
    return LanguageIdScores(tidy(blocks), (), {"languages": list(sizes), "rules": ["count"], "seed": 0})


@pytest.mark.parametrize("sizes", [{"en": 30, "fr": 30, "sw": 30}, {"en": 30, "fr": 5, "sw": 17}])
def test_accuracy_and_f1_are_scikit_learns(sizes):
    scores = made_up(1, sizes, ["en", "fr", "sw", "de", ""])
    table = scores.summary()
    for rule in ("count", FASTTEXT):
        rows = scores.named(rule)
        names = list(sizes)
        own, named = rows["language"].tolist(), rows["named"].tolist()
        row = table.loc[rule]
        assert row["mean"] == pytest.approx(accuracy_score(own, named))
        f1 = f1_score(own, named, labels=names, average="macro", zero_division=0)
        assert row["macro_f1"] == pytest.approx(f1)
        assert row["low"] < row["mean"] < row["high"]
        assert row["f1_low"] < row["macro_f1"] < row["f1_high"]
        assert row["unnamed"] == named.count("")
        each = precision_recall_fscore_support(own, named, labels=names, zero_division=0)
        by_language = scores.by_language(rule)
        for name, values in zip(("precision", "recall", "f1", "n"), each, strict=True):
            assert by_language[name].tolist() == pytest.approx(values.tolist())
        assert scores.confusion(rule).to_numpy().sum() == sum(sizes.values())
    assert np.isnan(table.loc[FASTTEXT, "control"])
    draws = [accuracy_score(*scores.named("count", draw)[["language", "named"]].to_numpy().T) for draw in scores.draws]
    assert table.loc["count", "control"] == pytest.approx(np.mean(draws))
    assert table.loc["count", "control_low"] < np.mean(draws) < table.loc["count", "control_high"]


def test_the_interval_is_the_bootstrap_of_the_texts():
    scores = made_up(2, {"en": 40, "fr": 40}, ["en", "fr"])
    table = scores.summary(n_resamples=4000)
    rows = scores.named("count")
    right = (rows["language"] == rows["named"]).to_numpy().reshape(2, 40).astype(float)
    # Texts are drawn by their number for all languages at once, so the mean over languages is what is resampled.
    error = right.mean(axis=0).std() / np.sqrt(40)
    assert (table.loc["count", "high"] - table.loc["count", "low"]) / 2 == pytest.approx(1.96 * error, rel=0.1)


def test_permuting_languages_permutes_the_names():
    order = ["sw", "en", "fr"]
    moved = stats_of().select(order)
    again = sae_lape(moved, example_rate=0.3, token_rate=0.02, ratio=0.9)
    (one,) = latent_scores(
        adapt(model_of()), saes_of(), [neurons_of()], stats_of(), list(SAMPLE_TEXTS), TokenPolicy(bos="always")
    )
    (other,) = latent_scores(
        adapt(model_of()), saes_of(), [again], moved, list(SAMPLE_TEXTS), TokenPolicy(bos="always")
    )
    assert torch.equal(one[0][:, [2, 0, 1]], other[0])
    assert torch.allclose(one[1][:, [2, 0, 1]], other[1])


def test_saved_and_loaded_is_the_same(tmp_path):
    corpus = Corpus.from_texts(TEXTS)
    scores = feature_language_id(
        model_of(), saes_of(), neurons_of(), stats_of(), corpus, bos="always", random_draws=1, progress=False
    )
    assert scores.languages == ("en", "fr", "sw")
    for name in ("scores.parquet", "scores.jsonl"):
        scores.save(tmp_path / name)
        found = LanguageIdScores.load(tmp_path / name)
        assert found.summary(n_resamples=20).equals(scores.summary(n_resamples=20))
        assert (found.notes, dict(found.settings)) == (scores.notes, dict(scores.settings))
        assert found.provenance == scores.provenance
    (tmp_path / "scores.parquet").write_bytes(b"no")
    with pytest.raises(StorageError):
        LanguageIdScores.load(tmp_path / "scores.parquet")
    assert repr(scores).startswith("LanguageIdScores(3 languages; accuracy count ")


def test_what_does_not_belong_together_is_refused():
    model, saes, neurons, stats = model_of(), saes_of(), neurons_of(), stats_of()
    own = Corpus.from_texts(TEXTS)

    def score(*given: Any, corpus: Corpus = own, **settings: Any) -> LanguageIdScores:
        return feature_language_id(*given, corpus, progress=False, **settings)

    with pytest.raises(SettingError, match="rules='count' must be a list"):
        score(model, saes, neurons, stats, rules="count")
    with pytest.raises(SettingError, match=r"rules=\['size'\]"):
        score(model, saes, neurons, stats, rules=["size"])
    with pytest.raises(DataError, match="lacks ta of corpus"):
        score(model, saes, neurons, stats, corpus=Corpus.from_texts({"ta": ["x"]}))
    with pytest.raises(DataError, match="give a list of texts"):
        named_languages(model, saes, neurons, stats, "text")
    with pytest.raises(ProvenanceError, match=r"layers \[0\] with 40 latents here, layers \[0, 2\]"):
        score(model, saes[:1], neurons, stats)
    with pytest.raises(ProvenanceError, match=r"other weights in \[0, 2\]"):
        score(model, saes_of(5), neurons, stats)
    elsewhere = NeuronSet.from_masks({"en": torch.zeros(3, 40, dtype=torch.bool)})
    with pytest.raises(ProvenanceError, match="the neuron set is of"):
        named_languages(model, saes, elsewhere, stats, ["x"])
    other = dataclasses.replace(stats, provenance=stats.provenance.replace(weights="other"))
    with pytest.raises(ProvenanceError, match="the features and the model"):
        score(model, saes, neurons, other)


def test_a_language_without_latents_is_noted():
    neurons = neurons_of()
    empty = neurons.tables["fr"]
    none = dataclasses.replace(
        neurons,
        tables={
            **neurons.tables,
            "fr": dataclasses.replace(
                empty, layer=empty.layer[:0], index=empty.index[:0], score=empty.score[:0], site=empty.site[:0]
            ),
        },
    )
    scores = feature_language_id(
        model_of(),
        saes_of(),
        none,
        stats_of(),
        Corpus.from_texts(TEXTS),
        bos="always",
        random_draws=0,
        fasttext=False,
        progress=False,
    )
    assert scores.notes[0] == "fr has no specific latent, so it is never named"
    assert "fr" not in set(scores.named("count")["named"])
    assert list(scores.summary(n_resamples=10).index) == ["count", "min-max"]


@pytest.mark.slow
def test_the_card_of_the_packaged_autoencoder_says_what_is_found():
    sae, model = load_sae("demo"), load_model("demo")
    found = record(model, Corpus.packaged(), collect=collect_for(["sae_lape"], saes=sae), progress=False)
    neurons = identify(found, "sae_lape")
    card = (PACKAGED / "sae" / "README.md").read_text("utf-8")
    counts = ", ".join(f"{code} {n}" for code, n in neurons.counts().items())
    assert f"{len(neurons)} latents of one language each: {counts}." in card
    scores = feature_language_id(model, sae, neurons, found.features, progress=False)
    table = scores.summary()
    for rule, label in (("count", "count"), ("min-max", "min-max"), (FASTTEXT, "fastText (lid.176.ftz)")):
        row = table.loc[rule]
        control = "-" if rule == FASTTEXT else f"{row['control']:.3f}"
        ends = f"[{row['low']:.3f}, {row['high']:.3f}]"
        assert f"| {label} | {row['mean']:.3f} {ends} | {row['macro_f1']:.3f} | {control} |" in card
