"""A model's own answers as a corpus."""

import functools
import logging

import pytest
from models import SAMPLE_TEXTS, tiny

from lens_neurons.completing import complete
from lens_neurons.corpus import Corpus
from lens_neurons.errors import DataError, SettingError
from lens_neurons.generation import generate
from lens_neurons.model import load_model
from lens_neurons.recording import record
from lens_neurons.storage import derive_seed

PROMPTS = {"en": ["The cat", "The rain on"], "nl": ["De kat zat", "", "De"]}


@functools.cache
def loaded():
    return load_model(tiny("llama").folder)


def answers(corpus: Corpus) -> dict[str, list]:
    return {code: list(corpus.texts(code)) for code in corpus.languages}


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "top_k": 40, "seed": 3}, {"repetition_penalty": 1.3}])
def test_the_answers_are_what_generate_returns(settings):
    made = answers(complete(loaded(), Corpus.from_texts(PROMPTS), max_new_tokens=8, progress=False, **settings))
    for code, given in PROMPTS.items():
        seed = derive_seed(settings.get("seed", 0), "complete", code)
        wanted = generate(loaded(), given, max_new_tokens=8, **{**settings, "seed": seed})
        assert made[code] == [(one.prompt, one.text) for one in wanted]


def test_a_language_draws_the_same_whatever_else_is_asked():
    settings = {"max_new_tokens": 6, "temperature": 1.0, "progress": False}
    both = complete(loaded(), Corpus.from_texts(PROMPTS), **settings)
    one = complete(loaded(), Corpus.from_texts(PROMPTS), languages=["nl"], **settings)
    assert one.languages == ("nl",)
    assert one.fingerprint("nl") == both.fingerprint("nl")


def test_pairs_are_answered_anew():
    given = Corpus.from_pairs({code: [(prompt, " old") for prompt in own] for code, own in PROMPTS.items()})
    settings = {"max_new_tokens": 6, "progress": False}
    fresh = complete(loaded(), Corpus.from_texts(PROMPTS), **settings)
    assert answers(complete(loaded(), given, **settings)) == answers(fresh)


def test_a_recording_counts_the_answers_only():
    model = loaded()
    corpus = complete(
        model, Corpus.from_texts({"en": list(SAMPLE_TEXTS[:4])}, name="mine"), max_new_tokens=5, progress=False
    )
    assert corpus.name.startswith("mine, answered by ")
    stats = record(model, corpus, progress=False)
    tokenizer = tiny("llama").tokenizer
    # Joint tokenisation may join what was made token by token, never more tokens than the answer has bytes.
    most = sum(len(tokenizer.encode(pair.completion, add_special_tokens=False)) for pair in corpus.texts("en"))
    assert 0 < int(stats.tokens[0]) <= most + 4
    assert int(stats.texts[0]) == 4


def test_empty_answers_stay_and_are_told(caplog, monkeypatch):
    model = loaded()
    first = generate(model, PROMPTS["nl"], max_new_tokens=1, seed=derive_seed(0, "complete", "nl")).texts
    with caplog.at_level(logging.WARNING, logger="lens_neurons"):
        made = complete(
            model, Corpus.from_texts({"nl": PROMPTS["nl"]}), max_new_tokens=3, stop=first[0][:1], progress=False
        )
    assert [prompt for prompt, _ in made.texts("nl")] == PROMPTS["nl"]
    assert "answers in 'nl' are empty" in caplog.text


def test_what_cannot_be_answered_is_a_sentence():
    model = loaded()
    with pytest.raises(DataError, match="has no 'fr'"):
        complete(model, Corpus.from_texts(PROMPTS), languages=["fr"], progress=False)
    with pytest.raises(SettingError, match="does not fit"):
        complete(model, Corpus.from_texts(PROMPTS), max_new_tokens=1000, progress=False)
    text = generate(model, ["The"], max_new_tokens=1).texts[0]
    with pytest.raises(DataError, match="every answer in 'en' is empty"):
        complete(model, Corpus.from_texts({"en": ["The"]}), max_new_tokens=2, stop=text[:1], progress=False)
