"""Facts in several languages: prompts whose continuation names an object, as Language Steering Shift needs them."""

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from lens_neurons.corpus import PACKAGED, load_rows
from lens_neurons.errors import DataError, SettingError
from lens_neurons.languages import canonical, separator
from lens_neurons.storage import load_json, sha256_of

MidTemplate = Literal["skip", "truncate", "published"]
SUBJECT, OBJECT = "[X]", "[Y]"


@dataclass(frozen=True)
class Fact:
    """One fact: a template with the object's slot, and the object, in each language.

    Attributes:
        id: Its number; the parity of ids splits choosing from reporting.
        relation: What kind of fact it is.
        templates: Language to prompt with the subject filled in and `[Y]` for the object.
        objects: Language to object.
    """

    id: int
    relation: str
    templates: Mapping[str, str]
    objects: Mapping[str, str]


@dataclass(frozen=True)
class FactPrompt:
    """One fact asked in a base language, with the two continuations that LSS compares.

    Attributes:
        id: The fact's id.
        prompt: Text before the object, without the separator.
        joiner: What stands between prompt and object in the base language: a space or nothing.
        base_answer: The object in the base language.
        target_answer: The object in the target language.
    """

    id: int
    prompt: str
    joiner: str
    base_answer: str
    target_answer: str


@dataclass(frozen=True)
class FactPrompts:
    """The prompts of one base and target language, and what was left out.

    Attributes:
        prompts: What can be asked.
        skipped: Facts whose slot is not last, under mid_template="skip".
        missing: Facts without prompt or object in one of the two languages.
    """

    prompts: tuple[FactPrompt, ...]
    skipped: int
    missing: int


@dataclass(frozen=True)
class Facts:
    """A set of facts.

    Attributes:
        items: The facts.
        name: What the set is called in results.
    """

    items: tuple[Fact, ...]
    name: str = "facts"

    def __len__(self) -> int:
        """Return the number of facts."""
        return len(self.items)

    @property
    def languages(self) -> tuple[str, ...]:
        """Languages in which at least one fact has both prompt and object, in order of first appearance."""
        return tuple(dict.fromkeys(code for fact in self.items for code in fact.templates if code in fact.objects))

    def fingerprint(self) -> str:
        """Return a hash of all facts."""
        rows = [[f.id, f.relation, sorted(f.templates.items()), sorted(f.objects.items())] for f in self.items]
        return sha256_of(json.dumps(rows))

    def select(self, ids: Iterable[int]) -> "Facts":
        """Return the facts with the given ids."""
        wanted = set(ids)
        return replace(self, items=tuple(fact for fact in self.items if fact.id in wanted))

    def odd(self) -> "Facts":
        """Return the facts with odd ids: those that settings are chosen on."""
        return replace(self, items=tuple(fact for fact in self.items if fact.id % 2 == 1))

    def even(self) -> "Facts":
        """Return the facts with even ids: those that results are reported on."""
        return replace(self, items=tuple(fact for fact in self.items if fact.id % 2 == 0))

    def prompts(self, base: str, target: str, mid_template: str = "skip") -> FactPrompts:
        """Return what LSS asks in `base` for a shift to `target`.

        Args:
            base: Language of the prompt.
            target: Language of the other answer.
            mid_template: What happens to a template whose slot is not last: "skip" it (counted), "truncate" it to
                what stands before the slot (skipped where that is nothing), or do as "published": delete the slot
                and append the answer.

        Raises:
            SettingError: Another value of `mid_template`.
            DataError: The facts do not have one of the languages.
        """
        if mid_template not in ("skip", "truncate", "published"):
            raise SettingError(f"mid_template={mid_template!r} is unknown; use 'skip', 'truncate' or 'published'.")
        base, target = canonical(base), canonical(target)
        for code in (base, target):
            if code not in self.languages:
                raise DataError(f"facts '{self.name}' have no '{code}'; they have {', '.join(self.languages)}.")
        found: list[FactPrompt] = []
        skipped = missing = 0
        for fact in self.items:
            if base not in fact.templates or base not in fact.objects or target not in fact.objects:
                missing += 1
                continue
            before, _, after = fact.templates[base].partition(OBJECT)
            # Punctuation after the slot is not part of what is asked.
            in_the_middle = any(character.isalnum() for character in after)
            if in_the_middle and mid_template == "skip":
                skipped += 1
                continue
            # Where words are not spaced, a template's space before the slot is an artefact of its data set.
            joiner = " " if before.endswith(" ") and separator(base) else ""
            prompt = before.rstrip()
            if mid_template == "published":
                prompt = fact.templates[base].replace(" " + OBJECT, "").replace(OBJECT, "")
            elif not prompt:
                skipped += 1
                continue
            found.append(FactPrompt(fact.id, prompt, joiner, fact.objects[base], fact.objects[target]))
        return FactPrompts(tuple(found), skipped, missing)

    @classmethod
    def packaged(cls) -> "Facts":
        """Return the facts that ship with the package, in 18 languages, the object last in every template."""
        folder = PACKAGED / "facts"
        templates: dict[str, dict[str, str]] = load_json(folder / "templates.json")
        lines = (folder / "facts.jsonl").read_text(encoding="utf-8").splitlines()
        return cls.from_records([json.loads(line) for line in lines], templates, name="packaged")

    @classmethod
    def from_records(
        cls,
        records: Iterable[Mapping[str, Any]],
        templates: Mapping[str, Mapping[str, str]],
        name: str = "facts",
    ) -> "Facts":
        """Return facts from records and the templates of their relations.

        Args:
            records: Mappings with `id`, `relation`, `subject` and `object` (language to string).
            templates: Relation to language to template with `[X]` and `[Y]`.
            name: Their name in results.

        Raises:
            DataError: A relation without templates, or a template without its slots.
        """
        items: list[Fact] = []
        for record in records:
            relation = str(record["relation"])
            if relation not in templates:
                raise DataError(f"fact {record['id']} is of relation '{relation}', which has no templates.")
            filled: dict[str, str] = {}
            for label, template in templates[relation].items():
                if SUBJECT not in template or OBJECT not in template:
                    raise DataError(f"template {template!r} ({relation}, {label}) needs both {SUBJECT} and {OBJECT}.")
                if label in record["subject"]:
                    filled[canonical(label)] = template.replace(SUBJECT, record["subject"][label])
            objects = {canonical(label): str(value) for label, value in record["object"].items()}
            items.append(Fact(int(record["id"]), relation, filled, objects))
        return cls(tuple(items), name)

    @classmethod
    def from_dataset(
        cls,
        path: str,
        *,
        languages: Sequence[str],
        data_files: str | Mapping[str, str] | None = None,
        config: str | None = None,
        split: str = "train",
        revision: str | None = None,
        limit: int | None = None,
    ) -> "Facts":
        """Return facts from an mLAMA-style or a `<mask>`-style dataset, from the hub or from local files.

        Known rows: `template`, `sub_{language}`, `obj_{language}`, `predicate_id` (one configuration a language,
        as the LSS study's mLAMA sets), and `id`, `prompt` with `<mask>`, `answer` (one file a language, BMLAMA).

        Args:
            path: Dataset id on the hub, or "json" or "parquet" for local files.
            languages: Languages to read.
            data_files: Local files: a pattern with `{code}`, or language to file.
            config: Configuration name on the hub, with `{code}`; default: the language's code.
            split: Split name.
            revision: Revision on the hub.
            limit: First n rows of every language.

        Raises:
            DataError: Rows in another form, or no fact at all.
        """
        templates: dict[int, dict[str, str]] = {}
        objects: dict[int, dict[str, str]] = {}
        relations: dict[int, str] = {}
        for label in languages:
            chosen = {
                "path": path,
                "name": None if data_files is not None else (config or "{code}").format(code=label),
                "split": split,
                "revision": revision,
                "data_files": _file_of(data_files, label),
            }
            code = canonical(label)
            for number, row in enumerate(itertools.islice(load_rows(chosen), limit)):
                key, relation, template, answers = _read_row(row, number, label, path)
                templates.setdefault(key, {})[code] = template
                known = relations.setdefault(key, relation)
                if known != relation:
                    raise DataError(
                        f"fact {key} of {path} is of relation {known!r} in one language and {relation!r} in '{label}': "
                        "the files do not line up; give rows an id, or the same rows in the same order."
                    )
                for other, answer in answers.items():
                    objects.setdefault(key, {}).setdefault(canonical(other), answer)
        if not templates:
            raise DataError(f"{path} gave no fact for {', '.join(languages)}; check the files and the languages.")
        items = tuple(Fact(key, relations[key], templates[key], objects[key]) for key in sorted(templates))
        return cls(items, path)


def _file_of(data_files: str | Mapping[str, str] | None, label: str) -> str | None:
    if isinstance(data_files, str):
        return data_files.format(code=label)
    return (data_files or {}).get(label)


def _read_row(row: Mapping[str, Any], number: int, label: str, path: str) -> tuple[int, str, str, dict[str, str]]:
    """Return id, relation, template with `[Y]`, and answers by language, of a row in either known form."""
    if "template" in row and f"sub_{label}" in row:
        template = str(row["template"]).replace(SUBJECT, str(row[f"sub_{label}"]))
        answers = {name.removeprefix("obj_"): str(row[name]) for name in row if name.startswith("obj_") and row[name]}
        return int(row.get("id", number)), str(row.get("predicate_id", "")), template, answers
    if "prompt" in row and "answer" in row and "<mask>" in str(row["prompt"]):
        template = str(row["prompt"]).replace("<mask>", OBJECT)
        return int(row.get("id", number)), str(row.get("predicate_id", "")), template, {label: str(row["answer"])}
    raise DataError(
        f"{path} has rows with {', '.join(map(str, row))}; expected template, sub_{label}, obj_{label} (mLAMA) or "
        "prompt with <mask> and answer (BMLAMA)."
    )
