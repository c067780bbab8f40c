"""Table intermediate: the states of a short text as far as a page can show them, from intermediate.safetensors."""

import json
import os
from collections.abc import Iterator

import numpy as np
import polars as pl
from safetensors import SafetensorError, safe_open

from moe_atlas.errors import AtlasError

MOST_TOKENS = 24  # the first ones; the file has all
MOST_RUNS = 128  # of neighbouring neurons


def pooled(states: np.ndarray) -> tuple[np.ndarray, int]:
    """The largest of each run of neighbouring neurons: states (..., m) to (..., runs), and the neurons of a run.

    The largest is that of the largest absolute value, with its sign. There are at most MOST_RUNS runs of equal length,
    the last of them shorter where it has to be; up to MOST_RUNS neurons nothing is pooled.
    """
    width = states.shape[-1]
    length = -(-width // MOST_RUNS)
    runs = -(-width // length)
    padded = np.pad(states, [(0, 0)] * (states.ndim - 1) + [(0, runs * length - width)])
    parts = padded.reshape(*states.shape[:-1], runs, length)
    largest = np.abs(parts).argmax(-1)[..., None]
    return np.take_along_axis(parts, largest, -1)[..., 0], length


def intermediate(path: str | os.PathLike, tokens: pl.DataFrame) -> Iterator[pl.DataFrame]:
    """The table, one frame for each layer; `tokens` are the rows of the table tokens of the same extraction.

    Raises AtlasError when the file is missing or damaged, or of another run.
    """
    shown = tokens.head(MOST_TOKENS)
    try:
        with safe_open(os.fspath(path), framework="numpy") as file:
            metadata = json.loads(file.metadata()["atlas"])
            for name, labels in metadata["labels"].items():
                part = file.get_slice(name)
                if part.get_shape()[0] != len(tokens):
                    raise AtlasError(
                        f"{path}: {name} has {part.get_shape()[0]} tokens and tokens.parquet {len(tokens)}; they are "
                        "of different runs, so extract this model and corpus again."
                    )
                values, length = pooled(part[: len(shown)])
                yield _frame(values, length, labels, shown).with_columns(
                    model=pl.lit(metadata["model"]),
                    corpus=pl.lit(metadata["corpus"]),
                    layer=pl.lit(int(name.removeprefix("layer_"))),
                    site=pl.lit("ffn"),
                )
    except (FileNotFoundError, SafetensorError, TypeError, KeyError, json.JSONDecodeError) as error:
        raise AtlasError(
            f"{path}: this is not a file of intermediate states ({error}); delete it and run the extraction again."
        ) from None


def _frame(values: np.ndarray, length: int, labels: list[str], shown: pl.DataFrame) -> pl.DataFrame:
    token, expert, run = np.indices(values.shape).reshape(3, -1)
    return pl.DataFrame(
        {
            "sequence": shown["sequence"].to_numpy()[token],
            "position": shown["position"].to_numpy()[token],
            "expert": pl.Series(labels, dtype=pl.String)[expert],
            "neuron": run * length,
            "neurons": np.full(values.size, length),
            "value": values.ravel(),
        }
    )
