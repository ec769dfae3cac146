"""Sections of a report that compare: methods with each other, a method with itself, what silencing shows of each."""

from collections.abc import Callable
from typing import Any

from lens_neurons import comparison_figures as figures
from lens_neurons.compare import MethodComparison
from lens_neurons.evaluation.causal import CausalRanking
from lens_neurons.report_blocks import Block, figure_block, note_blocks, settings_block, table_block, text_block
from lens_neurons.split_halves import Stability

_ABOUT_METHODS = (
    "How many units the sets of two methods share. Jaccard: shared / united. By chance means two random sets of the "
    "same sizes, drawn from all units (expected, p), or, stricter, with the same number of units in every layer (p "
    "layers). q is p after Benjamini-Hochberg over all pairs and languages. Corrected: 0 is chance, 1 is equal sets."
)
_ABOUT_STABILITY = (
    "The method was run on random halves of what was recorded, which share no text, and on smaller parts of both. The "
    "Jaccard index of the two sets says how far two independent recordings of so many tokens would agree; a set from "
    "all that was recorded is more stable than the last point. Intervals are the spread over random splits."
)
_ABOUT_RANKING = (
    "Each method's best units of one language are silenced, the same number for every method. Own is the change in NLL "
    "per token in that language, other the mean change in the other languages, selectivity their difference; beyond is "
    "selectivity less that of as many random units in the same layers. Intervals resample texts, for the control also "
    "draws. Above counts languages that suffer more than every other one (interval above 0)."
)


def _methods(comparison: MethodComparison) -> tuple[str, list[Block]]:
    table = comparison.to_frame()
    means: Any = table.groupby(["method", "other"], sort=False)[
        ["units", "other_units", "shared", "jaccard", "expected_jaccard", "corrected"]
    ].mean()
    beyond: Any = table.assign(
        tested=table["q"].notna(), beyond_chance=table["q"] < 0.05, beyond_layers=table["q_layers"] < 0.05
    )
    counts = beyond.groupby(["method", "other"], sort=False)[["tested", "beyond_chance", "beyond_layers"]].sum()
    blocks = [text_block(_ABOUT_METHODS), *note_blocks(comparison.notes)]
    blocks += [figure_block(figures.method_overlap(comparison)), figure_block(figures.method_layers(comparison))]
    caption = (
        "Pairs of methods, mean over languages; languages with overlap beyond chance at a false discovery rate of 5%"
    )
    blocks.append(table_block(means.join(counts), caption))
    blocks.append(table_block(table, "Every language", folded=True))
    return "Methods compared", [*blocks, settings_block(comparison.settings["methods"], "Settings of the methods")]


def _stability(found: Stability) -> tuple[str, list[Block]]:
    blocks = [text_block(_ABOUT_STABILITY), *note_blocks(found.notes), figure_block(figures.stability_curve(found))]
    blocks.append(table_block(found.overall(), "Mean over languages"))
    blocks.append(table_block(found.halves(), "Two whole halves, by language", folded=True))
    return f"Stability: {found.settings['method']['name']}", [*blocks, settings_block(found.settings, "Settings")]


def _ranking(ranking: CausalRanking) -> tuple[str, list[Block]]:
    summary = ranking.summary()
    blocks = [text_block(_ABOUT_RANKING), *note_blocks(ranking.notes)]
    blocks.append(figure_block(figures.causal_ranking(ranking, summary=summary)))
    blocks.append(table_block(summary, "Methods by selectivity, changes in nats a token"))
    blocks.append(table_block(ranking.differences(), "Differences of selectivity", folded=True))
    blocks.append(table_block(ranking.by_language(), "Own minus others, by language", folded=True))
    return "Methods by what silencing shows", [*blocks, settings_block(ranking.settings, "Settings")]


# What makes the section of each kind of result.
COMPARISONS: dict[type, Callable[[Any], tuple[str, list[Block]]]] = {
    MethodComparison: _methods,
    Stability: _stability,
    CausalRanking: _ranking,
}
