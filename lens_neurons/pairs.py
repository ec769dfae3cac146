"""Prompts with completions: texts of which only the completion counts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lens_neurons.errors import DataError


class Pair(NamedTuple):
    """A prompt and what follows it; only the completion's tokens count in statistics.

    Attributes:
        prompt: What stands before; may be empty.
        completion: What counts, with the separator (a space, a newline) that it begins with.
    """

    prompt: str
    completion: str


@dataclass(frozen=True)
class PairEncoding:
    """A prompt and its continuation as one row of tokens.

    Attributes:
        ids: Token ids of both, BOS included.
        answer_start: Position of the continuation's first token.
    """

    ids: tuple[int, ...]
    answer_start: int


# What a corpus holds: a text of which every token counts, or a prompt and its completion.
Text = str | Pair


def to_pairs(label: str, entries: Sequence[Sequence[str]]) -> tuple[Pair, ...]:
    """Return the entries of one language as pairs.

    Raises:
        DataError: One string in place of a list, no entry, or an entry that is not two strings.
    """
    if isinstance(entries, str):
        raise DataError(f"'{label}' is one string; expected a list of pairs: {{'{label}': [('...', '...')]}}.")
    made: list[Pair] = []
    for number, entry in enumerate(entries):
        parts = () if isinstance(entry, str) else tuple(entry)
        if len(parts) != 2 or not all(isinstance(part, str) for part in parts):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise DataError(f"pair {number} of '{label}' is {entry!r}; expected two strings, (prompt, completion).")
        made.append(Pair(parts[0], parts[1]))
    if not made:
        raise DataError(f"language '{label}' has no pair; give it at least one or leave it out.")
    return tuple(made)
