"""The configuration and the two sheets, checked field by field against workflow/schemas/.

Every fault is an AtlasError of one sentence: file, line, id, column, what is wrong, how to mend it.
Nothing here imports torch, polars or Snakemake.
"""

import csv
import difflib
import functools
import hashlib
import io
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import yaml

from moe_atlas.errors import AtlasError

SCHEMAS = Path(__file__).resolve().parents[2] / "workflow" / "schemas"
CHECKPOINTS = "results/checkpoints"

# What of a checkpoint folder decides its results: the weights and the tokenizer.
_CHECKPOINT_SUFFIXES = (".safetensors", ".bin", ".json", ".model")


_COMMIT = re.compile("[0-9a-f]{40}")


def _split(source: str) -> tuple[str, str]:
    scheme, _, locator = source.partition(":")
    return scheme, locator


@dataclass(frozen=True)
class Model:
    """One enabled row of the model sheet, cells typed, defaults filled in."""

    model: str
    source: str
    revision: str
    dense_reference: str  # id of another enabled row, or ""
    series: str  # what revisions of one model share, or ""
    emoe_experts: int  # this and the next five: of an emoe: row
    emoe_top_k: int
    emoe_layers: str  # "20,22", or "" for all
    emoe_score: str
    emoe_split: str
    emoe_seed: int
    matching_layers: str  # "0,5,10", or "" for evenly spaced ones
    dtype: str
    gpus: int
    mem_mb: int
    runtime: int  # minutes
    keep: bool
    enabled: bool
    notes: str

    @property
    def recipe(self) -> str:
        """Recipe of a demo: row, "" for any other."""
        scheme, locator = _split(self.source)
        return locator if scheme == "demo" else ""

    @property
    def repository(self) -> str:
        """OWNER/NAME of an hf: row, "" for any other."""
        scheme, locator = _split(self.source)
        return locator if scheme == "hf" else ""

    @property
    def dense(self) -> str:
        """Id of the dense row that an emoe: row is made from, "" for any other."""
        scheme, locator = _split(self.source)
        return locator if scheme == "emoe" else ""

    @property
    def directory(self) -> str:
        """Folder of the checkpoint, as written in the sheet or relative to the repository; "" for an hf: row."""
        scheme, locator = _split(self.source)
        made = {"demo": locator, "emoe": self.model}
        return f"{CHECKPOINTS}/{made[scheme]}" if scheme in made else locator if scheme == "path" else ""


@dataclass(frozen=True)
class Corpus:
    """One row of the corpus sheet, cells typed, defaults filled in."""

    corpus: str
    source: str
    revision: str  # this and the next three: of an hf: row
    subset: str  # "": the only or default one
    split: str
    column: str
    kind: str
    rule: str
    start_at: str  # a line of the source, "" for its beginning
    max_sequences: int  # 0: all
    parts: int  # jobs of one pass, above 1 for a long corpus only
    notes: str

    @property
    def file(self) -> str:
        """Path of a file: row, "" for any other."""
        scheme, locator = _split(self.source)
        return locator if scheme == "file" else ""

    @property
    def repository(self) -> str:
        """OWNER/NAME of an hf: row, "" for any other."""
        scheme, locator = _split(self.source)
        return locator if scheme == "hf" else ""


@functools.cache
def schema(name: str) -> dict:
    """JSON schema of this name (`config` or a sheet), as a dict."""
    return yaml.safe_load((SCHEMAS / f"{name}.schema.yaml").read_text(encoding="utf-8"))


def suggest(name: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def _fault(error: jsonschema.ValidationError) -> str:
    """What is wrong with one value and how to mend it, as the last part of a sentence."""
    value, rules = error.instance, error.schema
    if error.validator == "enum":
        allowed = ", ".join(rules["enum"])
        return f"{value!r} is not one of {allowed}{suggest(str(value), rules['enum'])}; write one of these"
    if error.validator == "type":
        names = {"integer": "a whole number", "boolean": "true or false", "number": "a number", "string": "a text"}
        wanted = names[rules["type"]]
        return f"{value!r} is not {wanted}; " + rules.get("x-mend", f"write {wanted}")
    if error.validator in ("minimum", "exclusiveMinimum", "maximum"):
        sides = {"minimum": "below", "exclusiveMinimum": "not above", "maximum": "above"}
        bound = error.validator_value
        return f"{value} is {sides[error.validator]} {bound}; " + rules.get("x-mend", f"write a number from {bound}")
    return f"{value!r} is not allowed here; {rules['x-mend']}"


def load_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with defaults filled in: models, corpora (paths), seed, demo_steps_factor.

    Raises AtlasError on an unknown key or a value that the schema does not allow.
    """
    properties = schema("config")["properties"]
    for key in config:
        if key not in properties:
            raise AtlasError(
                f"config, key {key}: there is no such key{suggest(str(key), properties)}; "
                f"the keys are {', '.join(properties)}."
            )
    # Snakemake reads True on the command line as a truth value, and true as a text.
    words = {"true": True, "false": False}
    config = {
        key: words.get(value, value) if properties[key]["type"] == "boolean" and isinstance(value, str) else value
        for key, value in config.items()
    }
    errors = jsonschema.Draft202012Validator(schema("config")).iter_errors(config)
    for error in errors:
        raise AtlasError(f"config, key {error.path[0]}: {_fault(error)}.")
    defaults = {key: rules["default"] for key, rules in properties.items()}
    return defaults | config


def _cells(path: str | Path) -> list[tuple[int, list[str]]]:
    """(line, cells) of each line that is not empty. A byte-order mark and any line ending are taken."""
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise AtlasError(f"{path}: there is no such file; name the sheet in config/config.yaml.") from None
    except OSError as error:
        raise AtlasError(f"{path}: the sheet cannot be read ({error.strerror}); name a file that can.") from None
    except UnicodeDecodeError:
        raise AtlasError(f"{path}: the sheet is not UTF-8 text; save it as tab-separated UTF-8.") from None
    reader = csv.reader(io.StringIO(text, newline=""), delimiter="\t", strict=True)
    lines, start = [], 1
    try:
        for cells in reader:
            cells = [cell.strip() for cell in cells]
            if any(cells):
                lines.append((start, cells))
            start = reader.line_num + 1
    except csv.Error as error:
        raise AtlasError(f"{path}, line {start}: the line cannot be read ({error}); mend its quotes.") from None
    return lines


def _typed(cell: str, rules: Mapping[str, Any]) -> Any:
    """The cell as its column's type; a cell that is no such value stays text and fails the schema."""
    if rules["type"] == "integer":
        return int(cell) if cell.removeprefix("-").isascii() and cell.removeprefix("-").isdigit() else cell
    if rules["type"] == "number":
        number = re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", cell, re.ASCII)
        return float(cell) if number else cell
    if rules["type"] == "boolean":
        return {"true": True, "false": False}.get(cell.lower(), cell)
    return cell


def load_rows(path: str | Path, name: str) -> list[tuple[str, dict[str, Any]]]:
    """(place, row) of each line; `place` begins every error about it. The first column is the id."""
    rules = schema(name)
    properties, required = rules["properties"], rules["required"]
    identifier = next(iter(properties))
    lines = _cells(path)
    if not lines:
        raise AtlasError(f"{path}: the sheet is empty; its first line names the columns {', '.join(properties)}.")
    (header_line, header), *lines = lines
    place = f"{path}, line {header_line}"
    for column in header:
        if column not in properties:
            raise AtlasError(
                f"{place}, column {column!r}: there is no such column{suggest(column, properties)}; "
                f"the columns are {', '.join(properties)}, separated by tabs."
            )
        if header.count(column) > 1:
            raise AtlasError(f"{place}, column {column}: the column is there twice; remove one.")
    for column in required:
        if column not in header:
            raise AtlasError(f"{place}, column {column}: the column is missing; add it, separated by a tab.")
    if not lines:
        raise AtlasError(f"{path}: the sheet has columns but no rows; add one.")
    validator = jsonschema.Draft202012Validator(rules)
    rows: list[tuple[str, dict[str, Any]]] = []
    seen: dict[tuple, int] = {}
    key = rules.get("x-key", [identifier])  # columns that tell rows apart
    for line, cells in lines:
        id_column = header.index(identifier)
        row_id = cells[id_column] if id_column < len(cells) else ""
        place = f"{path}, line {line} ({row_id})"
        if len(cells) != len(header):
            raise AtlasError(
                f"{place}: the line has {len(cells)} fields and the header {len(header)}; "
                "separate fields by one tab each."
            )
        row = {column: rules["default"] for column, rules in properties.items() if "default" in rules}
        for column, cell in zip(header, cells, strict=True):
            if cell:
                row[column] = _typed(cell, properties[column])
            elif column in required:
                raise AtlasError(f"{place}, column {column}: the cell is empty; fill it in.")
        errors = sorted(validator.iter_errors(row), key=lambda error: list(properties).index(error.path[0]))
        if errors:
            raise AtlasError(f"{place}, column {errors[0].path[0]}: {_fault(errors[0])}.")
        if (own := tuple(row[column] for column in key)) in seen:
            raise AtlasError(
                f"{place}, column {identifier}: the id is already that of line {seen[own]}; give each row its own."
            )
        seen[own] = line
        rows.append((place, row))
    return rows


def _check_model_source(place: str, model: Model, recipes: Collection[str]) -> None:
    """An enabled row's checkpoint can be made or fetched, or is there."""
    row, place = place, f"{place}, column source"
    scheme, locator = _split(model.source)
    if scheme == "demo" and locator not in recipes:
        raise AtlasError(
            f"{place}: there is no recipe {locator}{suggest(locator, recipes)}; the recipes are {', '.join(recipes)}."
        )
    if scheme == "hf" and not _COMMIT.fullmatch(model.revision):
        raise AtlasError(
            f"{row}, column revision: {model.revision!r} is not a commit of 40 hex digits; "
            f"take one from https://huggingface.co/{locator}/commits/main."
        )
    if scheme != "hf" and not model.keep:
        raise AtlasError(f"{row}, column keep: only an hf: row can be fetched, used and deleted; write true.")
    if scheme == "path":
        if not Path(locator).is_dir():
            raise AtlasError(f"{place}: there is no folder {locator}; write the folder that holds config.json.")
        if not (Path(locator) / "config.json").is_file():
            raise AtlasError(
                f"{place}: the folder {locator} has no config.json; "
                "write the folder of a checkpoint in the Hub's format."
            )


def _check_derived(place: str, model: Model, recipes: Collection[str]) -> None:
    """An emoe: row says how its experts are made, and no other row does."""
    rules = schema("models")["properties"]
    if not model.dense:
        for column in (name for name in rules if name.startswith("emoe_")):
            if getattr(model, column) != rules[column]["default"]:
                raise AtlasError(f"{place}, column {column}: only an emoe: row has a value here; empty the cell.")
        return
    if model.model in recipes:
        raise AtlasError(f"{place}, column model: the id is that of a demo recipe; give an emoe: row another one.")
    for column in ("emoe_experts", "emoe_top_k"):
        if getattr(model, column) < 1:
            raise AtlasError(
                f"{place}, column {column}: an emoe: row needs a number from 1; {rules[column]['x-mend']}."
            )
    if model.emoe_top_k > model.emoe_experts:
        raise AtlasError(
            f"{place}, column emoe_top_k: {model.emoe_top_k} are more than the {model.emoe_experts} experts there are; "
            "write as many or fewer."
        )


def _check_named_rows(place: str, model: Model, ids: Collection[str], models: Mapping[str, Model]) -> None:
    """The rows that this one names are there, enabled, and have weights that stay."""
    for column, name, otherwise in (
        ("source", model.dense, ""),
        ("dense_reference", model.dense_reference, " or leave the cell empty"),
    ):
        where = f"{place}, column {column}"
        if not name:
            continue
        if name == model.model:
            own = "cannot be made from itself" if column == "source" else "cannot be its own reference"
            raise AtlasError(f"{where}: a model {own}; name another row{otherwise}.")
        if name not in ids:
            raise AtlasError(f"{where}: there is no row {name}{suggest(name, ids)}; add it{otherwise}.")
        if name not in models:
            raise AtlasError(f"{where}: the row {name} is not enabled; enable it{otherwise}.")
        if not models[name].keep:
            raise AtlasError(f"{where}: the row {name} has keep false, and its weights are wanted; write true there.")
    if model.dense and models[model.dense].dense:
        raise AtlasError(f"{place}, column source: the row {model.dense} is an emoe: row itself; name a dense one.")


def load_models(path: str | Path, recipes: Collection[str]) -> dict[str, Model]:
    """The enabled rows of the model sheet by id, in the order of the sheet.

    `recipes` are the names that a demo: source may have. Raises AtlasError on the first fault.
    """
    rows = [(place, Model(**row)) for place, row in load_rows(path, "models")]
    models = {model.model: model for _, model in rows if model.enabled}
    ids = [model.model for _, model in rows]
    for place, model in rows:
        if not model.enabled:
            continue
        _check_model_source(place, model, recipes)
        _check_derived(place, model, recipes)
        _check_named_rows(place, model, ids, models)
    if not models:
        raise AtlasError(f"{path}: no row is enabled; set enabled to true in one.")
    return models


def _check_data_set(place: str, corpus: Corpus) -> None:
    """An hf: row says what of the data set is read, and no other row does."""
    if not corpus.repository:
        for column in ("revision", "subset", "split", "column"):
            if getattr(corpus, column) != schema("corpora")["properties"][column]["default"]:
                raise AtlasError(f"{place}, column {column}: only an hf: row has a {column}; empty the cell.")
        return
    page = f"https://huggingface.co/datasets/{corpus.repository}"
    if not corpus.revision:
        raise AtlasError(f"{place}, column revision: an hf: row names a commit; take one from {page}/commits/main.")
    if not corpus.split:
        raise AtlasError(f"{place}, column split: an hf: row names a split, such as test; {page} shows its splits.")


def load_corpora(path: str | Path, names: Collection[str]) -> dict[str, Corpus]:
    """The rows of the corpus sheet by id, in the order of the sheet.

    `names` are those that a demo: source may have. Raises AtlasError on the first fault.
    """
    corpora = {}
    for place, row in load_rows(path, "corpora"):
        corpus = Corpus(**row)
        column = f"{place}, column source"
        scheme, locator = _split(corpus.source)
        if scheme == "demo" and locator not in names:
            raise AtlasError(
                f"{column}: there is no demo text {locator}{suggest(locator, names)}; they are {', '.join(names)}."
            )
        _check_data_set(place, corpus)
        if scheme == "file" and not Path(locator).is_file():
            raise AtlasError(f"{column}: there is no file {locator}; write the path of a .txt or .parquet file.")
        if corpus.parts > 1 and corpus.kind != "long":
            raise AtlasError(
                f"{place}, column parts: only a long corpus can be dealt to several jobs; write 1 or empty the cell."
            )
        corpora[corpus.corpus] = corpus
    return corpora


def fingerprint(directory: str | Path) -> str:
    """Names and sizes of the weight and tokenizer files in a folder, as 16 hex digits.

    Times and the folder's own path do not enter: a copied or moved checkpoint has the same one.
    """
    listing = sorted(
        (path.name, path.stat().st_size)
        for path in Path(directory).iterdir()
        if path.suffix in _CHECKPOINT_SUFFIXES and path.is_file()
    )
    return hashlib.sha256(repr(listing).encode()).hexdigest()[:16]
