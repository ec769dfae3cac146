"""Neuron sets to other formats and back, and files that other programs wrote."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet
import pytest
import torch
from oracle import sentence

from lens_neurons.errors import DataError, LensNeuronsError, SettingError, StorageError
from lens_neurons.neuron_files import export_neurons, import_neurons, to_lape_list
from lens_neurons.neurons import NeuronSet
from lens_neurons.storage import Provenance

DATA = Path(__file__).parent / "data"
SITES = {"q": (3, 8), "gate_pre": (3, 20), "attn_out": (3, 8)}
# Labels that CSV readers like to take for something else, and one with everything that wants quotes.
LABELS = ("en", "NA", "nan", "C#", 'a, "b"\nc', "qu")


def several_sites(seed: int = 0) -> NeuronSet:
    generator = torch.Generator().manual_seed(seed)
    total = sum(n * width for n, width in SITES.values())
    units, scores, kinds = {}, {}, {}
    for label in LABELS[:-1]:
        units[label] = torch.randperm(total, generator=generator)[:17]
        scores[label] = torch.rand(17, generator=generator, dtype=torch.float64).sort().values / 3
        kinds[label] = [("top", "bottom")[i] for i in torch.randint(2, (17,), generator=generator).tolist()]
    scores["en"][:4] = torch.tensor([-torch.inf, -0.0, 1e-300, 0.1 + 0.2])
    scores["NA"][-2:] = torch.tensor([torch.inf, torch.nan])
    units["qu"], scores["qu"], kinds["qu"] = torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.float64), []
    return NeuronSet.from_units(
        units,
        sites=SITES,
        scores=scores,
        kinds=kinds,
        provenance=Provenance(model="m", weights="w", n_layers=3, d_mlp=20, site="q+gate_pre", policy={"bos": "model"}),
        method={"name": "average_precision", "k": 34},
        notes=("a note",),
    )


def one_site(**settings: Any) -> NeuronSet:
    generator = torch.Generator().manual_seed(3)
    masks = {code: torch.rand(4, 50, generator=generator) < 0.1 for code in ("en", "fr", "sw")}
    masks["qu"] = torch.zeros(4, 50, dtype=torch.bool)
    scores = {code: torch.rand(4, 50, generator=generator, dtype=torch.float64) for code in masks}
    return NeuronSet.from_masks(masks, scores=scores, method={"name": "lape"}, **settings)


def same(first: NeuronSet, second: NeuronSet) -> bool:
    """Return whether two sets are equal to the last bit, order included."""
    for a, b in zip(first.tables.values(), second.tables.values(), strict=True):
        for name in ("layer", "index", "site", "score", "kind"):
            x, y = getattr(a, name), getattr(b, name)
            if (x is None) != (y is None):
                return False
            if x is not None and (
                x.dtype != y.dtype or not np.array_equal(x.numpy(), y.numpy(), equal_nan=name == "score")
            ):
                return False
    fields = ("languages", "provenance", "notes", "kinds")
    return (
        all(getattr(first, name) == getattr(second, name) for name in fields)
        and list(first.sites.items()) == list(second.sites.items())
        and dict(first.method) == dict(second.method)
    )


@pytest.mark.parametrize("suffix", ["safetensors", "csv", "parquet", "PARQUET"])
@pytest.mark.parametrize(
    "neurons",
    [
        pytest.param(several_sites(), id="sites-and-kinds"),
        pytest.param(one_site(), id="one-site"),
        pytest.param(several_sites().of_kind("top"), id="one-of-two-kinds"),
        pytest.param(one_site().select(["qu"]), id="nothing"),
        pytest.param(several_sites().select(["qu"]), id="nothing-of-several-sites"),
    ],
)
def test_files_come_back(tmp_path: Path, neurons: NeuronSet, suffix: str):
    export_neurons(neurons, tmp_path / f"n.{suffix}")
    again = import_neurons(tmp_path / f"n.{suffix}")
    assert same(again, neurons)
    assert not same(again, several_sites(1))
    export_neurons(again, tmp_path / f"m.{suffix}")
    if suffix != "safetensors":  # it puts its metadata in any order
        assert (tmp_path / f"m.{suffix}").read_bytes() == (tmp_path / f"n.{suffix}").read_bytes()


def test_tables_are_what_to_frame_shows(tmp_path: Path):
    neurons = several_sites()
    for name, read in (
        ("n.csv", lambda path: pd.read_csv(path, keep_default_na=False)),
        ("n.parquet", pd.read_parquet),
    ):
        export_neurons(neurons, tmp_path / name)
        table = read(tmp_path / name)
        wanted = neurons.to_frame()
        assert list(table.columns) == list(wanted.columns)
        assert [str(x) for x in table["language"]] == list(wanted["language"])
        assert (table[["layer", "neuron", "rank"]].to_numpy() == wanted[["layer", "neuron", "rank"]].to_numpy()).all()
    metadata = pyarrow.parquet.read_schema(tmp_path / "n.parquet").metadata
    header = json.loads(metadata[b"lens_neurons"])
    assert header["provenance"]["weights"] == "w"
    assert header["languages"] == list(LABELS)
    assert json.loads((tmp_path / "n.csv-metadata.json").read_text())["provenance"]["weights"] == "w"


def test_the_lape_list_has_every_language(tmp_path: Path):
    neurons = one_site()
    export_neurons(neurons, tmp_path / "n.pth")
    entries = torch.load(tmp_path / "n.pth", weights_only=True)
    assert len(entries) == 4
    assert all(len(layers) == 4 for layers in entries)
    assert all(values.dtype == torch.int64 and values.tolist() == sorted(values) for row in entries for values in row)
    for code, layers in zip(neurons.languages, entries, strict=True):
        found = {(layer, int(i)) for layer, values in enumerate(layers) for i in values}
        assert found == set(zip(*(part.tolist() for part in neurons.units(code)), strict=True))
    assert [values.tolist() for row in to_lape_list(neurons) for values in row] == [
        values.tolist() for row in entries for values in row
    ]
    again = import_neurons(tmp_path / "n.pth")
    assert (again.languages, again.method, again.provenance) == (neurons.languages, neurons.method, neurons.provenance)
    assert all(torch.equal(again.mask(code), neurons.mask(code)) for code in neurons.languages)
    (tmp_path / "n.pth-metadata.json").unlink()
    named = import_neurons(tmp_path / "n.pth", languages=["a", "b", "c", "d"], sites={"gate_act": (4, 50)})
    assert torch.equal(named.mask("b"), neurons.mask("fr"))
    assert named.method == {"name": "published", "file": "n.pth"}


@pytest.mark.parametrize("name", ["LLaMA-2-7B", "BLOOM-7B"])
def test_published_files_go_out_as_they_came_in(shared: Path, tmp_path: Path, name: str):
    wanted = json.loads((DATA / "published_neurons.json").read_text())[name]
    path = shared / f"golden/{name}.neuron.pth"
    neurons = import_neurons(path, languages=wanted["languages"], sites={"gate_act": tuple(wanted["shape"])})
    assert list(neurons.counts().values()) == wanted["counts"]
    export_neurons(neurons, tmp_path / "n.pth")
    before, after = torch.load(path, weights_only=True), torch.load(tmp_path / "n.pth", weights_only=True)
    assert len(before) == len(after)
    for mine, theirs in zip(after, before, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_a_list_that_lost_its_last_languages(tmp_path: Path):
    """What the LAPE code writes (identify.py): bincount without minlength, so that split gives too few parts."""
    language = torch.tensor([0, 0, 2, 2, 2])
    where = torch.tensor([[0, 1], [1, 3], [0, 2], [0, 3], [1, 0]])
    entries = [
        [part[part[:, 0] == layer][:, 1] for layer in range(2)]
        for part in where.split(torch.bincount(language).tolist())
    ]
    assert len(entries) == 3
    torch.save(entries, tmp_path / "n.pth")
    named = {"languages": ["en", "zh", "fr", "es", "vi"], "sites": {"gate_act": (2, 4)}}
    with pytest.raises(DataError, match=r"holds 3 languages, but 5 were named.*allow_short=True") as caught:
        import_neurons(tmp_path / "n.pth", **named)
    sentence(caught.value)
    neurons = import_neurons(tmp_path / "n.pth", **named, allow_short=True)
    assert neurons.counts() == {"en": 2, "zh": 0, "fr": 3, "es": 0, "vi": 0}
    assert neurons.notes == ("the file ends before es, vi; taken as without neurons",)
    with pytest.raises(DataError, match="holds 3 languages, but 2") as caught:
        import_neurons(tmp_path / "n.pth", languages=["en", "zh"], sites=named["sites"], allow_short=True)
    assert "allow_short" not in str(caught.value)


def random_masks() -> torch.Tensor:
    return torch.rand(4, 3, 30, generator=torch.Generator().manual_seed(1)) < 0.6


@pytest.mark.parametrize(
    "form",
    [
        lambda masks: masks,
        lambda masks: masks.to(torch.uint8),
        lambda masks: masks.float(),
        lambda masks: list(masks),
        lambda masks: [[row.nonzero()[:, 0] for row in mask] for mask in masks],
        lambda masks: {code: masks[i] for i, code in enumerate(("en", "ru", "th", "sw"))},
        lambda masks: {code: masks[i].long() for i, code in reversed(list(enumerate(("en", "ru", "th", "sw"))))},
    ],
    ids=["bool", "uint8", "float", "list-of-masks", "lists", "dictionary", "dictionary-in-another-order"],
)
def test_ternary_masks(tmp_path: Path, form: Any):
    masks = random_masks()
    torch.save(form(masks), tmp_path / "mask.Mistral")
    settings: Any = {"languages": ["en", "ru", "th", "sw"], "sites": {"gate_act": (3, 30)}}
    neurons = import_neurons(tmp_path / "mask.Mistral", "ternary", **settings)
    for i, code in enumerate(settings["languages"]):
        assert torch.equal(neurons.mask(code), masks[i])
    for row in neurons.to_frame().itertuples():
        owners = sum(bool(masks[k, row.layer, row.neuron]) for k in range(4))
        assert row.kind == {1: "specific", 4: "general"}.get(owners, "related")
    assert set(neurons.kinds) == {"specific", "related", "general"}
    plain = import_neurons(tmp_path / "mask.Mistral", "lape", **settings)
    assert plain.kinds == ()
    assert torch.equal(plain.mask("th"), masks[2])


def test_masks_that_say_their_languages(tmp_path: Path):
    masks = random_masks()
    torch.save({"eng_Latn": masks[0], "swh_Latn": masks[1]}, tmp_path / "n.pth")
    neurons = import_neurons(tmp_path / "n.pth", sites={"gate_act": (3, 30)})
    assert neurons.languages == ("en", "sw")
    assert torch.equal(neurons.mask("sw"), masks[1])
    with pytest.raises(DataError, match="has the languages eng_Latn, swh_Latn"):
        import_neurons(tmp_path / "n.pth", languages=["eng_Latn", "fr"], sites={"gate_act": (3, 30)})


def test_masks_of_layers(tmp_path: Path):
    masks = random_masks()
    torch.save([list(mask) for mask in masks], tmp_path / "n.pth")
    settings: Any = {"languages": ["en", "ru", "th", "sw"], "sites": {"gate_act": (3, 30)}}
    neurons = import_neurons(tmp_path / "n.pth", **settings)
    assert all(torch.equal(neurons.mask(code), masks[i]) for i, code in enumerate(settings["languages"]))
    # As numbers they would be indices: of every language neurons 0 and 1.
    for dtype in (torch.uint8, torch.int64):
        torch.save([list(mask.to(dtype)) for mask in masks], tmp_path / "n.pth")
        with pytest.raises(DataError, match="an index twice") as caught:
            import_neurons(tmp_path / "n.pth", **settings)
        sentence(caught.value)


def test_no_language_of_a_published_file_is_lost(tmp_path: Path):
    masks, sites = random_masks(), {"gate_act": (3, 30)}
    torch.save(list(masks[:2]), tmp_path / "list.pth")
    torch.save({"en": masks[0], "eng_Latn": masks[1]}, tmp_path / "labels.pth")
    torch.save({0: masks[0], "0": masks[1]}, tmp_path / "zeros.pth")
    torch.save({1: masks[1], 0: masks[0]}, tmp_path / "numbers.pth")
    cases = [
        ("list.pth", {"languages": ["en", "en"]}),
        ("list.pth", {"languages": ["en", "English"]}),
        ("labels.pth", {}),
        ("labels.pth", {"languages": ["eng_Latn", "en"]}),
        ("zeros.pth", {}),
    ]
    for name, settings in cases:
        with pytest.raises(DataError, match=r"are both '(en|0)'") as caught:
            import_neurons(tmp_path / name, sites=sites, **settings)
        sentence(caught.value)
    for settings, wanted in (({}, ("1", "0")), ({"languages": ["0", "1"]}, ("0", "1"))):
        neurons = import_neurons(tmp_path / "numbers.pth", sites=sites, **settings)
        assert neurons.languages == wanted
        assert all(torch.equal(neurons.mask(str(i)), masks[i]) for i in range(2))


def test_somebody_else_s_table(tmp_path: Path):
    frame = pd.DataFrame({"language": ["swh_Latn", "en", "sw"], "layer": [1, 0, 0], "neuron": [3, 2, 1], "extra": "x"})
    frame.to_csv(tmp_path / "t.csv", index=False)
    frame.to_parquet(tmp_path / "t.parquet")
    for name in ("t.csv", "t.parquet"):
        neurons = import_neurons(tmp_path / name, sites={"post": (2, 4)})
        assert neurons.languages == ("sw", "en")
        assert [part.tolist() for part in neurons.units("sw")] == [[1, 0], [3, 1]]
        assert neurons.site == "post"
        every = import_neurons(tmp_path / name, sites={"post": (2, 4)}, languages=["en", "qu", "sw"])
        assert every.counts() == {"en": 1, "qu": 0, "sw": 2}
    # Ranks say the order, where there are any.
    frame.assign(rank=[1, 0, 0]).to_csv(tmp_path / "t.csv", index=False)
    neurons = import_neurons(tmp_path / "t.csv", sites={"post": (2, 4)})
    assert [part.tolist() for part in neurons.units("sw")] == [[0, 1], [1, 3]]


def test_some_languages_of_a_file_that_says_them(tmp_path: Path):
    neurons = one_site()
    for name in ("n.csv", "n.parquet", "n.safetensors", "n.pth"):
        export_neurons(neurons, tmp_path / name)
        assert import_neurons(tmp_path / name, languages=["sw", "eng_Latn"]).languages == ("sw", "en")


def test_files_that_were_changed_are_refused(tmp_path: Path):
    neurons = one_site()
    for name in ("n.csv", "n.pth"):
        path = tmp_path / name
        export_neurons(neurons, path)
        path.write_bytes(path.read_bytes() + b"\n")
        with pytest.raises(StorageError, match="was changed since") as caught:
            import_neurons(path)
        sentence(caught.value)
    assert import_neurons(tmp_path / "n.csv", sites={"gate_act": (4, 50)}).counts()["en"] == neurons.counts()["en"]
    export_neurons(neurons, tmp_path / "n.csv")
    beside = tmp_path / "n.csv-metadata.json"
    header = json.loads(beside.read_text())
    for change, text in (
        ({"schema": 99}, "has schema 99"),
        ({"kind": "recording"}, "holds 'recording'"),
        ({"languages": ["en", "fr"]}, "the language 'sw', which is none of en, fr"),
        ({"sites": {"gate_act": [4, 2]}}, "is outside the sites"),
    ):
        beside.write_text(json.dumps({**header, **change}))
        with pytest.raises(LensNeuronsError, match=text):
            import_neurons(tmp_path / "n.csv")
    for text in ("[]", "{}", "no"):
        beside.write_text(text)
        with pytest.raises(StorageError):
            import_neurons(tmp_path / "n.csv")


def test_refusals(tmp_path: Path):
    shape = {"gate_act": (2, 4)}

    def table(**columns: Any) -> Path:
        path = tmp_path / "t.csv"
        pd.DataFrame({"language": ["en", "en"], "layer": [0, 1], "neuron": [1, 2], **columns}).to_csv(path, index=False)
        return path

    def saved(value: Any, name: str = "n.pth") -> Path:
        torch.save(value, tmp_path / name)
        return tmp_path / name

    (tmp_path / "junk.parquet").write_bytes(b"junk")
    (tmp_path / "empty.csv").write_bytes(b"")
    (tmp_path / "short.csv").write_text("language,neuron\nen,1\n")
    masks = torch.zeros(1, 2, 4)
    cases: list[tuple[type[LensNeuronsError], str, Any]] = [
        (SettingError, "says no format", lambda: export_neurons(one_site(), tmp_path / "n.txt")),
        (
            SettingError,
            "format='ternary' is unknown",
            lambda: export_neurons(one_site(), tmp_path / "n.pth", "ternary"),
        ),
        (SettingError, "format='json' is unknown", lambda: import_neurons(table(), "json")),
        (DataError, "units of q, gate_pre", lambda: export_neurons(several_sites(), tmp_path / "n.pth")),
        (StorageError, "does not exist", lambda: import_neurons(tmp_path / "no.csv")),
        (StorageError, "cannot be read as Parquet", lambda: import_neurons(tmp_path / "junk.parquet", sites=shape)),
        (StorageError, "cannot be read as CSV", lambda: import_neurons(tmp_path / "empty.csv", sites=shape)),
        (DataError, "does not say its sites", lambda: import_neurons(table())),
        (DataError, "no column 'site'", lambda: import_neurons(table(), sites={**shape, "q": (2, 4)})),
        (DataError, "no column 'layer'", lambda: import_neurons(tmp_path / "short.csv", sites=shape)),
        (DataError, "the site 'k'", lambda: import_neurons(table(site="k"), sites=shape)),
        (DataError, "the language 'en'", lambda: import_neurons(table(), languages=["fr"], sites=shape)),
        (DataError, "neuron 9 of layer 1", lambda: import_neurons(table(neuron=[1, 9]), sites=shape)),
        (DataError, "neuron 1 of layer -1", lambda: import_neurons(table(layer=[-1, 0]), sites=shape)),
        (DataError, "no whole number", lambda: import_neurons(table(neuron=[1, 1.5]), sites=shape)),
        (DataError, "no number", lambda: import_neurons(table(neuron=["a", "b"]), sites=shape)),
        (DataError, "no whole number", lambda: import_neurons(table(neuron=["nan", "1"]), sites=shape)),
        (DataError, "no number", lambda: import_neurons(table(score=["", "1"]), sites=shape)),
        (DataError, "a unit twice in 'en'", lambda: import_neurons(table(layer=0, neuron=3), sites=shape)),
        (DataError, "does not say its site and shape", lambda: import_neurons(saved([[]]), languages=["en"])),
        (DataError, "does not say its languages", lambda: import_neurons(saved([[]]), sites=shape)),
        (
            DataError,
            "does not say its site and shape",
            lambda: import_neurons(saved([[]]), languages=["en"], sites={**shape, "q": (2, 4)}),
        ),
        (DataError, "1 layers for 'en'", lambda: import_neurons(saved(masks[:, :1]), languages=["en"], sites=shape)),
        (DataError, "masks of 3", lambda: import_neurons(saved(masks[..., :3]), languages=["en"], sites=shape)),
        (
            StorageError,
            "other values than 0 and 1",
            lambda: import_neurons(saved(masks + 2), languages=["en"], sites=shape),
        ),
        (
            StorageError,
            "other values than 0 and 1",
            lambda: import_neurons(saved(masks + torch.nan), languages=["en"], sites=shape),
        ),
        (
            DataError,
            "one language, so no unit is related",
            lambda: import_neurons(saved(masks), "ternary", languages=["en"], sites=shape),
        ),
        (StorageError, "no list", lambda: import_neurons(saved({"en": 3}), languages=["en"], sites=shape)),
    ]
    for kind, text, call in cases:
        with pytest.raises(kind, match=text) as caught:
            call()
        sentence(caught.value)
    assert not (tmp_path / "n.txt").exists()
