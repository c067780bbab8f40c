"""Fetch a repository's files into the cache of the Hub's client, or one shard at a time into a folder of our own."""

import contextlib
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import constants, hf_hub_download, snapshot_download
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import disable_progress_bars
from tqdm import tqdm

from moe_atlas.checkpoints.checkpoint import open_file
from moe_atlas.checkpoints.fetched import MAX_SHARDS
from moe_atlas.errors import AtlasError
from moe_atlas.hub.errors import hub_errors, token
from moe_atlas.hub.file import HubFile
from moe_atlas.hub.repository import Repository
from moe_atlas.log import Progress, say, size

# Files at a time: what a killed run had of them is lost, since the client completes a file only within a run.
WORKERS = 4
STALE = 3600  # seconds after which a half-fetched file belongs to no running program
TRIES = 3  # of one shard, where starting the pass again would fetch everything again
PAUSE = float(os.environ.get("MOE_ATLAS_RETRY_PAUSE", "10"))  # seconds before a second try

disable_progress_bars()  # the client's own, which it also draws for looking things up and for small files


class _Bar(tqdm):
    """The bar of a download, drawn also where the error stream is a file or a pipe to one."""

    def __init__(self, *args, name: str | None = None, **kwargs):
        super().__init__(*args, **kwargs | {"disable": False, "file": sys.stderr, "mininterval": 1.0})


def fetch(repository: Repository, files: Sequence[HubFile]) -> Path:
    """Fetch these files into the client's cache (HF_HOME), check every one, and return the folder of the revision.

    Files that are there already are not fetched again; what a broken connection has left of a file is completed while
    the program runs, and begun anew by the next run. Raises AtlasError: too little space (before the first byte), what
    `hub_errors` names, a file whose content is not what the Hub says (its copy is deleted, so that a second run
    fetches it).
    """
    names = [file.name for file in files]
    _sweep(Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repository.name, repo_type="model"))
    with hub_errors(repository.name, repository.revision):
        planned = snapshot_download(
            repository.name, revision=repository.revision, allow_patterns=names, token=token(), dry_run=True
        )
        wanted = sum(file.file_size for file in planned if file.will_download)
        check_space(Path(constants.HF_HUB_CACHE), wanted, repository.name)
        say(f"{repository.name}: {len(names)} files, {size(wanted)} to fetch into {constants.HF_HUB_CACHE}")
        directory = Path(
            snapshot_download(
                repository.name,
                revision=repository.revision,
                allow_patterns=names,
                token=token(),
                tqdm_class=_Bar if files == repository.weights else None,
                max_workers=WORKERS,
            )
        )
    progress = Progress(len(files), "file")
    for file in files:
        file.verify(directory / file.name, repository.name)
        progress.step(f"{file.name} is what the Hub says")
    return directory


def _sweep(folder: Path) -> None:
    """Delete what killed runs have left of files: the client neither completes nor deletes it."""
    for half in folder.glob("blobs/*.incomplete"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - half.stat().st_mtime > STALE:
                half.unlink()


def check_space(directory: Path, wanted: int, name: str) -> None:
    """AtlasError when the disk of `directory` has fewer than `wanted` bytes free."""
    there = next(path for path in (directory, *directory.parents) if path.exists())
    free = shutil.disk_usage(there).free
    if wanted > free:
        raise AtlasError(
            f"hf:{name}: {size(wanted)} are wanted in {directory} and {size(free)} are free; free space, set HF_HOME "
            f"to a folder on a larger disk, or set keep to false in the row, which holds {MAX_SHARDS} shards at a time."
        )


class ShardFolder:
    """Fetches one weight file at a time into a folder, which holds nothing else (a checkpoints.fetched.ShardSource).

    Shards that an interrupted run has left are taken, if they are whole; half-fetched files are deleted.
    """

    def __init__(self, repository: Repository, directory: Path):
        self.repository, self.directory = repository, directory
        self._files = {file.name: file for file in repository.weights}
        directory.mkdir(parents=True, exist_ok=True)
        for half in directory.rglob("*.incomplete"):
            half.unlink()

    def on_disk(self) -> list[str]:
        """Weight files that are there."""
        return sorted(path.name for path in self.directory.iterdir() if path.name in self._files)

    def shard_of(self) -> dict[str, str]:
        """Tensor name -> weight file; a repository without an index has one file, which is fetched to see its names."""
        if self.repository.shard_of:
            return self.repository.shard_of
        (file,) = self.repository.weights
        return dict.fromkeys(open_file(self.fetch(file.name)).tensors, file.name)

    def check_space(self) -> None:
        """AtlasError when the disk has no room for the largest shards that may lie there at a time."""
        sizes = sorted((file.bytes for file in self.repository.weights), reverse=True)
        there = sum((self.directory / shard).stat().st_size for shard in self.on_disk())
        check_space(self.directory, sum(sizes[:MAX_SHARDS]) - there, self.repository.name)

    def fetch(self, shard: str) -> Path:
        """Path of the shard, fetched if it is not there, its hash checked. Tries three times."""
        started = time.monotonic()
        for attempt in range(1, TRIES + 1):
            try:
                with hub_errors(self.repository.name, self.repository.revision):
                    path = hf_hub_download(
                        self.repository.name,
                        shard,
                        revision=self.repository.revision,
                        local_dir=self.directory,
                        token=token(),
                        tqdm_class=_Bar,
                    )
                self._files[shard].verify(Path(path), self.repository.name)
                break
            except AtlasError as error:
                if attempt == TRIES:
                    raise
                say(f"try {attempt} of {TRIES}: {error}")
                time.sleep(PAUSE * attempt)
        count, seconds = self._files[shard].bytes, max(time.monotonic() - started, 1e-9)
        say(f"{shard}: {size(count)}, {size(count / seconds)}/s with the check of its hash")
        return Path(path)

    def delete(self, shard: str) -> None:
        """Take a shard off the disk."""
        (self.directory / shard).unlink(missing_ok=True)

    def remove(self) -> None:
        """Delete the folder and what the client noted there."""
        shutil.rmtree(self.directory, ignore_errors=True)
