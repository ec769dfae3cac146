"""The registry of identification methods: adding one is one file with one decorated function."""

import inspect
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ParamSpec

import pandas as pd

from lens_neurons.activation_stats import ActivationStats
from lens_neurons.bins import Bins
from lens_neurons.collect import Collect
from lens_neurons.errors import DataError, SettingError
from lens_neurons.features import FeatureStats
from lens_neurons.histograms import Histograms
from lens_neurons.neurons import NeuronSet
from lens_neurons.recorded import Recording
from lens_neurons.responses import TextResponses

P = ParamSpec("P")

RecordedData = Recording | ActivationStats | TextResponses | Histograms | FeatureStats

# What a method may need, the part of a recording that holds it, and what that is.
_NEEDS: dict[str, tuple[str, type]] = {
    "counts": ("stats", ActivationStats),
    "sums": ("stats", ActivationStats),
    "responses": ("responses", TextResponses),
    "importances": ("importances", TextResponses),
    "histograms": ("histograms", Histograms),
    "features": ("features", FeatureStats),
}


@dataclass(frozen=True)
class Method:
    """One registered method.

    Attributes:
        name: What `identify` calls it.
        function: Recorded data and settings to a neuron set.
        reference: Short reference.
        bibtex: BibTeX entry.
        needs: What must have been recorded, such as "counts"; the first says what the function is given.
        sites: Where it must have been recorded, for methods that need "responses"; see `Collect`.
    """

    name: str
    function: Callable[..., NeuronSet]
    reference: str
    bibtex: str
    needs: tuple[str, ...]
    sites: tuple[str, ...] = ()


_METHODS: dict[str, Method] = {}


def method(
    name: str,
    *,
    reference: str,
    bibtex: str = "",
    needs: tuple[str, ...] = ("counts",),
    sites: tuple[str, ...] = (),
) -> Callable[[Callable[P, NeuronSet]], Callable[P, NeuronSet]]:
    """Return a decorator that registers an identification method.

    Args:
        name: What `identify` calls it.
        reference: Short reference: authors, year, identifier.
        bibtex: BibTeX entry, for `cite`.
        needs: What must have been recorded: "counts", "sums" (an `ActivationStats` is given to the function),
            "responses" or "importances" (a `TextResponses`), "histograms" (`Histograms`), "features" (`FeatureStats`).
        sites: Where, for methods that need "responses": names of sites, or "linear" for all linear outputs.
    """
    if unknown := [need for need in needs if need not in _NEEDS]:
        raise SettingError(f"method '{name}' needs {unknown[0]!r}, which is unknown; use {', '.join(_NEEDS)}.")

    def register(function: Callable[P, NeuronSet]) -> Callable[P, NeuronSet]:
        _METHODS[name] = Method(name, function, reference, bibtex, needs, sites)
        return function

    return register


def identify(data: RecordedData, method: str = "lape", **settings: Any) -> NeuronSet:
    """Return the language-specific units that a method finds in recorded data.

    Args:
        data: What `record` returned: a whole recording, or the part of it that the method needs.
        method: One of `list_methods()`.
        **settings: The method's own settings.

    Raises:
        SettingError: An unknown method or setting, or a value that is no number where one is wanted.
        DataError: What the method needs was not recorded.
    """
    function = _of(method).function
    known = list(inspect.signature(function).parameters)[1:]
    for name in settings:
        if name not in known:
            raise SettingError(f"method '{method}' has no setting '{name}'; it has {', '.join(known)}.")
        wanted = inspect.signature(function).parameters[name].annotation
        wanted = next((kind for kind in _NUMBERS if wanted == kind | None and settings[name] is not None), wanted)
        if wanted in _NUMBERS:
            settings[name] = _number(method, name, settings[name], wanted)
    return function(_needed(data, _METHODS[method]), **settings)


def _of(name: str) -> Method:
    if name not in _METHODS:
        raise SettingError(f"method={name!r} is unknown; use one of {', '.join(sorted(_METHODS))}.")
    return _METHODS[name]


def _needed(data: Any, method: Method) -> Any:
    part, kind = _NEEDS[method.needs[0]]
    found = data.part(part, method.name) if isinstance(data, Recording) else data
    if not isinstance(found, kind):
        raise DataError(
            f"method '{method.name}' needs {part}, a {kind.__name__}, and was given {type(data).__name__}; record "
            f"with collect=collect_for(['{method.name}'])."
        )
    return found


def collect_for(methods: Sequence[str], *, responses_dtype: str = "float32", saes: Any = None) -> Collect:
    """Return what a recording must collect so that all of some methods can be run on it.

    Args:
        methods: Names of methods.
        responses_dtype: What text responses are stored in, where a method needs them.
        saes: Sparse autoencoders, for methods that need "features"; see `place_saes`.

    Raises:
        SettingError: An unknown method, or one that needs `saes` without any.
    """
    if isinstance(methods, str):
        raise SettingError(f"methods={methods!r} is one string; give a list such as ['{methods}'].")
    found = [_of(name) for name in methods]
    needs = {need for one in found for need in one.needs}
    if "features" in needs and saes is None:
        named = next(one.name for one in found if "features" in one.needs)
        raise SettingError(f"method '{named}' needs sparse autoencoders; give saes=, such as load_sae('demo').")
    sites = tuple(dict.fromkeys(site for one in found if "responses" in one.needs for site in one.sites))
    return Collect(
        responses=sites,
        responses_dtype=responses_dtype,
        importances="exact" if "importances" in needs else None,
        histograms=Bins() if "histograms" in needs else None,
        saes=saes if "features" in needs else None,
    )


_NUMBERS: dict[Any, Any] = {int: numbers.Integral, float: numbers.Real}


def _number(method: str, name: str, value: Any, wanted: Any) -> int | float:
    if isinstance(value, bool) or not isinstance(value, _NUMBERS[wanted]):
        kind = "a whole number" if wanted is int else "a number"
        raise SettingError(f"{name}={value!r} of method '{method}' must be {kind}.")
    return wanted(value)


def list_methods() -> pd.DataFrame:
    """Return a table of the methods: name, reference, what they need."""
    rows = [{"method": m.name, "reference": m.reference, "needs": ", ".join(m.needs)} for m in _METHODS.values()]
    return pd.DataFrame(rows).set_index("method").sort_index()


_TOOLS = {
    "lss": """@misc{rahmanisa2025unveiling,
  title = {Unveiling the Influence of Amplifying Language-Specific Neurons},
  author = {Rahmanisa, Inaya and others},
  year = {2025},
  eprint = {2507.22581},
  archivePrefix = {arXiv}
}""",
    "forcing": """@inproceedings{kojima2024multilingual,
  title = {On the Multilingual Ability of Decoder-based Pre-trained Language Models: Finding and Controlling
           Language-Specific Neurons},
  author = {Kojima, Takeshi and Okimura, Itsuki and Iwasawa, Yusuke and Yanaka, Hitomi and Matsuo, Yutaka},
  booktitle = {Proceedings of the 2024 Conference of the North American Chapter of the Association for Computational
               Linguistics},
  year = {2024},
  eprint = {2404.02431},
  archivePrefix = {arXiv}
}""",
}
# The matrix of perplexity changes is the LAPE paper's.
_SAME_PAPER = {"perplexity": "lape"}


def cite(*results: Any) -> str:
    """Return BibTeX entries for the methods behind some results.

    Args:
        *results: Neuron sets (their method), scores (their `task`, "lss", "forcing" or "perplexity", and the method
            of the neurons that they score), or such names.
    """
    entries: dict[str, str] = {}
    for cited in (name for result in results for name in _cited(result)):
        name = _SAME_PAPER.get(cited, cited)
        text = _METHODS[name].bibtex if name in _METHODS else _TOOLS.get(name, "")
        if text:
            entries[name] = text
    # Several scores and methods may come from one paper.
    return "\n\n".join(dict.fromkeys(entries.values()))


def _cited(result: Any) -> list[str]:
    if isinstance(result, str):
        return [result]
    own = isinstance(result, NeuronSet)
    method: Mapping[str, Any] = result.method if own else getattr(result, "settings", {}).get("method", {})
    # Random neurons are drawn like some set's: that set's method is behind them.
    chosen = str(method.get("like", method).get("name", ""))
    return [chosen] if own else [str(getattr(result, "task", "")), chosen]
