"""Module names of Hugging Face models: every output of every linear layer is the unit that the names say it is."""

from typing import Any

import pytest
import torch
import transformers
from models import ARCHITECTURES, tiny
from oracle import ROWS, padded, sentence
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from lens_neurons.errors import DataError, LensNeuronsError, ModelError
from lens_neurons.model import adapt, load_model
from lens_neurons.module_names import LinearLayers

try:
    from transformer_lens import HookedTransformer
except ImportError:
    HookedTransformer = None

hooked_only = pytest.mark.skipif(HookedTransformer is None, reason="TransformerLens 4 has no HookedTransformer")
# The bridge's OPT has hooks of two axes at the MLP, as Hugging Face's layer has; XGLM is no HookedTransformer.
CASES = [
    *(pytest.param(a, "hooked", id=f"{a}-hooked", marks=hooked_only) for a in ARCHITECTURES if a != "xglm"),
    *(pytest.param(a, "bridge", id=f"{a}-bridge", marks=pytest.mark.bridge) for a in ARCHITECTURES if a != "opt"),
]
ROW = ROWS[0]


@torch.no_grad()
def outputs_of_linear_layers(hf_model: Any) -> dict[str, Tensor]:
    """Return what every linear layer of a Hugging Face model gives on one text: name to [pos, output]."""
    caught: dict[str, Tensor] = {}

    def catch(name: str) -> Any:
        def hook(_module: Any, _inputs: Any, output: Tensor) -> None:
            caught[name] = output.reshape(len(ROW), -1).clone()

        return hook

    handles = [
        module.register_forward_hook(catch(name))
        for name, module in hf_model.named_modules()
        if isinstance(module, (torch.nn.Linear, Conv1D))
    ]
    try:
        hf_model(torch.tensor([ROW]))
    finally:
        for handle in handles:
            handle.remove()
    return caught


def raw_sites(arch: str, backend: str, layers: LinearLayers) -> list[str]:
    # HookedTransformer's Gemma 2 normalises before it hooks these two.
    after_norm = {"attn_out", "mlp_out"} if (arch, backend) == ("gemma2", "hooked") else set()
    return [site for site in layers.sites if site not in after_norm]


@pytest.mark.parametrize(("arch", "backend"), CASES)
def test_every_output_is_the_unit_that_its_module_names(arch: str, backend: str):
    made = tiny(arch)
    outputs = outputs_of_linear_layers(made.hf_model)
    model = load_model(made.folder, backend=backend, device="cpu")
    layers = LinearLayers.of(model)
    sites = raw_sites(arch, backend, layers)
    values = adapt(model).cache_sites(*padded([ROW], "right"), sites)
    names = list(layers.sites)
    seen: dict[tuple[str, int], list[int]] = {}
    compared = 0
    for module, output in outputs.items():
        found = layers.locate(f"{module}:0", torch.arange(output.shape[1]))
        if module == "lm_head":
            assert found is None
            continue
        places, layer, indices = found
        for unit, (place, index) in enumerate(zip(places.tolist(), indices.tolist(), strict=True)):
            seen.setdefault((names[place], layer), []).append(index)
            if names[place] in sites:
                ours = values[names[place], layer].reshape(len(ROW), -1)[:, index]
                assert torch.allclose(ours, output[:, unit], atol=2e-5), (module, unit, names[place], layer, index)
                compared += 1
    # Every unit of every site is the output of one module, once.
    assert {key: sorted(found) for key, found in seen.items()} == {
        (site, layer): list(range(width)) for site, (n, width) in layers.sites.items() for layer in range(n)
    }
    assert compared == sum(n * width for site, (n, width) in layers.sites.items() if site in sites)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_config_folder_and_models_say_the_same(arch: str):
    made = tiny(arch)
    state = torch.get_rng_state()
    expected = LinearLayers.of(made.hf_model.config)
    assert torch.equal(state, torch.get_rng_state())
    assert (
        LinearLayers.of(made.folder) == LinearLayers.of(str(made.folder)) == LinearLayers.of(made.hf_model) == expected
    )
    backends = ["bridge"] + ([] if arch == "xglm" or HookedTransformer is None else ["hooked"])
    for backend in backends:
        found = LinearLayers.of(load_model(made.folder, backend=backend, device="cpu"))
        assert found == expected
        # The order decides flat unit numbers.
        assert list(found.sites) == list(expected.sites)


def test_the_fused_layer_of_bloom_by_hand():
    # 4 heads of 8: outputs 0-7 are q of head 0, 8-15 its k, 16-23 its v, 24-31 q of head 1.
    layers = LinearLayers.of(tiny("bloom").hf_model.config)
    places, layer, index = layers.locate(
        "transformer.h.2.self_attention.query_key_value", torch.tensor([0, 7, 8, 23, 24, 95])
    )
    assert layer == 2
    assert [list(layers.sites)[place] for place in places] == ["q", "q", "k", "v", "q", "v"]
    assert index.tolist() == [0, 7, 0, 7, 8, 31]


def test_up_without_a_gate_is_the_layer_before_the_activation():
    config = transformers.NemotronConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    layers = LinearLayers.of(config)
    assert layers.sites["gate_pre"] == (2, 24)
    assert "up" not in layers.sites
    places, _, _ = layers.locate("model.layers.1.mlp.up_proj", torch.tensor([3]))
    assert [list(layers.sites)[place] for place in places] == ["gate_pre"]


@pytest.mark.parametrize(
    ("config", "units"),
    [
        (transformers.LlamaConfig(), 1_359_872),
        (transformers.LlamaConfig(hidden_size=5120, intermediate_size=13824, num_hidden_layers=40), 2_129_920),
        (transformers.BloomConfig(hidden_size=1024, n_layer=24, n_head=16), 221_184),
        (transformers.BloomConfig(hidden_size=2560, n_layer=30, n_head=32), 691_200),
        (transformers.XGLMConfig(d_model=1024, ffn_dim=4096, num_layers=24, attention_heads=16), 221_184),
    ],
    ids=["Llama-2-7B", "Llama-2-13B", "bloom-560m", "bloom-3b", "xglm-564M"],
)
def test_the_number_of_units_is_the_paper_s(config: Any, units: int):
    assert sum(n * width for n, width in LinearLayers.of(config).sites.values()) == units


def test_what_does_not_fit_is_refused():
    bloom, llama = (LinearLayers.of(tiny(arch).hf_model.config) for arch in ("bloom", "llama"))
    falcon = LinearLayers.of(
        transformers.FalconConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    )
    one = torch.tensor([0])
    cases: list[tuple[type[LensNeuronsError], str, Any]] = [
        (DataError, "no linear layer of LlamaFor", lambda: llama.locate("model.layers.0.mlp.experts.3.w1", one)),
        (DataError, "no linear layer of BloomFor", lambda: bloom.locate("transformer.h.0.mlp.gelu_impl:0", one)),
        (DataError, "of layer 3, but the model has 3", lambda: llama.locate("model.layers.3.mlp.up_proj", one)),
        (DataError, "of layer 7", lambda: bloom.locate("transformer.h.7.self_attention.query_key_value", one)),
        (DataError, "units 48 to 48 do not fit the 48", lambda: llama.locate("model.layers.0.mlp.up_proj", one + 48)),
        (DataError, "units -1 to", lambda: llama.locate("model.layers.0.self_attn.k_proj", one - 1)),
        (
            DataError,
            "do not fit the 96 outputs",
            lambda: bloom.locate("transformer.h.0.self_attention.query_key_value", one + 96),
        ),
        (
            ModelError,
            "and not for FalconForCausalLM",
            lambda: falcon.locate("transformer.h.0.self_attention.query_key_value", one),
        ),
        (ModelError, "no config for 'no/such-model'", lambda: LinearLayers.of("no/such-model")),
        (ModelError, "mixture of experts", lambda: LinearLayers.of(transformers.MixtralConfig())),
        (ModelError, "makes no causal language model", lambda: LinearLayers.of(transformers.CLIPConfig())),
    ]
    for kind, text, call in cases:
        with pytest.raises(kind, match=text) as caught:
            call()
        sentence(caught.value)
    # Falcon's other layers are where they are in BLOOM.
    places, layer, index = falcon.locate("transformer.h.1.mlp.dense_h_to_4h", one + 5)
    assert ([list(falcon.sites)[place] for place in places], layer, index.tolist()) == (["gate_pre"], 1, [5])
