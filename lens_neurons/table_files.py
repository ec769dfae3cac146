"""Small tables in one JSON file: results of comparisons, with where they came from and a checksum."""

import json
import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from lens_neurons.errors import DataError, StorageError
from lens_neurons.storage import SCHEMA, load_json, reading, require_fields, require_kind, sha256_of, write_atomic


def save_frames(
    path: str | os.PathLike[str], frames: Mapping[str, pd.DataFrame], kind: str, header: Mapping[str, Any]
) -> None:
    """Write some tables and a header as one JSON file, atomically; a table's index is not kept.

    Args:
        path: The file.
        frames: Name to table, of numbers, truth values and strings; NaN becomes null.
        kind: What it is.
        header: Anything else, as plain JSON values.
    """
    tables = {
        name: {
            str(column): {"type": _type(frame[column]), "values": [_plain(value) for value in frame[column].tolist()]}
            for column in frame.columns
        }
        for name, frame in frames.items()
    }
    content = json.loads(json.dumps({**header, "kind": kind, "schema": SCHEMA, "tables": tables}))
    text = json.dumps({**content, "sha256": _checksum(content)}, ensure_ascii=False)
    write_atomic(path, (text + "\n").encode())


def load_frames(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, pd.DataFrame], dict[str, Any]]:
    """Return the tables and the header of a file written by `save_frames`.

    Raises:
        StorageError: The file is absent, damaged, of another kind or of a later schema.
    """
    content = load_json(path)
    if not isinstance(content, dict):
        raise StorageError(f"{path} was not written by lens_neurons; give the path of a file that was saved before.")
    require_kind(path, content, kind)
    schema = content.get("schema")
    if not isinstance(schema, int) or schema > SCHEMA:
        raise StorageError(f"{path} has schema {schema!r}, but this version reads up to {SCHEMA}; upgrade.")
    expected = content.pop("sha256", "")
    if _checksum(content) != expected:
        raise StorageError(f"{path} fails its checksum: the file was changed or damaged; make it again.")
    with reading(path):
        require_fields(content, {"tables": dict})
        tables: dict[str, dict[str, Any]] = content.pop("tables")
        frames = {name: _frame(name, columns) for name, columns in tables.items()}
    return frames, content


def _type(values: Any) -> str:
    kinds = {"f": "float64", "i": "int64", "u": "int64", "b": "bool"}
    return kinds.get(values.dtype.kind, "text")


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value


def _frame(name: str, columns: Mapping[str, Any]) -> pd.DataFrame:
    if len({len(part["values"]) for part in columns.values()}) > 1:
        raise DataError(f"the columns of table '{name}' are of different lengths; make the file again.")
    return pd.DataFrame({column: _restored(part) for column, part in columns.items()})


def _restored(part: Mapping[str, Any]) -> pd.Series:
    values: Any = part["values"]
    if part["type"] == "float64":
        values = [np.nan if value is None else value for value in values]
    # What holds text is another type in every major version of pandas: it finds its own.
    return pd.Series(values) if part["type"] == "text" else pd.Series(values, dtype=part["type"])


def _checksum(content: Mapping[str, Any]) -> str:
    return sha256_of(json.dumps(content, sort_keys=True, ensure_ascii=False))
