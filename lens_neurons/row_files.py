"""Rows of texts on disk: one file a shard, and one JSON file that says which files belong together.

- `responses/{language}-{first}-{last}.safetensors`: positions and rows; the header says of which recording it is.
- `responses.json`: everything else, and the list of files; what is not listed is not read.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from lens_neurons.errors import StorageError
from lens_neurons.responses import ROWS_KIND, Rows, TextResponses, mapped_rows
from lens_neurons.storage import SCHEMA, load_json, load_tensors, reading, save_json, save_tensors, sha256_of

# First and last text of a file.
Span = tuple[int, int]


def file_name(language: str) -> str:
    """Return a group label as part of a file name: a label may be anything, such as "C/C++"."""
    return quote(language, safe="")


def rows_file(folder: Path, name: str, language: str, first: int, last: int) -> Path:
    """Return where the rows of texts first to last are kept."""
    return folder / name / f"{file_name(language)}-{first}-{last}.safetensors"


def rows_of(
    folder: Path, name: str, language: str, spans: Sequence[Span], *, recording: str, corpus: str
) -> tuple[Rows, ...]:
    """Return the rows of a language in the files that are named, in their order.

    Args:
        folder: The recording.
        name: Name of the part, such as "responses".
        language: The language.
        spans: First and last text of every file.
        recording: Identity of the recording that the files must be of.
        corpus: Fingerprint of the texts.

    Raises:
        StorageError: A file is gone or damaged, or of another recording.
    """
    found: list[Rows] = []
    for first, last in spans:
        expected = {"recording": recording, "language": language, "first": first, "last": last}
        found.append(replace(mapped_rows(rows_file(folder, name, language, first, last), expected), corpus=corpus))
    return tuple(found)


def save_rows(
    folder: Path, name: str, responses: TextResponses, spans: Mapping[str, Sequence[Span]], recording: str
) -> None:
    """Write the list of files, and everything else that `load_rows` needs beside them."""
    corpora = {code: [part.corpus for part in own] for code, own in responses.parts.items()}
    counts = {code: [len(part.positions) for part in own] for code, own in responses.parts.items()}
    listed = {"recording": recording, "files": {code: list(own) for code, own in spans.items()}}
    text = {**responses.header(), **listed, "corpora": corpora, "counts": counts}
    save_json(folder / f"{name}.json", {**text, "sha256": _checksum(text)})


def save_all(folder: Path, name: str, responses: TextResponses) -> None:
    """Write rows that may be in memory: one file a part of a language."""
    spans: dict[str, list[Span]] = {}
    for code, own in responses.parts.items():
        at = 0
        for part in own:
            span = (at, at + len(part.positions) - 1)
            header = {"schema": SCHEMA, "kind": ROWS_KIND, "recording": "", "language": code}
            tensors = {"positions": part.positions, "rows": part.read(0, responses.n_units)}
            file = rows_file(folder, name, code, *span)
            save_tensors(file, tensors, {**header, "first": span[0], "last": span[1]})
            spans.setdefault(code, []).append(span)
            at = span[1] + 1
    save_rows(folder, name, responses, spans, "")


def load_rows(folder: Path, name: str, *, verify: bool = False) -> TextResponses:
    """Return rows of texts, which stay in their files.

    Args:
        folder: The recording.
        name: Name of the part.
        verify: Read every file once and check its sum.

    Raises:
        StorageError: The list or a file is gone, damaged, or of another recording.
    """
    file = folder / f"{name}.json"
    text = load_json(file)
    if not isinstance(text, dict) or text.pop("sha256", None) != _checksum(text):
        raise StorageError(
            f"{file} was changed or damaged; call record again with the same path, or download it again."
        )
    with reading(file):
        parts: dict[str, tuple[Rows, ...]] = {}
        for code in text["languages"]:
            spans = [(int(first), int(last)) for first, last in text["files"][code]]
            read = rows_of(folder, name, code, spans, recording=text["recording"], corpus="")
            if [len(part.positions) for part in read] != text["counts"][code]:
                raise StorageError(
                    f"{folder / name} holds other numbers of rows of '{code}' than {file} says; record again."
                )
            parts[code] = tuple(
                replace(part, corpus=corpus) for part, corpus in zip(read, text["corpora"][code], strict=True)
            )
            if verify:
                for first, last in spans:
                    load_tensors(rows_file(folder, name, code, first, last))
        return TextResponses.from_header(text, parts)


def _checksum(text: Mapping[str, Any]) -> str:
    return sha256_of(json.dumps(text, sort_keys=True, ensure_ascii=False))
