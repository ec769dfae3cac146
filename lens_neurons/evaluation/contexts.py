"""The tokens on which a unit is strongest, in context and by language: a language's unit, or a comma's?"""

import heapq
import itertools
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from lens_neurons.batching import Batch, Piece, TokenizerInfo, TokenPolicy, encode, make_batches
from lens_neurons.corpus import Corpus
from lens_neurons.errors import SettingError, StorageError
from lens_neurons.evaluation.controls import chosen_languages
from lens_neurons.evaluation.scoring import Bos
from lens_neurons.evaluation.tables import chosen
from lens_neurons.model import Adapter, Model, adapt
from lens_neurons.storage import SCHEMA, Provenance, load_json, require_kind, save_json, sha256_of

KIND = "top_texts"
COLUMNS = ("language", "rank", "value", "before", "token", "after", "text", "position")

SUMMARY = ("n", "positive", "mean", "max")

# What a byte that is no whole character decodes to.
_BROKEN = "\ufffd"
# A token may be a byte of one character, or the end of one and the beginning of another: this many more are tried.
_NEIGHBOURS = 6
# Texts are read in runs of this many, so that a long corpus is never in memory.
_TEXTS_AT_ONCE = 512


@dataclass(frozen=True, eq=False)
class TopTexts:
    """The tokens on which one unit is strongest, by language.

    Attributes:
        items: One row a token: language, rank (0 is the strongest), value, before, token, after (text around it),
            text (number of the text in the corpus), position (of the token, BOS included).
        summary_by_language: One row a language: tokens counted, share of them with a value above 0, mean, max.
        layer: The unit's layer.
        index: Its index in the layer.
        site: Where it lives.
        corpus: Name of the corpus.
        provenance: The model, token policy, corpus.
    """

    items: pd.DataFrame
    summary_by_language: pd.DataFrame
    layer: int
    index: int
    site: str
    corpus: str
    provenance: Provenance = field(default_factory=Provenance)

    @property
    def languages(self) -> tuple[str, ...]:
        """The languages."""
        return tuple(str(code) for code in self.summary_by_language.index)

    def of(self, language: str) -> pd.DataFrame:
        """Return one language's rows, the strongest first."""
        return chosen(self.items, language=language).reset_index(drop=True)

    def summary(self) -> pd.DataFrame:
        """Return one row a language: n tokens counted, share of them above 0, mean and max of the unit's value."""
        return self.summary_by_language.copy()

    def __repr__(self) -> str:
        """Return the unit and its strongest token."""
        head = f"TopTexts({self.site} layer {self.layer} unit {self.index}, {len(self.languages)} languages"
        if not len(self.items):
            return f"{head})"
        best = self.items.loc[self.items["value"].idxmax()]
        return f"{head}; strongest {best['value']:.3g} on {best['token']!r} in {best['language']})"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as JSON."""
        body: dict[str, Any] = {
            "items": self.items.to_dict(orient="list"),
            "summary": self.summary_by_language.reset_index().to_dict(orient="list"),
            "unit": [self.site, self.layer, self.index],
            "corpus": self.corpus,
            "provenance": self.provenance.to_dict(),
        }
        save_json(path, {"kind": KIND, "schema": SCHEMA, "sha256": _checksum(body), **body})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "TopTexts":
        """Return what `save` wrote.

        Raises:
            StorageError: The file is absent, damaged, or of another kind.
        """
        body = load_json(path)
        require_kind(path, body if isinstance(body, dict) else {}, KIND)
        header = {name: body.pop(name, None) for name in ("kind", "schema", "sha256")}
        if not isinstance(header["schema"], int) or header["schema"] > SCHEMA:
            raise StorageError(f"{path} has schema {header['schema']}, but this version reads up to {SCHEMA}; upgrade.")
        if _checksum(body) != header["sha256"]:
            raise StorageError(f"{path} fails its checksum: the file was changed or damaged; make it again.")
        site, layer, index = body["unit"]
        # JSON's keys are in alphabetical order.
        summary = pd.DataFrame(body["summary"]).set_index("language").loc[:, list(SUMMARY)]
        items = pd.DataFrame(body["items"], columns=list(COLUMNS))
        return cls(items, summary, layer, index, site, body["corpus"], Provenance.from_dict(body["provenance"]))


def _checksum(body: Mapping[str, Any]) -> str:
    return sha256_of(json.dumps(body, sort_keys=True))


@dataclass(order=True, frozen=True)
class _Candidate:
    """A token that may be among the strongest; the order is by value, then first in the corpus."""

    value: float
    later_text: int
    later_position: int
    ids: tuple[int, ...] = field(compare=False)
    position: int = field(compare=False)


class _Language:
    """The strongest tokens and the sums of one language."""

    def __init__(self, k: int, one_per_text: bool) -> None:
        self._k = k
        self._one_per_text = one_per_text
        self._best: list[_Candidate] = []
        self._n = self._positive = 0
        self._sum = 0.0
        self._max = -math.inf

    def add(self, batch: Batch, values: Float[Tensor, "batch pos"]) -> None:
        """Take the values of one batch."""
        counted = values[batch.counted].double()
        if not counted.numel():
            return
        self._n += counted.numel()
        self._positive += int((counted > 0).sum())
        self._sum += float(counted.sum())
        self._max = max(self._max, float(counted.max()))
        ranked = values.masked_fill(~batch.counted, -math.inf)
        if self._one_per_text:
            # A text is one row, so its strongest token is its row's.
            positions = ranked.argmax(dim=1)
            places = [(row, int(position)) for row, position in enumerate(positions)]
        else:
            values_there = ranked.flatten()
            cut = values_there.topk(min(self._k, len(values_there))).values[-1]
            flat = (values_there >= cut).nonzero().squeeze(1).numpy()
            row_at, position_at = np.divmod(flat, ranked.shape[1])
            # Ties at the cut (a unit that is 0 nearly everywhere) go to the first in the corpus.
            order = np.lexsort((position_at, batch.text_index.numpy()[row_at], -values_there.numpy()[flat]))
            places = [(int(row_at[i]), int(position_at[i])) for i in order[: self._k]]
        for row, position in places:
            value = float(ranked[row, position])
            if value == -math.inf:
                continue
            # Rows are right-padded, so a position in the batch is one in the text.
            ids = tuple(batch.tokens[row][batch.mask[row]].tolist())
            self._best.append(_Candidate(value, -int(batch.text_index[row]), -position, ids, position))
        self._best = heapq.nlargest(self._k, self._best)

    def rows(self, info: TokenizerInfo, language: str, window: int) -> Iterator[dict[str, Any]]:
        """Yield one table row a token, the strongest first."""
        for rank, found in enumerate(self._best):
            before, token, after = _context(info, found.ids, found.position, window)
            yield {
                "language": language,
                "rank": rank,
                "value": found.value,
                "before": before,
                "token": token,
                "after": after,
                "text": -found.later_text,
                "position": found.position,
            }

    def sums(self, language: str) -> dict[str, Any]:
        """Return the row of the summary."""
        n = max(self._n, 1)
        share = {"positive": self._positive / n, "mean": self._sum / n, "max": self._max}
        return {"language": language, "n": self._n, **(share if self._n else dict.fromkeys(share, math.nan))}


def _context(info: TokenizerInfo, ids: Sequence[int], position: int, window: int) -> tuple[str, str, str]:
    """Return the text before a token, the token, and the text after it; a cut character is shown whole."""

    def text(start: int, stop: int) -> str:
        return str(info.tokenizer.decode(list(ids[start:stop]), skip_special_tokens=True))

    # A token may be one byte of a character: the fewest neighbours that make it whole are shown with it.
    spans = (
        (position - left, position - left + size)
        for size in range(1, _NEIGHBOURS + 2)
        for left in range(min(size, position + 1))
        if position - left + size <= len(ids)
    )
    start, stop = next((span for span in spans if _BROKEN not in text(*span)), (position, position + 1))
    first, last = max(0, position - window), min(len(ids), position + 1 + window)
    # Each part is what it adds to the text before it: a token decoded alone may lose its space.
    whole = text(first, stop)
    before = text(first, start)
    token = whole[len(before) :] if whole.startswith(before) else text(start, stop)
    longer = text(first, last)
    after = longer[len(whole) :] if longer.startswith(whole) else text(stop, last)
    return before.lstrip(_BROKEN), token, after.rstrip(_BROKEN)


def top_texts(
    model: Model,
    corpus: Corpus,
    unit: tuple[int, int],
    k: int = 10,
    *,
    window: int = 12,
    languages: Sequence[str] | None = None,
    site: str = "gate_act",
    one_per_text: bool = False,
    bos: Bos = "model",
    max_tokens: int | None = None,
    batch_tokens: int = 4096,
) -> TopTexts:
    """Return the tokens on which one unit is strongest, in context, for every language.

    Special tokens and padding do not count. Equal values go to the earlier text and position.

    Args:
        model: The model.
        corpus: Texts by language; longer ones than the context are truncated.
        unit: (layer, index).
        k: Tokens a language.
        window: Tokens of context on either side.
        languages: Languages to look at; default: all of the corpus.
        site: Where the unit lives: one of `SITES`.
        one_per_text: Only the strongest token of each text, for more variety.
        bos: BOS policy.
        max_tokens: Longest text in tokens, BOS included.
        batch_tokens: Padded tokens a batch.

    Raises:
        SettingError: There is no such unit, or k or window is out of range.
        DataError: A language that the corpus lacks.
        ModelError: The model has no hook for the site.
    """
    adapter = adapt(model)
    layer, index = unit
    if not (0 <= layer < adapter.n_layers and 0 <= index < adapter.width(site)):
        raise SettingError(
            f"unit {unit} does not exist; {site} has layers 0 to {adapter.n_layers - 1} and units 0 to "
            f"{adapter.width(site) - 1}."
        )
    if k < 1 or window < 0:
        raise SettingError(f"k={k} must be at least 1 and window={window} at least 0.")
    codes = chosen_languages(languages, corpus=corpus.languages)
    adapter.probe([site])
    policy = TokenPolicy(bos=bos, max_tokens=max_tokens)
    found = {code: _Language(k, one_per_text) for code in codes}
    for code, best in found.items():
        pieces = (piece for own in encode(adapter.tokens, corpus.texts(code), policy) for piece in own)
        while held := list(itertools.islice(pieces, _TEXTS_AT_ONCE)):
            for batch, values in _values(adapter, held, site, layer, index, batch_tokens):
                best.add(batch, values)
    items = [row for code, best in found.items() for row in best.rows(adapter.tokens, code, window)]
    summary = pd.DataFrame([best.sums(code) for code, best in found.items()]).set_index("language")
    provenance = adapter.provenance(site, policy.to_dict(), corpus.fingerprint_all())
    frame = pd.DataFrame(items, columns=list(COLUMNS))
    return TopTexts(frame, summary, layer, index, site, corpus.name, provenance)


def _values(
    adapter: Adapter, pieces: Sequence[Piece], site: str, layer: int, index: int, batch_tokens: int
) -> Iterator[tuple[Batch, Float[Tensor, "batch pos"]]]:
    """Yield batches with the unit's value at every position."""
    caught: list[Tensor] = []

    def take(tensor: Tensor, hook: Any) -> None:
        column = tensor.flatten(2)[..., index].detach()
        caught.append(adapter.act_fn(column) if site == "gate_act" else column)

    name = adapter.hook_name("gate_pre" if site == "gate_act" else site, layer)
    for batch in make_batches(pieces, adapter.tokens.pad_id, batch_tokens):
        with torch.inference_mode():
            adapter.run_until_last_site(batch.tokens, batch.mask, [(name, take)])
        yield batch, caught.pop().float().cpu()
