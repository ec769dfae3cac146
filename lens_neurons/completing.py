"""A model's own answers as a corpus: what it writes after each prompt counts, the prompt does not."""

import logging
from collections.abc import Sequence
from typing import Any, Literal

from tqdm.auto import tqdm

from lens_neurons.corpus import Corpus
from lens_neurons.errors import DataError
from lens_neurons.generation import generate
from lens_neurons.model import adapt
from lens_neurons.pairs import Pair
from lens_neurons.storage import derive_seed

_LOGGER = logging.getLogger("lens_neurons")


def complete(
    model: Any,
    prompts: Corpus,
    *,
    max_new_tokens: int = 128,
    languages: Sequence[str] | None = None,
    temperature: int | float = 0.0,
    top_k: int | None = None,
    top_p: int | float | None = None,
    repetition_penalty: int | float = 1.0,
    stop: str | Sequence[str] = (),
    seed: int = 0,
    bos: Literal["model", "always", "never"] = "model",
    chat: Literal["none", "template"] = "none",
    batch_size: int = 32,
    progress: bool = True,
    name: str | None = None,
) -> Corpus:
    """Return a corpus of pairs: every prompt with what the model writes after it, to be recorded as answers only.

    `record(model, complete(model, prompts))` counts on generated tokens alone, which is what the ternary
    classification (Zhang et al., arXiv 2505.21505) is made on. Record with the same `bos` and `chat`. Text is what is
    kept: a recording tokenises prompt and answer together, without the end-of-text token. An empty answer stays in
    the corpus and counts nothing. Interventions of a `steer` context around the call hold in it.

    Args:
        model: The model.
        prompts: Prompts by language, read whole. Of a corpus of pairs the prompts are answered anew, so that two
            models can be given the same ones. The empty prompt is BOS alone: record it with bos="always".
        max_new_tokens: Longest answer.
        languages: Languages to answer in, in this order; default: all.
        temperature: 0 takes the likeliest token at each step, otherwise tokens are drawn.
        top_k: Draw from the k likeliest tokens only.
        top_p: Draw from the fewest tokens that hold this share of the probability.
        repetition_penalty: As in `generate`.
        stop: Strings that end an answer; they are not part of it.
        seed: Seed of the draws, with the language and the prompt's number.
        bos: BOS policy of the prompts.
        chat: "template" puts each prompt into the tokenizer's chat template.
        batch_size: Prompts at a time.
        progress: Show a progress bar.
        name: The corpus's name in results; default: says which prompts and model.

    Raises:
        SettingError: A setting is not allowed, or a prompt leaves no room for max_new_tokens in the model's context.
        DataError: The corpus lacks a language, a prompt has no token, or every answer of a language is empty.
    """
    chosen = prompts if languages is None else prompts.select(languages)
    made: dict[str, list[Pair]] = {}
    with tqdm(chosen.languages, unit="language", disable=not progress) as bar:
        for code in bar:
            bar.set_description(code)
            given = [text.prompt if isinstance(text, Pair) else text for text in chosen.texts(code)]
            answers = generate(
                model,
                given,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                repetition_penalty=repetition_penalty,
                stop=stop,
                seed=derive_seed(seed, "complete", code),
                bos=bos,
                chat=chat,
                batch_size=batch_size,
            ).texts
            made[code] = [Pair(prompt, answer) for prompt, answer in zip(given, answers, strict=True)]
            if empty := sum(not answer for answer in answers):
                _LOGGER.warning("%d of %d answers in '%s' are empty", empty, len(answers), code)
            if not any(answers):
                raise DataError(
                    f"every answer in '{code}' is empty, so there is nothing to record; change the prompts or stop=."
                )
    return Corpus.from_pairs(made, name=name or f"{prompts.name}, answered by {adapt(model).name}")
