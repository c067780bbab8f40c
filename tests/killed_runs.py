"""Run extract_activations.py again and again, each time killed at another place, and say what its next run did.

    python killed_runs.py FOLDER ARGUMENTS...

ARGUMENTS are the program's; outputs and state lie in FOLDER. A place is every operation on a file of the state, every
file of it half written, and every batch before it goes through a layer. Each run is a fork of this process, which has
imported everything and computed nothing, and is killed by SIGKILL. Prints a JSON list of runs.
"""

import hashlib
import json
import os
import shutil
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import torch  # noqa: E402

import extract_activations  # noqa: E402
from moe_atlas import resume, stream  # noqa: E402

OPERATIONS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")


class Places:
    """Counts places in this process and kills it at one of them."""

    def __init__(self, state: Path, fatal: int, report: int):
        self.state, self.fatal, self.report, self.number = state, fatal, report, -1
        sys.addaudithook(self._audit)
        self.save, self.step = resume.save_file, stream.LayerStream.step
        resume.save_file = self._save
        stream.LayerStream.step = lambda run, batch: self.reach("step") or self.step(run, batch)
        self.extract = extract_activations.probe.extract_texts
        extract_activations.probe.extract_texts = self._extract

    def say(self, name: str, value: object) -> None:
        os.write(self.report, f"{json.dumps([name, value])}\n".encode())

    def reach(self, name: str) -> None:
        self.number += 1
        if self.number == self.fatal:
            self.say("place", name)
            os.kill(os.getpid(), signal.SIGKILL)

    def _audit(self, event: str, arguments: tuple) -> None:
        if event in OPERATIONS and str(arguments[0]).startswith(f"{self.state}{os.sep}"):
            self.reach(f"{event} {Path(arguments[0]).name}")

    def _save(self, tensors: dict, path: Path, **options: object) -> None:
        self.save(tensors, path, **options)
        if self.number + 1 == self.fatal:
            os.truncate(path, path.stat().st_size // 2)
        self.reach(f"half of {path.name}")

    def _extract(self, checkpoint, *arguments, on_layer, **options):
        def seen(index: int, *layers: object) -> None:
            on_layer(index, *layers)
            self.say("layer", index)

        records = self.extract(checkpoint, *arguments, on_layer=seen, **options)
        self.say("read", checkpoint.bytes_read)
        return records


def run(folder: Path, arguments: list[str], fatal: int) -> dict:
    """One run in a fork: where it was killed ("" if it ended), layers it went through, bytes it read, its outputs."""
    receive, send = os.pipe()
    if (child := os.fork()) == 0:
        status = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            places = Places(folder / "state", fatal, send)
            sys.argv[1:] = arguments
            extract_activations.main()
            places.say("ended", True)
            status = 0
        finally:
            os._exit(status)
    os.close(send)
    with os.fdopen(receive) as lines:
        told = [json.loads(line) for line in lines]
    killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
    values = dict(told)
    if not killed and "ended" not in values:
        raise SystemExit(f"a run failed: {told}")
    outputs = [path for path in sorted(folder.iterdir()) if path.is_file()]
    return {
        "place": values["place"] if killed else "",
        "layers": [value for name, value in told if name == "layer"],
        "read": values.get("read"),
        "outputs": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in outputs},
        "state": (folder / "state").exists(),
    }


def main() -> None:
    folder, arguments = Path(sys.argv[1]), sys.argv[2:]
    torch.set_num_threads(1)  # a fork has no other threads
    names = {"activations": "safetensors", "intermediate": "safetensors", "tokens": "parquet"}
    for name, suffix in names.items():
        arguments += [f"--{name}", str(folder / f"{name}.{suffix}")]
    kept = [*arguments, "--state", str(folder / "state")]

    def fresh() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()

    fresh()
    found = {"undisturbed": run(folder, arguments, -1), "killed": []}
    while True:
        fresh()
        first = run(folder, kept, len(found["killed"]))
        if not first["place"]:
            found["kept"] = first
            break
        found["killed"].append([first, run(folder, kept, -1)])
    # Killed over and over, a little later each time: it still ends.
    fresh()
    found["often"] = [run(folder, kept, 10)]
    while found["often"][-1]["place"]:
        found["often"].append(run(folder, kept, 10 + len(found["often"])))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
