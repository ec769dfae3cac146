"""The model that is trained: a Llama forward over a mapping of weights, and the gradient of its loss."""

import math
from collections.abc import Mapping

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

EPSILON = 1e-6
ROTARY_BASE = 10000.0


def llama_config(*, vocabulary: int, layers: int, d_model: int, d_mlp: int, heads: int, context: int) -> LlamaConfig:
    """Return the Hugging Face configuration of a model: tied embeddings, no biases, one value head a head."""
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=d_model,
        intermediate_size=d_mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=context,
        hidden_act="silu",
        rms_norm_eps=EPSILON,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        dtype="bfloat16",
    )


def initial_weights(config: LlamaConfig, seed: int) -> dict[str, Tensor]:
    """Return float32 weights before training, by their names in ``LlamaForCausalLM``.

    Normal with deviation 0.02, less by the square root of twice the number of layers where a matrix writes to the
    residual stream; norms are ones.
    """
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            weights[name] = torch.ones(parameter.shape)
            continue
        writes = name.endswith(("o_proj.weight", "down_proj.weight"))
        scale = 0.02 / math.sqrt(2 * config.num_hidden_layers) if writes else 0.02
        weights[name] = torch.randn(parameter.shape, generator=generator) * scale
    return weights


def rotary_angles(
    length: int, d_head: int, device: torch.device
) -> tuple[Float[Tensor, "pos d_head"], Float[Tensor, "pos d_head"]]:
    """Return cosines and sines of the rotary embedding, float32."""
    frequency = ROTARY_BASE ** (-torch.arange(0, d_head, 2, device=device, dtype=torch.float32) / d_head)
    angle = torch.arange(length, device=device, dtype=torch.float32)[:, None] * frequency
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos(), angle.sin()


def final_states(weights: Mapping[str, Tensor], residual: Tensor, cos: Tensor, sin: Tensor, layers: int) -> Tensor:
    """Return what the unembedding reads, [batch, pos, d_model] in the dtype of the matrices.

    The residual stream and the norms are float32. With float32 matrices this is what ``LlamaForCausalLM`` computes.
    No shapes are checked here because the function is compiled.

    Args:
        weights: By their names in ``LlamaForCausalLM``.
        residual: Token embeddings, [batch, pos, d_model] float32.
        cos: From ``rotary_angles``.
        sin: From ``rotary_angles``.
        layers: Number of layers.
    """
    batch, length, width = residual.shape
    d_head = cos.shape[-1]
    dtype = weights["model.layers.0.mlp.up_proj.weight"].dtype
    future = torch.ones(length, length, dtype=torch.bool, device=residual.device).triu(1)

    def norm(states: Tensor, name: str) -> Tensor:
        scale = torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + EPSILON)
        return (states * scale * weights[name]).to(dtype)

    def heads(states: Tensor, name: str, *, rotate: bool) -> Tensor:
        split = F.linear(states, weights[name]).view(batch, length, width // d_head, d_head).transpose(1, 2)
        if not rotate:
            return split
        left, right = split.float().chunk(2, dim=-1)
        return (split * cos + torch.cat([-right, left], dim=-1) * sin).to(dtype)

    for layer in range(layers):
        at = f"model.layers.{layer}."
        states = norm(residual, at + "input_layernorm.weight")
        query = heads(states, at + "self_attn.q_proj.weight", rotate=True)
        key = heads(states, at + "self_attn.k_proj.weight", rotate=True)
        value = heads(states, at + "self_attn.v_proj.weight", rotate=False)
        # Written out: over short windows on a CPU four times as fast as scaled_dot_product_attention.
        scores = (query @ key.transpose(-1, -2)).float() * d_head**-0.5
        mixed = scores.masked_fill(future, -torch.inf).softmax(-1).to(dtype) @ value
        mixed = mixed.transpose(1, 2).reshape(batch, length, width)
        residual = residual + F.linear(mixed, weights[at + "self_attn.o_proj.weight"])
        states = norm(residual, at + "post_attention_layernorm.weight")
        gate = F.linear(states, weights[at + "mlp.gate_proj.weight"])
        up = F.linear(states, weights[at + "mlp.up_proj.weight"])
        residual = residual + F.linear(F.silu(gate) * up, weights[at + "mlp.down_proj.weight"])
    return norm(residual, "model.norm.weight")


def cross_entropy_gradient(
    logits: Float[Tensor, "row vocabulary"], targets: Int64[Tensor, " row"]
) -> tuple[Float[Tensor, ""], Float[Tensor, "row vocabulary"]]:
    """Return the summed cross entropy in nats, and its gradient in the dtype of the logits."""
    values = logits.float()
    log_total = values.logsumexp(-1, keepdim=True)
    hit = torch.arange(values.shape[-1], device=values.device) == targets[:, None]
    gradient = (values - log_total).exp() - hit.to(values.dtype)
    return log_total.sum() - (values * hit).sum(), gradient.to(logits.dtype)
