"""Run the contenders of a case in turns, each in a process of its own."""

import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import polars as pl
import torch

from benchmarks import ROOT, floors, plan, report, synthetic
from benchmarks.plan import Case
from moe_atlas.errors import AtlasError


def machine(device: str) -> dict:
    """What the numbers of this machine are kept under."""
    names = [line.split(": ")[1] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "cpu": names[0] if names else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
    }


def measure(case: Case, contender: str, directory: Path, cold: bool, device: str, timeout: float) -> dict:
    """One run of a contender; of one that does not end well, its last words as `failed`."""
    if cold:
        floors.drop(directory)
    else:
        for path in directory.iterdir():
            floors.read(path)
    threads = case.threads or torch.get_num_threads()
    options = {"shape": case.shape, "layers": case.layers, "shrink": case.shrink, "tokens": case.tokens}
    options |= {"threads": threads, "device": device} | ({"memory": case.memory} if case.memory else {})
    command = [sys.executable, "-m", "benchmarks.contenders", f"{case.suite}_{contender}", directory.resolve()]
    command += [part for name, value in options.items() for part in (f"--{name}", value)]
    pools = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    fixed = {"cwd": ROOT, "env": os.environ | pools, "capture_output": True, "text": True, "timeout": timeout}
    try:
        done = subprocess.run(list(map(str, command)), **fixed)
    except subprocess.TimeoutExpired:
        return {"failed": f"stopped after {timeout:,.0f} s"}
    if done.returncode < 0:
        return {"failed": f"killed by signal {-done.returncode}"}
    lines = (done.stderr if done.returncode else done.stdout).strip().splitlines() or ["no output"]
    return {"failed": lines[-1].strip()} if done.returncode else json.loads(lines[-1])


def run_case(case: Case, checkpoints: Path, device: str, timeout: float) -> pl.DataFrame:
    """All runs of one case as rows of plan.SCHEMA."""
    directory = checkpoints / case.checkpoint
    total = synthetic.write(case.sizes(), directory)
    kept = ("suite", "shape", "shrink", "layers", "tokens", "memory")
    fixed = {name: getattr(case, name) for name in kept} | machine(device)
    fixed |= {"threads": case.threads or torch.get_num_threads(), "bytes": floors.needed(case, total)}
    fixed["began"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    fixed |= floors.floors(case, directory, total, device)
    print(f"{report.title(fixed)}: {report.floors_of(fixed)}", flush=True)
    rows, failed = [], set()
    for repeat, cold in case.rounds:
        for contender in case.names(device):
            if contender in failed:
                continue
            found = measure(case, contender, directory, cold, device, timeout)
            print(f"  {'cold' if cold else 'warm'} {repeat} {contender}: {found}", flush=True)
            if "failed" in found:
                failed.add(contender)
            if found.get("weights_read") is not None:
                found["weights_read"] /= fixed["bytes"]
            rows.append(fixed | {"contender": contender, "cold": cold, "repeat": repeat} | found)
    return pl.DataFrame(rows, schema=plan.SCHEMA)


def check_room(case: Case, checkpoints: Path) -> None:
    """Raise AtlasError where the disk is too small for the checkpoint and what contenders write of it."""
    if (checkpoints / case.checkpoint / "bytes.json").exists():
        return
    names = case.sizes()
    sizes = [*names.outside.values(), *(size for layer in range(case.layers) for size in names.layer(layer).values())]
    copies = 2 if {"transformers_disk", "airllm"} & set(case.names()) else 1
    wanted = copies * sum(2 * torch.Size(size).numel() for size in sizes)
    checkpoints.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(checkpoints).free
    if free < wanted:
        raise AtlasError(
            f"{checkpoints}: {case.checkpoint} needs {wanted / 1e9:.1f} GB of disk and {free / 1e9:.1f} are free; "
            "name another folder with --checkpoints, or fewer --layers."
        )
