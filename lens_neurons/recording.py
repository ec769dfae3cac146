"""Recording: one pass over a corpus that counts and sums what every neuron does in every language.

`record` goes through the languages one after another and through each in shards: runs of texts that depend on the
corpus, the tokenizer and `shard_tokens` only. With a path every finished shard is a file, so an interrupted recording
goes on where it stopped, and what comes out is bit-equal to that of a recording that was never interrupted.
"""

import logging
import os
from collections.abc import Sequence
from typing import Any, Literal

from tqdm.auto import tqdm

from lens_neurons.activation_stats import ActivationStats
from lens_neurons.adapter import Adapter
from lens_neurons.batching import Batch, Shard
from lens_neurons.collecting import PartialSums, RunningSums
from lens_neurons.corpus import Corpus
from lens_neurons.errors import DataError
from lens_neurons.recording_files import RecordingFolder
from lens_neurons.recording_plan import PRESETS, RecordingJob, RecordingPlan, foresee, prepare

__all__ = ["PRESETS", "RecordingPlan", "plan", "record", "run_reference"]

_LOGGER = logging.getLogger("lens_neurons")


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
) -> ActivationStats:
    """Return the statistics of every neuron on every language of a corpus.

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
        bos=bos,
        count_special=count_special,
        max_tokens=max_tokens,
        overflow=overflow,
        pack=pack,
        chat=chat,
    )
    folder = None if path is None else RecordingFolder(path, job.provenance, job.corpus.languages)
    if folder is not None and (finished := folder.open()) is not None:
        return finished
    job.adapter.probe([site])
    planned = None if folder is None else folder.plan()
    foreseen = foresee(job, saved=folder is not None) if planned is None else RecordingPlan(**planned)
    if folder is not None and planned is None:
        folder.start(vars(foreseen))
    _LOGGER.info("%s %s", "recording" if planned is None else "going on with the recording", foreseen)
    sums = RunningSums(job.adapter, site, job.texts_kept)
    parts: list[ActivationStats] = []
    with tqdm(total=foreseen.total_tokens, unit="token", unit_scale=True, disable=not progress) as bar:
        if not fast:
            parts = [_record_language(job, code, sums, folder, bar, fast=False) for code in job.corpus.languages]
        else:
            # Entered once for the whole corpus: entering costs milliseconds.
            with job.adapter.hooks(sums.pairs()):
                parts = [_record_language(job, code, sums, folder, bar, fast=True) for code in job.corpus.languages]
        bar.total = bar.n
    stats = parts[0].merge(*parts[1:])
    if folder is not None:
        folder.finish(stats)
    return stats


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
        bos=bos,
        count_special=count_special,
        max_tokens=max_tokens,
        overflow=overflow,
        pack=pack,
        chat=chat,
    )
    job.adapter.probe([site])
    return foresee(job, saved=True)


def _record_language(
    job: RecordingJob, language: str, sums: RunningSums, folder: RecordingFolder | None, bar: Any, *, fast: bool
) -> ActivationStats:
    bar.set_description(language)
    if folder is not None and (known := folder.language(language)) is not None:
        _pass_over(bar, int(known.tokens.sum()))
        return known
    total: PartialSums | None = None
    at = 0
    saved = {} if folder is None else folder.shards(language)
    # What is on disk without a gap needs no tokenizing; a shard after a gap is taken when its turn comes.
    while folder is not None and at in saved:
        part, last = folder.load_shard(saved[at])
        total = part if total is None else total.add(part)
        _pass_over(bar, part.tokens)
        at = last + 1
    for shard in job.shards(language, skip=at):
        if folder is not None and shard.first in saved:
            part = folder.load_shard(saved[shard.first], shard.last)[0]
            _pass_over(bar, part.tokens)
        else:
            part = _record_shard(job, shard, sums, bar, fast=fast)
            if folder is not None:
                folder.save_shard(shard, part)
        total = part if total is None else total.add(part)
    if total is None or total.tokens == 0:
        raise DataError(
            f"'{language}' has no token that counts in corpus '{job.corpus.name}'; give it a text or leave it out."
        )
    if total.truncated:
        _LOGGER.warning("%d of %d texts of '%s' were cut to the longest input", total.truncated, total.texts, language)
    stats = ActivationStats.from_partials(
        {language: total}, provenance=job.provenance, corpora={language: job.corpus.fingerprint(language)}
    )
    if folder is not None:
        folder.save_language(language, stats)
    return stats


def _record_shard(job: RecordingJob, shard: Shard, sums: RunningSums, bar: Any, *, fast: bool) -> PartialSums:
    for batch in job.batches(shard.pieces):
        sums.begin(batch)
        if fast:
            job.adapter.run_until_last_site(batch.tokens, batch.mask)
        else:
            run_reference(job.adapter, sums, batch)
        bar.update(int(batch.mask.sum()))
    return sums.take(shard)


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
