"""A real Slurm on this machine: munged, slurmctld and one slurmd on loopback, in a folder of their own, and its jobs.

Root only, with Debian's slurm-wlm and munge. Nothing outside the folder is read or written, and `stop` ends what
`start` started. There is no accounting, as on many small clusters, so that sacct finds nothing.
"""

import os
import secrets
import shutil
import socket
import subprocess
import time
from pathlib import Path

PROGRAMS = {"munged": "munge", "slurmctld": "slurmctld", "slurmd": "slurmd", "sbatch": "slurm-client"}
# Of the node as Slurm believes it: jobs of a user's checkpoint ask for eight threads.
CPUS, MEMORY_MB = 8, 64_000

CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
CredType=cred/munge
MpiDefault=none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SchedulerParameters=sched_min_interval=100000,batch_sched_delay=0
SlurmdParameters=config_overrides
ReturnToService=2
MinJobAge=7200
KillWait=2
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory={memory} Gres=gpu:small:1,gpu:large:1 State=UNKNOWN
PartitionName=cpu Nodes={host} Default=YES MaxTime=INFINITE State=UP
PartitionName=gpu Nodes={host} MaxTime=INFINITE State=UP
"""
# Two files that every machine has stand for the devices of two GPUs.
GRES = "Name=gpu Type=small File=/dev/null\nName=gpu Type=large File=/dev/zero\n"


def missing() -> str:
    """Why Slurm cannot be started here, or nothing."""
    packages = sorted({package for program, package in PROGRAMS.items() if not _path(program)})
    if packages:
        return f"not installed: {', '.join(packages)} (apt-get install slurm-wlm munge)"
    return "" if os.geteuid() == 0 else "only root can start Slurm's daemons"


def _path(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


class SlurmNode:
    """`environment` is what a program needs to talk to this Slurm."""

    def __init__(self, folder: Path):
        self.folder = folder
        path = f"{folder / 'bin'}:{os.environ['PATH']}"
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": path}
        self._daemons: list[subprocess.Popen] = []

    def start(self) -> None:
        """Start the daemons and wait until the node takes jobs; at most a minute."""
        for name in ("state", "spool"):
            (self.folder / name).mkdir(parents=True)
        # The step of a job forgets SLURM_CONF; on a cluster the configuration is where Slurm looks for it.
        srun = self.folder / "bin/srun"
        srun.parent.mkdir()
        srun.write_text(f'#!/bin/sh\nSLURM_CONF={self.folder}/slurm.conf exec {_path("srun")} "$@"\n')
        srun.chmod(0o755)
        host = socket.gethostname().split(".")[0]
        values = {"host": host, "ports": _free_ports(2), "folder": self.folder, "cpus": CPUS, "memory": MEMORY_MB}
        (self.folder / "slurm.conf").write_text(CONFIG.format(**values))
        (self.folder / "gres.conf").write_text(GRES)
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        paths = {"key-file": key, "socket": self.folder / "munge.socket"}
        paths |= {f"{name}-file": self.folder / f"munge.{name}" for name in ("pid", "log", "seed")}
        self._daemon("munged", "--foreground", "--force", *(f"--{name}={path}" for name, path in paths.items()))
        self._wait(lambda: paths["socket"].exists(), "munged")
        self._daemon("slurmctld", "-D", "-i")
        self._daemon("slurmd", "-D")
        self._wait(lambda: set(self.ask("sinfo", "--noheader", "--format=%T").split()) == {"idle"}, "slurmd")

    def _daemon(self, program: str, *arguments: str) -> None:
        out = (self.folder / f"{program}.out").open("w")
        command = [_path(program), *arguments]
        self._daemons.append(subprocess.Popen(command, env=self.environment, stdout=out, stderr=out))

    def _wait(self, ready, program: str, seconds: int = 60) -> None:
        end = time.monotonic() + seconds
        while not ready():
            ended = [daemon.args[0] for daemon in self._daemons if daemon.poll() is not None]
            if ended or time.monotonic() > end:
                logs = [f"{path.name}:\n{path.read_text()[-2000:]}" for path in self.folder.glob("*.log")]
                self.stop()
                raise RuntimeError(f"{program} is not ready; ended: {ended}\n" + "\n".join(logs))
            time.sleep(0.2)

    def stop(self) -> None:
        """End every job and the daemons."""
        if len(self._daemons) == 3:
            self.ask("scancel", "--user=root", "--signal=KILL", "--full")
            self.ask("scancel", "--user=root")
            time.sleep(1)
        for daemon in reversed(self._daemons):
            daemon.terminate()
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self._daemons.clear()

    def ask(self, *command: str) -> str:
        """What one of Slurm's programs prints; nothing where it fails."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60)
        return done.stdout

    def jobs(self) -> list[dict[str, str]]:
        """Every job that was ever submitted, in order: id, state, rule and wildcards, memory, GPUs, partition."""
        fields = {
            "id": "JobID",
            "state": "State",
            "comment": "Comment",
            "memory": "MinMemory",
            "partition": "Partition",
        }
        fields |= {"per_job": "tres-per-job", "per_node": "tres-per-node"}
        form = ",".join(f"{name}:|" for name in fields.values())
        rows = self.ask("squeue", "--states=all", "--noheader", "--sort=i", f"--Format={form}").splitlines()
        return [dict(zip(fields, (cell.strip() for cell in row.split("|")), strict=False)) for row in rows]
