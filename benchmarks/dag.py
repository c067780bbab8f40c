"""Time a dry run and a run with nothing to do, with many models in the sheet.

    python benchmarks/dag.py [--models 40]

In a temporary copy of the repository, with rows of the Hub and the demo's corpora. For the run with nothing to do, a
file with its own name as content lies in the place of every output, and `snakemake --touch` records all as finished,
which takes minutes. Prints seconds of the wall and of the processor (user and system).
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from workflow_runs import copy_repository, pretend_finished, read_sheet, write_sheet  # noqa: E402


def many_models(folder: Path, count: int) -> Path:
    """A copy of the repository whose sheet has `count` models of the Hub."""
    copy_repository(folder)
    sheet = folder / "config/models.tsv"
    row = read_sheet(sheet)[-1] | {"dense_reference": "", "series": "", "runtime": "240", "mem_mb": "16000"}
    names = [f"model-{number}" for number in range(1, count + 1)]
    write_sheet(sheet, [row | {"model": name, "source": f"hf:org/{name}", "revision": "0" * 40} for name in names])
    return folder


def timed(folder: Path, *arguments: str) -> tuple[str, float, float]:
    """What Snakemake printed, and the seconds that it took: of the wall, and of the processor."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "snakemake", "--cores", "2", *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(done.stdout)
    return done.stdout, wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=40, help="rows of the sheet")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = many_models(Path(temporary) / "atlas", arguments.models)
        text, *dry = timed(folder, "-n")
        (jobs,) = {line.split()[1] for line in text.splitlines() if line.startswith("total ")}
        print(f"{arguments.models} models, {jobs} jobs", flush=True)
        print("dry run: {:.1f} s, {:.1f} s of the processor".format(*dry), flush=True)
        pretend_finished(folder)
        text, *nothing = timed(folder)
        if "Nothing to be done" not in text:
            raise SystemExit(text)
        print("nothing to do: {:.1f} s, {:.1f} s of the processor".format(*nothing))


if __name__ == "__main__":
    main()
