"""Prompts with completions: only the completion counts, in batches and in recordings."""

import copy
import functools
import random

import numpy as np
import pytest
import torch
from models import N_CTX, SAMPLE_TEXTS, build_tokenizer, tiny

from lens_neurons.batching import TokenizerInfo, TokenPolicy, encode, iter_shards, make_batches
from lens_neurons.corpus import Corpus
from lens_neurons.errors import DataError, SettingError
from lens_neurons.evaluation.perplexity import perplexity_matrix
from lens_neurons.model import adapt, load_model
from lens_neurons.neurons import NeuronSet
from lens_neurons.pairs import Pair
from lens_neurons.recording import record

CHAT = "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt %}>{% endif %}"
# The prompt ends within a word, within a cluster of code points, with a space, in nothing; the completion is empty.
PAIRS = {
    "en": [("cat on t", "he mat"), ("The cat", " sat on the mat."), ("De ", "kat zat"), ("", "Le chat"), ("rain", "")],
    "ta": [("பூனை பாயி", "ல் உட்கார்ந்து"), ("แมวนั", "่งบนเสื่อ"), ("猫", "は敷物の上に"), ("e", "\u0301te")],
}


def make_info(n_ctx: int = N_CTX, prepends: bool = True) -> TokenizerInfo:
    tokenizer = build_tokenizer()
    return TokenizerInfo(tokenizer, tokenizer.bos_token_id, prepends, tokenizer.pad_token_id, n_ctx, "hash")


def slow_boundary(tokenizer, prompt: str, completion: str) -> tuple[list[int], int]:
    """Return the joint ids, and how many tokens from the first on hold bytes of the prompt's characters alone.

    Every id of a byte-level tokenizer stands for some bytes, so the boundary is counted in these, without offsets. A
    token that holds a part of the prompt's last character is the prompt's.
    """
    ids = tokenizer.encode(prompt + completion, add_special_tokens=False)
    sizes = [len(tokenizer.convert_ids_to_tokens(token)) for token in ids]  # one letter a byte
    return ids, int((np.cumsum(sizes) <= len(prompt.encode())).sum())


@pytest.mark.parametrize("bos", ["always", "never"])
@pytest.mark.parametrize("code", list(PAIRS))
def test_a_pair_is_one_text_whose_prompt_is_marked(bos, code):
    info = make_info()
    start = [info.bos_id] if bos == "always" else []
    groups = list(encode(info, list(Corpus.from_pairs(PAIRS).texts(code)), TokenPolicy(bos=bos)))
    assert len(groups) == len(PAIRS[code])
    for (prompt, completion), pieces in zip(PAIRS[code], groups, strict=True):
        ids, first = slow_boundary(info.tokenizer, prompt, completion)
        if not completion:
            assert pieces == []
            continue
        (piece,) = pieces
        assert list(piece.ids) == start + ids
        assert piece.prompt == len(start) + first
        assert len(piece.ids) - piece.prompt > 0


def test_a_token_that_spans_the_boundary_counts():
    info = make_info()
    ((piece,),) = encode(info, [Pair("cat on t", "he")], TokenPolicy(bos="never"))
    assert info.tokenizer.convert_ids_to_tokens(piece.ids[-1]) == "Ġthe"
    assert piece.prompt == len(piece.ids) - 1


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("count_special", [False, True])
def test_prompts_never_count(side, count_special):
    info, rng = make_info(), random.Random(0)
    words = " ".join(SAMPLE_TEXTS).split()
    pairs = [Pair(" ".join(rng.choices(words, k=rng.randint(0, 4))), " " + rng.choice(words)) for _ in range(30)]
    pieces = [piece for group in encode(info, pairs, TokenPolicy()) for piece in group]
    seen = set()
    for batch in make_batches(pieces, info.pad_id, 60, side=side, count_special=count_special):
        assert not (batch.counted & ~batch.mask).any()
        for row, index in enumerate(batch.text_index.tolist()):
            ids, first = slow_boundary(info.tokenizer, *pairs[index])
            assert batch.tokens[row][batch.counted[row]].tolist() == ids[first:]
            seen.add(index)
    assert seen == set(range(30))


@pytest.mark.parametrize("count_special", [False, True])
def test_a_chat_puts_the_prompt_into_the_template(count_special):
    info = make_info()
    info.tokenizer.chat_template = CHAT
    ((piece,),) = encode(info, [Pair("rain", "wet</s>")], TokenPolicy(chat="template"))
    tokenizer = info.tokenizer
    wet = tokenizer.encode("wet", add_special_tokens=False)
    template = tokenizer.encode("<s>rain</s>>", add_special_tokens=False)
    assert list(piece.ids) == [*template, *wet, tokenizer.eos_token_id]
    (batch,) = make_batches([piece], 0, count_special=count_special)
    counted = batch.tokens[batch.counted].tolist()
    assert counted == ([*wet, tokenizer.eos_token_id] if count_special else wet)


def test_a_long_pair_is_cut_and_counted_as_cut():
    info = make_info()
    pairs = [
        Pair("The cat sat", " on the mat and looked at the rain."),
        Pair("De kat zat op de mat", " en"),
        Pair("a", "b"),
    ]
    ids, first = slow_boundary(info.tokenizer, *pairs[0])
    limit = first + 3
    assert len(slow_boundary(info.tokenizer, *pairs[1])[0]) > limit
    assert slow_boundary(info.tokenizer, *pairs[1])[1] + 1 > limit  # nothing of its completion fits
    (shard,) = iter_shards(info, pairs, TokenPolicy(max_tokens=limit), language="en")
    assert (shard.first, shard.last, shard.truncated, shard.split) == (0, 2, 2, 0)
    assert [piece.text_index for piece in shard.pieces] == [0, 2]
    assert list(shard.pieces[0].ids) == [info.bos_id, *ids[: limit - 1]]
    assert len(shard.pieces[0].ids) - shard.pieces[0].prompt == 2
    with pytest.raises(DataError, match=r"text 0 has .* more than the"):
        list(encode(info, pairs, TokenPolicy(max_tokens=limit, overflow="error")))


@pytest.mark.parametrize("setting", [{"pack": True}, {"overflow": "split"}])
def test_pairs_are_neither_packed_nor_split(setting):
    with pytest.raises(SettingError, match="neither packed nor split"):
        list(iter_shards(make_info(), [Pair("a", "b")], TokenPolicy(**setting), language="en"))
    with pytest.raises(SettingError, match="neither packed nor split"):
        record(loaded(), Corpus.from_pairs(PAIRS), progress=False, **setting)


def test_a_slow_tokenizer_is_a_sentence():
    info = make_info()
    info.tokenizer.__class__ = type("Slow", (type(info.tokenizer),), {"is_fast": False})
    with pytest.raises(DataError, match="need a fast tokenizer"):
        list(encode(info, [Pair("a", "b")], TokenPolicy()))


def test_the_fingerprint_covers_the_boundary():
    made = [
        Corpus.from_pairs({"en": [("ab", "c")]}),
        Corpus.from_pairs({"en": [("a", "bc")]}),
        Corpus.from_pairs({"en": [("a", "b"), ("c", "")]}),
        Corpus.from_texts({"en": ["ab", "c"]}),
        Corpus.from_texts({"en": ["abc"]}),
    ]
    assert len({corpus.fingerprint("en") for corpus in made}) == len({c.fingerprint_all() for c in made}) == 5
    assert made[0].fingerprint("en") == Corpus.from_pairs({"eng_Latn": [["ab", "c"]]}, name="x").fingerprint("en")


def test_a_corpus_of_pairs_is_read_and_cut_like_any_other():
    corpus = Corpus.from_pairs(PAIRS, name="mine")
    assert (corpus.name, corpus.languages, corpus.count("en")) == ("mine", ("en", "ta"), 5)
    assert list(corpus.texts("ta")) == PAIRS["ta"] == list(corpus.texts("ta"))
    first, rest = corpus.split(2)
    assert [*first.texts("en"), *rest.texts("en")] == PAIRS["en"]
    assert all(isinstance(pair, Pair) for pair in rest.texts("en"))


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ({"en": []}, "has no pair"),
        ({"en": "ab"}, "is one string"),
        ({"en": ["ab"]}, "pair 0 of 'en' is 'ab'"),
        ({"en": [("a", "b"), ("a",)]}, "pair 1 of 'en'"),
        ({"en": [("a", "b", "c")]}, "two strings"),
        ({"en": [("a", "b")], "eng_Latn": [("a", "b")]}, "twice"),
    ],
)
def test_bad_pairs_are_refused(pairs, message):
    with pytest.raises(DataError, match=message):
        Corpus.from_pairs(pairs)


@functools.cache
def loaded():
    return load_model(tiny("llama").folder, dtype=torch.float64)


@pytest.mark.parametrize("count_special", [False, True])
@pytest.mark.parametrize("bos", ["always", "never"])
def test_counts_are_those_of_a_loop_over_completions(count_special, bos):
    tokenizer, hf = tiny("llama").tokenizer, copy.deepcopy(tiny("llama").hf_model).double()
    caught: list[torch.Tensor] = []
    for layer in hf.model.layers:
        layer.mlp.act_fn.register_forward_hook(lambda _module, _inputs, output: caught.append(output[0]))
    stats = record(
        loaded(),
        Corpus.from_pairs(PAIRS),
        bos=bos,
        count_special=count_special,
        shard_tokens=20,
        batch_tokens=40,
        progress=False,
    )
    for code, pairs in PAIRS.items():
        total, counts, means = 0, 0, []
        for prompt, completion in pairs:
            ids, first = slow_boundary(tokenizer, prompt, completion)
            start = [tokenizer.bos_token_id] if bos == "always" else []
            caught.clear()
            with torch.no_grad():
                hf(torch.tensor([start + ids]))
            active = torch.stack(caught)[:, len(start) + first :]
            total += active.shape[1]
            counts = counts + (active > 0).sum(dim=1)
            if active.shape[1]:
                means.append(active.mean(dim=1))
        at = stats.index(code)
        assert int(stats.tokens[at]) == total
        assert torch.equal(stats.positive[at], counts)
        torch.testing.assert_close(stats.text_mean[at], torch.stack(means).mean(dim=0).float(), rtol=1e-5, atol=1e-5)
    assert float(stats.probability().max()) <= 1


def test_perplexity_is_that_of_the_completions():
    model, mask = loaded(), torch.zeros(3, 48, dtype=torch.bool)
    mask[0, 0] = True
    neurons = NeuronSet.from_masks({"en": mask}, provenance=adapt(model).provenance())
    pairs = [pair for pair in PAIRS["en"] if pair[1]]
    corpus = Corpus.from_pairs({"en": pairs})
    found = perplexity_matrix(model, neurons, corpus, random_draws=0, bos="always", progress=False)
    items = found.items[found.items["condition"] == "none"]
    nll, tokens = (items[items["metric"] == name]["value"].tolist() for name in ("nll", "tokens"))
    hf = copy.deepcopy(tiny("llama").hf_model).double()
    for number, pair in enumerate(pairs):
        ids, first = slow_boundary(tiny("llama").tokenizer, *pair)
        row = torch.tensor([tiny("llama").tokenizer.bos_token_id, *ids])
        with torch.no_grad():
            logs = hf(row[None]).logits[0].log_softmax(-1)
        wanted = -logs[:-1].gather(1, row[1:, None])[first:].sum()
        assert tokens[number] == len(ids) - first
        assert nll[number] * tokens[number] == pytest.approx(float(wanted), rel=1e-5)


def test_prompts_alone_are_nothing_to_count():
    with pytest.raises(DataError, match="no token"):
        record(loaded(), Corpus.from_pairs({"en": [("The cat", "")]}), progress=False)


def test_a_recording_of_pairs_goes_on_where_it_stopped(tmp_path):
    corpus = Corpus.from_pairs(PAIRS)
    whole = record(loaded(), corpus, tmp_path / "one", shard_tokens=10, progress=False)
    again = record(loaded(), corpus, tmp_path / "one", shard_tokens=10, progress=False)
    assert torch.equal(whole.positive, again.positive)
    assert torch.equal(whole.positive, record(loaded(), corpus, shard_tokens=10, progress=False).positive)
