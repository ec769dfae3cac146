import gzip
import json
import unicodedata
from types import SimpleNamespace

import pytest

from lens_neurons import corpus as corpus_module
from lens_neurons.corpus import Corpus
from lens_neurons.errors import DataError, SettingError
from lens_neurons.languages import DEMO_LANGUAGES


def test_the_packaged_corpus_is_parallel_and_clean():
    corpus = Corpus.packaged("all")
    assert corpus.languages == DEMO_LANGUAGES
    for code in corpus.languages:
        texts = list(corpus.texts(code))
        assert len(texts) == 150 == corpus.count(code)
        assert len(set(texts)) == 150, code
        for text in texts:
            assert text == text.strip() == unicodedata.normalize("NFC", text)
            assert text


def test_the_parts_are_disjoint():
    identify, held_out = Corpus.packaged(), Corpus.packaged("held_out")
    for code in DEMO_LANGUAGES:
        assert (identify.count(code), held_out.count(code)) == (120, 30)
        assert not set(identify.texts(code)) & set(held_out.texts(code))


def test_an_unknown_part_is_a_sentence():
    with pytest.raises(SettingError, match="part='test' is unknown"):
        Corpus.packaged("test")


def test_texts_are_restartable_and_languages_canonical():
    corpus = Corpus.from_texts({"eng_Latn": ["a", "b"], "python": ["x = 1"]})
    assert corpus.languages == ("en", "python")
    assert list(corpus.texts("en")) == list(corpus.texts("en")) == ["a", "b"]
    with pytest.raises(DataError, match="has no 'fr'"):
        corpus.texts("fr")


@pytest.mark.parametrize(
    ("texts", "message"),
    [({"en": []}, "has no text"), ({"en": "abc"}, "is one string"), ({"en": ["a"], "eng_Latn": ["b"]}, "twice")],
)
def test_bad_texts_are_refused(texts, message):
    with pytest.raises(DataError, match=message):
        Corpus.from_texts(texts)


def test_slices_change_the_fingerprint_and_split_covers_all():
    corpus = Corpus.from_texts({"en": list("abcde")})
    first, rest = corpus.split(2)
    assert [*first.texts("en"), *rest.texts("en")] == list("abcde")
    assert (first.count("en"), rest.count("en")) == (2, 3)
    assert len({c.fingerprint("en") for c in (corpus, first, rest, corpus.limit(3))}) == 4
    assert corpus.fingerprint_all() == Corpus.from_texts({"en": list("abcde")}, name="other").fingerprint_all()


def test_files_plain_and_gzipped(tmp_path):
    (tmp_path / "en.txt").write_text("one\n\n two \n")
    with gzip.open(tmp_path / "th.txt.gz", "wt", encoding="utf-8") as stream:
        stream.write("สวัสดี\n")
    corpus = Corpus.from_files(tmp_path)
    assert {code: list(corpus.texts(code)) for code in corpus.languages} == {"en": ["one", "two"], "th": ["สวัสดี"]}
    before = corpus.fingerprint("en")
    (tmp_path / "en.txt").write_text("one\nthree\n")
    assert Corpus.from_files(tmp_path).fingerprint("en") != before
    with pytest.raises(DataError, match="does not exist"):
        Corpus.from_files({"fr": tmp_path / "fr.txt"})
    with pytest.raises(DataError, match=r"holds no \{language\}"):
        Corpus.from_files(tmp_path / "empty")


def test_datasets_json_gzipped_and_plain(tmp_path):
    for code, opener in (("en", open), ("fr", gzip.open)):
        name = tmp_path / f"{code}.jsonl{'.gz' if opener is gzip.open else ''}"
        with opener(name, "wt") as stream:
            stream.write("".join(json.dumps({"id": i, "sentence": f"{code} {i}"}) + "\n" for i in range(4)))
    files = {"en": str(tmp_path / "en.jsonl"), "fr": str(tmp_path / "fr.jsonl.gz")}
    corpus = Corpus.from_dataset("json", data_files=files, field="sentence", limit=3)
    assert list(corpus.texts("fr")) == ["fr 0", "fr 1", "fr 2"]
    with pytest.raises(DataError, match="no column 'text'"):
        list(Corpus.from_dataset("json", data_files=files).texts("en"))
    with pytest.raises(DataError, match="needs languages"):
        Corpus.from_dataset("json")
    with pytest.raises(SettingError, match="preset='x' is unknown"):
        Corpus.from_dataset("json", data_files=files, preset="x")


def test_files_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "en.txt").write_bytes(b"fine\n\xff\xfe\n")
    with pytest.raises(DataError, match=r"en\.txt cannot be read"):
        Corpus.from_files(tmp_path)
    whole = gzip.compress("\n".join(map(str, range(5000))).encode())
    (tmp_path / "en.txt").unlink()
    (tmp_path / "fr.txt.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"fr\.txt\.gz cannot be read"):
        Corpus.from_files(tmp_path)
    (tmp_path / "fr.txt.gz").write_bytes(whole[:200] + bytes([whole[200] ^ 255]) + whole[201:])
    with pytest.raises(DataError, match=r"fr\.txt\.gz cannot be read"):
        Corpus.from_files(tmp_path)
    missing = Corpus.from_dataset("json", data_files={"en": str(tmp_path / "gone.jsonl")})
    with pytest.raises(DataError, match=r"gone\.jsonl cannot be read as a data set"):
        list(missing.texts("en"))


def test_empty_lines_count_neither_in_files_nor_in_data_sets(tmp_path):
    (tmp_path / "en.txt").write_text("one\n\ntwo\n \nthree\n", encoding="utf-8")
    made = Corpus.from_files(tmp_path)
    assert (made.count("en"), list(made.texts("en"))) == (3, ["one", "two", "three"])
    rows = Corpus.from_dataset("text", data_files={"en": str(tmp_path / "en.txt")}, limit=2)
    assert list(rows.texts("en")) == ["one", "two"]


def test_the_files_behind_a_pattern_are_part_of_the_fingerprint(tmp_path):
    pattern = {"en": str(tmp_path / "*.txt")}
    prints = set()
    for content in ("one", "two"):
        (tmp_path / "a.txt").write_text(content, encoding="utf-8")
        prints.add(Corpus.from_dataset("text", data_files=pattern).fingerprint("en"))
    assert len(prints) == 2


def test_the_files_of_a_local_data_set_are_part_of_the_fingerprint(tmp_path, monkeypatch):
    (tmp_path / "set").mkdir()
    prints = set()
    for content in ("one", "two"):
        (tmp_path / "set" / "a.txt").write_text(content, encoding="utf-8")
        for name in ("a.txt", "b.txt"):
            made = Corpus.from_dataset(str(tmp_path / "set"), data_files={"en": name})
            prints.add(made.fingerprint("en"))
    assert len(prints) == 4
    # A folder that bears the name of a kind of file is not what is read.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").mkdir()
    mine = {Corpus.from_dataset("text", data_files={"en": f"set/{name}"}).fingerprint("en") for name in ("a.txt", "b")}
    assert len(mine) == 2


class UnreachableHub:
    def dataset_info(self, path, timeout):
        raise ConnectionError(path)


def test_a_data_set_on_the_hub_is_kept_to_one_commit(monkeypatch):
    asked = []
    monkeypatch.setattr(corpus_module, "load_rows", lambda chosen: asked.append(chosen["revision"]) or iter(()))
    prints = []
    for commit in ("one", "two"):
        newest = SimpleNamespace(dataset_info=lambda _, timeout, commit=commit: SimpleNamespace(sha=commit))
        monkeypatch.setattr(corpus_module, "HfApi", lambda newest=newest: newest)
        made = Corpus.from_dataset("some/set", languages=["en"])
        assert list(made.texts("en")) == []
        prints.append(made.fingerprint("en"))
        pinned = Corpus.from_dataset("some/set", languages=["en"], revision="mine")
        assert list(pinned.texts("en")) == []
        prints.append(pinned.fingerprint("en"))
    assert asked == ["one", "mine", "two", "mine"]
    assert prints[0] != prints[2]
    assert prints[1] == prints[3]


@pytest.mark.parametrize(
    ("preset", "split", "expected"),
    [("flores+", None, "dev"), ("flores+", "train", "train"), ("flores+", "devtest", "devtest"), (None, None, "train")],
)
def test_an_explicit_split_wins_over_the_preset(monkeypatch, preset, split, expected):
    asked = []
    monkeypatch.setattr(corpus_module, "load_rows", lambda chosen: asked.append(chosen["split"]) or iter(()))
    monkeypatch.setattr(corpus_module, "HfApi", UnreachableHub)
    made = Corpus.from_dataset("openlanguagedata/flores_plus", languages=["en"], preset=preset, split=split)
    assert list(made.texts("en")) == []
    assert asked == [expected]


def test_flores_and_ntrex_from_shared_data(shared):
    folder = shared / "data"
    flores = Corpus.from_dataset(
        "json", languages=["en", "sw"], data_files=str(folder / "eval/flores/{code}.jsonl.gz"), field="text"
    )
    rows = list(flores.texts("sw"))
    assert len(rows) == 1012
    ntrex = Corpus.from_dataset(
        "text", languages=["ms"], data_files=str(folder / "parallel/ntrex128/{code}.txt.gz"), limit=10
    )
    assert len(list(ntrex.texts("ms"))) == 10
