"""Planning reads each file a fixed number of times, however many models the sheet has."""

import json
import subprocess
import sys

from workflow_runs import copy_repository, read_sheet, write_sheet

# A dry run in a process that counts the files of the repository that it opens.
COUNTED = """
import collections, json, os, sys
from snakemake.cli import main
here, opened = os.getcwd() + os.sep, collections.Counter()
def count(event, arguments):
    if event == "open" and isinstance(arguments[0], str):
        path = os.path.abspath(arguments[0])
        if path.startswith(here) and os.path.relpath(path).split(os.sep)[0] in ("config", "scripts", "workflow"):
            opened[os.path.relpath(path)] += 1
sys.addaudithook(count)
sys.argv[1:] = ["--cores", "1", "-n"]
try:
    main()
except SystemExit as end:
    print()
    print(json.dumps([end.code, opened]))
"""


def opened(folder, models: int) -> tuple[dict[str, int], int]:
    """Repository's files that a dry run with so many models opens -> how often, and how many jobs it plans."""
    copy_repository(folder)
    row = read_sheet(folder / "config/models.tsv")[-1] | {"revision": "0" * 40}
    names = [f"model-{number}" for number in range(models)]
    write_sheet(folder / "config/models.tsv", [row | {"model": name, "source": f"hf:org/{name}"} for name in names])
    done = subprocess.run([sys.executable, "-B", "-c", COUNTED], cwd=folder, capture_output=True, text=True)
    code, files = json.loads(done.stdout.splitlines()[-1])
    assert code == 0, done.stdout + done.stderr
    (total,) = {int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("total ")}
    return files, total


def test_a_dry_run_opens_no_file_again_for_another_model(tmp_path):
    few, jobs = opened(tmp_path / "few", 2)
    many, more = opened(tmp_path / "many", 6)
    assert {"config/models.tsv", "scripts/moe_atlas/sheets.py", "workflow/rules/behavioral.smk"} <= set(few)
    assert more > 2 * jobs and many == few
