import dataclasses
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import safetensors.torch
import torch
from models import SAMPLE_TEXTS, save_folder, tiny
from saes import make_sae

from lens_neurons.batching import TokenPolicy, encode, make_batches
from lens_neurons.corpus import PACKAGED, Corpus
from lens_neurons.errors import ModelError, SettingError
from lens_neurons.model import adapt, load_model
from lens_neurons.sae import PlacedSAE, load_sae, place_sae, place_saes, read_values
from lens_neurons.topk_sae import TopKSAE
from lens_neurons.training.sae import evaluate_sae


def slow_encode(sae: TopKSAE, x: list[float]) -> list[float]:
    """z = topk(relu(W_enc (x - b_dec) + b_enc)), one number at a time."""
    before = []
    for j in range(sae.n_latents):
        value = float(sae.b_enc[j])
        for i in range(sae.d_in):
            value += float(sae.w_enc[j, i]) * (x[i] - float(sae.b_dec[i]))
        before.append(max(value, 0.0))
    kept = sorted(range(sae.n_latents), key=lambda j: -before[j])[: sae.k]
    return [before[j] if j in kept else 0.0 for j in range(sae.n_latents)]


@pytest.mark.parametrize("k", [1, 3, 10])
def test_encode_and_decode_are_the_formula(k):
    sae = make_sae(k=k)
    inputs = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    found = sae.encode(inputs)
    for x, latents in zip(inputs.tolist(), found.tolist(), strict=True):
        wanted = slow_encode(sae, x)
        assert latents == pytest.approx(wanted, abs=1e-5)
        written = [
            float(sae.b_dec[i]) + math.fsum(z * float(sae.w_dec[j, i]) for j, z in enumerate(wanted)) for i in range(6)
        ]
        assert sae.decode(torch.tensor(latents)).tolist() == pytest.approx(written, abs=1e-4)
    assert ((found > 0).sum(dim=1) <= k).all()
    assert torch.equal(sae.encode(inputs.view(2, 4, 6)), found.view(2, 4, 10))


def test_at_most_k_latents_are_active_and_none_below_zero():
    sae = make_sae(k=5)
    sae.b_enc.fill_(-100.0)
    assert not sae.encode(torch.randn(4, 6)).any()


@pytest.mark.parametrize("target", ["folder", "one.safetensors"])
def test_saved_and_loaded_is_the_same(tmp_path, target):
    sae = make_sae(layer=4, site="resid_post", notes={"text": "sätze", "settings": {"k": 3}})
    sae.save(tmp_path / target)
    found = TopKSAE.load(tmp_path / target)
    for name in ("w_enc", "b_enc", "w_dec", "b_dec"):
        assert torch.equal(getattr(found, name), getattr(sae, name)), name
    assert (found.k, found.layer, found.site, found.notes) == (3, 4, "resid_post", sae.notes)
    sae.save(tmp_path / "half", torch.float16)
    half = TopKSAE.load(tmp_path / "half")
    assert half.w_enc.dtype == torch.float32
    assert torch.equal(half.w_enc, sae.w_enc.half().float())
    assert load_sae(tmp_path / target, layer=0, site="mlp_out").layer == 0


def write_sparsify(folder: Path, sae: TopKSAE, **changes) -> Path:
    """Write the files as EleutherAI's sparsify does: no header, and a configuration with other fields."""
    folder.mkdir(parents=True)
    names = {"encoder.weight": sae.w_enc, "encoder.bias": sae.b_enc, "W_dec": sae.w_dec, "b_dec": sae.b_dec}
    safetensors.torch.save_file({name: value.clone() for name, value in names.items()}, folder / "sae.safetensors")
    config = {"expansion_factor": 32, "normalize_decoder": True, "num_latents": 0, "k": sae.k, "signed": False}
    (folder / "cfg.json").write_text(json.dumps({**config, "multi_topk": False, "d_in": sae.d_in, **changes}))
    return folder


@pytest.mark.parametrize(
    ("name", "site", "layer"),
    [("layers.8.mlp", "mlp_out", 8), ("layers.3", "resid_post", 3), ("h.2.mlp", "mlp_out", 2)],
)
def test_a_folder_of_sparsify_says_its_layer_by_its_name(tmp_path, name, site, layer):
    sae = make_sae()
    found = load_sae(write_sparsify(tmp_path / name, sae))
    assert (found.site, found.layer, found.n_latents) == (site, layer, 10)
    x = torch.randn(5, 6)
    assert torch.equal(found.encode(x), sae.encode(x))


def test_a_folder_of_another_name_needs_a_layer(tmp_path):
    folder = write_sparsify(tmp_path / "mine", make_sae())
    with pytest.raises(SettingError, match="does not say where it reads; give place_sae"):
        load_sae(folder)
    assert load_sae(folder, layer=2).layer == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation": "groupmax"}, "not a plain top-k SAE \\(groupmax\\)"),
        ({"signed": True}, "topk, signed"),
        ({"transcode": True}, "transcode"),
        ({"k": None}, "k=None"),
        ({"k": 11}, "10 latents cannot keep k=11"),
        ({"k": 0}, "cannot keep k=0"),
        ({"num_latents": 20}, "num_latents 10, but its configuration says 20"),
        ({"d_in": 7}, "d_in 6, but its configuration says 7"),
    ],
)
def test_other_kinds_are_refused(tmp_path, changes, message):
    folder = write_sparsify(tmp_path / "layers.0.mlp", make_sae(), **changes)
    with pytest.raises(ModelError, match=message):
        load_sae(folder)


def test_bad_files_are_sentences(tmp_path):
    with pytest.raises(ModelError, match="does not exist"):
        load_sae(tmp_path / "nowhere")
    make_sae().save(tmp_path / "a.safetensors")
    good = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "short.safetensors").write_bytes(good[:-7])
    (tmp_path / "text.safetensors").write_text("this is no SAE")
    (tmp_path / "empty.safetensors").write_bytes(b"")
    changed = bytearray(good)
    changed[-2] ^= 1
    (tmp_path / "changed.safetensors").write_bytes(changed)
    for name in ("short", "text", "empty", "changed"):
        with pytest.raises(ModelError, match=f"{name}.safetensors cannot be read as an SAE"):
            load_sae(tmp_path / f"{name}.safetensors", layer=0)
    folder = write_sparsify(tmp_path / "layers.0.mlp", make_sae())
    (folder / "cfg.json").write_text("[]")
    with pytest.raises(ModelError, match="not the configuration of an SAE"):
        load_sae(folder)
    (folder / "cfg.json").unlink()
    with pytest.raises(ModelError, match=r"needs a cfg.json beside its weights"):
        load_sae(folder)
    safetensors.torch.save_file({"W": torch.zeros(2, 2)}, folder / "sae.safetensors")
    (folder / "cfg.json").write_text('{"k": 1}')
    with pytest.raises(ModelError, match=r"holds \['W'\], but an SAE has"):
        load_sae(folder)
    short = make_sae()
    names = {"encoder.weight": short.w_enc, "encoder.bias": short.b_enc, "W_dec": short.w_dec[:3], "b_dec": short.b_dec}
    safetensors.torch.save_file({name: value.clone() for name, value in names.items()}, folder / "sae.safetensors")
    with pytest.raises(ModelError, match="do not go together"):
        load_sae(folder)
    broken = make_sae()
    broken.w_enc[2, 2] = math.nan
    broken.save(tmp_path / "nan")
    with pytest.raises(ModelError, match="w_enc holds NaN"):
        load_sae(tmp_path / "nan")


class SAELensLike:
    """The part of an object of SAELens that is used: `cfg`, `W_dec`, `get_name`, `encode`, `decode`."""

    def __init__(self, sae: TopKSAE, hook: str = "blocks.2.hook_mlp_out", *, old: bool = False, **cfg):
        kwargs = cfg.pop("kwargs", None)
        place = {"hook_name": hook} if old else {"metadata": SimpleNamespace(hook_name=hook)}
        self.cfg = SimpleNamespace(d_in=sae.d_in, d_sae=sae.n_latents, **place, **cfg)
        if kwargs is not None:
            self.cfg.metadata.model_from_pretrained_kwargs = kwargs
        self.W_dec = torch.nn.Parameter(sae.w_dec)
        self._sae = sae

    def get_name(self) -> str:
        return "sae_like"

    def encode(self, x):
        return self._sae.encode(x)

    def decode(self, latents):
        return self._sae.decode(latents)


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize(
    ("hook", "site"),
    [
        ("blocks.2.hook_mlp_out", "mlp_out"),
        ("blocks.2.hook_resid_pre", "resid_pre"),
        ("blocks.2.hook_resid_post", "resid_post"),
        ("blocks.2.mlp.hook_post", "post"),
    ],
)
def test_an_object_of_saelens_says_its_place(hook, site, old):
    inner = make_sae()
    found = place_sae(SAELensLike(inner, hook, old=old))
    assert (found.layer, found.site, found.d_in, found.n_latents) == (2, site, 6, 10)
    assert found.name == "sae_like"
    other = place_sae(SAELensLike(make_sae(seed=1), hook, old=old))
    assert "" != found.fingerprint == place_sae(SAELensLike(inner, hook, old=old)).fingerprint != other.fingerprint
    x = torch.randn(4, 6)
    assert torch.equal(found.encode(x), inner.encode(x))
    assert not found.encode(x).requires_grad


def test_objects_of_saelens_that_cannot_be_read_are_refused():
    with pytest.raises(ModelError, match=r"reads 'blocks\.2\.attn\.hook_z', which is none of"):
        place_sae(SAELensLike(make_sae(), "blocks.2.attn.hook_z"))
    with pytest.raises(ModelError, match="scaled by their average norm"):
        place_sae(SAELensLike(make_sae(), normalize_activations="expected_average_only_in"))
    assert place_sae(SAELensLike(make_sae(), "odd"), layer=0, site="mlp_out").layer == 0


class TopActivations(NamedTuple):
    top_acts: torch.Tensor
    top_indices: torch.Tensor


def test_any_object_with_encode_will_do():
    inner = make_sae()
    x = torch.randn(4, 6)

    def sparsify(values):
        return TopActivations(*inner.encode(values).topk(3, dim=-1))

    plain = SimpleNamespace(encode=inner.encode)
    for coder in (plain, SimpleNamespace(encode=sparsify, W_dec=inner.w_dec)):
        found = place_sae(coder, layer=0, d_in=6, name="mine")
        assert torch.equal(found.encode(x), inner.encode(x))
        assert found.to_dict() == {
            "layer": 0,
            "site": "mlp_out",
            "d_in": 6,
            "n_latents": 10,
            "name": "mine",
            "centred": False,
            "fingerprint": "" if coder is plain else found.fingerprint,
        }
    sparse = SimpleNamespace(encode=lambda values: inner.encode(values).to_sparse(), d_in=6)
    assert torch.equal(place_sae(sparse, layer=0).encode(x), inner.encode(x))
    with pytest.raises(SettingError, match="give place_sae\\(sae, d_in="):
        place_sae(plain, layer=0)
    with pytest.raises(SettingError, match="give place_sae\\(sae, layer="):
        place_sae(plain)
    with pytest.raises(ModelError, match="has no encode"):
        place_sae(object(), layer=0)
    with pytest.raises(ModelError, match="gave no tensor"):
        place_sae(SimpleNamespace(encode=lambda values: [1, 2]), layer=0, d_in=6)
    with pytest.raises(ModelError, match=r"a tensor \[2, 10\] was expected"):
        place_sae(SimpleNamespace(encode=lambda values: values[:, :2], W_dec=inner.w_dec), layer=0)
    with pytest.raises(SettingError, match="no place that an SAE can read"):
        place_sae(inner, site="gate_act")


def test_several_must_go_together():
    one, two = make_sae(layer=2), make_sae(seed=1, layer=0)
    assert [sae.layer for sae in place_saes([one, two])] == [0, 2]
    assert [sae.layer for sae in place_saes({5: one, 3: two})] == [3, 5]
    assert [sae.layer for sae in place_saes(place_sae(one))] == [2]
    with pytest.raises(SettingError, match="read the same layer"):
        place_saes([one, one])
    with pytest.raises(SettingError, match="must agree in site and number of latents"):
        place_saes([one, make_sae(layer=1, latents=11)])
    with pytest.raises(SettingError, match="must agree"):
        place_saes([one, make_sae(layer=1, site="resid_post")])
    with pytest.raises(SettingError, match="there is no SAE"):
        place_saes([])


@pytest.mark.parametrize("as_tuple", [False, True])
def test_saelens_is_asked_by_name(monkeypatch, as_tuple):
    asked = []

    def from_pretrained(release, number, device):
        asked.append((release, number, device))
        if release == "none":
            raise ValueError("no such release")
        made = SAELensLike(make_sae(), "blocks.5.hook_mlp_out")
        return (made, {}, None) if as_tuple else made

    stand_in = SimpleNamespace(SAE=SimpleNamespace(from_pretrained=from_pretrained))
    monkeypatch.setitem(sys.modules, "sae_lens", stand_in)
    found = load_sae("sae-lens:some-release/layer_5/width_16k")
    assert asked == [("some-release", "layer_5/width_16k", "cpu")]
    assert (found.layer, found.name) == (5, "sae-lens:some-release/layer_5/width_16k")
    with pytest.raises(ModelError, match=r"SAELens cannot load 'x' of 'none' \(no such release\)"):
        load_sae("sae-lens:none/x")
    with pytest.raises(SettingError, match="expected 'sae-lens:release/id'"):
        load_sae("sae-lens:release")
    monkeypatch.setitem(sys.modules, "sae_lens", None)
    with pytest.raises(ModelError, match=r"pip install 'lens-neurons\[sae\]'"):
        load_sae("sae-lens:release/id")


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
@pytest.mark.parametrize(
    ("site", "layer"), [("mlp_out", 0), ("mlp_out", 2), ("resid_post", 1), ("resid_pre", 2), ("post", 1)]
)
def test_what_is_read_is_what_the_cache_holds(backend, site, layer):
    model = load_model(tiny("llama").folder, backend=backend)
    adapter = adapt(model)
    width = adapter.d_mlp if site == "post" else adapter.d_model
    sae = place_sae(make_sae(d_in=width, layer=layer, site=site))
    pieces = [piece for group in encode(adapter.tokens, SAMPLE_TEXTS[:4], TokenPolicy(bos="always")) for piece in group]
    (batch,) = make_batches(pieces, adapter.tokens.pad_id)
    (found,) = read_values(adapter, (sae,), batch)
    assert len(found) == sum(len(piece.ids) - 1 for piece in pieces)
    name = f"blocks.{layer}.mlp.hook_post" if site == "post" else f"blocks.{layer}.hook_{site}"
    wanted = []
    for piece in sorted(pieces, key=lambda piece: -len(piece.ids)):
        _, cache = model.run_with_cache(torch.tensor([piece.ids]))
        wanted.append(cache[name][0, 1:])
    assert torch.allclose(found, torch.cat(wanted), atol=1e-4)


def test_an_sae_that_does_not_fit_the_model_is_refused(tmp_path):
    adapter = adapt(load_model(tiny("llama").folder))
    with pytest.raises(ModelError, match=r"reads 6 values, but 'blocks\.1\.hook_mlp_out' .* holds 32"):
        place_sae(make_sae()).hook_name(adapter)
    for site in ("mlp_out", "resid_post"):
        with pytest.raises(SettingError, match="layer=3 is out of range"):
            place_sae(make_sae(d_in=32, layer=3, site=site)).hook_name(adapter)
    centred = SAELensLike(make_sae(d_in=32), kwargs={"center_writing_weights": True})
    with pytest.raises(ModelError, match="trained on centred weights"):
        place_sae(centred).hook_name(adapter)
    assert place_sae(SAELensLike(make_sae(d_in=32), kwargs={})).hook_name(adapter) == "blocks.2.hook_mlp_out"


def test_a_processed_model_is_refused_unless_the_sae_wants_it(tmp_path):
    adapter = adapt(load_model(save_folder(tmp_path / "one", "llama").folder))
    adapter.processed = True
    with pytest.raises(ModelError, match="trained on raw weights"):
        place_sae(make_sae(d_in=32)).hook_name(adapter)
    centred = SAELensLike(make_sae(d_in=32), kwargs={"center_writing_weights": True})
    assert place_sae(centred).hook_name(adapter) == "blocks.2.hook_mlp_out"
    # What the neurons do is the same in both.
    assert place_sae(make_sae(d_in=48, site="post")).hook_name(adapter) == "blocks.1.mlp.hook_post"


def test_reprs_are_short():
    assert repr(make_sae()) == "TopKSAE(6 -> 10 latents, k=3, mlp_out of layer 1)"
    assert repr(place_sae(make_sae(), name="mine")) == "PlacedSAE(mine: 6 -> 10 latents, mlp_out of layer 1)"
    assert isinstance(place_sae(place_sae(make_sae()), layer=2, name="x"), PlacedSAE)


def test_the_packaged_one_fits_the_demo_model_and_explains_it():
    sae, model = load_sae("demo"), load_model("demo")
    assert repr(sae) == "PlacedSAE(demo: 192 -> 2048 latents, mlp_out of layer 4)"
    assert sae.coder.notes["model"]["weights"] == adapt(model).weights_fingerprint()
    assert sum(file.stat().st_size for file in (PACKAGED / "sae").iterdir()) < 3_000_000
    found = evaluate_sae(model, sae.coder, Corpus.packaged("held_out").select(["en", "ht", "ta"]), texts=5)
    assert found["active"] <= 16
    assert found["explained_variance"] > 0.6


def test_the_files_are_those_of_sparsify():
    config = json.loads((PACKAGED / "sae" / "cfg.json").read_text())
    weights = safetensors.torch.load_file(PACKAGED / "sae" / "sae.safetensors")
    assert {name: tuple(value.shape) for name, value in weights.items()} == {
        "encoder.weight": (config["num_latents"], config["d_in"]),
        "encoder.bias": (config["num_latents"],),
        "W_dec": (config["num_latents"], config["d_in"]),
        "b_dec": (config["d_in"],),
    }
    assert (config["k"], config["activation"]) == (16, "topk")


def test_the_fingerprint_covers_encoder_and_k():
    sae = make_sae()
    changed = [
        dataclasses.replace(sae, k=4),
        dataclasses.replace(sae, w_enc=-sae.w_enc),
        dataclasses.replace(sae, b_enc=sae.b_enc + 1),
        dataclasses.replace(sae, w_dec=sae.w_dec * 2),
    ]
    prints = {place_sae(one).fingerprint for one in (sae, *changed)}
    assert len(prints) == 5
    assert place_sae(make_sae()).fingerprint == place_sae(sae).fingerprint
