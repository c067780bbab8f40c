"""Each rule's environment holds what its program imports, at the locked versions, and nothing else."""

import ast
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import yaml
from workflow_runs import ROOT

from moe_atlas.sources import imports, sources

# Where the import has another name than the package.
DISTRIBUTIONS = {"lap": "lapx", "sklearn": "scikit-learn", "yaml": "pyyaml"}
# Packages that nobody imports by name.
NEEDED_UNSEEN = {"notebooks": {"ipykernel": "the kernel that papermill starts"}}
RULES = ROOT / "workflow" / "rules"
ENVIRONMENTS = sorted((ROOT / "workflow" / "envs").glob("*.yaml"))


def pins(lines) -> dict[str, str]:
    """Package -> version of exact pins. Anything that is not an exact pin fails."""
    found = {}
    for line in lines:
        match = re.fullmatch(r"([a-z0-9-]+)==([0-9][0-9a-z.]*)", line.strip().lower().replace("_", "-"))
        assert match, f"{line!r} is not an exact pin"
        found[match[1]] = match[2]
    return found


def requirements(name: str) -> list[str]:
    text = (ROOT / name).read_text(encoding="utf-8")
    return [line.split("#")[0].strip() for line in text.splitlines() if line.split("#")[0].strip()]


LOCK = pins(requirements("requirements.txt"))


def pip_pins(path: Path) -> dict[str, str]:
    """Pins of a conda file, after checking that its form is the agreed one."""
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert content["channels"] == ["conda-forge", "nodefaults"]
    python, pip, packages = content["dependencies"]
    assert (python, pip) == ("python=3.11", "pip")
    return pins(packages["pip"])


def third_party(program: str) -> set[str]:
    """Packages that a program imports, itself or through the library."""
    names = {name.split(".")[0] for path in sources(program) for name in imports(ROOT / path)}
    names -= {"moe_atlas", ""} | set(sys.stdlib_module_names)
    return {DISTRIBUTIONS.get(name, name).lower().replace("_", "-") for name in names}


def programs_of_environments() -> dict[str, set[str]]:
    """Environment -> scripts and notebooks of the rules that name it."""
    programs = defaultdict(set)
    for path in RULES.glob("*.smk"):
        for block in re.split(r"(?m)^(?= *rule\b.*:$)", path.read_text(encoding="utf-8"))[1:]:
            found = set(re.findall(r"(?:scripts|notebooks)/\w+\.(?:py|ipynb)", block))
            if "notebooks/{notebook}.ipynb" in block:
                notebooks = re.search(r'notebook="([a-z|]+)"', block)[1].split("|")
                found |= {f"notebooks/{name}.ipynb" for name in notebooks}
            for environment in re.findall(r"envs/(\w+)\.yaml", block):
                programs[environment] |= found
    return programs


def test_every_environment_is_named_by_a_rule_and_the_other_way_round():
    assert {path.stem for path in ENVIRONMENTS} == set(programs_of_environments())


@pytest.mark.parametrize("path", ENVIRONMENTS, ids=lambda path: path.stem)
def test_an_environment_holds_what_its_programs_import(path):
    programs = programs_of_environments()[path.stem]
    assert programs and all((ROOT / program).is_file() for program in programs)
    needed = set().union(*(third_party(program) for program in programs)) | set(NEEDED_UNSEEN.get(path.stem, ()))
    held = pip_pins(path)
    assert set(held) == needed
    assert held == {name: LOCK[name] for name in held}


def test_only_the_environments_that_need_it_hold_torch():
    with_torch = {path.stem for path in ENVIRONMENTS if "torch" in pip_pins(path)}
    assert with_torch == {"training", "checkpoints", "emoe", "mechanism", "hub", "extraction", "tuning", "moa"}


def test_the_conda_environment_is_the_lock():
    assert pip_pins(ROOT / "environment.yml") == LOCK


def test_the_lock_holds_every_direct_requirement_and_nothing_of_one_machine():
    for line in requirements("requirements.in"):
        name, _, version = line.partition("==")
        name = re.match(r"[A-Za-z0-9-]+", name)[0].lower()
        assert name in LOCK and (not version or LOCK[name] == version), line
    text = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    assert not re.search(r"(?m)^(-|nvidia|triton|cuda|[^#].*(://|@|--hash|\+cpu))", text)


def test_direct_requirements_are_what_is_imported():
    files = [*ROOT.glob("scripts/**/*.py"), *ROOT.glob("tests/*.py"), *ROOT.glob("notebooks/*.ipynb")]
    local = {
        "moe_atlas",
        "benchmarks",
        "",
        *(path.stem for folder in ("scripts", "tests") for path in ROOT.glob(f"{folder}/*.py")),
    } | set(sys.stdlib_module_names)
    imported = {name.split(".")[0] for path in files for name in imports(path)} - local
    imported = {DISTRIBUTIONS.get(name, name).lower().replace("_", "-") for name in imported}
    not_imported = {
        "snakemake": "a command",
        "snakefmt": "a command",
        "ruff": "a command",
        "pytest-xdist": "an option of pytest, in the Makefile",
        "ipykernel": NEEDED_UNSEEN["notebooks"]["ipykernel"],
        "pandas": "bounded for Snakemake",
        "soupsieve": "bounded for the Python of Debian 12",
        "seaborn": "for who draws more in the notebooks",
    }
    direct = {re.match(r"[A-Za-z0-9-]+", line)[0].lower() for line in requirements("requirements.in")}
    assert imported <= direct
    assert direct - imported <= set(not_imported)


@pytest.mark.parametrize("module", ["sheets", "sources", "corpora.demo", "plotting.registry", "training.recipes"])
def test_what_the_rules_import_is_light(module):
    """A dry run must not wait for torch or matplotlib."""
    heavy = ("torch", "transformers", "matplotlib", "pandas")
    code = f"import sys, moe_atlas.{module}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "scripts", capture_output=True, text=True, check=True
    )
    assert ast.literal_eval(done.stdout) == []


def test_sources_follow_imports_through_the_library():
    found = sources("scripts/prepare_corpus.py")
    assert found[0] == "scripts/prepare_corpus.py"
    assert {"scripts/moe_atlas/__init__.py", "scripts/moe_atlas/corpora/demo.py", "scripts/moe_atlas/errors.py"} <= set(
        found
    )
    assert "scripts/moe_atlas/tables/__init__.py" not in found
    assert sources("scripts/no_such_program.py") == ("scripts/no_such_program.py",)
