"""Which source files a program runs through: itself and every module of this library it imports, directly or not.

The rules name these files as inputs, so that an edit re-runs what it can change and nothing else.
"""

import ast
import functools
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "scripts"
PACKAGE = "moe_atlas"


def _code(path: Path) -> str:
    """Python text of a .py file, or of a notebook's code cells without its % and ! lines."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".ipynb":
        return text
    cells = [cell["source"] for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    lines = "\n".join("".join(source) for source in cells).split("\n")
    return "\n".join(line for line in lines if not line.lstrip().startswith(("%", "!")))


@functools.cache
def imports(path: Path) -> frozenset[str]:
    """Dotted names that a file imports anywhere in it; `from a import b` gives both a and a.b."""
    names = set()
    for node in ast.walk(ast.parse(_code(path), filename=str(path))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = path.relative_to(SCRIPTS).parent.parts
                package = package[: len(package) - node.level + 1]
                base = ".".join([*package, *filter(None, [node.module])])
            names.add(base)
            names.update(f"{base}.{alias.name}" for alias in node.names)
    return frozenset(names)


def _modules(name: str) -> list[Path]:
    """Files that importing the dotted name runs: the package's __init__ on each level, then the module."""
    parts = name.split(".")
    if parts[0] != PACKAGE:
        return []
    files = []
    for depth in range(1, len(parts) + 1):
        base = SCRIPTS.joinpath(*parts[:depth])
        files += [path for path in (base / "__init__.py", base.with_suffix(".py")) if path.is_file()]
    return files


@functools.cache
def sources(program: str) -> tuple[str, ...]:
    """The program (path relative to the repository) and what it imports of the library, as relative paths.

    A program that does not exist is returned alone, so that whoever asks for it says so.
    """
    found, waiting = {}, [ROOT / program]
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found[path] = None
        if path.is_file():
            waiting += [file for name in sorted(imports(path)) for file in _modules(name)]
    return (program, *sorted(path.relative_to(ROOT).as_posix() for path in list(found)[1:]))
