"""What a recording holds: counts and sums of every neuron's activation in every language, mergeable and saved."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
import torch
from jaxtyping import Float32, Float64, Int64
from torch import Tensor

from lens_neurons.collecting import SUMS, PartialSums
from lens_neurons.errors import DataError, ProvenanceError, SettingError, StorageError
from lens_neurons.languages import canonical, recorded_index, require_once_each
from lens_neurons.sharing import CardFacts, Shareable
from lens_neurons.storage import (
    SAME_MODEL,
    SCHEMA,
    Provenance,
    corpus_of,
    load_tensors,
    reading,
    require_fields,
    require_kind,
    require_tables,
    save_tensors,
)

KIND = "activation_stats"
FILE_NAME = "stats.safetensors"

# What must agree before two recordings go together; corpora differ on purpose, they are of different languages.
_SAME = (*SAME_MODEL, "d_mlp", "site")
_TEXT_STATISTICS = {"p_max": "text_max", "p_median": "text_median", "p_mean": "text_mean"}


@dataclass(frozen=True, eq=False)
class ActivationStats(Shareable):
    """Statistics of every neuron's activation in every language: what identification and factors are made from.

    Attributes:
        languages: The languages, in the order of the first axis.
        site: Where the neurons were recorded: "gate_act" or another site.
        tokens: Tokens counted.
        texts: Texts read (0 where unknown).
        positive: Number of tokens with an activation above 0.
        sum: Sum of activations; None where only counts are known, like the next two.
        sum_sq: Sum of their squares.
        sum_positive: Sum of those above 0.
        text_max: Over the kept texts, the maximum of the text's mean activation; None where no text rows were kept
            (packed texts, `texts_kept=0`, counts alone), like the next two.
        text_median: The median of the same; of an even number of texts the lower of the two in the middle, as
            `torch.median` in the amplification study's code.
        text_mean: The mean of the same.
        provenance: Model, tokenizer, policy and corpus.
        notes: Under "languages", by language: corpus fingerprint, texts cut, texts split, text rows kept.
    """

    hub_file: ClassVar[str] = FILE_NAME
    hub_files: ClassVar[tuple[str, ...]] = (FILE_NAME,)

    languages: tuple[str, ...]
    site: str
    tokens: Int64[Tensor, " language"]
    texts: Int64[Tensor, " language"]
    positive: Int64[Tensor, "language layer neuron"]
    sum: Float64[Tensor, "language layer neuron"] | None
    sum_sq: Float64[Tensor, "language layer neuron"] | None
    sum_positive: Float64[Tensor, "language layer neuron"] | None
    text_max: Float32[Tensor, "language layer neuron"] | None
    text_median: Float32[Tensor, "language layer neuron"] | None
    text_mean: Float32[Tensor, "language layer neuron"] | None
    provenance: Provenance
    notes: dict[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        """Check that no language comes twice.

        Raises:
            DataError: One does.
        """
        if len(set(self.languages)) != len(self.languages) or not self.languages:
            raise DataError(f"languages {self.languages} must be at least one, and each once; give each one name.")

    @classmethod
    def from_counts(
        cls,
        tokens: Mapping[str, int],
        positive: Mapping[str, Tensor],
        *,
        site: str = "gate_act",
        provenance: Provenance | None = None,
    ) -> "ActivationStats":
        """Return statistics from counts that somebody else recorded; means and text statistics are then absent.

        Args:
            tokens: Language to number of tokens.
            positive: Language to the number of tokens on which each neuron is above 0, integers [layer, neuron].
            site: Where the counts were taken.
            provenance: Model and corpus, where known.

        Raises:
            DataError: Different languages, shapes that differ, counts that are no integers or exceed the tokens.
        """
        if set(tokens) != set(positive) or not tokens:
            raise DataError(
                f"tokens has languages {sorted(tokens)} and positive has {sorted(positive)}; give both for the same."
            )
        shapes = {tuple(counts.shape) for counts in positive.values()}
        if len(shapes) != 1 or len(next(iter(shapes))) != 2:
            raise DataError(f"counts must all have one shape [layer, neuron]; got {sorted(shapes)}.")
        for label, counts in positive.items():
            if counts.is_floating_point() or counts.is_complex() or counts.dtype == torch.bool:
                raise DataError(f"counts of '{label}' are {counts.dtype}; integers were expected.")
            if tokens[label] < 1 or int(counts.min()) < 0 or int(counts.max()) > tokens[label]:
                raise DataError(
                    f"counts of '{label}' are between {int(counts.min())} and {int(counts.max())} of {tokens[label]} "
                    "tokens; expected 0 to the number of tokens, which is at least 1."
                )
        stacked = torch.stack([positive[label].cpu().to(torch.int64) for label in tokens])
        return cls(
            languages=tuple(canonical(label) for label in tokens),
            site=site,
            tokens=torch.tensor(list(tokens.values()), dtype=torch.int64),
            texts=torch.zeros(len(tokens), dtype=torch.int64),
            positive=stacked,
            **_absent(),
            provenance=provenance or Provenance.unknown((stacked.shape[1], stacked.shape[2]), site),
        )

    @classmethod
    def from_partials(
        cls,
        partials: Mapping[str, PartialSums],
        *,
        provenance: Provenance,
        corpora: Mapping[str, str] | None = None,
    ) -> "ActivationStats":
        """Return the statistics of languages whose shards have been added up.

        Args:
            partials: Language to its sums.
            provenance: Model, policy and site; its corpus is made anew from `corpora`.
            corpora: Language to the fingerprint of its texts.

        Raises:
            DataError: A language without a counted token, or one with and one without text rows.
        """
        for code, part in partials.items():
            if part.tokens < 1:
                raise DataError(f"language '{code}' has no token that counts; give it a text or leave it out.")
        with_rows = [code for code, part in partials.items() if len(part.row_positions)]
        if with_rows and len(with_rows) < len(partials):
            lacking = ", ".join(code for code in partials if code not in with_rows)
            raise DataError(
                f"{lacking} has no token in the texts whose means are kept and {', '.join(with_rows)} has; keep more "
                "texts (texts_kept=), or none."
            )
        parts = list(partials.values())
        text: dict[str, Tensor | None] = dict.fromkeys(_TEXT_STATISTICS.values())
        if with_rows:
            text = {
                "text_max": torch.stack([part.rows.amax(dim=0) for part in parts]),
                "text_median": torch.stack([part.rows.median(dim=0).values for part in parts]),
                "text_mean": torch.stack([part.rows.double().mean(dim=0).float() for part in parts]),
            }
        notes = {
            code: {
                "corpus": (corpora or {}).get(code, ""),
                "truncated": part.truncated,
                "split": part.split,
                "text_rows": len(part.row_positions),
            }
            for code, part in partials.items()
        }
        sums: dict[str, Any] = {name: torch.stack([getattr(part, name) for part in parts]) for name in SUMS}
        return cls(
            languages=tuple(partials),
            site=provenance.site,
            tokens=torch.tensor([part.tokens for part in parts], dtype=torch.int64),
            texts=torch.tensor([part.texts for part in parts], dtype=torch.int64),
            positive=torch.stack([part.positive for part in parts]),
            **sums,
            **text,
            provenance=provenance.replace(corpus=_corpus_of(notes)),
            notes={"languages": notes},
        )

    @property
    def n_layers(self) -> int:
        """Number of layers."""
        return self.positive.shape[1]

    @property
    def n_neurons(self) -> int:
        """Neurons a layer."""
        return self.positive.shape[2]

    def __repr__(self) -> str:
        """Return site, shape, and tokens a language."""
        counts = ", ".join(f"{code}: {int(n)}" for code, n in zip(self.languages, self.tokens, strict=True))
        return f"ActivationStats({self.site}, {self.n_layers} layers x {self.n_neurons} neurons; tokens {counts})"

    def index(self, language: str) -> int:
        """Return the position of a language on the first axis.

        Raises:
            DataError: It was not recorded.
        """
        return recorded_index(language, self.languages)

    def probability(self) -> Float64[Tensor, "language layer neuron"]:
        """Return the activation probability: the share of counted tokens with an activation above 0."""
        return self.positive.double() / self.tokens.double()[:, None, None]

    def mean(self) -> Float64[Tensor, "language layer neuron"]:
        """Return the mean activation over tokens.

        Raises:
            DataError: Only counts are known.
        """
        return self._sums("sum", "means") / self.tokens.double()[:, None, None]

    def std(self) -> Float64[Tensor, "language layer neuron"]:
        """Return the standard deviation over tokens, sqrt(E[a^2] - E[a]^2).

        Raises:
            DataError: Only counts are known.
        """
        square = self._sums("sum_sq", "standard deviations") / self.tokens.double()[:, None, None]
        return (square - self.mean().square()).clamp(min=0).sqrt()

    def mean_positive(self) -> Float64[Tensor, "language layer neuron"]:
        """Return the mean activation over the tokens on which it is above 0; 0 where it never is.

        Raises:
            DataError: Only counts are known.
        """
        return self._sums("sum_positive", "means") / self.positive.clamp(min=1).double()

    def _sums(self, name: str, what: str) -> Float64[Tensor, "language layer neuron"]:
        value: Tensor | None = getattr(self, name)
        if value is None:
            raise DataError(f"{what} need sums, and these statistics are counts alone; record them with lens_neurons.")
        return value

    def text_statistic(self, name: str, language: str) -> Float32[Tensor, "layer neuron"]:
        """Return p_max, p_median or p_mean of a language: over its kept texts, of the text's mean activation.

        Source: amplification study (arXiv 2507.22581), calculate_max_median.py.

        Raises:
            SettingError: Another name.
            DataError: No text rows were kept, or the language was not recorded.
        """
        if name not in _TEXT_STATISTICS:
            raise SettingError(f"text statistic {name!r} is unknown; use one of {', '.join(_TEXT_STATISTICS)}.")
        at = self.index(language)
        table: Tensor | None = getattr(self, _TEXT_STATISTICS[name])
        if table is None:
            reason = "the texts were packed" if self.provenance.policy.get("pack") else "none were kept"
            raise DataError(f"{name} needs the means of single texts, but {reason}; use texts_kept=100 and pack=False.")
        return table[at]

    def select(self, languages: Iterable[str]) -> "ActivationStats":
        """Return the statistics of some languages, in the order given.

        Raises:
            DataError: One was not recorded.
        """
        wanted = [self.index(label) for label in languages]
        rows = torch.tensor(wanted, dtype=torch.int64)
        codes = tuple(self.languages[i] for i in wanted)
        kept = {code: note for code, note in self._language_notes().items() if code in codes}
        return replace(
            self,
            languages=codes,
            **{name: None if value is None else value[rows] for name, value in self._tensors().items()},
            provenance=self.provenance.replace(corpus=_corpus_of(kept)),
            notes={**self.notes, "languages": {code: kept[code] for code in codes if code in kept}},
        )

    def merge(self, *others: "ActivationStats") -> "ActivationStats":
        """Return this recording together with those of other languages, made with the same model and policy.

        Raises:
            DataError: A language is in two of them, or one has means or text statistics and another has not.
            ProvenanceError: Model, tokenizer, policy or site differ.
        """
        parts: Sequence[ActivationStats] = (self, *others)
        for other in others:
            self.provenance.require_same(other.provenance, _SAME, what="the recordings")
            mine, theirs = _texts_kept(self), _texts_kept(other)
            if mine != theirs:
                raise ProvenanceError(
                    f"the recordings do not belong together: texts_kept is {mine} in one and {theirs} in the other; "
                    "record both with the same."
                )
        codes = [code for part in parts for code in part.languages]
        require_once_each(codes)
        merged: dict[str, Any] = {}
        for name in self._tensors():
            values = [getattr(part, name) for part in parts]
            present = [value is not None for value in values]
            if any(present) and not all(present):
                raise DataError(f"one recording has '{name}' and another has not; record all with the same settings.")
            merged[name] = torch.cat(values) if all(present) else None
        notes = {code: note for part in parts for code, note in part._language_notes().items()}
        return replace(
            self,
            languages=tuple(codes),
            **merged,
            provenance=self.provenance.replace(corpus=_corpus_of(notes)),
            notes={**self.notes, "languages": notes} if notes else self.notes,
        )

    def _tensors(self) -> dict[str, Tensor | None]:
        names = ("tokens", "texts", "positive", *SUMS, *_TEXT_STATISTICS.values())
        return {name: getattr(self, name) for name in names}

    def _language_notes(self) -> dict[str, dict[str, Any]]:
        return self.notes.get("languages", {})

    def to_frame(self) -> pd.DataFrame:
        """Return one row a language: tokens, texts, share of activations above 0, neurons that never are."""
        share = self.probability().mean(dim=(1, 2))
        silent = (self.positive == 0).sum(dim=(1, 2))
        rows: list[dict[str, Any]] = []
        for i, code in enumerate(self.languages):
            note = self._language_notes().get(code, {})
            rows.append(
                {
                    "language": code,
                    "tokens": int(self.tokens[i]),
                    "texts": int(self.texts[i]),
                    "text_rows": int(note.get("text_rows", 0)),
                    "truncated": int(note.get("truncated", 0)),
                    "split": int(note.get("split", 0)),
                    "mean_probability": float(share[i]),
                    "silent_neurons": int(silent[i]),
                }
            )
        return pd.DataFrame(rows)

    def card_facts(self) -> CardFacts:
        """Return what the card on the hub says of the statistics."""
        return CardFacts(
            title=f"Activation statistics of {self.provenance.model or 'an unknown model'}",
            summary=f"Counts and sums of the activation of {self.n_layers} x {self.n_neurons} neurons at {self.site}, "
            f"on text of {len(self.languages)} languages or other groups: what identification methods read.",
            variable="stats",
            languages=self.languages,
            table=self.to_frame(),
            provenance=self.provenance,
            example=('neurons = ln.identify(stats, method="lape")',),
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to one safetensors file, atomically, with a checksum."""
        header = {
            "schema": SCHEMA,
            "kind": KIND,
            "languages": list(self.languages),
            "site": self.site,
            "provenance": self.provenance.to_dict(),
            "notes": self.notes,
        }
        save_tensors(path, {name: value for name, value in self._tensors().items() if value is not None}, header)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "ActivationStats":
        """Return the statistics in a file that `save` wrote, or in the folder of a finished recording.

        Raises:
            StorageError: The file is damaged or of another kind, or the recording is not finished.
        """
        source = Path(path)
        if source.is_dir():
            source = source / FILE_NAME
            if not source.exists():
                raise StorageError(f"{path} is no finished recording; finish it with record(model, corpus, path).")
        tensors, header = load_tensors(source)
        require_kind(source, header, KIND)
        with reading(source):
            require_fields(header, {"languages": list, "site": str, "notes": dict, "provenance": dict})
            hints = {entry.name: entry.type for entry in fields(cls) if entry.name in tensors}
            require_tables(tensors, hints, header["languages"])
            return cls(
                languages=tuple(header["languages"]),
                site=header["site"],
                provenance=Provenance.from_dict(header["provenance"]),
                notes=header["notes"],
                **{**_absent(), **tensors},
            )


def _texts_kept(stats: ActivationStats) -> int | None:
    return stats.provenance.extra.get("recording", {}).get("texts_kept")


def _absent() -> dict[str, Any]:
    return dict.fromkeys((*SUMS, *_TEXT_STATISTICS.values()))


def _corpus_of(notes: Mapping[str, Mapping[str, Any]]) -> str:
    return corpus_of({code: str(note.get("corpus", "")) for code, note in notes.items()})
