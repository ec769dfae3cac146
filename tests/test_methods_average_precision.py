from fractions import Fraction

import numpy as np
import pytest
import torch
from devices import Elsewhere, other_device
from sklearn.metrics import average_precision_score

from lens_neurons.errors import DataError, SettingError
from lens_neurons.methods import average_precision as module
from lens_neurons.methods import cite, collect_for, identify, list_methods, ranking
from lens_neurons.methods.average_precision import average_precision, average_precision_table
from lens_neurons.methods.average_precision_threshold import average_precision_threshold
from lens_neurons.methods.ranking import average_precisions
from lens_neurons.responses import ROWS_KIND, TextResponses, mapped_rows
from lens_neurons.storage import save_tensors

LANGUAGES = ("en", "fr", "sw")
TEXTS = (9, 14, 6)
SITES = {"gate_pre": (2, 5), "q": (2, 4), "mlp_out": (1, 3)}
N_UNITS = 10 + 8 + 3
DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
SPECIAL = (0.0, -0.0, 1e-40, -1e-40, 3.4e38, -3.4e38, 1.0, 1 + 2**-23, -1.0, -1 - 2**-23)


def make_labels(rng, counts):
    return torch.from_numpy(rng.permutation(np.repeat(np.arange(len(counts)), counts)))


def make_values(rng, kind, n_texts, n_units):
    values = rng.normal(size=(n_texts, n_units))
    if kind == "float16":
        values = (1 + values / 500).astype(np.float16)
    elif kind == "few":
        values = values.round()
    elif kind == "signs":
        values = rng.choice(SPECIAL, size=values.shape)
    elif kind == "constant":
        values[:] = values[0]
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))


def by_sklearn(values, labels, n_languages):
    scores = values.numpy().astype(np.float64)
    return np.array(
        [[average_precision_score(labels.numpy() == k, own) for own in scores.T] for k in range(n_languages)]
    )


def by_definition(scores, is_positive):
    """Sum over the thresholds, highest first, of the gain in recall times the precision; exact."""
    total, before, found = sum(is_positive), Fraction(0), Fraction(0)
    for threshold in sorted(set(scores), reverse=True):
        above = [positive for score, positive in zip(scores, is_positive, strict=True) if score >= threshold]
        recall = Fraction(sum(above), total)
        found += (recall - before) * Fraction(sum(above), len(above))
        before = recall
    return found


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["distinct", "float16", "few", "signs", "constant"])
def test_equals_scikit_learn(kind, seed):
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 60, size=int(rng.integers(2, 9)))
    labels = make_labels(rng, counts)
    values = make_values(rng, kind, len(labels), 17)
    found = average_precisions(values, labels, len(counts))
    np.testing.assert_allclose(found, by_sklearn(values, labels, len(counts)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["distinct", "few", "signs"])
def test_equals_a_slow_transcription(kind):
    rng = np.random.default_rng(3)
    labels = make_labels(rng, [4, 1, 7])
    values = make_values(rng, kind, 12, 5)
    found = average_precisions(values, labels, 3)
    for k in range(3):
        for unit in range(5):
            exact = by_definition(values[:, unit].tolist(), (labels == k).tolist())
            assert abs(found[k, unit].item() - exact) < 1e-14


def test_many_texts_keep_the_accuracy():
    rng = np.random.default_rng(0)
    labels = make_labels(rng, [40_000, 1, 25_000])
    values = make_values(rng, "distinct", len(labels), 2)
    found = average_precisions(values, labels, 3)
    np.testing.assert_allclose(found, by_sklearn(values, labels, 3), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_floating_dtype_is_exact(dtype):
    rng = np.random.default_rng(0)
    labels = make_labels(rng, [20, 30, 25])
    values = torch.from_numpy(rng.normal(size=(75, 6))).to(dtype)
    if dtype == torch.float64:
        values[:30] = values[0] + torch.arange(30)[:, None] * 1e-12  # equal in float32
    found = average_precisions(values, labels, 3)
    np.testing.assert_allclose(found, by_sklearn(values.double(), labels, 3), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["distinct", "float16", "few", "signs"])
def test_is_the_same_to_the_last_bit_on_every_path(kind, monkeypatch):
    rng = np.random.default_rng(1)
    labels = make_labels(rng, [50, 40, 30, 80])
    values = make_values(rng, kind, 200, 31)
    found = average_precisions(values, labels, 4)
    for at_once in (1, 200, 1000, 1 << 30):
        monkeypatch.setattr(ranking, "_AT_ONCE_CPU", at_once)
        assert torch.equal(average_precisions(values, labels, 4), found)
    # What runs on other devices: torch's own sorts, with positions for the first.
    assert torch.equal(average_precisions(values.double(), labels, 4), found)
    monkeypatch.setattr(ranking, "_sort", lambda keys: keys.sort(dim=1).values)
    assert torch.equal(average_precisions(values.double(), labels, 4), found)
    assert torch.equal(average_precisions(values, labels, 4), found)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_is_the_same_to_the_last_bit_on_every_device(dtype, device):
    rng = np.random.default_rng(1)
    labels = make_labels(rng, [50, 40, 30, 80])
    values = make_values(rng, "float16", 200, 31)
    found = average_precisions(values.to(device, dtype), labels, 4)
    assert found.device.type == device
    assert torch.equal(found.cpu(), average_precisions(values, labels, 4))


def test_the_order_of_texts_units_and_languages_does_not_matter():
    rng = np.random.default_rng(2)
    labels = make_labels(rng, [12, 30, 20])
    values = make_values(rng, "few", 62, 9)
    found = average_precisions(values, labels, 3)
    texts, units = rng.permutation(62), rng.permutation(9)
    assert torch.equal(average_precisions(values[texts], labels[texts], 3), found)
    assert torch.equal(average_precisions(values[:, units], labels, 3), found[:, units])
    again = average_precisions(values, torch.tensor([2, 0, 1])[labels], 3)
    assert torch.equal(again[[2, 0, 1]], found)


def test_numbers_of_the_paper():
    # 500 texts of the language and 2,500 others: 0.1667 says nothing, 0.0886 is the least possible.
    labels = torch.tensor([0] * 500 + [1] * 2500)
    rising = torch.arange(3000, dtype=torch.float32)
    found = average_precisions(torch.stack([torch.zeros(3000), rising, -rising], dim=1), labels, 2)[0]
    assert found[0].item() == pytest.approx(500 / 3000, abs=1e-12)
    assert round(found[0].item(), 4) == 0.1667
    assert found[1].item() == pytest.approx(sum((j + 1) / (2501 + j) for j in range(500)) / 500, abs=1e-12)
    assert round(found[1].item(), 4) == 0.0886
    assert found[2].item() == 1.0


def test_bad_values_and_labels_are_sentences():
    values, labels = torch.zeros(3, 2), torch.tensor([0, 1, 1])
    for bad in (torch.nan, torch.inf, -torch.inf):
        with pytest.raises(DataError, match="NaN or infinite"):
            average_precisions(values.index_fill(0, torch.tensor(2), bad), labels, 2)
    with pytest.raises(DataError, match="language number 2 has no text"):
        average_precisions(values, labels, 3)
    with pytest.raises(DataError, match="from 0 to 0"):
        average_precisions(values, labels, 1)
    with pytest.raises(DataError, match="language number 0 has no text"):
        average_precisions(torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64), 1)
    assert average_precisions(torch.zeros(3, 0), labels, 2).shape == (2, 0)


# The methods.


def make_rows(seed, dtype=torch.float32):
    """Responses at three sites: unit 13 is Swahili's, unit 6 is constant, units 2 and 18 are equal."""
    rng = np.random.default_rng(seed)
    rows = {code: torch.from_numpy(rng.normal(size=(n, N_UNITS))) for code, n in zip(LANGUAGES, TEXTS, strict=True)}
    for code, own in rows.items():
        own[:, 13] += 9.0 * (code == "sw")
        own[:, 6] = -0.25
        own[:, 18] = own[:, 2]
    return {code: own.to(dtype) for code, own in rows.items()}


def make_responses(seed, dtype=torch.float32, sites=SITES):
    return TextResponses.from_rows(make_rows(seed, dtype), sites=sites)


def slow_ranking(responses, language, leave_out=(6,)):
    """(AP, flat number) of every unit that is not constant, by scikit-learn."""
    values = np.concatenate([responses.rows(code).float().numpy() for code in responses.languages])
    own = np.repeat([code == language for code in responses.languages], list(responses.counts().values()))
    # Rounded, so that units with equal responses tie here as they do in exact arithmetic.
    score = [round(average_precision_score(own, values[:, unit]), 12) for unit in range(responses.n_units)]
    return [(score[unit], unit) for unit in range(responses.n_units) if unit not in leave_out]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("k", [1, 6, 20])
def test_selection_equals_a_slow_transcription(seed, dtype, k):
    responses = make_responses(seed, dtype)
    for language in LANGUAGES:
        ranked = slow_ranking(responses, language)
        falling = [unit for _, unit in sorted(ranked, key=lambda entry: (-entry[0], entry[1]))]
        rising = [unit for _, unit in sorted(ranked)]
        wanted = {"top": falling[:k], "bottom": rising[:k], "medium": falling[(20 - k) // 2 :][:k]}
        if k % 2 == 0:
            high = falling[: k // 2]
            wanted["both"] = high + [unit for unit in rising if unit not in high][: k // 2]
        for which, units in wanted.items():
            found = average_precision(responses, k=k, which=which)
            assert found.flat(language).tolist() == units
            kinds = [found.kinds[kind] for kind in found.tables[language].kind.tolist()]
            assert kinds == (["top"] * (k // 2) + ["bottom"] * (k // 2) if which == "both" else [which] * k)
            scores = {unit: score for score, unit in ranked}
            np.testing.assert_allclose(found.tables[language].score, [scores[unit] for unit in units], atol=1e-11)


def test_a_planted_unit_comes_first_and_its_mirror_last():
    rows = make_rows(0)
    for own in rows.values():
        own[:, 4] = -own[:, 13]
    found = average_precision(TextResponses.from_rows(rows, sites=SITES), k=2)
    assert found.flat("sw").tolist() == [13, 4]
    assert found.of_kind("top").flat("sw").tolist() == [13]
    assert found.of_kind("bottom").flat("sw").tolist() == [4]
    assert found.tables["sw"].score[0] == 1.0
    frame = found.to_frame()
    best = frame[(frame["language"] == "sw") & (frame["rank"] == 0)].iloc[0]
    assert (best["site"], best["layer"], best["neuron"], best["kind"]) == ("q", 0, 3, "top")


def test_a_constant_unit_has_the_share_of_texts_and_is_never_taken():
    responses = make_responses(1)
    table = average_precision_table(responses)
    shares = torch.tensor(TEXTS, dtype=torch.float64) / sum(TEXTS)
    torch.testing.assert_close(table[:, 6], shares, rtol=0, atol=1e-12)
    for which in ("top", "bottom", "both", "medium"):
        found = average_precision(responses, k=20, which=which)
        for code in LANGUAGES:
            assert sorted(found.flat(code).tolist()) == [unit for unit in range(N_UNITS) if unit != 6]
    assert 6 not in average_precision_threshold(responses, 0.0, exclusive=False, units="all").flat("en").tolist()
    with pytest.raises(SettingError, match=r"k=21 is more than the 20 units .*: of 21 units .* 1 are constant"):
        average_precision(responses, k=21, which="top")


def test_equal_scores_are_top_before_they_are_bottom():
    rows = {code: torch.arange(3.0)[:, None].repeat(1, 6) + shift for shift, code in enumerate(("en", "fr"))}
    found = average_precision(TextResponses.from_rows(rows, sites={"up": (2, 3)}), k=4)
    assert found.flat("en").tolist() == [0, 1, 2, 3]
    assert found.of_kind("top").flat("en").tolist() == [0, 1]
    assert average_precision(TextResponses.from_rows(rows, sites={"up": (2, 3)}), k=2, which="medium").flat(
        "fr"
    ).tolist() == [2, 3]


def test_the_order_of_languages_does_not_matter():
    responses = make_responses(2)
    found = average_precision(responses, k=6)
    again = average_precision(responses.select(["sw", "en", "fr"]), k=6)
    for code in LANGUAGES:
        assert torch.equal(found.flat(code), again.flat(code))
        assert torch.equal(found.tables[code].score, again.tables[code].score)


def test_permuting_units_permutes_the_answer():
    responses = make_responses(2, sites={"gate_pre": (3, 7)})
    order = torch.from_numpy(np.random.default_rng(0).permutation(N_UNITS))
    again = TextResponses.from_rows(
        {code: responses.rows(code)[:, order] for code in LANGUAGES}, sites={"gate_pre": (3, 7)}
    )
    assert torch.equal(average_precision_table(again), average_precision_table(responses)[:, order])
    found, moved = average_precision(responses, k=6, which="top"), average_precision(again, k=6, which="top")
    for code in LANGUAGES:
        assert set(order[moved.flat(code)].tolist()) == set(found.flat(code).tolist())


@pytest.mark.parametrize(
    ("units", "sites"),
    [
        ("linear", ("gate_pre", "q", "mlp_out")),
        ("mlp", ("gate_pre", "mlp_out")),
        ("all", ("gate_pre", "gate_act", "q", "mlp_out")),
        ("q", ("q",)),
        ("gate_act", ("gate_act",)),
    ],
)
def test_sites_are_chosen(units, sites):
    # A recording for several methods: act(gate) is no output of a linear layer.
    responses = make_responses(0, sites={"gate_pre": (2, 4), "gate_act": (2, 3), "q": (2, 2), "mlp_out": (1, 3)})
    found = average_precision(responses, k=2, which="top", units=units)
    alone = average_precision(responses.only(*sites), k=2, which="top", units="all")
    assert tuple(found.sites) == sites
    assert found.provenance == alone.provenance
    assert torch.equal(average_precision_table(responses, units), average_precision_table(responses.only(*sites)))
    for code in LANGUAGES:
        assert torch.equal(found.flat(code), alone.flat(code))
    if units == "linear":
        assert average_precision(responses, k=2, which="top").sites == found.sites


def test_blocks_of_any_size_give_the_same_and_bound_what_is_read(monkeypatch):
    responses = make_responses(0)
    found, constant = module.scan(responses, tuple(SITES))
    read = []
    blocks = TextResponses.blocks

    def watched(self, units_per_block):
        for first, block in blocks(self, units_per_block):
            read.append(block.numel())
            yield first, block

    monkeypatch.setattr(TextResponses, "blocks", watched)
    for size in (1, 29, 3 * 29, 10 * 29 + 5, 10**9):
        read.clear()
        monkeypatch.setattr(module, "_BLOCK", size)
        again, also = module.scan(responses, tuple(SITES))
        assert torch.equal(again, found)
        assert torch.equal(also, constant)
        assert max(read) <= max(size, 29)
        mlp = module.scan(responses, ("gate_pre", "mlp_out"))
        assert torch.equal(mlp[0], found[:, [*range(10), 18, 19, 20]])


def test_files_of_rows_give_the_same_and_are_let_go(tmp_path):
    responses = make_responses(0, torch.float16)
    parts = {}
    for code in LANGUAGES:
        rows, positions = responses.rows(code), responses.positions(code)
        for first in (0, 4):
            file = tmp_path / f"{code}-{first}.safetensors"
            own = slice(first, first + 4 if first == 0 else None)
            save_tensors(file, {"rows": rows[own], "positions": positions[own]}, {"kind": ROWS_KIND})
        parts[code] = tuple(mapped_rows(file) for file in sorted(tmp_path.glob(f"{code}-*")))
    mapped = TextResponses(parts, SITES)
    assert torch.equal(average_precision_table(mapped), average_precision_table(responses))
    # A slice that is no copy keeps its whole file mapped: many files at once would count as memory.
    part = mapped.parts["fr"][0].read(3, 5)
    assert part.untyped_storage().nbytes() == part.numel() * 2


def on_device(responses, put):
    rows = {code: put(responses.rows(code)) for code in responses.languages}
    return TextResponses.from_rows(rows, sites=responses.sites)


def check_same_as_on_the_cpu(here, there):
    for settings in ({"k": 6}, {"k": 4, "units": "q"}, {"k": 5, "which": "medium", "units": "mlp"}):
        found, wanted = average_precision(there, **settings), average_precision(here, **settings)
        for code in LANGUAGES:
            assert torch.equal(found.flat(code), wanted.flat(code))
            assert torch.equal(found.tables[code].score, wanted.tables[code].score)
    for units in ("all", "q"):
        found, wanted = (average_precision_threshold(own, 0.4, units=units) for own in (there, here))
        assert all(torch.equal(found.flat(code), wanted.flat(code)) for code in LANGUAGES)
        table = average_precision_table(there, units)
        assert table.device.type == "cpu"
        assert torch.equal(table, average_precision_table(here, units))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_methods_are_the_same_on_every_device(dtype, device):
    here = make_responses(0, dtype)
    check_same_as_on_the_cpu(here, on_device(here, lambda rows: rows.to(device)))


def test_the_methods_mix_no_devices(monkeypatch):
    # The ranking itself is tested above; what is around it runs where there is no second device, too.
    def ranked(values, labels, n_languages):
        found = average_precisions(values.cpu(), labels, n_languages)
        return Elsewhere(found) if isinstance(values, Elsewhere) else found

    monkeypatch.setattr(module, "average_precisions", ranked)
    here = make_responses(0)
    rows = make_rows(0)
    rows["fr"][3, 10 + 6] = torch.nan
    bad = TextResponses.from_rows(rows, sites=SITES)
    with other_device():
        check_same_as_on_the_cpu(here, on_device(here, Elsewhere))
        with pytest.raises(DataError, match="response of 'fr' at q, layer 1, is NaN"):
            average_precision(on_device(bad, Elsewhere), k=2)
        with pytest.raises(RuntimeError, match="same device"):
            here.rows("en") + Elsewhere(here.rows("en"))


def test_threshold_takes_what_passes_in_one_language():
    responses = make_responses(0)
    table = average_precision_table(responses)
    for threshold in (0.3, 0.5):
        every = average_precision_threshold(responses, threshold, exclusive=False, units="all")
        alone = average_precision_threshold(responses, threshold, units="all")
        for k, code in enumerate(LANGUAGES):
            passing = [unit for unit in range(N_UNITS) if table[k, unit] > threshold and unit != 6]
            ordered = sorted(passing, key=lambda unit: (-table[k, unit].item(), unit))
            assert every.flat(code).tolist() == ordered
            others = [j for j in range(3) if j != k]
            assert alone.flat(code).tolist() == [
                unit for unit in ordered if not any(table[j, unit] > threshold for j in others)
            ]
            assert torch.equal(alone.flat(code), every.exclusive().flat(code))
    strict = average_precision_threshold(responses, 0.99, units="all")
    assert strict.counts() == {"en": 0, "fr": 0, "sw": 1}
    assert strict.method == {
        "name": "average_precision_threshold",
        "threshold": 0.99,
        "exclusive": True,
        "units": "all",
    }


def test_the_median_of_the_responses_is_that_of_the_positive_texts():
    # Kojima's on_p50, with which the units are overridden.
    responses = make_responses(0)
    for code, n in zip(LANGUAGES, TEXTS, strict=True):
        positive = np.stack([responses.rows(code)[text].numpy() for text in range(n)])
        wanted = np.median(positive[:, :10], axis=0).reshape(2, 5)
        np.testing.assert_allclose(responses.median(code, "gate_pre"), wanted, rtol=1e-6)


def test_bad_settings_are_sentences():
    responses = make_responses(0)
    for settings, message in (
        ({"which": "best"}, "which='best' is unknown; use one of top"),
        ({"k": 0}, "k=0 must be at least 1"),
        ({"k": 5}, "k=5 must be even"),
        ({"k": 500}, "k=500 is more than the 21 units at gate_pre, q, mlp_out; use"),
        (
            {"k": 4, "units": "up"},
            "units='up' was not recorded; pass units='all', or one of 'gate_pre', 'q', 'mlp_out'.",
        ),
    ):
        with pytest.raises(SettingError, match=message):
            average_precision(responses, **settings)
    with pytest.raises(SettingError, match="units='mlp' was not recorded; pass units='q'"):
        average_precision(responses.only("q"), k=4, units="mlp")
    alone = make_responses(0, sites={"gate_act": (3, 7)})
    with pytest.raises(SettingError, match="units='linear' was not recorded; pass units='gate_act'"):
        average_precision(alone, k=4)
    assert average_precision(alone, k=4, units="gate_act").site == "gate_act"
    for threshold in (-0.1, 1.0, float("nan")):
        with pytest.raises(SettingError, match="threshold="):
            average_precision_threshold(responses, threshold, units="all")


def test_bad_responses_are_sentences():
    alone = make_responses(0, sites={"gate_act": (3, 7)}).select(["en"])
    with pytest.raises(DataError, match="at least two"):
        average_precision(alone, k=2, units="gate_act")
    for method in (average_precision_threshold, average_precision_table):
        with pytest.raises(DataError, match="at least two"):
            method(alone, units="gate_act")
    empty = make_responses(0).texts({"en": [0, 1], "fr": [2], "sw": []})
    with pytest.raises(DataError, match="'sw' has no text"):
        average_precision(empty, k=2)
    for value, what in ((torch.nan, "NaN"), (-torch.inf, "infinite")):
        rows = make_rows(0)
        rows["fr"][3, 10 + 6] = value
        bad = TextResponses.from_rows(rows, sites=SITES)
        with pytest.raises(DataError, match=f"response of 'fr' at q, layer 1, is {what}"):
            average_precision(bad, k=2)
        assert len(average_precision(bad, k=2, units="mlp"))


def test_the_registry_knows_the_methods():
    methods = list_methods()
    for name, paper in (("average_precision", "2404.02431"), ("average_precision_threshold", "2507.22581")):
        assert methods.loc[name, "needs"] == "responses"
        assert paper in cite(name)
    responses = make_responses(0)
    found = identify(responses, "average_precision", k=2)
    assert found.method == {"name": "average_precision", "k": 2, "which": "both", "units": "linear"}
    assert collect_for(["average_precision", "average_precision_threshold"]).responses == ("linear", "gate_act")
    found = identify(make_responses(0, sites={"gate_act": (3, 7)}), "average_precision_threshold", threshold=0.99)
    assert found.flat("sw").tolist() == [13]
    with pytest.raises(SettingError, match=r"k=2\.0 .* must be a whole number"):
        identify(responses, "average_precision", k=2.0)
