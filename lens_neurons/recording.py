"""Recording: one pass over a corpus that counts and sums what every neuron does in every language.

`record` goes through the languages one after another and through each in shards: runs of texts that depend on the
corpus, the tokenizer and `shard_tokens` only. With a path every finished shard is a file, so an interrupted recording
goes on where it stopped, and what comes out is bit-equal to that of a recording that was never interrupted.
"""

import dataclasses
import itertools
import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any, Literal, overload

from torch import Tensor
from tqdm.auto import tqdm

from lens_neurons.activation_stats import ActivationStats
from lens_neurons.adapter import Adapter
from lens_neurons.batching import Batch, Shard
from lens_neurons.collect import Collect
from lens_neurons.collecting import PartialSums, RunningSums
from lens_neurons.collectors import Collector
from lens_neurons.corpus import Corpus
from lens_neurons.errors import DataError
from lens_neurons.recorded import Recording
from lens_neurons.recording_files import RecordingFolder
from lens_neurons.recording_plan import PRESETS, RecordingJob, RecordingPlan, foresee, prepare
from lens_neurons.responses import Rows
from lens_neurons.stopping import StopRule

__all__ = ["PRESETS", "RecordingPlan", "plan", "record", "run_reference"]

_LOGGER = logging.getLogger("lens_neurons")


@overload
def record(
    model: Any,
    corpus: Corpus,
    path: str | os.PathLike[str] | None = None,
    *,
    languages: Sequence[str] | None = None,
    site: str = "gate_act",
    bos: Literal["model", "always", "never"] = "model",
    count_special: bool = False,
    max_tokens: int | None = None,
    overflow: Literal["truncate", "split", "error"] = "truncate",
    pack: bool = False,
    chat: Literal["none", "template"] = "none",
    texts_kept: int = 100,
    batch_tokens: int = 4096,
    shard_tokens: int = 65_536,
    fast: bool = True,
    progress: bool = True,
    preset: str | None = None,
    seed: int = 0,
    collect: None = None,
    stop_when: StopRule | None = None,
) -> ActivationStats: ...


@overload
def record(
    model: Any,
    corpus: Corpus,
    path: str | os.PathLike[str] | None = None,
    *,
    languages: Sequence[str] | None = None,
    site: str = "gate_act",
    bos: Literal["model", "always", "never"] = "model",
    count_special: bool = False,
    max_tokens: int | None = None,
    overflow: Literal["truncate", "split", "error"] = "truncate",
    pack: bool = False,
    chat: Literal["none", "template"] = "none",
    texts_kept: int = 100,
    batch_tokens: int = 4096,
    shard_tokens: int = 65_536,
    fast: bool = True,
    progress: bool = True,
    preset: str | None = None,
    seed: int = 0,
    collect: Collect,
    stop_when: StopRule | None = None,
) -> Recording: ...


def record(
    model: Any,
    corpus: Corpus,
    path: str | os.PathLike[str] | None = None,
    *,
    languages: Sequence[str] | None = None,
    site: str = "gate_act",
    bos: Literal["model", "always", "never"] = "model",
    count_special: bool = False,
    max_tokens: int | None = None,
    overflow: Literal["truncate", "split", "error"] = "truncate",
    pack: bool = False,
    chat: Literal["none", "template"] = "none",
    texts_kept: int = 100,
    batch_tokens: int = 4096,
    shard_tokens: int = 65_536,
    fast: bool = True,
    progress: bool = True,
    preset: str | None = None,
    seed: int = 0,
    collect: Collect | None = None,
    stop_when: StopRule | None = None,
) -> ActivationStats | Recording:
    """Return the statistics of every neuron on every language of a corpus, or all that `collect` asks for.

    Args:
        model: A HookedTransformer or TransformerBridge.
        corpus: Texts by language.
        path: A folder to keep the recording in. The same call goes on with an interrupted one, and returns a
            finished one at once.
        languages: Languages of the corpus to record, in this order; default: all.
        site: Where to record: "gate_act" (act(gate), as the papers do) or another of `SITES`.
        bos: Whether a text gets a BOS token: "model" does as the saved tokenizer does.
        count_special: Whether BOS and other special tokens count.
        max_tokens: Longest piece of a text in tokens; default: the model's context.
        overflow: What becomes of a longer text: "truncate", "split" or "error".
        pack: Concatenate texts to full contexts, as LAPE does; then no statistics of single texts are kept.
        chat: "template" puts each text into the tokenizer's chat template.
        texts_kept: p_max, p_median and p_mean are taken over the first so many texts of a language.
        batch_tokens: Most tokens in a batch, padding included.
        shard_tokens: Tokens in a shard: the unit of resuming.
        fast: Reduce in hooks and stop after the last one; False: through `run_with_cache`, bit-equal and slower.
        progress: Show a progress bar.
        preset: How a published study recorded: one of `PRESETS`.
        seed: Kept with the result; nothing here is random.
        collect: What else to take from the same pass, such as `collect_for(["average_precision"])`; the result is
            then a `Recording`, which has the statistics as `stats`.
        stop_when: A rule that ends the recording before the texts end, such as `until_stable(0.9)`. Languages are then
            recorded in rounds of shards, so `shard_tokens` says how often it is asked.

    Raises:
        SettingError: An argument has a value that is not allowed.
        DataError: A language without a token to count, or a text too long under overflow="error".
        ModelError: A hook is missing, or holds NaN or infinite values.
        ProvenanceError: The path holds a recording of another model, corpus, data type or policy.
        StorageError: A file in the path is damaged; the message names it.
    """
    job = prepare(
        model,
        corpus,
        languages=languages,
        site=site,
        texts_kept=texts_kept,
        batch_tokens=batch_tokens,
        shard_tokens=shard_tokens,
        preset=preset,
        seed=seed,
        collect=collect,
        stop_when=stop_when,
        bos=bos,
        count_special=count_special,
        max_tokens=max_tokens,
        overflow=overflow,
        pack=pack,
        chat=chat,
    )
    folder = None if path is None else RecordingFolder(path, job.provenance, job.corpus.languages)
    made = None if folder is None else folder.open()
    if made is None:
        job.adapter.probe(job.sites)
        planned = None if folder is None else folder.plan()
        foreseen = foresee(job, saved=folder is not None) if planned is None else RecordingPlan(**planned)
        if folder is not None and planned is None:
            folder.start(vars(foreseen))
        _LOGGER.info("%s %s", "recording" if planned is None else "going on with the recording", foreseen)
        with tqdm(total=foreseen.total_tokens, unit="token", unit_scale=True, disable=not progress) as bar:
            made = _Pass(job, folder, bar, fast=fast).run(stop_when)
            bar.total = bar.n
        if folder is not None:
            folder.finish(made)
    assert made.stats is not None
    return made.stats if collect is None else made


def plan(
    model: Any,
    corpus: Corpus,
    *,
    languages: Sequence[str] | None = None,
    site: str = "gate_act",
    bos: Literal["model", "always", "never"] = "model",
    count_special: bool = False,
    max_tokens: int | None = None,
    overflow: Literal["truncate", "split", "error"] = "truncate",
    pack: bool = False,
    chat: Literal["none", "template"] = "none",
    texts_kept: int = 100,
    batch_tokens: int = 4096,
    shard_tokens: int = 65_536,
    preset: str | None = None,
    collect: Collect | None = None,
) -> RecordingPlan:
    """Return what `record` with the same arguments will take: tokens, time, memory, disk.

    It reads the first texts of every language and times a forward pass. `record` makes the same plan and logs it.

    Raises:
        SettingError: An argument has a value that is not allowed.
        DataError: A language has no text, or a text is too long under overflow="error".
        ModelError: A hook is missing, or holds NaN or infinite values.
    """
    job = prepare(
        model,
        corpus,
        languages=languages,
        site=site,
        texts_kept=texts_kept,
        batch_tokens=batch_tokens,
        shard_tokens=shard_tokens,
        preset=preset,
        seed=0,
        collect=collect,
        bos=bos,
        count_special=count_special,
        max_tokens=max_tokens,
        overflow=overflow,
        pack=pack,
        chat=chat,
    )
    job.adapter.probe(job.sites)
    return foresee(job, saved=True)


class _Pass:
    """One run of `record`: the languages one after another, each shard by shard."""

    def __init__(self, job: RecordingJob, folder: RecordingFolder | None, bar: Any, *, fast: bool) -> None:
        self._job = job
        self._folder = folder
        self._bar = bar
        self._fast = fast
        self._sums = RunningSums(job.adapter, job.site, job.texts_kept)
        self._stopped = ""
        # What collectors took, by their name and the language.
        self._extras: dict[str, dict[str, dict[str, Tensor]]] = {one.name: {} for one in job.collectors}

    def run(self, stop_when: StopRule | None) -> Recording:
        pairs = [pair for one in self._job.collectors for pair in one.pairs()]
        # Entered once for the whole corpus: entering costs milliseconds. The reference reads its own from a cache.
        with self._job.adapter.hooks([*(self._sums.pairs() if self._fast else ()), *pairs]):
            if stop_when is None:
                parts = [self._language(code) for code in self._job.corpus.languages]
            else:
                parts = self._rounds(stop_when)
        stats = parts[0].merge(*parts[1:])
        if self._stopped:
            stats = dataclasses.replace(stats, notes={**stats.notes, "stopped": self._stopped})
        return Recording(stats, **{one.name: self._gather(one) for one in self._job.collectors})

    def _gather(self, one: Collector) -> Any:
        corpora = {code: self._job.corpus.fingerprint(code) for code in self._job.corpus.languages}
        kept: dict[str, Any] = dict(self._extras[one.name])
        if one.keeps_rows and self._folder is not None:
            kept = {code: self._folder.rows(one.name, code, corpus) for code, corpus in corpora.items()}
        elif one.keeps_rows:
            kept = {code: (Rows(part["positions"], part["rows"], corpus=corpora[code]),) for code, part in kept.items()}
        return one.gather(kept, self._job.provenance)

    def _language(self, language: str) -> ActivationStats:
        self._bar.set_description(language)
        if (known := self._known(language)) is not None:
            _pass_over(self._bar, int(known.tokens.sum()))
            return known
        total: PartialSums | None = None
        for part in self._shards(language):
            total = part if total is None else total.add(part)
        return self._finished(language, total)

    def _known(self, language: str) -> ActivationStats | None:
        """Return the statistics of a language that an earlier call finished, where all that was taken is there."""
        folder = self._folder
        stats = None if folder is None else folder.language(language)
        if folder is None or stats is None:
            return None
        rows = [one.name for one in self._job.collectors if one.keeps_rows]
        totals = {one.name: folder.total(one.name, language) for one in self._job.collectors if not one.keeps_rows}
        if len(folder.complete(language, rows)) < len(folder.spans(language)):
            return None
        there = {name: total for name, total in totals.items() if total is not None}
        if len(there) < len(totals):
            return None
        for name, total in there.items():
            self._extras[name][language] = total
        return stats

    def _rounds(self, rule: StopRule) -> list[ActivationStats]:
        """Record the languages in turn, some shards of each, until the rule or the texts say stop."""
        streams = {code: self._shards(code) for code in self._job.corpus.languages}
        seen: dict[str, list[PartialSums]] = {code: [] for code in streams}
        totals: dict[str, PartialSums] = {}
        going = set(streams)
        while going:
            for code in streams:
                self._bar.set_description(code)
                new = list(itertools.islice(streams[code], rule.check_every))
                for part in new:
                    totals[code] = totals[code].add(part) if code in totals else part
                    seen[code].append(part.without_rows())
                if len(new) < rule.check_every:
                    going.discard(code)
            if empty := [code for code in streams if code not in totals]:
                self._finished(empty[0], None)
            check = rule.check(seen)
            _LOGGER.info("%s", check.reason)
            if check.stop:
                self._stopped = check.reason
                break
        return [self._finished(code, totals[code]) for code in streams]

    def _finished(self, language: str, total: PartialSums | None) -> ActivationStats:
        if total is None or total.tokens == 0:
            raise DataError(
                f"'{language}' has no token that counts in corpus '{self._job.corpus.name}'; give it a text or leave "
                "it out."
            )
        if total.truncated:
            _LOGGER.warning(
                "%d of %d texts of '%s' were cut to the longest input", total.truncated, total.texts, language
            )
        stats = ActivationStats.from_partials(
            {language: total},
            provenance=self._job.provenance,
            corpora={language: self._job.corpus.fingerprint(language)},
        )
        if self._folder is not None:
            for one in self._job.collectors:
                if not one.keeps_rows:
                    self._folder.save_total(one.name, language, self._extras[one.name][language])
            self._folder.save_language(language, stats)
        return stats

    def _shards(self, language: str) -> Iterator[PartialSums]:
        """Yield the sums of every shard in order, from disk where they are there."""
        folder, at = self._folder, 0
        saved = {} if folder is None else folder.complete(language, [one.name for one in self._job.collectors])
        # What is on disk without a gap needs no tokenizing; a shard after a gap is taken when its turn comes.
        while folder is not None and at in saved:
            part, last = folder.load_shard(saved[at])
            yield self._from_disk(folder, part, language, at, last)
            at = last + 1
        for shard in self._job.shards(language, skip=at):
            if folder is not None and shard.first in saved:
                part = folder.load_shard(saved[shard.first], shard.last)[0]
                yield self._from_disk(folder, part, language, shard.first, shard.last)
            else:
                yield self._record(shard)

    def _from_disk(
        self, folder: RecordingFolder, part: PartialSums, language: str, first: int, last: int
    ) -> PartialSums:
        for one in self._job.collectors:
            if not one.keeps_rows:
                self._keep(one, language, folder.load_extra(one.name, language, first, last))
        _pass_over(self._bar, part.tokens)
        return part

    def _record(self, shard: Shard) -> PartialSums:
        for batch in self._job.batches(shard.pieces):
            for one in (self._sums, *self._job.collectors):
                one.begin(batch)
            if self._fast:
                self._job.adapter.run_until_last_site(batch.tokens, batch.mask)
            else:
                run_reference(self._job.adapter, self._sums, batch)
            self._bar.update(int(batch.mask.sum()))
        for one in self._job.collectors:
            taken = one.take(shard)
            if self._folder is not None:
                self._folder.save_extra(one.name, shard, taken)
            if self._folder is None or not one.keeps_rows:
                self._keep(one, shard.language, taken)
        part = self._sums.take(shard)
        if self._folder is not None:
            self._folder.save_shard(shard, part)
        return part

    def _keep(self, one: Collector, language: str, taken: dict[str, Tensor]) -> None:
        earlier = self._extras[one.name].get(language)
        self._extras[one.name][language] = taken if earlier is None else one.add(earlier, taken)


def run_reference(adapter: Adapter, sums: RunningSums, batch: Batch) -> None:
    """Add one batch to the sums the readable way: cache the site in every layer, then reduce layer by layer."""
    cache = adapter.cache_sites(batch.tokens, batch.mask, [sums.source])
    for layer in range(adapter.n_layers):
        sums.reduce(layer, cache[sums.source, layer])


def _pass_over(bar: Any, tokens: int) -> None:
    if not bar.disable:
        # tqdm leaves `initial` out of its speed, so what was on disk does not flatter it.
        bar.initial += tokens
        bar.update(tokens)
