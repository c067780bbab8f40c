"""What a job says while it runs: a header, a line a step with rate and remaining time, an error as a sentence."""

import importlib.metadata
import os
import platform
import sys
import time
from collections.abc import Callable

from moe_atlas import __version__
from moe_atlas.errors import AtlasError

_SHOWN = ("torch", "transformers", "polars", "numpy")


def say(text: str) -> None:
    """Write one line to stderr at once; standard output stays free for results."""
    print(text, file=sys.stderr, flush=True)


def header(program: str) -> None:
    """First line of every log: program, library versions, host, cores."""
    versions = []
    for name in _SHOWN:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    say(
        f"{program} · moe_atlas {__version__} · python {platform.python_version()} · "
        + " · ".join(versions)
        + f" · {platform.node()}, {os.cpu_count()} cores"
    )


def duration(seconds: float) -> str:
    """Seconds as a person reads them: '8 s', '3 min 05 s', '2 h 07 min'."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


def size(n: int) -> str:
    """Bytes as a person reads them: 812 B, 14.2 kB, 3.4 MB, 93.1 GB."""
    value = float(n)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} GB"


class Progress:
    """Log lines such as `layer 3/32 · 1.4 layers/s · 21 s left`, at most one every `interval` seconds.

    The first and the last step are always said.
    """

    def __init__(self, total: int, unit: str, interval: float = 1.0):
        self.total, self.unit, self.interval = total, unit, interval
        self.done, self.started, self.said = 0, time.monotonic(), float("-inf")
        self.skipped = 0

    def skip(self, count: int) -> None:
        """Count `count` units as done before the start: they say nothing of the rate."""
        self.done += count
        self.skipped += count

    def step(self, note: str = "", count: int = 1) -> None:
        """Count `count` units as done; `note` is appended to the line."""
        self.done += count
        now = time.monotonic()
        if self.done < self.total and now - self.said < self.interval:
            return
        self.said = now
        elapsed = max(now - self.started, 1e-9)
        rate = (self.done - self.skipped) / elapsed
        speed = f"{rate:.1f} {self.unit}s/s" if rate >= 1 else f"{1 / rate:.1f} s/{self.unit}"
        ended = self.done >= self.total
        left = f"done in {duration(elapsed)}" if ended else f"{duration((self.total - self.done) / rate)} left"
        say(f"{self.unit} {self.done}/{self.total} · {speed} · {left}" + (f" · {note}" if note else ""))


def run(main: Callable[[], None]) -> None:
    """Run a script's main(): header first; an AtlasError becomes one line and exit status 1."""
    header(os.path.basename(sys.argv[0]))
    try:
        main()
    except AtlasError as error:
        say(f"error: {error}")
        sys.exit(1)
    except OSError as error:
        if error.errno == 28:  # ENOSPC: the one system error every long job meets
            say(f"error: the disk is full while writing {error.filename or 'results'}; free space and run again.")
            sys.exit(1)
        raise
