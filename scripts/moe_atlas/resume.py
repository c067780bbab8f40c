"""Keep what a run over layers has after each layer, so that a killed run goes on and loses one layer.

The folder holds, of each layer that is done, `layer_{n}.record.safetensors`, and of the last of them what the next one
needs, `layer_{n}.hidden/*.safetensors`. `done.json` names these files with their sha256, and what the run is of. It is
renamed into place when all of them are on the disk, so that a layer is done or not, wherever the run was killed.
"""

import hashlib
import importlib.metadata
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from moe_atlas.errors import AtlasError
from moe_atlas.files import read_json, sha256
from moe_atlas.log import say
from moe_atlas.sources import ROOT, sources

Tensors = Mapping[str, torch.Tensor]

_OURS = re.compile(r"layer_\d+\.(record\.safetensors|hidden)|done\.json|\.done\.partial")


def program_version(program: str) -> str:
    """Changes with every source file that a program (path from the repository) runs through, torch and transformers."""
    digest = hashlib.sha256()
    for path in sources(program):
        digest.update((ROOT / path).read_bytes())
    for library in ("torch", "transformers"):
        digest.update(importlib.metadata.version(library).encode())
    return digest.hexdigest()


def checkpoint_version(manifest: dict) -> str:
    """Changes with the weights that a checkpoint.json describes, and with the config beside them."""
    config = sha256(Path(manifest["directory"]) / "config.json")
    return hashlib.sha256(json.dumps([manifest["files"], config]).encode()).hexdigest()


class SavedState:
    """The state of one run in `directory`, of which nothing but the state's own files is ever deleted.

    run: what the state must be of, by names that a sentence can hold ("checkpoint": its digest); `open` adds to it.
    Raises AtlasError where the state cannot be written.
    """

    def __init__(self, directory: str | os.PathLike, run: Mapping[str, object]):
        self.directory, self.run = Path(directory), dict(run)
        self.files: dict[str, str] = {}  # of the layers that are done: path in the folder -> sha256

    def open(self, run: Mapping[str, object]) -> int:
        """Layers that are done. A state of another run, or a damaged one, is deleted with a sentence, and none is."""
        self.run |= run
        self.files = {}
        found = [path for path in self._own() if path.name == "done.json"]
        fault = self._fault() if found else None
        if fault:
            say(f"{self.directory}: {fault}; what was kept there is deleted, and the run starts at its first layer.")
        if not found or fault:
            self.remove()
            return 0
        done = read_json(self.directory / "done.json")
        self.files = done["files"]
        self._delete(lambda name: name != "done.json" and not any(file.startswith(name) for file in self.files))
        say(f"{self.directory}: the run goes on after layer {done['layers'] - 1}, the last one that is done.")
        return done["layers"]

    def _fault(self) -> str | None:
        """Why the state that is there cannot be used."""
        try:
            done = read_json(self.directory / "done.json")
            if other := [name for name in {**self.run, **done["run"]} if self.run.get(name) != done["run"].get(name)]:
                return f"the state is of another {other[0]}"
            for name, digest in done["files"].items():
                if not (self.directory / name).is_file() or sha256(self.directory / name) != digest:
                    return f"{name} is missing or damaged"
            return None if isinstance(done["layers"], int) else "done.json is damaged"
        except (AtlasError, KeyError, TypeError, AttributeError):
            return "done.json is damaged"

    def keep(self, layer: int, record: Tensors, description: object, hidden: Iterable[tuple[str, Tensors]]) -> None:
        """Layer `layer` is done: its record with a description (JSON), and by name what the next layer needs."""
        folder = f"layer_{layer}.hidden"
        files = {name: digest for name, digest in self.files.items() if name.endswith(".record.safetensors")}
        try:
            (self.directory / folder).mkdir(parents=True, exist_ok=True)
            name = f"layer_{layer}.record.safetensors"
            files[name] = self._save(name, record, {"description": json.dumps(description)})
            for part, tensors in hidden:
                name = f"{folder}/{part}.safetensors"
                files[name] = self._save(name, tensors)
            _to_disk(self.directory / folder)
            done = {"layers": layer + 1, "run": self.run, "files": files}
            temporary = self.directory / ".done.partial"
            temporary.write_text(json.dumps(done, indent=1), encoding="utf-8")
            _to_disk(temporary)
            os.replace(temporary, self.directory / "done.json")
            _to_disk(self.directory)
        except (OSError, SafetensorError) as error:
            raise AtlasError(
                f"{self.directory}: the state after layer {layer} cannot be kept there ({error}); free space, "
                "or run without it."
            ) from None
        self.files = files
        self._delete(lambda name: name.endswith(".hidden") and name != folder)

    def records(self) -> Iterator[tuple[dict[str, torch.Tensor], object]]:
        """Record and description of each layer that is done, in order."""
        for name in self.files:
            if name.endswith(".record.safetensors"):
                with safe_open(self.directory / name, framework="pt") as file:
                    description = json.loads(file.metadata()["description"])
                yield load_file(self.directory / name), description

    def hidden(self, part: str) -> dict[str, torch.Tensor]:
        """What was kept under this name with the last layer that is done, on the CPU."""
        (name,) = (name for name in self.files if name.endswith(f".hidden/{part}.safetensors"))
        # What is loaded is mapped, at any address; a copy lies as a computed tensor does, and outlives the file.
        return {key: tensor.clone() for key, tensor in load_file(self.directory / name).items()}

    def remove(self) -> None:
        """Delete the state, and its folder if nothing else is in it."""
        # First what makes it one.
        (self.directory / "done.json").unlink(missing_ok=True)
        self._delete(lambda name: True)
        if self.directory.is_dir() and not any(self.directory.iterdir()):
            self.directory.rmdir()

    def _own(self) -> list[Path]:
        if not self.directory.is_dir():
            return []
        return [path for path in self.directory.iterdir() if _OURS.fullmatch(path.name)]

    def _delete(self, unwanted) -> None:
        for path in self._own():
            if unwanted(path.name):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _save(self, name: str, tensors: Tensors, metadata: dict[str, str] | None = None) -> str:
        path = self.directory / name
        save_file({key: tensor.cpu().contiguous() for key, tensor in tensors.items()}, path, metadata=metadata)
        _to_disk(path)
        return sha256(path)


def _to_disk(path: Path) -> None:
    """Have the system write a file or a folder's names out, which a rename alone does not."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
