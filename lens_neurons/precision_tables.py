"""Published tables of average precision: one row a unit, named by module; which units they are here; sets from them."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from lens_neurons.errors import DataError, SettingError, StorageError
from lens_neurons.languages import canonical
from lens_neurons.module_names import LinearLayers
from lens_neurons.neurons import NeuronSet
from lens_neurons.unit_table import UnitTable, flat_numbers

# The columns of Kojima et al.'s files, by our words for them.
_COLUMNS = {"language": "concept", "module": "layer", "unit": "unit", "ap": "ap"}
_VALUES = ("on_p50", "on_p90", "off_mean", "off_p50")

# What Kojima et al.'s code calls files with the rows that it chose of a language.
_LIMITED = re.compile(r"expertise_limited_\d+_(top|bottom|both)\.csv$")
_ENDS = ("top", "bottom", "both", "all")


@dataclass(frozen=True, eq=False)
class PrecisionTable:
    """Average precisions of units as detectors of languages, as somebody published them.

    Attributes:
        frame: One row a language and unit, in the file's order: language, site, layer, neuron, ap, and the values
            that the file has (`on_p50`: median over the language's texts of the text's mean response, ...).
        sites: Site to its number of layers and of units a layer.
        files: Names of the files.
        notes: What was left out.
        ends: Language to what its rows are: "all" units of the sites that they name, or those at the "top", the
            "bottom" or "both" ends of the ranking; "" where nothing says it.
        left_out: Language to the number of its rows that were left out.
    """

    frame: pd.DataFrame
    sites: Mapping[str, tuple[int, int]]
    files: tuple[str, ...]
    notes: tuple[str, ...] = ()
    ends: Mapping[str, str] = field(default_factory=dict[str, str])
    left_out: Mapping[str, int] = field(default_factory=dict[str, int])

    @property
    def languages(self) -> tuple[str, ...]:
        """The languages, in the order of the files."""
        return tuple(str(code) for code in self.frame["language"].unique())

    def __repr__(self) -> str:
        """Return the number of rows of every language."""
        counts = ", ".join(f"{code}: {n}" for code, n in self.frame["language"].value_counts(sort=False).items())
        return f"PrecisionTable({'+'.join(self.sites)}; {counts})"

    def neurons(self, k: int = 2000, which: str = "both") -> NeuronSet:
        """Return, for every language, the k units with the highest or lowest average precision.

        As the method `average_precision` gives them (Kojima et al. 2024, arXiv 2404.02431): kinds "top" and "bottom",
        average precisions as scores, top units first, ties by (site, layer, index), which the paper's code leaves to
        chance. A table does not say which units are constant, so these are ranked too.

        Args:
            k: Units for each language, in total.
            which: "top", "bottom", or "both": half of k each.

        Raises:
            SettingError: An unknown choice, k below 1, or odd for "both".
            DataError: A language has fewer rows than are asked for, or not those of the end that is asked for.
        """
        if which not in ("top", "bottom", "both") or k < 1 or (which == "both" and k % 2):
            raise SettingError(
                f"which={which!r} with k={k} is not possible; use 'top' or 'bottom' and k of at least 1, or 'both' and "
                "an even k."
            )
        top, bottom = {"top": (k, 0), "bottom": (0, k), "both": (k // 2, k // 2)}[which]
        units: dict[str, Tensor] = {}
        scores: dict[str, Tensor] = {}
        kinds: dict[str, list[str]] = {}
        for code in self.languages:
            rows: Any = self.frame[self.frame["language"] == code]
            if len(rows) < k:
                raise DataError(f"'{code}' has {len(rows)} rows, but k={k} units are asked for; use a smaller k.")
            self._require_ends(code, len(rows), top, bottom)
            ap, flat = rows["ap"].to_numpy(dtype=np.float64), _flat(rows, self.sites)
            best, rising = np.lexsort((flat, -ap))[:top], np.lexsort((flat, ap))
            # With enough equal precisions a unit would be top and bottom at once; it is top.
            chosen = np.concatenate([best, rising[~np.isin(rising, best)][:bottom]])
            units[code], scores[code] = torch.from_numpy(flat[chosen]), torch.from_numpy(ap[chosen])
            kinds[code] = ["top"] * top + ["bottom"] * bottom
        method = {"name": "average_precision", "k": k, "which": which, "published": list(self.files)}
        return NeuronSet.from_units(
            units, sites=self.sites, scores=scores, kinds=kinds, method=method, notes=self.notes
        )

    def _require_ends(self, code: str, rows: int, top: int, bottom: int) -> None:
        """Raise unless a language's rows hold so many units of both ends of the ranking of all units."""
        ends = self.ends.get(code, "")
        if not ends:
            raise DataError(
                f"'{code}' has {rows} rows, which are not all units, and nothing says which these are; name it with "
                "read_precision_table(..., ends='top', 'bottom', 'both' or 'all')."
            )
        # Of rows that were left out nothing says from which end they were.
        half = (rows + self.left_out.get(code, 0)) // 2 - self.left_out.get(code, 0)
        most = {"all": (rows, rows), "top": (rows, 0), "bottom": (0, rows), "both": (half, half)}[ends]
        for wanted, there, end in ((top, most[0], "top"), (bottom, most[1], "bottom")):
            if wanted > there:
                raise DataError(
                    f"'{code}' has {max(there, 0)} rows at the {end} of the ranking for certain, but {wanted} are "
                    f"asked for (the file holds ends='{ends}'); use another which= or k=, or a table of all units."
                )

    def values(self, language: str, site: str, name: str = "on_p50") -> Float32[Tensor, "layer neuron"]:
        """Return a value of every unit of a site in one language, NaN where the table has no row for the unit.

        Args:
            language: Language.
            site: Site.
            name: Column of the table, such as "ap", or "on_p50", which the paper overrides the units with.

        Raises:
            DataError: The table has no such language, site or column.
        """
        code = canonical(language)
        for what, given, known in (
            ("language", code, self.languages),
            ("site", site, tuple(self.sites)),
            ("column", name, tuple(self.frame.columns[4:])),
        ):
            if given not in known:
                raise DataError(f"the table has no {what} '{given}'; it has {', '.join(known)}.")
        found = torch.full(self.sites[site], torch.nan)
        rows: Any = self.frame[(self.frame["language"] == code) & (self.frame["site"] == site)]
        at = torch.from_numpy(rows[["layer", "neuron"]].to_numpy(dtype=np.int64, copy=True))
        found[at[:, 0], at[:, 1]] = torch.from_numpy(rows[name].to_numpy(dtype=np.float32, copy=True))
        return found


def _flat(rows: Any, sites: Mapping[str, tuple[int, int]]) -> "np.ndarray[Any, np.dtype[np.int64]]":
    """Return the flat numbers of rows with site, layer and neuron."""
    site = rows["site"].map({site: i for i, site in enumerate(sites)})
    place, layer, neuron = (
        torch.from_numpy(values.to_numpy(dtype=np.int64, copy=True)) for values in (site, rows["layer"], rows["neuron"])
    )
    return flat_numbers(UnitTable(layer, neuron, torch.zeros(len(layer)).double(), place), sites).numpy()


def read_precision_table(
    paths: str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]],
    model: Any,
    *,
    columns: Mapping[str, str] | None = None,
    ends: str | None = None,
) -> PrecisionTable:
    """Return published average precisions, with modules and output indices as sites and units of ours.

    Read are CSV files with one row a unit, as Kojima et al.'s code writes them: `expertise.csv` of a language, with
    all units, and `expertise_limited_{k}_{top, bottom, both}.csv`, with those chosen. Their columns: `concept` (the
    language), `layer` (the module, such as "transformer.h.3.mlp.dense_h_to_4h:0"), `unit` (the index in its output),
    `ap`; and `on_p50`, `on_p90`, `off_mean`, `off_p50`, of which those that are there are kept. Outputs of a fused
    `query_key_value` or `c_attn` become units of q, k and v. Modules outside the blocks are left out, with a note.

    Args:
        paths: A file that names its languages; or language to the file that is of this language alone.
        model: The model that the table was made with: its name on the hub, a folder, a Hugging Face config, or a
            loaded model. Only its config is used.
        columns: Names in the file of "language", "module", "unit" and "ap", and any further columns to keep, by the
            names that they are to have; those not named are as above.
        ends: What rows that are not all units are: those at the "top", the "bottom" or "both" ends of the ranking; or
            "all", to rank them as if there were no others. Default: what a name such as
            `expertise_limited_2000_both.csv` says.

    Raises:
        SettingError: No file, or unknown ends.
        StorageError: A file does not exist or is no such table.
        DataError: A language, module or unit that does not fit; a unit twice; a precision outside 0 to 1.
        ModelError: There is no such model, or its fused layout is not known.
    """
    layers = LinearLayers.of(model)
    named = {**_COLUMNS, **(columns or {})}
    files = list(paths.items()) if isinstance(paths, Mapping) else [(None, paths)]
    if not files:
        raise SettingError("paths names no file; give one, or language to file.")
    if ends is not None and ends not in _ENDS:
        raise SettingError(f"ends={ends!r} is unknown; use {', '.join(map(repr, _ENDS))}.")
    parts: list[pd.DataFrame] = []
    left_out: dict[str, int] = {}
    named_ends: dict[str, str] = {}
    rows_read: dict[str, int] = {}
    for language, path in files:
        rows: Any = _read(path, named, with_language=language is None)
        if language is not None:
            rows["language"] = language
        codes = {label: canonical(str(label)) for label in rows["language"].unique()}
        rows["language"] = rows["language"].map(codes)
        found = _LIMITED.search(Path(path).name)
        for code, n in rows["language"].value_counts().items():
            said = ends or (found[1] if found else "")
            # Of files that say different things of one language nothing is certain.
            named_ends[str(code)] = said if named_ends.get(str(code), said) == said else ""
            rows_read[str(code)] = rows_read.get(str(code), 0) + int(n)
        parts.append(_with_places(rows, layers, left_out))
    frame: Any = pd.concat(parts, ignore_index=True)
    known = ["language", "site", "layer", "neuron"]
    if twice := int(frame.duplicated(known).sum()):
        raise DataError(f"{twice} rows name a unit that an earlier row of the language names; give every unit once.")
    frame = frame[[*known, "ap", *(name for name in frame.columns if name not in (*known, "ap"))]]
    for name in ("language", "site"):
        frame[name] = frame[name].astype("category")
    notes = tuple(f"{n} rows of '{name}', which is in no block, were left out" for name, n in left_out.items())
    own: Any = dict(iter(frame.groupby("language", observed=True)))
    for code, part in own.items():
        # All units of every site that the table names are a ranking of their own.
        if len(part) == sum(n * width for n, width in (layers.sites[site] for site in part["site"].unique())):
            named_ends[code] = "all"
    counts = {code: n - len(own[code]) for code, n in rows_read.items() if code in own}
    names = tuple(Path(path).name for _, path in files)
    return PrecisionTable(frame, layers.sites, names, notes, named_ends, counts)


def _read(path: str | os.PathLike[str], named: Mapping[str, str], *, with_language: bool) -> pd.DataFrame:
    wanted = {name: column for name, column in named.items() if with_language or name != "language"}
    texts: Any = {named[name]: str for name in ("language", "module")}
    try:
        header = pd.read_csv(path, nrows=0).columns
        if missing := [column for column in wanted.values() if column not in header]:
            raise DataError(
                f"{path} has no column '{missing[0]}'; it has {', '.join(header)}: name its columns with columns=, "
                "and its language with paths={language: file} where no column does."
            )
        values = {name: name for name in _VALUES if name in header and name not in wanted}
        by_name = {**wanted, **values}
        rows: Any = pd.read_csv(path, usecols=list(by_name.values()), dtype=texts, keep_default_na=False)
    except FileNotFoundError:
        raise StorageError(f"{path} does not exist; give the path of a table of average precisions.") from None
    except (OSError, UnicodeDecodeError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise StorageError(f"{path} cannot be read as CSV ({type(error).__name__}); give another file.") from error
    rows = pd.DataFrame({name: rows[column] for name, column in by_name.items()})
    for name in (name for name in by_name if name not in ("language", "module")):
        rows[name] = pd.to_numeric(rows[name], errors="coerce")
    unit, ap = rows["unit"], rows["ap"]
    if bool(unit.isna().any()) or bool((unit % 1 != 0).any()):
        raise DataError(f"{path} has a unit in column '{named['unit']}' that is no whole number; give another file.")
    if not bool(ap.between(0, 1).all()):
        raise DataError(f"{path} has a value in column '{named['ap']}' that is not from 0 to 1; give another file.")
    return rows


def _with_places(rows: pd.DataFrame, layers: LinearLayers, left_out: dict[str, int]) -> pd.DataFrame:
    """Return the rows with site, layer and neuron instead of module and unit."""
    names = np.array(list(layers.sites), dtype=object)
    site = np.full(len(rows), None, dtype=object)
    layer, neuron = np.zeros(len(rows), dtype=np.int64), np.zeros(len(rows), dtype=np.int64)
    for module, at in rows.groupby("module", sort=False).indices.items():
        unit: Int64[Tensor, " unit"] = torch.from_numpy(rows["unit"].to_numpy(dtype=np.int64)[at])
        found = layers.locate(str(module), unit)
        if found is None:
            left_out[str(module)] = left_out.get(str(module), 0) + len(at)
            continue
        site[at], layer[at], neuron[at] = names[found[0].numpy()], found[1], found[2].numpy()
    placed: Any = rows.drop(columns=["module", "unit"]).assign(site=site, layer=layer, neuron=neuron)
    return placed[pd.notna(placed["site"])]
