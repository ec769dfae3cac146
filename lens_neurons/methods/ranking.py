"""Average precision of many units for many languages: the tensor algorithm, exact and aware of ties."""

from itertools import pairwise
from math import inf

import torch
from jaxtyping import Float, Float64, Int64, Integer
from torch import Tensor

from lens_neurons.errors import DataError

# Values worked on at once: few enough for a core's cache, and enough to fill a graphics card.
_AT_ONCE_CPU = 1 << 17
_AT_ONCE = 1 << 24


def average_precisions(
    values: Float[Tensor, "text unit"], labels: Int64[Tensor, " text"], n_languages: int
) -> Float64[Tensor, "language unit"]:
    """Return the average precision of every unit as a detector of every language, each against all others.

    With the texts of language k as positives, and P(v) and R(v) precision and recall of "value >= v is language k":

        AP = sum over the distinct values v, highest first, of (R(v) - R(previous v)) * P(v)
           = mean over the positives i of (positives with a value >= v_i) / (texts with a value >= v_i),

    so texts with equal values share a threshold, as in scikit-learn's `average_precision_score`. A constant unit gets
    the share of positives. All languages share one sort per unit: every text is a positive of exactly one language, so
    the work after it does not grow with their number.

    Terms are cut to a fixed point of about 2**-50 and added as integers: the result is the same to the last bit for
    any order or grouping of texts and units, and on every device.

    Args:
        values: One value per text and unit; any floating dtype. -0 equals 0.
        labels: Position of each text's language, from 0; in any order.
        n_languages: Number of languages; each needs a text.

    Returns:
        One number in (0, 1] per language and unit, on the device of the values (on the CPU for a device without
        float64).

    Raises:
        DataError: A language without texts, a label that is no language, or a value that is NaN or infinite.
    """
    if values.device.type == "mps":
        values = values.cpu()
    labels = labels.to(values.device)
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < n_languages:
        raise DataError(f"labels must be from 0 to {n_languages - 1}; count the languages again.")
    counts: list[int] = torch.bincount(labels, minlength=n_languages).tolist()
    if 0 in counts or not counts:
        raise DataError(f"language number {counts.index(0) if counts else 0} has no text; each needs at least one.")
    n_texts, n_units = values.shape
    found = torch.empty(n_languages, n_units, dtype=torch.float64, device=values.device)
    at_once = max(1, (_AT_ONCE_CPU if values.device.type == "cpu" else _AT_ONCE) // n_texts)
    for start in range(0, n_units, at_once):
        part = slice(start, start + at_once)
        # Rows are copied whole before they are turned: torch is slow at turning a part of a larger table.
        rows = values[:, part].contiguous().T.contiguous()
        low, high = torch.stack(rows.aminmax()).tolist()
        if not -inf < low <= high < inf:
            raise DataError("a value is NaN or infinite, so texts cannot be ranked; record again, in float32.")
        found[:, part] = _average_precisions(rows, labels, counts)
    return found


def _average_precisions(
    rows: Float[Tensor, "unit text"], labels: Int64[Tensor, " text"], counts: list[int]
) -> Float64[Tensor, "language unit"]:
    n_texts = rows.shape[1]
    ranked, owners = _ascending(rows, labels)
    # Of each text, how many texts have a lower value; then the same numbers in order of (language, value). The places
    # of a language are now the same for every unit, and only positives are looked at.
    small = len(counts) * n_texts < 2**31
    base = owners.to(torch.int32 if small else torch.int64) * n_texts
    keys = _sort(base + _run_starts(ranked))
    sizes = torch.tensor(counts, device=rows.device)
    ends = sizes.cumsum(0)
    layout = torch.arange(len(counts), device=rows.device).repeat_interleave(sizes, output_size=n_texts)
    positives = ends.to(keys.dtype)[layout] - _run_starts(keys)
    texts = (layout.to(keys.dtype) + 1) * n_texts - keys
    # Sums of n terms of at most 1 stay below 2**62.
    one = 2.0 ** (62 - n_texts.bit_length())
    terms = (positives.to(torch.float64).div_(texts).mul_(one)).to(torch.int64)
    bounds = pairwise([0, *ends.tolist()])
    sums = torch.stack([terms[:, first:last].sum(dim=1) for first, last in bounds])
    return sums.to(torch.float64) / (sizes.to(torch.float64)[:, None] * one)


def _ascending(
    rows: Float[Tensor, "unit text"], labels: Int64[Tensor, " text"]
) -> tuple[Tensor, Integer[Tensor, "unit text"]]:
    """Return every row's values in ascending order, or integers in the same order, and their labels."""
    if rows.device.type != "cpu" or rows.dtype == torch.float64:
        ranked, order = rows.sort(dim=1)
        return ranked, labels[order]
    # A float's bits, those of negative ones turned round, order as the float does; with the label in the lower half,
    # one sort of integers, which numpy has vectorised, replaces a much slower sort with positions. + 0.0 turns -0 to 0.
    bits = (rows.to(torch.float32) + 0.0).view(torch.int32)
    bits ^= (bits >> 31) & 0x7FFFFFFF
    keys = _sort((bits.to(torch.int64) << 32) | labels)
    return (keys >> 32).to(torch.int32), keys & 0xFFFFFFFF


def _sort(keys: Integer[Tensor, "unit text"]) -> Integer[Tensor, "unit text"]:
    """Return the rows in ascending order; on the CPU they are sorted in place."""
    if keys.device.type != "cpu":
        return keys.sort(dim=1).values
    keys.numpy().sort(axis=1)
    return keys


def _run_starts(ranked: Tensor) -> Integer[Tensor, "unit text"]:
    """Return, for every entry of sorted rows, the position of the first entry that equals it."""
    n_texts = ranked.shape[1]
    place = torch.arange(n_texts, dtype=torch.int32, device=ranked.device)
    starts = ranked[:, 1:] != ranked[:, :-1]
    if bool(starts.all()):
        return place.expand(ranked.shape)
    first = torch.zeros(ranked.shape, dtype=torch.int32, device=ranked.device)
    torch.mul(starts, place[1:], out=first[:, 1:])
    return first.cummax(dim=1).values
