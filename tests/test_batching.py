"""Tests of batching: what becomes of a text before the model sees it."""

import dataclasses
import random

import pytest
import torch
from models import N_CTX, SAMPLE_TEXTS, build_tokenizer

from lens_neurons import batching
from lens_neurons.batching import (
    Piece,
    TokenizerInfo,
    TokenPolicy,
    encode,
    encode_pair,
    encode_prompt,
    group_by_length,
    iter_shards,
    make_batches,
    pad,
)
from lens_neurons.errors import DataError, SettingError

CHAT = "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt %}>{% endif %}"


def make_info(*, prepends: bool = True, bos: bool = True, n_ctx: int = N_CTX) -> TokenizerInfo:
    tokenizer = build_tokenizer(bos=bos)
    return TokenizerInfo(tokenizer, tokenizer.bos_token_id, prepends and bos, tokenizer.pad_token_id, n_ctx, "hash")


def plain(info: TokenizerInfo, text: str) -> list[int]:
    return info.tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize(
    ("bos", "prepends", "expected"),
    [("model", True, 1), ("model", False, 0), ("always", False, 1), ("never", True, 0)],
)
def test_bos_policy(bos, prepends, expected):
    info = make_info(prepends=prepends)
    ((piece,),) = encode(info, [SAMPLE_TEXTS[0]], TokenPolicy(bos=bos))
    assert list(piece.ids) == [info.bos_id] * expected + plain(info, SAMPLE_TEXTS[0])
    assert piece.special == tuple(range(expected))


def test_bos_of_a_tokenizer_without_one():
    info = make_info(bos=False)
    ((piece,),) = encode(info, ["rain"], TokenPolicy())
    assert list(piece.ids) == plain(info, "rain")
    with pytest.raises(SettingError, match="has none"):
        list(encode(info, ["rain"], TokenPolicy(bos="always")))


def test_bos_does_not_depend_on_the_tokenizers_own_habit():
    info = make_info()
    habit = dataclasses.replace(info, tokenizer=build_tokenizer(add_bos=True))
    text = SAMPLE_TEXTS[3]
    assert habit.tokenizer(text)["input_ids"][0] == habit.tokenizer.bos_token_id
    assert list(encode(habit, [text], TokenPolicy(bos="never"))) == list(encode(info, [text], TokenPolicy(bos="never")))


def test_an_empty_text_has_no_piece_and_a_prompt_needs_bos():
    info = make_info()
    nothing, _ = encode(info, ["", "a"], TokenPolicy())
    assert nothing == []
    assert encode_prompt(info, "") == [info.bos_id]
    with pytest.raises(DataError, match="empty prompt"):
        encode_prompt(info, "", bos="never")


@pytest.mark.parametrize("overflow", ["truncate", "split"])
def test_a_long_text(overflow):
    info, text = make_info(), " ".join(SAMPLE_TEXTS)
    ids = plain(info, text)
    (pieces,) = encode(info, [text], TokenPolicy(max_tokens=9, overflow=overflow), first_index=7)
    assert all(len(piece.ids) <= 9 and piece.ids[0] == info.bos_id and piece.text_index == 7 for piece in pieces)
    joined = [token for piece in pieces for token in piece.ids[1:]]
    assert joined == (ids[:8] if overflow == "truncate" else ids)
    assert [piece.piece_index for piece in pieces] == list(range(len(pieces)))


def test_a_long_text_may_be_an_error():
    info = make_info()
    fits = info.tokenizer.decode(plain(info, SAMPLE_TEXTS[0])[:4])
    assert len(list(encode(info, [fits], TokenPolicy(max_tokens=5, overflow="error")))) == 1
    with pytest.raises(DataError, match="text 1 has"):
        list(encode(info, [fits, SAMPLE_TEXTS[0]], TokenPolicy(max_tokens=5, overflow="error")))


def test_wrong_policies_and_limits():
    with pytest.raises(SettingError, match="overflow='cut'"):
        TokenPolicy(overflow="cut")
    with pytest.raises(SettingError, match="max_tokens=1"):
        TokenPolicy(max_tokens=1)
    with pytest.raises(SettingError, match="context of 96"):
        list(encode(make_info(), ["a"], TokenPolicy(max_tokens=97)))


def test_chat_template_marks_special_tokens():
    info = make_info()
    with pytest.raises(SettingError, match="chat template"):
        list(encode(info, ["rain"], TokenPolicy(chat="template")))
    info.tokenizer.chat_template = CHAT
    ((piece,),) = encode(info, ["rain"], TokenPolicy(chat="template"))
    eos = info.tokenizer.eos_token_id
    assert list(piece.ids) == [info.bos_id, *plain(info, "rain"), eos, *plain(info, ">")]
    assert [piece.ids[i] for i in piece.special] == [info.bos_id, eos]
    assert encode_prompt(info, "rain", chat="template") == list(piece.ids)


@pytest.mark.parametrize("boundary", ["offsets", "separate"])
def test_a_reply_is_scored_after_its_prompt_in_the_chat_template(boundary):
    info = make_info()
    with pytest.raises(SettingError, match="chat template"):
        encode_pair(info, "rain", "wet", boundary=boundary, chat="template")
    info.tokenizer.chat_template = CHAT
    pair = encode_pair(info, "rain", "wet", boundary=boundary, chat="template")
    assert list(pair.ids) == [*encode_prompt(info, "rain", chat="template"), *plain(info, "wet")]
    assert list(pair.ids[pair.answer_start :]) == plain(info, "wet")


@pytest.mark.parametrize("setting", [{"chat": "templat"}, {"bos": "alway"}])
def test_unknown_policies_are_refused(setting):
    for call in (
        lambda: encode_pair(make_info(), "rain", "wet", **setting),
        lambda: encode_prompt(make_info(), "rain", **setting),
    ):
        with pytest.raises(SettingError, match=r"alway.* is unknown|templat.* is unknown"):
            call()


def test_padding_on_both_sides():
    tokens, mask = pad([[5, 6, 7], [8]], pad_id=0)
    assert tokens.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert mask.tolist() == [[True] * 3, [True, False, False]]
    tokens, mask = pad([[5, 6, 7], [8]], pad_id=5, side="left")
    assert tokens.tolist() == [[5, 6, 7], [5, 5, 8]]
    assert mask.tolist() == [[True] * 3, [False, False, True]]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("count_special", [False, True])
def test_batches_hold_every_token_once(side, count_special):
    rng = random.Random(3)
    pieces = [Piece(i, i % 3, tuple(rng.choices(range(1, 300), k=rng.randint(1, 20))), (0,)) for i in range(40)]
    batches = make_batches(pieces, 0, 50, side=side, count_special=count_special)
    seen = {}
    for batch in batches:
        assert batch.tokens.numel() <= 50
        lengths = batch.mask.sum(dim=1)
        assert lengths.tolist() == sorted(lengths.tolist(), reverse=True)
        for row, index in enumerate(batch.text_index.tolist()):
            ids = batch.tokens[row][batch.mask[row]].tolist()
            counted = batch.tokens[row][batch.counted[row]].tolist()
            assert counted == (ids if count_special else ids[1:])
            assert int(batch.piece_index[row]) == index % 3
            seen[index] = tuple(ids)
    assert seen == {piece.text_index: piece.ids for piece in pieces}
    assert sum(len(batch.tokens) for batch in batches) == len(pieces)


def test_grouping_is_by_length_with_ties_in_order():
    assert group_by_length([2, 5, 2, 5], 10) == [[1, 3], [0, 2]]
    assert group_by_length([7], 3) == [[0]]
    assert group_by_length([], 3) == []


def test_batch_moves_to_a_device():
    (batch,) = make_batches([Piece(4, 0, (1, 2), ())], 0)
    moved = batch.to("meta")
    assert all(getattr(moved, field.name).device.type == "meta" for field in dataclasses.fields(moved))


def shards_of(info, texts, policy, shard_tokens=30, skip=0):
    return list(iter_shards(info, texts, policy, language="en", shard_tokens=shard_tokens, skip=skip))


def test_shards_cover_all_texts_in_order():
    info, texts = make_info(), [*SAMPLE_TEXTS, "", SAMPLE_TEXTS[0]]
    shards = shards_of(info, iter(texts), TokenPolicy())
    assert [shard.first for shard in shards] == [0, *(shard.last + 1 for shard in shards[:-1])]
    assert shards[-1].last == len(texts) - 1
    pieces = [piece for shard in shards for piece in shard.pieces]
    assert pieces == [piece for group in encode(info, texts, TokenPolicy()) for piece in group]
    sizes = [sum(len(piece.ids) for piece in shard.pieces) for shard in shards]
    # Each is full, and was not before its last text.
    for shard, size in zip(shards[:-1], sizes, strict=False):
        last = sum(len(piece.ids) for piece in shard.pieces if piece.text_index == shard.last)
        assert size >= 30 > size - last


@pytest.mark.parametrize("pack", [False, True])
def test_shards_are_the_same_from_any_shard_on(pack):
    info, policy = make_info(n_ctx=16), TokenPolicy(overflow="truncate", pack=pack)
    shards = shards_of(info, SAMPLE_TEXTS, policy)
    assert len(shards) > 3
    for i, shard in enumerate(shards):
        assert shards_of(info, SAMPLE_TEXTS, policy, skip=shard.last + 1) == shards[i + 1 :]


def test_shards_count_what_was_cut_or_split():
    info = make_info()
    lengths = [len(plain(info, text)) + 1 for text in SAMPLE_TEXTS]
    limit = sorted(lengths)[5]
    longer = sum(length > limit for length in lengths)
    assert 0 < longer < len(lengths)
    cut = shards_of(info, SAMPLE_TEXTS, TokenPolicy(max_tokens=limit))
    assert (sum(s.truncated for s in cut), sum(s.split for s in cut)) == (longer, 0)
    split = shards_of(info, SAMPLE_TEXTS, TokenPolicy(max_tokens=limit, overflow="split"))
    assert (sum(s.truncated for s in split), sum(s.split for s in split)) == (0, longer)


def test_shards_count_what_was_cut_of_a_chat():
    info = make_info()
    info.tokenizer.chat_template = CHAT
    plain_length = len(plain(info, SAMPLE_TEXTS[0]))
    whole = len(encode_prompt(info, SAMPLE_TEXTS[0], chat="template"))
    assert whole > plain_length + 1
    for limit, cut in ((plain_length + 1, 1), (whole - 1, 1), (whole, 0)):
        (shard,) = shards_of(info, SAMPLE_TEXTS[:1], TokenPolicy(chat="template", max_tokens=limit), 1000)
        assert (shard.truncated, shard.split) == (cut, 0)


@pytest.mark.parametrize("cut", [False, True])
def test_every_text_is_tokenised_once(cut, monkeypatch):
    info, seen = make_info(), []
    monkeypatch.setattr(batching, "plain_ids", lambda _, text: seen.append(text) or [9] * 20)
    shards_of(info, SAMPLE_TEXTS, TokenPolicy(max_tokens=8 if cut else 21))
    assert seen == list(SAMPLE_TEXTS)


def test_bos_stands_only_at_the_beginning_of_a_packed_text():
    info = make_info(n_ctx=8)
    texts = [SAMPLE_TEXTS[0] * 2, "rain", SAMPLE_TEXTS[1] * 3]
    (shard,) = shards_of(info, texts, TokenPolicy(pack=True), 1000)
    stream = [token for piece in shard.pieces for token in piece.ids]
    assert stream == [token for text in texts for token in (info.bos_id, *plain(info, text))]
    assert min(len(plain(info, text)) for text in (texts[0], texts[2])) > 8
    marked = [piece.ids[i] for piece in shard.pieces for i in piece.special]
    assert marked == [info.bos_id] * 3


@pytest.mark.parametrize("overflow", ["truncate", "split", "error"])
def test_packed_shards_lose_no_token(overflow):
    info = make_info(n_ctx=16)
    shards = shards_of(info, SAMPLE_TEXTS, TokenPolicy(pack=True, overflow=overflow, bos="always"), shard_tokens=100)
    pieces = [piece for shard in shards for piece in shard.pieces]
    stream = [token for piece in pieces for token in piece.ids]
    special = [i in piece.special for piece in pieces for i in range(len(piece.ids))]
    assert [token for token, s in zip(stream, special, strict=True) if not s] == [
        token for text in SAMPLE_TEXTS for token in plain(info, text)
    ]
    assert {token for token, s in zip(stream, special, strict=True) if s} == {info.bos_id}
    for shard in shards:
        assert all(len(piece.ids) == 16 for piece in shard.pieces[:-1])
        assert 0 < len(shard.pieces[-1].ids) <= 16
        assert (shard.truncated, shard.split) == (0, 0)


def test_pair_boundary_by_offsets_and_separately():
    info = make_info()
    prompt, answer = "The cat sat on the", " mat"
    both = plain(info, prompt + answer)
    offsets = info.tokenizer(prompt + answer, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    pair = encode_pair(info, prompt, answer)
    assert list(pair.ids) == [info.bos_id, *both]
    assert [end > len(prompt) for _, end in offsets].index(True) + 1 == pair.answer_start
    separate = encode_pair(info, prompt, answer, bos="never", boundary="separate")
    assert (list(separate.ids), separate.answer_start) == (both, len(plain(info, prompt)))


def test_pair_boundary_where_a_token_spans_it():
    info = make_info()
    # " the" is one token, so cutting within it gives that token to the continuation.
    whole = plain(info, "cat on the")
    assert len(whole) == len(plain(info, "cat on")) + 1
    pair = encode_pair(info, "cat on t", "he", bos="never")
    assert (list(pair.ids), pair.answer_start) == (whole, len(whole) - 1)


def test_pairs_that_cannot_be_scored():
    info = make_info()
    with pytest.raises(DataError, match="no token of its own"):
        encode_pair(info, "The cat", "")
    with pytest.raises(DataError, match="nothing stands before"):
        encode_pair(info, "", "cat", bos="never")
    assert encode_pair(info, "", "cat").answer_start == 1


def test_masks_come_from_lengths_not_from_ids():
    pieces = [Piece(0, 0, (0, 9, 0), ()), Piece(1, 0, (9,), ())]
    (batch,) = make_batches(pieces, pad_id=0)
    assert torch.equal(batch.mask, torch.tensor([[True, True, True], [True, False, False]]))
