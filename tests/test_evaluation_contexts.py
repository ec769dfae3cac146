"""The strongest tokens of a unit against a plain loop over texts, and how they are shown."""

import pandas as pd
import pytest
import torch
from evaluation_oracle import tiny_model
from models import SAMPLE_TEXTS
from oracle import hf_sites, sentence

from lens_neurons.corpus import Corpus
from lens_neurons.errors import DataError, ModelError, SettingError, StorageError
from lens_neurons.evaluation.contexts import TopTexts, top_texts

TEXTS = {"en": [*SAMPLE_TEXTS[:4]], "ja": [*SAMPLE_TEXTS[5:7]], "th": [SAMPLE_TEXTS[8]]}
UNIT = (1, 7)


def plain(arch: str, site: str, *, bos: bool = True) -> dict[str, list[tuple[float, int, int]]]:
    """Return (value, text, position) of every real token, by language, the strongest first."""
    tiny, _, _ = tiny_model(arch, add_bos=True)
    found: dict[str, list[tuple[float, int, int]]] = {}
    for code, texts in TEXTS.items():
        for number, text in enumerate(texts):
            ids = tiny.tokenizer(text, add_special_tokens=False)["input_ids"]
            row = [tiny.tokenizer.bos_token_id, *ids] if bos else ids
            sites = hf_sites(arch, tiny.hf_model, row)
            values = sites["gate_pre" if site == "gate_act" else site][UNIT[0]][:, UNIT[1]]
            if site == "gate_act":
                values = torch.nn.functional.silu(values)
            places = range(int(bos), len(row))
            found.setdefault(code, []).extend((float(values[i]), number, i) for i in places)
    return {code: sorted(rows, key=lambda row: (-row[0], row[1], row[2])) for code, rows in found.items()}


@pytest.mark.parametrize(("arch", "site"), [("llama", "gate_act"), ("llama", "up"), ("llama", "q"), ("gpt2", "post")])
def test_the_strongest_tokens(arch: str, site: str) -> None:
    _, model, _ = tiny_model(arch, add_bos=True)
    found = top_texts(model, Corpus.from_texts(TEXTS), UNIT, 3, site=site, batch_tokens=60)
    expected = plain(arch, site)
    for code, rows in expected.items():
        mine = found.of(code)
        assert mine["value"].tolist() == pytest.approx([value for value, _, _ in rows[:3]], abs=1e-5)
        assert list(zip(mine["text"], mine["position"], strict=True)) == [(text, at) for _, text, at in rows[:3]]
        assert mine["rank"].tolist() == [0, 1, 2]
        summary = found.summary().loc[code]
        values = [value for value, _, _ in rows]
        assert summary["n"] == len(values)
        assert summary["positive"] == pytest.approx(sum(value > 0 for value in values) / len(values))
        assert summary["mean"] == pytest.approx(sum(values) / len(values), abs=1e-5)
        assert summary["max"] == pytest.approx(max(values), abs=1e-5)


def test_one_token_a_text() -> None:
    _, model, _ = tiny_model(add_bos=True)
    found = top_texts(model, Corpus.from_texts(TEXTS), UNIT, 10, one_per_text=True)
    best: dict[int, float] = {}
    for value, text, _ in plain("llama", "gate_act")["en"]:
        best.setdefault(text, value)
    mine = found.of("en")
    assert dict(zip(mine["text"], mine["value"], strict=True)) == pytest.approx(best, abs=1e-5)
    assert mine["value"].is_monotonic_decreasing


def test_before_token_and_after_are_the_text() -> None:
    _, model, _ = tiny_model(add_bos=True)
    found = top_texts(model, Corpus.from_texts(TEXTS), UNIT, 500, window=1000)
    assert len(found.of("th")) == found.summary().loc["th", "n"]
    for row in found.items.itertuples():
        assert row.before + row.token + row.after == TEXTS[row.language][row.text]
        # Bytes of one character are several tokens here: it is shown whole.
        assert row.token
        assert "\ufffd" not in row.token
    assert any(" " in token for token in found.of("en")["token"])


def test_the_window_is_in_tokens() -> None:
    tiny, model, _ = tiny_model(add_bos=True)
    found = top_texts(model, Corpus.from_texts({"en": TEXTS["en"]}), UNIT, 5, window=2)
    for row in found.items.itertuples():
        ids = [
            tiny.tokenizer.bos_token_id,
            *tiny.tokenizer(TEXTS["en"][row.text], add_special_tokens=False)["input_ids"],
        ]
        assert row.token == tiny.tokenizer.decode(ids[row.position : row.position + 1])
        assert row.before == tiny.tokenizer.decode(ids[max(1, row.position - 2) : row.position])
        assert row.after == tiny.tokenizer.decode(ids[row.position + 1 : row.position + 3])


def test_ties_go_to_the_first_in_the_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    _, model, adapter = tiny_model(add_bos=True)
    monkeypatch.setattr(type(adapter), "act_fn", lambda self, x: torch.zeros_like(x))
    monkeypatch.setattr(type(adapter), "probe", lambda self, sites: None)
    found = top_texts(model, Corpus.from_texts(TEXTS), UNIT, 4, batch_tokens=40).of("en")
    assert list(zip(found["text"], found["position"], strict=True)) == [(0, 1), (0, 2), (0, 3), (0, 4)]


def test_save_and_load(tmp_path) -> None:
    _, model, _ = tiny_model(add_bos=True)
    found = top_texts(model, Corpus.from_texts(TEXTS), UNIT, 3)
    path = tmp_path / "top.json"
    found.save(path)
    again = TopTexts.load(path)
    pd.testing.assert_frame_equal(again.items, found.items)
    pd.testing.assert_frame_equal(again.summary(), found.summary())
    assert (again.layer, again.index, again.site, again.corpus) == (*UNIT, "gate_act", "texts")
    assert again.provenance == found.provenance
    assert again.languages == ("en", "ja", "th")
    path.write_text(path.read_text().replace('"texts"', '"other"', 1))
    with pytest.raises(StorageError, match="checksum"):
        TopTexts.load(path)
    assert "layer 1 unit 7" in repr(found)


def test_wrong_arguments() -> None:
    _, model, adapter = tiny_model(add_bos=True)
    corpus = Corpus.from_texts(TEXTS)
    for arguments, error in (
        ({"unit": (adapter.n_layers, 0)}, SettingError),
        ({"unit": (0, adapter.d_mlp)}, SettingError),
        ({"unit": (-1, 0)}, SettingError),
        ({"unit": UNIT, "k": 0}, SettingError),
        ({"unit": UNIT, "site": "nowhere"}, SettingError),
        ({"unit": UNIT, "languages": ["de"]}, DataError),
    ):
        with pytest.raises(error) as caught:
            top_texts(model, corpus, **arguments)
        sentence(caught.value)
    with pytest.raises(ModelError):
        top_texts(tiny_model("gpt2", add_bos=True)[1], corpus, UNIT, site="up")
