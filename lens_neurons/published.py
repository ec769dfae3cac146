"""Neuron lists as papers published them: `.pth` files of list[language][layer] of index tensors."""

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
    path: str | os.PathLike[str], languages: Sequence[str], shape: tuple[int, int]
) -> dict[str, Bool[Tensor, "layer neuron"]]:
    """Return one mask a language from a file of list[language][layer] of index tensors.

    Args:
        path: The file.
        languages: The file's languages in its order (the files do not say).
        shape: Number of layers and neurons a layer.

    Raises:
        StorageError: The file does not exist, is damaged, or does not hold such lists of integers.
        DataError: Its numbers of languages or layers, or its indices, do not fit.
    """
    entries: Any = load_plain_pth(path)
    if not isinstance(entries, list) or not all(isinstance(entry, list) for entry in entries):
        raise StorageError(f"{path} holds no list[language][layer] of tensors; expected a published neuron file.")
    if len(entries) != len(languages):
        raise DataError(f"{path} holds {len(entries)} languages, but {len(languages)} were named; name each in order.")
    masks: dict[str, Tensor] = {}
    for label, layers in zip(languages, entries, strict=True):
        if len(layers) != shape[0]:
            raise DataError(f"{path} has {len(layers)} layers for '{label}', but shape says {shape[0]}.")
        mask = torch.zeros(shape, dtype=torch.bool)
        for layer, indices in enumerate(layers):
            mask[layer, _published_indices(path, indices, shape[1])] = True
        masks[label] = mask
    return masks


def _published_indices(path: str | os.PathLike[str], entry: Any, width: int) -> Int64[Tensor, " unit"]:
    # An empty list becomes a float tensor where nobody says otherwise.
    if isinstance(entry, Tensor) and entry.numel() == 0:
        return torch.zeros(0, dtype=torch.int64)
    if not isinstance(entry, Tensor) or entry.dtype not in _INTEGERS or entry.dim() != 1:
        raise StorageError(f"{path} holds an entry that is no list of integers; expected a published neuron file.")
    indices = entry.to(torch.int64)
    for index in (int(indices.min()), int(indices.max())):
        if not 0 <= index < width:
            raise DataError(f"{path}: index {index} does not fit a layer of {width} neurons; check shape and file.")
    return indices
