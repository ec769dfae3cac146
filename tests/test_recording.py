"""Tests of recording: against plain transformers, against the reference path, interrupted, damaged, badly fed."""

import copy
import functools
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from models import SAMPLE_TEXTS, save_folder, tiny

from lens_neurons.activation_stats import ActivationStats
from lens_neurons.adapter import Adapter
from lens_neurons.batching import Batch, Shard
from lens_neurons.collecting import RunningSums
from lens_neurons.corpus import Corpus
from lens_neurons.errors import DataError, ModelError, ProvenanceError, SettingError, StorageError
from lens_neurons.model import adapt, load_model
from lens_neurons.recording import plan, record
from lens_neurons.storage import load_tensors

TENSORS = ("tokens", "texts", "positive", "sum", "sum_sq", "sum_positive", "text_max", "text_median", "text_mean")
TEXTS = {
    "en": [*SAMPLE_TEXTS[:5], "", SAMPLE_TEXTS[5], "x"],
    "fr": [text[::-1] for text in SAMPLE_TEXTS[:8]],
    "C/C++": ["int main() { return 0; }", " ".join(SAMPLE_TEXTS[:3])],
}
# Several shards a language and several batches a shard.
SMALL = {"shard_tokens": 90, "batch_tokens": 70, "progress": False}


@functools.cache
def load(arch: str = "llama", backend: str = "hooked", dtype: torch.dtype = torch.float32, add_bos: bool = False):
    # TransformerBridge wraps the Hugging Face model in place, so each gets its own.
    return load_model(tiny(arch, add_bos=add_bos).folder, backend=backend, dtype=dtype)


@pytest.fixture
def corpus() -> Corpus:
    return Corpus.from_texts(TEXTS)


def assert_equal(one: ActivationStats, other: ActivationStats) -> None:
    assert one.languages == other.languages
    for name in TENSORS:
        mine, theirs = getattr(one, name), getattr(other, name)
        assert (mine is None) == (theirs is None), name
        assert mine is None or torch.equal(mine, theirs), name


ACTIVATIONS = {
    "llama": lambda hf: [layer.mlp.act_fn for layer in hf.model.layers],
    "bloom": lambda hf: [layer.mlp.gelu_impl for layer in hf.transformer.h],
    "gpt2": lambda hf: [layer.mlp.act for layer in hf.transformer.h],
}
OUTPUTS = {"llama": lambda hf: [layer.mlp.down_proj for layer in hf.model.layers]}


def transformers_activations(arch: str, rows: list[list[int]], site: str) -> list[np.ndarray]:
    """Return activations [layer pos neuron] of each row of ids: plain transformers, float64, one row at a time."""
    hf = copy.deepcopy(tiny(arch).hf_model).double()
    caught: list[torch.Tensor] = []
    if site == "gate_act":
        for module in ACTIVATIONS[arch](hf):
            module.register_forward_hook(lambda _m, _i, output: caught.append(output[0]))
    else:
        for module in OUTPUTS[arch](hf):
            module.register_forward_pre_hook(lambda _m, inputs: caught.append(inputs[0][0]))
    found: list[np.ndarray] = []
    for ids in rows:
        caught.clear()
        with torch.no_grad():
            hf(torch.tensor([ids]))
        found.append(torch.stack(caught).numpy())
    return found


@pytest.mark.parametrize(
    ("arch", "backend", "site"),
    [
        ("llama", "hooked", "gate_act"),
        ("llama", "bridge", "gate_act"),
        ("llama", "hooked", "post"),
        ("bloom", "hooked", "gate_act"),
        ("bloom", "bridge", "gate_act"),
        ("gpt2", "hooked", "gate_act"),
    ],
)
@pytest.mark.parametrize("count_special", [False, True])
def test_against_plain_transformers(corpus, arch, backend, site, count_special):
    model, tokenizer = load(arch, backend, torch.float64), tiny(arch).tokenizer
    stats = record(model, corpus, site=site, bos="always", count_special=count_special, texts_kept=4, **SMALL)
    for i, texts in enumerate(TEXTS.values()):
        ids = [tokenizer.encode(text, add_special_tokens=False)[:95] for text in texts]
        rows = [[tokenizer.bos_token_id, *row] for row in ids if row]
        skip = 0 if count_special else 1
        values = [row[:, skip:] for row in transformers_activations(arch, rows, site)]
        all_values = np.concatenate(values, axis=1)
        assert int(stats.tokens[i]) == all_values.shape[1]
        assert int(stats.texts[i]) == len(texts)
        np.testing.assert_array_equal(stats.positive[i], (all_values > 0).sum(axis=1))
        # Not closer: Hugging Face's RMSNorm computes in float32 whatever the weights are.
        near = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
        near(stats.sum[i], all_values.sum(axis=1))
        near(stats.sum_sq[i], (all_values**2).sum(axis=1))
        near(stats.sum_positive[i], all_values.clip(min=0).sum(axis=1))
        # The first four texts of the corpus; none of the languages has an empty one among them.
        means = np.stack([row.mean(axis=1) for row in values[:4]])
        near(stats.text_max[i], means.max(axis=0))
        near(stats.text_median[i], np.sort(means, axis=0)[(len(means) - 1) // 2])
        near(stats.text_mean[i], means.mean(axis=0))


@pytest.mark.parametrize("arch", ["llama", "bloom", "gpt2", "gemma2"])
@pytest.mark.parametrize(
    ("backend", "settings"),
    [
        ("hooked", {}),
        ("hooked", {"bos": "always", "pack": True}),
        ("hooked", {"overflow": "split", "max_tokens": 20}),
        ("bridge", {"max_tokens": 20}),
    ],
)
def test_fast_path_is_bit_equal_to_the_reference(corpus, arch, backend, settings):
    model = load(arch, backend)
    fast = record(model, corpus, **settings, **SMALL)
    assert_equal(record(model, corpus, fast=False, **settings, **SMALL), fast)
    assert int(fast.positive.sum()) > 0


@pytest.mark.parametrize("site", ["post", "gate_pre", "up", "q", "k", "v", "attn_out", "mlp_out"])
def test_other_sites(corpus, site):
    model = load()
    fast = record(model, corpus, site=site, **SMALL)
    assert_equal(record(model, corpus, site=site, fast=False, **SMALL), fast)
    adapter = adapt(model)
    assert fast.positive.shape == (3, adapter.n_layers, adapter.width(site))
    assert (fast.site, fast.provenance.site, fast.provenance.d_mlp) == (site, site, adapter.width(site))


def test_half_precision(corpus):
    model = load(dtype=torch.bfloat16)
    half = record(model, corpus, **SMALL)
    assert_equal(record(model, corpus, fast=False, **SMALL), half)
    full = record(load(), corpus, **SMALL)
    assert torch.equal(half.tokens, full.tokens)
    torch.testing.assert_close(half.mean(), full.mean(), atol=0.02, rtol=0)
    assert (half.probability() - full.probability()).abs().max() < 0.05


@pytest.mark.parametrize("arch", ["llama", "bloom"])
def test_padded_equals_alone_and_hooked_equals_bridge(corpus, arch):
    stats = record(load(arch, "hooked", torch.float64), corpus, **SMALL)
    for other in (
        record(load(arch, "hooked", torch.float64), corpus, **{**SMALL, "batch_tokens": 1}),
        record(load(arch, "bridge", torch.float64), corpus, **SMALL),
    ):
        assert torch.equal(other.positive, stats.positive)
        # Not closer: Hugging Face's norms compute in float32 whatever the weights are.
        torch.testing.assert_close(other.sum, stats.sum, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(other.text_median, stats.text_median, rtol=1e-4, atol=1e-5)


def test_what_ran_before_changes_nothing(corpus):
    # HookedTransformer keeps the largest ALiBi table that it ever needed.
    model = load("bloom")
    record(model, Corpus.from_texts({"en": [" ".join(SAMPLE_TEXTS * 3)]}), batch_tokens=2000, progress=False)
    fresh = load_model(tiny("bloom").folder, backend="hooked")
    assert_equal(record(model, corpus, **SMALL), record(fresh, corpus, **SMALL))


def fake_adapter() -> Any:
    """Return a model of two layers whose activation function has another sign than its argument."""
    made = mock.Mock(spec=Adapter)
    made.n_layers, made.device, made.act_fn = 2, torch.device("cpu"), torch.cos
    made.width.return_value = 7
    return made


def make_batch(counted: torch.Tensor, first_text: int = 0) -> Batch:
    rows = len(counted)
    index = torch.arange(first_text, first_text + rows)
    return Batch(torch.zeros_like(counted, dtype=torch.int64), counted, counted, index, torch.zeros(rows).long())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("block", [1, 20, 200, 10**6])
@pytest.mark.parametrize("site", ["gate_act", "post"])
def test_sums_of_any_activation_function_in_blocks_of_any_size(monkeypatch, dtype, block, site):
    monkeypatch.setattr("lens_neurons.collecting._BLOCK", {"cpu": block})
    generator = torch.Generator().manual_seed(5)
    sums = RunningSums(fake_adapter(), site, texts_kept=8)
    values: list[list[torch.Tensor]] = [[], []]
    means: list[list[torch.Tensor]] = [[], []]
    for start in (4, 0):
        counted = torch.rand(4, 9, generator=generator) < 0.6
        counted[2] = start == 0
        sums.begin(make_batch(counted, start))
        for layer in range(2):
            x = (4 * torch.randn(4, 9, 7, generator=generator)).to(dtype)
            before = x.clone()
            sums.reduce(layer, x)
            assert torch.equal(x, before)
            a = (torch.cos(x) if site == "gate_act" else x).double()
            values[layer].append(a[counted])
            # Texts without a counted token have no mean.
            means[layer].append(torch.stack([row[c].mean(0) for row, c in zip(a, counted, strict=True) if c.any()]))
    part = sums.take(Shard("en", 0, 7, ()))
    a = torch.stack([torch.cat(layer) for layer in values])
    assert part.tokens == a.shape[1]
    assert torch.equal(part.positive, (a > 0).sum(1))
    torch.testing.assert_close(part.sum, a.sum(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(part.sum_sq, a.square().sum(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(part.sum_positive, a.clamp(min=0).sum(1), rtol=1e-5, atol=1e-5)
    assert part.row_positions.tolist() == [0, 1, 2, 3, 4, 5, 7]
    expected = torch.stack([torch.cat([second, first]) for first, second in means], dim=1)
    torch.testing.assert_close(part.rows.double(), expected, rtol=1e-5, atol=1e-5)
    # And it starts anew.
    again = sums.take(Shard("en", 8, 8, ()))
    assert (again.tokens, int(again.positive.sum()), len(again.rows)) == (0, 0, 0)


def test_text_rows_are_of_first_pieces_and_first_texts():
    long = " ".join(SAMPLE_TEXTS[:4])
    ids = tiny("llama").tokenizer.encode(long, add_special_tokens=False)
    head = tiny("llama").tokenizer.decode(ids[:30])
    model = load(dtype=torch.float64)
    assert tiny("llama").tokenizer.encode(head, add_special_tokens=False) == ids[:30]
    texts = Corpus.from_texts({"en": [long, "x"]})
    split = record(model, texts, overflow="split", max_tokens=30, texts_kept=1, **SMALL)
    alone = record(model, Corpus.from_texts({"en": [head]}), **SMALL)
    torch.testing.assert_close(split.text_mean, alone.text_mean)
    assert int(split.tokens) > len(ids)
    note = split.notes["languages"]["en"]
    assert (note["split"], note["truncated"], note["text_rows"]) == (1, 0, 1)


def test_truncated_texts_are_counted_and_logged(caplog):
    texts = Corpus.from_texts({"en": [*SAMPLE_TEXTS[:2], "x"]})
    with caplog.at_level(logging.WARNING, logger="lens_neurons"):
        stats = record(load(), texts, max_tokens=10, **SMALL)
    assert stats.tokens.tolist() == [21]
    assert stats.to_frame().loc[0, "truncated"] == 2
    assert "2 of 3 texts of 'en' were cut" in caplog.text
    with pytest.raises(DataError, match="text 0 has"):
        record(load(), texts, max_tokens=10, overflow="error", **SMALL)


def test_packed_texts_have_no_rows(corpus):
    stats = record(load(), corpus, pack=True, bos="never", **SMALL)
    tokenizer = tiny("llama").tokenizer
    lengths = [sum(len(tokenizer.encode(t, add_special_tokens=False)) for t in texts) for texts in TEXTS.values()]
    assert stats.tokens.tolist() == lengths
    assert stats.text_max is None
    with pytest.raises(DataError, match="the texts were packed"):
        stats.text_statistic("p_max", "en")
    assert_equal(record(load(), corpus, preset="lape", **SMALL), stats)


def test_no_rows_on_request(corpus):
    stats = record(load(), corpus, texts_kept=0, **SMALL)
    assert (stats.text_max, stats.notes["languages"]["fr"]["text_rows"]) == (None, 0)
    assert torch.equal(stats.sum, record(load(), corpus, **SMALL).sum)


@pytest.mark.parametrize(("add_bos", "special"), [(False, 0), (True, 1)])
def test_bos_is_the_saved_tokenizers_habit(add_bos, special):
    texts = Corpus.from_texts({"en": ["x"]})
    model = load(add_bos=add_bos)
    assert record(model, texts, **SMALL).tokens.tolist() == [1]
    assert record(model, texts, count_special=True, **SMALL).tokens.tolist() == [1 + special]


def test_presets(corpus):
    stats = record(load(), corpus, preset="amplification", **SMALL)
    assert stats.provenance.policy["bos"] == "never"
    assert stats.text_max is not None
    with pytest.raises(SettingError, match="preset='x' is unknown"):
        record(load(), corpus, preset="x")
    with pytest.raises(SettingError, match="sets bos='never', not 'always'"):
        record(load(), corpus, preset="lape", bos="always")


def test_tokenizer_without_bos_or_pad(tmp_path, corpus):
    made = save_folder(tmp_path / "m", "llama", bos=False, pad=False)
    model = load_model(made.folder)
    stats = record(model, corpus, **SMALL)
    assert int(stats.tokens.min()) > 0
    with pytest.raises(SettingError, match="this one has none"):
        record(model, corpus, bos="always", **SMALL)


def test_languages_that_cannot_be_recorded(corpus):
    with pytest.raises(DataError, match="'fr' has no token that counts"):
        record(load(), Corpus.from_texts({"en": ["a"], "fr": ["", ""]}), **SMALL)
    with pytest.raises(DataError, match="'de' has no text in corpus"):
        record(load(), Corpus.from_texts({"en": ["a", "b"], "de": ["c"]}).slice(1, 2), **SMALL)
    with pytest.raises(DataError, match="has no 'sw'"):
        record(load(), corpus, languages=["sw"], **SMALL)
    chosen = record(load(), corpus, languages=["fra_Latn", "en"], **SMALL)
    assert chosen.languages == ("fr", "en")
    assert torch.equal(chosen.sum, record(load(), corpus, **SMALL).select(["fr", "en"]).sum)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"site": "gate"}, "site='gate' is unknown"),
        ({"texts_kept": -1}, "texts_kept=-1"),
        ({"batch_tokens": 0}, "batch_tokens=0"),
        ({"shard_tokens": 0}, "shard_tokens=0"),
        ({"max_tokens": 1000}, "more than the model's context of 96"),
    ],
)
def test_wrong_settings(corpus, setting, message):
    with pytest.raises(SettingError, match=message):
        record(load(), corpus, **{**SMALL, **setting})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_names_layer_and_hook(tmp_path, corpus, value):
    model = load_model(save_folder(tmp_path / "m", "llama").folder, backend="hooked")
    record(model, corpus, **SMALL)
    with torch.no_grad():
        # A token of Chinese only: the probe and the plan, on the first language's sample, see nothing.
        (token, *_) = tiny("llama").tokenizer.encode("Кошка"[::-1], add_special_tokens=False)
        model.embed.W_E[token] = value
    with pytest.raises(ModelError, match=r"hook 'blocks\.0\.mlp\.hook_pre' \(layer 0\) holds NaN .* of 'fr'"):
        record(model, corpus, **SMALL)
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


def test_a_missing_hook_is_an_error_before_anything_is_written(tmp_path, corpus):
    with pytest.raises(ModelError, match="no 'up' site"):
        record(load("bloom"), corpus, tmp_path / "r", site="up", **SMALL)
    assert not (tmp_path / "r").exists()


def test_folded_weights_are_refused_where_they_matter(corpus, monkeypatch):
    model = load()
    monkeypatch.setattr(adapt(model), "processed", True)
    with pytest.raises(ModelError, match="folded or centred"):
        record(model, corpus, site="v", **SMALL)
    assert record(model, corpus, **SMALL).provenance.processing != "none"


def test_a_users_hooks_stay_and_ours_go(corpus):
    model, fired = load(), []
    model.add_hook("blocks.1.mlp.hook_pre", lambda tensor, hook: fired.append(tensor.shape))
    try:
        record(model, corpus, **SMALL)
        assert fired
        count = {name: len(point.fwd_hooks) for name, point in model.hook_dict.items() if point.fwd_hooks}
        assert count == {"blocks.1.mlp.hook_pre": 1}
    finally:
        model.reset_hooks()


# On disk.


def forbid(monkeypatch, model) -> None:
    """Let every forward pass of a model fail."""

    def fail(*_args, **_kwargs):
        raise AssertionError("the model was run")

    for name in ("run_until_last_site", "cache_sites", "probe"):
        monkeypatch.setattr(adapt(model), name, fail)


def assert_same_files(one: Path, other: Path) -> None:
    """Assert that two recordings have the same files with the same headers and tensors, bit for bit."""
    names = [sorted(file.relative_to(top) for file in top.rglob("*") if file.is_file()) for top in (one, other)]
    assert names[0] == names[1]
    for name in names[0]:
        # The manifest has the plan's timing in it, and safetensors orders its metadata at random.
        if name.suffix == ".safetensors":
            (mine, my_header), (theirs, their_header) = load_tensors(one / name), load_tensors(other / name)
            assert my_header == their_header
            assert mine.keys() == theirs.keys()
            assert all(torch.equal(mine[key], theirs[key]) for key in mine), name


def test_folder_and_what_comes_back(tmp_path, corpus, monkeypatch):
    model = load()
    expected = record(model, corpus, **SMALL)
    stats = record(model, corpus, tmp_path / "r", **SMALL)
    assert_equal(stats, expected)
    assert stats.provenance == expected.provenance
    names = sorted(file.name for file in (tmp_path / "r" / "shards").iterdir())
    assert len(names) >= 6
    assert names[0].startswith("C%2FC%2B%2B-0-")
    assert_equal(ActivationStats.load(tmp_path / "r"), expected)
    forbid(monkeypatch, model)
    assert_equal(record(model, corpus, tmp_path / "r", **SMALL), expected)


@pytest.mark.parametrize("passes", [1, 2, 5, 9])
def test_interrupted_recording_goes_on(tmp_path, corpus, monkeypatch, passes):
    model = load()
    expected = record(model, corpus, tmp_path / "whole", **SMALL)
    adapter, run, left = adapt(model), adapt(model).run_until_last_site, passes

    def stop(tokens, mask):
        nonlocal left
        # The plan's passes come before the manifest.
        left -= (tmp_path / "r" / "manifest.json").exists()
        if left < 0:
            raise KeyboardInterrupt
        run(tokens, mask)

    with monkeypatch.context() as patch:
        patch.setattr(adapter, "run_until_last_site", stop)
        with pytest.raises(KeyboardInterrupt):
            record(model, corpus, tmp_path / "r", **SMALL)
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "r" / "shards").glob("*")}
    with pytest.raises(StorageError, match="no finished recording"):
        ActivationStats.load(tmp_path / "r")
    assert_equal(record(model, corpus, tmp_path / "r", **SMALL), expected)
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert_same_files(tmp_path / "r", tmp_path / "whole")


def test_a_lost_shard_is_made_again(tmp_path, corpus):
    model = load()
    expected = record(model, corpus, tmp_path / "r", **SMALL)
    shards = sorted((tmp_path / "r" / "shards").glob("fr-*"))
    assert len(shards) >= 3
    shutil.copytree(tmp_path / "r", tmp_path / "whole")
    shards[1].unlink()
    shutil.rmtree(tmp_path / "r" / "languages")
    (tmp_path / "r" / "stats.safetensors").unlink()
    assert_equal(record(model, corpus, tmp_path / "r", **SMALL), expected)
    assert_same_files(tmp_path / "r", tmp_path / "whole")


# Every recording is made by a forked child, which saves importing torch a dozen times. The parent itself computes
# nothing: forking a process whose thread pools have started can deadlock the child.
KILLED = """
import os, random, signal, sys, time
sys.path.insert(0, sys.argv[1])
import torch
from models import SAMPLE_TEXTS
from lens_neurons.corpus import Corpus
from lens_neurons.model import load_model
from lens_neurons.recording import record

folder, out, draw = sys.argv[2], sys.argv[3], random.Random(int(sys.argv[4]))

def start(name):
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        texts = {"en": SAMPLE_TEXTS[:6], "fr": [t[::-1] for t in SAMPLE_TEXTS], "de": SAMPLE_TEXTS[6:]}
        model = load_model(folder, backend="hooked")
        os.write(tell, b".")
        record(model, Corpus.from_texts(texts), out + name, shard_tokens=20, batch_tokens=40, progress=False)
        os._exit(0)
    os.close(tell)
    os.read(ready, 1)
    os.close(ready)
    return child

def end(child):
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        sys.exit("the recording failed")
    return os.WIFSIGNALED(status)

child, started, kills = start("/whole"), time.perf_counter(), 0
end(child)
whole = time.perf_counter() - started
while kills < 12:
    child = start("/killed")
    time.sleep(draw.uniform(0, 0.3 * whole))
    os.kill(child, signal.SIGKILL)
    if not end(child):
        break
    kills += 1
else:
    end(start("/killed"))
sys.stdout.write(str(kills))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork on this system")
@pytest.mark.parametrize("seed", [1, 2, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(3, 8))])
def test_killed_at_random_points(tmp_path, seed):
    folder = Path(__file__).parent
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder.parent)}
    arguments = [sys.executable, "-c", KILLED, folder, tiny("llama").folder, tmp_path, str(seed)]
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 2
    assert len(list((tmp_path / "whole").rglob("*.safetensors"))) > 20
    assert_same_files(tmp_path / "killed", tmp_path / "whole")


def test_another_recording_in_the_path_is_refused(tmp_path, corpus):
    model = load()
    record(model, corpus, tmp_path / "r", **SMALL)

    def again(changed_model=model, changed_corpus=corpus, **changes):
        record(changed_model, changed_corpus, tmp_path / "r", **{**SMALL, **changes})

    other_weights = load_model(save_folder(tmp_path / "other", "llama", seed=9).folder, backend="hooked")
    for call, message in (
        (functools.partial(again, load(dtype=torch.bfloat16)), "dtype is 'float32' in one and 'bfloat16'"),
        (functools.partial(again, other_weights), r"weights is '\w+' in one and '\w+'"),
        (functools.partial(again, load(backend="bridge")), "'hooked' in one and 'bridge'"),
        (functools.partial(again, changed_corpus=Corpus.from_texts({**TEXTS, "fr": ["x"]})), r"corpus is '\w+' in one"),
        (functools.partial(again, max_tokens=50), "'max_tokens': None.* in one and .*'max_tokens': 50"),
        (functools.partial(again, site="post"), "'gate_act' in one and 'post'"),
        (functools.partial(again, texts_kept=7), "texts_kept is 100 in one and 7"),
        (functools.partial(again, batch_tokens=71), "batch_tokens is 70 in one and 71"),
        (functools.partial(again, languages=["fr", "en", "C/C++"]), "languages is .* in one"),
    ):
        with pytest.raises(ProvenanceError, match=message):
            call()
    again()


@pytest.mark.parametrize("damage", ["flip", "cut"])
@pytest.mark.parametrize(
    ("finished", "pattern"),
    [
        (True, "stats*"),
        (True, "manifest.json"),
        (False, "shards/en-*"),
        (False, "languages/fr*"),
        (False, "manifest.json"),
    ],
)
def test_damage_is_found_and_named(tmp_path, corpus, finished, damage, pattern):
    record(load(), corpus, tmp_path / "r", **SMALL)
    if not finished:
        (tmp_path / "r" / "stats.safetensors").unlink()
    if pattern.startswith("shards"):  # a finished language is read in place of its shards
        shutil.rmtree(tmp_path / "r" / "languages")
    file = sorted((tmp_path / "r").glob(pattern))[-1]
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data if damage == "flip" else data[: len(data) // 2])
    with pytest.raises(StorageError, match=file.name.replace(".", r"\.")):
        record(load(), corpus, tmp_path / "r", **SMALL)


def test_a_stray_file_among_the_shards_is_named(tmp_path, corpus):
    record(load(), corpus, tmp_path / "r", **SMALL)
    (tmp_path / "r" / "stats.safetensors").unlink()
    shutil.rmtree(tmp_path / "r" / "languages")
    (tmp_path / "r" / "shards" / "mine.safetensors").write_bytes(b"")
    with pytest.raises(StorageError, match=r"mine\.safetensors is no shard"):
        record(load(), corpus, tmp_path / "r", **SMALL)


def test_a_finished_recording_is_read_from_its_result_alone(tmp_path, corpus):
    expected = record(load(), corpus, tmp_path / "r", **SMALL)
    for file in [*(tmp_path / "r" / "shards").iterdir(), *(tmp_path / "r" / "languages").iterdir()]:
        file.write_bytes(b"never read")
    assert_equal(record(load(), corpus, tmp_path / "r", **SMALL), expected)


def test_folders_of_other_things_are_refused(tmp_path, corpus):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(StorageError, match="no recording"):
        record(load(), corpus, tmp_path, **SMALL)
    with pytest.raises(StorageError, match="no recording"):
        record(load(), corpus, tmp_path / "notes.txt", **SMALL)
    record(load(), corpus, tmp_path / "one", **SMALL)
    record(load(), corpus, tmp_path / "two", **{**SMALL, "batch_tokens": 80})
    (name,) = [file.name for file in (tmp_path / "one" / "shards").glob("fr-0-*")]
    shutil.copy(tmp_path / "one" / "shards" / name, tmp_path / "two" / "shards" / name)
    shutil.rmtree(tmp_path / "two" / "languages")
    (tmp_path / "two" / "stats.safetensors").unlink()
    with pytest.raises(StorageError, match="belongs to another recording"):
        record(load(), corpus, tmp_path / "two", **{**SMALL, "batch_tokens": 80})
    manifest = json.loads((tmp_path / "one" / "manifest.json").read_text())
    (tmp_path / "one" / "manifest.json").write_text(json.dumps({**manifest, "schema": 99}))
    with pytest.raises(StorageError, match="upgrade"):
        record(load(), corpus, tmp_path / "one", **SMALL)


# The plan and the progress bar.


def test_plan_of_a_small_corpus_is_exact(corpus, caplog, tmp_path):
    planned = plan(load(), corpus, bos="always", count_special=True)
    stats = record(load(), corpus, bos="always", count_special=True, progress=False)
    assert planned.total_tokens == int(stats.tokens.sum())
    assert list(planned.texts.values()) == stats.texts.tolist()
    assert planned.seconds == pytest.approx(planned.total_tokens / planned.tokens_per_second)
    assert planned.memory_bytes > 0
    with caplog.at_level(logging.INFO, logger="lens_neurons"):
        record(load(), corpus, tmp_path / "r", progress=False)
    assert "recording tiny" in caplog.text or "recording llama" in caplog.text
    on_disk = sum(file.stat().st_size for file in (tmp_path / "r").rglob("*.safetensors"))
    assert plan(load(), corpus).disk_bytes == pytest.approx(on_disk, rel=0.4)


def test_plan_of_a_large_corpus_is_an_estimate():
    planned = plan(load(), Corpus.from_texts({"en": [*SAMPLE_TEXTS] * 200}), max_tokens=20)
    assert planned.total_tokens == pytest.approx(sum([20] * 12) * 200, rel=0.1)
    assert "2,400 texts of 1 language;" in str(planned)


def test_plan_of_a_stream_of_unknown_length(tmp_path):
    (tmp_path / "en.txt").write_text("\n".join(SAMPLE_TEXTS * 10), encoding="utf-8")
    known = plan(load(), Corpus.from_files(tmp_path))
    assert known.total_tokens == pytest.approx(int(record(load(), Corpus.from_files(tmp_path)).tokens), rel=0.3)
    texts = Corpus.from_dataset("text", data_files={"en": str(tmp_path / "en.txt")})
    planned = plan(load(), texts)
    assert (planned.total_tokens, planned.seconds, planned.disk_bytes) == (None, None, None)
    assert "an unknown number of tokens" in str(planned)
    assert record(load(), texts, progress=False).texts.tolist() == [120]


def test_plan_of_packed_texts_counts_them_whole():
    model, long = load(), " ".join(SAMPLE_TEXTS * 5)
    texts = Corpus.from_texts({"en": [long] * 3})
    planned = plan(model, texts, pack=True, texts_kept=0, overflow="error")
    assert planned.total_tokens == pytest.approx(int(record(model, texts, pack=True, texts_kept=0).tokens), rel=0.05)


def test_progress_bar_shows_speed(corpus, capsys):
    record(load(), corpus, **{**SMALL, "progress": True})
    shown = capsys.readouterr()
    assert "token/s" in shown.err
    assert "100%" in shown.err
    assert shown.out == ""
    record(load(), corpus, **SMALL)
    assert capsys.readouterr().err == ""


def test_memory_holds_one_language_of_rows_and_no_text(corpus):
    # Every shard is added to one sum, so what is held does not grow with the corpus.
    long = Corpus.from_texts({"en": [*SAMPLE_TEXTS] * 10})
    stats = record(load(), long, **SMALL, texts_kept=5)
    assert stats.notes["languages"]["en"]["text_rows"] == 5
    assert stats.texts.tolist() == [120]


def test_a_kill_while_the_manifest_is_written_does_no_harm(tmp_path):
    folder = tmp_path / "r"
    folder.mkdir()
    (folder / ".manifest.json.abc123.part").write_text('{"cut off')
    model, corpus = load_model(str(tiny("llama").folder), backend="hooked"), Corpus.from_texts({"en": SAMPLE_TEXTS[:3]})
    expected = record(model, corpus, progress=False)
    assert_equal(record(model, corpus, folder, progress=False), expected)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("dear")
    with pytest.raises(StorageError, match="no recording"):
        record(model, corpus, tmp_path / "other", progress=False)
