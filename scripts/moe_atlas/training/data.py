"""Token sequences for training and held-out evaluation, and the unigram baseline."""

import numpy as np
import torch
from tokenizers import Tokenizer

from moe_atlas.corpora import demo_texts
from moe_atlas.training.questions import demo_questions
from moe_atlas.training.tokenizer import BOS_ID, EOS_ID


def texts_of(domain: str, training: bool) -> list[str]:
    """The texts of one domain (prose, code, questions), of its training or its held-out documents."""
    if domain == "questions":
        return demo_questions(training)
    return [text for _, text in demo_texts(f"{domain}-train" if training else domain)]


def encode(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """Token ids of each text without special tokens."""
    return [encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]


def pack(encoded: list[list[int]], length: int, rng: np.random.Generator) -> np.ndarray:
    """Put the texts, shuffled and with their `</s>`, behind one another and cut them into sequences.

    Returns (sequences, length) int64. Every sequence begins with `<s>`, as every input of the model does.
    """
    order = rng.permutation(len(encoded))
    stream = np.concatenate([np.array([*encoded[i], EOS_ID], dtype=np.int64) for i in order])
    count = len(stream) // (length - 1)
    body = stream[: count * (length - 1)].reshape(count, length - 1)
    return np.concatenate([np.full((count, 1), BOS_ID), body], axis=1)


def pieces(encoded: list[list[int]], length: int) -> list[list[int]]:
    """The texts cut into pieces of length - 1 tokens, the last of each text shorter: room is left for `<s>`."""
    return [ids[i : i + length - 1] for ids in encoded for i in range(0, len(ids), length - 1)]


class Batches:
    """Endless training batches of a mix of domains.

    Each sequence of a batch comes from a domain drawn by its share; within a domain, sequences come in a
    shuffled order, again shuffled and packed anew when all have been used.
    """

    def __init__(self, encoded: dict[str, list[list[int]]], mix: dict[str, float], batch: int, length: int, seed: int):
        self.encoded, self.batch, self.length = encoded, batch, length
        self.domains, self.shares = list(mix), list(mix.values())
        self.rng = np.random.default_rng(seed)
        self.waiting = {domain: np.empty((0, length), dtype=np.int64) for domain in mix}

    def next(self) -> torch.Tensor:
        """The next batch, (batch, length) int64."""
        return torch.from_numpy(
            np.stack([self._take(i) for i in self.rng.choice(len(self.domains), self.batch, p=self.shares)])
        )

    def _take(self, index: int) -> np.ndarray:
        domain = self.domains[index]
        if not len(self.waiting[domain]):
            self.waiting[domain] = pack(self.encoded[domain], self.length, self.rng)
        first, self.waiting[domain] = self.waiting[domain][0], self.waiting[domain][1:]
        return first


def unigram(encoded: dict[str, list[list[int]]], size: int) -> np.ndarray:
    """Token probabilities (size,) float64: the mean over domains of add-one smoothed frequencies."""
    shares = []
    for texts in encoded.values():
        counts = np.bincount(np.concatenate([np.asarray(ids, dtype=np.int64) for ids in texts]), minlength=size)
        shares.append((counts + 1) / (counts.sum() + size))
    return np.mean(shares, axis=0)


def unigram_loss(probabilities: np.ndarray, encoded: list[list[int]]) -> tuple[float, int]:
    """Summed negative log-likelihood (nats) of the texts under the unigram model, and their number of tokens."""
    ids = np.concatenate([np.asarray(text, dtype=np.int64) for text in encoded])
    return float(-np.log(probabilities[ids]).sum()), len(ids)
