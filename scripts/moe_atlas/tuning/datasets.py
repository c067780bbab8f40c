"""A task from data sets that a YAML file names: of the Hub, read with `datasets`, or files on this machine.

The file says for each set where it is, which columns hold the text, the second text of a pair and the label, and what
the values of the label mean:

    classes: 2                    # 0: a regression
    holdout: 0.1                  # share of the training set that becomes the validation set
    most: {train: 0}              # most examples of a set, 0 for all
    sets:
      train: {source: "hf:nyu-mll/glue", revision: COMMIT, subset: rte, split: train, text: sentence1, pair: sentence2}
      in-domain: {source: "hf:nyu-mll/glue", ...}
      shifted-hans: {source: "path:data/hans.parquet", text: premise, pair: hypothesis, label: gold, values: {"0": 0}}

The labels of GLUE's own test sets are hidden: its validation sets are the tests here, and validation is held out.
"""

import re
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import polars as pl
import yaml

from moe_atlas.errors import AtlasError, first_line
from moe_atlas.hub.errors import token

# Of files on this machine. Formats that hold data alone.
_READERS = {".parquet": "parquet", ".csv": "csv", ".json": "json", ".jsonl": "json"}
_SEED = 0  # of what is held out: the same whatever the seed of a run


def load_task(path: str | Path) -> pl.DataFrame:
    """The columns split, document, text, pair, label and classes of the table emoe_tasks.

    Sets are shuffled once, so that a share of them is a random one. Examples without a label (-1) are left out, and so
    are texts of the training set that are in a test. A document is a row of its data set. Raises AtlasError with the
    file, the set and what is wrong.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        sets, classes, holdout = content["sets"], int(content["classes"]), float(content["holdout"])
    except (OSError, yaml.YAMLError, TypeError, KeyError, ValueError) as error:
        raise AtlasError(
            f"{path}: a task needs classes, holdout and sets ({first_line(error)}); mend the file."
        ) from None
    if "train" not in sets or "in-domain" not in sets or not 0 < holdout < 1:
        raise AtlasError(f"{path}: sets needs train and in-domain, and holdout is a share above 0 and below 1.")
    rng, frames = np.random.default_rng(_SEED), {}
    for name, values in sets.items():
        frame = _read(f"{path}, {name}", values, classes)
        frame = frame[rng.permutation(len(frame))]
        most = content.get("most", {}).get(name, 0)
        frames[name] = frame.head(most) if most else frame
    train = frames.pop("train")
    for test in frames.values():
        train = train.join(test, on=["text", "pair"], how="anti", nulls_equal=True, maintain_order="left")
    held = max(1, round(holdout * len(train)))
    frames = {"train": train[held:], "validation": train[:held]} | frames
    return pl.concat(
        frame.with_columns(split=pl.lit(name), classes=pl.lit(classes, pl.Int64)) for name, frame in frames.items()
    )


def _read(place: str, values: dict[str, Any], classes: int) -> pl.DataFrame:
    """Columns document, text, pair and label of one set, in the order of its rows."""
    data = open_set(place, values)
    names = {key: values.get(key, key if key != "pair" else "") for key in ("text", "pair", "label")}
    for name in filter(None, names.values()):
        if name not in data.column_names:
            raise AtlasError(f"{place}: there is no column {name!r}; the columns are {', '.join(data.column_names)}.")
    meaning = {str(key): value for key, value in values.get("values", {}).items()}
    labels = [_label(place, value, meaning) for value in data[names["label"]]]
    pairs = list(data[names["pair"]]) if names["pair"] else [None] * len(data)
    documents = [f"{values['source']}#{values.get('split', '')}#{row}" for row in range(len(data))]
    frame = pl.DataFrame(
        {"document": documents, "text": list(data[names["text"]]), "pair": pairs, "label": labels},
        schema={"document": pl.String, "text": pl.String, "pair": pl.String, "label": pl.Float64},
    )
    frame = frame.filter(pl.col("label").is_not_null(), pl.col("text").is_not_null())
    if classes:
        frame = frame.filter(pl.col("label") != -1)
        wrong = frame.filter(~pl.col("label").is_in([float(i) for i in range(classes)]))
        if len(wrong):
            raise AtlasError(f"{place}: the label {wrong['label'][0]:g} is none of 0 to {classes - 1}; mend `values`.")
    if not len(frame):
        raise AtlasError(f"{place}: no row has a text and a label.")
    return frame


def _label(place: str, value: Any, meaning: dict[str, int]) -> float | None:
    """A label as a number. Where the file says what values mean, one that it does not name is left out."""
    if meaning:
        return None if str(value) not in meaning else float(meaning[str(value)])
    try:
        return None if value is None else float(value)
    except (TypeError, ValueError):
        raise AtlasError(f"{place}: the label {value!r} is no number; say under `values` what it means.") from None


def open_set(place: str, values: dict[str, Any]) -> datasets.Dataset:
    """The rows of one set."""
    scheme, _, locator = str(values.get("source", "")).partition(":")
    try:
        if scheme == "hf":
            if not re.fullmatch("[0-9a-f]{40}", values.get("revision", "")):
                raise AtlasError(f"{place}: an hf: source needs its revision, a commit of 40 hex digits.")
            return datasets.load_dataset(
                locator, values.get("subset"), split=values["split"], revision=values["revision"], token=token()
            )
        if scheme == "path":
            files = [Path(locator)]
            if files[0].is_dir():
                files = sorted(file for file in files[0].iterdir() if file.suffix in _READERS)
            if not files or files[0].suffix not in _READERS:
                raise AtlasError(f"{place}: {locator} holds no {', '.join(_READERS)}; name a file or a folder of some.")
            return datasets.load_dataset(
                _READERS[files[0].suffix], data_files=[str(file) for file in files], split="train"
            )
    except (OSError, ValueError, KeyError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise AtlasError(f"{place}: the data set cannot be read ({first_line(error)}).") from None
    raise AtlasError(f"{place}: source is hf:OWNER/NAME or path:FILE.")
