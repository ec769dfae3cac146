"""Neuron lists as papers published them: `.pth` files of list[language][layer] of index tensors, or of masks."""

import os
import pickle
import struct
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from lens_neurons.errors import DataError, StorageError
from lens_neurons.languages import canonical

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)

# What torch.load raises on bytes that are no file of its own, or only the beginning of one.
_UNREADABLE = (
    pickle.UnpicklingError,
    struct.error,
    tarfile.TarError,
    AssertionError,
    AttributeError,
    EOFError,
    ImportError,
    IndexError,
    KeyError,
    MemoryError,
    OSError,
    OverflowError,
    RuntimeError,
    TypeError,
    ValueError,
)


def load_plain_pth(path: str | os.PathLike[str]) -> Any:
    """Return what a `.pth` file holds, read with `torch.load(weights_only=True)`.

    Raises:
        StorageError: The file does not exist, is damaged or holds more than plain tensors and containers.
    """
    if not Path(path).is_file():
        raise StorageError(f"{path} does not exist; give the path of a published .pth file.")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        raise StorageError(
            f"{path} cannot be read as a .pth file ({type(error).__name__}); it is damaged or of another kind."
        ) from error


def read_lists(
    path: str | os.PathLike[str], languages: Sequence[str] | None, shape: tuple[int, int], *, allow_short: bool = False
) -> tuple[dict[str, Bool[Tensor, "layer neuron"]], tuple[str, ...]]:
    """Return one mask a language, and notes, from a file of list[language][layer] of index tensors.

    Masks are read too: a tensor [language, layer, neuron], or one [layer, neuron] instead of a language's lists, of
    truth values or of 0 and 1; or one [neuron] of truth values instead of a layer's indices. A dictionary by language
    may stand for the outer list.

    Args:
        path: The file.
        languages: The file's languages in its order; None for a dictionary, which says them itself.
        shape: Number of layers and neurons a layer.
        allow_short: Whether languages at the end may be missing. The LAPE code drops trailing languages that have no
            neurons (`indices.split(bincount(language))`), so that the list is shorter than the languages were.

    Raises:
        StorageError: The file does not exist, is damaged, or does not hold such lists of integers.
        DataError: Its numbers of languages or layers, or its indices, do not fit; a language or an index comes twice.
    """
    entries: Any = load_plain_pth(path)
    if isinstance(entries, Tensor) and entries.dim() == 3:
        entries = list(entries)
    listed = list(entries.values()) if isinstance(entries, dict) else entries
    if not isinstance(listed, list) or not all(isinstance(entry, list) or _is_matrix(entry) for entry in listed):
        raise StorageError(f"{path} holds no list[language][layer] of tensors; expected a published neuron file.")
    if isinstance(entries, dict):
        # The keys may be numbers.
        by_name = list(zip(map(str, entries), listed, strict=True))
        _require_once(path, [name for name, _ in by_name])
        names = [name for name, _ in by_name] if languages is None else list(languages)
        if sorted(names) != sorted(name for name, _ in by_name):
            raise DataError(f"{path} has the languages {', '.join(map(str, entries))}; name these, or none.")
        listed = [dict(by_name)[name] for name in names]
    elif languages is None:
        raise DataError(f"{path} does not say its languages; name its {len(listed)} languages in order.")
    else:
        names = list(languages)
    _require_once(path, names)
    n = len(listed)
    if n > len(names) or (n < len(names) and not allow_short):
        also = ", or use allow_short=True where the last have no neurons" if n < len(names) else ""
        raise DataError(f"{path} holds {n} languages, but {len(names)} were named; name each in order{also}.")
    masks = {label: _mask(path, label, entry, shape) for label, entry in zip(names, listed, strict=False)}
    masks |= {label: torch.zeros(shape, dtype=torch.bool) for label in names[n:]}
    return masks, ((f"the file ends before {', '.join(names[n:])}; taken as without neurons",) if names[n:] else ())


def _require_once(path: str | os.PathLike[str], names: Sequence[str]) -> None:
    """Raise a DataError where two names are one language, which would lose the first one's neurons."""
    first: dict[str, str] = {}
    for name in names:
        if canonical(name) in first:
            raise DataError(
                f"'{first[canonical(name)]}' and '{name}' are both '{canonical(name)}', but {path} has one entry a "
                "language; give each a name of its own."
            )
        first[canonical(name)] = name


def _is_matrix(entry: Any) -> bool:
    return isinstance(entry, Tensor) and entry.dim() == 2


def _mask(path: str | os.PathLike[str], label: str, entry: Any, shape: tuple[int, int]) -> Bool[Tensor, "layer neuron"]:
    if len(entry) != shape[0]:
        raise DataError(f"{path} has {len(entry)} layers for '{label}', but shape says {shape[0]}.")
    mask = torch.zeros(shape, dtype=torch.bool)
    if isinstance(entry, Tensor):
        if entry.shape[1] != shape[1]:
            raise DataError(f"{path} has masks of {entry.shape[1]} neurons a layer, but shape says {shape[1]}.")
        if bool(((entry != 0) & (entry != 1)).any()):
            raise StorageError(f"{path} holds a mask with other values than 0 and 1; expected a published file.")
        return entry != 0
    for layer, indices in enumerate(entry):
        mask[layer, _published_indices(path, indices, shape[1])] = True
    return mask


def _published_indices(path: str | os.PathLike[str], entry: Any, width: int) -> Int64[Tensor, " unit"]:
    # An empty list becomes a float tensor where nobody says otherwise.
    if isinstance(entry, Tensor) and entry.numel() == 0:
        return torch.zeros(0, dtype=torch.int64)
    if isinstance(entry, Tensor) and entry.dtype == torch.bool and entry.dim() == 1:
        if len(entry) != width:
            raise DataError(f"{path} has a mask of {len(entry)} neurons, but shape says {width} a layer; give another.")
        return entry.nonzero()[:, 0]
    if not isinstance(entry, Tensor) or entry.dtype not in _INTEGERS or entry.dim() != 1:
        raise StorageError(f"{path} holds an entry that is no list of integers; expected a published neuron file.")
    indices = entry.to(torch.int64)
    for index in (int(indices.min()), int(indices.max())):
        if not 0 <= index < width:
            raise DataError(f"{path}: index {index} does not fit a layer of {width} neurons; check shape and file.")
    if len(indices.unique()) != len(indices):
        raise DataError(
            f"{path} has a layer that names an index twice; give every index once, or, if these are masks of 0 and 1, "
            "truth values (torch.bool) or one tensor [layer, neuron] a language."
        )
    return indices
