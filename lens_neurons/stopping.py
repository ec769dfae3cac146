"""When a recording has seen enough: the face of a stop rule. `until_stable` in `split_halves` makes one.

How `record(..., stop_when=rule)` uses it: languages are recorded in rounds instead of one after another. A round is
the next `rule.check_every` shards of every language that has any left. After each round `rule.check(parts)` is given,
for every language, the sums of each of its shards so far, in the order of its texts; the recording ends once the check
says `stop`, or where the texts do. A check is a function of the shards alone, so that a recording that was interrupted
stops at the same shard as one that was not; `rule.to_dict()` is kept with the recording, and the last check's `reason`
among its notes.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lens_neurons.collecting import PartialSums


@dataclass(frozen=True)
class StopCheck:
    """What a stop rule found.

    Attributes:
        stop: Whether what has been recorded is enough.
        reason: Why, or why not, in a sentence.
        values: What was measured, by language.
    """

    stop: bool
    reason: str
    values: Mapping[str, float]


class StopRule(ABC):
    """Says when a recording has seen enough.

    Attributes:
        check_every: Shards of every language between two checks.
    """

    check_every: int

    @abstractmethod
    def check(self, parts: Mapping[str, Sequence[PartialSums]]) -> StopCheck:
        """Return whether the shards recorded so far are enough.

        Args:
            parts: Language to the sums of each shard, in the order of the texts; every language once each.
        """

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Return everything that decides what `check` says, as plain JSON values."""
