import pytest
from results import make_forcing, make_lss, make_neurons, make_perplexity

from lens_neurons.demo_run import ALL_FACTORS, PRESET, PUBLISHED, QUICK_FACTS, WELL_FED, DemoResult, _bars, quick_facts
from lens_neurons.facts import Facts
from lens_neurons.languages import DEMO_LANGUAGES
from lens_neurons.methods import list_methods

KEYS = {
    "schema",
    "versions",
    "preset",
    "neurons_per_language",
    "lss",
    "forced_share",
    "baseline_share",
    "silencing",
    "bars",
}


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    neurons = make_neurons()
    lss, forcing, silencing = make_lss(factors=("p_max", "p_median", "=0")), make_forcing(), make_perplexity()
    bars = _bars(neurons, lss, forcing, silencing, full=True)
    path = tmp_path_factory.mktemp("demo") / "report.html"
    return DemoResult(PRESET, True, (2, 4), neurons, neurons, lss, forcing, silencing, bars, {"lss": 1.0}, path)


def test_the_quick_facts_are_facts_with_even_ids():
    even = Facts.packaged().even()
    ids = [fact.id for fact in quick_facts(even, 0).items]
    assert len(ids) == QUICK_FACTS
    assert set(ids) <= {fact.id for fact in even.items}
    assert ids == [fact.id for fact in quick_facts(even, 0).items]
    assert any(ids != [fact.id for fact in quick_facts(even, seed).items] for seed in (1, 2, 3))


def test_the_presets_are_of_known_methods():
    assert {PRESET.method, PUBLISHED.method} <= set(list_methods().index)
    assert {"p_max", "p_median", "=0"} <= set(ALL_FACTORS)
    assert len(WELL_FED) == 15
    assert set(DEMO_LANGUAGES) - set(WELL_FED) == {"ms", "ht", "qu"}


def test_json_has_its_keys(result):
    made = result.to_json()
    assert set(made) >= KEYS
    assert set(made["lss"]) == {"p_max", "p_median", "=0", "random"}
    assert set(made["lss"]["p_max"]) == {"mean", "low", "high", "n"}
    assert set(made["lss"]["random"]) == {"mean", "low", "high", "n"}
    assert set(made["silencing"]["en"]) == {"own", "largest_other", "low", "high"}
    assert all(set(bar) == {"value", "threshold", "met"} for bar in made["bars"].values())
    assert made["languages_without_neurons"] == ["it", "sw"]


def test_bars_are_read_off_the_scores(result):
    table = result.lss.summary()
    assert result.bars["lss_p_max"].value == pytest.approx(table.loc["p_max", "mean"])
    assert result.bars["lss_p_max"].met == (table.loc["p_max", "mean"] >= 0.9)
    assert result.bars["lss_random"].value == pytest.approx(table.loc["p_max", "control"])
    gap = table.loc["p_max", "mean"] - table.loc["=0", "mean"]
    assert result.bars["lss_p_max_minus_zero"].value == pytest.approx(gap)
    above = result.silencing.own_minus_largest_other()["above"].sum()
    assert result.bars["silenced_most_by_own"].value == above
    assert result.all_met == all(bar.met for bar in result.bars.values())


def test_a_missed_bar_is_seen():
    worst = make_lss(factors=("=0", "p_median", "p_max"))
    neurons = make_neurons()
    bars = _bars(neurons, worst, make_forcing(), make_perplexity(), full=True)
    assert not bars["lss_order"].met
    assert not bars["lss_p_max_minus_zero"].met


def test_tables_have_every_language(result):
    for title, table in result.tables().items():
        if title.startswith(("Neurons", "Forced", "Silencing")):
            assert list(table.index) == list(DEMO_LANGUAGES), title
