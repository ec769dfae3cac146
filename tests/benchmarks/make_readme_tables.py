"""Write the figures of `lens-neurons demo --full --json` into the README, between its two markers.

lens-neurons demo --full --json > demo_full.json
python tests/benchmarks/make_readme_tables.py demo_full.json
"""

import argparse
import json
import textwrap
from pathlib import Path

README = Path(__file__).resolve().parents[2] / "README.md"
BEGIN, END = "<!-- demo --full: begin -->\n", "<!-- demo --full: end -->\n"

BARS = {
    "largest_language_share": ("largest share of the model's neurons in one language", "at most 0.05", "{:.3f}"),
    "lss_p_max": ("grand mean LSS of p_max, 306 pairs of languages, {facts} facts", "at least 0.90", "{:.3f}"),
    "lss_random": ("the same for random neurons", "at most 0.60", "{:.3f}"),
    "lss_p_max_minus_zero": ("LSS of p_max minus that of =0", "at least 0.25", "{:.3f}"),
    "forced_minus_random": ("forced language: steered minus random share, 15 languages", "at least 0.40", "{:.3f}"),
    "silenced_most_by_own": ("languages hurt most by silencing their own neurons, of 18", "at least 13", "{:.0f}"),
    "lss_order": ("p_max >= p_median > random > =0: smallest step", "above 0", "{:.3f}"),
}


def tables(found):
    """Return the section as Markdown."""
    lines = ["| what | value | bar | met |", "|---|---|---|---|"]
    for name, bar in found["bars"].items():
        what, threshold, shape = BARS[name]
        met = "yes" if bar["met"] else "**no**"
        what = what.format(facts=len(found["facts"]))
        lines.append(f"| {what} | {shape.format(bar['value'])} | {threshold} | {met} |")
    lines += ["", "| factor | LSS, mean and 95% interval |", "|---|---|"]
    lines += [f"| {k} | {v['mean']:.3f} [{v['low']:.3f}, {v['high']:.3f}] |" for k, v in found["lss"].items()]
    counts, published = found["neurons_per_language"].values(), found["neurons_per_language_published"].values()
    prose = (
        f"The preset selects {min(counts)} to {max(counts)} neurons a language, the published LAPE preset (1%) "
        f"{min(published)} to {max(published)}. Unprompted samples that count under steering "
        f"(`{found['preset']['forcing']}`): {found['forced_share']:.2f} on average over the 15 languages with plenty "
        f"of training text, {found['forced_share_random']:.2f} with random neurons, {found['baseline_share']:.2f} "
        "without steering. Silencing random neurons hurts the language itself most in "
        f"{found['silenced_most_by_own_random']:.1f} of 18, on average over "
        f"{found['random_draws']['silencing']} draws."
    )
    lines += ["", *textwrap.wrap(prose, 120, break_long_words=False, break_on_hyphens=False)]
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("result", type=Path, help="what `lens-neurons demo --full --json` printed")
    text = README.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    found = json.loads(parser.parse_args().result.read_text(encoding="utf-8"))
    README.write_text(before + BEGIN + tables(found) + END + after, encoding="utf-8")


if __name__ == "__main__":
    main()
