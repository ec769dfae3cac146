"""Steering and scoring by plain transformers, one text at a time: the oracle of the evaluation tests."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from models import tiny
from oracle import hf_layers
from torch import Tensor

from lens_neurons.activation_stats import ActivationStats
from lens_neurons.model import Adapter, adapt, load_model
from lens_neurons.neurons import NeuronSet

LANGUAGES = ("en", "fr", "ja", "sw")


def tiny_model(arch: str = "llama", *, add_bos: bool = False) -> tuple[Any, Any, Adapter]:
    """Return the Hugging Face model with its tokenizer, our model, and its adapter."""
    found = tiny(arch, add_bos=add_bos)
    model = load_model(found.folder)
    return found, model, adapt(model)


def make_neurons(adapter: Adapter, *, share: float = 0.12, empty: tuple[str, ...] = ()) -> NeuronSet:
    generator = torch.Generator().manual_seed(3)
    masks = {code: torch.rand(adapter.n_layers, adapter.d_mlp, generator=generator) < share for code in LANGUAGES}
    for code in empty:
        masks[code] = torch.zeros_like(masks[code])
    return NeuronSet.from_masks(masks, provenance=adapter.provenance(), method={"name": "made up"})


def make_stats(adapter: Adapter) -> ActivationStats:
    """Return a recording whose text statistics are all different from each other."""
    generator = torch.Generator().manual_seed(4)
    shape = (len(LANGUAGES), adapter.n_layers, adapter.d_mlp)
    text_max, text_median, text_mean = (2 * torch.randn(shape, generator=generator) for _ in range(3))
    count = torch.full((len(LANGUAGES),), 10)
    positive = torch.ones(shape, dtype=torch.int64)
    none = {"sum": None, "sum_sq": None, "sum_positive": None}
    rows = {"text_max": text_max, "text_median": text_median, "text_mean": text_mean}
    return ActivationStats(
        languages=LANGUAGES,
        site="gate_act",
        tokens=count,
        texts=count,
        positive=positive,
        **none,
        **rows,
        provenance=adapter.provenance(),
    )


Change = Callable[[Tensor, int], Tensor]


@contextmanager
def steered(hf_model: Any, change: Change) -> Iterator[None]:
    """Change act(gate) of every layer: the output of the gate's activation module, as the published code does."""
    handles = [
        layer.mlp.act_fn.register_forward_hook(lambda _m, _i, output, number=number: change(output, number))
        for number, layer in enumerate(hf_layers(hf_model))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def set_to(units: NeuronSet, language: str, name: str, stats: ActivationStats | None) -> Change:
    """Return what a factor of the amplification study does, transcribed from methods.md section 3.3."""
    mask = units.mask(language)

    def change(output: Tensor, layer: int) -> Tensor:
        index = mask[layer].nonzero().squeeze(1)
        new = output.clone()
        if name in ("p_max", "p_median"):
            table: Mapping[str, Any] = {"p_max": stats.text_max, "p_median": stats.text_median}
            new[..., index] = table[name][stats.languages.index(language), layer][index]
        elif name == "=max":
            new[..., index] = output.max()
        elif name == "+max":
            new[..., index] = output[..., index] + output.max()
        elif name == "=0":
            new[..., index] = 0.0
        elif name == "=p10":
            new[..., index] = torch.quantile(output.flatten(), 0.10)
        else:
            raise AssertionError(name)
        return new

    return change


@torch.no_grad()
def continuation_logprob(hf_model: Any, ids: list[int], start: int) -> float:
    """Return the sum of the log-probabilities of ids[start:], each given all before it."""
    logprobs = hf_model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(float(logprobs[i - 1, ids[i]]) for i in range(start, len(ids)))
