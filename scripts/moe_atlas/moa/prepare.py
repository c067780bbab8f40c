"""Token ids of data sets that a YAML file names, for translation or for language models, with a tokenizer made of them.

    kind: pairs                     # pairs: sentences with translations; text: texts of a language model
    tokenizer: 36500                # entries of a byte-level BPE made from the training set, special ones included
    tokenizer_rows: 0               # rows of the training set that it is made from, 0 for all
    most: {train: 0}                # most rows of a set, 0 for all
    columns: {source: en, target: de}   # of pairs: keys of the column `translation`; of text: {text: COLUMN}
    longest: 250                    # of pairs: most tokens of a side of a training pair ...
    ratio: 1.5                      # ... and of one side for each token of the other
    sets:
      train: {source: "hf:wmt/wmt14", revision: COMMIT, subset: de-en, split: train}
      validation: {source: "hf:wmt/wmt14", ...}
      test: {source: "hf:wmt/wmt14", ...}                 # and further tests, by any name

Sources are those of the tasks of tuning: hf:OWNER/NAME at a commit, or path:FILE. What is written is read without
memory for all of it.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import polars as pl
import yaml
from tokenizers import Tokenizer

from moe_atlas.errors import AtlasError, first_line
from moe_atlas.files import atomic_path, write_json
from moe_atlas.log import Progress, say
from moe_atlas.moa.ragged import DONE, write_ragged
from moe_atlas.training.tokenizer import EOS_ID, train_tokenizer
from moe_atlas.tuning.datasets import open_set

_TOGETHER = 10_000  # rows that are encoded together
_SIDES = {"pairs": ("source", "target"), "text": ("text",)}


@dataclass(frozen=True)
class DataFile:
    """What the YAML file says. sets: place of each set by name; columns: where each side is found in a row."""

    path: str
    kind: str
    tokenizer: int
    sets: dict[str, dict[str, Any]]
    columns: dict[str, str]
    tokenizer_rows: int = 0
    most: dict[str, int] | None = None
    longest: int = 250
    ratio: float = 1.5

    @property
    def sides(self) -> tuple[str, ...]:
        """source and target, or text."""
        return _SIDES[self.kind]

    def rows(self, data: datasets.Dataset) -> Iterator[tuple[str, ...]]:
        """The texts of each row of a set that has them, blanks at the ends taken off."""
        for row in data:
            values = row["translation"] if self.kind == "pairs" else row
            texts = tuple((values[self.columns[side]] or "").strip() for side in self.sides)
            if all(texts):
                yield texts


def read_data_file(path: str | Path) -> DataFile:
    """AtlasError with what is wrong in the file."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        file = DataFile(path=str(path), **content)
        sides = set(file.sides)
    except (OSError, yaml.YAMLError, TypeError, KeyError) as error:
        raise AtlasError(
            f"{path}: a file of data for MoA has kind (pairs or text), tokenizer, columns and sets "
            f"({first_line(error)}); mend the file."
        ) from None
    if not {"train", "validation", "test"} <= set(file.sets):
        raise AtlasError(f"{path}: sets needs train, validation and test; name a data set for each.")
    if set(file.columns) != sides:
        raise AtlasError(f"{path}: columns names {', '.join(sorted(sides))}; write where each is found.")
    return file


def prepare(path: str | Path, output: Path) -> dict[str, Any]:
    """Write tokenizer.json, the ids of each side of each set, texts of the tests, and last `output`, which is DONE in
    the same folder; return what it says."""
    file, folder = read_data_file(path), output.parent
    if output.name != DONE:
        raise AtlasError(f"{output}: what is written last is called {DONE}; name it so.")
    folder.mkdir(parents=True, exist_ok=True)
    output.unlink(missing_ok=True)
    sets = {name: _open(file, name) for name in file.sets}
    tokenizer = _tokenizer(file, sets["train"])
    with atomic_path(folder / "tokenizer.json") as temporary:
        tokenizer.save(str(temporary))
    counts = {}
    for name, data in sets.items():
        keep = _kept_pair(file) if name == "train" and file.kind == "pairs" else None
        counts[name] = _encode(file, name, data, tokenizer, folder, keep)
        if name != "train":
            texts = pl.DataFrame(list(file.rows(data)), schema=dict.fromkeys(file.sides, pl.String), orient="row")
            with atomic_path(folder / f"{name}.parquet") as temporary:
                texts.write_parquet(temporary)
        say(f"{path}, {name}: " + ", ".join(f"{count} {what}" for what, count in counts[name].items()))
        if not counts[name]["sequences"]:
            raise AtlasError(f"{path}, {name}: no row has a text; mend `columns` or the set.")
    record = {"kind": file.kind, "entries": tokenizer.get_vocab_size(), "sets": file.sets, "counts": counts}
    write_json(output, record)
    return record


def _open(file: DataFile, name: str) -> datasets.Dataset:
    place = f"{file.path}, {name}"
    data = open_set(place, file.sets[name])
    wanted = ["translation"] if file.kind == "pairs" else [file.columns["text"]]
    if missing := [column for column in wanted if column not in data.column_names]:
        raise AtlasError(f"{place}: there is no column {missing[0]!r}; there are {', '.join(data.column_names)}.")
    if file.kind == "pairs" and len(data) and (lacking := set(file.columns.values()) - set(data[0]["translation"])):
        known = ", ".join(data[0]["translation"])
        raise AtlasError(f"{place}: `translation` has no {sorted(lacking)[0]!r}, but {known}; mend `columns`.")
    most = (file.most or {}).get(name, 0)
    return data.select(range(min(most, len(data)))) if most else data


def _tokenizer(file: DataFile, data: datasets.Dataset) -> Tokenizer:
    """One byte-level BPE of all sides, with entries for `<pad>` and `<mask>`."""
    # Rows are read by this program alone, so that threads of the tokenizer are safe.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    rows = data.select(range(min(file.tokenizer_rows, len(data)))) if file.tokenizer_rows else data
    return train_tokenizer((text for texts in file.rows(rows) for text in texts), file.tokenizer, masks=True)


def _kept_pair(file: DataFile) -> Callable[[tuple[int, ...]], bool]:
    def kept(lengths: tuple[int, ...]) -> bool:
        least, most = min(lengths), max(lengths)
        return least > 0 and most <= file.longest and most <= file.ratio * least

    return kept


def _encode(
    file: DataFile,
    name: str,
    data: datasets.Dataset,
    tokenizer: Tokenizer,
    folder: Path,
    keep: Callable[[tuple[int, ...]], bool] | None,
) -> dict[str, int]:
    """Write the ids of all sides of a set in one pass over it; sequences that are kept, left out, and tokens.

    Texts of a language model have `</s>` behind them, so that their ids are one stream.
    """
    end = [EOS_ID] if file.kind == "text" else []
    progress = Progress(len(data), "row")
    left_out = 0

    def encoded() -> Iterator[tuple[list[int], ...]]:
        nonlocal left_out
        for rows in _chunks(file.rows(data), _TOGETHER):
            sides = [tokenizer.encode_batch(list(texts), add_special_tokens=False) for texts in zip(*rows, strict=True)]
            for encodings in zip(*sides, strict=True):
                ids = tuple(encoding.ids + end for encoding in encodings)
                if keep is None or keep(tuple(map(len, ids))):
                    yield ids
                else:
                    left_out += 1
            progress.step(count=len(rows))

    names = [f"{name}.{side}" for side in file.sides]
    sequences, tokens = write_ragged(folder, names, encoded())
    return {"sequences": sequences, "left out": left_out} | dict(zip(file.sides, tokens, strict=True))


def _chunks(rows: Iterable[tuple[str, ...]], size: int) -> Iterator[list[tuple[str, ...]]]:
    chunk: list[tuple[str, ...]] = []
    for row in rows:
        chunk.append(row)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
