"""What models learn, as the trainer asks for it: batches, a validation set, scores of the tests."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import nn

from moe_atlas.moa.settings import Task
from moe_atlas.moa.texts import Texts
from moe_atlas.training.data import Batches
from moe_atlas.training.tokenizer import BOS_ID, EOS_ID, MASK, PAD, UNK_ID

Batch = dict[str, torch.Tensor]
NOT_ASKED = -100  # label of a position whose token is not asked for
_SPECIAL = {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "pad_token_id": None}


@dataclass(frozen=True)
class Score:
    """One measure of a test. chance: what a model that has learned no context is worth; count: tokens or sentences."""

    metric: str
    value: float
    chance: float
    count: int


class Objective(Protocol):
    """special: ids of MoAConfig. unlearned: validation loss (nats a token) of token frequencies alone, over `looked`
    tokens.

    A batch is what the model's forward takes, with labels; the model's task_loss is the mean over those asked for.
    """

    name: str
    tokenizer: Tokenizer
    special: dict[str, int | None]
    unlearned: float
    looked: int
    tests: tuple[str, ...]

    def batches(self, seed: int) -> Iterator[Batch]:
        """Training batches without end, the same for the same seed."""

    def tokens(self, batch: Batch) -> int:
        """Tokens of a batch as training counts them: all of a sequence, those of the target of a translation."""

    def validation(self) -> Iterable[Batch]:
        """The batches of each look, the same each time."""

    def scores(self, model: nn.Module, test: str, device: str = "cpu", precision: str = "float32") -> list[Score]:
        """What a trained model is worth on a test."""

    def shape(self) -> tuple[int, int]:
        """Tokens, and source tokens, of a training sequence."""


def asked(batch: Batch) -> int:
    """Labels of a batch that are asked for."""
    return int((batch["labels"] != NOT_ASKED).sum())


@torch.no_grad()
def mean_loss(
    model: nn.Module, batches: Iterable[Batch], device: str = "cpu", precision: str = "float32"
) -> tuple[float, int]:
    """(nats a token over all batches, tokens), in evaluation mode; the routers' own losses do not count."""
    was_training = model.training
    model.eval()
    total, tokens = 0.0, 0
    for batch in batches:
        moved = {name: value.to(device) for name, value in batch.items()}
        with torch.autocast(device, getattr(torch, precision), enabled=precision != "float32"):
            loss = model(**moved).task_loss
        total += float(loss.double()) * asked(batch)
        tokens += asked(batch)
    model.train(was_training)
    return total / tokens, tokens


def frequency_loss(frequencies: np.ndarray, batches: Iterable[Batch]) -> float:
    """Nats a token of the labels that are asked for under token frequencies (entries,) alone."""
    labels = torch.cat([batch["labels"].flatten() for batch in batches])
    return float(-np.log(frequencies[labels[labels != NOT_ASKED].numpy()]).mean())


class Language(ABC):
    """Language models of packed texts: what causal and masked ones share."""

    name = ""
    special = _SPECIAL
    tests = ("test",)

    def __init__(self, task: Task, texts: Texts):
        self.task, self.texts, self.tokenizer = task, texts, texts.tokenizer
        self.sets = {name: self._fixed(getattr(texts, name)) for name in ("validation", "test")}
        self.unlearned = frequency_loss(texts.frequencies, self.sets["validation"])
        self.looked = sum(map(asked, self.sets["validation"]))

    @abstractmethod
    def labelled(self, ids: torch.Tensor, rng: np.random.Generator) -> Batch:
        """A batch from sequences (batch, length) int64."""

    def _fixed(self, sequences: torch.Tensor) -> list[Batch]:
        rng = np.random.default_rng(0)  # the same for every seed and arm
        return [self.labelled(part, rng) for part in sequences.split(self.task.batch)]

    def batches(self, seed: int) -> Iterator[Batch]:
        """Training batches without end, the same for the same seed."""
        texts = self.texts
        packed = Batches(texts.encoded, texts.mix, self.task.batch, self.task.length, seed)
        rng = np.random.default_rng([seed, 1])
        while True:
            yield self.labelled(packed.next(), rng)

    def tokens(self, batch: Batch) -> int:
        """All tokens of a batch."""
        return batch["input_ids"].numel()

    def validation(self) -> Iterable[Batch]:
        """The batches of each look, the same each time."""
        return self.sets["validation"]

    def scores(self, model: nn.Module, test: str, device: str = "cpu", precision: str = "float32") -> list[Score]:
        """Perplexity of the tokens that are asked for, beside that of token frequencies alone."""
        loss, tokens = mean_loss(model, self.sets[test], device, precision)
        chance = frequency_loss(self.texts.frequencies, self.sets[test])
        return [Score("perplexity", math.exp(loss), math.exp(chance), tokens)]

    def shape(self) -> tuple[int, int]:
        """Tokens of a sequence, and no source."""
        return self.task.length, 0


class Causal(Language):
    """Each token from those before it; `<s>`, which begins every sequence, is not asked for."""

    name = "causal"

    def labelled(self, ids: torch.Tensor, rng: np.random.Generator) -> Batch:
        return {"input_ids": ids, "labels": ids.masked_fill(ids == BOS_ID, NOT_ASKED)}


class Masked(Language):
    """Masked tokens from those around them (Devlin et al. 2019, section 3.1)."""

    name = "masked"

    def __init__(self, task: Task, texts: Texts):
        self.share = task.data.get("mask", 0.15)
        self.mask_id = texts.tokenizer.token_to_id(MASK)
        kept = {UNK_ID, BOS_ID, EOS_ID, self.mask_id, texts.tokenizer.token_to_id(PAD)}
        self.ordinary = np.array([i for i in range(texts.tokenizer.get_vocab_size()) if i not in kept])
        super().__init__(task, texts)

    def labelled(self, ids: torch.Tensor, rng: np.random.Generator) -> Batch:
        """Ask for a share of each sequence's ordinary tokens: 80 % of them hidden, 10 % replaced, 10 % left.

        Special tokens are no ordinary ones. As many of a sequence as the share rounds to, one at least if there is any.
        """
        original = ids.numpy()
        ordinary = np.isin(original, self.ordinary)
        order = np.where(ordinary, rng.random(original.shape), 2.0).argsort(axis=1).argsort(axis=1)
        counts = np.maximum(np.round(self.share * ordinary.sum(1, keepdims=True)), 1)
        chosen = (order < counts) & ordinary
        draw = rng.random(original.shape)
        seen = np.where(chosen & (draw < 0.8), self.mask_id, original)
        replaced = chosen & (draw >= 0.8) & (draw < 0.9)
        seen = np.where(replaced, rng.choice(self.ordinary, original.shape), seen)
        labels = np.where(chosen, original, NOT_ASKED)
        return {"input_ids": torch.from_numpy(seen), "labels": torch.from_numpy(labels)}
