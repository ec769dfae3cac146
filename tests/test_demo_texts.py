"""The packaged texts about cultures, their plain counterparts, and the packaged code."""

import ast
import json
import re
import statistics
import subprocess
import unicodedata
from collections import Counter

import pytest

from lens_neurons.corpus import PACKAGED, Corpus
from lens_neurons.errors import SettingError
from lens_neurons.evaluation.lid import identify_language
from lens_neurons.languages import DEMO_LANGUAGES
from lens_neurons.methods import identify
from lens_neurons.model import load_model
from lens_neurons.recording import record

LANGUAGES = ("fr", "it", "ja", "ru", "tr", "zh")
THEMES = ("food", "holidays", "customs", "history", "arts", "everyday")
SCRIPTS = {"fr": "LATIN", "it": "LATIN", "tr": "LATIN", "ru": "CYRILLIC", "zh": "CJK", "ja": "CJK HIRAGANA KATAKANA"}
CODE = ("c++", "go", "java", "javascript", "python", "rust")
CLOSING = {")": "(", "]": "[", "}": "{"}


def rows(folder, stem):
    return [json.loads(line) for line in (PACKAGED / folder / f"{stem}.jsonl").read_text("utf-8").splitlines()]


def texts(part, label):
    return list(Corpus.packaged(part).texts(label))


def test_culture_and_plain_text_are_parallel():
    culture, plain = Corpus.packaged("culture"), Corpus.packaged("culture-plain")
    assert culture.languages == tuple(f"culture:{code}" for code in LANGUAGES)
    assert plain.languages == LANGUAGES
    assert set(LANGUAGES) < set(DEMO_LANGUAGES)
    assert culture.fingerprint_all() != plain.fingerprint_all()
    for code in LANGUAGES:
        pairs = rows("culture", code)
        assert len(pairs) == 60
        # Themes come in turn, so that any half has all of them.
        assert [pair["theme"] for pair in pairs] == list(THEMES) * 10
        assert [pair["culture"] for pair in pairs] == texts("culture", f"culture:{code}")
        assert [pair["plain"] for pair in pairs] == texts("culture-plain", code)
        both = [pair[kind] for pair in pairs for kind in ("culture", "plain")]
        assert len(set(both)) == 120, code
        for text in both:
            assert text == text.strip() == unicodedata.normalize("NFC", text)
            assert text[-1] in ".。", text


@pytest.mark.parametrize("code", LANGUAGES)
def test_a_plain_sentence_is_as_long_as_its_counterpart(code: str):
    ratios = [len(pair["plain"]) / len(pair["culture"]) for pair in rows("culture", code)]
    assert 0.75 < min(ratios) <= max(ratios) < 1.25
    assert 0.93 < statistics.mean(ratios) < 1.03


@pytest.mark.parametrize("code", ["fr", "it", "ru", "tr"])
def test_plain_sentences_have_no_names_and_no_years(code: str):
    """What a plain sentence leaves out: capitals inside the sentence, and figures."""
    found = {
        kind: sum(len(re.findall(r"(?<=\s)[«(]?\w", text[1:])) and sum(c.isupper() or c.isdigit() for c in text[1:])
                  for text in (pair[kind] for pair in rows("culture", code)))
        for kind in ("culture", "plain")
    }  # fmt: skip
    assert found["culture"] > 60
    assert found["plain"] == 0


@pytest.mark.parametrize("code", LANGUAGES)
@pytest.mark.parametrize("kind", ["culture", "plain"])
def test_texts_are_in_their_script_and_language(code: str, kind: str):
    own = [pair[kind] for pair in rows("culture", code)]
    letters = [unicodedata.name(c).split()[0] for text in own for c in text if c.isalpha()]
    right = sum(name in SCRIPTS[code].split() for name in letters)
    # A Latin T in a Turkish text on pillars is Latin, and the long vowel mark of Japanese has a name of its own.
    assert right / len(letters) > 0.98
    named = sum(guess.language == code for guess in identify_language(own))
    # Short Chinese sentences are taken for Japanese at times: 53 of 60 of either kind.
    assert named >= (53 if code == "zh" else 60)


def test_code_is_the_same_tasks_in_six_languages():
    corpus = Corpus.packaged("code")
    assert corpus.languages == CODE
    tasks = [row["task"] for row in rows("code", "python")]
    assert len(set(tasks)) == 40
    for language in CODE:
        assert [row["task"] for row in rows("code", language)] == tasks
        own = texts("code", language)
        assert len(set(own)) == 40 == corpus.count(language)
        for text in own:
            assert 5 <= len(text.splitlines()) <= 20
            assert text == text.strip("\n")
            assert text.isascii()
            assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize("language", CODE)
def test_code_has_the_form_of_its_language(language: str):
    marks = {
        "c++": r"#include|\bconstexpr\b|\bstruct\b|\bclass\b|\bint\b|\bbool\b|template",
        "go": r"\Apackage \w+\n[\s\S]*\bfunc\b",
        "java": r"\b(class|record|interface) \w+",
        "javascript": r"\b(function|const|let|class)\b",
        "python": r"",
        "rust": r"\b(fn|impl|struct|enum)\b",
    }
    for text in texts("code", language):
        if language == "python":
            ast.parse(text)
        assert re.search(marks[language], text), text
        bare = re.sub(r"'(\\.|[^'\\\n])'|\"(\\.|[^\"\\\n])*\"", "", text)
        open_brackets = []
        for c in bare:
            if c in CLOSING.values():
                open_brackets.append(c)
            elif c in CLOSING:
                assert open_brackets.pop() == CLOSING[c], text
        assert not open_brackets, text


def test_parts_are_named_in_the_error():
    with pytest.raises(SettingError, match="culture-plain, code"):
        Corpus.packaged("cultures")


def test_the_data_are_small_and_shipped():
    root = PACKAGED.parents[1]
    for folder in ("culture", "code"):
        files = sorted((PACKAGED / folder).iterdir())
        assert "README.md" in [file.name for file in files]
        assert sum(file.stat().st_size for file in files) < 150_000
        # What .gitignore matches would be left out of the wheel without a word.
        names = [str(file) for file in files]
        done = subprocess.run(["git", "check-ignore", *names], cwd=root, capture_output=True, text=True, check=False)
        assert not done.stdout


def test_fixed_count_runs_over_code_as_plumbing():
    """The demo model never saw code: that the method runs is all that this says."""
    corpus = Corpus.packaged("code").limit(3)
    stats = record(load_model("demo"), corpus, progress=False)
    assert stats.languages == CODE
    found = identify(stats, "fixed_count", units_per_language=50, activation_bar_ratio=0.9)
    assert found.counts() == dict.fromkeys(CODE, 50)
    probability = stats.probability()
    bar = float(probability.flatten().sort().values[round(0.9 * probability.numel()) - 1])
    for k, language in enumerate(CODE):
        layer, index = found.units(language)
        assert bool((probability[k, layer, index] > bar).all())
    assert Counter(found.to_frame()["language"]) == dict.fromkeys(CODE, 50)
