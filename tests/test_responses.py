"""Tests of text responses: selection, quantiles, merging, files; and of whole recordings."""

import math

import numpy as np
import pytest
import torch
from oracle import sentence

from lens_neurons.activation_stats import ActivationStats
from lens_neurons.errors import DataError, LensNeuronsError, ProvenanceError, SettingError, StorageError
from lens_neurons.recorded import Recording
from lens_neurons.responses import TextResponses
from lens_neurons.storage import Provenance

SITES = {"q": (2, 3), "gate_pre": (2, 5)}
N = 16
COUNTS = {"en": 5, "de": 4, "C/C++": 1}


def tables(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {code: torch.randn(n, N, generator=generator) for code, n in COUNTS.items()}


def make(seed: int = 0, **changes) -> TextResponses:
    return TextResponses.from_rows(tables(seed), sites=SITES, **changes)


def test_rows_come_by_language_and_flat_unit():
    made, wanted = make(), tables()
    assert made.n_units == N
    assert made.counts() == COUNTS
    assert made.span("gate_pre") == (6, 16)
    for code, table in wanted.items():
        assert torch.equal(made.rows(code), table)
        assert torch.equal(made.rows(code, 4, 9), table[:, 4:9])
    assert made.labels().tolist() == [0] * 5 + [1] * 4 + [2]


@pytest.mark.parametrize("size", [1, 3, 7, 16, 100])
def test_blocks_of_any_size_are_the_same_table(size):
    made = make()
    found = list(made.blocks(size))
    assert [first for first, _ in found] == list(range(0, N, size))
    assert torch.equal(torch.cat([part for _, part in found], dim=1), torch.cat(list(tables().values())))


def test_quantiles_are_numpys():
    made = make()
    for q in (0.0, 0.1, 0.5, 0.9, 1.0):
        expected = np.quantile(tables()["de"].numpy()[:, 6:], q, axis=0).reshape(2, 5)
        np.testing.assert_allclose(made.quantile("de", q, "gate_pre"), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(made.median("C/C++", "q"), tables()["C/C++"][0, :6].reshape(2, 3))


def test_one_site_and_some_texts():
    made = make(provenance=Provenance(model="m", weights="w", n_layers=2, d_mlp=5, site="q+gate_pre"))
    one = made.at("gate_pre")
    assert (one.provenance.site, one.provenance.d_mlp, dict(one.sites)) == ("gate_pre", 5, {"gate_pre": (2, 5)})
    assert torch.equal(one.rows("en"), tables()["en"][:, 6:])
    swapped = made.only("gate_pre", "q")
    assert torch.equal(swapped.rows("en"), tables()["en"][:, [*range(6, 16), *range(6)]])
    some = made.texts({"en": [3, 1], "de": torch.tensor([0])})
    assert some.positions("en").tolist() == [3, 1]
    assert torch.equal(some.rows("en"), tables()["en"][[3, 1]])
    assert made.select(["de"]).languages == ("de",)


def test_merging_languages_and_further_texts():
    made = make()
    more = TextResponses.from_rows(
        {"de": torch.ones(2, N), "fr": torch.zeros(1, N)},
        sites=SITES,
        positions={"de": torch.tensor([10, 11]), "fr": torch.tensor([0])},
    )
    both = made.merge(more)
    assert both.counts() == {"en": 5, "de": 6, "C/C++": 1, "fr": 1}
    assert torch.equal(both.rows("de"), torch.cat([tables()["de"], torch.ones(2, N)]))
    for wrong in (make(), TextResponses.from_rows({"fr": torch.zeros(1, 6)}, sites={"q": (2, 3)}), make(statistic="x")):
        with pytest.raises(DataError) as caught:
            made.merge(wrong)
        sentence(caught.value)
    one = make(provenance=Provenance(model="m", weights="1"))
    other = TextResponses.from_rows(
        {"fr": torch.zeros(1, N)}, sites=SITES, provenance=Provenance(model="m", weights="2")
    )
    with pytest.raises(ProvenanceError):
        one.merge(other)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_saved_and_loaded(tmp_path, dtype):
    made = TextResponses.from_rows({code: table.to(dtype) for code, table in tables().items()}, sites=SITES)
    made.save(tmp_path / "r.safetensors")
    loaded = TextResponses.load(tmp_path / "r.safetensors")
    assert repr(loaded) == repr(made)
    assert list(loaded.sites) == list(SITES)
    for code in COUNTS:
        assert torch.equal(loaded.rows(code), made.rows(code))
        assert loaded.rows(code).dtype == dtype
    (tmp_path / "r.safetensors").write_bytes(b"1234567890")
    with pytest.raises(StorageError):
        TextResponses.load(tmp_path / "r.safetensors")


@pytest.mark.parametrize(
    "call",
    [
        lambda made: made.rows("xx"),
        lambda made: made.span("up"),
        lambda made: made.median("en"),
        lambda made: made.quantile("en", 1.5, "q"),
        lambda made: made.select(["xx"]),
        lambda made: list(made.blocks(0)),
        lambda made: TextResponses.from_rows({"en": torch.zeros(2, 3)}, sites=SITES),
        lambda made: TextResponses.from_rows({"en": torch.zeros(0, N)}, sites=SITES),
        lambda made: TextResponses.from_rows({}, sites=SITES),
        lambda made: TextResponses.from_rows({"en": torch.zeros(2, N), "english": torch.zeros(2, N)}, sites=SITES),
        lambda made: TextResponses.from_rows(
            {"en": torch.zeros(2, N)}, sites=SITES, positions={"en": torch.zeros(3, dtype=torch.int64)}
        ),
        lambda made: made.only(),
        lambda made: made.select([]),
        lambda made: Recording(),
        lambda made: Recording(responses=made).part("stats", "lape"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(call):
    with pytest.raises(LensNeuronsError) as caught:
        call(make())
    assert isinstance(caught.value, DataError | SettingError)
    sentence(caught.value)


def stats_of(*languages: str) -> ActivationStats:
    counts = {code: torch.arange(10).reshape(2, 5) for code in languages}
    return ActivationStats.from_counts(tokens=dict.fromkeys(languages, 20), positive=counts)


def test_a_recording_is_saved_loaded_selected_and_merged(tmp_path):
    languages = tuple(COUNTS)
    made = Recording(stats_of(*languages), make(), make(1, statistic="plnd"))
    made.save(tmp_path / "r")
    loaded = Recording.load(tmp_path / "r", verify=True)
    assert repr(loaded) == repr(made)
    assert loaded.languages == languages
    for code in languages:
        assert torch.equal(loaded.importances.rows(code), made.importances.rows(code))
    assert ActivationStats.load(tmp_path / "r").languages == languages
    assert loaded.select(["de", "en"]).languages == ("de", "en")
    other = Recording(
        stats_of("fr"),
        TextResponses.from_rows({"fr": torch.zeros(2, N)}, sites=SITES),
        TextResponses.from_rows({"fr": torch.zeros(2, N)}, sites=SITES, statistic="plnd"),
    )
    merged = loaded.merge(other)
    assert merged.languages == (*languages, "fr")
    assert merged.responses.counts()["fr"] == 2
    with pytest.raises(DataError) as caught:
        made.merge(Recording(stats_of("fr")))
    sentence(caught.value)
    with pytest.raises(StorageError) as caught:
        Recording.load(tmp_path)
    sentence(caught.value)
    with pytest.raises(StorageError, match="something already") as caught:
        made.save(tmp_path / "r")
    sentence(caught.value)


def test_parts_of_a_recording_belong_together():
    with pytest.raises(DataError) as caught:
        Recording(stats_of("en"), make())
    sentence(caught.value)
    one = make(provenance=Provenance(model="m", weights="1"))
    with pytest.raises(ProvenanceError):
        Recording(responses=one, importances=make(provenance=Provenance(model="m", weights="2")))


def test_further_texts_of_a_language_are_those_of_another_corpus():
    parts = [
        TextResponses.from_rows({"en": torch.full((2, N), float(i))}, sites=SITES, corpora={"en": name})
        for i, name in enumerate(("news", "wiki"))
    ]
    both = parts[0].merge(parts[1])
    assert both.counts() == {"en": 4}
    assert both.rows("en")[:, 0].tolist() == [0, 0, 1, 1]
    with pytest.raises(DataError) as caught:
        both.merge(parts[1])
    sentence(caught.value)


def test_rows_are_taken_lazily_and_in_the_order_asked_for(tmp_path):
    generator = torch.Generator().manual_seed(0)
    more = TextResponses.from_rows({"en": torch.randn(3, N, generator=generator)}, sites=SITES, corpora={"en": "b"})
    both = make().select(["en"]).merge(more)
    whole = both.rows("en")
    for wanted in ([0, 7, 3, 6, 1], [7], list(range(8)), [4, 5, 4]):
        some = both.texts({"en": wanted})
        assert torch.equal(some.rows("en"), whole[wanted])
        assert torch.equal(some.rows("en", 2, 5), whole[wanted, 2:5])
        again = some.texts({"en": list(range(len(wanted)))[::-1]})
        assert torch.equal(again.rows("en"), whole[wanted[::-1]])
    for wrong in ([8], [-1]):
        with pytest.raises(DataError) as caught:
            both.texts({"en": wrong})
        sentence(caught.value)


def test_rows_stay_in_their_files_until_they_are_read(tmp_path):
    made = Recording(stats_of(*COUNTS), make())
    made.save(tmp_path / "r")
    loaded = Recording.load(tmp_path / "r")
    assert math.isclose(float(loaded.responses.rows("en", 0, 1)[0, 0]), float(tables()["en"][0, 0]))
    for file in (tmp_path / "r" / "responses").iterdir():
        file.unlink()
    with pytest.raises(StorageError) as caught:
        loaded.responses.rows("en")
    sentence(caught.value)
