import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from devices import Elsewhere, other_device
from oracle import sentence

from lens_neurons.errors import DataError, SettingError
from lens_neurons.methods import cite, identify, list_methods
from lens_neurons.methods.plnd import plnd
from lens_neurons.responses import TextResponses

SITES = {"post": (2, 30), "q": (2, 8), "k": (2, 4), "v": (2, 4), "attn_out": (2, 11)}


def made(rows: dict[str, Any], sites: Any = SITES, statistic: str = "plnd") -> TextResponses:
    return TextResponses.from_rows({k: v.float() for k, v in rows.items()}, sites=sites, statistic=statistic)


def random_rows(seed: int, counts: dict[str, int], sites: Any = SITES, ties: bool = False) -> dict[str, Any]:
    """Return importances of which a language's own part is the same on all of its documents, but for some noise."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(layers * width for layers, width in sites.values())
    rows = {}
    for code, count in counts.items():
        own = torch.rand(total, generator=generator) ** 4
        rows[code] = own + 0.05 * torch.rand(count, total, generator=generator)
        if ties:
            rows[code] = (rows[code] * 6).round()
    return rows


def slow_plnd(rows, sites, rule, eps, ffn, attention, min_share, specific):
    """Section 5 of the methods' page, one document and one unit at a time: {language: {flat unit: mean rank}}."""
    activated: dict[str, set[int]] = {code: set() for code in rows}
    ranks: dict[str, dict[int, Fraction]] = {code: {} for code in rows}
    first = 0
    for site, (layers, width) in sites.items():
        share = ffn if site in ("post", "up", "gate_pre") else attention
        for layer in range(layers):
            units = [first + layer * width + i for i in range(width)]
            for code, table in rows.items():
                chosen = []
                for document in table.tolist():
                    best_first = sorted(units, key=lambda unit: (-document[unit], unit))
                    for unit in units:
                        higher = sum(document[other] > document[unit] for other in units)
                        equal = sum(document[other] == document[unit] for other in units)
                        rank = Fraction(2 * higher + equal - 1, 2 * width * len(table))
                        ranks[code][unit] = ranks[code].get(unit, Fraction(0)) + rank
                    if rule == "threshold":
                        chosen.append({unit for unit in units if document[unit] >= eps})
                    else:
                        k = max(1, round(share * width)) if share else 0
                        chosen.append({unit for unit in best_first[:k] if document[unit] > 0})
                for unit in units:
                    hits = sum(unit in own for own in chosen)
                    if hits * 100 >= round(min_share * 100) * len(chosen):
                        activated[code].add(unit)
        first += layers * width
    found = {}
    for code in rows:
        others = [other for other in rows if other != code]
        found[code] = {
            unit: float(ranks[code][unit] - (min(ranks[other][unit] for other in others) if specific else 0))
            for unit in activated[code]
            if not specific or not any(unit in activated[other] for other in others)
        }
    return found


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"ffn": 0.3, "attention": 0.5, "min_share": 0.8},
        {"ffn": 0.0, "attention": 0.3},
        {"ffn": 0.5, "attention": 0.0, "min_share": 0.07},
        {"ffn": 1.0, "attention": 0.01},
        {"rule": "threshold", "eps": 0.4, "min_share": 0.6},
        {"rule": "threshold", "eps": 2.0},
        {"specific": False, "min_share": 0.5},
    ],
)
def test_equals_a_slow_transcription(seed: int, ties: bool, settings: dict[str, Any]):
    rows = random_rows(seed, {"en": 6, "fr": 5, "sw": 7}, ties=ties)
    full = {"rule": "top_k", "eps": None, "ffn": 0.14, "attention": 0.25, "min_share": 1.0, "specific": True} | settings
    wanted = slow_plnd({k: v.float() for k, v in rows.items()}, SITES, **full)
    found = plnd(made(rows), **settings)
    assert found.languages == ("en", "fr", "sw")
    for code, units in wanted.items():
        assert set(found.flat(code).tolist()) == set(units)
        scores = found.tables[code].score
        assert scores.tolist() == pytest.approx([units[unit] for unit in found.flat(code).tolist()], abs=1e-12)
        # Best first, ties in the order of the flat numbers.
        listed = list(zip(scores.tolist(), found.flat(code).tolist(), strict=True))
        assert listed == sorted(listed)
    assert dict(found.sites) == SITES


def test_permuting_languages_permutes_the_answer():
    rows = random_rows(3, {"en": 6, "fr": 6, "sw": 6})
    found = plnd(made(rows), min_share=0.8, ffn=0.3)
    turned = plnd(made({code: rows[code] for code in ("sw", "en", "fr")}), min_share=0.8, ffn=0.3)
    assert sum(found.counts().values()) > 5
    for code in rows:
        assert torch.equal(found.flat(code), turned.flat(code))
        assert torch.equal(found.tables[code].score, turned.tables[code].score)


def test_permuting_units_and_documents_permutes_the_answer():
    rows = random_rows(4, {"en": 6, "fr": 6}, {"post": (1, 50)})
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(50, generator=generator)
    found = plnd(made(rows, {"post": (1, 50)}), ffn=0.3, min_share=0.8)
    shuffled = {code: table[torch.randperm(6, generator=generator)][:, order] for code, table in rows.items()}
    turned = plnd(made(shuffled, {"post": (1, 50)}), ffn=0.3, min_share=0.8)
    for code in rows:
        assert len(found.flat(code))
        scores = dict(zip(found.flat(code).tolist(), found.tables[code].score.tolist(), strict=True))
        again = dict(zip(order[turned.flat(code)].tolist(), turned.tables[code].score.tolist(), strict=True))
        assert again == scores


def test_planted_units_are_found_at_every_site():
    generator = torch.Generator().manual_seed(5)
    total = sum(layers * width for layers, width in SITES.values())
    rows = {code: torch.rand(12, total, generator=generator) for code in ("de", "ja", "ta")}
    # The second neuron of layer 1, a query and a key dimension of layer 0, an output of layer 1.
    planted = [31, 62, 77, 103]
    rows["ja"][:, planted] = 3.0
    found = plnd(made(rows), ffn=0.05, attention=0.25)
    assert sorted(found.flat("ja").tolist()) == planted
    assert found.counts() == {"de": 0, "ja": 4, "ta": 0}
    table = found.to_frame()
    assert sorted(zip(table["site"], table["layer"], table["neuron"], strict=True)) == [
        ("attn_out", 1, 0),
        ("k", 0, 1),
        ("post", 1, 1),
        ("q", 0, 2),
    ]


def test_constant_and_dead_units_are_never_specific():
    rows = random_rows(6, {"en": 5, "fr": 5, "sw": 5})
    for table in rows.values():
        table[:, :10], table[:, 30:35], table[:, 60:70] = 5.0, 0.0, 0.0
    for settings in ({"ffn": 0.5}, {"ffn": 1.0, "attention": 1.0}, {"rule": "threshold", "eps": 1e-9}):
        found = plnd(made(rows), **settings, min_share=0.2)
        units = torch.cat([found.flat(code) for code in rows])
        assert not ((units < 10) | ((units >= 30) & (units < 35)) | ((units >= 60) & (units < 70))).any()
    activated = plnd(made(rows), ffn=0.5, specific=False)
    assert set(range(10)) <= set(activated.flat("sw").tolist())
    assert not set(range(30, 35)) & set(plnd(made(rows), ffn=1.0, specific=False).flat("sw").tolist())


def test_one_document_without_a_unit_is_enough():
    rows = {code: torch.full((10, 20), 0.1) for code in ("en", "fr")}
    rows["en"][:, 3], rows["en"][:, 7] = 1.0, 1.0
    rows["en"][4, 7] = 0.0
    responses = made(rows, {"post": (1, 20)})
    assert plnd(responses, rule="threshold", eps=0.5).flat("en").tolist() == [3]
    assert plnd(responses, rule="threshold", eps=0.5, min_share=0.9).flat("en").tolist() == [3, 7]
    assert plnd(responses, rule="threshold", eps=0.5, min_share=0.91).flat("en").tolist() == [3]


@pytest.mark.parametrize("documents", [7, 10, 100])
def test_shares_of_documents_are_not_lost_to_rounding(documents: int):
    for hits in range(1, documents + 1):
        rows = {"en": torch.zeros(documents, 3), "fr": torch.zeros(documents, 3)}
        rows["en"][:hits, 1] = 1.0
        found = plnd(made(rows, {"post": (1, 3)}), rule="threshold", eps=0.5, min_share=hits / documents)
        assert found.flat("en").tolist() == [1]


def test_the_released_sites_and_float16():
    sites = {"up": (1, 30), "q": (1, 8), "k": (1, 4)}
    rows = random_rows(8, {"en": 5, "fr": 5}, sites)
    released = made(rows, sites, "plnd_released")
    found = plnd(released, ffn=0.3, min_share=0.6)
    assert found.method["statistic"] == "plnd_released"
    assert found.counts()["en"] > 0
    half = TextResponses.from_rows({k: v.half() for k, v in rows.items()}, sites=sites, statistic="plnd")
    again = plnd(made({k: v.half() for k, v in rows.items()}, sites), ffn=0.3, min_share=0.6)
    assert torch.equal(plnd(half, ffn=0.3, min_share=0.6).flat("en"), again.flat("en"))


def test_importances_may_be_on_another_device():
    rows = random_rows(4, {"en": 5, "fr": 4, "sw": 6})
    for settings in ({"min_share": 0.4}, {"rule": "threshold", "eps": 0.5, "specific": False}):
        here = plnd(made(rows), **settings)
        with other_device():
            there = plnd(made({code: Elsewhere(own) for code, own in rows.items()}), **settings)
        assert len(here) > 0
        for code in rows:
            assert torch.equal(there.flat(code), here.flat(code))
            assert torch.equal(there.tables[code].score, here.tables[code].score)


def test_identify_finds_it_and_says_what_was_asked():
    rows = random_rows(9, {"en": 5, "fr": 8})
    found = identify(made(rows), method="plnd", ffn=1, min_share=0.5)
    assert found.method == {
        "name": "plnd",
        "statistic": "plnd",
        "rule": "top_k",
        "ffn": 1.0,
        "attention": 0.25,
        "min_share": 0.5,
        "specific": True,
    }
    assert found.notes == (
        "languages have 5 (en) to 8 (fr) documents; more units are important on all of few documents than on all of "
        "many",
    )
    threshold = identify(made(rows), method="plnd", rule="threshold", eps=0.3)
    assert threshold.method["eps"] == 0.3
    assert "ffn" not in threshold.method
    assert list_methods().loc["plnd", "needs"] == "importances"
    assert "2402.18815" in cite(found)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"rule": "paper"}, "'top_k' or 'threshold'"),
        ({"rule": "threshold"}, "unpublished"),
        ({"eps": 0.1}, "no meaning"),
        ({"rule": "threshold", "eps": 0.0}, "above 0"),
        ({"rule": "threshold", "eps": 0.1, "ffn": 0.0}, "ffn=0.0 has no meaning under rule='threshold'"),
        ({"rule": "threshold", "eps": 0.1, "attention": 0.3}, "attention=0.3 has no meaning"),
        ({"rule": "threshold", "eps": math.nan}, "above 0"),
        ({"rule": "threshold", "eps": math.inf}, "above 0"),
        ({"ffn": -0.1}, "ffn=-0.1"),
        ({"attention": 1.5}, "attention=1.5"),
        ({"ffn": math.nan}, "ffn=nan"),
        ({"ffn": 0.0, "attention": 0.0}, "no unit"),
        ({"min_share": 0.0}, "min_share=0.0"),
        ({"min_share": 1.2}, "min_share=1.2"),
    ],
)
def test_bad_settings_are_sentences(settings: dict[str, Any], reason: str):
    with pytest.raises(SettingError, match=reason) as caught:
        plnd(made(random_rows(0, {"en": 3, "fr": 3})), **settings)
    sentence(caught.value)


def test_bad_data_are_sentences():
    rows = random_rows(0, {"en": 3, "fr": 3})
    cases: list[tuple[TextResponses, str]] = [
        (made({"en": rows["en"]}), "at least two; record more languages"),
        (made({"en": rows["en"], "fr": rows["fr"][:1]}), "'fr' has 1 document,"),
        (made(rows, statistic="mean"), "statistic 'mean'"),
    ]
    for value in (np.nan, np.inf):
        broken = {code: table.clone() for code, table in rows.items()}
        broken["fr"][1, 5] = value
        cases.append((made(broken), "NaN or infinite"))
    for responses, reason in cases:
        with pytest.raises(DataError, match=reason) as caught:
            plnd(responses)
        sentence(caught.value)
    neurons = made({code: table[:, :60] for code, table in rows.items()}, {"post": (2, 30)})
    with pytest.raises(SettingError, match="no unit to select at post") as caught:
        plnd(neurons, ffn=0.0)
    sentence(caught.value)
