"""Time contenders side by side on checkpoints with the true shapes of published models, and print ratios.

Contenders take turns, so that a machine that slows down slows all of them. Cold: the files are dropped from the page
cache before each run; warm: they are read into it. Beside the times stand two floors of this machine, measured in the
same run (benchmarks/floors.py). One that fails is a row with its last words, and is not tried again in that case.
"""

import argparse
import dataclasses
import shutil
from pathlib import Path

import polars as pl

from benchmarks import plan, plot, report, runner
from benchmarks.plan import Case
from benchmarks.shapes import SHAPES
from moe_atlas.log import run

OVERRIDES = ("shape", "layers", "shrink", "tokens", "threads", "memory", "cold", "warm", "contenders")


def chosen(arguments: argparse.Namespace) -> list[Case]:
    """The cases of the plan that the command line asks for, as it changes them, each once."""
    name = "full" if arguments.full else "quick" if arguments.quick else "default"
    cases = [case for case in plan.PLANS[name] if not arguments.suite or case.suite in arguments.suite]
    if arguments.shape:  # what the plan asks of other shapes does not hold there
        cases = [dataclasses.replace(case, contenders=(), memory=0) for case in cases]
    changed = {key: getattr(arguments, key) for key in OVERRIDES if getattr(arguments, key) is not None}
    changed_cases = [dataclasses.replace(case, **changed) for case in cases]
    # Cases that were told apart by what is changed are one now.
    once = {(case.suite, case.checkpoint, case.tokens, case.threads): case for case in changed_cases}
    return [case for case in once.values() if case.names(arguments.device)]


def parse(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small shapes, a minute or two: whether everything runs")
    parser.add_argument("--full", action="store_true", help="the paper's method at Mixtral's shape too: hours")
    parser.add_argument("--table", action="store_true", help="run nothing: print what is there as markdown")
    names = sorted({name for of_suite in plan.SUITES.values() for name in of_suite})
    parser.add_argument("--suite", nargs="+", choices=plan.SUITES, help="only these")
    parser.add_argument("--contenders", nargs="+", choices=names, help="only these, by the name without the suite")
    parser.add_argument("--shape", choices=SHAPES)
    for option, meaning in {
        "layers": "of the checkpoint",
        "shrink": "divide every size of the shape by this",
        "tokens": "of the extraction",
        "threads": "of each contender (0: as many as torch takes)",
        "memory": "MiB that contenders may take, where they can be told",
        "cold": "runs with the files out of the page cache",
        "warm": "runs with the files in it",
    }.items():
        parser.add_argument(f"--{option}", type=int, help=meaning)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="cuda: contenders that can, alone")
    parser.add_argument("--timeout", type=float, default=7200, help="seconds after which a contender is stopped")
    parser.add_argument("--keep", action="store_true", help="keep the checkpoints")
    parser.add_argument("--checkpoints", type=Path, default=Path("results/benchmarks/checkpoints"))
    parser.add_argument("--output", type=Path, help="folder of tables and figure; results/benchmarks, or quick in it")
    arguments = parser.parse_args(words)
    arguments.contenders = tuple(arguments.contenders) if arguments.contenders else None
    arguments.output = arguments.output or Path("results/benchmarks", *["quick"] * arguments.quick)
    return arguments


def main(words: list[str] | None = None) -> None:
    arguments = parse(words)
    if arguments.table:
        print(report.markdown(report.read(arguments.output)))
        return
    cases, done = chosen(arguments), []
    for number, case in enumerate(cases):
        runner.check_room(case, arguments.checkpoints)
        done.append(runner.run_case(case, arguments.checkpoints, arguments.device, arguments.timeout))
        plan.merge(arguments.output / f"{case.suite}.parquet", done[-1])
        if not arguments.keep and case.checkpoint not in {later.checkpoint for later in cases[number + 1 :]}:
            shutil.rmtree(arguments.checkpoints / case.checkpoint)
    plot.draw(report.read(arguments.output), arguments.output / "benchmarks.png")
    print(report.markdown(pl.concat(done)))


if __name__ == "__main__":
    run(main)
