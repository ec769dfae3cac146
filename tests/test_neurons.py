import json
from pathlib import Path

import pytest
import torch
from oracle import sentence

from lens_neurons.errors import DataError, ProvenanceError, SettingError, StorageError
from lens_neurons.neurons import NeuronSet
from lens_neurons.storage import Provenance

DATA = Path(__file__).parent / "data"
SHAPE = (4, 50)


def random_set(seed=0, languages=("en", "fr", "sw"), share=0.1, **settings):
    generator = torch.Generator().manual_seed(seed)
    masks = {code: torch.rand(SHAPE, generator=generator) < share for code in languages}
    return NeuronSet.from_masks({**masks, "qu": torch.zeros(SHAPE, dtype=torch.bool)}, **settings)


def as_sets(neurons):
    return {code: set(zip(*(part.tolist() for part in neurons.units(code)), strict=True)) for code in neurons.languages}


def test_algebra_equals_python_sets():
    first, second = random_set(0), random_set(1)
    a, b = as_sets(first), as_sets(second)
    assert as_sets(first & second) == {code: a[code] & b[code] for code in a}
    assert as_sets(first | second) == {code: a[code] | b[code] for code in a}
    assert as_sets(first - second) == {code: a[code] - b[code] for code in a}
    every = [unit for units in a.values() for unit in units]
    assert as_sets(first.exclusive()) == {code: {u for u in a[code] if every.count(u) == 1} for code in a}
    assert as_sets(first.restrict([1, 3])) == {code: {u for u in a[code] if u[0] in (1, 3)} for code in a}
    assert len(first) == len(set(every))


def test_overlap_equals_python_sets():
    neurons = random_set(0, share=0.3)
    sets = as_sets(neurons)
    for metric in ("count", "jaccard", "dice"):
        table = neurons.overlap(metric)
        for x in sets:
            for y in sets:
                shared, total = len(sets[x] & sets[y]), len(sets[x]) + len(sets[y])
                wanted = {
                    "count": shared,
                    "jaccard": shared / (total - shared) if total - shared else 0,
                    "dice": 2 * shared / total if total else 0,
                }[metric]
                assert table.loc[x, y] == pytest.approx(wanted)
    with pytest.raises(SettingError, match="metric='x'"):
        neurons.overlap("x")


def test_units_are_ordered_by_score_layer_index():
    mask = torch.zeros(SHAPE, dtype=torch.bool)
    mask[2, 3] = mask[0, 9] = mask[0, 4] = mask[1, 1] = True
    score = torch.ones(SHAPE, dtype=torch.float64)
    score[2, 3] = 0.5
    neurons = NeuronSet.from_masks({"en": mask}, scores={"en": score})
    assert list(zip(*(part.tolist() for part in neurons.units("en")), strict=True)) == [(2, 3), (0, 4), (0, 9), (1, 1)]
    assert neurons.to_frame()["rank"].tolist() == [0, 1, 2, 3]


def test_a_language_under_two_labels_is_refused():
    mask = torch.ones(2, 3, dtype=torch.bool)
    units = {"en": torch.tensor([0]), "fr": torch.tensor([1]), "english": torch.tensor([2])}
    for make in (
        lambda: NeuronSet.from_masks({"en": mask, "English": ~mask}),
        lambda: NeuronSet.from_units(units, sites={"gate_act": (2, 3)}),
    ):
        with pytest.raises(DataError, match="nglish' is language 'en', which is given twice") as caught:
            make()
        assert str(caught.value).endswith(".")


def test_an_empty_language_is_kept():
    neurons = random_set()
    assert neurons.languages == ("en", "fr", "sw", "qu")
    assert neurons.counts()["qu"] == 0
    assert len(neurons["qu"]) == 0
    assert neurons.summary().loc["qu", "units"] == 0
    assert neurons.by_layer()["qu"].sum() == 0
    with pytest.raises(DataError, match="has no 'th'"):
        neurons["th"]


def test_files_come_back(tmp_path):
    provenance = Provenance(weights="w", n_layers=4, d_mlp=50, site="gate_act")
    neurons = random_set(provenance=provenance, method={"name": "lape", "top_rate": 0.1})
    neurons.save(tmp_path / "n.safetensors")
    again = NeuronSet.load(tmp_path / "n.safetensors")
    assert as_sets(again) == as_sets(neurons)
    assert (again.languages, again.provenance, again.method) == (neurons.languages, provenance, neurons.method)
    assert again.to_frame().equals(neurons.to_frame())


def test_the_golden_file_of_schema_1_loads():
    neurons = NeuronSet.load(DATA / "neuron_set_v1.safetensors")
    assert neurons.counts() == {"en": 2, "sw": 1, "qu": 0}
    assert neurons.mask("en")[0, 1]


def test_random_control_has_the_same_layers_and_no_shared_unit():
    neurons = random_set(share=0.1)
    control = neurons.random_like(7)
    assert control.by_layer().equals(neurons.by_layer())
    assert not (control.union_mask() & neurons.union_mask()).any()
    assert as_sets(control) == as_sets(neurons.random_like(7))
    assert as_sets(control)["en"] != as_sets(neurons.random_like(8))["en"]
    alone = neurons.select(["fr"]).random_like(7, avoid=neurons.union_mask())
    assert as_sets(alone)["fr"] == as_sets(control)["fr"], "a draw must not depend on the other languages' names"


def test_a_layer_without_enough_free_units_is_an_error_or_a_note():
    full = torch.zeros(SHAPE, dtype=torch.bool)
    full[0, :30] = True
    neurons = NeuronSet.from_masks({"en": full})
    with pytest.raises(DataError, match="layer 0 has 20 free units, but 'en' needs 30"):
        neurons.random_like(0)
    short = neurons.random_like(0, allow_short=True)
    assert short.counts() == {"en": 20}
    assert len(short.notes) == 1


def test_sets_of_another_shape_site_or_model_are_refused():
    first = random_set(provenance=Provenance(weights="a"))
    other = NeuronSet.from_masks({"en": torch.zeros(3, 50, dtype=torch.bool)})
    with pytest.raises(ProvenanceError, match="same site and shape"):
        first & other
    with pytest.raises(ProvenanceError, match="'a' in one and 'b'"):
        first | random_set(provenance=Provenance(weights="b"))


def test_use_on_another_model():
    model = Provenance(weights="a", dtype="float32", n_layers=4, d_mlp=50)
    neurons = random_set(provenance=model)
    neurons.require_fit(model)
    with pytest.raises(ProvenanceError, match="d_mlp is 50 in one and 60"):
        neurons.require_fit(model.replace(d_mlp=60))
    with pytest.raises(ProvenanceError, match="weights"):
        neurons.require_fit(model.replace(weights="b"))
    neurons.require_fit(model.replace(weights="b"), allow={"weights"})
    with pytest.warns(UserWarning, match="only its shape was checked"):
        random_set().require_fit(model)


def check_published(neurons, wanted):
    assert list(neurons.counts().values()) == wanted["counts"]
    assert len(neurons) == wanted["union"]
    assert neurons.by_layer().T.values.tolist() == wanted["by_layer"]
    assert neurons.overlap("count").values.tolist() == wanted["overlap"]


@pytest.mark.parametrize("name", ["LLaMA-2-7B", "BLOOM-7B"])
def test_published_files(shared, name):
    wanted = json.loads((DATA / "published_neurons.json").read_text())[name]
    path = shared / f"golden/{name}.neuron.pth"
    neurons = NeuronSet.from_published(path, languages=wanted["languages"], shape=tuple(wanted["shape"]))
    check_published(neurons, wanted)
    with pytest.raises(DataError, match="but 2 were named"):
        NeuronSet.from_published(path, languages=["en", "zh"], shape=tuple(wanted["shape"]))
    with pytest.raises(DataError, match="does not fit a layer of 100"):
        NeuronSet.from_published(path, languages=wanted["languages"], shape=(wanted["shape"][0], 100))


def test_the_figures_of_the_paper_s_files_are_the_committed_ones():
    # methods.md section 1: recomputed from the published artifacts.
    wanted = json.loads((DATA / "published_neurons.json").read_text())["LLaMA-2-7B"]
    assert wanted["union"] == 3523 == round(0.01 * 32 * 11008)
    assert wanted["counts"] == [95, 583, 1022, 838, 836, 1068, 582]
    assert sum(layers[0] for layers in wanted["by_layer"]) == 1144
    names = wanted["languages"]
    assert wanted["overlap"][names.index("fr")][names.index("es")] == 336


def test_a_published_file_written_here(tmp_path):
    entries = [[torch.tensor([1, 3]), torch.tensor([], dtype=torch.int64)], [torch.tensor([0]), torch.tensor([3])]]
    torch.save(entries, tmp_path / "n.pth")
    neurons = NeuronSet.from_published(tmp_path / "n.pth", languages=["en", "zh"], shape=(2, 4))
    assert as_sets(neurons) == {"en": {(0, 1), (0, 3)}, "zh": {(0, 0), (1, 3)}}
    torch.save({"a": 1}, tmp_path / "m.pth")
    with pytest.raises(StorageError, match=r"no list\[language\]\[layer\]"):
        NeuronSet.from_published(tmp_path / "m.pth", languages=["en"], shape=(2, 4))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"junk",
        b"hello world\n",
        b"\x80\x02}q\x00.",
        b"\x80\x04\x95",
        b"PK\x03\x04",
        b"\x00" * 600,
    ],
)
def test_junk_is_no_published_file(tmp_path, content):
    (tmp_path / "n.pth").write_bytes(content)
    with pytest.raises(StorageError, match=r"n\.pth") as caught:
        NeuronSet.from_published(tmp_path / "n.pth", languages=["en"], shape=(1, 4))
    sentence(caught.value)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_published_file_that_was_cut_short(tmp_path, share, zipped):
    path = tmp_path / "n.pth"
    torch.save([[torch.tensor([1, 3])]], path, _use_new_zipfile_serialization=zipped)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(StorageError, match="cannot be read"):
        NeuronSet.from_published(path, languages=["en"], shape=(1, 4))


@pytest.mark.parametrize(
    ("entry", "error", "message"),
    [
        (torch.tensor([1, -1]), DataError, "index -1 does not fit"),
        (torch.tensor([1, 4]), DataError, "index 4 does not fit"),
        (torch.tensor([1.0, 2.0]), StorageError, "no list of integers"),
        (torch.tensor([True, False, True]), DataError, "a mask of 3 neurons, but shape says 4"),
        (torch.tensor([0, 1, 0, 1]), DataError, "names an index twice.*masks of 0 and 1"),
        (torch.tensor([0, 1, 1, 1], dtype=torch.uint8), DataError, "names an index twice.*masks of 0 and 1"),
        (torch.tensor([[1], [2]]), StorageError, "no list of integers"),
        ([1, 2], StorageError, "no list of integers"),
        ("ab", StorageError, "no list of integers"),
    ],
)
def test_published_entries_are_indices(tmp_path, entry, error, message):
    torch.save([[entry]], tmp_path / "n.pth")
    with pytest.raises(error, match=message):
        NeuronSet.from_published(tmp_path / "n.pth", languages=["en"], shape=(1, 4))


def test_published_layers_may_be_empty_and_of_any_integer(tmp_path):
    torch.save([[torch.tensor([]), torch.tensor([2], dtype=torch.int16)]], tmp_path / "n.pth")
    neurons = NeuronSet.from_published(tmp_path / "n.pth", languages=["en"], shape=(2, 4))
    assert as_sets(neurons) == {"en": {(1, 2)}}
