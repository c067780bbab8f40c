"""Which GPU a program runs on: one of its own, which its job was given or no other program of the user holds.

A lock is a file lock of the system, so that a program that ends, or is killed, sets its GPU free.
"""

import fcntl
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from urllib.parse import quote

from moe_atlas.errors import AtlasError
from moe_atlas.log import say

VISIBLE = "CUDA_VISIBLE_DEVICES"
# What names the job in Slurm, PBS, LSF and Grid Engine. The same device number in two jobs can be two devices.
_JOBS = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "JOB_ID")
# Descriptors of the locks, open as long as the program runs.
_held: list[int] = []


def listed(text: str) -> list[str]:
    """Names of the devices in what `nvidia-smi -L` prints: a GPU, or its MIG instances where it is cut into some."""
    gpus: list[list[str]] = []
    for kind, name in re.findall(r"^\s*(GPU|MIG) .*\(UUID: (.+?)\)\s*$", text, re.MULTILINE):
        if kind == "GPU":
            gpus.append([name])
        else:
            gpus[-1].append(name)
    return [name for gpu in gpus for name in (gpu[1:] or gpu)]


def present() -> list[str]:
    """Names, as CUDA takes them, of the devices that this program may use; empty where there is none.

    CUDA_VISIBLE_DEVICES comes first, set by a batch system or by hand; then what nvidia-smi lists, by UUID, because
    its numbers are not CUDA's. Asks CUDA nothing: what it is asked first fixes the devices of a program.
    """
    given = os.environ.get(VISIBLE)
    if given is not None:
        # CUDA takes the names before the first that is no device.
        return list(takewhile(lambda name: name not in ("", "-1"), (name.strip() for name in given.split(","))))
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return listed(done.stdout)


def default() -> str:
    """Where a program runs that was not told: cuda or cpu."""
    return "cuda" if present() else "cpu"


def claim(device: str, names: Sequence[str] | None = None, folder: Path | None = None) -> str:
    """Hold a free device until the program ends, and show CUDA no other. To be called before CUDA is asked anything.

    device: cuda takes one, and waits while others hold all; anything else is left alone, as by-hand names like cuda:1.
    names: devices to choose from, those of `present` if None. folder: of the lock files, one a user and batch job.
    Returns the device to give to torch. Raises AtlasError where the folder cannot be written.
    """
    if device != "cuda":
        return device
    names = present() if names is None else names
    if names:
        os.environ[VISIBLE] = _hold_one(names, folder or _folder())
    return device


def claim_found(device: str) -> str:
    """`claim`, and an AtlasError if torch then finds no GPU."""
    device = claim(device)
    if device.startswith("cuda"):
        import torch

        if not torch.cuda.is_available():
            raise AtlasError(
                f"--device {device} ({VISIBLE}={os.environ.get(VISIBLE, '')}): torch finds no GPU; write 0 into the "
                "column gpus of the model's row, or install a build of torch with CUDA."
            )
    say(f"running on {device}" + (f", {VISIBLE}={os.environ.get(VISIBLE, '')}" if device == "cuda" else ""))
    return device


def _folder() -> Path:
    job = next((os.environ[name] for name in _JOBS if os.environ.get(name)), "")
    return Path(tempfile.gettempdir()) / quote(f"moe-atlas-devices-{os.getuid()}-{job}".rstrip("-"), safe="")


def _hold_one(names: Sequence[str], folder: Path) -> str:
    """The first device that is free; asks again each second while none is."""
    waiting = False
    while True:
        for name in names:
            if _lock(folder / f"{quote(name, safe='')}.lock"):
                return name
        if not waiting:
            say(f"waiting for a GPU: other programs hold {', '.join(names)}")
            waiting = True
        time.sleep(1)


def _lock(path: Path) -> bool:
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise AtlasError(f"{path}: {error.strerror}; set TMPDIR to a folder that you can write.") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return False
    _held.append(descriptor)
    return True
