"""Execute a notebook with parameters and convert it to one self-contained HTML file."""

import argparse
import json
import os
import tempfile
from pathlib import Path

from moe_atlas.errors import AtlasError
from moe_atlas.log import Progress, run, say
from moe_atlas.notebooks import convert, declared_parameters, execute, read_parameters

SCRIPTS = Path(__file__).resolve().parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--notebook", required=True, type=Path, help="notebook to run")
    parser.add_argument("--executed", required=True, type=Path, help="executed copy, also left when a cell fails")
    parser.add_argument("--html", required=True, type=Path, help="self-contained HTML of the executed copy")
    parser.add_argument("--parameters", default="{}", help='JSON object, such as {"model": "demo-mixtral"}')
    args = parser.parse_args()

    import nbformat

    if not args.notebook.is_file():
        raise AtlasError(f"{args.notebook}: there is no such notebook.")
    parameters = read_parameters(args.parameters)
    declared = declared_parameters(nbformat.read(args.notebook, as_version=4), args.notebook)
    unknown = sorted(set(parameters) - declared)
    if unknown:
        raise AtlasError(
            f"{args.notebook}: the parameters cell does not declare {', '.join(unknown)}; it declares "
            f"{', '.join(sorted(declared))}."
        )
    progress = Progress(2, "step")
    with tempfile.TemporaryDirectory(prefix="notebook-") as scratch:
        # Kernels that run at the same time share no history or connection file.
        os.environ["IPYTHONDIR"] = os.path.join(scratch, "ipython")
        os.environ["JUPYTER_RUNTIME_DIR"] = os.path.join(scratch, "runtime")
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(SCRIPTS), os.environ.get("PYTHONPATH")]))
        say(f"executing {args.notebook} with {json.dumps(parameters)}")
        execute(args.notebook, args.executed, parameters)
        progress.step("executed")
        convert(args.executed, args.html)
        progress.step("converted")


if __name__ == "__main__":
    run(main)
