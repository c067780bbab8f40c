"""One contender, once, in a process of its own: what it took is the last line, as JSON."""

import argparse
import json
import sys
import traceback
from pathlib import Path

import torch

from benchmarks import extraction, weights
from benchmarks.measured import Run
from benchmarks.plan import SUITES
from benchmarks.shapes import SHAPES
from moe_atlas.errors import first_line

CONTENDERS = {
    f"{suite}_{name}": getattr(extraction if suite in ("extraction", "reading") else weights, f"{suite}_{name}")
    for suite, names in SUITES.items()
    for name in names
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("contender", choices=CONTENDERS)
    parser.add_argument("directory", type=Path, help="a checkpoint that benchmarks.synthetic wrote")
    parser.add_argument("--shape", required=True, choices=SHAPES)
    parser.add_argument("--layers", type=int, required=True)
    parser.add_argument("--shrink", type=int, default=1, help="what the shape is divided by")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--memory", type=int, help="MiB that it may take, where it can be told")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    shape = SHAPES[arguments.shape](arguments.layers, arguments.shrink)
    run = Run(arguments.directory, shape, arguments.tokens, arguments.memory, arguments.device)
    try:
        CONTENDERS[arguments.contender](run)
    except Exception as error:  # whatever it is, its first sentence is what the tables say of it
        traceback.print_exc()
        sys.exit(f"{type(error).__name__}: {first_line(error)}")
    print(json.dumps(run.found))


if __name__ == "__main__":
    main()
