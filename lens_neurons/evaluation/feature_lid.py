"""Which language a text is in, by the latents of sparse autoencoders that are specific to a language.

Andrylie et al. 2025 (SAE-LAPE, arXiv 2507.11230): every language's specific latents vote, by how often they are active
("count") or by how strongly ("min-max"); the language with the most is named. Beside it stand fastText and random
latents. (Their released script adds a layer's result once more for every text that follows, so its scores mean
nothing, though their order is right; here a text's score is its own.)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float64
from torch import Tensor

from lens_neurons.batching import Piece, TokenPolicy, encode, make_batches
from lens_neurons.corpus import Corpus
from lens_neurons.errors import DataError, ProvenanceError, SettingError
from lens_neurons.evaluation.intervals import CONFIDENCE, RESAMPLES, Floats, percentiles, resample_counts
from lens_neurons.evaluation.lid import identify_language
from lens_neurons.evaluation.scoring import DEFAULT_BATCH_TOKENS, Bos, progress_bar
from lens_neurons.evaluation.tables import (
    NEURONS,
    ScoreTable,
    chosen,
    control_label,
    strings,
    tidy,
)
from lens_neurons.features import VALUES_AT_ONCE, FeatureStats
from lens_neurons.model import Adapter, Model, adapt
from lens_neurons.neurons import NeuronSet
from lens_neurons.pairs import Pair
from lens_neurons.sae import PlacedSAE, place_saes, read_values
from lens_neurons.storage import derive_seed

TASK = "language_id"
KIND = "language_id_scores"
RULES = ("count", "min-max")
FASTTEXT = "fasttext"
RANDOM_DRAWS = 5

# What the paper's script adds to the range of a latent.
_EPSILON = 1e-6

# What must agree between the features and the model.
_MODEL_FIELDS = ("weights", "dtype", "revision", "tokenizer")


@dataclass(frozen=True, eq=False)
class LanguageIdScores(ScoreTable):
    """Which language each text was said to be in, by specific latents, by random ones and by fastText.

    Attributes:
        items: Tidy table. `condition` is "neurons" (the specific latents), a random draw ("random-0", ...) or
            "fasttext"; `factor` the rule, "count" or "min-max" ("" for fastText); `language` the text's own,
            `target` the one named ("" where none is), `item` the text's number; metric "correct" is 1 where both
            agree.
        notes: What a reader must know, such as languages without latents.
        settings: Languages, rules, latents a language, seed, and the other arguments.
        provenance: The model, token policy, corpus.
    """

    task: ClassVar[str] = TASK
    kind: ClassVar[str] = KIND

    @property
    def languages(self) -> tuple[str, ...]:
        """The languages of the texts."""
        return tuple(self.settings["languages"])

    def named(self, rule: str = "count", condition: str = NEURONS) -> pd.DataFrame:
        """Return one row a text: its language, its number (`item`), and the language `named`, "" for none.

        Args:
            rule: "count", "min-max" or "fasttext".
            condition: "neurons" or a random draw.

        Raises:
            SettingError: There is no such rule or condition.
        """
        label, factor = (FASTTEXT, "") if rule == FASTTEXT else (condition, rule)
        rows = chosen(self.items, condition=label, factor=factor)
        if not len(rows):
            raise SettingError(f"there is no rule {rule!r} under condition {condition!r}; look at the summary.")
        items = [int(item) for item in rows["item"].tolist()]
        names = {"language": strings(rows, "language"), "item": items, "named": strings(rows, "target")}
        return pd.DataFrame(names)

    def confusion(self, rule: str = "count", condition: str = NEURONS) -> pd.DataFrame:
        """Return the number of texts by language (rows) and language named (columns), "" for none and others."""
        rows = self.named(rule, condition)
        columns = [*self.languages, ""]
        table = pd.DataFrame(0, index=list(self.languages), columns=columns)
        for code, name in zip(strings(rows, "language"), strings(rows, "named"), strict=True):
            table.loc[code, name if name in columns else ""] += 1
        return table.rename_axis(index="language", columns="named")

    def by_language(self, rule: str = "count", condition: str = NEURONS) -> pd.DataFrame:
        """Return one row a language: texts `n`, `precision`, `recall`, `f1`; 0 where nothing was named."""
        table = self.confusion(rule, condition)[list(self.languages)].to_numpy().astype(np.float64)
        sizes = self.confusion(rule, condition).to_numpy().sum(axis=1)
        right, claimed = np.diag(table), table.sum(axis=0)
        values = {
            "n": sizes,
            "precision": right / np.maximum(claimed, 1),
            "recall": right / np.maximum(sizes, 1),
            "f1": 2 * right / np.maximum(claimed + sizes, 1),
        }
        return pd.DataFrame(values, index=pd.Index(self.languages, name="language"))

    def _resampled(self, rule: str, condition: str, n_resamples: int) -> tuple[Floats, Floats, float, float]:
        """Return accuracy and macro-F1 of every resample, and those of the texts themselves.

        Where all languages have equally many texts, as in a parallel corpus, texts are resampled by their numbers
        jointly over languages; else language by language.
        """
        rows = self.named(rule, condition)
        seed, names = int(self.settings["seed"]), list(self.languages)
        own, claims = np.array(strings(rows, "language")), np.array(strings(rows, "named"))
        onehot = [(claims[own == code][:, None] == np.array(names)).astype(np.float64) for code in names]
        sizes = {len(part) for part in onehot}
        shared = resample_counts(sizes.pop(), n_resamples, seed, "texts") if len(sizes) == 1 else None
        tables = np.stack(
            [
                (shared if shared is not None else resample_counts(len(part), n_resamples, seed, "texts", code)) @ part
                for code, part in zip(names, onehot, strict=True)
            ],
            axis=1,
        )
        whole = np.stack([part.sum(axis=0) for part in onehot])[None]
        totals = np.array([len(part) for part in onehot], dtype=np.float64)
        accuracy, f1 = _accuracy_and_f1(tables, totals)
        (own_accuracy,), (own_f1,) = _accuracy_and_f1(whole, totals)
        return accuracy, f1, float(own_accuracy), float(own_f1)

    def summary(self, *, n_resamples: int = RESAMPLES, confidence: int | float = CONFIDENCE) -> pd.DataFrame:
        """Return one row a rule, and one for fastText: accuracy and macro-F1 with intervals, and the random control.

        Columns: `n` texts; `mean` accuracy with `low` and `high`; `macro_f1`, the unweighted mean over the languages
        of F1, with `f1_low` and `f1_high`; `control` accuracy and `control_f1` of random latents (mean over the
        draws) with `control_low` and `control_high` (texts and draws resampled); `unnamed`, texts for which no
        language was named.
        """
        rows: dict[str, dict[str, Any]] = {}
        fasttext = [FASTTEXT] if len(chosen(self.items, condition=FASTTEXT)) else []
        for rule in (*self.settings["rules"], *fasttext):
            accuracy, f1, mean, own_f1 = self._resampled(rule, NEURONS, n_resamples)
            row: dict[str, Any] = {"n": len(self.named(rule)), "mean": mean}
            row["low"], row["high"] = percentiles(accuracy, confidence)
            row["macro_f1"] = own_f1
            row["f1_low"], row["f1_high"] = percentiles(f1, confidence)
            draws = [] if rule == FASTTEXT else [self._resampled(rule, draw, n_resamples) for draw in self.draws]
            row["control"] = float(np.mean([draw[2] for draw in draws])) if draws else float("nan")
            row["control_low"], row["control_high"] = float("nan"), float("nan")
            row["control_f1"] = float(np.mean([draw[3] for draw in draws])) if draws else float("nan")
            if draws:
                weights = resample_counts(len(draws), n_resamples, int(self.settings["seed"]), "draws") / len(draws)
                drawn = (np.stack([draw[0] for draw in draws], axis=1) * weights).sum(axis=1)
                row["control_low"], row["control_high"] = percentiles(drawn, confidence)
            row["unnamed"] = strings(self.named(rule), "named").count("")
            rows[rule] = row
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis(index="rule")

    def __repr__(self) -> str:
        """Return the accuracies."""
        table = self.summary(n_resamples=1)
        shown = ", ".join(f"{rule} {mean:.3f}" for rule, mean in table["mean"].items())
        return f"LanguageIdScores({len(self.languages)} languages; accuracy {shown})"


def _accuracy_and_f1(tables: Floats, totals: Floats) -> tuple[Floats, Floats]:
    """Return accuracy and macro-F1 of confusion tables [resample, language, named].

    Args:
        tables: Texts by language and language named; others and none are left out.
        totals: Texts of each language.
    """
    right, claimed = np.diagonal(tables, axis1=1, axis2=2), tables.sum(axis=1)
    f1 = 2 * right / np.maximum(claimed + totals, 1)
    return right.sum(axis=1) / totals.sum(), f1.mean(axis=1)


def feature_language_id(
    model: Model,
    saes: Any,
    neurons: NeuronSet,
    stats: FeatureStats,
    corpus: Corpus | None = None,
    *,
    rules: Sequence[str] = RULES,
    random_draws: int = RANDOM_DRAWS,
    fasttext: bool = True,
    seed: int = 0,
    bos: Bos = "model",
    max_tokens: int | None = None,
    batch_tokens: int = DEFAULT_BATCH_TOKENS,
    progress: bool = True,
) -> LanguageIdScores:
    """Return how well language-specific latents tell which language a text is in, with fastText beside them.

    Args:
        model: The model.
        saes: The SAE or SAEs that the features were recorded with.
        neurons: Specific latents by language, as `sae_lape` finds them.
        stats: The features, for the smallest and largest value of each latent.
        corpus: Texts to name, not those that the latents were identified on; default: the packaged held-out ones.
        rules: "count" and "min-max"; see `named_languages`.
        random_draws: Draws of random latents in place of the specific ones; 0 for none.
        fasttext: Whether lid.176 names the texts too.
        seed: Seed of the draws and of the intervals.
        bos: BOS policy.
        max_tokens: Longest text in tokens, BOS included; longer ones are truncated. Default: the model's context.
        batch_tokens: Padded tokens a batch.
        progress: Whether to show a progress bar.

    Raises:
        DataError: A language of the corpus is not one of the neuron set's.
        ProvenanceError: Neurons, features, SAEs and model do not belong together.
        SettingError: An unknown rule.
    """
    corpus = Corpus.packaged("held_out") if corpus is None else corpus
    require_rules(rules)
    lacking = [code for code in corpus.languages if code not in neurons.languages]
    if lacking:
        raise DataError(
            f"the neuron set lacks {', '.join(lacking)} of corpus '{corpus.name}', so it can never name them; use "
            f"corpus.select(...) with some of {', '.join(neurons.languages)}."
        )
    adapter, placed = adapt(model), place_saes(saes)
    _require_fit(adapter, placed, neurons, stats)
    draws = [neurons.random_like(derive_seed(seed, "draw", n), allow_short=True) for n in range(random_draws)]
    sets = {NEURONS: neurons} | {control_label(n): draw for n, draw in enumerate(draws)}
    policy = TokenPolicy(bos=bos, max_tokens=max_tokens)
    blocks: list[dict[str, Any]] = []

    def add(condition: str, rule: str, code: str, named: Sequence[str]) -> None:
        value = [float(name == code) for name in named]
        shared = {"task": TASK, "metric": "correct", "item": range(len(named)), "value": value}
        blocks.append({**shared, "condition": condition, "factor": rule, "language": code, "target": list(named)})

    with progress_bar(len(corpus.languages), "naming languages", progress) as bar:
        for code in corpus.languages:
            texts = [plain_text(text) for text in corpus.texts(code)]
            scores = latent_scores(adapter, placed, list(sets.values()), stats, texts, policy, batch_tokens)
            for label, own in zip(sets, scores, strict=True):
                for rule in rules:
                    add(label, rule, code, _named(own, rule, neurons.languages))
            if fasttext:
                add(FASTTEXT, "", code, [guess.language or "" for guess in identify_language(texts)])
            bar.update(1)
    counts = neurons.counts()
    empty = [code for code in corpus.languages if not counts[code]]
    notes = [f"{', '.join(empty)} has no specific latent, so it is never named"] if empty else []
    notes += [note for draw in draws for note in draw.notes]
    settings = {
        "languages": list(corpus.languages),
        "candidates": list(neurons.languages),
        "rules": list(rules),
        "corpus": corpus.name,
        "random_draws": random_draws,
        "seed": seed,
        "method": dict(neurons.method),
        "neurons_from": neurons.provenance.to_dict(),
        "neurons": counts,
        "saes": [sae.to_dict() for sae in placed],
    }
    provenance = adapter.provenance("gate_act", policy.to_dict(), corpus.fingerprint_all(), seed)
    return LanguageIdScores(tidy(blocks), tuple(dict.fromkeys(notes)), settings, provenance)


def named_languages(
    model: Model,
    saes: Any,
    neurons: NeuronSet,
    stats: FeatureStats,
    texts: Sequence[str],
    *,
    rule: str = "count",
    bos: Bos = "model",
    max_tokens: int | None = None,
    batch_tokens: int = DEFAULT_BATCH_TOKENS,
) -> list[str | None]:
    """Return the language that each text's latents name; None where no specific latent is active.

    With A the pairs of a counted token and a latent of language k that is above 0 there, the language with the largest
    score is named, of equal ones the first in the neuron set's order:

    - "count": the number of pairs in A.
    - "min-max": the sum over A of (z - min) / (max - min + 1e-6), min and max being the smallest and largest value of
      the latent above 0 in any language of `stats`.

    Args:
        model: The model.
        saes: The SAE or SAEs that the features were recorded with.
        neurons: Specific latents by language.
        stats: The features.
        texts: The texts.
        rule: "count" or "min-max".
        bos: BOS policy.
        max_tokens: Longest text in tokens, BOS included; longer ones are truncated. Default: the model's context.
        batch_tokens: Padded tokens a batch.

    Raises:
        DataError: A single string in place of a list.
        ProvenanceError: Neurons, features, SAEs and model do not belong together.
        SettingError: An unknown rule.
    """
    require_rules([rule])
    if isinstance(texts, str):
        raise DataError("texts is one string; give a list of texts.")
    adapter, placed = adapt(model), place_saes(saes)
    _require_fit(adapter, placed, neurons, stats)
    policy = TokenPolicy(bos=bos, max_tokens=max_tokens)
    (scores,) = latent_scores(adapter, placed, [neurons], stats, texts, policy, batch_tokens)
    return [name or None for name in _named(scores, rule, neurons.languages)]


def latent_scores(
    adapter: Adapter,
    saes: tuple[PlacedSAE, ...],
    sets: Sequence[NeuronSet],
    stats: FeatureStats,
    texts: Sequence[str],
    policy: TokenPolicy,
    batch_tokens: int = DEFAULT_BATCH_TOKENS,
) -> list[Float64[Tensor, "rule text language"]]:
    """Return, for each set of latents, the scores of every text and language by count and by min-max.

    A latent that is never active in `stats` has no range and adds nothing to min-max.
    """
    votes = [_votes(stats, sets, place) for place in range(len(saes))]
    low, high = (part.double() for part in stats.extremes())
    known = stats.active_tokens.sum(dim=0) > 0
    n_votes = sum(len(neurons.languages) for neurons in sets)
    scores = torch.zeros(len(RULES), len(texts), n_votes, dtype=torch.float64)
    pieces: list[Piece] = [piece for group in encode(adapter.tokens, texts, policy) for piece in group]
    for batch in make_batches(pieces, adapter.tokens.pad_id, batch_tokens):
        rows = batch.text_index[batch.counted.nonzero()[:, 0]]
        for place, values in enumerate(read_values(adapter, saes, batch)):
            used, weights = votes[place]
            floor, span = low[place, used], high[place, used] - low[place, used] + _EPSILON
            size = max(1, VALUES_AT_ONCE // stats.n_latents)
            for start in range(0, len(values), size):
                part = slice(start, start + size)
                latents = saes[place].encode(values[part])[:, used.to(values.device)].cpu().double()
                active = latents > 0
                scaled = torch.where(active & known[place, used], (latents - floor) / span, 0.0)
                scores[0].index_add_(0, rows[part], active.double() @ weights)
                scores[1].index_add_(0, rows[part], scaled @ weights)
    return list(scores.split([len(neurons.languages) for neurons in sets], dim=2))


def _votes(stats: FeatureStats, sets: Sequence[NeuronSet], place: int) -> tuple[Tensor, Float64[Tensor, "latent vote"]]:
    """Return the latents of one SAE that any set has, and for which language of which set each stands."""
    masks: list[Tensor] = []
    for neurons in sets:
        for code in neurons.languages:
            mask = torch.zeros(stats.n_latents, dtype=torch.float64)
            table = neurons.tables[code]
            mask[table.index[table.layer == stats.layers[place]]] = 1.0
            masks.append(mask)
    weights = torch.stack(masks, dim=1)
    used = weights.any(dim=1).nonzero()[:, 0]
    return used, weights[used]


def _named(scores: Float64[Tensor, "rule text language"], rule: str, languages: Sequence[str]) -> list[str]:
    """Return the language with the largest score for each text, "" where no latent of any language is active."""
    # A language without an active latent is out, even where another's are below their usual range.
    heard = torch.where(scores[0] > 0, scores[RULES.index(rule)], -torch.inf)
    # argmax gives the first of equal ones on the CPU as numpy does; torch does not promise it.
    best = heard.numpy().argmax(axis=1)
    return [languages[int(k)] if bool(hit.any()) else "" for k, hit in zip(best, scores[0] > 0, strict=True)]


def require_rules(rules: Sequence[str]) -> None:
    """Raise a SettingError unless every rule is known, and there is one."""
    unknown = [rule for rule in rules if rule not in RULES]
    if isinstance(rules, str) or unknown or not rules:
        raise SettingError(f"rules={rules!r} must be a list of {' and '.join(map(repr, RULES))}.")


def plain_text(text: str | Pair) -> str:
    """Return a text of a corpus as one string."""
    return text if isinstance(text, str) else text.prompt + text.completion


def _require_fit(adapter: Adapter, saes: tuple[PlacedSAE, ...], neurons: NeuronSet, stats: FeatureStats) -> None:
    """Raise unless neurons, features, SAEs and model belong together.

    Raises:
        ProvenanceError: They do not.
    """
    if dict(neurons.sites) != stats.sites:
        raise ProvenanceError(
            f"the neuron set is of {dict(neurons.sites)} and the features of {stats.sites}; identify on these features."
        )
    mine, theirs = [sae.layer for sae in saes], list(stats.layers)
    prints = {sae["layer"]: sae["fingerprint"] for sae in stats.provenance.extra.get("saes", [])}
    other = [sae.layer for sae in saes if prints.get(sae.layer, sae.fingerprint) != sae.fingerprint]
    if mine != theirs or saes[0].n_latents != stats.n_latents or other:
        raise ProvenanceError(
            f"the SAEs are not those of the features: layers {mine} with {saes[0].n_latents} latents here, layers "
            f"{theirs} with {stats.n_latents} there"
            + (f", and other weights in {other}" if other else "")
            + "; give the SAEs that were recorded."
        )
    for part, what in ((stats.provenance, "the features"), (neurons.provenance, "the neuron set")):
        if part.known:
            part.require_same(adapter.provenance(), _MODEL_FIELDS, what=f"{what} and the model")
