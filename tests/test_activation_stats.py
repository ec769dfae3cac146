"""Tests of activation statistics: merging, tables, files, and the golden file of schema 1."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError
from results import make_partial

from lens_neurons.activation_stats import ActivationStats
from lens_neurons.collecting import PartialSums
from lens_neurons.corpus import Corpus
from lens_neurons.errors import DataError, ProvenanceError, SettingError, StorageError
from lens_neurons.storage import Provenance, save_tensors

GOLDEN = Path(__file__).parent / "data" / "activation_stats_v1.safetensors"
SHAPE = (2, 3)
PROVENANCE = Provenance(model="m", weights="w", dtype="float32", n_layers=2, d_mlp=3, policy={"bos": "model"})
TENSORS = ("tokens", "texts", "positive", "sum", "sum_sq", "sum_positive", "text_max", "text_median", "text_mean")


def make_values(seed: int, tokens: int = 20) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(tokens, *SHAPE))


def make_stats(*languages: str, **changes) -> ActivationStats:
    partials = {code: make_partial(make_values(i), seed=i) for i, code in enumerate(languages)}
    corpora = {code: f"texts of {code}" for code in languages}
    return ActivationStats.from_partials(partials, provenance=PROVENANCE.replace(**changes), corpora=corpora)


def assert_equal(one: ActivationStats, other: ActivationStats) -> None:
    for name in TENSORS:
        mine, theirs = getattr(one, name), getattr(other, name)
        assert (mine is None) == (theirs is None), name
        assert mine is None or (mine.dtype == theirs.dtype and torch.equal(mine, theirs)), name
    assert (one.languages, one.site, one.provenance, one.notes) == (
        *(other.languages, other.site, other.provenance, other.notes),
    )


def test_derived_statistics_are_those_of_the_values():
    stats = make_stats("en", "fr")
    for i in range(2):
        values = make_values(i)
        np.testing.assert_array_equal(stats.probability()[i], (values > 0).mean(axis=0))
        np.testing.assert_allclose(stats.mean()[i], values.mean(axis=0))
        np.testing.assert_allclose(stats.std()[i], values.std(axis=0))
        expected = np.ma.masked_less_equal(values, 0).mean(axis=0).filled(0)
        np.testing.assert_allclose(stats.mean_positive()[i], expected)


def test_mean_positive_of_a_silent_neuron_is_zero():
    stats = ActivationStats.from_partials({"en": make_partial(-np.ones((4, *SHAPE)))}, provenance=PROVENANCE)
    assert torch.equal(stats.mean_positive(), torch.zeros(1, *SHAPE, dtype=torch.float64))


def test_text_statistics_of_an_even_number_of_texts():
    stats = make_stats("en", "fr")
    rows = make_partial(make_values(1), seed=1).rows.numpy()
    np.testing.assert_array_equal(stats.text_statistic("p_max", "fr"), rows.max(axis=0))
    # The lower of the two in the middle: what torch.median in the published code gives, not the mean of both.
    np.testing.assert_array_equal(stats.text_statistic("p_median", "fr"), np.sort(rows, axis=0)[1])
    np.testing.assert_allclose(stats.text_statistic("p_mean", "fr"), rows.mean(axis=0), rtol=1e-6)


def test_text_statistics_need_a_known_name_and_language():
    stats = make_stats("en")
    with pytest.raises(SettingError, match="p_min"):
        stats.text_statistic("p_min", "en")
    with pytest.raises(DataError, match="'fr' was not recorded"):
        stats.text_statistic("p_max", "fr")
    assert torch.equal(stats.text_statistic("p_max", "eng_Latn"), stats.text_statistic("p_max", "en"))


@pytest.mark.parametrize(("policy", "reason"), [({"pack": True}, "packed"), ({}, "none were kept")])
def test_text_statistics_that_were_not_kept(policy, reason):
    parts = {"en": make_partial(make_values(0), positions=[])}
    stats = ActivationStats.from_partials(parts, provenance=PROVENANCE.replace(policy=policy))
    assert stats.text_max is None
    with pytest.raises(DataError, match=reason):
        stats.text_statistic("p_max", "en")


def test_one_language_without_text_rows_is_an_error():
    parts = {"en": make_partial(make_values(0)), "fr": make_partial(make_values(1), positions=[])}
    with pytest.raises(DataError, match="fr has no token in the texts"):
        ActivationStats.from_partials(parts, provenance=PROVENANCE)


def test_a_language_without_tokens_is_an_error():
    with pytest.raises(DataError, match="'en' has no token"):
        ActivationStats.from_partials({"en": make_partial(make_values(0), tokens=0)}, provenance=PROVENANCE)


def test_partial_sums_add_up_and_keep_rows_in_corpus_order():
    first = make_partial(make_values(0), [4, 9], 0, split=1)
    second = make_partial(make_values(1), [1, 6], 1, truncated=2)
    both = first.add(second)
    values = np.concatenate([make_values(0), make_values(1)])
    np.testing.assert_array_equal(both.positive, (values > 0).sum(axis=0))
    np.testing.assert_allclose(both.sum_sq, (values**2).sum(axis=0))
    assert (both.tokens, both.texts, both.truncated, both.split) == (40, 20, 2, 1)
    assert both.row_positions.tolist() == [1, 4, 6, 9]
    assert torch.equal(both.rows[[1, 3]], first.rows)
    assert torch.equal(both.rows[[0, 2]], second.rows)


def test_partial_sums_survive_their_tensors():
    part = make_partial(make_values(0), truncated=3, split=4)
    back = PartialSums.from_tensors(part.to_tensors())
    for field in dataclasses.fields(part):
        mine, theirs = getattr(part, field.name), getattr(back, field.name)
        assert torch.equal(mine, theirs) if isinstance(mine, torch.Tensor) else mine == theirs


def test_from_counts():
    positive = {"deu_Latn": torch.tensor([[1, 0, 5], [2, 2, 2]], dtype=torch.int32), "fr": torch.ones(2, 3).long()}
    stats = ActivationStats.from_counts({"fr": 10, "deu_Latn": 5}, positive)
    assert stats.languages == ("fr", "de")
    assert stats.positive.dtype == torch.int64
    np.testing.assert_array_equal(stats.probability()[1], np.array([[1, 0, 5], [2, 2, 2]]) / 5)
    assert (stats.n_layers, stats.n_neurons) == (2, 3)
    assert not stats.provenance.known
    for call in (stats.mean, stats.std, stats.mean_positive):
        with pytest.raises(DataError, match="counts alone"):
            call()
    with pytest.raises(DataError, match="none were kept"):
        stats.text_statistic("p_max", "de")


@pytest.mark.parametrize(
    ("tokens", "positive", "message"),
    [
        ({"en": 5}, {"fr": torch.ones(2, 3).long()}, "give both for the same"),
        ({}, {}, "give both for the same"),
        ({"en": 5, "fr": 5}, {"en": torch.ones(2, 3).long(), "fr": torch.ones(2, 4).long()}, "one shape"),
        ({"en": 5}, {"en": torch.ones(3).long()}, "one shape"),
        ({"en": 5}, {"en": torch.ones(2, 3)}, "integers"),
        ({"en": 5}, {"en": torch.full((2, 3), 6)}, "between 6 and 6 of 5"),
        ({"en": 5}, {"en": torch.full((2, 3), -1)}, "between -1"),
        ({"en": 0}, {"en": torch.zeros(2, 3).long()}, "at least 1"),
        ({"en": 5, "eng_Latn": 5}, dict.fromkeys(("en", "eng_Latn"), torch.ones(2, 3).long()), "each once"),
    ],
)
def test_wrong_counts(tokens, positive, message):
    with pytest.raises(DataError, match=message):
        ActivationStats.from_counts(tokens, positive)


def test_select_and_merge_are_each_others_inverse():
    stats = make_stats("en", "fr", "de")
    parts = [stats.select([code]) for code in ("en", "fr", "de")]
    assert parts[1].languages == ("fr",)
    assert torch.equal(parts[1].text_median[0], stats.text_median[1])
    assert_equal(parts[0].merge(*parts[1:]), stats)
    assert_equal(parts[0].merge(parts[1]).merge(parts[2]), stats)
    assert stats.select(["de", "en"]).languages == ("de", "en")
    with pytest.raises(DataError, match="'sw' was not recorded"):
        stats.select(["sw"])


def test_corpus_fingerprint_of_a_part_is_that_of_the_smaller_corpus():
    corpus = Corpus.from_texts({"en": ["a"], "fr": ["b"], "de": ["c"]})
    corpora = {code: corpus.fingerprint(code) for code in corpus.languages}
    partials = {code: make_partial(make_values(0)) for code in corpora}
    stats = ActivationStats.from_partials(partials, provenance=PROVENANCE, corpora=corpora)
    assert stats.provenance.corpus == corpus.fingerprint_all()
    assert stats.select(["fr", "de"]).provenance.corpus == corpus.select(["de", "fr"]).fingerprint_all()


@pytest.mark.parametrize(
    ("changes", "both"),
    [
        ({"weights": "v"}, "weights is 'w' in one and 'v'"),
        ({"dtype": "bfloat16"}, "'float32' in one and 'bfloat16'"),
        ({"policy": {"bos": "never"}}, "policy is {'bos': 'model'} in one and {'bos': 'never'}"),
        ({"tokenizer": "t"}, "tokenizer"),
        ({"site": "post"}, "'gate_act' in one and 'post'"),
        ({"extra": {"recording": {"texts_kept": 5}}}, "texts_kept is None in one and 5"),
    ],
)
def test_merge_refuses_what_does_not_belong_together(changes, both):
    with pytest.raises(ProvenanceError, match=both):
        make_stats("en").merge(make_stats("fr", **changes))


def test_merge_refuses_a_language_twice_and_missing_sums():
    with pytest.raises(DataError, match="en is in more than one"):
        make_stats("en", "fr").merge(make_stats("en"))
    counts = ActivationStats.from_counts(
        {"sw": 5}, {"sw": torch.ones(*SHAPE, dtype=torch.int64)}, provenance=PROVENANCE
    )
    with pytest.raises(DataError, match="has 'sum' and another has not"):
        make_stats("en").merge(counts)


def test_frame_has_one_row_a_language():
    parts = {"en": make_partial(make_values(0), truncated=3), "fr": make_partial(-np.ones((4, *SHAPE)), split=2)}
    frame = ActivationStats.from_partials(parts, provenance=PROVENANCE).to_frame().set_index("language")
    assert frame.loc["en", ["tokens", "texts", "text_rows", "truncated", "split"]].tolist() == [20, 10, 4, 3, 0]
    assert frame.loc["en", "mean_probability"] == pytest.approx((make_values(0) > 0).mean())
    assert frame.loc["fr", ["split", "silent_neurons", "mean_probability"]].tolist() == [2, 6, 0]


@pytest.mark.parametrize("counts_only", [False, True])
def test_file_holds_everything(tmp_path, counts_only):
    stats = make_stats("en", "fr")
    if counts_only:
        stats = ActivationStats.from_counts({"en": 9}, {"en": torch.ones(2, 3).long()}, site="post")
    stats.save(tmp_path / "stats.safetensors")
    assert_equal(ActivationStats.load(tmp_path / "stats.safetensors"), stats)
    assert_equal(ActivationStats.load(tmp_path), stats)
    assert repr(ActivationStats.load(tmp_path)) == repr(stats)


@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_damaged_file_is_named(tmp_path, damage):
    path = tmp_path / "some.safetensors"
    make_stats("en").save(path)
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data if damage == "flip" else data[:-7])
    with pytest.raises(StorageError, match=r"some\.safetensors"):
        ActivationStats.load(path)


def test_files_of_another_kind(tmp_path):
    save_tensors(tmp_path / "x.safetensors", {"a": torch.zeros(1)}, {"schema": 1, "kind": "neurons"})
    with pytest.raises(StorageError, match="holds 'neurons'"):
        ActivationStats.load(tmp_path / "x.safetensors")
    with pytest.raises(StorageError, match="no finished recording"):
        ActivationStats.load(tmp_path)
    with pytest.raises(StorageError, match="does not exist"):
        ActivationStats.load(tmp_path / "absent.safetensors")


def make_golden() -> ActivationStats:
    """Return what the golden file of schema 1 holds."""
    provenance = Provenance(
        model="golden",
        weights="ab" * 32,
        dtype="float32",
        n_layers=2,
        d_mlp=3,
        policy={"bos": "model"},
        package_version="0.1.0",
        extra={"recording": {"texts_kept": 100}},
    )
    values = np.arange(24, dtype=np.float64).reshape(4, *SHAPE) / 8 - 1
    partials: dict[str, PartialSums] = {}
    for i, code in enumerate(("en", "sw")):
        rows = torch.arange(18, dtype=torch.float32).reshape(3, *SHAPE) / 4 - i
        partials[code] = make_partial(values - i, [0, 1, 2], rows=rows, truncated=i)
    return ActivationStats.from_partials(partials, provenance=provenance, corpora={"en": "c1", "sw": "c2"})


def test_golden_file_of_schema_1_loads():
    stats = ActivationStats.load(GOLDEN)
    assert_equal(stats, make_golden())
    assert stats.provenance.schema == 1


def test_wrong_shapes_are_refused():
    stats = make_stats("en")
    with pytest.raises(TypeCheckError):
        dataclasses.replace(stats, tokens=torch.ones(2, dtype=torch.int64))
    with pytest.raises(TypeCheckError):
        dataclasses.replace(stats, sum=stats.sum.float())
    with pytest.raises(TypeCheckError):
        dataclasses.replace(make_partial(make_values(0)), rows=torch.zeros(3, *SHAPE))
