"""A file of a repository: what the Hub says of it, and whether a fetched copy is that. Nothing here imports torch."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from moe_atlas.errors import AtlasError
from moe_atlas.files import sha256


@dataclass(frozen=True)
class HubFile:
    """A file as the Hub describes it: bytes, and the sha256 of a large file or git's sha1 of a small one."""

    name: str
    bytes: int
    sha256: str | None
    blob: str

    def as_record(self) -> dict:
        """The file as checkpoint.json lists it."""
        return {"name": self.name, "bytes": self.bytes, "sha256": self.sha256}

    def is_content_of(self, path: Path) -> bool:
        """Whether the file at `path` has the size and the hash that the Hub gives."""
        if path.stat().st_size != self.bytes:
            return False
        if self.sha256 is not None:
            return sha256(path) == self.sha256
        content = path.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == self.blob

    @classmethod
    def of(cls, listed) -> "HubFile":
        """The file as the Hub's client lists it: a RepoFile, or a RepoSibling asked for with files_metadata."""
        lfs = listed.lfs
        return cls(listed.rfilename, listed.size, lfs.sha256 if lfs else None, listed.blob_id)

    def verify(self, path: Path, repository: str) -> None:
        """Delete a fetched file whose size or hash is not the Hub's, and raise AtlasError."""
        if self.is_content_of(path):
            return
        Path(os.path.realpath(path)).unlink()  # the cache keeps contents apart from the names that point to them
        path.unlink(missing_ok=True)
        raise AtlasError(
            f"hf:{repository}: {self.name} is damaged: its {'sha256' if self.sha256 else 'git hash'} is not the "
            f"{self.sha256 or self.blob} of the Hub; the copy was deleted, run again to fetch it anew."
        )
