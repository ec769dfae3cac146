"""What a run is trained on: files of text, the tokenizer made from them, and windows of tokens."""

import gzip
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Int64
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from lens_neurons.errors import DataError

PAD, BOS, EOS, UNK = "<pad>", "<s>", "</s>", "<unk>"
# Marks belong to the letters before them: without \p{M} every Tamil or Thai word breaks at its vowel signs.
PIECES = r" ?[\p{L}\p{M}]+| ?\p{N}{1,3}| ?[^\s\p{L}\p{M}\p{N}]+|\n|[^\S\n]+"

Lines = tuple[npt.NDArray[np.uint16], npt.NDArray[np.int64]]
"""The tokens of many lines in one array, and where each line starts (and the last one ends)."""


@dataclass
class Source:
    """One file of one language.

    Attributes:
        name: Name of its folder.
        language: Stem of its name.
        parallel: Whether line n says the same in every language of the folder.
        sha256: Of the text, uncompressed.
        training: Lines to train on, without empty ones.
        held_out: Lines never to train on, by line number from 0.
    """

    name: str
    language: str
    parallel: bool
    sha256: str
    training: list[str] = field(default_factory=lambda: list[str]())
    held_out: dict[int, str] = field(default_factory=lambda: dict[int, str]())


def is_held_out(source: str, line: int, share: float, seed: int = 0) -> bool:
    """Return whether a line is held out: by a hash, so that it is the same in every run.

    Args:
        source: ``folder`` for parallel text, ``folder/language`` for any other.
        line: Line number from 0, empty lines counted.
        share: Expected share of held-out lines.
        seed: Another seed holds out other lines.
    """
    digest = hashlib.blake2b(f"{seed}:{source}:{line}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


def read_sources(
    text: Sequence[Path],
    parallel: Sequence[Path] = (),
    languages: Sequence[str] = (),
    *,
    held_out: float = 0.05,
    seed: int = 0,
) -> list[Source]:
    """Return all files, in the order of folders and languages, split into training and held-out lines.

    A line that is held out in one file of a language is not trained on in another one either.

    Args:
        text: Folders of ``{language}.txt[.gz]``.
        parallel: Likewise, where the same lines are held out in every language.
        languages: File stems to use; all that are found by default.
        held_out: Share of held-out lines.
        seed: Seed of the choice.

    Raises:
        DataError: A folder is missing or has no text, or a language is in none of them.
    """
    sources: list[Source] = []
    for folder in (*text, *parallel):
        if not folder.is_dir():
            raise DataError(f"There is no folder {folder}; give folders that hold {{language}}.txt or .txt.gz.")
        endings = (".txt", ".txt.gz")
        paths = {path.name.split(".txt")[0]: path for path in sorted(folder.iterdir()) if path.name.endswith(endings)}
        if not paths:
            raise DataError(f"The folder {folder} holds no file named {{language}}.txt or {{language}}.txt.gz.")
        for language in languages or sorted(paths.keys() - {"ids"}):
            if language in paths:
                sources.append(_read_source(paths[language], language, folder in parallel, held_out, seed))
    missing = sorted(set(languages) - {source.language for source in sources})
    if missing or not sources:
        wanted = ", ".join(missing) or "any language"
        raise DataError(f"No folder has text for {wanted}; name text folders, and languages as their files are named.")
    unseen: dict[str, set[str]] = {}
    for source in sources:
        unseen.setdefault(source.language, set()).update(source.held_out.values())
    for source in sources:
        source.training = [line for line in source.training if line not in unseen[source.language]]
    return sources


def _read_source(path: Path, language: str, parallel: bool, share: float, seed: int) -> Source:
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    source = Source(path.parent.name, language, parallel, hashlib.sha256(data).hexdigest())
    hashed = source.name if parallel else f"{source.name}/{language}"
    for number, line in enumerate(data.decode("utf-8").split("\n")):
        if not (line := line.strip()):
            continue
        if is_held_out(hashed, number, share, seed):
            source.held_out[number] = line
        else:
            source.training.append(line)
    return source


def train_tokenizer(texts: Mapping[str, Sequence[str]], vocabulary: int, seed: int = 0) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer that puts ``<s>`` before every text.

    So that no language is left in single bytes, each gives bytes in proportion to its size to the power 0.3; a small
    one is read up to four times.

    Args:
        texts: Lines by language.
        vocabulary: Number of tokens, the 256 bytes and four special tokens included.
        seed: Decides which lines of a large language are read.
    """
    sizes = {language: sum(len(line.encode()) for line in lines) for language, lines in texts.items()}
    unit = max(sizes.values()) ** 0.7

    def sample() -> Iterator[str]:
        for language, lines in texts.items():
            wanted = min(unit * sizes[language] ** 0.3, 4 * sizes[language])
            generator = np.random.default_rng([seed, len(lines)])
            while wanted > 0 and lines:
                for index in generator.permutation(len(lines)):
                    line = lines[int(index)]
                    wanted -= len(line.encode())
                    if wanted <= 0:
                        break
                    yield line

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=2,
        max_token_length=24,
        special_tokens=[PAD, BOS, EOS, UNK],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        clean_up_tokenization_spaces=False,
    )


def encode_lines(tokenizer: PreTrainedTokenizerFast, lines: Sequence[str]) -> Lines:
    """Return the tokens of all lines, each line ended by a newline, and where the lines start.

    Line i is ``tokens[starts[i] : starts[i + 1]]``.
    """
    rows = [np.empty(0, np.uint16)]
    for first in range(0, len(lines), 4096):
        texts = [line + "\n" for line in lines[first : first + 4096]]
        batch = tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
        rows += [np.array(encoding.ids, dtype=np.uint16) for encoding in batch]
    return np.concatenate(rows), np.cumsum([len(row) for row in rows])


class WindowSampler:
    """Draws training windows: ``<s>``, then lines of one language until the window is full.

    All lines of a language come once before any comes again, each time in a new order. What is drawn depends on the
    seed, the step and ``cursors`` alone, so a resumed run draws what the interrupted one would have drawn.

    Args:
        tokens: The lines of every language.
        bos: Token that begins every window.
        alpha: A language of n tokens is drawn in proportion to ``n ** alpha``.
        seed: Decides everything that is drawn.
    """

    def __init__(self, tokens: Mapping[str, Lines], bos: int, alpha: float, seed: int) -> None:
        self.tokens: Mapping[str, Lines] = tokens
        self.bos: int = bos
        self.seed: int = seed
        weights = np.array([float(starts[-1]) ** alpha for _, starts in tokens.values()])
        self.shares: dict[str, float] = dict(zip(tokens, (weights / weights.sum()).tolist(), strict=True))
        self.cursors: dict[str, list[int]] = {language: [0, 0] for language in tokens}
        self._orders: dict[str, tuple[int, npt.NDArray[np.int64]]] = {}

    def batch(self, step: int, windows: int, length: int) -> Int64[Tensor, "window pos"]:
        """Return windows of ``length + 1`` tokens: inputs are all but the last, targets all but the first."""
        generator = np.random.default_rng([self.seed, step])
        languages = generator.choice(list(self.shares), size=windows, p=list(self.shares.values()))
        return torch.from_numpy(np.stack([self._window(str(language), length + 1) for language in languages]))

    def _window(self, language: str, length: int) -> npt.NDArray[np.int64]:
        tokens, starts = self.tokens[language]
        window = np.empty(length, dtype=np.int64)
        window[0], filled = self.bos, 1
        while filled < length:
            line = self._next_line(language, len(starts) - 1)
            piece = tokens[starts[line] : min(starts[line + 1], starts[line] + length - filled)]
            window[filled : filled + len(piece)] = piece
            filled += len(piece)
        return window

    def _next_line(self, language: str, lines: int) -> int:
        epoch, position = self.cursors[language]
        if position == lines:
            epoch, position = epoch + 1, 0
        order = self._orders.get(language)
        if order is None or order[0] != epoch:
            number = list(self.tokens).index(language)
            order = epoch, np.random.default_rng([self.seed, 1 + number, epoch]).permutation(lines)
            self._orders[language] = order
        self.cursors[language] = [epoch, position + 1]
        return int(order[1][position])
