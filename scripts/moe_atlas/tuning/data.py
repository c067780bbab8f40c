"""A task as token ids: what a classifier is trained on and tested with."""

from dataclasses import dataclass, replace

import numpy as np
import polars as pl
import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

from moe_atlas.errors import AtlasError


@dataclass(frozen=True)
class Examples:
    """Token ids of each text, cut to a length, and labels (n,), int64 of a class or float32 of a regression."""

    ids: list[list[int]]
    types: list[list[int]]  # 0 for the first text, 1 for the second one of a pair
    labels: torch.Tensor
    padding: int
    together: int = 64  # most examples of a forward pass

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, chosen: np.ndarray | range) -> dict[str, torch.Tensor]:
        """These examples padded on the right to the longest: input_ids, attention_mask, token_type_ids, labels."""
        ids, mask = padded([self.ids[i] for i in chosen], self.padding)
        types, _ = padded([self.types[i] for i in chosen], 0)
        return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types, "labels": self.labels[list(chosen)]}

    def head(self, count: int) -> "Examples":
        """The first examples."""
        return replace(self, ids=self.ids[:count], types=self.types[:count], labels=self.labels[:count])

    def part(self, fraction: float) -> "Examples":
        """The first share of the examples, at least one; a task's examples are in a random order."""
        return self.head(max(1, round(fraction * len(self))))

    def groups(self) -> dict[str, list[int]]:
        """Numbers of the examples of each group that is reported on its own: none."""
        return {}

    def answers(self, model: nn.Module, inputs: dict[str, torch.Tensor], device: torch.device) -> torch.Tensor:
        """Logits (batch, classes) of a batch. Only a model with types of tokens is given them."""
        names = ["input_ids", "attention_mask"]
        if getattr(model.config, "type_vocab_size", 0) > 1:
            names.append("token_type_ids")
        return model(**{name: inputs[name].to(device) for name in names}).logits

    def loss(self, model: nn.Module, inputs: dict[str, torch.Tensor], device: torch.device) -> torch.Tensor:
        """Mean loss of the examples of a batch, a scalar float32."""
        return mean_loss(self.answers(model, inputs, device), inputs["labels"].to(device))


def mean_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of logits (n, classes), or the mean squared error of a regression (n, 1), in float32."""
    if labels.is_floating_point():
        return functional.mse_loss(logits[:, 0].float(), labels)
    return functional.cross_entropy(logits.float(), labels)


def padded(rows: list[list[int]], value: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows padded on the right with `value` to the longest, and 1 where a row is: int64, (rows, longest)."""
    ids = torch.full((len(rows), max(map(len, rows))), value)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row)
        mask[number, : len(row)] = 1
    return ids, mask


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The tokenizer's padding, or else the end of a text, which no text has inside."""
    found = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if found is None:
        raise AtlasError("The tokenizer has neither a padding token nor one for the end; set one in its config.")
    return found


def encode(
    frame: pl.DataFrame, tokenizer: PreTrainedTokenizerBase, length: int, together: int = 64
) -> dict[str, Examples]:
    """Each split of the table emoe_tasks as Examples of at most `length` tokens."""
    padding = padding_id(tokenizer)
    classes = frame["classes"][0]
    examples = {}
    for (split,), part in frame.group_by("split", maintain_order=True):
        pairs = None if part["pair"].null_count() == len(part) else part["pair"].to_list()
        encoded = tokenizer(part["text"].to_list(), pairs, truncation=True, max_length=length)
        types = encoded.get("token_type_ids") or [[0] * len(ids) for ids in encoded["input_ids"]]
        labels = torch.tensor(part["label"].to_list(), dtype=torch.int64 if classes else torch.float32)
        examples[split] = Examples(encoded["input_ids"], types, labels, padding, together)
    return examples
