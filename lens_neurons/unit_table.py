"""The units of one language, as columns; flat unit numbers; random draws of as many units a layer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor

from lens_neurons.errors import DataError
from lens_neurons.storage import derive_seed, require_tables


@dataclass(frozen=True)
class UnitTable:
    """The units of one language, best first.

    Attributes:
        layer: Layer of each unit.
        index: Index of each unit within its layer.
        score: What the method ranked it by (its meaning is the method's).
        site: Position of each unit's site in the set's `sites`.
        kind: Position of each unit's kind in the set's `kinds`; None where the method tells no kinds apart.
    """

    layer: Int64[Tensor, " unit"]
    index: Int64[Tensor, " unit"]
    score: Float64[Tensor, " unit"]
    site: Int64[Tensor, " unit"]
    kind: Int64[Tensor, " unit"] | None = None

    def __len__(self) -> int:
        """Return the number of units."""
        return self.layer.shape[0]

    def take(self, chosen: Bool[Tensor, " unit"] | Int64[Tensor, " taken"]) -> "UnitTable":
        """Return some of the units, by mask or by position."""
        kind = None if self.kind is None else self.kind[chosen]
        return UnitTable(self.layer[chosen], self.index[chosen], self.score[chosen], self.site[chosen], kind)


def flat_numbers(table: UnitTable, sites: Mapping[str, tuple[int, int]]) -> Int64[Tensor, " unit"]:
    """Return the flat numbers of units: sites in their order, then layer, then index."""
    shapes = torch.tensor(list(sites.values()), dtype=torch.int64)
    offsets = torch.cumsum(shapes.prod(dim=1), dim=0) - shapes.prod(dim=1)
    return offsets[table.site] + table.layer * shapes[table.site, 1] + table.index


def require_columns(columns: Mapping[str, Tensor], sites: Mapping[str, tuple[int, int]], n_kinds: int) -> None:
    """Raise a DataError unless columns, by name, are of distinct units of the sites and of so many kinds."""
    hints = dict.fromkeys(columns, Int64[Tensor, " unit"]) | {"score": Float64[Tensor, " unit"]}
    require_tables(columns, hints)
    if not len(columns["layer"]):
        return
    shapes = torch.tensor(list(sites.values()), dtype=torch.int64)
    limits = {"site": torch.tensor(len(sites)), "kind": torch.tensor(n_kinds)}
    for name in ("site", "kind", "layer", "index"):
        if name in ("layer", "index"):
            limits[name] = shapes[columns["site"], ("layer", "index").index(name)]
        if name in columns and bool(((columns[name] < 0) | (columns[name] >= limits[name])).any()):
            raise DataError(f"a unit's {name} is outside the sites {dict(sites)} and {n_kinds} kinds; correct it.")
    flat = flat_numbers(UnitTable(**columns), sites)
    if len(flat.unique()) != len(flat):
        raise DataError("a unit comes twice in one language; give every unit once.")


def places(
    flat: Int64[Tensor, " unit"], sites: Mapping[str, tuple[int, int]]
) -> tuple[Int64[Tensor, " unit"], Int64[Tensor, " unit"], Int64[Tensor, " unit"]]:
    """Return site position, layer and index of flat unit numbers."""
    shapes = torch.tensor(list(sites.values()), dtype=torch.int64)
    ends = torch.cumsum(shapes.prod(dim=1), dim=0)
    site = torch.searchsorted(ends, flat, right=True)
    inside = flat - (ends - shapes.prod(dim=1))[site]
    width = shapes[site, 1]
    return site, inside // width, inside % width


def concatenated(first: UnitTable, second: UnitTable) -> UnitTable:
    """Return the units of both, the first one's before; kinds only where both have them."""
    kind = None if first.kind is None or second.kind is None else torch.cat([first.kind, second.kind])
    layer, index, score, site = (
        torch.cat([getattr(first, name), getattr(second, name)]) for name in ("layer", "index", "score", "site")
    )
    return UnitTable(layer, index, score, site, kind)


def kinds_by_unit(
    units: Mapping[str, Int64[Tensor, " _"]], kinds: Mapping[str, Bool[Tensor, "layer neuron"]]
) -> dict[str, list[str]]:
    """Return the name of the kind of every unit, by language.

    Raises:
        DataError: A unit has no kind, or two.
    """
    names, stacked = list(kinds), torch.stack([mask.flatten().cpu() for mask in kinds.values()])
    which, owners = stacked.to(torch.int64).argmax(dim=0), stacked.sum(dim=0)
    if any(bool((owners[flat] != 1).any()) for flat in units.values()):
        raise DataError(f"every unit needs exactly one kind of {', '.join(kinds)}; some have none or several.")
    return {label: [names[i] for i in which[flat].tolist()] for label, flat in units.items()}


def draw_like(
    table: UnitTable,
    sites: Mapping[str, tuple[int, int]],
    taken: Bool[Tensor, " unit"],
    seed: int,
    language: str,
    *,
    allow_short: bool,
) -> tuple[Int64[Tensor, " drawn"], Sequence[str]]:
    """Return flat numbers of random free units, as many in every layer and site, and notes on layers short of them.

    Raises:
        DataError: A layer has fewer free units than asked for, and `allow_short` is not set.
    """
    generator = torch.Generator().manual_seed(derive_seed(seed, "random_like", language))
    drawn, notes, offset = list[Tensor](), list[str](), 0
    for place, (site, (layers, width)) in enumerate(sites.items()):
        wanted = torch.bincount(table.layer[table.site == place], minlength=layers).tolist()
        for layer, n in enumerate(wanted):
            first = offset + layer * width
            free = torch.nonzero(~taken[first : first + width])[:, 0]
            if n > len(free):
                where = f"layer {layer}" if len(sites) == 1 else f"layer {layer} of {site}"
                message = f"{where} has {len(free)} free units, but '{language}' needs {n}"
                if not allow_short:
                    raise DataError(f"{message}; use a smaller set, or allow_short=True and report it.")
                notes.append(message)
            order = torch.randperm(len(free), generator=generator)[:n]
            drawn.append(first + free[order].sort().values)
        offset += layers * width
    return torch.cat(drawn), notes
