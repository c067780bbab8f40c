"""Running a notebook with papermill and turning the executed copy into one HTML file."""

import ast
import json
from pathlib import Path

from moe_atlas.errors import AtlasError
from moe_atlas.files import atomic_path
from moe_atlas.pages import page


def declared_parameters(notebook, path: Path) -> set[str]:
    """Names assigned in the cell tagged `parameters`. Papermill would only log that there is none."""
    tagged = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    if len(tagged) != 1 or tagged[0].cell_type != "code":
        raise AtlasError(f"{path}: {len(tagged)} cells are tagged `parameters`; tag exactly one code cell.")
    names = set()
    for statement in ast.parse(tagged[0].source).body:
        targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
        names.update(target.id for target in targets if isinstance(target, ast.Name))
    return names


def read_parameters(text: str) -> dict:
    """Parameters from the command line: a JSON object."""
    try:
        parameters = json.loads(text)
    except json.JSONDecodeError as error:
        raise AtlasError(
            f"--parameters: this is not valid JSON ({error}); give an object of names and values."
        ) from None
    if not isinstance(parameters, dict):
        raise AtlasError('--parameters: give a JSON object of names and values, such as {"model": "demo-mixtral"}.')
    return parameters


def execute(path: Path, executed: Path, parameters: dict) -> None:
    """Run the notebook; `executed` is written cell by cell and stays when a cell fails.

    Raises AtlasError naming the executed copy and the first failing cell.
    """
    import nbformat
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    executed.parent.mkdir(parents=True, exist_ok=True)
    executed.unlink(missing_ok=True)  # an older copy must not pass for this run's
    try:
        papermill.execute_notebook(
            str(path),
            str(executed),
            parameters=parameters,
            kernel_name="python3",
            language="python",  # editors drop it from a notebook's metadata
            progress_bar=False,
            start_timeout=300,
        )
    except PapermillExecutionError as error:
        raise AtlasError(
            f"{executed}: cell {error.cell_index} failed with {error.ename}: {_one_line(error.evalue)}; open this copy "
            "to read why."
        ) from None
    except DeadKernelError:
        raise AtlasError(f"{executed}: the kernel died while a cell ran, often for lack of memory.") from None
    done = nbformat.read(executed, as_version=4)
    failed = [cell for cell in done.cells if any(out.output_type == "error" for out in cell.get("outputs", []))]
    if failed:  # papermill does not notice every failure
        raise AtlasError(f"{executed}: a cell ended in an error; open this copy to read why.")


def convert(executed: Path, html: Path) -> None:
    """The executed notebook as one HTML file: text and outputs, without code, scripts or anything fetched."""
    import nbformat
    from nbconvert import HTMLExporter

    exporter = HTMLExporter(template_name="basic", exclude_input=True, exclude_output_prompt=True, anchor_link_text=" ")
    notebook = nbformat.read(executed, as_version=4)
    body, _ = exporter.from_notebook_node(notebook)
    note = f'<p class="quiet">The code is in <a href="{executed.name}">{executed.name}</a>.</p>'
    with atomic_path(html) as temporary:
        temporary.write_text(page(html.stem, body + note), encoding="utf-8")


def _one_line(text: str) -> str:
    return " ".join(text.split())
