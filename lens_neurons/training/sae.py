"""Train a small top-k sparse autoencoder on one layer of a model: ``python -m lens_neurons.training.sae``.

Reads folders of ``{language}.txt[.gz]`` (the lines that training the demo model holds out are held out here too), or
the packaged sentences where no folder is given, and writes a folder that ``load_sae`` reads. The one that ships with
this package was made by it. Source: Gao et al. 2024 (arXiv 2406.04093): top-k activation, tied start, unit decoder
rows, the gradient along them left out. Their auxiliary loss for dead latents is not here: on the demo model none dies,
and on made-up data with more latents than causes it only made more of them idle.
"""

import argparse
import itertools
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from lens_neurons.adapter import Adapter
from lens_neurons.batching import TokenPolicy, encode, make_batches
from lens_neurons.corpus import IDENTIFY_SENTENCES, Corpus
from lens_neurons.errors import DataError, LensNeuronsError, SettingError
from lens_neurons.languages import DEMO_LANGUAGES
from lens_neurons.model import Model, adapt, load_model
from lens_neurons.pairs import Text
from lens_neurons.sae import PlacedSAE, place_sae, read_values
from lens_neurons.storage import derive_seed
from lens_neurons.topk_sae import TopKSAE
from lens_neurons.training.text import read_sources

logger: logging.Logger = logging.getLogger(__name__)

BATCH_TOKENS = 4096

# Centre and scale of the inputs come from so many.
FIRST_INPUTS = 32_768

# The progress bar calls a latent dead that was not active on the last so many inputs.
DEAD_AFTER = 200_000

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class SAEConfig:
    """Everything that decides what a run does.

    Attributes:
        layer: Layer to read.
        site: Where in the layer.
        latents: Number of latents.
        k: How many of them are kept for each input.
        tokens: How many tokens to train on.
        alpha: A language of n tokens is drawn in proportion to ``n ** alpha``; 0 draws all alike.
        max_tokens: A longer text is cut.
        batch: Inputs a step.
        buffer: Inputs that are shuffled together.
        passes: How often the inputs of a buffer are trained on; a pass through the model costs more than a step.
        learning_rate: Peak rate of Adam.
        warmup_share: First share of the steps, over which the rate rises.
        decay_share: Last share of the steps, over which it falls linearly to zero.
        seed: Decides everything that is drawn.
    """

    layer: int
    site: str = "mlp_out"
    latents: int = 2048
    k: int = 16
    tokens: int = 4_000_000
    alpha: float = 0.3
    max_tokens: int = 128
    batch: int = 1024
    buffer: int = 262_144
    passes: int = 8
    learning_rate: float = 2e-3
    warmup_share: float = 0.05
    decay_share: float = 0.3
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            SettingError: One is out of range.
        """
        for name in ("latents", "k", "tokens", "max_tokens", "batch", "buffer", "passes"):
            if getattr(self, name) < 1:
                raise SettingError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.k > self.latents:
            raise SettingError(f"k={self.k} is more than the {self.latents} latents; use fewer.")
        if self.batch > self.buffer:
            raise SettingError(f"batch={self.batch} is more than buffer={self.buffer}; use a larger buffer.")


class ValueStream:
    """What a model holds at one place on a corpus, shuffled, without end.

    Texts of a language come in the order of the corpus, from its start again after its end.
    """

    def __init__(self, adapter: Adapter, corpus: Corpus, place: PlacedSAE, config: SAEConfig) -> None:
        """Count the tokens of every language's first texts to know how often to draw it.

        Raises:
            DataError: The corpus has no text that gives an input.
        """
        self.config: SAEConfig = config
        self._adapter = adapter
        self._corpus = corpus
        self._place = (place,)
        self._policy = TokenPolicy(max_tokens=min(config.max_tokens, adapter.n_ctx))
        sizes = {code: self._size(code) for code in corpus.languages}
        weights = np.array([float(size) ** config.alpha if size else 0.0 for size in sizes.values()])
        if not weights.sum():
            raise DataError(f"corpus '{corpus.name}' has no text with a token that counts; give another one.")
        self.shares: dict[str, float] = dict(zip(sizes, (weights / weights.sum()).tolist(), strict=True))
        self._texts = {code: self._endless(code) for code in sizes if sizes[code]}

    def _size(self, language: str, sample: int = 200) -> int:
        texts = [text for text, _ in zip(self._corpus.texts(language), range(sample), strict=False)]
        tokens = sum(len(piece.ids) - len(piece.special) for group in self._pieces(texts) for piece in group)
        count = self._corpus.count(language)
        return tokens if count is None else round(tokens * count / max(1, len(texts)))

    def _pieces(self, texts: Sequence[Text]) -> Iterator[list[Any]]:
        return encode(self._adapter.tokens, texts, self._policy)

    def _endless(self, language: str) -> Iterator[Text]:
        while True:
            yield from self._corpus.texts(language)

    def read(self, inputs: int) -> Float[Tensor, "input d_in"]:
        """Return the next inputs, at least so many, on the model's device, language by language."""
        pieces: list[Any] = []
        for code, share in self.shares.items():
            wanted = inputs * share
            while wanted > 0:
                for piece in next(self._pieces([next(self._texts[code])])):
                    pieces.append(piece)
                    wanted -= len(piece.ids) - len(piece.special)
        batches = make_batches(pieces, self._adapter.tokens.pad_id, BATCH_TOKENS)
        return torch.cat([read_values(self._adapter, self._place, batch)[0].float() for batch in batches])

    def batches(self) -> Iterator[Float[Tensor, "input d_in"]]:
        """Yield what the steps train on, for ever: each buffer so many times, each time in another order."""
        config = self.config
        for number in itertools.count():
            values = self.read(config.buffer)
            for again in range(config.passes):
                seed = derive_seed(config.seed, "order", number, again)
                order = torch.randperm(len(values), generator=torch.Generator().manual_seed(seed)).to(values.device)
                for at in range(0, len(values) - config.batch + 1, config.batch):
                    yield values[order[at : at + config.batch]]


class SAETrainer:
    """The weights of an autoencoder in training, on inputs centred and scaled to unit mean square."""

    def __init__(self, config: SAEConfig, first: Float[Tensor, "input d_in"]) -> None:
        """Start from random unit rows, tied; centre and scale are those of the first inputs."""
        self.config: SAEConfig = config
        self.step: int = 0
        self.steps: int = max(1, config.tokens // config.batch)
        self.centre: Float[Tensor, " d_in"] = first.mean(dim=0)
        self.scale: float = float((first - self.centre).square().mean().sqrt()) or 1.0
        generator = torch.Generator().manual_seed(derive_seed(config.seed, "weights"))
        rows = torch.randn(config.latents, first.shape[1], generator=generator)
        rows = (rows / rows.norm(dim=1, keepdim=True)).to(first.device)
        self.weights: dict[str, Tensor] = {
            "w_enc": rows.clone(),
            "b_enc": torch.zeros(config.latents, device=first.device),
            "w_dec": rows,
            "b_dec": torch.zeros(first.shape[1], device=first.device),
        }
        for weight in self.weights.values():
            weight.requires_grad_()
        self._optimizer = torch.optim.Adam(self.weights.values(), lr=config.learning_rate, betas=(0.9, 0.999))
        self.idle: Int64[Tensor, " latent"] = torch.zeros(config.latents, dtype=torch.int64, device=first.device)

    @property
    def dead(self) -> int:
        """How many latents have long not been active."""
        return int((self.idle >= DEAD_AFTER).sum())

    def learning_rate_share(self) -> float:
        """Return the share of the peak learning rate that the next step uses."""
        warmup = (self.step + 1) / max(1.0, self.config.warmup_share * self.steps)
        decay = (self.steps - self.step) / max(1.0, self.config.decay_share * self.steps)
        return min(1.0, warmup, decay)

    def train_step(self, inputs: Float[Tensor, "input d_in"]) -> float:
        """Make one step.

        Returns:
            The share of the variance that is not explained, before it.
        """
        x = (inputs - self.centre) / self.scale
        before = F.linear(x - self.weights["b_dec"], self.weights["w_enc"], self.weights["b_enc"])
        values, index = before.relu().topk(self.config.k, dim=-1, sorted=False)
        # What the kept latents write: sum_j values_j * W_dec[index_j].
        written = F.embedding_bag(index, self.weights["w_dec"], per_sample_weights=values, mode="sum")
        left = x - (written + self.weights["b_dec"])
        unexplained = left.square().sum() / (x - x.mean(dim=0)).square().sum()
        for group in self._optimizer.param_groups:
            group["lr"] = self.config.learning_rate * self.learning_rate_share()
        self._optimizer.zero_grad(set_to_none=True)
        unexplained.backward()
        with torch.no_grad():
            rows = self.weights["w_dec"]
            assert rows.grad is not None
            rows.grad -= (rows.grad * rows).sum(dim=1, keepdim=True) * rows
            self._optimizer.step()
            rows /= rows.norm(dim=1, keepdim=True)
            self.idle += len(inputs)
            self.idle[index[values > 0].unique()] = 0
        self.step += 1
        return float(unexplained.detach())

    @torch.no_grad()
    def finished(self, notes: dict[str, Any]) -> TopKSAE:
        """Return the autoencoder for inputs as the model has them: centre and scale go into the biases."""
        found = {name: weight.detach().clone() for name, weight in self.weights.items()}
        return TopKSAE(
            w_enc=found["w_enc"],
            b_enc=found["b_enc"] * self.scale,
            w_dec=found["w_dec"],
            b_dec=found["b_dec"] * self.scale + self.centre,
            k=self.config.k,
            layer=self.config.layer,
            site=self.config.site,
            notes=notes,
        )


def train_sae(model: Model, corpus: Corpus, config: SAEConfig, *, progress: bool = True) -> TopKSAE:
    """Return a top-k sparse autoencoder trained on what one layer of a model holds on a corpus.

    Args:
        model: The model.
        corpus: Texts to train on.
        config: Settings.
        progress: Show a progress bar on stderr.

    Raises:
        DataError: The corpus has no text with a token that counts.
        ModelError: The model has no such hook.
        SettingError: A setting is out of range.
    """
    adapter = adapt(model)
    place = _place(adapter, config)
    stream = ValueStream(adapter, corpus, place, config)
    trainer = SAETrainer(config, stream.read(min(config.buffer, FIRST_INPUTS)))
    started, unexplained = time.monotonic(), 1.0
    with tqdm(total=trainer.steps * config.batch, unit="tok", unit_scale=True, disable=not progress) as bar:
        for values in itertools.islice(stream.batches(), trainer.steps):
            unexplained += (trainer.train_step(values) - unexplained) * max(0.02, 1 / trainer.step)
            bar.set_postfix(unexplained=f"{unexplained:.3f}", dead=trainer.dead, refresh=False)
            bar.update(config.batch)
    notes: dict[str, Any] = {
        "model": adapter.provenance(config.site).to_dict(),
        "settings": asdict(config),
        "corpus": {"name": corpus.name, "fingerprint": corpus.fingerprint_all(), "shares": _rounded(stream.shares)},
        "seconds": round(time.monotonic() - started),
        "unexplained": round(unexplained, 4),
        "versions": {name: version(name) for name in ("torch", "numpy")},
    }
    return trainer.finished(notes)


@torch.no_grad()
def evaluate_sae(
    model: Model, sae: TopKSAE, corpus: Corpus, *, texts: int | None = 500, max_tokens: int = 128
) -> dict[str, Any]:
    """Return how well an autoencoder explains what a model holds on a corpus.

    Args:
        model: The model.
        sae: The autoencoder.
        corpus: Texts that it was not trained on.
        texts: First so many of each language; None for all.
        max_tokens: A longer text is cut.

    Returns:
        `tokens`; `explained_variance`, 1 - sum |x - x'|^2 / sum |x - mean|^2 over all; `active`, latents above 0 a
        token; `dead`, latents never above 0; `by_language`, the explained variance of each language, about the common
        mean.

    Raises:
        DataError: The corpus has no token that counts.
        ModelError: The autoencoder does not fit the model.
    """
    adapter, placed = adapt(model), place_sae(sae)
    policy = TokenPolicy(max_tokens=min(max_tokens, adapter.n_ctx))
    ever = torch.zeros(sae.n_latents, dtype=torch.bool)
    # By language: inputs, squared rest, squared length, active latents; and the sum of the inputs.
    sums = torch.zeros(len(corpus.languages), 4, dtype=torch.float64)
    means = torch.zeros(len(corpus.languages), sae.d_in, dtype=torch.float64)
    for row, code in enumerate(corpus.languages):
        read = [text for text, _ in zip(corpus.texts(code), range(texts or sys.maxsize), strict=False)]
        pieces = [piece for group in encode(adapter.tokens, read, policy) for piece in group]
        for batch in make_batches(pieces, adapter.tokens.pad_id, BATCH_TOKENS):
            values = read_values(adapter, (placed,), batch)[0].float()
            latents = placed.encode(values)
            left = (values - sae.decode(latents)).double().square().sum()
            ever |= (latents > 0).any(dim=0).cpu()
            length, active = values.double().square().sum(), (latents > 0).sum().double()
            sums[row] += torch.stack([torch.full_like(left, len(values)), left, length, active]).cpu()
            means[row] += values.double().sum(dim=0).cpu()
    tokens = sums[:, 0]
    if not bool(tokens.sum()):
        raise DataError(f"corpus '{corpus.name}' has no token that counts; give another one.")
    mean = means.sum(dim=0) / tokens.sum()
    variance = sums[:, 2] - 2 * means @ mean + tokens * mean.square().sum()
    explained = 1 - sums[:, 1] / variance
    return {
        "tokens": int(tokens.sum()),
        "explained_variance": round(float(1 - sums[:, 1].sum() / variance.sum()), 4),
        "active": round(float(sums[:, 3].sum() / tokens.sum()), 2),
        "dead": int((~ever).sum()),
        "by_language": _rounded(dict(zip(corpus.languages, explained.tolist(), strict=True))),
    }


def _place(adapter: Adapter, config: SAEConfig) -> PlacedSAE:
    """Return where the autoencoder will read; nothing is encoded with it."""
    width = adapter.d_model if config.site.startswith("resid") else adapter.width(config.site)
    nothing = torch.zeros(1, width)
    blank = TopKSAE(nothing, torch.zeros(1), nothing, torch.zeros(width), k=1, layer=config.layer, site=config.site)
    place = place_sae(blank, name="in training")
    place.hook_name(adapter)
    return place


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in values.items()}


def read_corpora(
    text: Sequence[Path], parallel: Sequence[Path], languages: Sequence[str], seed: int = 0
) -> tuple[Corpus, Corpus]:
    """Return the training lines of some folders, shuffled, and the held-out ones; without folders the packaged corpus.

    What is held out is what training the demo model holds out.

    Raises:
        DataError: A folder is missing or has no text, or a language is in none of them.
    """
    if not text and not parallel:
        both, chosen = Corpus.packaged("all"), languages or DEMO_LANGUAGES
        return both.select(chosen).split(IDENTIFY_SENTENCES)
    training: dict[str, list[str]] = {}
    held_out: dict[str, list[str]] = {}
    for source in read_sources(text, parallel, languages):
        training.setdefault(source.language, []).extend(source.training)
        held_out.setdefault(source.language, []).extend(source.held_out.values())
    for texts in (training, held_out):
        for code, lines in texts.items():
            order = np.random.default_rng(derive_seed(seed, "lines", code)).permutation(len(lines))
            texts[code] = [lines[int(i)] for i in order]
    name = "+".join(folder.name for folder in (*text, *parallel))
    return Corpus.from_texts(training, name), Corpus.from_texts(held_out, f"{name}, held out")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit code: 0, or 2 where what was asked for cannot be done.
    """
    parser = argparse.ArgumentParser(
        prog="python -m lens_neurons.training.sae",
        description="Train a top-k sparse autoencoder on one layer of a model, on folders of {language}.txt[.gz], or "
        "on the packaged sentences where none is given.",
    )
    parser.add_argument("--model", default="demo", metavar="MODEL", help="a name or folder; 'demo' by default")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the finished autoencoder")
    parser.add_argument("--text", type=Path, nargs="+", default=[], metavar="FOLDER", help="text of each language")
    parser.add_argument(
        "--parallel", type=Path, nargs="+", default=[], metavar="FOLDER", help="line n says the same in every file"
    )
    parser.add_argument("--languages", nargs="+", default=[], metavar="CODE", help="all that are found by default")
    parser.add_argument("--dtype", choices=sorted(_DTYPES), default="float16", help="of the file; float16 by default")
    parser.add_argument("--threads", type=int, metavar="N")
    parser.add_argument("--layer", type=int, required=True, help="layer to read")
    parser.add_argument("--site", default=SAEConfig.site, help=f"where in the layer; {SAEConfig.site} by default")
    for name, default in asdict(SAEConfig(layer=0)).items():
        if name not in ("layer", "site"):
            option = "--" + name.replace("_", "-")
            parser.add_argument(option, type=type(default), default=default, help=f"{default} by default")
    options = vars(parser.parse_args(arguments))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    where = {name: options.pop(name) for name in ("model", "out", "text", "parallel", "languages", "dtype", "threads")}
    if where["threads"]:
        torch.set_num_threads(where["threads"])
    try:
        config = SAEConfig(**options)
        corpus, held_out = read_corpora(where["text"], where["parallel"], where["languages"], config.seed)
        model, dtype = load_model(where["model"]), _DTYPES[where["dtype"]]
        # What is measured is what is written.
        made = train_sae(model, corpus, config).to("cpu", dtype).to("cpu", torch.float32)
        figures = evaluate_sae(model, made, held_out, max_tokens=config.max_tokens)
        replace(made, notes={**made.notes, "held_out": figures}).save(where["out"], dtype)
    except LensNeuronsError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    logger.info("%s explains %s of the variance", made, figures["explained_variance"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
