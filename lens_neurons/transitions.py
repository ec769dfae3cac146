"""One model against another: which units change class between two models of one shape, and where.

A unit's class is the number of languages that it belongs to: none, one ("specific"), several ("related"), all
("general"); so it is defined for every method, and is the kind of `ternary`.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from lens_neurons.errors import DataError, SettingError
from lens_neurons.evaluation.intervals import CONFIDENCE, percentiles
from lens_neurons.methods import identify
from lens_neurons.methods.ternary import KINDS
from lens_neurons.neurons import NeuronSet
from lens_neurons.resampling import TOKENS, Data, Drawable, Integers, drawable, read_the_same
from lens_neurons.storage import Provenance, derive_seed
from lens_neurons.table_files import load_frames, save_frames

KIND = "model_comparison"

CLASSES = ("none", *KINDS)

# Intervals over fewer shards or texts than this are remarked on.
_FEW = 20


@dataclass(frozen=True, eq=False)
class ModelComparison:
    """What changes from one model ("before") to another ("after").

    The ends of an interval, `low` and `high`, are percentiles over resamples (NaN without any); see `compare_models`.

    Attributes:
        transitions: One row a pair of classes: `before`, `after`, `units`, `low`, `high`, and `noise`: so many units
            go from one class to the other between two resamples of the same model (mean over resamples, and over
            the two models), which is what other text alone would move.
        kinds: One row a kind: units `before` and `after`, `change` (after - before), `low`, `high` of the change.
        layers: The same by `site`, `layer` and `kind`.
        languages: One row a language: units `before` and `after`, `shared`, `change`, `low`, `high`.
        units: The units with a class in one of the models: `site`, `layer`, `neuron`, class `before` and `after`.
        notes: What a reader must know, such as different corpora.
        settings: Method, its settings in each model (`before`, `after`), what was resampled and how often, seed.
        before: Provenance of the first model's data.
        after: Provenance of the second's.
    """

    transitions: pd.DataFrame
    kinds: pd.DataFrame
    layers: pd.DataFrame
    languages: pd.DataFrame
    units: pd.DataFrame
    notes: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    before: Provenance = field(default_factory=Provenance)
    after: Provenance = field(default_factory=Provenance)

    def to_frame(self) -> pd.DataFrame:
        """Return one row a pair of classes; see `transitions`."""
        return self.transitions.copy()

    def matrix(self, column: str = "units") -> pd.DataFrame:
        """Return a column of `transitions` as a table: class before (rows) x class after (columns).

        Args:
            column: "units", "low", "high" or "noise".

        Raises:
            SettingError: Another column.
        """
        if column not in ("units", "low", "high", "noise"):
            raise SettingError(f"column={column!r} is unknown; use 'units', 'low', 'high' or 'noise'.")
        values = self.transitions[column].to_numpy().reshape(len(CLASSES), len(CLASSES))
        index = pd.Index(CLASSES, name="before")
        return pd.DataFrame(values, index=index, columns=pd.Index(CLASSES, name="after"))

    def __repr__(self) -> str:
        """Return method, and every kind's units before and after with the interval of the change."""
        parts = [
            f"{kind}: {before} -> {after} ({change:+d}{_interval(low, high)})"
            for kind, before, after, change, low, high in self.kinds.itertuples(index=False, name=None)
        ]
        return f"ModelComparison({self.settings.get('method', {}).get('name', '?')}; {', '.join(parts)})"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the comparison as one JSON file."""
        header = {
            "notes": list(self.notes),
            "settings": dict(self.settings),
            "before": self.before.to_dict(),
            "after": self.after.to_dict(),
        }
        save_frames(path, {name: getattr(self, name) for name in _FRAMES}, KIND, header)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "ModelComparison":
        """Return the comparison in a file written by `save`.

        Raises:
            StorageError: The file is absent, damaged, or of another kind.
        """
        frames, header = load_frames(path, KIND)
        return cls(
            **{name: frames[name] for name in _FRAMES},
            notes=tuple(header["notes"]),
            settings=header["settings"],
            before=Provenance.from_dict(header["before"]),
            after=Provenance.from_dict(header["after"]),
        )


_FRAMES = ("transitions", "kinds", "layers", "languages", "units")


def _interval(low: float, high: float) -> str:
    return "" if np.isnan(low) else f", {low:+.0f} to {high:+.0f}"


def compare_models(
    before: Data,
    after: Data,
    method: str = "ternary",
    *,
    n_resamples: int = 200,
    confidence: float = CONFIDENCE,
    design_effect: float = 1.0,
    seed: int = 0,
    progress: bool = True,
    **settings: Any,
) -> ModelComparison:
    """Return which units change class from one model to another, such as before and after alignment, and where.

    The method is run on both. The models may have different weights, and have read different text (their own answers,
    for instance: see `complete`); site, shape and languages must be the same. With lam=None `ternary` searches its
    lambda in each model, as the paper does; give `lam` to hold it fixed.

    For the intervals the method is run again, search included, on resamples of both recordings:

    - Of the folder of a recording whole shards are drawn with replacement (texts, for methods that need rows of texts);
      the same ones for both models where these read the same texts in the same shards. This needs no assumption but
      that shards are alike, and wants many of them: record with a small `shard_tokens`.
    - Of statistics in memory the counts are all that is known. Each is drawn anew from a binomial distribution with
      the unit's probability and `tokens / design_effect` trials. The tokens of a text are not independent, nor are the
      units, so with a design effect of 1 these intervals are too narrow.

    Neither says what another training run would give. Noise takes units out of their class, in a resample once more
    than in the data, so the cells of `transitions` are biased, above all those of units that keep their class; in the
    changes of `kinds`, `layers` and `languages` this cancels for the most part (in a simulation with independent
    tokens, intervals of 95% held the true change of a kind in 80 to 95 of 100 cases). Compare transitions with `noise`.

    Args:
        before: The first model's data: statistics in memory, a `Recording`, `TextResponses`, the folder of a recording,
            or language to the sums of its shards.
        after: The second model's.
        method: One of `list_methods()` that needs counts, sums, responses or importances.
        n_resamples: Number of resamples; 0 for no intervals.
        confidence: Share of the resamples between the two ends of an interval.
        design_effect: How many times the variance of a count is that of independent tokens; for statistics in memory.
            For the packaged sentences of some 20 tokens and the demo model it is 1.1 to 1.2 in the mean over units;
            longer texts have more.
        seed: Seed of the resamples.
        progress: Show a progress bar.
        **settings: The method's own settings, for both models.

    Raises:
        SettingError: An unknown method or setting, or a number out of range.
        DataError: Other languages, sites or shapes in one model than in the other; too few shards to resample.
    """
    if n_resamples < 0 or not design_effect >= 1 or not 0 < confidence < 1:
        raise SettingError(
            f"n_resamples={n_resamples} must be 0 or more, design_effect={design_effect} at least 1 and "
            f"confidence={confidence} between 0 and 1."
        )
    sides = [drawable(data, method, design_effect, intervals=n_resamples > 0) for data in (before, after)]
    codes = tuple(sides[0].sizes)
    if set(codes) != set(sides[1].sizes):
        raise DataError(
            f"one model has {', '.join(codes)} and the other has {', '.join(sides[1].sizes)}; select() the same "
            "languages of both."
        )
    sets = [identify(side.whole.select(codes), method, **settings) for side in sides]
    if dict(sets[0].sites) != dict(sets[1].sites):
        raise DataError(
            f"one model has layers and units {dict(sets[0].sites)} and the other {dict(sets[1].sites)}; only models of "
            "one shape, recorded at the same site, can be compared unit by unit."
        )
    paired = n_resamples > 0 and read_the_same(*sides)
    tallies = [_tally(neurons) for neurons in sets]
    drawn: list[dict[str, Integers]] = []
    last: list[_Tally] = []
    for number in tqdm(range(n_resamples), unit="resample", disable=not progress or not n_resamples):
        # With one seed both draw the same shards.
        seeds = [
            derive_seed(seed, "transitions", number, *(() if paired else (place,))) for place in ("before", "after")
        ]
        parts = [
            identify(side.resample(codes, one), method, **settings) for side, one in zip(sides, seeds, strict=True)
        ]
        made = [_tally(neurons) for neurons in parts]
        drawn.append(_changes(*made))
        if last:
            drawn[-1]["noise"] = _table(last[0], made[0]) + _table(last[1], made[1])
        last = made
    described = {
        "method": {"name": method},
        "before": dict(sets[0].method),
        "after": dict(sets[1].method),
        "sites": {site: list(shape) for site, shape in sets[0].sites.items()},
        "drawn": [side.drawn for side in sides] if n_resamples else [],
        "sizes": [dict(side.sizes) for side in sides],
        "paired": paired,
        "n_resamples": n_resamples,
        "confidence": confidence,
        "design_effect": design_effect,
        "seed": seed,
    }
    return ModelComparison(
        **_frames(sets, tallies, drawn, confidence),
        notes=tuple(_notes(sides, sets, described)),
        settings=described,
        before=sides[0].provenance,
        after=sides[1].provenance,
    )


@dataclass(frozen=True)
class _Tally:
    """What is counted of one set: the class of each unit, units of each layer and kind, units of each language."""

    classes: Integers
    layers: Integers
    languages: Integers


def _tally(neurons: NeuronSet) -> _Tally:
    owners = np.zeros(neurons.n_units, dtype=np.int64)
    for code in neurons.languages:
        owners[neurons.flat(code).numpy()] += 1
    n = len(neurons.languages)
    classes = np.select([owners == 0, owners == 1, owners < n], [0, 1, 2], default=3)
    number, total = _layer_numbers(neurons)
    layers = np.bincount(number * len(CLASSES) + classes, minlength=total * len(CLASSES)).reshape(total, -1)[:, 1:]
    return _Tally(classes, layers, np.array(list(neurons.counts().values()), dtype=np.int64))


def _layer_numbers(neurons: NeuronSet) -> tuple[Integers, int]:
    """Return the layer of each unit, counted through all sites, and the number of these layers."""
    widths = [width for layers, width in neurons.sites.values() for _ in range(layers)]
    return np.repeat(np.arange(len(widths)), widths), len(widths)


def _table(before: _Tally, after: _Tally) -> Integers:
    size = len(CLASSES)
    return np.bincount(before.classes * size + after.classes, minlength=size * size)


def _changes(before: _Tally, after: _Tally) -> dict[str, Integers]:
    layers = after.layers - before.layers
    return {
        "transitions": _table(before, after),
        "kinds": layers.sum(axis=0),
        "layers": layers.ravel(),
        "languages": after.languages - before.languages,
    }


def _frames(
    sets: Sequence[NeuronSet], tallies: Sequence[_Tally], drawn: Sequence[Mapping[str, Integers]], confidence: float
) -> dict[str, pd.DataFrame]:
    before, after = tallies
    estimates = _changes(before, after)

    def ends(name: str) -> dict[str, list[float]]:
        samples = np.array([one[name] for one in drawn], dtype=np.float64).reshape(len(drawn), len(estimates[name]))
        low_high = [percentiles(column, confidence) for column in samples.T]
        return {"low": [low for low, _ in low_high], "high": [high for _, high in low_high]}

    def counted(name: str, first: Integers, second: Integers) -> dict[str, Any]:
        return {"before": first, "after": second, "change": estimates[name], **ends(name)}

    noise = [one["noise"] / 2 for one in drawn if "noise" in one]
    places = [(site, layer) for site, (layers, _) in sets[0].sites.items() for layer in range(layers)]
    pairs = [(one, other) for one in CLASSES for other in CLASSES]
    moved = np.flatnonzero(before.classes + after.classes)
    number, total = _layer_numbers(sets[0])
    firsts = np.searchsorted(number, np.arange(total))
    shared = [int((sets[0].flat_mask(code) & sets[1].flat_mask(code)).sum()) for code in sets[0].languages]
    return {
        "transitions": pd.DataFrame(
            {
                "before": [one for one, _ in pairs],
                "after": [other for _, other in pairs],
                "units": estimates["transitions"],
                **ends("transitions"),
                "noise": np.mean(noise, axis=0) if noise else np.full(len(pairs), np.nan),
            }
        ),
        "kinds": pd.DataFrame({"kind": KINDS, **counted("kinds", before.layers.sum(axis=0), after.layers.sum(axis=0))}),
        "layers": pd.DataFrame(
            {
                "site": [site for site, _ in places for _ in KINDS],
                "layer": [layer for _, layer in places for _ in KINDS],
                "kind": [*KINDS] * len(places),
                **counted("layers", before.layers.ravel(), after.layers.ravel()),
            }
        ),
        "languages": pd.DataFrame(
            {
                "language": sets[0].languages,
                "shared": shared,
                **counted("languages", before.languages, after.languages),
            }
        ),
        "units": pd.DataFrame(
            {
                "site": [places[i][0] for i in number[moved]],
                "layer": [places[i][1] for i in number[moved]],
                "neuron": moved - firsts[number[moved]],
                "before": [CLASSES[i] for i in before.classes[moved]],
                "after": [CLASSES[i] for i in after.classes[moved]],
            }
        ),
    }


def _notes(sides: Sequence[Drawable], sets: Sequence[NeuronSet], settings: Mapping[str, Any]) -> Iterator[str]:
    before, after = (side.provenance for side in sides)
    if before.weights and before.weights == after.weights:
        yield "both are of the same weights, so what differs comes from the text or the settings of the recordings"
    differ = [
        name for name in ("corpus", "tokenizer", "policy") if _differ(getattr(before, name), getattr(after, name))
    ]
    if differ:
        yield f"the two recordings differ in {', '.join(differ)}, which changes counts as another model does"
    lams = [neurons.method.get("lam") for neurons in sets if neurons.method.get("lam_searched")]
    if len(set(lams)) > 1:
        yield f"lambda was searched in each model ({lams[0]:g} and {lams[1]:g}); give lam= to hold it fixed"
    for name, neurons in zip(("before", "after"), sets, strict=True):
        yield from (f"{name}: {note}" for note in neurons.notes)
    if TOKENS in settings["drawn"]:
        yield (
            f"counts were drawn as of independent tokens, with a design effect of {settings['design_effect']:g}; the "
            "folders of the recordings give intervals that do not suppose so"
        )
    fewest = min((n for side in sides if side.drawn != TOKENS for n in side.sizes.values()), default=_FEW)
    if settings["n_resamples"] and fewest < _FEW:
        yield f"a language has {fewest} {sides[0].drawn} only, so the intervals are rough; {_FEW} or more are better"


def _differ(one: Any, other: Any) -> bool:
    return bool(one) and bool(other) and one != other
