"""Objectives of data sets that `moe_atlas.moa.prepare` has written as token ids."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl
import torch
from tokenizers import Tokenizer

from moe_atlas.errors import AtlasError
from moe_atlas.files import read_json
from moe_atlas.moa.described import scores
from moe_atlas.moa.objectives import Batch, Causal, Language, Masked
from moe_atlas.moa.pairs import Pairs, Search, Translation
from moe_atlas.moa.ragged import DONE, Ragged
from moe_atlas.moa.settings import Task
from moe_atlas.moa.texts import Texts
from moe_atlas.training.tokenizer import BOS_ID

_BLOCK = 1 << 24  # tokens that are counted together


def translation(task: Task, folder: Path) -> Translation:
    """The pairs in `folder`. The best answer that knows no rule is the source itself.

    Of the task: `batch` sentences or `batch_tokens` tokens a batch, `validation` sentences of a look, `search` as
    Search, `shape` (target, source tokens) that costs are stated for.
    """
    record, tokenizer = _opened(task, folder, "pairs")
    pairs = {name: Pairs(*(Ragged.load(folder, f"{name}.{side}") for side in ("source", "target"))) for name in record}
    texts = {
        name: pl.read_parquet(folder / f"{name}.parquet") for name in record if name not in ("train", "validation")
    }
    references = {name: frame["target"].to_list() for name, frame in texts.items()}
    return Translation(
        tokenizer,
        pairs,
        references,
        scores,
        {name: scores(frame["source"].to_list(), references[name]) for name, frame in texts.items()},
        task.batch,
        task.data.get("batch_tokens", 0),
        task.validation,
        Search(**task.data.get("search", {})),
        tuple(task.data["shape"]) if "shape" in task.data else None,
    )


def _opened(task: Task, folder: Path, kind: str) -> tuple[dict[str, dict], Tokenizer]:
    """What was written of each set, and the tokenizer."""
    record = read_json(folder / DONE)
    if record["kind"] != kind:
        raise AtlasError(
            f"{folder / DONE}: the data are of kind {record['kind']}, and the objective {task.objective} needs {kind}; "
            "name another file as its source."
        )
    return record["counts"], Tokenizer.from_file(str(folder / "tokenizer.json"))


class _Stream(Language):
    """Batches of a stream of token ids in a file: all of it once, from a new place on, before any comes again.

    Each sequence is `<s>` and the next length - 1 tokens; `</s>` stands behind every text.
    """

    def __init__(self, task: Task, folder: Path):
        _, tokenizer = _opened(task, folder, "text")
        self.stream = Ragged.load(folder, "train.text").ids
        self.width = task.length - 1
        size = tokenizer.get_vocab_size()
        counts = np.ones(size)
        for start in range(0, len(self.stream), _BLOCK):
            counts += np.bincount(self.stream[start : start + _BLOCK], minlength=size)
        sets = [self._sequences(Ragged.load(folder, f"{name}.text").ids) for name in ("validation", "test")]
        lengths = {"train": len(self.stream) // self.width, "validation": len(sets[0]), "test": len(sets[1])}
        for name, length in lengths.items():
            if not length:
                raise AtlasError(f"{folder}, {name}: there are fewer tokens than a sequence has; lower `length`.")
        validation = sets[0][: task.validation]
        super().__init__(task, Texts(tokenizer, {}, {}, validation, sets[1], counts / counts.sum()))

    def _sequences(self, stream: np.ndarray) -> torch.Tensor:
        """All of a stream but a rest that fills no sequence, (sequences, length) int64."""
        count = len(stream) // self.width
        body = np.asarray(stream[: count * self.width], np.int64).reshape(count, self.width)
        return torch.from_numpy(np.concatenate([np.full((count, 1), BOS_ID), body], axis=1))

    def batches(self, seed: int) -> Iterator[Batch]:
        """Training batches without end, the same for the same seed."""
        rng, masks = np.random.default_rng(seed), np.random.default_rng([seed, 1])
        while True:
            shift = int(rng.integers(min(self.width, len(self.stream) - self.width + 1)))
            order = rng.permutation((len(self.stream) - shift) // self.width)
            for start in range(0, len(order), self.task.batch):
                places = shift + self.width * order[start : start + self.task.batch]
                rows = np.stack([self.stream[place : place + self.width] for place in places])
                yield self.labelled(self._sequences(rows.reshape(-1)), masks)


class CausalStream(_Stream, Causal):
    """A causal language model of prepared texts."""


class MaskedStream(_Stream, Masked):
    """A masked language model of prepared texts."""
