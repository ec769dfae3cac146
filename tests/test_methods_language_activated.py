import math

import numpy as np
import pytest
import torch

from lens_neurons.activation_stats import ActivationStats
from lens_neurons.errors import DataError, LensNeuronsError, SettingError
from lens_neurons.methods import cite, collect_for, identify
from lens_neurons.responses import TextResponses
from lens_neurons.storage import Provenance

SITES = {"up": (2, 3), "gate_act": (3, 7)}
LANGUAGES = ("en", "fr", "sw")


def make_rows(seed: int = 0) -> dict[str, np.ndarray]:
    """Responses [text unit] at both sites; gate_act (1, 2) is always on in Swahili, (2, 6) in all, (0, 1) never."""
    rng = np.random.default_rng(seed)
    rows = {code: rng.normal(1.2, 1.0, size=(n, 27)) for code, n in zip(LANGUAGES, (9, 6, 7))}
    for code, table in rows.items():
        table[:, 6 + 7 + 2] = np.abs(table[:, 15]) * (1 if code == "sw" else -1)
        table[:, 6 + 14 + 6] = 0.4
        table[:, 6 + 1] = 0.0
    return rows


def make_responses(rows: dict[str, np.ndarray], dtype: torch.dtype = torch.float32, **changes) -> TextResponses:
    tables = {code: torch.from_numpy(table).to(dtype) for code, table in rows.items()}
    return TextResponses.from_rows(tables, sites=SITES, **changes)


def slow(rows: dict[str, np.ndarray], texts: int, first: int, shape: tuple[int, int]) -> dict[str, list]:
    found: dict[str, list] = {}
    for code, table in rows.items():
        ranked = []
        for layer in range(shape[0]):
            for neuron in range(shape[1]):
                values = [np.float32(table[text][first + layer * shape[1] + neuron]) for text in range(texts)]
                if all(value > 0 for value in values):
                    ranked.append((-float(min(values)), layer, neuron))
        found[code] = sorted(ranked)
    return found


def as_lists(neurons) -> dict[str, list]:
    return {
        code: list(zip(table.score.tolist(), table.layer.tolist(), table.index.tolist()))
        for code, table in neurons.tables.items()
    }


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("texts", [1, 4, 6])
def test_equals_a_slow_transcription(seed, texts):
    rows = make_rows(seed)
    responses = make_responses(rows, provenance=Provenance(model="m", n_layers=3, d_mlp=7, site="up+gate_act"))
    found = identify(responses, "language_activated", texts=texts)
    assert as_lists(found) == slow(rows, texts, 6, (3, 7))
    assert (found.site, found.shape, found.provenance.site, found.provenance.d_mlp) == (
        "gate_act",
        (3, 7),
        "gate_act",
        7,
    )
    other = identify(responses, "language_activated", texts=texts, site="up")
    assert as_lists(other) == slow(rows, texts, 0, (2, 3))
    assert (other.site, other.provenance.d_mlp) == ("up", 3)


def test_blocks_and_files_change_nothing(monkeypatch, tmp_path):
    responses = make_responses(make_rows(1))
    whole = as_lists(identify(responses, "language_activated", texts=5))
    monkeypatch.setattr("lens_neurons.methods.language_activated._BLOCK", 20)
    assert as_lists(identify(responses, "language_activated", texts=5)) == whole
    responses.save(tmp_path / "r.safetensors")
    loaded = TextResponses.load(tmp_path / "r.safetensors")
    assert as_lists(identify(loaded, "language_activated", texts=5)) == whole


def test_the_first_texts_are_those_of_the_corpus():
    rows = make_rows(2)
    shuffled = {code: np.random.default_rng(0).permutation(len(table)) for code, table in rows.items()}
    moved = {code: rows[code][order] for code, order in shuffled.items()}
    positions = {code: torch.from_numpy(order) for code, order in shuffled.items()}
    responses = make_responses(moved, positions=positions)
    assert as_lists(identify(responses, "language_activated", texts=4)) == slow(rows, 4, 6, (3, 7))


def test_planted_units():
    responses = make_responses(make_rows())
    found = identify(responses, "language_activated", texts=6)
    own = {code: found.mask(code) for code in LANGUAGES}
    assert [bool(own[code][1, 2]) for code in LANGUAGES] == [False, False, True]
    # Without exclusivity a unit that is always on is everybody's; with it, it is nobody's. A dead one is never taken.
    assert all(mask[2, 6] for mask in own.values())
    assert not any(mask[0, 1] for mask in own.values())
    alone = identify(responses, "language_activated", texts=6, exclusive=True)
    assert alone.mask("sw")[1, 2]
    assert not alone.union_mask()[2, 6]
    for code in LANGUAGES:
        others = torch.stack([own[other] for other in LANGUAGES if other != code]).any(dim=0)
        assert torch.equal(alone.mask(code), own[code] & ~others)
    assert alone.method["exclusive"]


def test_order_of_languages_and_neurons_and_half_precision():
    rows = make_rows(3)
    found = as_lists(identify(make_responses(rows), "language_activated", texts=5))
    again = as_lists(identify(make_responses(rows).select(["sw", "en", "fr"]), "language_activated", texts=5))
    assert again == found
    assert list(again) == ["sw", "en", "fr"]
    order = np.concatenate(
        [np.arange(6), 6 + np.concatenate([7 * k + np.random.default_rng(k).permutation(7) for k in range(3)])]
    )
    moved = identify(
        make_responses({code: table[:, order] for code, table in rows.items()}), "language_activated", texts=5
    )
    for code in LANGUAGES:
        back = {divmod(int(order[6 + 7 * layer + neuron]) - 6, 7) for _, layer, neuron in as_lists(moved)[code]}
        assert back == {(layer, neuron) for _, layer, neuron in found[code]}
    half = identify(make_responses(rows, torch.float16), "language_activated", texts=5)
    assert {code: {entry[1:] for entry in own} for code, own in as_lists(half).items()} == {
        code: {entry[1:] for entry in own} for code, own in found.items()
    }


def test_bad_input_is_a_sentence():
    rows = make_rows()
    responses = make_responses(rows)
    broken = {code: table.copy() for code, table in rows.items()}
    broken["fr"][2, 20] = math.nan
    endless = {code: table.copy() for code, table in rows.items()}
    endless["sw"][1, 20] = math.inf
    cases = [
        (SettingError, "texts=0", responses, {"texts": 0}),
        (SettingError, "must be a whole number", responses, {"texts": 2.5}),
        (DataError, "'fr' 6, 'sw' 7", responses, {"texts": 8}),
        (DataError, "'fr' 6", responses, {"texts": 7}),
        (DataError, "texts=100", responses, {}),
        (DataError, "at 'post' were not recorded; there are those at up, gate_act", responses, {"site": "post"}),
        (DataError, "'plnd'", make_responses(rows, statistic="plnd"), {"texts": 2}),
        (DataError, "NaN", make_responses(broken), {"texts": 3}),
        (DataError, "'sw' at 'gate_act' are NaN or infinite", make_responses(endless), {"texts": 3}),
        (DataError, "needs responses", _counts(), {}),
    ]
    for kind, message, data, settings in cases:
        with pytest.raises(kind, match=message) as caught:
            identify(data, "language_activated", **settings)
        assert isinstance(caught.value, LensNeuronsError)
        assert str(caught.value).endswith(".")
    # What lies beyond the texts that are looked at does not matter.
    assert identify(make_responses(broken), "language_activated", texts=2).languages == LANGUAGES


def _counts() -> ActivationStats:
    return ActivationStats.from_counts({"en": 2, "fr": 2}, {code: torch.ones(1, 2).long() for code in ("en", "fr")})


def test_one_language_is_enough():
    found = identify(make_responses(make_rows()).select(["sw"]), "language_activated", texts=6)
    assert found.languages == ("sw",)
    assert found.mask("sw")[1, 2]


def test_the_registry_knows_what_to_record():
    assert collect_for(["language_activated"]).responses == ("gate_act",)
    assert "2507.22581" in cite("language_activated")
