"""Atomic writes and file hashes. Nothing here imports torch or polars."""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from moe_atlas.errors import AtlasError


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Give a temporary path beside `path`; rename it onto `path` if the block succeeds.

    A reader never sees half a file, and a failing block leaves what was there. The
    temporary name keeps the suffix, which some writers take the format from.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.partial-{os.getpid()}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replaced_checkpoint(folder: Path) -> Iterator[Path]:
    """Give an empty folder beside `folder`; move its files there one by one if the block succeeds, weights first.

    A reader never sees half a file. Weight files of an earlier run that this one did not write are removed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    temporary.mkdir()
    try:
        yield temporary
        names = os.listdir(temporary)
        for name in sorted(names, key=lambda name: not name.endswith(".safetensors")):
            os.replace(temporary / name, folder / name)
    finally:
        shutil.rmtree(temporary)
    for path in folder.glob("model*.safetensors*"):
        if path.name not in names:
            path.unlink()


def write_json(path: str | os.PathLike, value: object) -> None:
    """Write `value` as readable JSON, keys in the order given, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: str | os.PathLike) -> dict:
    """Read a JSON file; an unreadable one is an AtlasError that names it."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AtlasError(f"{path}: there is no such file.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise AtlasError(f"{path}: this is not valid JSON ({error}); restore the file.") from None


def sha256(path: str | os.PathLike) -> str:
    """Hex sha256 of a file, read in 8 MiB blocks."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(8 << 20):
            digest.update(block)
    return digest.hexdigest()
