"""Each program has a GPU of its own. Real processes, real locks; devices are names, as no GPU is needed to hold one."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from workflow_runs import ROOT, copy_repository, planned, read_sheet, snakemake, write_sheet

from moe_atlas import devices
from moe_atlas.errors import AtlasError

LISTED = """\
GPU 0: NVIDIA A100-SXM4-80GB (UUID: GPU-0a1b2c3d-0000-1111-2222-333344445555)
GPU 1: NVIDIA A100-SXM4-80GB (UUID: GPU-9a1b2c3d-0000-1111-2222-333344445555)
  MIG 3g.40gb     Device  0: (UUID: MIG-5a1b2c3d-0000-1111-2222-333344445555)
  MIG 3g.40gb     Device  1: (UUID: MIG-GPU-6a1b2c3d-0000-1111-2222-333344445555/1/0)
"""

# Claims a device of those named, says which, and works for a while: its second argument.
WORK = """
import os, sys, time
from moe_atlas import devices
assert devices.claim("cuda", sys.argv[1].split(",")) == "cuda"
print(os.environ["CUDA_VISIBLE_DEVICES"], time.monotonic(), flush=True)
time.sleep(float(sys.argv[2]))
print("end", time.monotonic(), flush=True)
"""


def start(folder: Path, names: str, seconds: float, **environment: str) -> subprocess.Popen:
    """A process that claims one of the names; its locks are below `folder`."""
    clean = {key: value for key, value in os.environ.items() if key not in ("CUDA_VISIBLE_DEVICES", *devices._JOBS)}
    return subprocess.Popen(
        [sys.executable, "-c", WORK, names, str(seconds)],
        env=clean | {"TMPDIR": str(folder)} | environment,
        cwd=ROOT / "scripts",
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def claimed(process: subprocess.Popen) -> str:
    """The device that a process has claimed; waits until it has."""
    return process.stdout.readline().split()[0]


def test_nvidia_smi_s_list_gives_gpus_and_the_instances_of_those_that_are_cut():
    assert devices.listed(LISTED) == [
        "GPU-0a1b2c3d-0000-1111-2222-333344445555",
        "MIG-5a1b2c3d-0000-1111-2222-333344445555",
        "MIG-GPU-6a1b2c3d-0000-1111-2222-333344445555/1/0",
    ]
    assert devices.listed("") == devices.listed("No devices were found\n") == []


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ("2,0", ["2", "0"]),
        (" 1 , 3", ["1", "3"]),
        ("0,-1,2", ["0"]),
        ("", []),
        ("-1", []),
        ("GPU-a,GPU-b", ["GPU-a", "GPU-b"]),
    ],
)
def test_the_environment_says_which_devices_there_are(monkeypatch, given, names):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    assert devices.present() == names
    assert devices.default() == ("cuda" if names else "cpu")


def test_nvidia_smi_is_asked_where_the_environment_says_nothing(monkeypatch, tmp_path):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n[ \"$*\" = -L ] && cat <<'END'\n{LISTED}END\n")
    program.chmod(0o755)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert devices.present() == devices.listed(LISTED)
    program.write_text("#!/bin/sh\necho 'cannot talk to the driver'; exit 9\n")
    assert devices.present() == []


def test_other_devices_are_left_alone(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    assert devices.claim("cpu", ["4"], tmp_path) == "cpu" and devices.claim("cuda:1", ["4"], tmp_path) == "cuda:1"
    assert devices.claim("cuda", [], tmp_path) == "cuda"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "4,5" and not list(tmp_path.iterdir())


def test_as_many_programs_run_as_there_are_devices_each_on_its_own(tmp_path):
    processes = [start(tmp_path, "7,GPU-a,MIG-b/1/0", 1) for _ in range(6)]
    runs = []
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        (name, begin), (_, end) = (line.split() for line in out.splitlines())
        runs.append((name, float(begin), float(end), "waiting for a GPU" in err))
    assert {name for name, *_ in runs} == {"7", "GPU-a", "MIG-b/1/0"}
    for name in {name for name, *_ in runs}:
        mine = sorted((begin, end) for other, begin, end, _ in runs if other == name)
        assert all(end <= begin for (_, end), (begin, _) in zip(mine, mine[1:], strict=False)), name
    assert sum(waited for *_, waited in runs) >= 3


def test_a_killed_program_sets_its_device_free(tmp_path):
    holder = start(tmp_path, "0", 600)
    assert claimed(holder) == "0"
    waiting = start(tmp_path, "0", 0)
    assert "waiting for a GPU: other programs hold 0" in waiting.stderr.readline()
    assert waiting.poll() is None
    holder.send_signal(signal.SIGKILL)
    assert claimed(waiting) == "0" and waiting.wait(timeout=60) == 0
    holder.communicate()


def test_the_same_number_in_two_batch_jobs_is_two_devices(tmp_path):
    """Slurm counts a job's devices from 0 where it hides the others."""
    first = start(tmp_path, "0", 600, SLURM_JOB_ID="11")
    second = start(tmp_path, "0", 600, SLURM_JOB_ID="12")
    held = [claimed(first), claimed(second)]
    # Begun once device 0 of its batch job is taken: which of two programs comes first is no one's to say.
    inside = start(tmp_path, "0,1", 600, SLURM_JOB_ID="12")
    try:
        assert [*held, claimed(inside)] == ["0", "0", "1"]
    finally:
        for process in (first, second, inside):
            process.kill()
            process.communicate()


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(AtlasError, match=r"file/x/0\.lock: Not a directory; set TMPDIR to a folder that you can write"):
        devices.claim("cuda", ["0"], tmp_path / "file" / "x")


@pytest.mark.parametrize("program", ["extract_activations", "fetch_use_delete"])
def test_a_program_asks_cuda_nothing_before_it_has_a_device(program):
    """Its first question would fix the devices that it sees, and the claim would come too late."""
    code = f"""
import runpy, sys, torch
def asked(*_, **__):
    raise RuntimeError("CUDA was asked")
for name in ("is_available", "device_count", "current_device", "get_device_properties", "init", "_lazy_init"):
    setattr(torch.cuda, name, asked)
sys.argv = ["{program}.py", "--help"]
runpy.run_path("{program}.py", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "scripts", capture_output=True, text=True)
    assert done.returncode == 0 and "usage:" in done.stdout, done.stderr


SNAKEFILE = """
configfile: "config/config.yaml"
include: "rules/common.smk"
rule all:
    input: expand("{model}.txt", model=MODELS)
rule work:
    output: "{model}.txt"
    threads: 1
    resources: gpu=gpus, gpu_jobs=gpu_jobs
    params: device=device
    shell: "python work.py {params.device} > {output}"
"""
SCRIPT = """
import os, sys, time
sys.path.insert(0, "scripts")
from moe_atlas import devices
devices.claim(sys.argv[1])
print(os.environ["CUDA_VISIBLE_DEVICES"], time.monotonic(), flush=True)
time.sleep(2)
print("end", time.monotonic())
"""


@pytest.mark.parametrize(
    ("visible", "limit", "together"), [("3,5", [], 2), ("3", [], 1), ("3,5", ["--resources", "gpu_jobs=1"], 1)]
)
def test_a_machine_runs_a_job_a_gpu(tmp_path, monkeypatch, visible, limit, together):
    folder = copy_repository(tmp_path / "atlas")
    rows = read_sheet(folder / "config/models.tsv")[:4]
    write_sheet(folder / "config/models.tsv", [row | {"gpus": "1", "dense_reference": ""} for row in rows])
    (folder / "workflow/Snakefile").write_text(SNAKEFILE)
    (folder / "work.py").write_text(SCRIPT)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    snakemake(folder, "--cores", "8", *limit)
    runs = []
    for row in rows:
        (name, begin), (_, end) = (line.split() for line in (folder / f"{row['model']}.txt").read_text().splitlines())
        runs.append((name, float(begin), float(end)))
    assert {name for name, *_ in runs} == set(visible.split(",")[:together])
    at_work = [sum(begin <= moment < end for _, begin, end in runs) for _, moment, _ in runs]
    assert max(at_work) == together
    for name, begin, end in runs:
        assert not [other for other in runs if other[0] == name and begin < other[1] < end]


@pytest.mark.parametrize(("request_", "resources"), [("", {"gpu": "2"}), ("gpu:a100", {"gres": "gpu:a100:2"})])
def test_gpus_are_asked_for_by_number_or_as_a_generic_resource(tmp_path, request_, resources):
    folder = copy_repository(tmp_path / "atlas")
    rows = read_sheet(folder / "config/models.tsv")[:2]
    write_sheet(folder / "config/models.tsv", [rows[0], rows[1] | {"gpus": "2"}])
    config = folder / "config/config.yaml"
    config.write_text(config.read_text().replace('gpu_gres: ""', f'gpu_gres: "{request_}"'))
    jobs = planned(folder)
    asked = {job.wildcards["model"]: job.resources for job in jobs if job.rule == "extract_activations"}
    found = {
        model: {key: row[key] for key in ("gpu", "gres", "gpu_jobs") if key in row} for model, row in asked.items()
    }
    assert found == {rows[0]["model"]: {}, rows[1]["model"]: resources | {"gpu_jobs": "1"}}
