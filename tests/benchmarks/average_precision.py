"""Average precision of every unit for every language: time against a scikit-learn loop, and memory, as a script.

    python tests/benchmarks/average_precision.py [--quick] [--folder /tmp] [--out average_precision.json]

Speed: one thread, 20 languages, 2,000 texts. The loop calls scikit-learn's `average_precision_score` once a unit and
language; ours is `average_precisions` on a table of several thousand units. Rounds alternate, medians are compared, and
the loop's results must be ours within 1e-6. Values are the means of many tokens (hardly a tie), the same in float16
(heavy ties), and integers (nothing but ties).

Memory: a process of its own reads a recording of Llama-2-7B's linear layers (1,359,872 units, 3,000 texts, float16,
8.2 GB in files as a recording has them) and selects units; its peak resident memory, mapped pages and all libraries
included, must stay under 2 GB. --quick takes a tenth of the units and of the texts.

Prints a table; exit code 1 if a bar is missed.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import average_precision_score

from lens_neurons.methods.average_precision import average_precision, average_precision_table
from lens_neurons.methods.ranking import average_precisions
from lens_neurons.responses import ROWS_KIND, TextResponses, mapped_rows
from lens_neurons.storage import SCHEMA, save_tensors

LANGUAGES, TEXTS = 20, 2000
SPEED_BAR = 30.0
ERROR_BAR = 1e-6
MEMORY_BAR = 2e9
PAPER_LANGUAGES = ("en", "de", "fr", "es", "zh", "ja")


def values_of(kind: str, units: int) -> torch.Tensor:
    rng = np.random.default_rng(0)
    values = rng.normal(size=(TEXTS, units)).astype(np.float32)
    if kind == "float16":
        values = (values / 20 + 1).astype(np.float16).astype(np.float32)
    elif kind == "integers":
        values = values.round()
    return torch.from_numpy(values)


def time_both(kind: str, quick: bool) -> dict[str, float]:
    units, looped, rounds = (512, 4, 3) if quick else (8192, 20, 5)
    values = values_of(kind, units)
    labels = torch.from_numpy(np.random.default_rng(1).permutation(np.arange(TEXTS) % LANGUAGES))
    binary = [(labels == k).numpy() for k in range(LANGUAGES)]
    columns = [values[:, unit].numpy().copy() for unit in range(looped)]
    average_precisions(values[:, :64], labels, LANGUAGES)
    average_precision_score(binary[0], columns[0])
    ours, theirs = [], []
    for _ in range(rounds):
        began = time.perf_counter()
        found = average_precisions(values, labels, LANGUAGES)
        ours.append((time.perf_counter() - began) / (units * LANGUAGES))
        began = time.perf_counter()
        wanted = [[average_precision_score(own, column) for column in columns] for own in binary]
        theirs.append((time.perf_counter() - began) / (looped * LANGUAGES))
    return {
        "loop_us": statistics.median(theirs) * 1e6,
        "ours_us": statistics.median(ours) * 1e6,
        "ratio": statistics.median(theirs) / statistics.median(ours),
        "least_ratio": min(theirs) / max(ours),
        "error": float(np.abs(found[:, :looped].numpy() - np.array(wanted)).max()),
    }


def paper_sites(quick: bool) -> dict[str, tuple[int, int]]:
    """Return the outputs of Llama-2-7B's linear layers, or of a tenth of its layers."""
    layers = 3 if quick else 32
    widths = {"q": 4096, "k": 4096, "v": 4096, "attn_out": 4096, "gate_pre": 11008, "up": 11008, "mlp_out": 4096}
    return {site: (layers, width) for site, width in widths.items()}


def write_rows(folder: Path, quick: bool) -> None:
    """Write 500 (or 50) texts a language in files of 100, each unit with a mean of its own for every language."""
    n_units = sum(layers * width for layers, width in paper_sites(quick).values())
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2 * n_units, generator=generator)  # each text takes it from another place: that is quicker
    for code in PAPER_LANGUAGES:
        mean = torch.randn(n_units, generator=generator) / 2
        for first in range(0, 50 if quick else 500, 100):
            n = 50 if quick else 100
            starts = torch.randint(n_units, (n,), generator=generator).tolist()
            rows = torch.stack([(mean + noise[start : start + n_units]).half() for start in starts])
            tensors = {"rows": rows, "positions": torch.arange(first, first + n)}
            header = {"schema": SCHEMA, "kind": ROWS_KIND, "language": code}
            save_tensors(folder / f"{code}-{first:04d}.safetensors", tensors, header)


def resident() -> dict[str, float]:
    """Return this process's present and peak resident memory in bytes (Linux)."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return {name: int(lines[key].split()[0]) * 1024 for name, key in (("now", "VmRSS"), ("peak", "VmHWM"))}


def select(folder: Path, quick: bool) -> dict[str, float]:
    """Return what reading the files and selecting units costs this process."""
    parts = {code: tuple(map(mapped_rows, sorted(folder.glob(f"{code}-*")))) for code in PAPER_LANGUAGES}
    responses = TextResponses(parts, paper_sites(quick))
    before = resident()["now"]
    began = time.perf_counter()
    table = average_precision_table(responses)
    scored = time.perf_counter() - began
    del table
    began = time.perf_counter()
    found = average_precision(responses, k=2000)
    return {
        "units": responses.n_units,
        "texts": sum(responses.counts().values()),
        "table_s": scored,
        "method_s": time.perf_counter() - began,
        "before": before,
        "peak": resident()["peak"],
        "taken": min(found.counts().values()),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--folder", type=Path, help="where the 8.2 GB are written for a while; default: temporary")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--select", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.select:
        sys.stdout.write(json.dumps(select(arguments.select, arguments.quick)))
        return 0

    missed: list[str] = []
    speed = {kind: time_both(kind, arguments.quick) for kind in ("distinct", "float16", "integers")}
    sys.stdout.write(f"{LANGUAGES} languages x {TEXTS} texts, one thread, microseconds per unit and language\n")
    sys.stdout.write(f"{'values':10}{'scikit-learn':>14}{'ours':>9}{'times':>9}{'at least':>10}{'largest error':>15}\n")
    for kind, row in speed.items():
        sys.stdout.write(
            f"{kind:10}{row['loop_us']:14.1f}{row['ours_us']:9.3f}{row['ratio']:9.0f}{row['least_ratio']:10.0f}"
            f"{row['error']:15.1e}\n"
        )
        if row["ratio"] < SPEED_BAR:
            missed.append(f"{kind}: {row['ratio']:.1f} times the loop's speed; the bar is {SPEED_BAR}")
        if not row["error"] <= ERROR_BAR:
            missed.append(f"{kind}: {row['error']:.1e} from scikit-learn; the bar is {ERROR_BAR}")
    sys.stdout.flush()

    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        write_rows(Path(name), arguments.quick)
        command = [sys.executable, __file__, "--select", name, *(["--quick"] if arguments.quick else [])]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        memory = json.loads(subprocess.run(command, env=environment, capture_output=True, check=True).stdout)
    sys.stdout.write(
        f"{memory['units']:,} units x {memory['texts']:,} texts: peak {memory['peak'] / 1e9:.2f} GB resident "
        f"({memory['before'] / 1e9:.2f} GB before), {memory['table_s']:.0f} s for the table, "
        f"{memory['method_s']:.0f} s with selection\n"
    )
    if memory["peak"] >= MEMORY_BAR:
        missed.append(f"peak memory {memory['peak'] / 1e9:.2f} GB; the bar is {MEMORY_BAR / 1e9:.0f} GB")
    if arguments.out:
        text = json.dumps({"quick": arguments.quick, "speed": speed, "memory": memory, "missed": missed}, indent=1)
        arguments.out.write_text(text + "\n", encoding="utf-8")
    sys.stdout.write("".join(f"MISSED {line}\n" for line in missed))
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
