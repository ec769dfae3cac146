"""Choose the demonstration's preset: every candidate scored on facts with odd ids and the identification sentences.

    python tests/benchmarks/choose_preset.py --model demo --out presets.json [--facts 8] [--forcing]

Nothing that the bars are reported on (even ids, the held-out sentences) is looked at here. demo/MODEL_CARD.md lists
what was tried on the packaged model.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import lens_neurons as ln
from lens_neurons.demo_run import WELL_FED

LAPE = [(top, bar) for top in (0.01, 0.05, 0.1, 0.14, 0.25) for bar in (0.95, 0.9)] + [(0.35, 0.85)]
FIXED = [(units, bar) for units in (150, 300, 500, 700, 765) for bar in (0.8, 0.9, 0.95, 0.98)]


def candidates():
    for top, bar in LAPE:
        yield "lape", {"top_rate": top, "filter_rate": 0.95, "activation_bar_ratio": bar}
    for units, bar in FIXED:
        yield "fixed_count", {"units_per_language": units, "activation_bar_ratio": bar}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--out", type=Path, default=Path("presets.json"))
    parser.add_argument("--facts", type=int, default=8, help="odd facts to use")
    parser.add_argument("--only", help="only candidates whose name and settings contain this")
    parser.add_argument("--forcing", nargs="*", default=[], help="factors to try for unprompted samples")
    parser.add_argument("--samples", type=int, default=10)
    arguments = parser.parse_args()

    model = ln.load_model(arguments.model)
    corpus = ln.Corpus.packaged()
    stats = ln.record(model, corpus, progress=False)
    # The last 30 identification sentences stand in for the held-out ones.
    tested = corpus.slice(90, 120)
    odd = ln.Facts.packaged().odd()
    step = max(1, len(odd) // arguments.facts)
    facts = odd.select([fact.id for fact in odd.items[::step]])
    rows = []
    for method, settings in candidates():
        name = f"{method} {settings}"
        if arguments.only and arguments.only not in name:
            continue
        began = time.perf_counter()
        neurons = ln.identify(stats, method, **settings)
        counts = neurons.counts()
        row = {
            "method": method,
            "settings": settings,
            "smallest": min(counts.values()),
            "largest_share": max(counts.values()) / (neurons.shape[0] * neurons.shape[1]),
        }
        table = ln.language_steering_shift(
            model, neurons, stats, facts, ["p_max", "p_median", "=0"], random_draws=1, progress=False
        ).summary()
        row |= {factor: float(table.loc[factor, "mean"]) for factor in ("p_max", "p_median", "=0")}
        row["random"] = float(table.loc["p_max", "control"])
        hit = ln.perplexity_matrix(model, neurons, tested, random_draws=0, progress=False).own_minus_largest_other()
        row["silenced"] = int(hit["above"].sum())
        for factor in arguments.forcing:
            forced = ln.forced_share(
                model, neurons, stats, factor=factor, n=arguments.samples, random_draws=1, reference=tested
            ).overall(WELL_FED)
            row[f"forced {factor}"] = {key: float(forced[key]) for key in ("mean", "control", "raw", "baseline")}
        row["seconds"] = round(time.perf_counter() - began, 1)
        rows.append(row)
        sys.stdout.write(json.dumps(row) + "\n")
        sys.stdout.flush()
        arguments.out.write_text(json.dumps({"facts": [f.id for f in facts.items], "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
