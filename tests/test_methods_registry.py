"""What `identify`, `collect_for` and `list_methods` do with what they are given, whatever the method."""

import inspect
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from oracle import sentence
from saes import make_sae

import lens_neurons
from lens_neurons.activation_stats import ActivationStats
from lens_neurons.bins import Bins
from lens_neurons.errors import DataError, SettingError
from lens_neurons.methods import cite, collect_for, identify, list_methods
from lens_neurons.responses import TextResponses

# As users call them, without the checks of annotations that tests switch on.
plain_identify, plain_collect_for = inspect.unwrap(identify), inspect.unwrap(collect_for)
LANGUAGES = ("en", "fr", "sw")


def make_stats() -> ActivationStats:
    rng = np.random.default_rng(0)
    positive = {code: torch.from_numpy(rng.integers(0, 1001, size=(3, 40))) for code in LANGUAGES}
    return ActivationStats.from_counts(dict.fromkeys(LANGUAGES, 1000), positive)


def make_responses() -> TextResponses:
    rng = np.random.default_rng(0)
    rows = {code: torch.from_numpy(rng.normal(size=(5, 120))).float() for code in LANGUAGES}
    return TextResponses.from_rows(rows, sites={"gate_act": (3, 40)})


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("language_activated", {"exclusive": "no"}, "exclusive='no' .* must be True or False"),
        ("language_activated", {"exclusive": 1}, "exclusive=1 .* must be True or False"),
        ("language_activated", {"exclusive": None}, "exclusive=None .* must be True or False"),
        ("language_activated", {"site": 3}, "site=3 .* must be a string"),
        ("language_activated", {"site": ["gate_act"]}, "site, a list, .* must be a string"),
        ("average_precision", {"units": None}, "units=None .* must be a string"),
        ("average_precision_threshold", {"exclusive": "false"}, "exclusive='false'"),
        (
            "average_precision_threshold",
            {"threshold": np.array([0.1])},
            "threshold, a ndarray, .* must be a number",
        ),
    ],
)
def test_settings_are_of_their_type_in_methods_of_responses(method, settings, message):
    with pytest.raises(SettingError, match=message) as caught:
        identify(make_responses(), method, **settings)
    sentence(caught.value)


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("specialisation", {"over": 1}, "over=1 .* must be a string"),
        ("specialisation", {"measure": 2}, "measure=2 .* must be a string or None"),
        ("lape", {"preset": 1.5}, "preset=1.5 .* must be a string or None"),
        ("ternary", {"lam": True}, "lam=True .* must be a number or None"),
        ("random_matched", {"like": "lape"}, "like='lape' .* must be a neuron set"),
        ("random_matched", {"like": None}, "like=None .* must be a neuron set"),
        ("random_matched", {"like": pd.DataFrame()}, "like, a DataFrame, .* must be a neuron set"),
        ("random_matched", {"like": make_stats()}, "like, an ActivationStats, .* must be a neuron set"),
        ("random_matched", {}, "'random_matched' needs like=, a neuron set"),
        (["lape"], {}, r"method=\['lape'\] is unknown; use one of"),
        (None, {}, "method=None is unknown; use one of"),
        (lens_neurons, {}, "is unknown; use one of"),
    ],
)
def test_settings_are_of_their_type_in_methods_of_counts(method, settings, message):
    with pytest.raises(SettingError, match=message):
        plain_identify(make_stats(), method, **settings)


def test_numpy_values_are_taken_as_python_s():
    found = identify(
        make_responses(), "language_activated", texts=np.int64(2), site=np.str_("gate_act"), exclusive=np.bool_(True)
    )
    assert found.method["exclusive"] is True
    assert found.method["texts"] == 2
    assert len(found) > 0


@pytest.mark.parametrize("path", ["runs/demo", Path("runs") / "demo"])
def test_a_path_is_no_data(path):
    with pytest.raises(DataError, match=r"demo' is a path; .*Recording\.load.*ActivationStats\.load") as caught:
        plain_identify(path)
    sentence(caught.value)


def test_other_data_is_named_with_its_article():
    for data, method, message in (
        (make_responses(), "lape", "stats, an ActivationStats, and was given a TextResponses"),
        (make_stats(), "average_precision", "responses, a TextResponses, and was given an ActivationStats"),
    ):
        with pytest.raises(DataError, match=message) as caught:
            identify(data, method)
        sentence(caught.value)


def test_the_list_says_which_settings_are_required():
    required = list_methods()["required"]
    assert required["random_matched"] == "like"
    assert set(required.drop("random_matched")) == {""}


def test_collect_for_passes_on_what_its_methods_need():
    bins = Bins(n=8)
    wanted = collect_for(["plnd", "distribution", "lape"], importances="released", attention=False, bins=bins)
    assert (wanted.importances, wanted.attention, wanted.histograms) == ("released", False, bins)
    plain = collect_for(["plnd", "distribution"])
    assert (plain.importances, plain.attention, plain.histograms) == ("exact", True, Bins())
    assert collect_for(["sae_lape"], saes=make_sae()).saes is not None


@pytest.mark.parametrize(
    ("methods", "settings", "message"),
    [
        (["lape"], {"saes": [make_sae()]}, "saes=; leave it out, or add one of sae_lape"),
        (["lape"], {"importances": "released"}, "importances=; leave it out, or add one of plnd"),
        (["average_precision"], {"attention": False}, "attention=; leave it out, or add one of plnd"),
        (["plnd"], {"bins": Bins()}, "bins=; leave it out, or add one of distribution"),
        (["lape"], {"responses_dtype": "float16"}, "responses_dtype=; leave it out, or add one of average_precision"),
        (["plnd"], {"importances": "fast"}, "importances='fast' is unknown"),
        (["plnd"], {"importances": None}, "importances=None is unknown"),
        (["plnd"], {"attention": "no"}, "attention='no' must be True or False"),
        (["distribution"], {"bins": 64}, "bins, an int, must be Bins or NeuronBins"),
        ([3], {}, "method=3 is unknown"),
        (3, {}, "methods=3 is no list"),
    ],
)
def test_collect_for_refuses_what_none_of_its_methods_needs(methods, settings, message):
    with pytest.raises(SettingError, match=message) as caught:
        plain_collect_for(methods, **settings)
    sentence(caught.value)


def test_every_paper_is_written_once():
    text = "\n".join(path.read_text("utf-8") for path in Path(lens_neurons.__path__[0]).rglob("*.py"))
    keys = Counter(re.findall(r'"@\w+\{([^,]+),', text))
    assert keys["kojima2024multilingual"] == keys["rahmanisa2025unveiling"] == 1
    assert {key: n for key, n in keys.items() if n > 1} == {}
    assert cite("lss") == cite("language_activated") == cite("average_precision_threshold")
    assert cite("forcing") == cite("average_precision")
