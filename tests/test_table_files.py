"""Tables in JSON files: types and absent values survive, and what was changed is refused."""

import json

import numpy as np
import pandas as pd
import pytest

from lens_neurons.errors import StorageError
from lens_neurons.table_files import load_frames, save_frames

FRAMES = {
    "first": pd.DataFrame(
        {"name": ["a", "ü猫", ""], "value": [0.1, np.nan, 1e-300], "n": [1, -2, 3], "met": [True, False, True]}
    ),
    "empty": pd.DataFrame({"value": pd.Series([], dtype="float64"), "n": pd.Series([], dtype="int64")}),
}


def test_types_and_absent_values_survive(tmp_path) -> None:
    save_frames(tmp_path / "x.json", FRAMES, "tables", {"notes": ["one"], "settings": {"k": 1}})
    frames, header = load_frames(tmp_path / "x.json", "tables")
    assert list(frames) == ["first", "empty"]
    for name, frame in FRAMES.items():
        pd.testing.assert_frame_equal(frames[name], frame)
    assert header["notes"] == ["one"]
    assert header["settings"] == {"k": 1}
    # Plain JSON: no NaN, which other readers refuse.
    assert "NaN" not in (tmp_path / "x.json").read_text("utf-8")


def test_what_was_changed_or_is_something_else_is_refused(tmp_path) -> None:
    path = tmp_path / "x.json"
    save_frames(path, FRAMES, "tables", {})
    with pytest.raises(StorageError, match="'tables', but 'others' was expected"):
        load_frames(path, "others")
    content = json.loads(path.read_text("utf-8"))
    content["tables"]["first"]["n"]["values"][0] = 7
    path.write_text(json.dumps(content), "utf-8")
    with pytest.raises(StorageError, match="checksum"):
        load_frames(path, "tables")
    path.write_text(json.dumps({**content, "schema": 99}), "utf-8")
    with pytest.raises(StorageError, match="schema 99"):
        load_frames(path, "tables")
    path.write_text("{", "utf-8")
    with pytest.raises(StorageError, match="not valid JSON"):
        load_frames(path, "tables")
    with pytest.raises(StorageError, match="does not exist"):
        load_frames(tmp_path / "absent.json", "tables")
