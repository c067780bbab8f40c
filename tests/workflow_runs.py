"""Copies of the repository in which Snakemake is run, and what it says it would do."""

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("config", "scripts", "workflow", "notebooks")


class Job(NamedTuple):
    """One job of a dry run."""

    rule: str
    wildcards: dict[str, str]
    resources: dict[str, str]
    output: tuple[str, ...]


def copy_repository(target: Path) -> Path:
    """The parts of the repository that the workflow needs, without results."""
    for part in PARTS:
        shutil.copytree(ROOT / part, target / part, ignore=shutil.ignore_patterns("__pycache__"))
    return target


def snakemake(folder: Path, *arguments: str, check: bool = True) -> str:
    """Run Snakemake in a folder; returns what it printed. A failure fails the test with that text."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SNAKEMAKE_")}
    command = [sys.executable, "-m", "snakemake", "--cores", "2", *arguments]
    done = subprocess.run(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert not check or done.returncode == 0, done.stdout
    return done.stdout


def _pairs(text: str) -> dict[str, str]:
    return dict(pair.split("=", 1) for pair in text.split(", ") if "=" in pair)


def planned(folder: Path, *arguments: str) -> list[Job]:
    """The jobs of a dry run, without the target rules' own."""
    jobs = []
    for block in re.split(r"\n(?=(?:local)?rule \w+:\n)", snakemake(folder, "-n", *arguments))[1:]:
        rule = re.match(r"(?:local)?rule (\w+):", block)[1]
        fields = dict(re.findall(r"^    (\w+): (.*)$", block, re.MULTILINE))
        output = tuple(fields["output"].split(", ")) if "output" in fields else ()
        if output:
            jobs.append(Job(rule, _pairs(fields.get("wildcards", "")), _pairs(fields.get("resources", "")), output))
    return jobs


def counts(jobs: list[Job]) -> dict[str, int]:
    """Rule -> number of its jobs."""
    return dict(Counter(job.rule for job in jobs))


def write_sheet(path: Path, rows: list[dict[str, str]]) -> None:
    """Write a sheet whose columns are the keys of its rows."""
    columns = list(rows[0])
    lines = ["\t".join(columns), *("\t".join(row[column] for column in columns) for row in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_sheet(path: Path) -> list[dict[str, str]]:
    """Rows of a sheet as written, all cells text."""
    header, *lines = path.read_text(encoding="utf-8").splitlines()
    return [dict(zip(header.split("\t"), line.split("\t"), strict=True)) for line in lines]


def pretend_finished(folder: Path) -> None:
    """Put a file in the place of every output and let Snakemake record them as finished."""
    for job in planned(folder):
        for output in job.output:
            path = folder / output
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(output, encoding="utf-8")
    snakemake(folder, "--touch", "--forceall", "--quiet", "all")
