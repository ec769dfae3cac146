"""The perplexity matrix against plain transformers, with neither BOS nor padding counted."""

import numpy as np
import pandas as pd
import pytest
from evaluation_oracle import (
    LANGUAGES,
    continuation_logprob,
    make_neurons,
    make_stats,
    set_to,
    steered,
    tiny_model,
)
from oracle import sentence

from lens_neurons.corpus import Corpus
from lens_neurons.errors import DataError, ProvenanceError, SettingError
from lens_neurons.evaluation.intervals import resample_counts
from lens_neurons.evaluation.perplexity import PerplexityMatrix, perplexity_matrix
from lens_neurons.evaluation.tables import COLUMNS, NONE, chosen, tidy
from lens_neurons.storage import derive_seed

TEXTS = {
    "en": ["The cat sat on the mat.", "It rains.", "A man looked at the rain and the mat for an hour."],
    "fr": ["Le chat regarde la pluie.", "Il pleut beaucoup ici.", "Le tapis."],
    "ja": ["猫は雨を見た。", "雨が降る。", "猫。"],
}


@pytest.fixture(scope="module")
def parts():
    tiny, model, adapter = tiny_model(add_bos=True)
    return tiny, model, adapter, make_neurons(adapter, empty=("sw",))


@pytest.fixture(scope="module")
def matrix(parts) -> PerplexityMatrix:
    _, model, _, neurons = parts
    return perplexity_matrix(model, neurons, Corpus.from_texts(TEXTS), random_draws=2, seed=3, progress=False)


def test_a_baseline_is_taken_over_from_the_same_texts_alone(matrix: PerplexityMatrix, parts) -> None:
    _, model, _, neurons = parts
    settings = {"random_draws": 2, "seed": 3, "progress": False, "baseline": matrix}
    assert perplexity_matrix(model, neurons, Corpus.from_texts(TEXTS), **settings).items.equals(matrix.items)
    with pytest.raises(ProvenanceError, match="corpus") as caught:
        perplexity_matrix(model, neurons, Corpus.from_texts({**TEXTS, "fr": ["Il neige."]}), **settings)
    sentence(caught.value)
    with pytest.raises(ProvenanceError, match="policy"):
        perplexity_matrix(model, neurons, Corpus.from_texts(TEXTS), max_tokens=4, **settings)


def expected_nll(tiny, text: str, bos: bool = True) -> tuple[float, int]:
    ids = tiny.tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = [tiny.tokenizer.bos_token_id, *ids] if bos else ids
    return -continuation_logprob(tiny.hf_model, ids, 1), len(ids) - 1


def corpus_nll(tiny, code: str, bos: bool = True) -> float:
    parts = [expected_nll(tiny, text, bos) for text in TEXTS[code]]
    return sum(nll for nll, _ in parts) / sum(n for _, n in parts)


def test_every_text(matrix: PerplexityMatrix, parts) -> None:
    tiny, _, _, neurons = parts
    assert tuple(matrix.items.columns) == COLUMNS
    for silenced in ("", "en", "fr", "ja"):
        condition = "neurons" if silenced else NONE
        change = set_to(neurons, silenced, "=0", None) if silenced else lambda output, _: output
        with steered(tiny.hf_model, change):
            for code, texts in TEXTS.items():
                rows = chosen(matrix.items, condition=condition, language=silenced, target=code, metric="nll")
                values = rows.set_index("item")["value"]
                for number, text in enumerate(texts):
                    total, n = expected_nll(tiny, text)
                    assert values[number] == pytest.approx(total / n, abs=1e-4)
                    if not silenced:
                        counted = chosen(matrix.items, target=code, metric="tokens").set_index("item")["value"]
                        assert counted[number] == n


@pytest.mark.parametrize("metric", ["nll", "perplexity"])
def test_intervals_of_every_cell(matrix: PerplexityMatrix, metric: str) -> None:
    low, high = matrix.change_interval(metric, n_resamples=50)
    counts = resample_counts(3, 50, 3, "texts")
    tokens = {code: chosen(matrix.items, target=code, metric="tokens")["value"].to_numpy() for code in TEXTS}
    for silenced in ("en", "ja"):
        for code in TEXTS:
            after = chosen(matrix.items, condition="neurons", language=silenced, target=code, metric="nll")["value"]
            before = chosen(matrix.items, condition=NONE, target=code, metric="nll")["value"]
            drawn = []
            for times in counts:
                picked = [i for i, n in enumerate(times) for _ in range(int(n))]
                weights = tokens[code][picked]
                was, now = (np.average(v.to_numpy()[picked], weights=weights) for v in (before, after))
                drawn.append(np.exp(now) - np.exp(was) if metric == "perplexity" else now - was)
            assert low.loc[silenced, code] == pytest.approx(np.quantile(drawn, 0.025))
            assert high.loc[silenced, code] == pytest.approx(np.quantile(drawn, 0.975))
    # A language without neurons changes nothing.
    assert (low.loc["sw"] == 0).all()
    assert (high.loc["sw"] == 0).all()


def test_the_control_has_an_interval(matrix: PerplexityMatrix) -> None:
    table = matrix.summary(n_resamples=200)
    draws = [matrix.change(condition=f"random-{i}") for i in range(2)]
    for code in TEXTS:
        row = table.loc[code]
        assert row["control"] == pytest.approx(np.mean([draw.loc[code, code] for draw in draws]))
        assert row["control_low"] <= row["control"] <= row["control_high"]
        assert row["control_low"] < row["control_high"]


def test_change_is_weighted_by_tokens(matrix: PerplexityMatrix, parts) -> None:
    tiny, _, _, neurons = parts
    before = {code: corpus_nll(tiny, code) for code in TEXTS}
    assert matrix.baseline().to_dict() == pytest.approx(before, abs=1e-4)
    assert matrix.baseline("perplexity").to_dict() == pytest.approx(
        {code: np.exp(nll) for code, nll in before.items()}, rel=1e-3
    )
    nll, perplexity = matrix.change(), matrix.change("perplexity")
    assert list(nll.index) == list(LANGUAGES)
    assert list(nll.columns) == list(TEXTS)
    for silenced in ("en", "fr", "ja"):
        with steered(tiny.hf_model, set_to(neurons, silenced, "=0", None)):
            after = {code: corpus_nll(tiny, code) for code in TEXTS}
        for code in TEXTS:
            assert nll.loc[silenced, code] == pytest.approx(after[code] - before[code], abs=2e-4)
            expected = np.exp(after[code]) - np.exp(before[code])
            assert perplexity.loc[silenced, code] == pytest.approx(expected, rel=1e-2, abs=0.05)


def test_a_language_without_neurons_changes_nothing(matrix: PerplexityMatrix) -> None:
    assert (matrix.change().loc["sw"] == 0).all()
    assert (matrix.change(condition="random").loc["sw"] == 0).all()
    assert any("no neurons" in note for note in matrix.notes)


def test_without_bos_the_first_token_is_not_scored(parts) -> None:
    tiny, model, _, neurons = parts
    found = perplexity_matrix(
        model, neurons, Corpus.from_texts(TEXTS), languages=["en"], random_draws=0, bos="never", progress=False
    )
    for code in TEXTS:
        assert found.baseline()[code] == pytest.approx(corpus_nll(tiny, code, bos=False), abs=1e-4)


def test_the_control_silences_random_neurons(matrix: PerplexityMatrix, parts) -> None:
    tiny, _, _, neurons = parts
    assert matrix.draws == ("random-0", "random-1")
    means = []
    for draw in range(2):
        units = neurons.random_like(derive_seed(3, "control", draw))
        before = corpus_nll(tiny, "fr")
        with steered(tiny.hf_model, set_to(units, "fr", "=0", None)):
            means.append(corpus_nll(tiny, "fr") - before)
        assert matrix.change(condition=f"random-{draw}").loc["fr", "fr"] == pytest.approx(means[-1], abs=2e-4)
    assert matrix.summary().loc["fr", "control"] == pytest.approx(np.mean(means), abs=2e-4)


def test_a_factor_instead_of_silence(parts) -> None:
    tiny, model, adapter, neurons = parts
    stats = make_stats(adapter)
    found = perplexity_matrix(
        model,
        neurons,
        Corpus.from_texts(TEXTS),
        intervention="p_median",
        stats=stats,
        languages=["ja"],
        random_draws=0,
        progress=False,
    )
    before = corpus_nll(tiny, "fr")
    with steered(tiny.hf_model, set_to(neurons, "ja", "p_median", stats)):
        after = corpus_nll(tiny, "fr")
    assert found.change().loc["ja", "fr"] == pytest.approx(after - before, abs=2e-4)


def made_up(own: float, others: dict[str, float], n: int = 40, noise: float = 0.3, unequal: bool = False):
    """Return a matrix with known changes of language "a", and text difficulty that cancels only in pairs."""
    draw = np.random.default_rng(0)
    blocks = []
    for code, cost in {"a": own, **others}.items():
        size = n + (code == "b") * unequal
        difficulty = 3 + 2 * draw.random(size)
        shared = {"target": code, "item": range(size)}
        blocks.append({**shared, "condition": NONE, "metric": "tokens", "value": draw.integers(5, 30, size)})
        blocks.append({**shared, "condition": NONE, "metric": "nll", "value": difficulty})
        steered_nll = difficulty + cost + noise * draw.standard_normal(size)
        blocks.append({**shared, "condition": "neurons", "language": "a", "metric": "nll", "value": steered_nll})
    settings = {"languages": ["a"], "tested": ["a", *others], "seed": 0, "intervention": "silence", "neurons": {"a": 5}}
    return PerplexityMatrix(tidy(blocks), (), settings)


@pytest.mark.parametrize("unequal", [False, True])
def test_own_minus_largest_other(unequal: bool) -> None:
    """Against a slow paired bootstrap that finds the largest other language anew in each resample."""
    matrix = made_up(0.3, {"b": 0.1, "c": 0.15}, unequal=unequal)
    found = matrix.own_minus_largest_other(n_resamples=4000).loc["a"]
    values = {code: {} for code in "abc"}
    for code in "abc":
        rows = chosen(matrix.items, target=code)
        tokens = chosen(rows, metric="tokens")["value"].to_numpy()
        before = chosen(rows, metric="nll", condition=NONE)["value"].to_numpy()
        after = chosen(rows, metric="nll", condition="neurons")["value"].to_numpy()
        values[code] = (tokens, (after - before) * tokens)
    point = {code: delta.sum() / tokens.sum() for code, (tokens, delta) in values.items()}
    assert found["own"] == pytest.approx(point["a"])
    other = max("bc", key=lambda code: point[code])
    assert found["other"] == other
    assert found["largest_other"] == pytest.approx(point[other])
    assert found["difference"] == pytest.approx(point["a"] - point[other])
    draw = np.random.default_rng(9)
    differences = []
    for _ in range(4000):
        joint = draw.integers(0, 40, 40)
        drawn = {}
        for code, (tokens, delta) in values.items():
            at = draw.integers(0, len(tokens), len(tokens)) if unequal else joint
            drawn[code] = delta[at].sum() / tokens[at].sum()
        differences.append(drawn["a"] - max(drawn["b"], drawn["c"]))
    low, high = np.quantile(differences, [0.025, 0.975])
    assert (found["low"], found["high"]) == pytest.approx((low, high), abs=0.012)
    assert found["n"] == 40


def test_above_only_where_the_interval_is() -> None:
    assert made_up(0.9, {"b": 0.1, "c": 0.2}).own_minus_largest_other().loc["a", "above"]
    assert not made_up(0.2, {"b": 0.1, "c": 0.2}).own_minus_largest_other().loc["a", "above"]
    assert not made_up(0.1, {"b": 0.1, "c": 0.9}).own_minus_largest_other().loc["a", "above"]


def test_summary(matrix: PerplexityMatrix) -> None:
    table = matrix.summary(n_resamples=500)
    # Swahili is silenced but not tested, so it has no own change.
    assert list(table.index) == ["en", "fr", "ja"]
    own = matrix.own_minus_largest_other(n_resamples=500)
    change = matrix.change()
    for code in table.index:
        assert table.loc[code, "mean"] == pytest.approx(change.loc[code, code])
        assert own.loc[code, "largest_other"] == pytest.approx(change.loc[code].drop(code).max())
    assert table["n"].tolist() == [3, 3, 3]
    above = [matrix.own_minus_largest_other(condition=draw, n_resamples=500)["above"].mean() for draw in matrix.draws]
    assert table["control_above"].mean() == pytest.approx(np.mean(above))
    assert (table["low"] <= table["mean"]).all()
    assert (table["mean"] <= table["high"]).all()


@pytest.mark.parametrize("name", ["matrix.parquet", "matrix.jsonl"])
def test_round_trip(name: str, matrix: PerplexityMatrix, tmp_path) -> None:
    matrix.save(tmp_path / name)
    found = PerplexityMatrix.load(tmp_path / name)
    pd.testing.assert_frame_equal(found.change(), matrix.change(), check_exact=True)
    pd.testing.assert_frame_equal(found.summary(), matrix.summary(), check_exact=True)
    assert found.notes == matrix.notes
    assert found.provenance == matrix.provenance


def test_repr_is_short(matrix: PerplexityMatrix) -> None:
    assert "4 languages under 'silence' x 3 tested" in repr(matrix)


def test_wrong_arguments(matrix: PerplexityMatrix, parts) -> None:
    _, model, _, neurons = parts
    corpus = Corpus.from_texts(TEXTS)
    for arguments, error in (
        ({"intervention": "p_max"}, SettingError),
        ({"languages": ["de"]}, DataError),
        ({"random_draws": -2}, SettingError),
    ):
        with pytest.raises(error) as caught:
            perplexity_matrix(model, neurons, corpus, progress=False, **arguments)
        sentence(caught.value)
    with pytest.raises(DataError) as caught:
        perplexity_matrix(model, neurons, Corpus.from_texts({"en": ["a"]}), bos="never", progress=False)
    sentence(caught.value)
    for call in (lambda: matrix.change("bits"), lambda: matrix.change(condition="random-9")):
        with pytest.raises(SettingError) as caught:
            call()
        sentence(caught.value)
