import json
import os
import subprocess
import sys

import pytest
import torch

from lens_neurons.errors import ProvenanceError, StorageError
from lens_neurons.storage import (
    Provenance,
    derive_seed,
    load_json,
    load_tensors,
    save_json,
    save_tensors,
    sha256_of,
    write_atomic,
)

TENSORS = {
    "a": torch.arange(6).reshape(2, 3),
    "b": torch.tensor([0.5], dtype=torch.float64),
    "c": torch.zeros(0, 4),
    "flags": torch.tensor([True, False]),
    "half": torch.ones(3, dtype=torch.bfloat16),
}
HEADER = {"schema": 1, "kind": "test", "name": "ภาษา"}


def test_tensors_and_header_come_back(tmp_path):
    path = tmp_path / "x.safetensors"
    save_tensors(path, TENSORS, HEADER)
    tensors, header = load_tensors(path)
    assert header == HEADER
    assert tensors.keys() == TENSORS.keys()
    for name, value in TENSORS.items():
        assert tensors[name].dtype == value.dtype
        assert torch.equal(tensors[name], value)


@pytest.mark.parametrize("where", [0, 9, 60, -1, -20])
def test_every_flipped_byte_is_found(tmp_path, where):
    path = tmp_path / "x.safetensors"
    save_tensors(path, TENSORS, HEADER)
    data = bytearray(path.read_bytes())
    data[where] ^= 0x10
    path.write_bytes(data)
    with pytest.raises(StorageError, match=r"x\.safetensors"):
        load_tensors(path)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_cut_file_is_named(tmp_path, keep):
    path = tmp_path / "x.safetensors"
    save_tensors(path, TENSORS, HEADER)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(StorageError, match=r"x\.safetensors"):
        load_tensors(path)


def test_a_later_schema_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    save_tensors(path, TENSORS, {**HEADER, "schema": 99})
    with pytest.raises(StorageError, match="upgrade"):
        load_tensors(path)


def test_an_absent_file_is_a_sentence(tmp_path):
    with pytest.raises(StorageError, match="does not exist"):
        load_tensors(tmp_path / "no.safetensors")
    with pytest.raises(StorageError, match="does not exist"):
        load_json(tmp_path / "no.json")


def test_broken_json_is_a_sentence(tmp_path):
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(StorageError, match="not valid JSON"):
        load_json(tmp_path / "x.json")


def test_json_round_trip(tmp_path):
    save_json(tmp_path / "x.json", {"b": [1, 2], "a": "é"})
    assert load_json(tmp_path / "x.json") == {"b": [1, 2], "a": "é"}


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch):
    path = tmp_path / "x.bin"
    write_atomic(path, b"old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.bin"]


def test_seeds_depend_on_names_alone():
    assert derive_seed(0, "a", 1) == derive_seed(0, "a", 1)
    assert len({derive_seed(0, "a", 1), derive_seed(1, "a", 1), derive_seed(0, "a", 2), derive_seed(0, "a1")}) == 4
    code = "from lens_neurons.storage import derive_seed; import sys; sys.stdout.write(str(derive_seed(0, 'a', 1)))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(other.stdout) == derive_seed(0, "a", 1)


def test_sha256_of_text_bytes_and_file(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    assert sha256_of("abc") == sha256_of(b"abc") == sha256_of(tmp_path / "x")
    assert sha256_of("abc").startswith("ba7816bf")


def test_provenance_round_trip_keeps_later_fields():
    first = Provenance(model="m", weights="w", n_layers=2, d_mlp=3, policy={"bos": "never"})
    values = json.loads(json.dumps(first.to_dict()))
    assert Provenance.from_dict(values) == first
    assert Provenance.from_dict({**values, "colour": "red"}).extra == {"colour": "red"}


def test_a_mismatch_gives_both_values():
    first = Provenance(weights="aaa", dtype="float32")
    first.require_same(first.replace(dtype="bfloat16"), ["weights"])
    with pytest.raises(ProvenanceError, match="'float32' in one and 'bfloat16'"):
        first.require_same(first.replace(dtype="bfloat16"), ["weights", "dtype"])
    first.require_same(first.replace(dtype="bfloat16"), ["weights", "dtype"], allow={"dtype"})


def test_a_folder_or_a_device_is_never_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(StorageError, match="no file"):
            write_atomic(path, b"x")
    assert (tmp_path / "pipe").is_fifo()
