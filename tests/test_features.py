import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import SAMPLE_TEXTS, tiny
from saes import make_sae

from lens_neurons.batching import TokenPolicy, iter_shards, make_batches
from lens_neurons.errors import DataError, ModelError, ProvenanceError, SettingError, StorageError
from lens_neurons.features import FeatureCollector, FeatureStats
from lens_neurons.model import adapt, load_model
from lens_neurons.sae import place_sae
from lens_neurons.storage import Provenance
from lens_neurons.topk_sae import TopKSAE

TEXTS = {
    "en": [*SAMPLE_TEXTS[:5], "", "x"],
    "fr": [text[::-1] for text in SAMPLE_TEXTS[:6]],
    "C/C++": ["int main() { return 0; }", " ".join(SAMPLE_TEXTS[:3])],
}
GOLDEN = Path(__file__).parent / "data" / "features_v1.safetensors"
TABLES = ("tokens", "texts", "active_tokens", "active_texts", "sum", "largest", "smallest")


def model_of(backend: str = "hooked", dtype: torch.dtype = torch.float64) -> Any:
    return load_model(tiny("llama").folder, backend=backend, dtype=dtype)


def sae_of(layer: int, seed: int = 0, dtype: torch.dtype = torch.float64, **changes) -> TopKSAE:
    return make_sae(seed=seed, d_in=32, latents=40, k=6, layer=layer, **changes).to("cpu", dtype)


def collected(
    model: Any,
    saes: Any,
    texts: dict[str, list[str]] = TEXTS,
    *,
    policy: TokenPolicy | None = None,
    batch_tokens: int = 70,
    shard_tokens: int = 90,
) -> FeatureStats:
    """Return what a recording of these texts collects: several shards a language, several batches a shard."""
    policy = policy or TokenPolicy(bos="always")
    adapter = adapt(model)
    collector = FeatureCollector(adapter, saes)
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for code, own in texts.items():
        for shard in iter_shards(adapter.tokens, own, policy, language=code, shard_tokens=shard_tokens):
            batches = make_batches(
                shard.pieces, adapter.tokens.pad_id, batch_tokens, count_special=policy.count_special
            )
            for batch in batches:
                collector.begin(batch)
                adapter.run_until_last_site(batch.tokens, batch.mask, collector.pairs())
            part = collector.take(shard)
            parts[code] = collector.add(parts[code], part) if code in parts else part
    return collector.gather(parts, adapter.provenance("gate_act", policy.to_dict()))


def by_hand(model: Any, saes: dict[int, TopKSAE], texts: list[str], *, special: bool = False, limit: int = 10**6):
    """Return what one language's tables hold: one text at a time through run_with_cache, one value at a time."""
    adapter = adapt(model)
    found = [[{"active_tokens": 0, "active_texts": 0, "sum": 0.0, "values": []} for _ in range(40)] for _ in saes]
    tokens = seen = 0
    for text in texts:
        ids = adapter.tokens.tokenizer(text, add_special_tokens=False)["input_ids"]
        if not ids:
            continue
        pieces = [ids[at : at + limit - 1] for at in range(0, len(ids), limit - 1)]
        seen += 1
        ever = [set() for _ in saes]
        for piece in pieces:
            _, cache = model.run_with_cache(torch.tensor([[adapter.tokens.bos_id, *piece]]))
            tokens += len(piece) + special
            for place, (layer, sae) in enumerate(saes.items()):
                for position in range(0 if special else 1, len(piece) + 1):
                    latents = sae.encode(cache[f"blocks.{layer}.hook_mlp_out"][0, position])
                    for j, value in enumerate(latents.tolist()):
                        if value > 0:
                            entry = found[place][j]
                            entry["active_tokens"] += 1
                            entry["sum"] += value
                            entry["values"].append(value)
                            ever[place].add(j)
        for place, latents in enumerate(ever):
            for j in latents:
                found[place][j]["active_texts"] += 1
    return tokens, seen, found


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
@pytest.mark.parametrize("special", [False, True])
def test_equals_a_loop_over_texts(backend, special):
    model, saes = model_of(backend), {0: sae_of(0), 2: sae_of(2, seed=1)}
    policy = TokenPolicy(bos="always", count_special=special)
    stats = collected(model, saes.values(), policy=policy)
    assert stats.languages == ("en", "fr", "C/C++")
    assert stats.layers == (0, 2)
    assert stats.sites == {"sae:mlp_out": (3, 40)}
    for k, texts in enumerate(TEXTS.values()):
        tokens, seen, found = by_hand(model, saes, texts, special=special)
        assert (int(stats.tokens[k]), int(stats.texts[k])) == (tokens, seen)
        for place, row in enumerate(found):
            for j, entry in enumerate(row):
                assert int(stats.active_tokens[k, place, j]) == entry["active_tokens"]
                assert int(stats.active_texts[k, place, j]) == entry["active_texts"]
                assert float(stats.sum[k, place, j]) == pytest.approx(entry["sum"], rel=1e-9)
                assert float(stats.largest[k, place, j]) == pytest.approx(max(entry["values"], default=0), rel=1e-6)
                assert float(stats.smallest[k, place, j]) == pytest.approx(min(entry["values"], default=0), rel=1e-6)


def test_the_order_of_batches_and_shards_changes_no_count(monkeypatch):
    model, sae = model_of(), sae_of(1)
    usual = collected(model, sae)
    monkeypatch.setattr("lens_neurons.features.VALUES_AT_ONCE", 120)  # three tokens at once
    for sizes in ({"batch_tokens": 1}, {"batch_tokens": 4096, "shard_tokens": 10**6}, {"shard_tokens": 1}):
        found = collected(model, sae, **sizes)
        for name in TABLES:
            mine, theirs = getattr(usual, name), getattr(found, name)
            assert torch.equal(mine, theirs) if mine.dtype == torch.int64 else torch.allclose(mine, theirs), name


def test_a_text_in_several_pieces_counts_once():
    model, sae = model_of(), sae_of(1)
    policy = TokenPolicy(bos="always", max_tokens=7, overflow="split")
    for shard_tokens in (1, 10**6):
        stats = collected(model, sae, policy=policy, shard_tokens=shard_tokens, batch_tokens=20)
        for k, texts in enumerate(TEXTS.values()):
            tokens, seen, (row,) = by_hand(model, {1: sae}, texts, limit=7)
            assert (int(stats.tokens[k]), int(stats.texts[k])) == (tokens, seen)
            assert stats.active_texts[k, 0].tolist() == [entry["active_texts"] for entry in row]
            assert stats.active_tokens[k, 0].tolist() == [entry["active_tokens"] for entry in row]


def test_any_object_with_encode_is_collected_alike():
    model, sae = model_of(dtype=torch.float32), sae_of(1, dtype=torch.float32)
    like = SimpleNamespace(encode=lambda values: sae.encode(values).to_sparse(), d_in=32)
    one, other = collected(model, sae), collected(model, place_sae(like, layer=1))
    for name in TABLES:
        assert torch.equal(getattr(one, name), getattr(other, name)), name


def test_statistics_are_those_of_their_definitions():
    stats = collected(model_of(), [sae_of(0), sae_of(2, seed=1)])
    k, place, j = (int(part[0]) for part in (stats.active_tokens > 2).nonzero(as_tuple=True))
    count = int(stats.active_tokens[k, place, j])
    assert float(stats.probability()[k, place, j]) == count / int(stats.tokens[k])
    assert float(stats.mean_active()[k, place, j]) == pytest.approx(float(stats.sum[k, place, j]) / count)
    low, high = stats.extremes()
    values = [
        (float(stats.smallest[i, place, j]), float(stats.largest[i, place, j]))
        for i in range(3)
        if stats.active_tokens[i, place, j]
    ]
    assert (float(low[place, j]), float(high[place, j])) == (min(v[0] for v in values), max(v[1] for v in values))
    never = (stats.active_tokens == 0).all(dim=0)
    assert not low[never].any()
    assert not high[never].any()
    assert stats.flat()[1, 3] == 2 * 40 + 3
    frame = stats.to_frame().set_index("language")
    assert frame.loc["en", "active_latents"] == pytest.approx(
        float(stats.active_tokens[0].sum()) / 2 / int(stats.tokens[0])
    )
    assert frame.loc["en", "dead_latents"] == int((stats.active_tokens[0] == 0).sum())


def test_merge_and_select_are_the_whole(tmp_path):
    model, sae = model_of(), sae_of(1)
    whole = collected(model, sae)
    parts = [collected(model, sae, {code: texts}) for code, texts in TEXTS.items()]
    merged = parts[0].merge(*parts[1:])
    for found in (merged, whole.select(["fr", "C/C++", "en"]).select(["en", "fr", "C/C++"])):
        assert found.languages == whole.languages
        for name in TABLES:
            assert torch.equal(getattr(found, name), getattr(whole, name)), name
    with pytest.raises(DataError, match="en is in more than one recording"):
        whole.merge(parts[0])
    with pytest.raises(ProvenanceError, match="the SAEs are"):
        parts[0].merge(collected(model, sae_of(1, seed=9), {"fr": TEXTS["fr"]}))
    with pytest.raises(ProvenanceError, match="policy"):
        parts[0].merge(collected(model, sae, {"fr": TEXTS["fr"]}, policy=TokenPolicy(bos="never")))
    with pytest.raises(DataError, match="'ta' was not recorded"):
        whole.select(["ta"])


def test_saved_and_loaded_is_the_same(tmp_path):
    stats = collected(model_of(), [sae_of(0), sae_of(2, seed=1)])
    stats.save(tmp_path / "features.safetensors")
    found = FeatureStats.load(tmp_path / "features.safetensors")
    for entry in dataclasses.fields(stats):
        mine, theirs = getattr(stats, entry.name), getattr(found, entry.name)
        assert torch.equal(mine, theirs) if isinstance(mine, torch.Tensor) else mine == theirs, entry.name
    assert [sae["layer"] for sae in found.provenance.extra["saes"]] == [0, 2]
    assert (found.provenance.site, found.provenance.d_mlp, found.provenance.n_layers) == ("sae:mlp_out", 40, 3)
    assert repr(found).startswith("FeatureStats(sae:mlp_out, 40 latents in layer 0, 2; tokens en:")
    data = (tmp_path / "features.safetensors").read_bytes()
    (tmp_path / "short").write_bytes(data[:-4])
    with pytest.raises(StorageError, match="damaged"):
        FeatureStats.load(tmp_path / "short")


def make_golden() -> FeatureStats:
    """Return what the golden file of schema 1 holds."""
    active = torch.arange(10).view(2, 1, 5) % 9
    values = (active / 16).float()
    return FeatureStats(
        languages=("en", "sw"),
        site="sae:mlp_out",
        n_layers=3,
        layers=(1,),
        tokens=torch.tensor([9, 12]),
        texts=torch.tensor([4, 5]),
        active_tokens=active,
        active_texts=active.clamp(max=4),
        sum=active.double() / 2,
        largest=1 + values,
        smallest=values,
        provenance=Provenance(
            model="golden", n_layers=3, d_mlp=5, site="sae:mlp_out", extra={"saes": [{"layer": 1, "name": "golden"}]}
        ),
        notes={"about": "golden"},
    )


def test_the_golden_file_of_schema_1_loads():
    found, wanted = FeatureStats.load(GOLDEN), make_golden()
    for entry in dataclasses.fields(wanted):
        mine, theirs = getattr(found, entry.name), getattr(wanted, entry.name)
        assert torch.equal(mine, theirs) if isinstance(mine, torch.Tensor) else mine == theirs, entry.name


def test_values_that_are_not_finite_are_refused():
    sae = place_sae(SimpleNamespace(encode=_overflow, d_in=32), layer=1)
    with pytest.raises(ModelError, match=r"gives NaN or infinite values on what 'blocks\.1\.hook_mlp_out' holds"):
        collected(model_of(dtype=torch.float32), sae)


def _overflow(values: torch.Tensor) -> torch.Tensor:
    return torch.exp(values.abs() * 1e4) - 1


def test_an_sae_of_another_width_is_refused_before_any_work():
    with pytest.raises(ModelError, match="reads 6 values"):
        FeatureCollector(adapt(model_of()), make_sae())
    with pytest.raises(SettingError, match="read the same layer"):
        FeatureCollector(adapt(model_of()), [sae_of(1), sae_of(1, seed=2)])


def counts(**changes) -> dict[str, Any]:
    table = {"en": torch.tensor([[3, 0], [10, 1]]), "fr": torch.tensor([[0, 0], [2, 4]])}
    return {
        "tokens": {"en": 10, "fr": 20},
        "texts": {"en": 4, "fr": 5},
        "active_tokens": table,
        "active_texts": {code: part.clamp(max=4) for code, part in table.items()},
        **changes,
    }


def test_counts_of_others_are_taken():
    stats = FeatureStats.from_counts(**counts(layers=[3, 5], n_layers=8))
    assert stats.sites == {"sae:mlp_out": (8, 2)}
    assert stats.flat().tolist() == [[6, 7], [10, 11]]
    assert stats.probability()[:, 1, 0].tolist() == [1.0, 0.1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": {"en": 0, "fr": 20}}, "'en' has no token that counts"),
        ({"texts": {"en": 4, "fr": 0}}, "'fr' has no token that counts"),
        ({"tokens": {"en": 9, "fr": 20}}, "more than all tokens"),
        ({"texts": {"en": 3, "fr": 5}}, "more than all texts"),
        ({"tokens": {"en": 10}}, "give all four for the same"),
        ({"active_tokens": {"en": torch.zeros(2, 2).long(), "fr": torch.zeros(2, 3).long()}}, "all have one shape"),
        ({"active_tokens": dict.fromkeys(("en", "fr"), torch.full((2, 2), -1))}, "fewer than 0"),
        ({"layers": [1, 1]}, "must ascend"),
        ({"layers": [0, 3], "n_layers": 3}, "must ascend and be below 3"),
        ({"layers": [0]}, r"need tables \[2, 1, latent\]"),
    ],
)
def test_impossible_counts_are_sentences(changes, message):
    with pytest.raises(DataError, match=message):
        FeatureStats.from_counts(**counts(**changes))


def test_nan_and_repeated_languages_are_refused():
    stats = FeatureStats.from_counts(**counts())
    broken = stats.sum.clone()
    broken[0, 0, 0] = math.nan
    with pytest.raises(DataError, match="'sum' holds NaN"):
        dataclasses.replace(stats, sum=broken)
    with pytest.raises(DataError, match="each once"):
        dataclasses.replace(stats, languages=("en", "en"))
