"""Importances: how much a layer's output changes, on one text, without one unit (Zhao et al. 2024, arXiv 2402.18815).

The importance of a unit on a text is the L2 norm, over the text's counted tokens, of what its layer computes less
when the unit is 0. It is exact here, and comes from one pass of the model:

- a neuron ("post"): the change of the MLP's output, ||h_k|| * ||W_out[k]||;
- a dimension of a head's queries or keys ("q", "k"): the change of the attention pattern,
  ||softmax(S - scale * q_i k_i^T) - softmax(S)|| with S the scores as the model has them, mask, ALiBi and all. The
  paper and its code take column i of Q and K as they enter the product, after any rotation, for neuron i of the query
  and key projections, and so does this; with rotary positions that is another number than what "q" and "k" hold
  elsewhere, before it. A key dimension of grouped-query attention changes all heads of its group;
- a dimension of a head's values ("v"): the change of what attention writes, through W_O, in all heads of its group;
- a dimension of the attention output ("attn_out"): its own norm.

A unit's value is the one that its linear layer returns, bias included, so what is taken away includes the bias.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lens_neurons.adapter import PROBE_TOLERANCE, Adapter
from lens_neurons.batching import Batch
from lens_neurons.collectors import HookPair, RowCollector
from lens_neurons.errors import ModelError, SettingError
from lens_neurons.model_adapters import AttentionParts, attention_parts, attention_weights

# Values of one block of softmax differences: two buffers of this size stay in the cache of a CPU's core.
_BLOCK = {"cpu": 1 << 18, "cuda": 1 << 24}
# A query sees no later key, so its row of scores is needed up to its own block of rows only.
_ROW_BLOCKS = 8


def _precise(values: Tensor) -> torch.dtype:
    return torch.float64 if values.dtype == torch.float64 else torch.float32


def token_norm(
    values: Float[Tensor, "batch pos *unit"], counted: Bool[Tensor, "batch pos"], order: int = 2
) -> Float[Tensor, "batch units"]:
    """Return the norm of every unit's values over the counted tokens of each row, units flattened.

    Args:
        values: Values of a site.
        counted: True at tokens that count.
        order: 2 for the root of the sum of squares, 1 for the sum of absolute values.
    """
    flat = values.detach().flatten(2)
    precise = _precise(flat)
    rows = max(1, (_BLOCK.get(flat.device.type, 1 << 20) * 4) // max(flat[0].numel(), 1))
    parts = [
        torch.linalg.vector_norm(
            flat[i : i + rows].to(precise).masked_fill(~counted[i : i + rows, :, None], 0), ord=order, dim=1
        )
        for i in range(0, flat.shape[0], rows)
    ]
    return torch.cat(parts)


def value_factors(
    w_o: Float[Tensor, "head d_head d_model"], key_value_heads: int
) -> Float[Tensor, "kv_head d_head repeat repeat"]:
    """Return R with ||R z|| = ||sum_h z_h W_O[h, i]|| for the heads h that share a value dimension i.

    R is a root of the Gram matrix of these heads' rows of W_O, so that nothing as wide as the model is needed later.
    """
    heads, d_head, d_model = w_o.shape
    # A device without float64 has no eigenvectors either.
    wide = w_o.to("cpu" if w_o.device.type == "mps" else w_o.device, torch.float64)
    rows = wide.reshape(key_value_heads, heads // key_value_heads, d_head, d_model).transpose(1, 2)
    values, vectors = torch.linalg.eigh(rows @ rows.transpose(-1, -2))
    return (values.clamp(min=0).sqrt()[..., :, None] * vectors.transpose(-1, -2)).to(_precise(w_o))


def value_changes(
    mixed: Float[Tensor, "batch pos head d_head"],
    counted: Bool[Tensor, "batch pos"],
    factors: Float[Tensor, "kv_head d_head repeat repeat"],
) -> Float[Tensor, "batch unit"]:
    """Return how much the attention output changes when one dimension of one head's values is 0.

    That dimension is mixed by the pattern into z[:, h, i] of every head h of its group, and written by W_O[h, i]: the
    change is || sum_h z[:, h, i] (outer) W_O[h, i] || over the counted tokens.

    Args:
        mixed: What each head mixed.
        counted: True at tokens that count.
        factors: From `value_factors`.
    """
    batch, pos, heads, d_head = mixed.shape
    kept = mixed.detach().to(factors.dtype).masked_fill(~counted[:, :, None, None], 0)
    grouped = kept.reshape(batch, pos, factors.shape[0], heads // factors.shape[0], d_head)
    written = torch.einsum("gdrs,btgsd->btgrd", factors, grouped)
    return torch.linalg.vector_norm(written, dim=(1, 3)).flatten(1)


def softmax_changes(
    scores: Float[Tensor, "batch head pos pos"],
    queries: Float[Tensor, "batch pos head d_head"],
    keys: Float[Tensor, "batch pos kv_head d_head"],
    counted: Bool[Tensor, "batch pos"],
    scale: float,
    soft_cap: float | None = None,
    divided: bool = True,
    block: int | None = None,
) -> Float[Tensor, "batch head d_head"]:
    """Return the sum of squares, over counted queries, of softmax(S - scale * q_i k_i^T) - softmax(S).

    A key-value head is head // repeats, and the dimensions of a head are kept apart. Memory is bounded: [dimensions,
    queries, keys] is never made for more than `block` values at once. Later keys are taken to be masked.

    Args:
        scores: What the softmax reads: scaled, with positions and mask.
        queries: As they enter the product.
        keys: As they enter the product.
        counted: True at queries that count.
        scale: What products are multiplied by.
        soft_cap: Where the scaled products are capped; S is then made anew from the products under it.
        divided: Whether the taken part is scaled as the products are; the released code forgets to.
        block: Most values in a buffer; default: what the device's cache holds.
    """
    batch, heads, pos, _ = scores.shape
    precise = _precise(scores)
    q, k = queries.detach().to(precise), keys.detach().to(precise).repeat_interleave(heads // keys.shape[2], dim=2)
    logits, allowed = scores.detach().to(precise), None
    if soft_cap is not None:
        # TransformerBridge masks with the lowest finite value.
        allowed = (scores > torch.finfo(scores.dtype).min / 2).flatten(0, 1)
        logits = scale * torch.einsum("bqhd,bkhd->bhqk", q, k)
    logits = logits.flatten(0, 1)
    # Without a query nothing is taken away, so rows that do not count add exactly 0.
    q = q.masked_fill(~counted[:, :, None, None], 0).permute(0, 2, 3, 1).flatten(0, 1).contiguous()
    k = k.permute(0, 2, 3, 1).flatten(0, 1).contiguous()
    room = block or _BLOCK.get(scores.device.type, 1 << 20)
    rows = max(1, min(-(-pos // _ROW_BLOCKS), room // pos)) if pos > 2 * _ROW_BLOCKS else pos
    total = torch.zeros(q.shape[:2], dtype=precise, device=q.device)
    taken = scale if divided else 1.0
    made = torch.empty(2, min(max(room, rows * pos), q.numel() * pos), dtype=precise, device=q.device)
    for first in range(0, pos, rows):
        end = min(first + rows, pos)
        seen = None if allowed is None else allowed[:, first:end, :end]
        _add_row_block(total, logits[:, first:end, :end], q[..., first:end], k[..., :end], taken, soft_cap, seen, made)
    return total.reshape(batch, heads, -1)


def _add_row_block(
    total: Float[Tensor, "group dim"],
    logits: Float[Tensor, "group query key"],
    q: Float[Tensor, "group dim query"],
    k: Float[Tensor, "group dim key"],
    taken: float,
    soft_cap: float | None,
    allowed: Bool[Tensor, "group query key"] | None,
    made: Float[Tensor, "two values"],
) -> None:
    """Add a block of queries to every group's and dimension's sum of squares."""
    groups, dims, queries = q.shape
    cells = queries * k.shape[-1]
    at_once = max(1, made.shape[1] // cells)
    group_step, dim_step = max(1, at_once // dims), min(at_once, dims)

    def softmax(values: Tensor, seen: Tensor | None, out: Tensor) -> Tensor:
        if soft_cap is not None and seen is not None:
            values.div_(soft_cap).tanh_().mul_(soft_cap).masked_fill_(~seen, -torch.inf)
        return torch.softmax(values, -1, out=out)

    for i in range(0, groups, group_step):
        here = slice(i, i + group_step)
        seen = None if allowed is None else allowed[here, None]
        before = logits[here, None].clone()
        pattern = softmax(before.clone(), seen, torch.empty_like(before))
        for j in range(0, dims, dim_step):
            some = slice(j, j + dim_step)
            shape = (*q[here, some].shape[:2], *before.shape[2:])
            size = shape[0] * shape[1] * cells
            changed, after = made[0, :size].view(shape), made[1, :size].view(shape)
            torch.addcmul(before, q[here, some, :, None], k[here, some, None, :], value=-taken, out=changed)
            softmax(changed, seen, after).sub_(pattern)
            total[here, some] += torch.linalg.vector_norm(after.flatten(2), dim=2).square()


class ImportanceCollector(RowCollector):
    """Collects importances: one row a text, the importance of every unit on it (PLND).

    Only a text's first piece counts, and only its counted tokens: as rows of the MLP, and as queries of attention.
    All tokens that the model sees are keys.
    """

    name = "importances"

    def __init__(self, adapter: Adapter, variant: str = "exact", attention: bool = True) -> None:
        """Prove the hooks that it needs, and start without a row.

        Args:
            adapter: The model.
            variant: "exact", or "released": what the authors' code computes, by its formulas. There a neuron's
                importance is sum_t |u_k| ("up", or "gate_pre" where the MLP has no gate), and that of a query or key
                dimension is the sum of squared softmax differences after taking q_i k_i^T without its scale, added
                up over the heads of a key's group. Its "value" importances are the attention output under a wrong
                name, so there are none of "v" and "attn_out".
            attention: Whether attention units are recorded too.

        Raises:
            SettingError: Another variant.
            ModelError: The model's attention cannot be read exactly, or its weights are folded or centred.
        """
        if variant not in ("exact", "released"):
            raise SettingError(f"importances={variant!r} is unknown; use 'exact' or 'released'.")
        exact = variant == "exact"
        if exact and adapter.processed:
            raise ModelError(
                "exact importances read W_out and W_O, which are other ones in a model with folded or centred weights; "
                "load it with load_model, which leaves them raw, or record importances='released'."
            )
        neurons = "post" if exact else "up" if adapter.gated else "gate_pre"
        others = ("q", "k", *(("v", "attn_out") if exact else ())) if attention else ()
        sites = (neurons, *others)
        super().__init__(
            adapter,
            {site: adapter.width(site) for site in sites},
            statistic="plnd" if exact else "plnd_released",
        )
        self.variant: str = variant
        self._exact = exact
        self._layers: list[AttentionParts] = []
        self._factors: list[Tensor] = []
        adapter.probe(sites)
        if attention:
            self._layers = [attention_parts(adapter, layer) for layer in range(adapter.n_layers)]
            prove_attention(adapter, self._layers, writes=exact)
        if exact:
            self._norms = [_row_norms(adapter.w_out_rows(layer)) for layer in range(adapter.n_layers)]
            self._factors = [
                value_factors(attention_weights(adapter, layer), adapter.key_value_heads)
                for layer in range(len(self._layers))
            ]
        self._all = False
        self._held: dict[tuple[str, int], Tensor] = {}

    def pairs(self) -> list[HookPair]:
        """Return the hooks of every layer, in the order in which they fire."""
        made: list[HookPair] = []
        neurons = self.sites[0]
        for layer in range(self.adapter.n_layers):
            for name, reduce in self._attention_pairs(layer):
                made.append((name, partial(self._fire, reduce=reduce, layer=layer)))
            hook = self.adapter.hook_name(neurons, layer)
            made.append((hook, partial(self._fire, reduce=self._reduce_neurons, layer=layer)))
        return made

    def _attention_pairs(self, layer: int) -> list[tuple[str, Callable[[int, Tensor], None]]]:
        if not self._layers:
            return []
        parts = self._layers[layer]
        read: list[tuple[str, Callable[[int, Tensor], None]]] = [
            (parts.queries, partial(self._hold, "q")),
            (parts.keys, partial(self._hold, "k")),
            (parts.scores, self._reduce_scores),
        ]
        if self._exact:
            read += [
                (parts.mixed, self._reduce_mixed),
                (self.adapter.hook_name("attn_out", layer), self._reduce_outputs),
            ]
        return read

    def begin(self, batch: Batch) -> None:
        """Take note of which rows are first pieces of texts with tokens that count."""
        super().begin(batch)
        self._all = len(self._kept) == len(batch.tokens)
        self._held.clear()

    def _fire(self, tensor: Tensor, hook: Any, reduce: Callable[[int, Tensor], None], layer: int) -> None:
        if len(self._kept):
            reduce(layer, tensor.detach() if self._all else tensor.detach()[self._kept.to(tensor.device)])

    def _hold(self, part: str, layer: int, values: Tensor) -> None:
        self._held[part, layer] = values

    def _reduce_neurons(self, layer: int, values: Tensor) -> None:
        counted = self._counted.to(values.device)
        found = token_norm(values, counted, order=2 if self._exact else 1)
        if self._exact:
            found = found * self._norms[layer].to(found)
        self.put(self.sites[0], layer, found)

    def _reduce_scores(self, layer: int, scores: Tensor) -> None:
        parts = self._layers[layer]
        squares = softmax_changes(
            scores,
            self._held.pop(("q", layer)),
            self._held.pop(("k", layer)),
            self._counted.to(scores.device),
            parts.scale,
            parts.soft_cap,
            divided=self._exact,
        )
        grouped = squares.unflatten(1, (self.adapter.key_value_heads, -1)).sum(dim=2)
        for site, found in (("q", squares), ("k", grouped)):
            self.put(site, layer, (found.sqrt() if self._exact else found).flatten(1))

    def _reduce_mixed(self, layer: int, mixed: Tensor) -> None:
        factors = self._factors[layer].to(mixed.device)
        self.put("v", layer, value_changes(mixed, self._counted.to(mixed.device), factors))

    def _reduce_outputs(self, layer: int, values: Tensor) -> None:
        self.put("attn_out", layer, token_norm(values, self._counted.to(values.device)))


def _row_norms(weight: Float[Tensor, "d_mlp d_model"]) -> Float[Tensor, " d_mlp"]:
    return torch.linalg.vector_norm(weight.to(_precise(weight)), dim=1)


def prove_attention(adapter: Adapter, layers: list[AttentionParts], writes: bool = True) -> None:
    """Prove on a few tokens that every layer's attention is what its parts say (design rule 5).

    On two rows of tokens: every hook fires once; the softmax of the scores is the pattern; what the scores have beside
    scale * Q K^T (positions) is the same in both rows up to a constant of each query; with `writes`, the pattern mixes
    the values, and W_O of that is the attention output up to its bias.

    Raises:
        ModelError: Something else is computed, or a hook does not fire.
    """
    count = min(8, adapter.n_ctx)
    steps = torch.arange(1, 1 + 2 * count, device=adapter.device)
    tokens = (steps * max(1, adapter.d_vocab // (2 * count + 3)) % adapter.d_vocab).reshape(2, count)
    caught: list[dict[str, list[Tensor]]] = [{} for _ in layers]
    pairs: list[HookPair] = []
    for layer, parts in enumerate(layers):
        names = [parts.queries, parts.keys, parts.scores, parts.pattern]
        if writes:
            names += [parts.mixed, adapter.hook_name("v", layer), adapter.hook_name("attn_out", layer)]
        for name in names:
            pairs.append((name, partial(_catch, values=caught[layer].setdefault(name, []))))
    adapter.run_until_last_site(tokens, torch.ones_like(tokens, dtype=torch.bool), pairs)
    # TransformerBridge takes the softmax in float32 whatever the model's type.
    limit = max(PROBE_TOLERANCE.get(adapter.dtype, 3e-2), 1e-5)
    elsewhere = "" if adapter.backend == "hooked" else ", or load the model with backend='hooked' where that can be"
    for layer, parts in enumerate(layers):
        problem = _objection(adapter, layer, parts, caught[layer], limit)
        if problem is not None:
            raise ModelError(
                f"{adapter.name} ({adapter.architecture}): {problem}, so attention units have no exact importance; "
                f"record those of neurons alone, with attention=False{elsewhere}."
            )


def _catch(tensor: Tensor, hook: Any, values: list[Tensor]) -> None:
    values.append(tensor.detach().clone())


def _objection(
    adapter: Adapter, layer: int, parts: AttentionParts, found: Mapping[str, list[Tensor]], limit: float
) -> str | None:
    """Return what is wrong with a layer's attention, None if nothing is."""
    for name, values in found.items():
        if len(values) != 1:
            return f"hook '{name}' fired {len(values)} times in one pass instead of once"
    one = dict(zip(("q", "k", "scores", "pattern", "mixed", "v", "out"), (v[0] for v in found.values()), strict=False))
    precise = _precise(one["scores"])
    q, k, scores, pattern = (one[part].to(precise) for part in ("q", "k", "scores", "pattern"))
    repeats = adapter.heads // adapter.key_value_heads
    batch, count = scores.shape[0], scores.shape[-1]
    if q.shape != (batch, count, adapter.heads, adapter.d_head) or k.shape[2] * repeats != adapter.heads:
        return f"hooks '{parts.queries}' and '{parts.keys}' have shapes {tuple(q.shape)} and {tuple(k.shape)}"
    if _apart(scores.softmax(-1), pattern) > limit:
        return f"hook '{parts.pattern}' does not hold the softmax of '{parts.scores}'"
    products = parts.scale * torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(repeats, dim=2))
    if parts.soft_cap is not None:
        products = parts.soft_cap * torch.tanh(products / parts.soft_cap)
    allowed = one["scores"] > torch.finfo(one["scores"].dtype).min / 2
    positions = torch.where(allowed, scores - products, 0.0)
    positions = torch.where(allowed, positions - positions.sum(-1, keepdim=True) / allowed.sum(-1, keepdim=True), 0.0)
    # In units of the scores, which the difference of two large numbers is rounded to.
    size = max(float(torch.where(allowed, scores, 0.0).abs().max()), 1e-6)
    # Nothing is added to capped scores in `softmax_changes`, so nothing may be added here.
    apart = positions if parts.soft_cap is not None else positions[0] - positions[1]
    if not float(apart.abs().max()) <= limit * size:
        return f"hook '{parts.scores}' does not hold the scaled products of queries and keys"
    if "v" not in one:
        return None
    v, mixed, out = (one[part].to(precise) for part in ("v", "mixed", "out"))
    made = torch.einsum("bhqk,bkhd->bqhd", pattern, v.repeat_interleave(repeats, dim=2))
    if _apart(made, mixed) > limit:
        return f"hook '{parts.mixed}' does not hold the values as the pattern mixes them"
    bias = out - torch.einsum("bqhd,hdm->bqm", mixed, attention_weights(adapter, layer).to(mixed))
    if not float((bias - bias[:1, :1]).abs().max()) <= limit * max(float(out.abs().max()), 1e-6):
        return f"W_O of '{parts.mixed}' is not the attention output"
    return None


def _apart(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference in units of the largest value; infinite where one is NaN."""
    apart = float((found - expected).abs().max()) / max(float(expected.abs().max()), 1e-6)
    return apart if apart == apart else torch.inf
