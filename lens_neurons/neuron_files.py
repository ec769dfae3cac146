"""Neuron sets in other formats: tables (CSV, Parquet), the lists that papers published; out and in again."""

import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow
import pyarrow.parquet
import torch
from jaxtyping import Int64
from torch import Tensor

from lens_neurons.errors import DataError, SettingError, StorageError
from lens_neurons.languages import canonical
from lens_neurons.neurons import NeuronSet, header_of, require_header, sites_of, with_header
from lens_neurons.published import read_lists
from lens_neurons.storage import (
    SCHEMA,
    Provenance,
    load_json,
    reading,
    require_kind,
    save_json,
    sha256_of,
    write_atomic,
)
from lens_neurons.unit_table import UnitTable, flat_numbers

_FORMATS = {".safetensors": "safetensors", ".csv": "csv", ".parquet": "parquet", ".pth": "lape", ".pt": "lape"}
_METADATA = b"lens_neurons"

# Of other people's tables these are enough.
_NEEDED = ("language", "layer", "neuron")
_NUMBERS = {"layer": "int64", "neuron": "int64", "score": "float64", "rank": "int64"}


def to_lape_list(neurons: NeuronSet) -> list[list[Int64[Tensor, " unit"]]]:
    """Return a set with one site as the list that the LAPE code reads: [language][layer], ascending indices.

    Every language of the set has its entry, those without neurons too: the LAPE code drops them at the end. Order and
    scores of the neurons are not kept.

    Raises:
        DataError: The set has several sites.
    """
    masks = (neurons.mask(code) for code in neurons.languages)
    return [[row.nonzero()[:, 0] for row in mask] for mask in masks]


def export_neurons(neurons: NeuronSet, path: str | os.PathLike[str], format: str | None = None) -> None:
    """Write a neuron set for other programs; `import_neurons` reads all of it back.

    - `.safetensors`: what `NeuronSet.save` writes.
    - `.parquet`: one row a language and unit (language, site, layer, neuron, score, rank, and kind where there are
      kinds); languages, sites, method and provenance as JSON in the file's metadata, under "lens_neurons".
    - `.csv`: the same rows; the rest in a second file, `{path}-metadata.json`.
    - `.pth`: the list of the LAPE code, see `to_lape_list`; the rest, but scores and kinds, in `{path}-metadata.json`.

    Args:
        neurons: The set.
        path: The file.
        format: "safetensors", "parquet", "csv" or "lape"; default: what the name's suffix says.

    Raises:
        SettingError: An unknown format.
        DataError: A set with several sites as a LAPE list.
    """
    chosen = _format_of(path, format, ("safetensors", "parquet", "csv", "lape"))
    if chosen == "safetensors":
        neurons.save(path)
    elif chosen == "parquet":
        write_atomic(path, _to_parquet(neurons))
    elif chosen == "csv":
        text = neurons.to_frame().to_csv(index=False, lineterminator="\n", na_rep="nan")
        _write_with_metadata(path, text.encode(), header_of(neurons))
    else:
        buffer = io.BytesIO()
        torch.save(to_lape_list(neurons), buffer)
        _write_with_metadata(path, buffer.getvalue(), {**header_of(neurons), "kinds": []})


def import_neurons(
    path: str | os.PathLike[str],
    format: str | None = None,
    *,
    languages: Sequence[str] | None = None,
    sites: Mapping[str, tuple[int, int]] | None = None,
    allow_short: bool = False,
) -> NeuronSet:
    """Return the neuron set in a file of this package, of another program, or of a paper.

    A file that `export_neurons` wrote says everything itself. For others name what they do not say:

    - `.csv`, `.parquet`: any table with columns language, layer and neuron, and, where there are, site (needed where
      `sites` has several), score, rank and kind. Without ranks the order of the rows is that of the neurons.
    - `.pth`, format "lape" (Tang et al. 2024 and what follows them): list[language][layer] of index tensors, or masks
      [language, layer, neuron]. Read with `torch.load(weights_only=True)`.
    - format "ternary" (Zhang et al. 2026): such lists or masks, of which the kinds are made: "specific" to one
      language, "related" to several, "general" to all.

    Tables of average precision have a function of their own, `read_precision_table`.

    Args:
        path: The file.
        format: "safetensors", "parquet", "csv", "lape" or "ternary"; default: what the name's suffix says.
        languages: Languages of a `.pth` file in its order; of a table, all that it may name, so that empty ones are
            kept; of a file that says them itself, those wanted.
        sites: Site to its number of layers and of units a layer; with it a file is read as somebody else's.
        allow_short: Take languages that are missing at the end of a LAPE list for empty; the set's notes say so.

    Raises:
        SettingError: An unknown format.
        StorageError: The file does not exist, is damaged, or is of another kind.
        DataError: Sites or languages are needed and not given, or do not fit the file.
    """
    chosen = _format_of(path, format, ("safetensors", "parquet", "csv", "lape", "ternary"))
    if not Path(path).is_file():
        raise StorageError(f"{path} does not exist; give the path of a file with neurons.")
    if chosen == "safetensors":
        header, neurons = {}, NeuronSet.load(path)
    elif chosen in ("csv", "parquet"):
        frame, header = (
            _read_csv(path, own=sites is None) if chosen == "csv" else _read_parquet(path, own=sites is None)
        )
        rows = _columns(path, frame)
        neurons = _from_rows(path, rows, header or _foreign_header(path, rows, languages, sites))
    else:
        header = _metadata_beside(path) if sites is None else None
        neurons = _from_pth(path, header, languages, sites, ternary=chosen == "ternary", allow_short=allow_short)
    # A file that says its languages itself may have more than are wanted.
    return neurons if header is None or languages is None else neurons.select(languages)


def _from_pth(
    path: str | os.PathLike[str],
    header: Mapping[str, Any] | None,
    languages: Sequence[str] | None,
    sites: Mapping[str, tuple[int, int]] | None,
    *,
    ternary: bool,
    allow_short: bool,
) -> NeuronSet:
    places: Any = sites if header is None else header["sites"]
    if not places or len(places) != 1:
        raise DataError(f"{path} does not say its site and shape; give one, as sites={{'gate_act': (layers, width)}}.")
    site, (n_layers, width) = next(iter(places.items()))
    names = languages if header is None else header["languages"]
    if not ternary:
        neurons = NeuronSet.from_published(
            path, languages=names, shape=(n_layers, width), site=site, allow_short=allow_short
        )
        return neurons if header is None else with_header(neurons.tables, header)
    masks, notes = read_lists(path, names, (n_layers, width), allow_short=allow_short)
    if len(masks) < 2:
        raise DataError(f"{path} has one language, so no unit is related or general; use format='lape'.")
    owners = torch.stack(list(masks.values())).sum(dim=0)
    kinds = {"specific": owners == 1, "related": (owners > 1) & (owners < len(masks)), "general": owners == len(masks)}
    return NeuronSet.from_masks(
        masks,
        site=site,
        kinds=kinds,
        provenance=None if header is None else Provenance.from_dict(header["provenance"]),
        method={"name": "ternary", "file": Path(path).name},
        notes=notes,
    )


def _format_of(path: str | os.PathLike[str], format: str | None, known: Sequence[str]) -> str:
    chosen = format or _FORMATS.get(Path(path).suffix.lower(), "")
    if chosen not in known:
        given = f"format={format!r} is unknown" if format else f"the suffix of '{Path(path).name}' says no format"
        raise SettingError(f"{given}; use format={', '.join(map(repr, known))}, or a suffix of {', '.join(_FORMATS)}.")
    return chosen


# Out.


def _metadata_path(path: str | os.PathLike[str]) -> Path:
    return Path(f"{os.fspath(path)}-metadata.json")


def _write_with_metadata(path: str | os.PathLike[str], data: bytes, header: Mapping[str, Any]) -> None:
    # A file without its metadata can be read by naming languages and sites; metadata of another file would be wrong.
    _metadata_path(path).unlink(missing_ok=True)
    write_atomic(path, data)
    save_json(_metadata_path(path), {**header, "sha256": sha256_of(data)})


def _to_parquet(neurons: NeuronSet) -> bytes:
    frame: Any = neurons.to_frame()
    types: dict[str, Any] = {name: pyarrow.type_for_alias(kind) for name, kind in _NUMBERS.items()}
    arrays = {
        name: pyarrow.array(frame[name].tolist(), type=types.get(name, pyarrow.string())) for name in frame.columns
    }
    table: Any = pyarrow.table(arrays)
    text = json.dumps(header_of(neurons), sort_keys=True, ensure_ascii=False)
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(table.replace_schema_metadata({_METADATA: text.encode()}), buffer)
    return buffer.getvalue()


# In.


def _metadata_beside(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Return what stands in the second file of an export, None where there is none."""
    beside = _metadata_path(path)
    if not beside.is_file():
        return None
    header = load_json(beside)
    _require_header(beside, header)
    if header.get("sha256") != sha256_of(Path(path)):
        raise StorageError(
            f"{path} is not the file that {beside.name} was written for, or was changed since; name sites (and "
            "languages) to read it as somebody else's."
        )
    return header


def _require_header(path: str | os.PathLike[str], header: Any) -> None:
    wanted = {"languages", "sites", "kinds", "method", "notes", "provenance"}
    if not isinstance(header, dict) or not wanted <= set(header):
        raise StorageError(f"{path} has no complete metadata of a neuron set; name sites (and languages) instead.")
    require_kind(path, header, "neuron_set")
    if not isinstance(header.get("schema"), int) or header["schema"] > SCHEMA:
        raise StorageError(f"{path} has schema {header.get('schema')}, above {SCHEMA}; upgrade lens_neurons.")
    with reading(path):
        require_header(header)


def _read_csv(path: str | os.PathLike[str], *, own: bool) -> tuple[pd.DataFrame, dict[str, Any] | None]:
    header = _metadata_beside(path) if own else None
    # No word is a missing value: "NA" may be the label of a language. And Python reads the shortest decimals of a
    # float64 back exactly, which pandas may not.
    try:
        return pd.read_csv(path, dtype=str, keep_default_na=False), header
    except (ValueError, UnicodeDecodeError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise StorageError(f"{path} cannot be read as CSV ({type(error).__name__}); give another file.") from error


def _read_parquet(path: str | os.PathLike[str], *, own: bool) -> tuple[pd.DataFrame, dict[str, Any] | None]:
    try:
        table: Any = pyarrow.parquet.read_table(path)
        text = (table.schema.metadata or {}).get(_METADATA)
        header = json.loads(text) if own and text is not None else None
        frame = pd.DataFrame({name: table[name].to_pylist() for name in table.column_names})
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise StorageError(f"{path} cannot be read as Parquet ({type(error).__name__}); give another file.") from error
    if header is not None:
        _require_header(path, header)
    return frame, header


def _columns(path: str | os.PathLike[str], frame: pd.DataFrame) -> Any:
    """Return the columns that a neuron set has, by their types, in order of rank."""
    if missing := [name for name in _NEEDED if name not in frame.columns]:
        raise DataError(f"{path} has no column '{missing[0]}'; a table of neurons has language, layer and neuron.")
    columns: dict[str, Any] = {}
    for name in (name for name in ("language", "site", *_NUMBERS, "kind") if name in frame.columns):
        values: Any = frame[name]
        if name not in _NUMBERS:
            if bool(values.isna().any()):
                raise DataError(f"{path} has a row without a value in column '{name}'; correct it.")
            columns[name] = values.astype("str")
            continue
        try:
            columns[name] = values.astype("float64")
        except (ValueError, TypeError) as error:
            raise DataError(f"{path} has a value in column '{name}' that is no number; correct it.") from error
        if _NUMBERS[name] == "int64":
            if bool((columns[name] % 1 != 0).any()):
                raise DataError(f"{path} has a value in column '{name}' that is no whole number; correct it.")
            columns[name] = columns[name].astype("int64")
    rows = pd.DataFrame(columns)
    return rows.sort_values("rank", kind="stable") if "rank" in columns else rows


def _foreign_header(
    path: str | os.PathLike[str],
    rows: Any,
    languages: Sequence[str] | None,
    sites: Mapping[str, tuple[int, int]] | None,
) -> dict[str, Any]:
    """Return the header of somebody else's table."""
    if not sites:
        raise DataError(f"{path} does not say its sites; give sites={{'gate_act': (layers, width)}}.")
    named = [canonical(label) for label in (languages or rows["language"].unique())]
    return {
        "languages": list(dict.fromkeys(named)),
        "sites": dict(sites),
        "kinds": list(rows["kind"].unique()) if "kind" in rows else [],
        "method": {"name": "published", "file": Path(path).name},
        "notes": [],
        "provenance": Provenance.unknown(next(iter(sites.values())), "+".join(sites)).to_dict(),
    }


def _from_rows(path: str | os.PathLike[str], rows: Any, header: Mapping[str, Any]) -> NeuronSet:
    """Return the set of a table's rows and a header."""
    sites, languages, kinds = sites_of(header), list(header["languages"]), list(header["kinds"])
    if "site" not in rows and len(sites) > 1:
        raise DataError(f"{path} has no column 'site', so its units cannot be of {', '.join(sites)}; name one site.")
    language = rows["language"].map({label: canonical(label) for label in rows["language"].unique()})
    columns: dict[str, Tensor] = {}
    for name, values, known in (
        ("language", language, languages),
        ("site", rows["site"] if "site" in rows else pd.Series(next(iter(sites)), rows.index), list(sites)),
        ("kind", rows["kind"] if kinds and "kind" in rows else pd.Series("", rows.index), kinds or [""]),
    ):
        places = {label: place for place, label in enumerate(known)}
        if unknown := sorted(set(values.unique()) - set(known)):
            raise DataError(f"{path} has the {name} '{unknown[0]}', which is none of {', '.join(known)}; name it too.")
        columns[name] = _tensor(values.map(places), torch.int64)
    layer, index = (_tensor(rows[name], torch.int64) for name in ("layer", "neuron"))
    score = _tensor(rows["score"] if "score" in rows else pd.Series(0.0, rows.index), torch.float64)
    shapes = torch.tensor([list(shape) for shape in sites.values()], dtype=torch.int64)[columns["site"]]
    outside = (layer < 0) | (layer >= shapes[:, 0]) | (index < 0) | (index >= shapes[:, 1])
    if bool(outside.any()):
        at = int(outside.nonzero()[0, 0])
        raise DataError(
            f"{path} has neuron {int(index[at])} of layer {int(layer[at])}, which is outside the sites {dict(sites)}; "
            "give the sites of its model."
        )
    tables: dict[str, UnitTable] = {}
    for place, code in enumerate(languages):
        own = columns["language"] == place
        kind = columns["kind"][own] if kinds else None
        tables[code] = UnitTable(layer[own], index[own], score[own], columns["site"][own], kind)
        flat = flat_numbers(tables[code], sites)
        if len(flat.unique()) != len(flat):
            raise DataError(f"{path} has a unit twice in '{code}'; give every unit once.")
    return with_header(tables, header)


def _tensor(values: Any, dtype: torch.dtype) -> Tensor:
    return torch.tensor(values.tolist(), dtype=dtype)
