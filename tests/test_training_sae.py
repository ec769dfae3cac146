import functools
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import SAMPLE_TEXTS, tiny

from lens_neurons.batching import TokenPolicy, encode
from lens_neurons.corpus import Corpus
from lens_neurons.errors import DataError, SettingError
from lens_neurons.model import adapt, load_model
from lens_neurons.sae import load_sae
from lens_neurons.topk_sae import TopKSAE
from lens_neurons.training.sae import (
    SAEConfig,
    SAETrainer,
    ValueStream,
    _place,
    evaluate_sae,
    main,
    read_corpora,
    train_sae,
)
from lens_neurons.training.text import is_held_out

CORPUS = Corpus.from_texts({"en": list(SAMPLE_TEXTS[:6]), "fr": list(SAMPLE_TEXTS[6:]), "sw": ["", "a b c d"]})
SMALL = {"latents": 48, "k": 4, "tokens": 2048, "batch": 64, "buffer": 128, "passes": 2}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@functools.cache
def model_of() -> Any:
    return load_model(tiny("llama").folder)


def sparse_data(n: int = 8192, d: int = 24, atoms: int = 40, active: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Return inputs that are sums of a few positive atoms about a centre far from 0, and the atoms."""
    draw = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(atoms, d, generator=draw), dim=1)
    chosen = torch.rand(n, atoms, generator=draw).topk(active, dim=1).indices
    weights = torch.zeros(n, atoms).scatter_(1, chosen, 1 + torch.rand(n, active, generator=draw))
    return 5 + 3 * (weights @ rows), rows


def fitted(config: SAEConfig, inputs: torch.Tensor) -> SAETrainer:
    trainer = SAETrainer(config, inputs)
    draw = torch.Generator().manual_seed(1)
    for _ in range(trainer.steps):
        trainer.train_step(inputs[torch.randint(len(inputs), (config.batch,), generator=draw)])
    return trainer


def explained(sae: TopKSAE, inputs: torch.Tensor) -> float:
    left = (inputs - sae.decode(sae.encode(inputs))).square().sum()
    return float(1 - left / (inputs - inputs.mean(dim=0)).square().sum())


def test_planted_atoms_are_found():
    inputs, atoms = sparse_data()
    config = SAEConfig(layer=0, latents=64, k=3, tokens=120_000, batch=256, learning_rate=5e-3)
    trainer = fitted(config, inputs)
    sae = trainer.finished({})
    assert explained(sae, inputs) > 0.9
    assert torch.allclose(sae.w_dec.norm(dim=1), torch.ones(64), atol=1e-5)
    nearest = (atoms @ sae.w_dec.T).amax(dim=1)
    assert (nearest > 0.9).float().mean() > 0.8


def test_what_is_finished_is_what_was_trained():
    inputs, _ = sparse_data(512)
    trainer = SAETrainer(SAEConfig(layer=2, latents=32, k=4, tokens=512, batch=128, buffer=512), inputs)
    trainer.train_step(inputs[:128])
    sae = trainer.finished({"a": 1})
    with torch.no_grad():
        x = (inputs - trainer.centre) / trainer.scale
        weights = trainer.weights
        before = ((x - weights["b_dec"]) @ weights["w_enc"].T + weights["b_enc"]).relu()
        values, index = before.topk(4)
        latents = torch.zeros_like(before).scatter(1, index, values)
        written = (latents @ weights["w_dec"] + weights["b_dec"]) * trainer.scale + trainer.centre
    assert torch.allclose(sae.encode(inputs), latents * trainer.scale, atol=1e-4)
    assert torch.allclose(sae.decode(sae.encode(inputs)), written, atol=1e-4)
    assert (sae.layer, sae.site, sae.notes) == (2, "mlp_out", {"a": 1})
    # And what a step returns is the share of the variance that the weights before it left.
    left = (written[128:256] - inputs[128:256]).square().sum()
    variance = (inputs[128:256] - inputs[128:256].mean(dim=0)).square().sum()
    assert trainer.train_step(inputs[128:256]) == pytest.approx(float(left / variance), rel=1e-4)


def test_a_step_keeps_decoder_rows_of_length_one_and_moves_nothing_along_them():
    inputs, _ = sparse_data(512)
    trainer = SAETrainer(SAEConfig(layer=0, latents=32, k=4, tokens=512, batch=128, buffer=512), inputs)
    before = trainer.weights["w_dec"].detach().clone()
    trainer.train_step(inputs[:128])
    rows, gradient = trainer.weights["w_dec"].detach(), trainer.weights["w_dec"].grad
    assert torch.allclose(rows.norm(dim=1), torch.ones(32), atol=1e-6)
    assert (gradient * before).sum(dim=1).abs().max() < 1e-6 * gradient.norm(dim=1).max()
    assert gradient.abs().max() > 0
    trainer.idle.zero_()
    trainer.train_step(inputs[:2])  # at most 4 latents each
    assert 24 <= (trainer.idle == 2).sum() < 32
    assert trainer.dead == 0


def test_the_learning_rate_rises_and_falls():
    trainer = SAETrainer(SAEConfig(layer=0, latents=4, k=1, tokens=100, batch=1, buffer=1), torch.randn(8, 3))
    shares = []
    for trainer.step in range(100):
        shares.append(trainer.learning_rate_share())
    assert shares[0] == pytest.approx(0.2)
    assert shares[5:70] == [1.0] * 65
    assert shares[99] == pytest.approx(1 / 30)
    assert shares[85] == pytest.approx(0.5)


def test_every_buffer_is_used_as_often_as_asked():
    adapter = adapt(model_of())
    config = SAEConfig(layer=1, **{**SMALL, "passes": 3, "batch": 16})
    stream = ValueStream(adapter, CORPUS, _place(adapter, config), config)
    values = ValueStream(adapter, CORPUS, _place(adapter, config), config).read(config.buffer)
    full = len(values) // 16
    batches = list(itertools.islice(stream.batches(), 3 * full))
    orders = []
    for again in range(3):
        part = torch.cat(batches[again * full : (again + 1) * full])
        where = [int((values - row).abs().sum(dim=1).argmin()) for row in part]
        assert torch.allclose(values[where], part)
        orders.append(where)
    assert orders[0] != orders[1] != orders[2]
    assert set(stream.shares) == {"en", "fr", "sw"}
    assert sum(stream.shares.values()) == pytest.approx(1.0)


def test_training_depends_on_the_seed_alone():
    one, same, other = (
        train_sae(model_of(), CORPUS, SAEConfig(layer=1, seed=s, **SMALL), progress=False) for s in (0, 0, 1)
    )
    assert torch.equal(one.w_enc, same.w_enc)
    assert not torch.equal(one.w_enc, other.w_enc)
    assert one.notes["settings"]["seed"] == 0
    assert one.notes["model"]["weights"] == adapt(model_of()).weights_fingerprint()
    assert one.notes["corpus"]["fingerprint"] == CORPUS.fingerprint_all()
    json.dumps(one.notes)


def test_the_figures_are_those_of_the_values():
    sae = train_sae(model_of(), CORPUS, SAEConfig(layer=1, **SMALL), progress=False)
    found = evaluate_sae(model_of(), sae, CORPUS)
    tokens = adapt(model_of()).tokens
    rows: dict[str, torch.Tensor] = {}
    for code in CORPUS.languages:
        own = []
        for group in encode(tokens, CORPUS.texts(code), TokenPolicy()):
            for piece in group:
                _, cache = model_of().run_with_cache(torch.tensor([piece.ids]))
                own.append(cache["blocks.1.hook_mlp_out"][0, len(piece.special) :])
        rows[code] = torch.cat(own)
    values = torch.cat(list(rows.values()))
    assert found["tokens"] == len(values)
    assert found["explained_variance"] == pytest.approx(explained(sae, values), abs=1e-3)
    latents = sae.encode(values)
    assert found["active"] == pytest.approx(float((latents > 0).sum() / len(values)), abs=0.01)
    assert found["dead"] == int((latents == 0).all(dim=0).sum())
    for code, own in rows.items():
        left = (own - sae.decode(sae.encode(own))).square().sum()
        share = float(1 - left / (own - values.mean(dim=0)).square().sum())
        assert found["by_language"][code] == pytest.approx(share, abs=1e-3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("sae") / "plain"
    base.mkdir()
    for seed, code in enumerate(("en", "sw")):
        draw = np.random.default_rng(seed)
        lines = [" ".join(draw.choice(SAMPLE_TEXTS[seed].split(), size=6)) for _ in range(200)]
        (base / f"{code}.txt").write_text("\n".join(lines) + "\n", "utf-8")
    return base


def test_held_out_lines_are_those_of_the_model_and_never_trained_on(folder):
    training, held_out = read_corpora([folder], [], [])
    lines = (folder / "en.txt").read_text("utf-8").splitlines()
    wanted = {line for number, line in enumerate(lines) if is_held_out("plain/en", number, 0.05)}
    assert set(held_out.texts("en")) == wanted != set()
    assert set(training.texts("en")) == set(lines) - wanted
    assert list(training.texts("en")) != [line for line in lines if line not in wanted]
    packaged, rest = read_corpora([], [], ["fr", "ta"])
    assert (packaged.count("ta"), rest.count("ta"), packaged.languages) == (120, 30, ("fr", "ta"))
    with pytest.raises(DataError, match="There is no folder"):
        read_corpora([folder / "none"], [], [])


def test_the_command_line_writes_what_load_sae_reads(folder, tmp_path, capsys):
    out = tmp_path / "sae"
    options = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    arguments = ["--model", str(tiny("llama").folder), "--layer", "1", "--text", str(folder), "--out", str(out)]
    assert main([*arguments, *options, "--threads", "1"]) == 0
    found = load_sae(out)
    assert (found.layer, found.site, found.n_latents, found.d_in) == (1, "mlp_out", 48, 32)
    assert found.coder.notes["held_out"] == evaluate_sae(
        model_of(), found.coder, read_corpora([folder], [], [])[1], max_tokens=128
    )
    assert main([*arguments[:-2], "--layer", "9", "--out", str(out)]) == 2
    assert "layer=9 is out of range" in capsys.readouterr().err


def test_bad_settings_are_sentences():
    for changes, message in [
        ({"k": 49}, "k=49 is more than the 48 latents"),
        ({"batch": 129}, "batch=129 is more than buffer=128"),
        ({"tokens": 0}, "tokens=0 must be at least 1"),
    ]:
        with pytest.raises(SettingError, match=message):
            SAEConfig(layer=0, **{**SMALL, **changes})
    with pytest.raises(DataError, match="no text with a token that counts"):
        train_sae(model_of(), Corpus.from_texts({"en": [""]}), SAEConfig(layer=0, **SMALL), progress=False)
    with pytest.raises(SettingError, match="layer=7 is out of range"):
        train_sae(model_of(), CORPUS, SAEConfig(layer=7, **SMALL), progress=False)
