import itertools
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lens_neurons.errors import LensNeuronsError
from lens_neurons.training import Trainer, TrainingConfig, export, train
from lens_neurons.training.__main__ import main
from lens_neurons.training.network import cross_entropy_gradient, final_states, initial_weights, rotary_angles
from lens_neurons.training.text import WindowSampler, encode_lines, is_held_out, read_sources, train_tokenizer

WORDS = {"aa": "ba bo bu da do du", "bb": "ki ke ko pi pe po", "ta": "நான் நீ அவன் வீடு மரம் பூ"}


def write_lines(folder: Path, *, parallel: bool) -> Path:
    folder.mkdir()
    for seed, (language, words) in enumerate(WORDS.items()):
        generator = np.random.default_rng(seed)
        lines = [" ".join(generator.choice(words.split(), size=8)) for _ in range(300)]
        if parallel:
            lines[7] = ""
        (folder / f"{language}.txt").write_text("\n".join(lines) + "\n", "utf-8")
    return folder


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the matrices are tiny; on a busy machine threads would wait for each other
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("training")
    return {
        "text": write_lines(base / "plain", parallel=False),
        "parallel": write_lines(base / "side", parallel=True),
    }


@pytest.fixture
def config(folders: dict[str, Path], tmp_path: Path) -> TrainingConfig:
    return TrainingConfig(
        text=[folders["text"]],
        parallel=[folders["parallel"]],
        out=tmp_path / "model",
        vocabulary=320,
        layers=2,
        d_model=32,
        d_mlp=48,
        heads=2,
        context=32,
        tokens=1024,
        windows=4,
        window=16,
        long_share=0.2,
        warmup_tokens=128,
        device="cpu",
        compile=False,
    )


def test_the_saved_folder_is_the_model_that_was_trained(config: TrainingConfig):
    folder = train(config, progress=False)
    assert folder == config.out
    record = json.loads((folder / "training.json").read_text())
    assert record["tokens_seen"] == 1024
    assert record["losses"]["training"] < 5.77  # log(320): it has learned something
    assert record["losses"]["held_out"].keys() == WORDS.keys()

    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("ba bo நான் 你好", return_tensors="pt")["input_ids"]
    assert ids[0, 0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[0, 1:]) == "ba bo நான் 你好"

    saved = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    weights = {name: tensor.float() for name, tensor in saved.items()}
    embedding = weights["model.embed_tokens.weight"]
    with torch.no_grad():
        angles = rotary_angles(ids.shape[1], 16, torch.device("cpu"))
        ours = final_states(weights, embedding[ids], *angles, 2) @ embedding.T
        torch.testing.assert_close(ours, model(ids).logits, atol=1e-5, rtol=1e-4)


def test_an_interrupted_run_ends_with_the_same_weights(config: TrainingConfig, tmp_path: Path):
    whole, parts = config, replace(config, out=tmp_path / "parts")
    train(whole, progress=False)
    for stop_at in (300, 700, 900):
        assert train(replace(parts, stop_at=stop_at), progress=False) is None
    train(parts, progress=False)
    first = load_file(whole.state_folder / "state.safetensors")
    second = load_file(parts.state_folder / "state.safetensors")
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def test_the_number_of_tokens_may_change_and_the_schedule_still_ends_at_zero(config: TrainingConfig):
    train(replace(config, stop_at=300), progress=False)
    folder = train(replace(config, tokens=512), progress=False)
    assert folder
    assert json.loads((folder / "training.json").read_text())["tokens_seen"] == 512
    assert train(replace(config, tokens=512), progress=False) == folder  # a finished run has nothing left to do


def test_a_checkpoint_of_another_run_is_refused_with_both_values(config: TrainingConfig):
    train(replace(config, stop_at=100), progress=False)
    with pytest.raises(LensNeuronsError, match=r"d_mlp: 48 there, 64 here"):
        train(replace(config, d_mlp=64), progress=False)


def test_any_checkpoint_can_be_exported(config: TrainingConfig, tmp_path: Path):
    train(replace(config, stop_at=100), progress=False)
    export(config.state_folder, tmp_path / "now")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "now").config.num_hidden_layers == 2
    with pytest.raises(LensNeuronsError, match="no checkpoint"):
        export(tmp_path, tmp_path / "now")


def test_sigterm_saves_a_checkpoint(folders: dict[str, Path], tmp_path: Path):
    command = [sys.executable, "-m", "lens_neurons.training", "--text", folders["text"], "--out", tmp_path / "model"]
    shape = "--vocabulary 320 --layers 2 --d-model 32 --d-mlp 48 --heads 2 --threads 1 --no-compile --minutes 0"
    process = subprocess.Popen([*command, *shape.split()], stderr=subprocess.DEVNULL)
    state = tmp_path / "model" / "checkpoint" / "state.safetensors"
    deadline = time.monotonic() + 120
    while not state.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    assert load_file(state)
    assert not (tmp_path / "model" / "model.safetensors").exists()


def test_parallel_folders_hold_out_the_same_lines_in_every_language(folders: dict[str, Path]):
    sources = read_sources([folders["text"]], [folders["parallel"]], held_out=0.1)
    plain = [set(source.held_out) for source in sources if not source.parallel]
    side = [set(source.held_out) for source in sources if source.parallel]
    assert len(plain) == len(side) == 3
    assert all(lines == side[0] for lines in side)
    assert len({frozenset(lines) for lines in plain}) == 3
    for source in sources:
        unseen = {line for other in sources if other.language == source.language for line in other.held_out.values()}
        assert not unseen & set(source.training)
    assert sum(is_held_out("x", line, 0.05) for line in range(10_000)) == pytest.approx(500, abs=80)


def test_all_lines_come_once_before_any_comes_again():
    tokens = np.arange(10, 40, dtype=np.uint16)
    sampler = WindowSampler({"aa": (tokens, np.arange(0, 31, 3))}, bos=1, alpha=0.5, seed=0)
    batch = sampler.batch(0, 5, 6)  # ten lines of three tokens, two a window
    assert (batch[:, 0] == 1).all()
    assert sorted(batch[:, 1:].flatten().tolist()) == tokens.tolist()


def test_languages_are_drawn_by_temperature():
    line = np.zeros(10_000, dtype=np.uint16)
    sizes = {"aa": 10_000, "bb": 100}
    sampler = WindowSampler({k: (line[:n], np.array([0, n])) for k, n in sizes.items()}, bos=1, alpha=0.5, seed=0)
    assert sampler.shares["aa"] / sampler.shares["bb"] == pytest.approx(10)


def test_lines_come_back_from_their_tokens(folders: dict[str, Path]):
    texts = {source.language: source.training for source in read_sources([folders["text"]])}
    tokenizer = train_tokenizer(texts, 320)
    tokens, starts = encode_lines(tokenizer, texts["ta"])
    lines = [tokenizer.decode(tokens[first:last].tolist()) for first, last in itertools.pairwise(starts)]
    assert lines == [line + "\n" for line in texts["ta"]]


def test_loss_gradient_is_that_of_cross_entropy():
    logits = torch.randn(5, 11, generator=torch.Generator().manual_seed(0)).requires_grad_()
    targets = torch.tensor([0, 3, 10, 3, 7])
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    expected.backward()
    loss, gradient = cross_entropy_gradient(logits.detach(), targets)
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(gradient, logits.grad)


def test_a_step_moves_along_the_gradient_of_the_whole_model(config: TrainingConfig):
    tokens = {"aa": (np.arange(4, 304, dtype=np.uint16), np.arange(0, 301, 10))}
    trainer = Trainer(config, tokens, bos=1)
    batch = trainer.sampler.batch(0, 4, 16)
    trainer._set_gradients(batch)
    weights = {name: weight.clone().requires_grad_() for name, weight in initial_weights(config.llama, 0).items()}
    embedding = weights["model.embed_tokens.weight"]
    states = final_states(weights, embedding[batch[:, :-1]], *rotary_angles(16, 16, torch.device("cpu")), 2)
    logits = (states @ embedding.T).flatten(0, 1)
    torch.nn.functional.cross_entropy(logits, batch[:, 1:].flatten()).backward()
    for name, weight in weights.items():
        cosine = torch.cosine_similarity(weight.grad.flatten(), trainer.weights[name].grad.flatten(), dim=0)
        assert cosine > 0.99, name


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--text", "/nowhere"], "There is no folder /nowhere"),
        (["--text", "{empty}"], "holds no file named"),
        (["--text", "{text}", "--languages", "xx"], "No folder has text for xx"),
        (["--export", "{empty}"], "There is no checkpoint"),
        ([], "No folder has text"),
    ],
)
def test_what_is_wrong_is_one_sentence(
    arguments: list[str], said: str, folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "empty").mkdir()
    arguments = [argument.format(empty=tmp_path / "empty", text=folders["text"]) for argument in arguments]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 2
    printed = capsys.readouterr().err
    assert said in printed
    assert len(printed.strip().splitlines()) == 1
