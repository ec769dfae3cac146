"""How many tokens LAPE needs: agreement of random halves against tokens, on the demo model, as a script.

    python tests/benchmarks/tokens_needed.py --text ../shared/data/text --tokens 20000 --out tokens_needed.json

It records the packaged sentences, and the first so many tokens of every language in a folder of text, in small shards;
then runs LAPE on random halves of the shards and on parts of both halves (`lens_neurons.stability`), with the preset of
the demonstration and with the published one. Printed are the curves (mean Jaccard index over languages, with the middle
95% of the splits), the tokens a language from which on two recordings agree at 0.5 to 0.9, and, because halves of one
corpus agree more than two corpora do, the agreement of the sets from the sentences with those from the folder. A folder
that does not exist is passed over.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from lens_neurons.batching import TokenPolicy, encode
from lens_neurons.compare import compare_methods
from lens_neurons.corpus import Corpus
from lens_neurons.demo_run import PRESET, PUBLISHED
from lens_neurons.methods import identify
from lens_neurons.model import adapt, load_model
from lens_neurons.recording import record
from lens_neurons.split_halves import stability

PRESETS = {"demo": PRESET.settings, "published": PUBLISHED.settings}
THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)
FRACTIONS = (0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0)


def first_tokens(adapter, corpus, languages, tokens):
    """Return the first texts of every language, up to a number of tokens."""
    chosen = {}
    for code in languages:
        kept, total = [], 0
        texts = corpus.texts(code)
        for text, pieces in zip(corpus.texts(code), encode(adapter.tokens, texts, TokenPolicy())):
            total += sum(len(piece.ids) for piece in pieces)
            kept.append(text)
            if total >= tokens:
                break
        chosen[code] = kept
    return Corpus.from_texts(chosen, name=f"{corpus.name}, first {tokens:,} tokens")


def measure(model, corpus, shard_tokens, splits, name):
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        stats = record(model, corpus, Path(folder) / "recording", shard_tokens=shard_tokens, progress=False)
        seconds = time.perf_counter() - started
        tokens = dict(zip(stats.languages, stats.tokens.tolist()))
        for preset, settings in PRESETS.items():
            curve = stability(
                Path(folder) / "recording", settings=settings, n_splits=splits, fractions=FRACTIONS, seed=0
            )
            overall, halves = curve.overall(), curve.halves()
            found[preset] = {
                "settings": dict(settings),
                "overall": overall.to_dict(orient="list"),
                "halves": halves.reset_index().to_dict(orient="list"),
                "tokens_needed": {str(t): curve.tokens_needed(t).to_dict() for t in THRESHOLDS},
                "notes": list(curve.notes),
            }
            show(name, preset, overall, halves, curve)
    known = {"corpus": corpus.name, "shard_tokens": shard_tokens, "tokens": tokens, "record_s": seconds}
    return {**known, **found}, stats


def between(one, other):
    """Return the Jaccard index of the sets from two recordings, by preset and language, on their common languages."""
    languages = [code for code in one.languages if code in other.languages]
    found = {}
    for preset, settings in PRESETS.items():
        sets = {
            name: identify(stats.select(languages), "lape", **settings) for name, stats in (("a", one), ("b", other))
        }
        table = compare_methods(sets).to_frame()
        found[preset] = dict(zip(table["language"], table["jaccard"]))
        known = table["jaccard"].dropna()
        sys.stdout.write(
            f"\nsentences against text, preset {preset}: mean Jaccard {known.mean():.3f} ({known.min():.3f} to "
            f"{known.max():.3f}), by chance {table['expected_jaccard'].mean():.3f}\n"
        )
    return found


def show(name, preset, overall, halves, curve):
    sys.stdout.write(
        f"\n{name}, preset {preset}\n| tokens a language | Jaccard, mean [95%] | by chance |\n|---|---|---|\n"
    )
    for row in overall.itertuples():
        sys.stdout.write(f"| {row.tokens:,.0f} | {row.mean:.3f} [{row.low:.3f}, {row.high:.3f}] | {row.chance:.3f} |\n")
    worst, best = halves["mean"].idxmin(), halves["mean"].idxmax()
    sys.stdout.write(
        f"two halves by language: {worst} {halves['mean'].min():.3f} to {best} {halves['mean'].max():.3f}\n"
    )
    for threshold in THRESHOLDS:
        needed = curve.tokens_needed(threshold)
        reached = needed.drop("").notna().sum()
        mean = "not reached" if needed[""] != needed[""] else f"{needed['']:,.0f} tokens"
        sys.stdout.write(
            f"agreement of {threshold}: mean over languages {mean}; {reached} of {len(needed) - 1} languages reach it\n"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, help="folder of {language}.txt[.gz]")
    parser.add_argument("--tokens", type=int, default=20_000, help="tokens a language of the folder's text")
    parser.add_argument("--splits", type=int, default=20)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    model = load_model("demo")
    packaged = Corpus.packaged("identify")
    result = {}
    result["packaged"], sentences = measure(model, packaged, 128, arguments.splits, "packaged sentences")
    if arguments.text is not None and arguments.text.is_dir():
        whole = Corpus.from_files(arguments.text)
        languages = [code for code in packaged.languages if code in whole.languages]
        corpus = first_tokens(adapt(model), whole, languages, arguments.tokens)
        shard_tokens = max(128, arguments.tokens // 60)
        result["text"], text = measure(model, corpus, shard_tokens, arguments.splits, arguments.text.name)
        result["between"] = between(sentences, text)
    else:
        sys.stdout.write(f"\nthere is no folder {arguments.text}; give one with --text\n")
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
