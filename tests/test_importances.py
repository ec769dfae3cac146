"""Importances against brute force: each unit ablated by a hook, one at a time, and the layer computed again."""

import dataclasses
import functools
from typing import Any

import pytest
import torch
from models import tiny
from oracle import ROWS, padded, sentence
from torch import Tensor

from lens_neurons.adapter import Adapter
from lens_neurons.batching import Batch, Shard
from lens_neurons.errors import ModelError, SettingError
from lens_neurons.importances import (
    ImportanceCollector,
    prove_attention,
    softmax_changes,
    token_norm,
    value_changes,
    value_factors,
)
from lens_neurons.model import adapt, load_model
from lens_neurons.model_adapters import attention_parts
from lens_neurons.responses import Rows

try:
    from transformer_lens import HookedTransformer
except ImportError:
    HookedTransformer = None

hooked_only = pytest.mark.skipif(HookedTransformer is None, reason="TransformerLens 4 has no HookedTransformer")
SHARD = Shard("en", 0, 2, ())
LAYER = 1


@functools.cache
def adapted(arch: str, backend: str, dtype: str = "float32") -> Adapter:
    return adapt(load_model(tiny(arch).folder, backend=backend, dtype=dtype, device="cpu"))


def batch_of(rows: Any, *, uncounted: Any = (), pieces: Any = None, index: Any = None) -> Batch:
    tokens, mask = padded(rows, "right")
    counted = mask.clone()
    for row, position in uncounted:
        counted[row, position] = False
    index = list(range(len(rows))) if index is None else index
    pieces = [0] * len(rows) if pieces is None else pieces
    return Batch(tokens, mask, counted, torch.tensor(index), torch.tensor(pieces))


def collected(adapter: Adapter, *batches: Batch, variant: Any = "exact", attention: bool = True) -> dict[str, Tensor]:
    """Return [text, layer, unit] by site, and the positions of the texts."""
    collector = ImportanceCollector(adapter, variant, attention)
    with adapter.hooks(collector.pairs()):
        for batch in batches:
            collector.begin(batch)
            adapter.run_until_last_site(batch.tokens, batch.mask)
    parts = collector.take(SHARD)
    found, first = {"positions": parts["positions"]}, 0
    for site, width in collector.widths.items():
        size = adapter.n_layers * width
        found[site] = parts["rows"][:, first : first + size].reshape(-1, adapter.n_layers, width)
        first += size
    assert first == parts["rows"].shape[1]
    return found


def ran(adapter: Adapter, row: Any, read: str, ablate: str = "", at: Any = ()) -> Tensor:
    """Return what a hook holds for one text, with one unit of another hook set to 0."""
    caught: list[Tensor] = []

    def zero(tensor: Tensor, hook: Any) -> Tensor:
        changed = tensor.clone()
        changed[(slice(None), slice(None), *at)] = 0
        return changed

    def keep(tensor: Tensor, hook: Any) -> None:
        caught.append(tensor.detach().clone())

    with adapter.hooks([*([(ablate, zero)] if ablate else []), (read, keep)]), torch.no_grad():
        adapter.model(torch.tensor([row]))
    return caught[0][0]


def places(adapter: Adapter) -> dict[str, tuple[str, str, list[Any]]]:
    """Return, for every site, the hook that is ablated, the one that is read, and every unit's place."""
    block = f"blocks.{LAYER}"
    rotary = f"{block}.attn.hook_rot_q" in adapter.model.hook_dict
    out = {site: adapter.hook_name(site, LAYER) for site in ("mlp_out", "attn_out")}

    def heads(count: int) -> list[Any]:
        return [(head, dim) for head in range(count) for dim in range(adapter.d_head)]

    product, pattern = f"{block}.attn.hook_{'rot_' if rotary else ''}", f"{block}.attn.hook_pattern"
    return {
        "post": (adapter.hook_name("post", LAYER), out["mlp_out"], [(unit,) for unit in range(adapter.d_mlp)]),
        "q": (product + "q", pattern, heads(adapter.heads)),
        "k": (product + "k", pattern, heads(adapter.key_value_heads)),
        "v": (adapter.hook_name("v", LAYER), out["attn_out"], heads(adapter.key_value_heads)),
        "attn_out": (out["attn_out"], out["attn_out"], [(unit,) for unit in range(adapter.d_model)]),
    }


BRUTE = [
    pytest.param("llama", "hooked", marks=hooked_only, id="llama-grouped"),
    pytest.param("qwen2", "hooked", marks=hooked_only, id="qwen2-biases"),
    pytest.param("bloom", "hooked", marks=hooked_only, id="bloom-alibi"),
    pytest.param("neox", "hooked", marks=hooked_only, id="neox-partial-rotary"),
    pytest.param("llama", "bridge", marks=pytest.mark.bridge, id="llama-bridge"),
    pytest.param("bloom", "bridge", marks=pytest.mark.bridge, id="bloom-bridge"),
    pytest.param("gemma2", "bridge", marks=pytest.mark.bridge, id="gemma2-soft-cap-and-window"),
]


@pytest.mark.parametrize(("arch", "backend"), BRUTE)
def test_equals_ablating_one_unit_at_a_time(arch: str, backend: str):
    adapter = adapted(arch, backend, "float64")
    # The first token is BOS's place, and one in the middle is special.
    row, left_out = ROWS[0], [0, 4]
    counted = torch.tensor([position not in left_out for position in range(len(row))])
    # Padding, and another text beside it.
    found = collected(adapter, batch_of([ROWS[2], row], uncounted=[(1, position) for position in left_out]))
    for site, (ablate, read, units) in places(adapter).items():
        whole = ran(adapter, row, read)
        heads_first = read.endswith("pattern")
        wanted = []
        for at in units:
            change = ran(adapter, row, read, ablate, at) - whole
            wanted.append((change[:, counted] if heads_first else change[counted]).norm())
        expected = torch.stack(wanted).float()
        assert found[site].shape == (2, adapter.n_layers, len(units))
        assert expected.min() > 0
        # Hugging Face's softmax is float32 in every model.
        limit = 2e-6 if backend == "hooked" else 1e-4
        torch.testing.assert_close(found[site][1, LAYER], expected, rtol=limit, atol=limit * float(expected.mean()))


@pytest.mark.parametrize(("arch", "backend"), [*BRUTE[:3], BRUTE[4], BRUTE[6]])
def test_the_released_variant_is_the_codes(arch: str, backend: str):
    """A slow transcription: one text, one head, one dimension, plain softmax."""
    adapter = adapted(arch, backend, "float64")
    row = ROWS[0]
    found = collected(adapter, batch_of([row]), variant="released")
    parts = attention_parts(adapter, LAYER)
    neurons = "up" if adapter.gated else "gate_pre"
    assert list(found) == ["positions", neurons, "q", "k"]
    values = ran(adapter, row, adapter.hook_name(neurons, LAYER))
    torch.testing.assert_close(found[neurons][0, LAYER], values.abs().sum(dim=0).float())
    q, k, scores = (ran(adapter, row, name) for name in (parts.queries, parts.keys, parts.scores))
    lower = torch.ones(len(row), len(row), dtype=torch.bool).tril()
    lower &= scores[0] > -1e30
    repeats = adapter.heads // adapter.key_value_heads
    of_query = torch.zeros(adapter.heads, adapter.d_head)
    for head in range(adapter.heads):
        for i in range(adapter.d_head):
            delta = torch.outer(q[:, head, i], k[:, head // repeats, i])
            if arch == "gemma2":
                products = q[:, head] @ k[:, head // repeats].T / 16**0.5
                before, after = (5 * torch.tanh(values / 5) for values in (products, products - delta))
            else:
                before, after = scores[head], scores[head] - delta
            patterns = [values.masked_fill(~lower, -torch.inf).softmax(-1) for values in (before, after)]
            of_query[head, i] = (patterns[1] - patterns[0]).square().sum()
    torch.testing.assert_close(found["q"][0, LAYER], of_query.flatten(), rtol=1e-5, atol=1e-6)
    of_key = of_query.reshape(-1, repeats, adapter.d_head).sum(dim=1).flatten()
    torch.testing.assert_close(found["k"][0, LAYER], of_key, rtol=1e-5, atol=1e-6)
    if repeats == 1:
        assert torch.equal(found["q"], found["k"])


@pytest.mark.parametrize(
    ("arch", "backend"),
    [
        *(pytest.param(arch, "hooked", marks=hooked_only) for arch in ("llama", "bloom", "gpt2", "neox", "mistral")),
        *(pytest.param(arch, "bridge", marks=pytest.mark.bridge) for arch in ("qwen2", "gemma2", "bloom", "gpt2")),
    ],
)
def test_a_padded_batch_equals_texts_alone(arch: str, backend: str):
    adapter = adapted(arch, backend)
    together = collected(adapter, batch_of(ROWS))
    for i, row in enumerate(ROWS):
        alone = collected(adapter, batch_of([row]))
        for site in together:
            if site != "positions":
                torch.testing.assert_close(together[site][i], alone[site][0], rtol=1e-4, atol=1e-5)


@hooked_only
@pytest.mark.bridge
@pytest.mark.parametrize("variant", ["exact", "released"])
@pytest.mark.parametrize("arch", ["llama", "qwen2", "mistral", "bloom", "gpt2"])
def test_both_classes_agree(arch: str, variant: str):
    hooked = collected(adapted(arch, "hooked"), batch_of(ROWS), variant=variant)
    bridge = collected(adapted(arch, "bridge"), batch_of(ROWS), variant=variant)
    assert list(hooked) == list(bridge)
    for site, values in hooked.items():
        torch.testing.assert_close(values, bridge[site], rtol=2e-4, atol=2e-5)


def random_attention(seed: int = 0, pos: int = 45, heads: int = 6, kv_heads: int = 2, size: float = 1.0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    q = size * torch.randn(2, pos, heads, 8, generator=generator)
    k = size * torch.randn(2, pos, kv_heads, 8, generator=generator)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(heads // kv_heads, 2)) * 8**-0.5
    causal = torch.ones(pos, pos, dtype=torch.bool).tril()
    counted = torch.rand(2, pos, generator=generator) < 0.7
    return scores.masked_fill(~causal, -torch.inf), q, k, counted


@pytest.mark.parametrize("cap", [None, 2.0])
def test_the_size_of_blocks_does_not_matter(cap: float | None):
    scores, q, k, counted = random_attention()
    wanted = softmax_changes(scores, q, k, counted, 8**-0.5, cap)
    for block in (1, 45, 100, 5000, 1 << 22):
        found = softmax_changes(scores, q, k, counted, 8**-0.5, cap, block=block)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-9)
    # The lowest finite value masks as minus infinity does.
    finite = scores.clamp(min=torch.finfo(scores.dtype).min)
    torch.testing.assert_close(softmax_changes(finite, q, k, counted, 8**-0.5, cap), wanted)


def test_memory_stays_bounded(monkeypatch: pytest.MonkeyPatch):
    scores, q, k, counted = random_attention(pos=90)
    sizes: list[int] = []
    softmax = torch.softmax

    def measured(values: Tensor, *args: Any, **settings: Any) -> Tensor:
        sizes.append(values.numel())
        return softmax(values, *args, **settings)

    monkeypatch.setattr(torch, "softmax", measured)
    softmax_changes(scores, q, k, counted, 8**-0.5, block=20_000)
    assert max(sizes) <= 20_000 < scores.numel()


def test_scores_that_move_far_do_not_overflow():
    # One dimension alone makes a score of 600, more than float32's exponential holds.
    scores, q, k, counted = random_attention(size=30.0)
    found = softmax_changes(scores, q, k, counted, 8**-0.5)
    exact = softmax_changes(scores.double(), q.double(), k.double(), counted, 8**-0.5)
    assert torch.isfinite(found).all()
    assert found.max() > 1
    torch.testing.assert_close(found.double(), exact, rtol=1e-2, atol=1e-3)


def test_half_precision_is_added_up_in_single():
    values = torch.full((1, 4000, 3), 100.0, dtype=torch.float16)
    counted = torch.ones(1, 4000, dtype=torch.bool)
    assert token_norm(values, counted).tolist() == [pytest.approx([100 * 4000**0.5] * 3)]
    assert token_norm(values, counted, order=1).tolist() == [[400_000.0] * 3]


def test_heads_of_a_group_may_cancel():
    # Two heads that write opposite directions and mix the same: without that value nothing changes.
    w_o = torch.zeros(2, 1, 3)
    w_o[0, 0, 1], w_o[1, 0, 1] = 2.0, -2.0
    counted = torch.ones(1, 4, dtype=torch.bool)
    mixed = torch.tensor([1.0, -1, 3, 2])[None, :, None, None].expand(1, 4, 2, 1)
    assert value_changes(mixed, counted, value_factors(w_o, 1)).abs().max() < 1e-6
    apart = value_changes(mixed, counted, value_factors(w_o, 2))
    assert apart[0].tolist() == pytest.approx([2 * 15**0.5] * 2)


@hooked_only
def test_only_first_pieces_with_counted_tokens_make_rows():
    adapter = adapted("llama", "hooked")
    first = batch_of(ROWS, pieces=[0, 1, 0], index=[7, 7, 3], uncounted=[(2, i) for i in range(len(ROWS[2]))])
    second = batch_of([ROWS[1]], pieces=[1], index=[9])
    third = batch_of([ROWS[2], ROWS[1]], index=[4, 5])
    found = collected(adapter, first, second, third)
    assert found["positions"].tolist() == [4, 5, 7]
    alone = collected(adapter, batch_of([ROWS[0]]))
    torch.testing.assert_close(found["post"][2], alone["post"][0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["k"][2], alone["k"][0], rtol=1e-4, atol=1e-5)


@hooked_only
def test_neurons_alone():
    adapter = adapted("llama", "hooked")
    whole = collected(adapter, batch_of(ROWS))
    found = collected(adapter, batch_of(ROWS), attention=False)
    assert list(found) == ["positions", "post"]
    assert torch.equal(found["post"], whole["post"])


@hooked_only
def test_results_are_text_responses():
    adapter = adapted("bloom", "hooked")
    collector = ImportanceCollector(adapter)
    parts = {}
    for code, shift in (("en", 0), ("sw", 20)):
        with adapter.hooks(collector.pairs()):
            batch = batch_of([[token + shift for token in row] for row in ROWS[:2]])
            collector.begin(batch)
            adapter.run_until_last_site(batch.tokens, batch.mask)
        parts[code] = collector.take(SHARD)
    assert collector.name == "importances"
    assert collector.statistic == "plnd"
    assert ImportanceCollector(adapter, "released").statistic == "plnd_released"
    assert list(collector.widths) == ["post", "q", "k", "v", "attn_out"]
    assert collector.unit_bytes() == parts["en"]["rows"][0].numel() * 4
    assert parts["en"]["rows"].dtype == torch.float32
    # A row is empty again after `take`.
    assert len(collector.take(SHARD)["positions"]) == 0
    rows = {code: (Rows(part["positions"], part["rows"]),) for code, part in parts.items()}
    made = collector.gather(rows, adapter.provenance(site="gate_act"))
    assert made.statistic == "plnd"
    assert made.counts() == {"en": 2, "sw": 2}
    assert made.sites == {site: (3, adapter.width(site)) for site in ("post", "q", "k", "v", "attn_out")}
    first, last = made.span("v")
    alone = collected(adapter, batch_of(ROWS[:2]))
    torch.testing.assert_close(made.rows("en", first, last).reshape(2, 3, -1), alone["v"])


@pytest.mark.bridge
@pytest.mark.parametrize(
    ("arch", "reason"), [("neox", "hook_rot_q' fired 0 times"), ("xglm", "does not hold the softmax")]
)
def test_attention_that_cannot_be_read_is_refused(arch: str, reason: str):
    adapter = adapted(arch, "bridge")
    for variant in ("exact", "released"):
        with pytest.raises(ModelError, match=reason) as caught:
            ImportanceCollector(adapter, variant)
        sentence(caught.value)
        assert "attention=False" in str(caught.value)
    assert list(collected(adapter, batch_of(ROWS), attention=False)) == ["positions", "post"]


@hooked_only
def test_normalised_outputs_are_refused():
    with pytest.raises(ModelError, match="attn_out") as caught:
        ImportanceCollector(adapted("gemma2", "hooked"))
    sentence(caught.value)
    released = collected(adapted("gemma2", "hooked"), batch_of(ROWS), variant="released")
    assert list(released) == ["positions", "up", "q", "k"]


@hooked_only
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"scale": 0.2}, "scaled products"),
        ({"soft_cap": 3.0}, "scaled products"),
        ({"queries": "blocks.1.attn.hook_q"}, "scaled products"),
        ({"pattern": "blocks.0.attn.hook_pattern"}, "softmax"),
        ({"mixed": "blocks.1.attn.hook_q"}, "mixes them"),
    ],
)
def test_the_proof_finds_what_is_wrong(change: dict[str, Any], reason: str):
    adapter = adapted("llama", "hooked")
    layers = [attention_parts(adapter, layer) for layer in range(adapter.n_layers)]
    prove_attention(adapter, layers)
    layers[1] = dataclasses.replace(layers[1], **change)
    with pytest.raises(ModelError, match=reason) as caught:
        prove_attention(adapter, layers)
    sentence(caught.value)


@hooked_only
def test_bad_settings_and_processed_weights_are_sentences():
    with pytest.raises(SettingError, match="'exact' or 'released'") as caught:
        ImportanceCollector(adapted("llama", "hooked"), "paper")
    sentence(caught.value)
    model = load_model(tiny("llama").folder, backend="hooked", device="cpu")
    processed = adapt(model)
    processed.processed = True
    with pytest.raises(ModelError, match="folded or centred") as caught:
        ImportanceCollector(processed)
    sentence(caught.value)
    ImportanceCollector(processed, "released")
