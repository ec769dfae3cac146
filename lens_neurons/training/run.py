"""A whole run: prepare the text, train with checkpoints, write the model."""

import json
import logging
import signal
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file
from tqdm import tqdm
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from lens_neurons.errors import ProvenanceError
from lens_neurons.training.text import BOS, Lines, Source, encode_lines, read_sources, train_tokenizer
from lens_neurons.training.trainer import STATE, Trainer, TrainingConfig, read_state

logger: logging.Logger = logging.getLogger(__name__)

FIXED = ("languages", "vocabulary", "layers", "d_model", "d_mlp", "heads", "context", "alpha", "held_out", "seed")
HELD_OUT_LINES = 100


def train(config: TrainingConfig, *, progress: bool = True) -> Path | None:
    """Train a model, from the checkpoint on where there is one.

    SIGTERM and Ctrl-C end the run after the step in hand, with a checkpoint.

    Args:
        config: What to train.
        progress: Show a progress bar on stderr.

    Returns:
        The folder of the finished model, or None where ``stop_at`` or a signal came first.

    Raises:
        DataError: Folders or languages are missing.
        ProvenanceError: The checkpoint belongs to a run over other text or of another shape.
    """
    folder = config.state_folder
    sources = read_sources(config.text, config.parallel, config.languages, held_out=config.held_out, seed=config.seed)
    tokens, tokenizer = _prepare(config, sources)
    trainer = Trainer(config, tokens, tokenizer.get_vocab()[BOS])
    if (folder / STATE).exists():
        trainer.load(folder)
    end = min(config.tokens, config.stop_at or config.tokens)
    saved = time.monotonic()
    bar = tqdm(
        total=config.tokens,
        initial=trainer.seen,
        unit="tok",
        unit_scale=True,
        disable=not progress,
        mininterval=1 if sys.stderr.isatty() else 20,
    )
    with bar, _stop_signals() as stopped:
        while trainer.seen < end and not stopped:
            before = trainer.seen
            trainer.train_step()
            bar.set_postfix(loss=f"{trainer.losses['training']:.3f}", refresh=False)
            bar.update(trainer.seen - before)
            if time.monotonic() - saved > 60 * config.minutes:
                trainer.save(folder)
                saved = time.monotonic()
                logger.info("step %d, %d tokens, loss %.3f", trainer.step, trainer.seen, trainer.losses["training"])
    trainer.save(folder)
    if trainer.seen < config.tokens:
        return None
    held_out: dict[str, list[list[int]]] = {source.language: [] for source in sources}
    for source in sources:
        held_out[source.language] += [tokenizer(line)["input_ids"] for line in source.held_out.values()]
    trainer.losses["held_out"] = {
        language: round(trainer.held_out_loss(texts[:: max(1, len(texts) // HELD_OUT_LINES)]), 4)
        for language, texts in held_out.items()
    }
    trainer.save(folder)
    return export(folder, config.out)


def export(checkpoint: Path, out: Path) -> Path:
    """Write the model of a checkpoint in Hugging Face format, bfloat16, with tokenizer and ``training.json``.

    Args:
        checkpoint: Checkpoint folder of a finished, interrupted or running training.
        out: Folder to write; made if it is missing.

    Returns:
        The folder ``out``.

    Raises:
        StorageError: There is no checkpoint.
    """
    state = read_state(checkpoint)
    run = json.loads((checkpoint / "run.json").read_text("utf-8"))
    config = TrainingConfig(text=(), out=out, **run["settings"])
    weights = {
        name.removeprefix("weight/"): tensor.to(torch.bfloat16)
        for name, tensor in load_file(checkpoint / STATE).items()
        if name.startswith("weight/")
    }
    with torch.random.fork_rng(devices=[]):
        model = LlamaForCausalLM(config.llama)
    # assign: the weights keep their bfloat16; strict is off because the tied unembedding is not among them.
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    model.save_pretrained(out)
    _load_tokenizer(checkpoint / "tokenizer").save_pretrained(out)
    record = {
        "schema": 1,
        "arguments": state["arguments"],
        "tokens_seen": state["seen"],
        "steps": state["step"],
        "losses": state["losses"],
        **run,
        "versions": {name: version(name) for name in ("torch", "transformers", "tokenizers", "numpy")},
    }
    (out / "training.json").write_text(json.dumps(record, separators=(",", ":")), "utf-8")
    return out


def _prepare(config: TrainingConfig, sources: list[Source]) -> tuple[dict[str, Lines], PreTrainedTokenizerFast]:
    """Return tokens by language, and the tokenizer: made once, and kept in the checkpoint folder."""
    folder = config.state_folder
    path = folder / "run.json"
    run = _description(config, sources)
    if path.exists():
        saved = json.loads(path.read_text("utf-8"))
        for part in ("settings", "sha256"):
            names = sorted(name for name in {*saved[part], *run[part]} if saved[part].get(name) != run[part].get(name))
            if names:
                shown = "; ".join(
                    f"{name}: {saved[part].get(name)} there, {run[part].get(name)} here" for name in names
                )
                raise ProvenanceError(
                    f"The run in {folder} was started with other {part} ({shown}); give the same to continue it, or "
                    "another checkpoint folder to start a new one."
                )
        arrays = load_arrays(folder / "tokens.safetensors")
        names = sorted(name.removeprefix("tokens/") for name in arrays if name.startswith("tokens/"))
        tokens = {name: (arrays[f"tokens/{name}"], arrays[f"starts/{name}"]) for name in names}
        return tokens, _load_tokenizer(folder / "tokenizer")
    folder.mkdir(parents=True, exist_ok=True)
    texts: dict[str, list[str]] = {language: [] for language in sorted({source.language for source in sources})}
    for source in sources:
        texts[source.language] += source.training
    logger.info("%d files, %d languages, %d lines", len(sources), len(texts), sum(map(len, texts.values())))
    if config.tokenizer:
        tokenizer = _load_tokenizer(config.tokenizer)
    else:
        tokenizer = train_tokenizer(texts, config.vocabulary, config.seed)
    tokenizer.save_pretrained(folder / "tokenizer")
    tokens = {language: encode_lines(tokenizer, lines) for language, lines in texts.items()}
    arrays = {f"tokens/{language}": ids for language, (ids, _) in tokens.items()}
    arrays |= {f"starts/{language}": starts for language, (_, starts) in tokens.items()}
    save_arrays(arrays, folder / "tokens.safetensors")
    path.write_text(json.dumps(run), "utf-8")
    return tokens, tokenizer


def _description(config: TrainingConfig, sources: list[Source]) -> dict[str, Any]:
    """Return what a run is bound to: settings that cannot change, the text, and which lines are held out."""
    parallel: dict[str, set[int]] = {}
    plain: dict[str, dict[str, list[int]]] = {}
    for source in sources:
        if source.parallel:
            parallel.setdefault(source.name, set()).update(source.held_out)
        else:
            plain.setdefault(source.name, {})[source.language] = list(source.held_out)
    settings = {name: getattr(config, name) for name in FIXED} | {"languages": list(config.languages)}
    return {
        "settings": settings,
        "sha256": {f"{source.name}/{source.language}": source.sha256 for source in sources},
        "held_out": {**plain, **{name: sorted(lines) for name, lines in parallel.items()}},
    }


def _load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(folder)


@contextmanager
def _stop_signals() -> Generator[list[int]]:
    """Collect SIGTERM and Ctrl-C instead of dying of them; outside the main thread signals are left alone."""
    stopped: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        stopped.append(number)

    try:
        previous = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:
        previous = {}
    try:
        yield stopped
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
