"""The command line of training."""

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from lens_neurons.errors import LensNeuronsError
from lens_neurons.training.run import export, train
from lens_neurons.training.trainer import TrainingConfig


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit code: 0, or 2 where what was asked for cannot be done.
    """
    parser = argparse.ArgumentParser(
        prog="python -m lens_neurons.training",
        description="Train a tokenizer and a small Llama model on folders of {language}.txt[.gz]; run the same command "
        "again to continue an interrupted run.",
    )
    parser.add_argument("--text", type=Path, nargs="+", default=[], metavar="FOLDER", help="text of each language")
    parser.add_argument(
        "--parallel", type=Path, nargs="+", default=[], metavar="FOLDER", help="line n says the same in every file"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the finished model")
    parser.add_argument("--export", type=Path, metavar="CHECKPOINT", help="only write the model of a checkpoint to OUT")
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="state of the run; OUT/checkpoint by default")
    parser.add_argument("--languages", nargs="+", default=[], metavar="CODE", help="all that are found by default")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="use this tokenizer instead of training one")
    parser.add_argument("--stop-at", type=int, metavar="TOKENS", help="stop there with a checkpoint, unfinished")
    parser.add_argument("--threads", type=int, metavar="N")
    parser.add_argument("--device", default="auto", help="a GPU where there is one by default")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="for machines without a compiler")
    for name, default in asdict(TrainingConfig(text=(), out=Path())).items():
        if isinstance(default, int | float) and not isinstance(default, bool):
            option = "--" + name.replace("_", "-")
            parser.add_argument(option, type=type(default), default=default, help=f"{default} by default")
    options = vars(parser.parse_args(arguments))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    threads, checkpoint = options.pop("threads"), options.pop("export")
    if threads:
        torch.set_num_threads(threads)
    try:
        if checkpoint:
            export(checkpoint, options["out"])
        else:
            train(TrainingConfig(**options))
    except LensNeuronsError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
