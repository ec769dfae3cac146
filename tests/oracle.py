"""What plain transformers computes, one text at a time, without padding, cache or any hook of ours: the oracle."""

from collections.abc import Callable
from typing import Any

import torch
from models import GATED
from torch import Tensor

from lens_neurons.errors import LensNeuronsError

ROWS = ([5, 17, 300, 42, 7, 8, 9, 250, 33, 71, 12], [99, 3, 3, 150], [200, 310, 11, 64, 5, 6, 380])


def padded(rows: Any, side: str) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    tokens = torch.zeros(len(rows), width, dtype=torch.int64)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        at = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        tokens[i, at] = torch.tensor(row)
        mask[i, at] = True
    return tokens, mask


@torch.no_grad()
def log_probs(hf_model: Any, row: Any) -> Tensor:
    return hf_model(torch.tensor([row])).logits[0].log_softmax(-1)


def close(found: Tensor, expected: Tensor, limit: float = 1e-4) -> bool:
    return bool((found - expected).abs().max() < limit)


def hf_layers(hf_model: Any) -> Any:
    for path in ("model.layers", "transformer.h", "gpt_neox.layers", "model.decoder.layers"):
        owner = hf_model
        for name in path.split("."):
            owner = getattr(owner, name, None)
        if owner is not None:
            return owner
    raise AssertionError


def hf_mlp(layer: Any) -> tuple[Any, Any]:
    """Return the linear layer into the MLP's neurons (the gate's where there is one), and the one out of them."""
    for owner in (getattr(layer, "mlp", layer), layer):
        for first, second in (
            ("gate_proj", "down_proj"),
            ("dense_h_to_4h", "dense_4h_to_h"),
            ("c_fc", "c_proj"),
            ("fc1", "fc2"),
        ):
            if hasattr(owner, first):
                return getattr(owner, first), getattr(owner, second)
    raise AssertionError


def hf_attention(layer: Any) -> Any:
    return next(
        getattr(layer, name) for name in ("self_attn", "self_attention", "attn", "attention") if hasattr(layer, name)
    )


@torch.no_grad()
def hf_sites(arch: str, hf_model: Any, row: Any) -> dict[str, Tensor]:
    """Return what each site holds on one text: [layer, pos, unit]."""
    caught: dict[str, list[Tensor]] = {}
    handles = []

    def output(site: str, module: Any, change: Callable[[Tensor], Tensor] = lambda value: value) -> None:
        def hook(_module: Any, _inputs: Any, value: Tensor) -> None:
            caught.setdefault(site, []).append(change(value.reshape(len(row), -1)).reshape(len(row), -1).clone())

        handles.append(module.register_forward_hook(hook))

    def source(site: str, module: Any) -> None:
        def hook(_module: Any, inputs: Any) -> None:
            caught.setdefault(site, []).append(inputs[0].reshape(len(row), -1).clone())

        handles.append(module.register_forward_pre_hook(hook))

    for layer in hf_layers(hf_model):
        first, last = hf_mlp(layer)
        output("gate_pre", first)
        source("post", last)
        output("mlp_out", last)
        if arch in GATED:
            output("up", layer.mlp.up_proj)
        attention = hf_attention(layer)
        out = next(getattr(attention, n) for n in ("o_proj", "out_proj", "dense", "c_proj") if hasattr(attention, n))
        output("attn_out", out)
        if hasattr(attention, "q_proj"):
            for name in "qkv":
                output(name, getattr(attention, f"{name}_proj"))
        elif arch == "gpt2":
            for i, name in enumerate("qkv"):
                output(name, attention.c_attn, lambda value, i=i: value.chunk(3, -1)[i])
        else:
            for i, name in enumerate("qkv"):
                output(
                    name,
                    attention.query_key_value,
                    lambda value, i=i: value.reshape(len(row), hf_model.config.num_attention_heads, 3, -1)[:, :, i],
                )
    try:
        hf_model(torch.tensor([row]))
    finally:
        for handle in handles:
            handle.remove()
    return {site: torch.stack(values) for site, values in caught.items()}


def sentence(error: Exception) -> None:
    text = str(error)
    assert isinstance(error, LensNeuronsError)
    assert "\n" not in text
    assert text.endswith(".")
    assert 30 < len(text) < 400
