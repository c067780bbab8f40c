"""Instructions with responses to tune a language model on, and multiple-choice questions to test it with.

A YAML file says for each set where it is, as for tasks of classification. The columns are those of Alpaca (instruction,
input, output) and of MMLU (question, choices, answer, subject):

    most: {train: 0}              # most examples of a set, 0 for all
    sets:
      train: {source: "hf:tatsu-lab/alpaca", revision: COMMIT, split: train}
      shots: {source: "hf:cais/mmlu", revision: COMMIT, subset: all, split: dev}    # answered, before each question
      validation: {source: "hf:cais/mmlu", ...}                                     # for the learning rate
      in-domain: {source: "hf:cais/mmlu", ...}                                      # reported, by subject too
"""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import yaml

from moe_atlas.errors import AtlasError, first_line
from moe_atlas.tuning.datasets import open_set
from moe_atlas.tuning.prompts import LETTERS, prompt, question

_SETS = ("train", "shots", "validation", "in-domain")
_SEED = 0  # of the order: the same whatever the seed of a run


def load_instructions(path: str | Path) -> pl.DataFrame:
    """The columns split, document, text, pair, label and classes of the table emoe_tasks.

    Of train: text is the prompt, pair the response, label null. Of the others: text is the question, pair its subject,
    label the number of the right choice. Instructions, and questions of the validation set, are shuffled once; tests
    stay in the order of their rows. Raises AtlasError with the file, the set and what is wrong.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        sets = content["sets"]
    except (OSError, yaml.YAMLError, TypeError, KeyError) as error:
        raise AtlasError(f"{path}: a file of instructions needs sets ({first_line(error)}); mend the file.") from None
    missing = [name for name in _SETS if name not in sets]
    if missing:
        raise AtlasError(f"{path}: sets lacks {', '.join(missing)}; name a data set for each of {', '.join(_SETS)}.")
    rng, frames = np.random.default_rng(_SEED), []
    for name, values in sets.items():
        frame = (_instructions if name == "train" else _questions)(f"{path}, {name}", values)
        if name in ("train", "validation"):
            frame = frame[rng.permutation(len(frame))]
        most = content.get("most", {}).get(name, 0)
        frames.append((frame.head(most) if most else frame).with_columns(split=pl.lit(name)))
    return pl.concat(frames).with_columns(classes=pl.lit(len(LETTERS), pl.Int64))


def _instructions(place: str, values: dict[str, Any]) -> pl.DataFrame:
    rows = [
        (number, prompt(row["instruction"], row["input"] or ""), row["output"], None)
        for number, row in enumerate(_rows(place, values, ("instruction", "input", "output")))
        if row["output"]
    ]
    return _frame(place, values, rows)


def _questions(place: str, values: dict[str, Any]) -> pl.DataFrame:
    rows = []
    for number, row in enumerate(_rows(place, values, ("question", "choices", "answer", "subject"))):
        choices, answer = row["choices"], row["answer"]
        if len(choices) != len(LETTERS) or answer not in range(len(LETTERS)):
            raise AtlasError(f"{place}: row {number} is not of four choices with an answer from 0 to 3; mend the data.")
        rows.append((number, question(row["question"], choices), row["subject"], float(answer)))
    return _frame(place, values, rows)


def _rows(place: str, values: dict[str, Any], columns: tuple[str, ...]):
    data = open_set(place, values)
    for name in columns:
        if name not in data.column_names:
            raise AtlasError(f"{place}: there is no column {name!r}; the columns are {', '.join(data.column_names)}.")
    return data


def _frame(place: str, values: dict[str, Any], rows: list[tuple]) -> pl.DataFrame:
    """Columns document, text, pair and label of rows (number, text, pair, label)."""
    if not rows:
        raise AtlasError(f"{place}: no row can be used.")
    source = f"{values['source']}#{values.get('split', '')}"
    named = [(f"{source}#{number}", *rest) for number, *rest in rows]
    schema = {"document": pl.String, "text": pl.String, "pair": pl.String, "label": pl.Float64}
    return pl.DataFrame(named, schema=schema, orient="row")
