"""Tests of sets over several sites and with kinds: flat numbers, selection, algebra, controls, files."""

import itertools

import pytest
import torch
from oracle import sentence

from lens_neurons.errors import DataError, LensNeuronsError
from lens_neurons.neurons import NeuronSet
from lens_neurons.storage import Provenance

SITES = {"q": (2, 3), "gate_pre": (2, 5), "up": (2, 5)}
# Every unit by its flat number, written out.
UNITS = [
    (site, layer, index)
    for site, (layers, width) in SITES.items()
    for layer, index in itertools.product(range(layers), range(width))
]
CHOSEN = {"en": [25, 3, 7], "de": [7, 12, 0, 17], "fr": []}
KINDS = {"en": ["top", "bottom", "top"], "de": ["bottom", "top", "top", "bottom"], "fr": []}


def make(chosen=CHOSEN, kinds=KINDS, **changes) -> NeuronSet:
    units = {code: torch.tensor(own, dtype=torch.int64) for code, own in chosen.items()}
    scores = {code: torch.arange(len(own), dtype=torch.float64) for code, own in chosen.items()}
    return NeuronSet.from_units(units, sites=SITES, scores=scores, kinds=kinds, **changes)


def listed(neurons: NeuronSet) -> dict[str, list[tuple[str, int, int]]]:
    frame = neurons.to_frame()
    return {
        code: [
            (site, int(layer), int(index))
            for site, layer, index in frame.loc[frame["language"] == code, ["site", "layer", "neuron"]].to_numpy()
        ]
        for code in neurons.languages
    }


def test_flat_numbers_are_sites_then_layers_then_indices():
    made = make()
    assert made.n_units == len(UNITS) == 26
    assert listed(made) == {code: [UNITS[i] for i in own] for code, own in CHOSEN.items()}
    assert {code: made.flat(code).tolist() for code in made.languages} == CHOSEN
    assert made.to_frame().query("language == 'de'")["kind"].tolist() == KINDS["de"]
    assert len(made) == 6
    assert made.by_layer()["de"].tolist() == [3, 1]
    assert made.summary().loc["de", "share"] == 4 / 26
    assert made.overlap("count").loc["en", "de"] == 1


def test_one_site_of_several():
    made = make(provenance=Provenance(model="m", weights="w", n_layers=2, d_mlp=5, site="q+gate_pre+up"))
    one = made.at("gate_pre")
    assert listed(one) == {"en": [UNITS[7]], "de": [UNITS[7], UNITS[12]], "fr": []}
    assert (one.site, one.shape, one.provenance.site) == ("gate_pre", (2, 5), "gate_pre")
    assert one.mask("de").nonzero().tolist() == [[0, 1], [1, 1]]
    assert made.at("q").provenance.d_mlp == 3
    for call in (
        lambda: made.mask("en"),
        lambda: made.shape,
        lambda: made.units("en"),
        lambda: made.union_mask(),
        lambda: made.at("v"),
    ):
        with pytest.raises(DataError) as caught:
            call()
        sentence(caught.value)


def test_the_neurons_behind_units():
    # Unit 7 is gate_pre of neuron 1 in layer 0, unit 17 up of the same; 25 is up of neuron 4 in layer 1.
    assert UNITS[17] == ("up", 0, 1)
    made = make().as_neurons()
    assert made.site == "gate_act"
    assert listed(made) == {
        "en": [("gate_act", 1, 4), ("gate_act", 0, 1)],
        "de": [("gate_act", 0, 1), ("gate_act", 1, 1)],
        "fr": [],
    }
    assert [len(table.score) for table in made.tables.values()] == [2, 2, 0]
    only_attention = NeuronSet.from_units({"en": torch.tensor([0])}, sites={"q": (2, 3)})
    with pytest.raises(DataError) as caught:
        only_attention.as_neurons()
    sentence(caught.value)


def test_kinds():
    made = make()
    assert made.kinds == ("top", "bottom")
    assert {code: made.of_kind("top").flat(code).tolist() for code in CHOSEN} == {
        "en": [25, 7],
        "de": [12, 0],
        "fr": [],
    }
    both = made.of_kind("top", "bottom")
    assert listed(both) == listed(made)
    with pytest.raises(DataError) as caught:
        made.of_kind("middle")
    sentence(caught.value)
    masks = {"en": torch.tensor([[True, True, False]]), "de": torch.tensor([[False, True, False]])}
    kinds = {"specific": torch.tensor([[True, False, False]]), "related": torch.tensor([[False, True, False]])}
    from_masks = NeuronSet.from_masks(masks, kinds={**kinds, "general": torch.zeros(1, 3, dtype=torch.bool)})
    assert from_masks.kinds == ("specific", "related", "general")
    assert from_masks.of_kind("general").counts() == {"en": 0, "de": 0}
    assert from_masks.to_frame()["kind"].tolist() == ["specific", "related", "related"]
    with pytest.raises(DataError) as caught:
        NeuronSet.from_masks(masks, kinds={"specific": kinds["specific"]})
    sentence(caught.value)


def test_algebra_against_sets():
    one = make()
    other = make({"en": [3, 4], "de": [], "it": [5]}, {"en": ["bottom", "top"], "de": [], "it": ["top"]})
    with pytest.raises(DataError):
        one | other  # the kinds come in another order
    one, other = make(kinds=None), make({"en": [3, 4], "de": [], "it": [5]}, None)
    theirs = {code: set(other.flat(code).tolist()) if code in other.languages else set() for code in CHOSEN}
    for code, own in CHOSEN.items():
        assert (one & other).flat(code).tolist() == [i for i in own if i in theirs[code]]
        assert (one - other).flat(code).tolist() == [i for i in own if i not in theirs[code]]
    united = one | other
    assert united.flat("en").tolist() == [25, 3, 7, 4]
    assert united.flat("it").tolist() == [5]
    assert one.exclusive().flat("de").tolist() == [12, 0, 17]
    assert one.restrict([1]).flat("en").tolist() == [25, 3]
    assert one.best(2).flat("de").tolist() == [7, 12]
    turned = NeuronSet.from_units({"en": torch.tensor([0])}, sites=dict(reversed(SITES.items())))
    for wrong in (one.at("q"), turned):
        with pytest.raises(LensNeuronsError) as caught:
            one & wrong
        sentence(caught.value)


def test_units_of_unknown_origin_are_noted():
    note = "combined with units of unknown origin"
    known = make(kinds=None, provenance=Provenance(model="m", weights="w", n_layers=2, d_mlp=5))
    unknown = make({"en": [3, 4], "de": [], "it": [5]}, None, notes=("a note",))
    for made in (known & unknown, known - unknown, known | unknown):
        assert made.provenance == known.provenance
        assert made.notes == (note,)
    assert ((known | unknown) - unknown).notes == (note,)
    # Where the result says nothing of its origin, or all of it, there is nothing to add.
    assert (unknown | known).notes == (unknown & unknown).notes == ("a note",)
    assert (known | known).notes == ()


def test_random_controls_match_sites_and_layers():
    made = make()
    drawn = made.random_like(3)
    assert drawn.flat("en").tolist() == make().random_like(3).flat("en").tolist()
    assert (
        drawn.flat("en").tolist()
        == made.select(["en"]).random_like(3, avoid=made.flat_union_mask()).flat("en").tolist()
    )

    def places(neurons: NeuronSet, code: str) -> list[tuple[str, int]]:
        return sorted((site, layer) for site, layer, _ in listed(neurons)[code])

    for code in CHOSEN:
        assert places(drawn, code) == places(made, code)
        assert not set(drawn.flat(code).tolist()) & set(made.flat("en").tolist() + made.flat("de").tolist())
    full = make({"en": [0, 1], "de": []}, None)
    with pytest.raises(DataError, match="layer 0 of q") as caught:
        full.random_like(0)
    sentence(caught.value)
    assert len(full.random_like(0, allow_short=True).notes) == 1


def test_saved_and_loaded_with_sites_in_their_order_and_kinds(tmp_path):
    sites = {"up": (2, 5), "attn_out": (2, 4), "gate_pre": (2, 5)}
    made = NeuronSet.from_units(
        {"en": torch.tensor([27, 11, 0]), "de": torch.tensor([], dtype=torch.int64)},
        sites=sites,
        kinds={"en": ["b", "a", "b"], "de": []},
        notes=["one"],
    )
    made.save(tmp_path / "n.safetensors")
    loaded = NeuronSet.load(tmp_path / "n.safetensors")
    assert list(loaded.sites) == list(sites)
    assert listed(loaded) == listed(made)
    assert loaded.to_frame().equals(made.to_frame())
    assert (loaded.kinds, loaded.notes) == (made.kinds, made.notes)


@pytest.mark.parametrize(
    ("units", "sites", "kinds"),
    [
        ([26], SITES, None),
        ([-1], SITES, None),
        ([3, 3], SITES, None),
        ([3], {}, None),
        ([3], {"q": (2, 0)}, None),
        ([3], SITES, ["top", "top"]),
    ],
)
def test_wrong_units(units, sites, kinds):
    with pytest.raises(DataError) as caught:
        NeuronSet.from_units({"en": torch.tensor(units)}, sites=sites, kinds=None if kinds is None else {"en": kinds})
    sentence(caught.value)
