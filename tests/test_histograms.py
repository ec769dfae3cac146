"""Tests of bins, histograms and their collector: against numpy, merged, saved, interrupted, badly fed."""

import dataclasses
import functools
import math
import shutil

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError
from models import SAMPLE_TEXTS, tiny
from results import make_partial

from lens_neurons.activation_stats import ActivationStats
from lens_neurons.batching import Shard, TokenPolicy, encode, make_batches
from lens_neurons.bins import Bins, NeuronBins
from lens_neurons.collect import Collect
from lens_neurons.corpus import Corpus
from lens_neurons.errors import DataError, LensNeuronsError, ModelError, ProvenanceError, SettingError, StorageError
from lens_neurons.histograms import MOST_TOKENS, HistogramCollector, Histograms
from lens_neurons.model import adapt, load_model
from lens_neurons.recorded import Recording
from lens_neurons.recording import plan, record
from lens_neurons.storage import Provenance

TEXTS = {"en": [*SAMPLE_TEXTS[:5], "", "x"], "fr": [text[::-1] for text in SAMPLE_TEXTS[:4]], "C/C++": ["int main();"]}
# Several shards a language and several batches a shard.
SMALL = {"shard_tokens": 90, "batch_tokens": 70, "progress": False}
FEW = Bins(n=20, low=-1.0, high=2.0, scale=0.05)


@functools.cache
def load(arch: str = "llama", dtype: torch.dtype = torch.float64):
    return load_model(tiny(arch).folder, backend="hooked", dtype=dtype)


@pytest.fixture
def corpus() -> Corpus:
    return Corpus.from_texts(TEXTS)


def make_values(seed: int = 0) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(seed)
    values = {code: rng.standard_t(2, size=(tokens, 2, 5)) for code, tokens in (("en", 60), ("fr", 35), ("sw", 1))}
    return {code: torch.from_numpy(table).float() for code, table in values.items()}


def numpy_counts(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Return counts [layer neuron bin] of float32 values [token layer neuron], one neuron at a time."""
    found = np.zeros((*values.shape[1:], len(edges) + 1), dtype=np.int64)
    for layer in range(values.shape[1]):
        for neuron in range(values.shape[2]):
            found[layer, neuron] = np.histogram(values[:, layer, neuron], [-np.inf, *edges, np.inf])[0]
    return found


def assert_equal(one: Histograms, other: Histograms) -> None:
    assert one.languages == other.languages
    assert torch.equal(one.tokens, other.tokens)
    assert one.bins.to_dict() == other.bins.to_dict()
    for code in one.languages:
        assert torch.equal(one.counts[code], other.counts[code])
    assert (one.site, one.provenance, one.notes) == (other.site, other.provenance, other.notes)


@pytest.mark.parametrize(
    "bins", [Bins(), FEW, Bins(n=7, low=0.5, high=90.0, scale=3.0), Bins(n=1, low=-5, high=-1), Bins(n=399)]
)
def test_a_bin_is_where_a_binary_search_finds_it(bins):
    edges = bins.edges()
    rng = np.random.default_rng(0)
    drawn = torch.from_numpy(rng.normal(size=5000) * 10.0 ** rng.uniform(-6, 6, size=5000)).float()
    up, down = (torch.nextafter(edges, torch.full_like(edges, to)) for to in (math.inf, -math.inf))
    special = torch.tensor([0.0, -0.0, 1e-44, -1e-44, 3.4e38, -3.4e38, math.inf, -math.inf])
    for values in (drawn, edges, up, down, special):
        found = bins.index(values)
        assert torch.equal(found, torch.bucketize(values, edges, right=True))
        np.testing.assert_array_equal(found, np.searchsorted(edges.numpy(), values.numpy(), side="right"))
    assert ((bins.index(torch.tensor([math.nan, -math.nan])) - (bins.n + 1) / 2).abs() <= (bins.n + 1) / 2).all()


def test_edges_are_uniform_in_asinh_but_for_rounding():
    bins = Bins()
    edges = bins.edges().double()
    assert (len(edges), float(edges[0]), float(edges[200]), float(edges[-1])) == (401, -32.0, 0.0, 32.0)
    exact = 0.02 * np.sinh(np.linspace(-np.arcsinh(1600), np.arcsinh(1600), 401))
    np.testing.assert_allclose(edges, exact, rtol=2**-9, atol=1e-15)
    ratio = edges.diff().numpy() / np.diff(exact)
    assert 0.9 < ratio.min() < ratio.max() < 1.1
    middles = bins.middles_of(1, 2, 4)
    assert middles.shape == (2, 402)
    assert torch.equal(middles[1, 1:-1], (edges[1:] + edges[:-1]) / 2)
    assert (float(middles[0, 0]), float(middles[0, -1])) == (-32.0, 32.0)


@pytest.mark.parametrize("bins", [Bins(), FEW])
def test_counts_are_those_of_numpy(bins):
    values = make_values()
    made = Histograms.from_values(values, bins=bins)
    for i, (code, table) in enumerate(values.items()):
        expected = numpy_counts(table.numpy(), bins.edges().numpy())
        np.testing.assert_array_equal(made.counts[code], expected)
        np.testing.assert_allclose(made.probability()[i], expected / len(table), rtol=1e-15)
        assert torch.equal(made.probability(1, slice(2, 4))[i], made.probability()[i, 1, 2:4])
    assert made.tokens.tolist() == [60, 35, 1]
    frame = made.to_frame(1, 3)
    own = frame[frame.language == "fr"]
    assert list(frame.columns) == ["language", "low", "high", "tokens", "share"]
    assert own.tokens.tolist() == made.counts["fr"][1, 3].tolist()
    assert own.share.sum() == pytest.approx(1)
    assert own.low.tolist()[1:] == own.high.tolist()[:-1] == bins.edges().tolist()


def test_bins_of_each_neurons_own_range():
    rng = np.random.default_rng(3)
    values = {code: rng.gamma(2, 0.5, size=(n, 2, 5)) - 0.3 for code, n in (("en", 200), ("fr", 90))}
    for table in values.values():
        table[:, 1, 4] = 0.7
    tensors = {code: torch.from_numpy(table).float() for code, table in values.items()}
    stats = _stats(values)
    bins = NeuronBins.around(stats, n=30)
    pooled = np.concatenate(list(values.values()))
    low, high = pooled.mean(axis=0) - 3 * pooled.std(axis=0), pooled.mean(axis=0) + 3 * pooled.std(axis=0)
    low[1, 4], high[1, 4] = 0.65, 0.75
    np.testing.assert_allclose(bins.low, np.maximum(low, -0.4), rtol=1e-5)
    np.testing.assert_allclose(bins.high, high, rtol=1e-5)
    assert float(bins.low.min()) == pytest.approx(-0.4)
    assert float(NeuronBins.around(stats, floor=None).low.min()) < -0.41
    elsewhere = dataclasses.replace(stats, site="post")
    assert torch.equal(NeuronBins.around(elsewhere).low, NeuronBins.around(stats, floor=None).low)
    made = Histograms.from_values(tensors, bins=bins)
    for code, table in tensors.items():
        for layer in range(2):
            for neuron in range(5):
                start, width = bins.low[layer, neuron], (bins.high[layer, neuron] - bins.low[layer, neuron]) / 30
                places = np.floor((table[:, layer, neuron] - start).numpy() / width.numpy()).clip(-1, 30).astype(int)
                expected = np.bincount(places + 1, minlength=32)
                np.testing.assert_array_equal(made.counts[code][layer, neuron], expected)
    assert made.counts["en"][1, 4].max() == 200
    np.testing.assert_allclose(bins.edges_of(0, 1)[[0, -1]], [bins.low[0, 1], bins.high[0, 1]])
    np.testing.assert_allclose(
        bins.middles_of(0, 1, 2)[0, 1:-1],
        (bins.edges_of(0, 1)[1:] + bins.edges_of(0, 1)[:-1]) / 2,
        rtol=1e-4,
        atol=1e-6,
    )
    odd = torch.tensor([[math.nan, math.inf, -math.inf, 1e30, -1e30]])
    assert bins.place(odd, 0, 0).tolist() == [[0, 31, 0, 31, 0]]


def _stats(values: dict[str, np.ndarray]) -> ActivationStats:
    partials = {code: make_partial(table, []) for code, table in values.items()}
    return ActivationStats.from_partials(partials, provenance=Provenance.unknown(next(iter(values.values())).shape[1:]))


def cached_values(arch: str, site: str, texts: list[str]) -> np.ndarray:
    """Return float32 values [token layer neuron] of single texts, from TransformerLens's own cache."""
    model, tokenizer = load(arch), tiny(arch).tokenizer
    rows: list[np.ndarray] = []
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False)
        if not ids:
            continue
        cache = model.run_with_cache(torch.tensor([[tokenizer.bos_token_id, *ids]]))[1]
        name = {"gate_act": "mlp.hook_pre", "post": "mlp.hook_post", "q": "attn.hook_q"}[site]
        found = torch.stack([cache[f"blocks.{layer}.{name}"][0, 1:].flatten(1) for layer in range(3)], dim=1)
        if site == "gate_act":
            found = torch.nn.functional.silu(found) if arch == "llama" else model.blocks[0].mlp.act_fn(found)
        rows.append(found.float().numpy())
    return np.concatenate(rows)


@pytest.mark.parametrize(
    ("arch", "site"), [("llama", "gate_act"), ("bloom", "gate_act"), ("llama", "post"), ("llama", "q")]
)
def test_recorded_counts_are_those_of_cached_values(corpus, arch, site):
    # Recorded in padded batches, compared with texts that ran alone.
    bins = Bins() if site == "gate_act" else FEW
    made = record(load(arch), corpus, site=site, bos="always", collect=Collect(histograms=bins), **SMALL)
    for code, texts in TEXTS.items():
        values = cached_values(arch, site, texts)
        expected = numpy_counts(values, bins.edges().numpy())
        np.testing.assert_array_equal(made.histograms.counts[code], expected)
        assert int(made.histograms.tokens[made.histograms.index(code)]) == len(values)
    assert torch.equal(made.histograms.tokens, made.stats.tokens)
    width = values.shape[2]
    assert (made.histograms.provenance.site, made.histograms.provenance.d_mlp) == (site, width)


@pytest.mark.parametrize("own_range", [False, True])
def test_blocks_change_nothing(corpus, monkeypatch, own_range):
    settings = {**SMALL, "bos": "always"}
    bins = NeuronBins.around(record(load(), corpus, **settings), n=12) if own_range else FEW
    collect = Collect(histograms=bins)
    whole = record(load(), corpus, collect=collect, **settings).histograms
    monkeypatch.setattr("lens_neurons.histograms._BLOCK", {"cpu": (64, 7)})
    assert_equal(record(load(), corpus, collect=collect, **settings).histograms, whole)
    slow = record(load(), corpus, collect=collect, fast=False, **settings).histograms
    assert_equal(slow, whole)
    values = torch.from_numpy(cached_values("llama", "gate_act", TEXTS["fr"]))
    assert_equal(Histograms.from_values({"fr": values}, bins=bins, provenance=whole.provenance), whole.select(["fr"]))


def test_shards_batches_and_padding_change_nothing(corpus):
    collect = Collect(histograms=FEW)
    whole = record(load(), corpus, collect=collect, progress=False).histograms
    for changes in (SMALL, {**SMALL, "batch_tokens": 1}, {**SMALL, "shard_tokens": 1}):
        parts = record(load(), corpus, collect=collect, **changes).histograms
        for code in TEXTS:
            assert torch.equal(parts.counts[code], whole.counts[code])
    with_special = record(load(), corpus, bos="always", count_special=True, collect=collect, progress=False).histograms
    assert with_special.tokens.tolist() == [
        int(n) + len([t for t in TEXTS[c] if t]) for c, n in zip(TEXTS, whole.tokens)
    ]


def test_an_interrupted_recording_goes_on(corpus, tmp_path):
    collect = Collect(histograms=NeuronBins.around(record(load(), corpus, **SMALL), n=9))
    made = record(load(), corpus, tmp_path / "whole", collect=collect, **SMALL)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    cut = tmp_path / "cut"
    (cut / "stats.safetensors").unlink()
    (cut / "histograms.safetensors").unlink()
    (cut / "languages" / "fr.safetensors").unlink()
    sorted((cut / "shards").glob("fr-*"))[-1].unlink()
    again = record(load(), corpus, cut, collect=collect, **SMALL)
    assert_equal(again.histograms, made.histograms)
    assert_equal(Recording.load(cut).histograms, made.histograms)
    with pytest.raises(ProvenanceError, match="histograms"):
        record(load(), corpus, cut, collect=Collect(histograms=FEW), **SMALL)


def test_the_plan_knows_the_size(corpus):
    adapter = adapt(load())
    assert HistogramCollector(adapter, FEW).unit_bytes() == 3 * 48 * 22 * 4
    assert HistogramCollector(adapter, FEW).sites == ("gate_act",)
    sizes = [
        plan(load(), corpus, collect=collect, **{k: v for k, v in SMALL.items() if k != "progress"})
        for collect in (None, Collect(histograms=FEW))
    ]
    assert sizes[1].disk_bytes > sizes[0].disk_bytes


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_no_numbers_are_refused(corpus, value):
    model = load_model(tiny("llama").folder, backend="hooked")
    adapter = adapt(model)
    collector = HistogramCollector(adapter, FEW)
    pieces = [piece for group in encode(adapter.tokens, TEXTS["en"], TokenPolicy()) for piece in group]
    shard = Shard("en", 0, 6, tuple(pieces))
    (batch,) = make_batches(pieces, adapter.tokens.pad_id, 4096, count_special=False)

    def run() -> None:
        with adapter.hooks(collector.pairs()):
            collector.begin(batch)
            adapter.run_until_last_site(batch.tokens, batch.mask)

    with torch.no_grad():
        kept = model.blocks[1].mlp.W_gate[3, 5].clone()
        model.blocks[1].mlp.W_gate[3, 5] = value
        run()
        with pytest.raises(ModelError, match=r"layer 1 .* NaN or infinite"):
            collector.take(shard)
        model.blocks[1].mlp.W_gate[3, 5] = kept
    run()
    assert int(collector.take(shard)["tokens"]) == int(batch.counted.sum())


def test_files_and_parts(tmp_path):
    values = make_values()
    provenance = Provenance(model="m", weights="w", n_layers=2, d_mlp=5, corpus="c")
    ranges = NeuronBins(torch.full((2, 5), -1.0), torch.full((2, 5), 1.5), 11)
    for bins in (FEW, ranges):
        made = Histograms.from_values(values, bins=bins, provenance=provenance)
        made.save(tmp_path / "h.safetensors")
        assert_equal(Histograms.load(tmp_path / "h.safetensors"), made)
        parts = [made.select([code]) for code in values]
        assert_equal(parts[0].merge(*parts[1:]), made)
        assert_equal(made.select(["fr", "en"]).select(["en", "fr"]), made.select(["en", "fr"]))
    assert "tokens en: 60, fr: 35, sw: 1" in repr(made)
    assert "13 bins" in repr(made)
    other = made.select(["fr"])
    with pytest.raises(DataError, match="fr is in more than one"):
        made.merge(other)
    with pytest.raises(DataError, match="record both with the same"):
        made.select(["en"]).merge(Histograms.from_values({"fr": values["fr"]}, bins=FEW, provenance=provenance))
    with pytest.raises(ProvenanceError, match="weights"):
        made.select(["en"]).merge(dataclasses.replace(other, provenance=provenance.replace(weights="v")))
    assert (
        made.select(["en"])
        .merge(dataclasses.replace(other, provenance=provenance.replace(corpus="d")))
        .provenance.corpus
        == ""
    )
    with pytest.raises(DataError, match="'de' was not recorded"):
        made.select(["de"])
    with pytest.raises(DataError, match="at least one"):
        made.select([])
    _stats({"en": np.ones((3, 2, 5))}).save(tmp_path / "stats.safetensors")
    with pytest.raises(StorageError, match="'histograms' was expected"):
        Histograms.load(tmp_path / "stats.safetensors")


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({}, "no language"),
        ({"en": torch.ones(2, 3, 21, dtype=torch.int64)}, "22 bins"),
        ({"en": torch.ones(2, 3, 22)}, "integers"),
        ({"en": torch.full((2, 3, 22), -1)}, "0 or more"),
        ({"en": torch.arange(132).view(2, 3, 22)}, "same number of tokens"),
        ({"en": torch.zeros(2, 3, 22, dtype=torch.int64)}, "no token that counts"),
        ({"en": torch.full((2, 3, 22), MOST_TOKENS // 20)}, "record fewer"),
        ({"en": torch.ones(2, 3, 22).int(), "eng_Latn": torch.ones(2, 3, 22).int()}, "each come once"),
    ],
)
def test_bad_counts_are_sentences(counts, message):
    with pytest.raises(DataError, match=message) as caught:
        Histograms.from_counts(counts, bins=FEW)
    _sentence(caught.value)


def test_bad_bins_are_sentences():
    for changes in ({"n": 0}, {"low": 2.0}, {"high": math.inf}, {"scale": 0.0}, {"low": math.nan}, {"n": 100_000}):
        with pytest.raises(SettingError) as caught:
            Bins(**{**FEW.to_dict(), **changes})
        _sentence(caught.value)
    flat = torch.zeros(2, 3)
    for make in (
        lambda: NeuronBins(flat, flat),
        lambda: NeuronBins(flat, flat + 1, 0),
        lambda: NeuronBins(flat, flat / 0),
    ):
        with pytest.raises(SettingError) as caught:
            make()
        _sentence(caught.value)
    stats = _stats({"en": np.ones((3, 2, 5))})
    with pytest.raises(SettingError, match="deviations=0"):
        NeuronBins.around(stats, deviations=0)
    with pytest.raises(SettingError, match="do not fit") as caught:
        HistogramCollector(adapt(load()), NeuronBins.around(stats))
    _sentence(caught.value)
    with pytest.raises(DataError, match="NaN or infinite"):
        Histograms.from_values({"en": torch.full((3, 2, 5), math.nan)})


def test_more_tokens_than_a_bin_counts_are_refused():
    collector = HistogramCollector(adapt(load()), FEW)
    part = {"tokens": torch.tensor(MOST_TOKENS - 5), "counts": torch.zeros(1, dtype=torch.int32)}
    few = {"tokens": torch.tensor(5), "counts": torch.ones(1, dtype=torch.int32)}
    assert int(collector.add(part, few)["tokens"]) == MOST_TOKENS
    with pytest.raises(DataError, match="record fewer"):
        collector.add(collector.add(part, few), few)


def test_shapes_are_checked():
    made = Histograms.from_values(make_values(), bins=FEW)
    with pytest.raises(TypeCheckError):
        dataclasses.replace(made, tokens=made.tokens[:, None])


def _sentence(error: Exception) -> None:
    assert isinstance(error, LensNeuronsError)
    assert str(error).endswith(".")
    assert "\n" not in str(error)
