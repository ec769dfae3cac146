"""Files with a right checksum that this package did not write: every one is refused in a sentence."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import safetensors.torch
import torch
from oracle import sentence

from lens_neurons.activation_stats import ActivationStats
from lens_neurons.bins import NeuronBins
from lens_neurons.errors import StorageError
from lens_neurons.features import FeatureStats
from lens_neurons.histograms import Histograms
from lens_neurons.neuron_files import export_neurons, import_neurons
from lens_neurons.neurons import NeuronSet
from lens_neurons.storage import load_json, load_tensors, save_tensors, sha256_of
from lens_neurons.table_files import load_frames, save_frames

NOTHING = object()


def some_neurons() -> NeuronSet:
    return NeuronSet.from_units(
        {"en": torch.tensor([3, 30, 7]), "sw": torch.tensor([1])},
        sites={"q": (2, 8), "gate_pre": (2, 20)},
        kinds={"en": ["top", "top", "bottom"], "sw": ["top"]},
    )


def some_stats() -> ActivationStats:
    return ActivationStats.from_counts({"en": 9, "sw": 8}, dict.fromkeys(("en", "sw"), torch.ones(2, 3).long()))


def some_histograms() -> Histograms:
    bins = NeuronBins(torch.full((2, 5), -1.0), torch.full((2, 5), 1.5), 4)
    return Histograms.from_values({"en": torch.rand(6, 2, 5), "sw": torch.rand(7, 2, 5)}, bins=bins)


def some_features() -> FeatureStats:
    counts = dict.fromkeys(("en", "sw"), torch.ones(2, 4).long())
    return FeatureStats.from_counts({"en": 9, "sw": 8}, {"en": 3, "sw": 2}, counts, counts)


MADE: dict[str, Any] = {
    "neurons": some_neurons,
    "stats": some_stats,
    "histograms": some_histograms,
    "features": some_features,
}


def forged(path: Path, thing: Any, header: dict[str, Any], tensors: dict[str, Any]) -> None:
    """Write a thing's file with other content and the checksum of that."""
    thing.save(path)
    there, found = load_tensors(path)
    there = {name: value for name, value in {**there, **tensors}.items() if value is not NOTHING}
    found = {name: value for name, value in {**found, **header}.items() if value is not NOTHING}
    save_tensors(path, there, found)


@pytest.mark.parametrize("name", MADE)
def test_what_was_not_changed_is_read(tmp_path: Path, name: str):
    thing = MADE[name]()
    forged(tmp_path / "x", thing, {}, {})
    assert repr(type(thing).load(tmp_path / "x")) == repr(thing)


@pytest.mark.parametrize("name", MADE)
def test_every_field_and_tensor_is_needed_in_its_form(tmp_path: Path, name: str):
    path = tmp_path / "x.safetensors"
    thing = MADE[name]()
    thing.save(path)
    tensors, header = load_tensors(path)
    needed = set(header) - {"site_order", "kinds", "schema", "kind"}
    changes: list[tuple[dict[str, Any], dict[str, Any]]] = [({field: NOTHING}, {}) for field in needed]
    changes += [({field: value}, {}) for field in needed for value in (7, None, [[]], {"a": 1}, "en", ["en", "en"])]
    changes += [({}, {key: NOTHING}) for key in tensors if not key.endswith((".kind", ".site"))]
    for key, value in tensors.items():
        others = [torch.cat([value, value[:1]]), value[None], value.to(torch.float16)]
        changes += [({}, {key: other}) for other in others]
    for of_header, of_tensors in changes:
        forged(path, thing, of_header, of_tensors)
        possible = [{"method": {"a": 1}}, {"provenance": {"a": 1}}, {"site": "en"}, {"n_layers": 7}]
        possible.append({"notes": ["en", "en"]} if name == "neurons" else {"notes": {"a": 1}})
        if of_header in possible:
            type(thing).load(path)
            continue
        with pytest.raises(StorageError, match=r"x\.safetensors") as caught:
            type(thing).load(path)
        sentence(caught.value)


@pytest.mark.parametrize(
    ("header", "tensors", "text"),
    [
        ({"languages": ["en", "eng_Latn"]}, {}, "languages must be labels that come once"),
        ({"languages": ["en", "sw", "fr"]}, {}, "2.layer"),
        ({"sites": {"q": [2, 8]}}, {}, "'site_order' must name every site once"),
        ({"sites": {"q": [2, 8], "gate_pre": [2, 2]}}, {}, "index is outside"),
        ({"sites": {"q": [2, 8], "gate_pre": [0, 20]}}, {}, "at least 1"),
        ({"sites": {"q": [2, 8], "gate_pre": [2.5, 20]}}, {}, "two whole numbers"),
        ({"sites": {"q": [2, 8], "gate_pre": [2**40, 20]}}, {}, "1 to 8589934592 units"),
        ({"sites": {}, "site_order": []}, {}, "1 to 8589934592 units"),
        ({"kinds": ["top"]}, {}, "kind is outside"),
        ({"kinds": ["top", "top"]}, {}, "come once each"),
        ({"notes": [3]}, {}, "'notes' must be sentences"),
        ({"provenance": {"policy": 3}}, {}, "needs policy as dict"),
        ({"provenance": {"extra": [], "later": 1}}, {}, "needs extra as dict"),
        ({}, {"0.layer": torch.tensor([0, 2, 0])}, "layer is outside"),
        ({}, {"0.index": torch.tensor([3, -1, 7])}, "index is outside"),
        ({}, {"0.index": torch.tensor([3, 8, 20])}, "index is outside"),
        ({}, {"0.site": torch.tensor([0, 2, 0])}, "site is outside"),
        ({}, {"0.kind": torch.tensor([0, 0, -1])}, "kind is outside"),
        ({}, {"0.index": torch.tensor([3, 14, 3])}, "comes twice"),
        ({}, {"0.score": torch.zeros(2, dtype=torch.float64)}, "'score' is torch.float64 \\[2\\]"),
    ],
)
def test_neurons_that_do_not_fit(tmp_path: Path, header: Any, tensors: Any, text: str):
    forged(tmp_path / "x", some_neurons(), header, tensors)
    with pytest.raises(StorageError, match=text) as caught:
        NeuronSet.load(tmp_path / "x")
    sentence(caught.value)


@pytest.mark.parametrize(
    ("name", "header", "tensors", "text"),
    [
        ("stats", {"languages": ["en"]}, {}, "'tokens' is torch.int64 \\[2\\]"),
        ("stats", {}, {"tokens": torch.ones(3).long()}, "'tokens' is torch.int64 \\[3\\]"),
        ("stats", {}, {"sum": torch.zeros(2, 2, 4).double()}, "does not fit the rest"),
        ("stats", {}, {"other": torch.zeros(1)}, "other"),
        ("histograms", {"bins": {"n": 5, "ranges": ""}}, {}, "counts of 7 bins"),
        ("histograms", {"bins": {"m": 4}}, {}, "TypeError"),
        ("histograms", {}, {"high": torch.full((2, 5), -2.0)}, "low below high"),
        ("histograms", {}, {"low": torch.zeros(2, 6)}, "'low' is"),
        ("features", {"layers": [0, 9]}, {}, "must ascend"),
        ("features", {"n_layers": 0}, {}, "must ascend"),
        ("features", {}, {"texts": torch.zeros(2).long()}, "no token that counts"),
    ],
)
def test_recordings_that_do_not_fit(tmp_path: Path, name: str, header: Any, tensors: Any, text: str):
    thing = MADE[name]()
    forged(tmp_path / "x", thing, header, tensors)
    with pytest.raises(StorageError, match=text) as caught:
        type(thing).load(tmp_path / "x")
    sentence(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"tables": NOTHING},
        {"tables": []},
        {"tables": {"t": 3}},
        {"tables": {"t": {"a": 3}}},
        {"tables": {"t": {"a": {"values": [1]}}}},
        {"tables": {"t": {"a": {"type": "int64", "values": ["x"]}}}},
        {"tables": {"t": {"a": {"type": "no such", "values": [1]}}}},
        {"tables": {"t": {"a": {"type": "int64", "values": [1]}, "b": {"type": "int64", "values": [1, 2]}}}},
        {"schema": "1"},
        {"schema": None},
    ],
)
def test_tables_that_do_not_fit(tmp_path: Path, change: dict[str, Any]):
    path = tmp_path / "t.json"
    save_frames(path, {"t": pd.DataFrame({"a": [1]})}, "tables", {})
    content = {**load_json(path), **change}
    content = {name: value for name, value in content.items() if name != "sha256" and value is not NOTHING}
    checksum = sha256_of(json.dumps(content, sort_keys=True, ensure_ascii=False))
    path.write_text(json.dumps({**content, "sha256": checksum}))
    with pytest.raises(StorageError) as caught:
        load_frames(path, "tables")
    assert "checksum" not in str(caught.value)
    sentence(caught.value)


@pytest.mark.parametrize(
    "change", [{"languages": "en"}, {"sites": {"q": 3}}, {"notes": 4}, {"provenance": {"seed": "x"}}]
)
def test_metadata_of_tables_of_neurons(tmp_path: Path, change: dict[str, Any]):
    export_neurons(some_neurons(), tmp_path / "n.csv")
    beside = tmp_path / "n.csv-metadata.json"
    beside.write_text(json.dumps({**load_json(beside), **change}))
    with pytest.raises(StorageError, match="lens_neurons does not write") as caught:
        import_neurons(tmp_path / "n.csv")
    sentence(caught.value)


def test_files_that_are_none(tmp_path: Path):
    (tmp_path / "deep.json").write_text("[" * 100_000)
    metadata = {"lens_neurons": "[1]", "sha256": sha256_of("[1]")}
    (tmp_path / "list").write_bytes(safetensors.torch.save({}, metadata=metadata))
    for call in (
        lambda: load_json(tmp_path / "deep.json"),
        lambda: load_json(tmp_path),
        lambda: load_tensors(tmp_path),
        lambda: load_tensors(tmp_path / "list"),
    ):
        with pytest.raises(StorageError) as caught:
            call()
        sentence(caught.value)
