"""Pushing to the hub and loading from it, with a folder that stands in for the hub."""

import html
import inspect
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import DatasetCard
from huggingface_hub.utils import filter_repo_objects, validate_repo_id
from oracle import sentence

from lens_neurons import sharing
from lens_neurons.activation_stats import ActivationStats
from lens_neurons.errors import LensNeuronsError, ProvenanceError, SettingError, StorageError
from lens_neurons.methods import identify
from lens_neurons.neurons import NeuronSet
from lens_neurons.recorded import Recording
from lens_neurons.responses import TextResponses
from lens_neurons.storage import Provenance


class Hub:
    """A hub in a folder: repositories with commits; calls must fit the signatures of the real client."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.private: dict[str, bool] = {}
        self.commits: dict[str, list[str]] = {}
        self.loaded: list[list[str]] = []

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sharing, "HfApi", self.api)
        monkeypatch.setattr(
            sharing, "snapshot_download", self.checked(huggingface_hub.snapshot_download, self.download)
        )

    def checked(self, real: Any, call: Any) -> Any:
        def run(*args: Any, **settings: Any) -> Any:
            inspect.signature(real).bind(*args, **settings)
            return call(*args, **settings)

        return run

    def api(self, **settings: Any) -> Any:
        inspect.signature(huggingface_hub.HfApi).bind(**settings)
        assert "token" not in settings
        calls = ("create_repo", "repo_info", "upload_folder")
        real = huggingface_hub.HfApi()
        return SimpleNamespace(**{name: self.checked(getattr(real, name), getattr(self, name)) for name in calls})

    def create_repo(self, repo_id: str, *, repo_type: str, private: bool | None, exist_ok: bool) -> None:
        validate_repo_id(repo_id)
        assert repo_type == "dataset"
        assert exist_ok
        self.private.setdefault(repo_id, bool(private))
        self.commits.setdefault(repo_id, [])

    def repo_info(self, repo_id: str, *, repo_type: str) -> Any:
        return SimpleNamespace(private=self.private[repo_id])

    def upload_folder(
        self,
        *,
        repo_id: str,
        repo_type: str,
        folder_path: str,
        path_in_repo: str | None,
        commit_message: str,
        delete_patterns: list[str],
    ) -> Any:
        commits = self.commits[repo_id]
        new = self.root / repo_id / f"{len(commits):040x}"
        new.mkdir(parents=True)
        if commits:
            shutil.copytree(self.root / repo_id / commits[-1], new, dirs_exist_ok=True)
        target = new / (path_in_repo or "")
        there = [str(p.relative_to(target)) for p in target.rglob("*") if p.is_file()] if target.exists() else []
        for name in filter_repo_objects(there, allow_patterns=delete_patterns):
            (target / name).unlink()
        shutil.copytree(folder_path, target, dirs_exist_ok=True)
        commits.append(new.name)
        return SimpleNamespace(oid=new.name, message=commit_message)

    def download(
        self, repo_id: str, *, repo_type: str, revision: str | None, allow_patterns: list[str], library_name: str
    ) -> str:
        found = self.root / repo_id / (revision or self.commits[repo_id][-1])
        # As the real one: a folder that is called by the commit, whatever was asked for.
        made = self.root / f"cache-{len(self.loaded)}" / "snapshots" / found.name
        made.mkdir(parents=True)
        every = [str(p.relative_to(found)) for p in found.rglob("*") if p.is_file()]
        chosen = list(filter_repo_objects(every, allow_patterns=allow_patterns))
        for name in chosen:
            (made / name).parent.mkdir(parents=True, exist_ok=True)
            # The real one links into a store of blobs.
            (made / name).symlink_to(found / name)
        self.loaded.append(sorted(chosen))
        return str(made)

    def source(self, repo_id: str, folder: str = "") -> dict[str, str]:
        return {"repo_id": repo_id, "folder": folder, "commit": self.commits[repo_id][-1]}

    def files(self, repo_id: str) -> list[str]:
        newest = self.root / repo_id / self.commits[repo_id][-1]
        return sorted(str(p.relative_to(newest)) for p in newest.rglob("*") if p.is_file())

    def text(self, repo_id: str, name: str = "README.md") -> str:
        return (self.root / repo_id / self.commits[repo_id][-1] / name).read_text("utf-8")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub(tmp_path / "hub")
    made.install(monkeypatch)
    return made


def some_neurons(**settings: Any) -> NeuronSet:
    masks = {code: torch.rand(3, 20, generator=torch.Generator().manual_seed(i)) < 0.2 for i, code in enumerate("abc")}
    masks = dict(zip(("sw", "qu", "C/C++"), masks.values(), strict=True))
    masks["qu"] &= False
    known = Provenance(model="org/model", weights="ab12", n_layers=3, d_mlp=20, policy={"bos": "never"}, corpus="cc")
    return NeuronSet.from_masks(
        masks, **{"provenance": known, "method": {"name": "lape", "top_rate": 0.01}, "notes": ("a note",)} | settings
    )


def make_stats() -> ActivationStats:
    generator = torch.Generator().manual_seed(5)
    positive = {code: torch.randint(0, 50, (3, 20), generator=generator) for code in ("en", "sw", "C/C++")}
    known = Provenance(model="org/model", weights="ab12", n_layers=3, d_mlp=20)
    return ActivationStats.from_counts(dict.fromkeys(positive, 50), positive, provenance=known)


def some_recording() -> Recording:
    stats = make_stats()
    generator = torch.Generator().manual_seed(0)
    rows = {code: torch.rand(4, 10, generator=generator) for code in stats.languages}
    responses = TextResponses.from_rows(rows, sites={"gate_pre": (2, 5)}, statistic="mean", provenance=stats.provenance)
    return Recording(stats=stats, responses=responses)


def test_neurons_come_back(hub: Hub):
    neurons = some_neurons()
    commit = neurons.push_to_hub("me/neurons")
    assert commit == hub.commits["me/neurons"][-1]
    assert hub.files("me/neurons") == ["README.md", "neurons.safetensors"]
    again = NeuronSet.from_hub("me/neurons")
    assert again.to_frame().equals(neurons.to_frame())
    assert (again.languages, again.provenance, again.method, again.notes) == (
        neurons.languages,
        neurons.provenance.replace(extra={"hub": hub.source("me/neurons")}),
        neurons.method,
        neurons.notes,
    )
    # The card is not even downloaded.
    assert hub.loaded == [["neurons.safetensors"]]


def test_a_revision_stays_what_it_was(hub: Hub):
    first = some_neurons()
    commit = first.push_to_hub("me/n")
    first["sw"].push_to_hub("me/n")
    assert NeuronSet.from_hub("me/n").languages == ("sw",)
    assert NeuronSet.from_hub("me/n", revision=commit).languages == first.languages


def test_several_sets_in_one_repository(hub: Hub):
    neurons = some_neurons()
    neurons.push_to_hub("me/n")
    neurons["qu"].push_to_hub("me/n", folder="quechua/v1")
    assert hub.files("me/n") == [
        "README.md",
        "neurons.safetensors",
        "quechua/v1/README.md",
        "quechua/v1/neurons.safetensors",
    ]
    assert NeuronSet.from_hub("me/n", folder="quechua/v1").languages == ("qu",)
    assert NeuronSet.from_hub("me/n").languages == neurons.languages
    assert 'from_hub("me/n", folder="quechua/v1")' in hub.text("me/n", "quechua/v1/README.md")


def test_recordings_come_back(hub: Hub):
    recording = some_recording()
    recording.push_to_hub("me/recording")
    again = Recording.from_hub("me/recording")
    assert set(again.parts) == {"stats", "responses"}
    for code in recording.languages:
        assert torch.equal(again.responses.rows(code), recording.responses.rows(code))
    assert torch.equal(again.stats.positive, recording.stats.positive)
    # Whoever needs the statistics alone loads these alone.
    stats = ActivationStats.from_hub("me/recording")
    assert torch.equal(stats.positive, recording.stats.positive)
    assert hub.loaded[-1] == ["stats.safetensors"]
    # What was pushed before does not become a part of what is pushed after.
    recording.stats.push_to_hub("me/other", folder="keep")
    some_neurons().push_to_hub("me/other")
    recording.push_to_hub("me/other")
    Recording(stats=recording.stats.select(recording.languages[:1])).push_to_hub("me/other")
    assert hub.files("me/other") == [
        "README.md",
        "keep/README.md",
        "keep/stats.safetensors",
        "neurons.safetensors",
        "stats.safetensors",
    ]
    assert set(Recording.from_hub("me/other").parts) == {"stats"}


def test_statistics_come_back(hub: Hub):
    stats = make_stats()
    stats.push_to_hub("me/stats", message="first")
    again = ActivationStats.from_hub("me/stats")
    assert torch.equal(again.positive, stats.positive)
    assert again.provenance == stats.provenance.replace(extra={"hub": hub.source("me/stats")})


def test_what_was_loaded_says_from_which_commit(hub: Hub, tmp_path: Path):
    stats = make_stats()
    known = stats.provenance.replace(extra={"recording": {"texts_kept": 3}})
    replace(stats, provenance=known).push_to_hub("me/r", folder="a")
    first = hub.source("me/r", "a")
    replace(stats, provenance=known).push_to_hub("me/r", folder="a")
    again, newest = ActivationStats.from_hub("me/r", folder="a"), hub.source("me/r", "a")
    assert newest != first
    assert again.provenance.extra == {**known.extra, "hub": newest}
    old = ActivationStats.from_hub("me/r", folder="a", revision=first["commit"])
    assert old.provenance.extra["hub"] == first
    # It goes with what is made of it, in files too, and is no difference.
    neurons = identify(again, method="lape", top_rate=0.2)
    neurons.save(tmp_path / "n.safetensors")
    assert NeuronSet.load(tmp_path / "n.safetensors").provenance.extra["hub"] == newest
    assert len(neurons & identify(old, method="lape", top_rate=0.2)) == len(neurons)
    assert again.select(["en"]).merge(old.select(["sw"])).languages == ("en", "sw")
    # What is pushed again and loaded from there was loaded from there.
    again.push_to_hub("me/copy")
    assert ActivationStats.from_hub("me/copy").provenance.extra["hub"] == hub.source("me/copy")
    recording = some_recording()
    recording.push_to_hub("me/recording")
    parts = Recording.from_hub("me/recording").parts
    assert {name: part.provenance.extra["hub"] for name, part in parts.items()} == dict.fromkeys(
        ("stats", "responses"), hub.source("me/recording")
    )


def test_private_is_never_public(hub: Hub):
    some_neurons().push_to_hub("me/mine", private=True)
    assert hub.private["me/mine"]
    some_neurons().push_to_hub("me/mine")
    assert hub.private["me/mine"]
    some_neurons().push_to_hub("me/open")
    with pytest.raises(ProvenanceError, match="'me/open' is public") as caught:
        some_neurons().push_to_hub("me/open", private=True)
    sentence(caught.value)
    assert len(hub.commits["me/open"]) == 1


def test_the_card(hub: Hub):
    citation = "@misc{x,\n title = {```Ticks```}}"
    some_neurons().push_to_hub("me/n", license="cc-by-4.0", citation=citation)
    card = DatasetCard(hub.text("me/n"))
    front = card.data.to_dict()
    # Only codes of languages: the hub refuses a front matter with others.
    assert front["language"] == ["sw", "qu"]
    assert front["license"] == "cc-by-4.0"
    assert "lens_neurons" in front["tags"]
    text = card.text
    assert 'neurons = ln.NeuronSet.from_hub("me/n")' in text
    assert 'neurons.provenance.extra["hub"]' in text
    assert "org/model" in text
    assert "ab12" in text
    assert "never" in text
    assert "top_rate" in text
    assert "- a note" in text
    counts = some_neurons().counts()
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    for code, n in counts.items():
        assert any(row.startswith(f"| {code} | {n} |") for row in rows)
    assert f"````bibtex\n{citation}\n````" in text
    # The example is Python.
    block = text.split("```python\n")[1].split("```")[0]
    compile(block, "card", "exec")


def test_the_card_may_be_left_alone(hub: Hub):
    neurons = some_neurons()
    neurons.push_to_hub("me/n", card=False)
    assert hub.files("me/n") == ["neurons.safetensors"]


def test_data_do_not_become_markup(hub: Hub):
    evil = "x | <script>alert(1)</script>\n\n# Heading [a](javascript:b) `c` ---\ntags: [evil]"
    masks = {evil: torch.ones(1, 2, dtype=torch.bool)}
    neurons = NeuronSet.from_masks(
        masks,
        provenance=Provenance(model=evil, weights="w", n_layers=1, d_mlp=2, extra={evil: evil}),
        method={"name": evil, evil: [evil]},
        notes=(evil,),
    )
    neurons.push_to_hub("me/n")
    text = hub.text("me/n")
    front = DatasetCard(text).data.to_dict()
    assert "evil" not in front["tags"]
    body = text.split("\n---\n", 1)[1]
    assert "<script" not in body
    assert "](javascript" not in body
    assert "`c`" not in body
    headings = [line for line in body.splitlines() if line.startswith("#")]
    assert [line.split()[1] for line in headings] == ["Language-specific", "Load", "Languages", "How", "Notes"]
    columns = {line.count("|") for line in body.splitlines() if line.startswith("| ")}
    assert columns == {3, 8}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://evil.example", "https&#58;<!-- -->//evil.example"),
        ("see WWW.evil.example", "see WWW&#46;<!-- -->evil.example"),
        ("a@evil.example", "a&#64;<!-- -->evil.example"),
        ("@user", "&#64;<!-- -->user"),
        ("org/model#1", "org/model&#35;1"),
        ("_em_ __strong__", "&#95;em&#95; &#95;&#95;strong&#95;&#95;"),
        ("snake_case_name", "snake_case_name"),
        ("$$x$$", "&#36;<!-- -->&#36;<!-- -->x&#36;<!-- -->&#36;<!-- -->"),
        ("\\(x\\)", "&#92;<!-- -->(x&#92;<!-- -->)"),
        ("- item", "&#45; item"),
        ("1. item", "&#49;&#46;<!-- --> item"),
        ("-1.5 to 3: a-b", "-1.5 to 3: a-b"),
        ("a & b &amp; <b>", "a &#38; b &#38;amp; &#60;b&#62;"),
    ],
)
def test_text_stays_text(hub: Hub, text: str, shown: str):
    neurons = some_neurons(method={"name": "lape", "words": text}, notes=(text,))
    neurons.push_to_hub("me/n")
    card = hub.text("me/n")
    assert f"| Setting: words | {shown} |\n" in card
    assert f"\n- {shown}\n" in card
    # A reader sees what was written.
    assert html.unescape(shown.replace("<!-- -->", "")) == text


def test_unknown_provenance_is_said(hub: Hub):
    NeuronSet.from_masks({"en": torch.ones(1, 2, dtype=torch.bool)}).push_to_hub("me/n")
    assert "unknown: the file" in hub.text("me/n")
    assert "an unknown model" in hub.text("me/n")


@pytest.mark.parametrize("folder", ["..", "a/../b", "/a", "a//b", "a/", ".git", "*", "a?", "[a]", "a\\b", "a\nb"])
def test_folders_stay_inside(hub: Hub, folder: str):
    for call in (
        lambda: some_neurons().push_to_hub("me/n", folder=folder),
        lambda: NeuronSet.from_hub("me/n", folder=folder),
    ):
        with pytest.raises(SettingError, match="no folder of a repository") as caught:
            call()
        sentence(caught.value)
    assert hub.commits == {}


def test_what_is_not_there(hub: Hub):
    some_neurons().push_to_hub("me/n")
    cases = [
        ("holds no ActivationStats;", lambda: ActivationStats.from_hub("me/n")),
        ("holds no Recording;", lambda: Recording.from_hub("me/n")),
        ("holds no NeuronSet in 'x';", lambda: NeuronSet.from_hub("me/n", folder="x")),
    ]
    for text, call in cases:
        with pytest.raises(StorageError, match=text) as caught:
            call()
        sentence(caught.value)


def test_a_file_that_was_changed_on_the_hub(hub: Hub):
    commit = some_neurons().push_to_hub("me/n")
    path = hub.root / "me/n" / commit / "neurons.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(StorageError, match="checksum"):
        NeuronSet.from_hub("me/n")
    torch.save({"a": print}, path)  # a pickle is not even opened
    with pytest.raises(StorageError, match="not written by lens_neurons"):
        NeuronSet.from_hub("me/n")


# The real client, which the tests keep offline.


def test_offline_says_so():
    for call in (lambda: some_neurons().push_to_hub("me/n"), lambda: NeuronSet.from_hub("me/not-in-any-cache")):
        with pytest.raises(StorageError, match=r"HF_HUB_OFFLINE|not in the cache") as caught:
            call()
        sentence(caught.value)
    with pytest.raises(SettingError, match="give 'user/name'") as caught:
        NeuronSet.from_hub("a/b/c")
    sentence(caught.value)


def test_the_cache_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    commit = "0123456789" * 4
    repository = tmp_path / "datasets--me--n"
    some_neurons().save(repository / "snapshots" / commit / "neurons.safetensors")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    found = NeuronSet.from_hub("me/n")
    assert found.to_frame().equals(some_neurons().to_frame())
    assert found.provenance.extra["hub"] == {"repo_id": "me/n", "folder": "", "commit": commit}
    assert NeuronSet.from_hub("me/n", revision=commit).languages == some_neurons().languages


@pytest.mark.parametrize(
    ("raised", "kind", "text"),
    [
        ("RepositoryNotFoundError", StorageError, "does not exist or is not yours"),
        ("GatedRepoError", StorageError, "is gated"),
        ("RevisionNotFoundError", StorageError, "has no revision 'v1'"),
        ("HfHubHTTPError", StorageError, "HfHubHTTPError: first line"),
        ("ConnectionError", StorageError, "ConnectionError: first line"),
        ("HFValidationError", SettingError, "give 'user/name'"),
    ],
)
def test_refusals_of_the_hub_are_sentences(
    monkeypatch: pytest.MonkeyPatch, raised: str, kind: type[LensNeuronsError], text: str
):
    error = getattr(huggingface_hub.errors, raised, ConnectionError)

    def refuse(*args: Any, **settings: Any) -> None:
        made = error.__new__(error)
        Exception.__init__(made, "first line.\n\nmore <lines> " + "x" * 500)
        raise made

    monkeypatch.setattr(sharing, "snapshot_download", refuse)
    monkeypatch.setattr(sharing, "HfApi", lambda **settings: SimpleNamespace(create_repo=refuse))
    with pytest.raises(kind, match=text) as caught:
        NeuronSet.from_hub("me/n", revision="v1")
    sentence(caught.value)
    with pytest.raises(kind) as caught:
        some_neurons().push_to_hub("me/n")
    sentence(caught.value)


def test_no_header_of_ours_names_a_token(hub: Hub):
    some_neurons().push_to_hub("me/n")
    assert "hf_" not in json.dumps(hub.text("me/n"))
