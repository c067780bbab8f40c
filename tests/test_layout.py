"""The program keeps its shape: imports point one way, rules know no model, light code stays light."""

import ast
import csv
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ROOT / "scripts" / "moe_atlas"

# A part may import the parts named here, and the ground floor, which imports nothing but itself.
GROUND = {"errors", "files", "log", "tables", "memory", "__init__"}
ALLOWED = {
    "accumulate": set(),
    "budget": set(),
    "router_rule": set(),
    "text_index": set(),
    "choices": {"text_index"},
    "sheets": set(),
    "sources": set(),
    "hub": {"checkpoints"},
    "corpora": {"hub"},
    "tokens": set(),
    "checkpoints": set(),
    "architectures": {"checkpoints"},
    "spill": set(),
    "exact": set(),
    "merge": {"exact"},
    "parts": {"merge", "record"},
    "record": {"states"},
    "resume": {"sources"},
    "layerwise": {"architectures", "checkpoints", "stream"},
    "layer_weights": {"architectures", "budget", "checkpoints"},
    "stream": {"architectures", "budget", "checkpoints", "layer_weights", "spill"},
    "manifest": {"architectures", "checkpoints", "stream"},
    "chunk": {"accumulate"},
    "states": {"accumulate", "chunk"},
    "recorders": {"accumulate", "choices", "chunk", "router_rule", "text_index"},
    "probe": {
        *("architectures", "budget", "checkpoints", "choices", "chunk", "cross_ranks"),
        *("merge", "record", "recorders", "resume", "router_rule", "states", "stream", "text_index"),
    },
    "extraction": {"behavioral", "checkpoints", "record", "tokens"},
    "cross_ranks": {"chunk"},
    "devices": set(),
    "scan": set(),
    "claims": {"parametric", "sheets"},
    "moa": {"architectures", "claims", "corpora", "sheets", "training", "tuning"},
    "modularity": {"behavioral", "emoe", "probe", "stream", "text_index", "tokens"},
    "parallel": set(),
    "parametric": {"architectures", "parallel"},
    "behavioral": set(),
    "emoe": {"architectures", "checkpoints", "stream"},
    "training": {"architectures", "corpora"},
    "tuning": {"claims", "corpora", "emoe", "hub", "sheets", "tokens", "training"},
    "plotting": {"pages", "parametric"},
    "heads": {
        *("architectures", "behavioral", "checkpoints", "choices", "probe", "stream", "text_index", "tokens"),
    },
    "pages": set(),
    "index": {"pages", "plotting"},
    "notebooks": {"pages"},
}


def part_of(path: Path) -> str:
    """The folder or module of the library that a file belongs to."""
    return path.relative_to(LIBRARY).parts[0].removesuffix(".py")


def imported_parts(path: Path) -> set[str]:
    """Parts of the library that a file imports anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "moe_atlas":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("moe_atlas."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("moe_atlas.")}
    return found


@pytest.mark.parametrize("path", sorted(LIBRARY.rglob("*.py")), ids=lambda path: str(path.relative_to(LIBRARY)))
def test_imports_point_one_way(path):
    part = part_of(path)
    allowed = GROUND if part in GROUND else GROUND | ALLOWED[part] | {part}
    assert imported_parts(path) - {"__version__"} <= allowed


def test_the_library_knows_nothing_of_snakemake():
    assert not [path for path in LIBRARY.rglob("*.py") if "import snakemake" in path.read_text()]


def test_rules_know_no_model_and_no_family_by_name():
    with (ROOT / "config" / "models.tsv").open() as sheet:
        names = {row["model"] for row in csv.DictReader(sheet, delimiter="\t")}
    families = {"mixtral", "mistral", "deepseek", "grok", "olmoe", "jetmoe"}
    rules = [ROOT / "workflow" / "Snakefile", *(ROOT / "workflow" / "rules").glob("*.smk")]
    for path in rules:
        text = path.read_text().lower()
        assert not [name for name in names | families if name in text], path


def test_each_function_of_the_rules_is_written_once():
    """The one that is included last would silently come first."""
    texts = [path.read_text() for path in sorted((ROOT / "workflow" / "rules").glob("*.smk"))]
    names = re.findall(r"^def (\w+)", "\n".join(texts), re.MULTILINE)
    assert sorted(names) == sorted(set(names))


@pytest.mark.parametrize(
    "module",
    [
        *("sheets", "corpora", "tables", "behavioral.tables", "plotting.registry", "training.recipes"),
        *("tuning.settings", "tuning.tasks", "tuning.arms"),
        *("moa.settings", "moa.plateau", "moa.differences"),
        *("moa.language", "moa.translation", "moa.prepare", "moa.described"),
    ],
)
def test_light_modules_do_not_load_torch(module):
    code = f"import sys; import moe_atlas.{module}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT / "scripts").returncode == 0


@pytest.mark.parametrize("path", sorted((ROOT / "scripts").glob("*.py")), ids=lambda path: path.name)
def test_every_program_says_what_it_does(path):
    done = subprocess.run([sys.executable, path, "--help"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "usage:" in done.stdout
    assert len(path.read_text().splitlines()) <= 120


def test_files_are_small_enough_to_read():
    limits = {"workflow/Snakefile": 70, "workflow/rules/common.smk": 200}
    for path in [ROOT / "workflow" / "Snakefile", *(ROOT / "workflow" / "rules").glob("*.smk")]:
        name = str(path.relative_to(ROOT))
        assert len(path.read_text().splitlines()) <= limits.get(name, 150), name
    for path in [*LIBRARY.rglob("*.py"), *(ROOT / "tests").glob("*.py")]:
        assert len(path.read_text().splitlines()) <= 400, path
