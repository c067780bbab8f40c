"""The objective of translation: batches of pairs of token sequences, and scores of a model's translations."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedModel

from moe_atlas.moa.decoding import translate
from moe_atlas.moa.objectives import NOT_ASKED, Batch, Score, asked, frequency_loss, mean_loss
from moe_atlas.moa.ragged import Ragged, batches_by_length
from moe_atlas.training.tokenizer import BOS, EOS, PAD

_SPECIAL = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}


@dataclass(frozen=True)
class Pairs:
    """Source and target of each sentence as token ids without special tokens."""

    source: Ragged
    target: Ragged

    def lengths(self) -> np.ndarray:
        """Of each pair the longer of the two, with its end or begin token."""
        return np.maximum(self.source.lengths, self.target.lengths) + 1


@dataclass(frozen=True)
class Search:
    """How translations are searched for (see `moe_atlas.moa.decoding.translate`)."""

    beams: int = 1
    length_penalty: float = 0.6
    batch: int = 128


@dataclass
class Translation:
    """The objective `translation` of moe_atlas.moa.objectives.

    pairs: train, validation and the tests. references: of each test the right translations as text. measure: bleu and
    exact of (answers, references). chances: of each test bleu and exact of the best answer that follows no rule, or
    null. batch: sentences of a batch; batch_tokens: instead, tokens of one, padding included. validated: most
    sentences that a look at the validation set reads.
    """

    tokenizer: Tokenizer
    pairs: dict[str, Pairs]
    references: dict[str, list[str]]
    measure: Callable[[list[str], list[str]], dict[str, float]]
    chances: dict[str, dict[str, float | None]]
    batch: int
    batch_tokens: int = 0
    validated: int = 0
    search: Search = field(default_factory=Search)
    length: tuple[int, int] | None = None
    name: str = "translation"

    def __post_init__(self):
        self.tests = tuple(self.references)
        self.special = {key: self.tokenizer.token_to_id(token) for key, token in _SPECIAL.items()}
        self._frequencies = self._count()
        self._validation = list(self._in_order(self.pairs["validation"], self.validated))
        self.unlearned = frequency_loss(self._frequencies, self._validation)
        self.looked = sum(map(asked, self._validation))

    def batches(self, seed: int) -> Iterator[Batch]:
        """Training batches without end, of pairs of about one length; all come once before any comes again."""
        rng, train = np.random.default_rng(seed), self.pairs["train"]
        lengths = train.lengths()
        while True:
            for places in batches_by_length(lengths, rng, 0 if self.batch_tokens else self.batch, self.batch_tokens):
                yield self._batch(train, places)

    def tokens(self, batch: Batch) -> int:
        """Target tokens of a batch, ends included."""
        return asked(batch)

    def validation(self) -> list[Batch]:
        """The same batches each time, of the first `validated` pairs of the validation set."""
        return self._validation

    def shape(self) -> tuple[int, int]:
        """Target and source tokens of a sentence that costs are stated for: the rounded means, or what is published."""
        train = self.pairs["train"]
        return self.length or (round(train.target.lengths.mean()) + 1, round(train.source.lengths.mean()) + 1)

    def scores(self, model: PreTrainedModel, test: str, device: str = "cpu", precision: str = "float32") -> list[Score]:
        """Perplexity of the right translation's tokens, and bleu and exact of the model's own translations."""
        pairs, batches = self.pairs[test], list(self._in_order(self.pairs[test]))
        loss, tokens = mean_loss(model, batches, device, precision)
        chance = math.exp(frequency_loss(self._frequencies, batches))
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bfloat16"):
            values = self.measure(self.translations(model, pairs.source, device), self.references[test])
        rows = [Score(name, value, self.chances[test][name], len(pairs.source)) for name, value in values.items()]
        return [Score("perplexity", math.exp(loss), chance, tokens), *rows]

    def translations(self, model: PreTrainedModel, sources: Ragged, device: str = "cpu") -> list[str]:
        """What the model makes of these sources, as text."""

        def inputs(places: np.ndarray) -> Batch:
            return {key: value.to(device) for key, value in self._sources(sources, places).items()}

        search = self.search
        ids = translate(model, sources, inputs, search.batch, search.beams, search.length_penalty)
        return self.tokenizer.decode_batch(ids)

    def _sources(self, sources: Ragged, places: np.ndarray) -> Batch:
        end, pad = self.special["eos_token_id"], self.special["pad_token_id"]
        ids = _padded([[*sources[i], end] for i in places], pad)
        return {"input_ids": ids, "attention_mask": (ids != pad).long()}

    def _in_order(self, pairs: Pairs, most: int = 0) -> Iterator[Batch]:
        """Batches of the first `most` pairs, 0 for all; the same each time."""
        lengths = pairs.lengths()[: most or None]
        for places in batches_by_length(lengths, None, 0 if self.batch_tokens else self.batch, self.batch_tokens):
            yield self._batch(pairs, places)

    def _batch(self, pairs: Pairs, places: np.ndarray) -> Batch:
        labels = [[*pairs.target[i], self.special["eos_token_id"]] for i in places]
        return self._sources(pairs.source, places) | {"labels": _padded(labels, NOT_ASKED)}

    def _count(self) -> np.ndarray:
        """Add-one smoothed shares (vocabulary,) of the tokens of training targets and their ends."""
        target, size = self.pairs["train"].target, self.tokenizer.get_vocab_size()
        counts = np.zeros(size)
        for start in range(0, len(target.ids), 1 << 24):
            counts += np.bincount(target.ids[start : start + (1 << 24)], minlength=size)
        counts[self.special["eos_token_id"]] += len(target)
        return (counts + 1) / (counts.sum() + size)


def _padded(sequences: list, filling: int) -> torch.Tensor:
    """(B, longest) int64."""
    found = np.full((len(sequences), max(map(len, sequences))), filling, np.int64)
    for row, ids in enumerate(sequences):
        found[row, : len(ids)] = ids
    return torch.from_numpy(found)
