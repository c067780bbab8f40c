"""Tests import the library from scripts/, as the command-line programs do."""

import sys
from pathlib import Path

import hypothesis

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "tests")]

# No test asserts a time: a machine may be busy.
hypothesis.settings.register_profile("atlas", deadline=None)
hypothesis.settings.load_profile("atlas")


def pytest_collection_modifyitems(items):
    """Begin with the files that run whole workflows: begun last, one of them would leave a core idle."""
    items.sort(key=lambda item: not item.path.stem.endswith(("workflow", "end_to_end")))
