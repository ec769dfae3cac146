import importlib.resources
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lens_neurons.batching import TokenPolicy, encode, make_batches, pad
from lens_neurons.corpus import Corpus
from lens_neurons.languages import DEMO_LANGUAGES
from lens_neurons.model import adapt, load_model
from lens_neurons.recording import record

FOLDER = importlib.resources.files("lens_neurons") / "demo" / "model"


def test_the_folder_is_small_and_complete():
    sizes = {entry.name: len(entry.read_bytes()) for entry in FOLDER.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= set(sizes)
    assert sum(sizes.values()) <= 24 * 2**20
    config = json.loads((FOLDER / "config.json").read_text())
    assert (config["model_type"], config["tie_word_embeddings"], config["max_position_embeddings"]) == (
        "llama",
        True,
        512,
    )


def test_what_was_held_out_ships_with_the_model():
    about = json.loads((FOLDER / "training.json").read_text())
    assert set(about["settings"]["languages"]) == set(DEMO_LANGUAGES)
    assert about["sha256"]
    assert about["held_out"]
    assert not any("eval" in name for name in about["sha256"])


def test_it_is_the_hugging_face_model():
    model = load_model("demo")
    adapter = adapt(model)
    plain = AutoModelForCausalLM.from_pretrained(str(FOLDER), dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(str(FOLDER))
    texts = [next(Corpus.packaged().texts(code)) for code in DEMO_LANGUAGES]
    rows = [tokenizer(text)["input_ids"] for text in texts]
    assert all(row[0] == tokenizer.bos_token_id for row in rows)
    tokens, mask = pad(rows, adapter.tokens.pad_id)
    last = mask.sum(dim=1) - 1
    ours = adapter.logits_at(tokens, mask, torch.arange(len(rows)), last).log_softmax(-1)
    with torch.no_grad():
        for i, row in enumerate(rows):
            theirs = plain(torch.tensor([row])).logits[0, -1].log_softmax(-1)
            assert torch.allclose(ours[i], theirs, atol=1e-4)


@pytest.mark.slow
def test_both_backends_record_the_same():
    """Rule 7: every differing count is explained by a value within 1e-5 of the layer's RMS of zero."""
    corpus = Corpus.packaged("held_out").select(["en", "sw", "th"])
    stats = [record(load_model("demo", backend=backend), corpus, progress=False) for backend in ("hooked", "bridge")]
    differing = (stats[0].positive != stats[1].positive).nonzero()
    if not len(differing):
        return
    adapter = adapt(load_model("demo"))
    near: dict[tuple[str, int], torch.Tensor] = {}
    for code in corpus.languages:
        pieces = [piece for own in encode(adapter.tokens, corpus.texts(code), TokenPolicy()) for piece in own]
        for layer in range(adapter.n_layers):
            found = torch.full((adapter.d_mlp,), torch.inf)
            for batch in make_batches(pieces, adapter.tokens.pad_id):
                value = adapter.cache_sites(batch.tokens, batch.mask, ["gate_pre"])["gate_pre", layer][batch.counted]
                found = torch.minimum(found, (value / value.square().mean().sqrt()).abs().amin(dim=0))
            near[code, layer] = found
    for language, layer, neuron in differing.tolist():
        assert near[corpus.languages[language], layer][neuron] < 1e-5


@pytest.mark.slow
def test_a_prompt_goes_on_in_its_language():
    """The gate (b) of the model card in small: continuations of held-out sentences are in the prompt's language."""
    from lens_neurons.evaluation.lid import identify_language
    from lens_neurons.generation import generate

    model, held_out = load_model("demo"), Corpus.packaged("held_out")
    right = []
    for code in ("en", "fr", "ru", "tr", "vi", "it"):
        prompts = [" ".join(text.split()[:6]) for text in held_out.texts(code)]
        texts = generate(model, prompts, max_new_tokens=24, temperature=0.8, seed=1).texts
        right += [guess.language == code for guess in identify_language(texts)]
    assert sum(right) / len(right) > 0.8
