"""Neuron sets and recordings on the Hugging Face hub: push with a card, load by name and commit.

What is pushed is what `save` writes, safetensors and JSON, in a repository of the type "dataset". What is loaded is
these files and nothing else: no code, no pickle, and not the card, which anybody may have written. The token is the
one that `huggingface_hub` finds by itself (`hf auth login`, or HF_TOKEN); none is taken or kept here.
"""

import contextlib
import json
import os
import re
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import pandas as pd
from huggingface_hub import DatasetCardData, HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from lens_neurons.errors import ProvenanceError, SettingError, StorageError
from lens_neurons.languages import LANGUAGES
from lens_neurons.storage import Provenance

_REPO_TYPE = "dataset"
_TAGS = ("lens_neurons", "interpretability", "multilingual", "language-specific-neurons")

# What a provenance says, in the words of a reader of the card.
_PROVENANCE = {
    "model": "Model",
    "revision": "Revision of the model",
    "weights": "Fingerprint of the weights",
    "tokenizer": "Fingerprint of the tokenizer",
    "dtype": "Data type",
    "processing": "Processing of the weights",
    "backend": "Class in TransformerLens",
    "n_layers": "Layers",
    "site": "Site",
    "policy": "Token policy",
    "corpus": "Fingerprint of the corpus",
    "seed": "Seed",
    "package_version": "Version of lens_neurons",
}

# What Markdown, the forms of it that hubs read, or HTML may take for more than text. An underscore between letters is
# none, so that most names stay readable for those who look at the file itself.
_MARKUP = re.compile(
    r"""[&<>\\`*\[\]|~!@$#]
    | (?<![^\W_]) _ | _ (?![^\W_])    # emphasis
    | : (?=//)                        # an address
    | (?<=www) \.                     # one without a scheme
    | ^ (?: [-+=]+ | \d+ [.)]) (?=\s|$) # a list, a line
    """,
    re.VERBOSE | re.IGNORECASE,
)

# typing.Self would be the word, but what checks the annotations in the tests takes it only on decorated classes.
S = TypeVar("S", bound="Shareable")


@dataclass(frozen=True, eq=False)
class CardFacts:
    """What a card says of a thing.

    Attributes:
        title: Its heading.
        summary: What it is, in a sentence or two.
        variable: What to call it in the example that loads it.
        languages: The languages or other groups.
        table: One row a language.
        provenance: Where it comes from.
        settings: Further rows for the table of where it comes from, by their headings: the method, what was recorded.
        notes: Exceptions worth reading.
        example: Lines of Python to go on with.
    """

    title: str
    summary: str
    variable: str
    languages: Sequence[str]
    table: pd.DataFrame
    provenance: Provenance
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    notes: Sequence[str] = ()
    example: Sequence[str] = ()


class Shareable(ABC):
    """Something with `save` and `load` that can be pushed to the hub.

    Attributes:
        hub_file: Name of the file that `save` writes; "" where it writes a folder.
        hub_files: Patterns of all names that it may write, in the folder that it writes to.
    """

    hub_file: ClassVar[str] = ""
    hub_files: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to a file or folder."""

    @classmethod
    @abstractmethod
    def load(cls, path: str | os.PathLike[str]) -> Any:
        """Return what `save` wrote."""

    @abstractmethod
    def card_facts(self) -> CardFacts:
        """Return what the card on the hub says of it."""

    def push_to_hub(
        self,
        repo_id: str,
        *,
        folder: str = "",
        private: bool | None = None,
        license: str = "",
        citation: str = "",
        card: bool = True,
        message: str = "",
    ) -> str:
        """Return the commit of the hub's repository that now holds this; `from_hub(repo_id, revision=...)` pins it.

        One commit is made in a repository of the type "dataset", which is created where there is none. Files of an
        earlier push of the same kind to the same folder are replaced.

        Args:
            repo_id: Name on the hub, "user/name".
            folder: Folder in the repository, so that one may hold several sets; its card is in the folder then.
            private: Whether nobody else may see it; None: the hub's default for a new repository. True refuses a
                repository that is public already.
            license: Identifier of a license, such as "cc-by-4.0", for the card.
            citation: BibTeX for the card, such as `ln.cite(neurons)`.
            card: Whether to write a card, README.md, over the one that is there.
            message: Message of the commit.

        Raises:
            SettingError: A name or folder that cannot be.
            ProvenanceError: `private=True`, and the repository is public.
            StorageError: The hub is out of reach, offline mode is on, or it refuses.
        """
        _require_folder(folder)
        what = type(self).__name__
        with tempfile.TemporaryDirectory() as made:
            self.save(Path(made) / self.hub_file)
            if card:
                text = card_text(self.card_facts(), what, repo_id, folder, license, citation)
                (Path(made) / "README.md").write_text(text, encoding="utf-8")
            api = HfApi(library_name="lens_neurons")
            with _hub(repo_id, "push to"):
                api.create_repo(repo_id, repo_type=_REPO_TYPE, private=private, exist_ok=True)
                public = private is True and not api.repo_info(repo_id, repo_type=_REPO_TYPE).private
            if public:
                raise ProvenanceError(
                    f"'{repo_id}' is public, but private=True was asked for; make it private on the hub, or use "
                    "another name."
                )
            with _hub(repo_id, "push to"):
                commit = api.upload_folder(
                    repo_id=repo_id,
                    repo_type=_REPO_TYPE,
                    folder_path=made,
                    path_in_repo=folder or None,
                    commit_message=message or f"{what} of lens_neurons",
                    # A file that is left over would be read as a part of the new ones.
                    delete_patterns=list(self.hub_files),
                )
        return str(commit.oid)

    @classmethod
    def from_hub(cls: type[S], repo_id: str, *, folder: str = "", revision: str | None = None) -> S:
        """Return what was pushed to the hub; downloaded once, and from the cache after that.

        Its provenance says where it was loaded from: `provenance.extra["hub"]` has the repository, the folder and the
        commit, with a revision and without.

        Args:
            repo_id: Name on the hub, "user/name", of a repository of the type "dataset".
            folder: Folder in the repository.
            revision: Commit, tag or branch. A commit's full hash gives the same for ever; without one it is the newest.

        Raises:
            SettingError: A name or folder that cannot be.
            StorageError: There is no such repository, revision or file; the hub is out of reach; a file is damaged.
        """
        _require_folder(folder)
        inside = f"{folder}/" if folder else ""
        with _hub(repo_id, "load from", revision):
            snapshot = snapshot_download(
                repo_id,
                repo_type=_REPO_TYPE,
                revision=revision,
                allow_patterns=[inside + pattern for pattern in cls.hub_files],
                library_name="lens_neurons",
            )
        source = Path(str(snapshot)) / folder
        if not any(any(source.glob(pattern)) for pattern in ([cls.hub_file] if cls.hub_file else cls.hub_files)):
            raise StorageError(
                f"'{repo_id}' holds no {cls.__name__}{f' in {folder!r}' if folder else ''}; look at its files on the "
                "hub for another folder or kind."
            )
        # The cache has one folder a commit, which is called by its hash whatever the revision was called.
        commit = Path(str(snapshot)).name
        return _from_hub(cls.load(source / cls.hub_file), {"repo_id": repo_id, "folder": folder, "commit": commit})


def _from_hub(thing: Any, hub: Mapping[str, str]) -> Any:
    """Return a thing whose provenance says where on the hub it was; of a recording, that of every part."""
    names = [entry.name for entry in fields(thing)]
    if "provenance" in names:
        known: Provenance = thing.provenance
        return replace(thing, provenance=known.replace(extra={**known.extra, "hub": dict(hub)}))
    parts = {name: part for name in names if (part := getattr(thing, name)) is not None}
    return replace(thing, **{name: _from_hub(part, hub) for name, part in parts.items()})


def _require_folder(folder: str) -> None:
    # It becomes a path and a pattern.
    if folder and not all(re.fullmatch(r"[\w\-+ ][\w.\-+ ]*", part) for part in folder.split("/")):
        raise SettingError(
            f"folder={folder!r} is no folder of a repository; use letters, digits, '-', '_', '.' and '/' between names."
        )


@contextlib.contextmanager
def _hub(repo_id: str, what: str, revision: str | None = None) -> Generator[None]:
    """Turn whatever the hub's client raises into one sentence."""
    known: tuple[tuple[type[Exception], str], ...] = (
        (HFValidationError, "is no name on the hub; give 'user/name'"),
        (OfflineModeIsEnabled, "needs the hub, and HF_HUB_OFFLINE is set; unset it, or use save and load"),
        (GatedRepoError, "is gated; ask for access on its page, and log in with `hf auth login`"),
        (RevisionNotFoundError, f"has no revision {revision!r}; give a commit, tag or branch of it"),
        (RepositoryNotFoundError, "does not exist or is not yours to see; check the name, or use `hf auth login`"),
        (LocalEntryNotFoundError, "is not in the cache, and the hub is out of reach; try again with a network"),
    )
    try:
        yield
    except Exception as error:
        for kind, reason in known:
            if isinstance(error, kind):
                refused = SettingError if kind is HFValidationError else StorageError
                raise refused(f"cannot {what} '{repo_id}': it {reason}.") from error
        first = next(iter(str(error).splitlines()), "").strip().rstrip(".")[:200]
        raise StorageError(
            f"cannot {what} '{repo_id}' ({type(error).__name__}: {first}); check the name, the network and your login."
        ) from error


def card_text(
    facts: CardFacts, kind: str, repo_id: str, folder: str = "", license: str = "", citation: str = ""
) -> str:
    """Return a card in the hub's form: YAML front matter, and Markdown.

    All that comes from data (labels, names, settings) is escaped: it stays text in a table.

    Args:
        facts: What to say.
        kind: Name of the class that loads it.
        repo_id: Name on the hub.
        folder: Folder in the repository.
        license: Identifier of a license.
        citation: BibTeX.
    """
    codes = [code for code in facts.languages if code in LANGUAGES]
    front = DatasetCardData(
        language=codes or None, license=license or None, tags=list(_TAGS), pretty_name=_one_line(facts.title)
    )
    place = f", folder={json.dumps(folder)}" if folder else ""
    example = [
        "import lens_neurons as ln",
        "",
        f"{facts.variable} = ln.{kind}.from_hub({json.dumps(repo_id)}{place})  # revision=... pins a commit",
        f'{facts.variable}.provenance.extra["hub"]  # the commit that this was',
        *facts.example,
    ]
    made = {"Made by": f"lens_neurons, {kind}"}
    for name, words in _PROVENANCE.items():
        value = getattr(facts.provenance, name)
        if value not in ("", 0, {}, None):
            made[words] = _plain(value)
    if extra := facts.provenance.extra:
        made["Also"] = _plain(extra)
    for name, value in facts.settings.items():
        made[name] = _plain(value)
    if not facts.provenance.known:
        made["Provenance"] = "unknown: the file that it comes from does not say which weights it was made with"
    sections = [
        f"---\n{front.to_yaml().strip()}\n---",
        f"# {_escaped(facts.title)}",
        _escaped(facts.summary),
        "## Load",
        _fenced("\n".join(example), "python"),
        "## Languages",
        _table(list(facts.table.columns), facts.table.itertuples(index=False, name=None)),
        "## How it was made",
        _table(["what", "value"], made.items()),
    ]
    if facts.notes:
        sections += ["## Notes", "\n".join(f"- {_escaped(note)}" for note in facts.notes)]
    if citation:
        sections += ["## Citation", _fenced(citation.strip(), "bibtex")]
    return "\n\n".join(sections) + "\n"


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str, sort_keys=True)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _escaped(text: str) -> str:
    """Return text that Markdown and HTML show as it is, on one line."""
    return _MARKUP.sub(_encoded, _one_line(text))


def _encoded(found: re.Match[str]) -> str:
    shown = "".join(f"&#{ord(character)};" for character in found[0])
    # What looks for addresses, mentions and formulas reads the text after its entities became characters; a comment,
    # which shows nothing, ends a text there.
    return shown + "<!-- -->" if found[0][-1] in "@$:.\\" else shown


def _table(columns: Sequence[str], rows: Any) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(_cell(value) for value in line) + " |" for line in lines)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "" if value != value else f"{value:.6g}"
    return _escaped(str(value))


def _fenced(text: str, language: str) -> str:
    # Longer than any row of backticks inside, so that nothing in the text ends the block.
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"
