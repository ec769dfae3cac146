"""The state of a training run, and one step of it.

Weights and the optimizer are float32; every step works on a bfloat16 copy, which spares autocast's casts. AdamW moves
everything: with Muon the loss falls sooner, but the neurons steered far less (demo/MODEL_CARD.md).
"""

import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from torch.optim import AdamW
from transformers import LlamaConfig

from lens_neurons.errors import StorageError
from lens_neurons.training.network import (
    cross_entropy_gradient,
    final_states,
    initial_weights,
    llama_config,
    rotary_angles,
)
from lens_neurons.training.text import Lines, WindowSampler

STATE = "state.safetensors"
EMBEDDING = "model.embed_tokens.weight"
HEAD_ROWS = 512


@dataclass(frozen=True)
class TrainingConfig:
    """Everything that decides what a run does.

    Attributes:
        text: Folders of ``{language}.txt[.gz]``; held-out lines are drawn in each file by itself.
        out: Where the finished model goes.
        parallel: Folders in which line n says the same in every language; the same lines are held out in all.
        checkpoint: Where the run keeps its state; ``out/checkpoint`` by default.
        languages: File stems to use; all that are found by default.
        tokenizer: A folder with a tokenizer to use; by default one is trained.
        vocabulary: Tokens of the tokenizer.
        layers: Layers of the model; likewise ``d_model``, ``d_mlp``, ``heads``, ``context``.
        tokens: How many tokens to train on; may be changed when a run is resumed.
        alpha: A language of n tokens is drawn in proportion to ``n ** alpha``.
        held_out: Share of the lines that is never trained on.
        windows: Sequences a step.
        window: Tokens a sequence.
        long_share: The last share of the tokens comes in sequences of ``context`` tokens.
        warmup_tokens: Tokens over which the learning rate rises to its peak.
        decay_share: Last share of the tokens, over which it falls linearly to zero.
        learning_rate: Peak rate.
        weight_decay: Of the hidden matrices; a tenth of it on the embedding, none on the norms.
        seed: Decides everything that is drawn.
        minutes: Time between two checkpoints.
        stop_at: Stop with a checkpoint once so many tokens were seen, without finishing.
        device: A torch device; "auto" is a GPU where there is one.
        compile: Use ``torch.compile``, which wants a C++ compiler on a CPU.
    """

    text: Sequence[Path]
    out: Path
    parallel: Sequence[Path] = ()
    checkpoint: Path | None = None
    languages: Sequence[str] = ()
    tokenizer: Path | None = None
    vocabulary: int = 8192
    layers: int = 6
    d_model: int = 192
    d_mlp: int = 2560
    heads: int = 3
    context: int = 512
    tokens: int = 28_000_000
    alpha: float = 0.5
    held_out: float = 0.05
    windows: int = 32
    window: int = 128
    long_share: float = 0.05
    warmup_tokens: int = 400_000
    decay_share: float = 0.5
    learning_rate: float = 2e-3
    weight_decay: float = 0.1
    seed: int = 0
    minutes: float = 5.0
    stop_at: int | None = None
    device: str = "auto"
    compile: bool = True

    @property
    def state_folder(self) -> Path:
        """Where the run keeps its state."""
        return self.checkpoint or self.out / "checkpoint"

    @property
    def llama(self) -> LlamaConfig:
        """The model's configuration."""
        shape = ("vocabulary", "layers", "d_model", "d_mlp", "heads", "context")
        return llama_config(**{name: getattr(self, name) for name in shape})


class Trainer:
    """The weights of a run, its optimizer and its place in the text.

    Args:
        config: What to train.
        tokens: The lines of every language.
        bos: Token that begins every window.

    Attributes:
        weights: Float32, by their names in ``LlamaForCausalLM``.
        seen: Tokens trained on so far.
        step: Steps made so far.
        losses: Nats a token; "training" is an average over about the last 50 steps.
    """

    def __init__(self, config: TrainingConfig, tokens: Mapping[str, Lines], bos: int) -> None:
        self.config: TrainingConfig = config
        self.seen: int = 0
        self.step: int = 0
        self.losses: dict[str, Any] = {"training": math.log(config.vocabulary)}
        automatic = "cuda" if torch.cuda.is_available() else "cpu"
        self.device: torch.device = torch.device(automatic if config.device == "auto" else config.device)
        self.sampler: WindowSampler = WindowSampler(tokens, bos, config.alpha, config.seed)
        self.weights: dict[str, torch.Tensor] = {
            name: weight.to(self.device).requires_grad_()
            for name, weight in initial_weights(config.llama, config.seed).items()
        }
        self._working = {
            name: weight.detach().to(torch.bfloat16 if weight.ndim == 2 else torch.float32, copy=True).requires_grad_()
            for name, weight in self.weights.items()
        }
        self._optimizer = self._make_optimizer()
        wrap = functools.partial(torch.compile, dynamic=False) if config.compile else _unchanged
        self._states: Callable[..., Tensor] = wrap(final_states)
        self._head: Callable[..., tuple[Tensor, Tensor]] = wrap(cross_entropy_gradient)

    def _make_optimizer(self) -> AdamW:
        config, embedding = self.config, self.weights[EMBEDDING]
        hidden = [weight for weight in self.weights.values() if weight.ndim == 2 and weight is not embedding]
        norms = [weight for weight in self.weights.values() if weight.ndim == 1]
        groups = [
            {"params": hidden, "weight_decay": config.weight_decay},
            {"params": [embedding], "weight_decay": config.weight_decay / 10},
            {"params": norms, "weight_decay": 0.0},
        ]
        return AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95), fused=True)

    def learning_rate_share(self) -> float:
        """Return the share of the peak learning rate that the next step uses."""
        config = self.config
        warmup = (self.seen + 1) / max(config.warmup_tokens, 1)
        decay = (config.tokens - self.seen) / max(config.decay_share * config.tokens, 1)
        return max(0.0, min(1.0, warmup, decay))

    def train_step(self) -> float:
        """Make one step.

        Returns:
            The loss before it, in nats a token.
        """
        config = self.config
        long = self.seen >= (1 - config.long_share) * config.tokens
        length = config.context if long else config.window
        windows = max(1, config.windows * config.window // length)
        loss = self._set_gradients(self.sampler.batch(self.step, windows, length).to(self.device))
        for group in self._optimizer.param_groups:
            group["lr"] = config.learning_rate * self.learning_rate_share()
        self._optimizer.step()
        self._refresh()
        self.seen += windows * length
        self.step += 1
        self.losses["training"] += 0.02 * (loss - self.losses["training"])
        return loss

    def _set_gradients(self, batch: Int64[Tensor, "window pos"]) -> float:
        inputs, targets, embedding = batch[:, :-1], batch[:, 1:].flatten(), self.weights[EMBEDDING]
        embedding.grad = None
        residual = F.embedding(inputs, embedding)
        cos, sin = rotary_angles(inputs.shape[1], self.config.d_model // self.config.heads, self.device)
        states = self._states(self._working, residual, cos, sin, self.config.layers)
        with torch.no_grad():
            rows, matrix = states.flatten(0, 1), self._working[EMBEDDING]
            by_state, by_matrix = torch.empty_like(rows), torch.zeros_like(embedding)
            loss = torch.zeros((), device=self.device)
            # In pieces, the gradient taken at once: the logits of a whole batch would fit no cache.
            for first in range(0, len(rows), HEAD_ROWS):
                part = slice(first, first + HEAD_ROWS)
                part_loss, gradient = self._head(rows[part] @ matrix.T, targets[part])
                loss += part_loss
                by_state[part] = gradient @ matrix
                by_matrix += gradient.T @ rows[part]
        torch.autograd.backward(states, (by_state / len(rows)).view_as(states))
        for name, weight in self.weights.items():
            working = self._working[name]
            if weight is not embedding and working.grad is not None:
                weight.grad = working.grad.float()
                working.grad = None
        if embedding.grad is not None:
            embedding.grad += by_matrix / len(rows)
        return float(loss) / len(rows)

    @torch.no_grad()
    def _refresh(self) -> None:
        for name, weight in self.weights.items():
            self._working[name].copy_(weight)

    @torch.no_grad()
    def held_out_loss(self, texts: Sequence[Sequence[int]]) -> float:
        """Return nats a token over texts of token ids that begin with ``<s>``, each read alone up to the context."""
        config, embedding = self.config, self.weights[EMBEDDING]
        angles = rotary_angles(config.context, config.d_model // config.heads, self.device)
        total, count = 0.0, 0
        for text in texts:
            ids = torch.tensor(text[: config.context], device=self.device)
            cos, sin = (angle[: len(ids) - 1] for angle in angles)
            residual = F.embedding(ids[None, :-1], embedding)
            states = final_states(self.weights, residual, cos, sin, config.layers)
            total += float(F.cross_entropy(states[0] @ embedding.T, ids[1:], reduction="sum"))
            count += len(ids) - 1
        return total / max(count, 1)

    def save(self, folder: Path) -> None:
        """Write the whole state; an interruption leaves the old one or the new one."""
        tensors = {f"weight/{name}": weight.detach() for name, weight in self.weights.items()}
        for number, state in self._optimizer.state_dict()["state"].items():
            tensors |= {f"adam/{number}/{key}": value for key, value in state.items()}
        plain = {name: value for name, value in asdict(self.config).items() if isinstance(value, int | float)}
        state = {
            "seen": self.seen,
            "step": self.step,
            "cursors": self.sampler.cursors,
            "losses": self.losses,
            "arguments": plain,
        }
        temporary = folder / "state.tmp"
        tensors = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
        save_file(tensors, temporary, metadata={"state": json.dumps(state)})
        temporary.replace(folder / STATE)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Continue from what ``save`` wrote."""
        state, tensors = read_state(folder), load_file(folder / STATE)
        self.seen = state["seen"]
        self.step = state["step"]
        self.losses = state["losses"]
        self.sampler.cursors = state["cursors"]
        for name, weight in self.weights.items():
            weight.copy_(tensors[f"weight/{name}"])
        self._refresh()
        states: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            kind, number, *key = name.split("/")
            if kind == "adam":
                states.setdefault(int(number), {})[key[0]] = tensor
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": states, "param_groups": groups})


def read_state(folder: Path) -> dict[str, Any]:
    """Return tokens seen, step, arguments and losses of a checkpoint, without its tensors.

    Raises:
        StorageError: There is no checkpoint.
    """
    path = folder / STATE
    if not path.is_file():
        raise StorageError(f"There is no checkpoint in {folder}; give the folder of a run that has saved one.")
    with safe_open(path, framework="pt") as file:  # pyright: ignore[reportUnknownVariableType]
        return json.loads(file.metadata()["state"])


def _unchanged(function: Callable[..., Any]) -> Callable[..., Any]:
    return function
