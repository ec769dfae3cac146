"""The registry of identification methods: adding one is one file with one decorated function."""

import inspect
import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ParamSpec

import pandas as pd

from lens_neurons.activation_stats import ActivationStats
from lens_neurons.errors import SettingError
from lens_neurons.neurons import NeuronSet

P = ParamSpec("P")


@dataclass(frozen=True)
class Method:
    """One registered method.

    Attributes:
        name: What `identify` calls it.
        function: Recorded data and settings to a neuron set.
        reference: Short reference.
        bibtex: BibTeX entry.
        needs: What must have been recorded, such as "counts".
    """

    name: str
    function: Callable[..., NeuronSet]
    reference: str
    bibtex: str
    needs: tuple[str, ...]


_METHODS: dict[str, Method] = {}


def method(
    name: str, *, reference: str, bibtex: str = "", needs: tuple[str, ...] = ("counts",)
) -> Callable[[Callable[P, NeuronSet]], Callable[P, NeuronSet]]:
    """Return a decorator that registers an identification method.

    Args:
        name: What `identify` calls it.
        reference: Short reference: authors, year, identifier.
        bibtex: BibTeX entry, for `cite`.
        needs: What must have been recorded.
    """

    def register(function: Callable[P, NeuronSet]) -> Callable[P, NeuronSet]:
        _METHODS[name] = Method(name, function, reference, bibtex, needs)
        return function

    return register


def identify(data: ActivationStats, method: str = "lape", **settings: Any) -> NeuronSet:
    """Return the language-specific units that a method finds in recorded data.

    Args:
        data: What `record` returned.
        method: One of `list_methods()`.
        **settings: The method's own settings.

    Raises:
        SettingError: An unknown method or setting, or a value that is no number where one is wanted.
    """
    if method not in _METHODS:
        raise SettingError(f"method={method!r} is unknown; use one of {', '.join(sorted(_METHODS))}.")
    function = _METHODS[method].function
    known = list(inspect.signature(function).parameters)[1:]
    for name in settings:
        if name not in known:
            raise SettingError(f"method '{method}' has no setting '{name}'; it has {', '.join(known)}.")
        wanted = inspect.signature(function).parameters[name].annotation
        if wanted in _NUMBERS:
            settings[name] = _number(method, name, settings[name], wanted)
    return function(data, **settings)


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
    return "\n\n".join(entries.values())


def _cited(result: Any) -> list[str]:
    if isinstance(result, str):
        return [result]
    own = isinstance(result, NeuronSet)
    method: Mapping[str, Any] = result.method if own else getattr(result, "settings", {}).get("method", {})
    # Random neurons are drawn like some set's: that set's method is behind them.
    chosen = str(method.get("like", method).get("name", ""))
    return [chosen] if own else [str(getattr(result, "task", "")), chosen]
