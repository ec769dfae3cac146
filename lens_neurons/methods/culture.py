"""Culture neurons: LAPE over cultures, and what is left of them without a language's neurons (arXiv 2508.02241)."""

import functools
import operator
from collections.abc import Mapping, Sequence
from dataclasses import replace

from lens_neurons.activation_stats import ActivationStats
from lens_neurons.errors import DataError, SettingError
from lens_neurons.languages import canonical
from lens_neurons.methods.lape import lape
from lens_neurons.methods.registry import method
from lens_neurons.neurons import NeuronSet

# A culture is another group than the language of the same name: "french" is a name of the language fr.
CULTURE_PREFIX = "culture:"

_BIBTEX = """@inproceedings{namazifard2025isolating,
  title = {Isolating Culture Neurons in Multilingual Large Language Models},
  author = {Namazifard, Danial and Galke Poech, Lukas},
  booktitle = {Proceedings of the 14th International Joint Conference on Natural Language Processing and the 4th
               Conference of the Asia-Pacific Chapter of the Association for Computational Linguistics},
  year = {2025},
  eprint = {2508.02241},
  archivePrefix = {arXiv}
}"""


@method("culture", reference="Namazifard and Galke Poech 2025, arXiv 2508.02241", bibtex=_BIBTEX, needs=("counts",))
def culture(
    stats: ActivationStats,
    top_rate: float = 0.01,
    filter_rate: float = 0.95,
    activation_bar_ratio: float = 0.95,
) -> NeuronSet:
    """Return the units whose activation is most concentrated on few cultures: LAPE with cultures as the groups.

    Where every culture comes with a language of its own, most of what this finds is that language; `culture_sets`
    takes it away.

    Args:
        stats: A recording whose groups are cultures, such as `Corpus.packaged("culture")`; only counts are used.
        top_rate: Share of all units that is taken.
        filter_rate: Quantile of the activation probability that some culture must exceed.
        activation_bar_ratio: Quantile of it that a culture must exceed to be assigned the unit.

    Returns:
        Cultures to units, ordered by entropy (nats); cultures without units are kept, empty.

    Raises:
        SettingError: A rate outside (0, 1], or too small for one unit.
        DataError: Fewer than two cultures.
    """
    if len(stats.languages) < 2:
        raise DataError("culture compares cultures, so the recording needs at least two; record text on more of them.")
    found = lape(stats, top_rate, filter_rate, activation_bar_ratio)
    return replace(found, method={**found.method, "name": "culture"})


def culture_sets(
    language_neurons: NeuronSet,
    culture_neurons: NeuronSet,
    mapping: Mapping[str, str | Sequence[str]] | None = None,
    subtract: str = "own",
) -> dict[str, NeuronSet]:
    """Return four sets by name, each keyed by culture: "language", "culture", "compound" and "pure".

    With C the neurons of a culture and L those of its language, or of any of its languages (Namazifard and Galke
    Poech 2025): "language" is L, "culture" is C, "compound" is L and C, "pure" is C without L. The neurons of other
    languages stay in "pure", as in the paper.

    Args:
        language_neurons: Neurons by language, found on text of languages.
        culture_neurons: Neurons by culture, found on text about cultures, of the same model and site.
        mapping: Culture to its language or languages. Default: what a culture's label names, "culture:fr" being fr.
        subtract: "own" takes a culture's own languages away from it; "all" those of every language in the set.

    Raises:
        SettingError: Another `subtract`.
        DataError: The mapping and the culture neurons are not of the same cultures, or a language has no entry.
        ProvenanceError: The two sets are of different models, sites or shapes.
    """
    if subtract not in ("own", "all"):
        raise SettingError(f"subtract={subtract!r} is unknown; use 'own' or 'all'.")
    languages = languages_of(culture_neurons.languages, mapping)
    language = _by_culture(language_neurons, languages)
    everything = dict.fromkeys(languages, language_neurons.languages)
    taken = language if subtract == "own" else _by_culture(language_neurons, everything)
    about = {"language_method": dict(language_neurons.method), "languages": {k: list(v) for k, v in languages.items()}}
    compound, pure = culture_neurons & language, culture_neurons - taken
    return {
        "language": language,
        "culture": culture_neurons,
        "compound": replace(compound, method={**compound.method, **about, "set": "compound"}),
        "pure": replace(pure, method={**pure.method, **about, "set": "pure", "subtract": subtract}),
    }


def languages_of(
    cultures: Sequence[str], mapping: Mapping[str, str | Sequence[str]] | None = None
) -> dict[str, tuple[str, ...]]:
    """Return every culture's languages, canonical, in the order of the cultures.

    Args:
        cultures: Labels of cultures.
        mapping: Culture to its language or languages; default: what the label names.

    Raises:
        DataError: The mapping is not of the same cultures, or gives one no language.
    """
    if mapping is None:
        return {label: (canonical(label.removeprefix(CULTURE_PREFIX)),) for label in cultures}
    given = {
        canonical(label): tuple(map(canonical, (of,) if isinstance(of, str) else of)) for label, of in mapping.items()
    }
    if wrong := [label for label in cultures if not given.get(label)]:
        raise DataError(f"the mapping gives no language for {', '.join(wrong)}; name one for every culture.")
    if wrong := [label for label in given if label not in cultures]:
        raise DataError(
            f"the mapping has {', '.join(wrong)}, which is no culture here; there are {', '.join(cultures)}."
        )
    return {label: given[label] for label in cultures}


def _by_culture(neurons: NeuronSet, languages: Mapping[str, Sequence[str]]) -> NeuronSet:
    """Return the neurons of some languages together, under the label of the culture that they belong to."""
    parts = [
        functools.reduce(
            operator.or_, [replace(neurons[code], tables={label: neurons[code].tables[code]}) for code in own]
        )
        for label, own in languages.items()
    ]
    return replace(neurons, tables={label: part.tables[label] for part in parts for label in part.tables})
