"""What recording costs: time against forward passes without recording, memory against a full cache, as a script.

    python tests/benchmarks/recording_cost.py --shape qwen --rounds 7 --out recording_cost_qwen.json

The model has random weights in the shape of Qwen2.5-0.5B, or of the packaged demo model. In one process, in
interleaved rounds, under inference mode, with the same number of threads and in float32, it times

- stock: HookedTransformer with weights as TransformerLens stores them, with logits;
- ours: the same model as `load_model` stores it, with logits and without;
- transformers: plain transformers' base model, without and with forward hooks that collect the same statistics;
- record: one batch of a recording, all statistics on.

Peak memory over the loaded model is measured in a process of its own for each way, and for a whole `record` of a
corpus and of one ten times as large. Raw times, medians, ratios and bounds are written as JSON; exit code 1 if a bound
is missed.
"""

import argparse
import contextlib
import copy
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models import SAMPLE_TEXTS, build_tokenizer

from lens_neurons.batching import Piece, Shard, make_batches
from lens_neurons.collecting import RunningSums
from lens_neurons.corpus import Corpus
from lens_neurons.model import adapt, load_model
from lens_neurons.recording import record

SHAPES = {
    "qwen": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151_936,
        "max_position_embeddings": 2048,
    },
    "demo": {
        "hidden_size": 192,
        "intermediate_size": 2560,
        "num_hidden_layers": 6,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "vocab_size": 8192,
        "max_position_embeddings": 512,
    },
}
SIZES = {"qwen": [(2, 64), (8, 128)], "demo": [(16, 128)]}
# name: what is divided by what, at most.
BOUNDS = {
    "qwen": {
        "record / stock with logits": ("record", "stock logits", 0.60),
        "record / ours without unembedding": ("record", "ours", 1.15),
        "record / transformers with hooks": ("record", "transformers hooks", 1.50),
    },
    "demo": {
        "record / stock with logits": ("record", "stock logits", 0.85),
        "record / ours without unembedding": ("record", "ours", 1.15),
    },
}
MEMORY_BOUND = 0.25
MEMORY_WAYS = ("stock logits", "ours logits", "ours", "full cache", "record", "record corpus", "record corpus x 10")


def build_hf(shape):
    config = transformers.Qwen2Config(
        **SHAPES[shape], tie_word_embeddings=True, bos_token_id=None, eos_token_id=None, pad_token_id=None
    )
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def build_ours(shape, hf):
    with tempfile.TemporaryDirectory() as folder:
        hf.config.save_pretrained(folder)
        build_tokenizer().save_pretrained(folder)
        return load_model(folder, hf_model=hf, backend="hooked", device="cpu")


def as_stock(ours):
    """Return a copy with every weight stored as TransformerLens stores it."""
    stock = copy.deepcopy(ours)
    for value in stock.parameters():
        value.data = value.data.contiguous()
    return stock


def make_batch(size, vocab):
    """Return one batch in which the last row is a little shorter, so that there is a mask to respect."""
    rows, length = size
    generator = torch.Generator().manual_seed(1)
    pieces = []
    for i in range(rows):
        n = length - (4 if i == rows - 1 else 0)
        ids = torch.randint(1, vocab, (n,), generator=generator).tolist()
        pieces.append(Piece(i, 0, tuple(ids), ()))
    (batch,) = make_batches(pieces, 0, rows * length)
    return batch, Shard("en", 0, rows - 1, tuple(pieces))


class PlainHooks:
    """Forward hooks on plain transformers that collect the same statistics, written as one would by hand."""

    def __init__(self, base, batch):
        self.weights = batch.counted.float()
        self.flat = self.weights.reshape(-1)
        self.lengths = self.weights.sum(dim=1, keepdim=True)
        layers, width = len(base.layers), base.config.intermediate_size
        self.totals = torch.zeros(4, layers, width, dtype=torch.float64)
        self.rows = [None] * layers
        self.handles = [
            layer.mlp.act_fn.register_forward_hook(lambda _m, _i, output, at=at: self.take(output, at))
            for at, layer in enumerate(base.layers)
        ]

    def take(self, output, layer):
        values = output.reshape(-1, output.shape[-1])
        text_sums = torch.einsum("bp,bpn->bn", self.weights, output)
        sums = [text_sums.sum(0), self.flat @ values.square(), self.flat @ values.clamp(min=0)]
        sums.append(self.flat @ (values > 0).float())
        self.totals[:, layer] += torch.stack(sums).double()
        self.rows[layer] = text_sums / self.lengths

    def remove(self):
        for handle in self.handles:
            handle.remove()


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
now = time.perf_counter


def clock(call):
    started = now()
    call()
    return now() - started


@contextlib.contextmanager
def recording(model, texts_kept=10**6):
    adapter = adapt(model)
    sums = RunningSums(adapter, texts_kept=texts_kept)
    adapter.probe(["gate_act"])
    with adapter.hooks(sums.pairs()):
        yield adapter, sums


def ways_of(models, batch, shard):
    """Return each way to be timed as a function that returns seconds."""
    ours, stock, base = models
    tokens, mask = batch.tokens, batch.mask
    adapter = adapt(ours)
    sums = RunningSums(adapter, texts_kept=10**6)

    def plain():
        base(input_ids=tokens, attention_mask=mask.long(), use_cache=False)

    def plain_hooks():
        hooks = PlainHooks(base, batch)
        seconds = clock(plain)
        hooks.remove()
        return seconds

    def step():
        sums.begin(batch)
        adapter.run_until_last_site(tokens, mask)

    def record_step():
        # Hooks are entered once a corpus and sums are taken once a shard, so neither is in the time of a batch.
        with adapter.hooks(sums.pairs()):
            seconds = clock(step)
        sums.take(shard)
        return seconds

    def without_unembedding():
        ours(tokens, attention_mask=mask, stop_at_layer=ours.cfg.n_layers)

    return {
        "stock logits": lambda: clock(lambda: stock(tokens, attention_mask=mask)),
        "ours logits": lambda: clock(lambda: ours(tokens, attention_mask=mask)),
        "ours": lambda: clock(without_unembedding),
        "transformers": lambda: clock(plain),
        "transformers hooks": plain_hooks,
        "record": record_step,
    }


def measure_times(shape, rounds):
    hf = build_hf(shape)
    ours = build_ours(shape, hf)
    models = (ours, as_stock(ours), hf.model)
    found = {}
    for size in SIZES[shape]:
        ways = ways_of(models, *make_batch(size, SHAPES[shape]["vocab_size"]))
        times = {name: [] for name in ways}
        with torch.inference_mode():
            for call in ways.values():
                call()
            for i in range(rounds):
                # Another order each round, so that no way always follows the same one.
                names = list(ways)
                for name in names[i % len(names) :] + names[: i % len(names)]:
                    times[name].append(ways[name]())
        medians = {name: statistics.median(values) for name, values in times.items()}
        ratios = {}
        for name, (over, under, bound) in BOUNDS[shape].items():
            ratio = medians[over] / medians[under]
            ratios[name] = {"ratio": ratio, "bound": bound, "met": ratio <= bound}
        found["x".join(map(str, size))] = {"seconds": times, "medians": medians, "bounds": ratios}
    return found


def peak_bytes():
    """Return the most resident memory since `reset_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this system does not report peak memory")


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure_memory(shape, way):
    """Return the peak over the loaded model, in this process, of one way."""
    hf = build_hf(shape)
    ours = build_ours(shape, hf)
    model = as_stock(ours) if way == "stock logits" else ours
    del hf, ours
    size = SIZES[shape][-1]
    batch, shard = make_batch(size, SHAPES[shape]["vocab_size"])
    with tempfile.TemporaryDirectory() as folder:
        with (Path(folder) / "en.txt").open("w", encoding="utf-8") as stream:
            # The smaller corpus already fills several shards, so that what is compared is growth alone.
            for i in range(4000 if way.endswith("x 10") else 400):
                stream.write(SAMPLE_TEXTS[i % len(SAMPLE_TEXTS)] + "\n")
        corpus = Corpus.from_files(folder)
        calls = {
            "stock logits": lambda: model(batch.tokens, attention_mask=batch.mask),
            "ours logits": lambda: model(batch.tokens, attention_mask=batch.mask),
            "ours": lambda: model(batch.tokens, attention_mask=batch.mask, stop_at_layer=model.cfg.n_layers),
            "full cache": lambda: model.run_with_cache(batch.tokens, attention_mask=batch.mask),
            "record": lambda: record_batch(model, batch, shard),
        }
        limits = {"batch_tokens": size[0] * size[1], "shard_tokens": size[0] * size[1], "texts_kept": 20}
        corpus_call = lambda: record(model, corpus, progress=False, **limits)  # noqa: E731
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")
        before = resident_bytes()
        with torch.inference_mode():
            calls.get(way, corpus_call)()
        return peak_bytes() - before


def record_batch(model, batch, shard):
    with recording(model) as (adapter, sums):
        sums.begin(batch)
        adapter.run_until_last_site(batch.tokens, batch.mask)
        sums.take(shard)


def memory_in_processes(shape, threads):
    found = {}
    for way in MEMORY_WAYS:
        command = [sys.executable, __file__, "--shape", shape, "--threads", str(threads), "--memory-of", way]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[way] = int(done.stdout.split()[-1])
    share = found["record"] / found["full cache"]
    growth = found["record corpus x 10"] / found["record corpus"]
    bounds = {
        "record / full cache": {"ratio": share, "bound": MEMORY_BOUND, "met": share <= MEMORY_BOUND},
        "corpus x 10 / corpus": {"ratio": growth, "bound": 1.1, "met": growth <= 1.1},
    }
    return {"peak_bytes_over_model": found, "bounds": bounds}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="demo")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="cpu: for a machine that others use too")
    parser.add_argument("--no-memory", action="store_true", help="measure times only")
    parser.add_argument("--memory-of", choices=MEMORY_WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    global now
    now = CLOCKS[arguments.clock]
    if arguments.memory_of:
        sys.stdout.write(f"{measure_memory(arguments.shape, arguments.memory_of)}\n")
        return 0
    result = {
        "shape": arguments.shape,
        "sizes": SHAPES[arguments.shape],
        "dtype": "float32",
        "threads": arguments.threads,
        "rounds": arguments.rounds,
        "clock": arguments.clock,
        "load": list(os.getloadavg()),
        "processor": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "times": measure_times(arguments.shape, arguments.rounds),
    }
    if not arguments.no_memory:
        result["memory"] = memory_in_processes(arguments.shape, arguments.threads)
    bounds = dict(result.get("memory", {}).get("bounds", {}))
    for size, part in result["times"].items():
        bounds |= {f"{size}: {name}": entry for name, entry in part["bounds"].items()}
    text = json.dumps(result, indent=1)
    if arguments.out:
        arguments.out.write_text(text + "\n")
    for size, part in result["times"].items():
        for name, seconds in part["medians"].items():
            sys.stdout.write(f"{size:>6} {name:<20} {1e3 * seconds:9.1f} ms\n")
    for name, peak in result.get("memory", {}).get("peak_bytes_over_model", {}).items():
        sys.stdout.write(f"memory {name:<20} {peak / 1e6:9.1f} MB\n")
    for name, entry in bounds.items():
        verdict = "met" if entry["met"] else "MISSED"
        sys.stdout.write(f"{name}: {entry['ratio']:.2f} (at most {entry['bound']}) {verdict}\n")
    return 0 if all(entry["met"] for entry in bounds.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
