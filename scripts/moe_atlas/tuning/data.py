"""A task as token ids: what a classifier is trained on and tested with."""

from dataclasses import dataclass

import numpy as np
import polars as pl
import torch
from transformers import PreTrainedTokenizerBase

from moe_atlas.errors import AtlasError


@dataclass(frozen=True)
class Examples:
    """Token ids of each text, cut to a length, and labels (n,), int64 of a class or float32 of a regression."""

    ids: list[list[int]]
    types: list[list[int]]  # 0 for the first text, 1 for the second one of a pair
    labels: torch.Tensor
    padding: int

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, chosen: np.ndarray | range) -> dict[str, torch.Tensor]:
        """These examples padded on the right to the longest: input_ids, attention_mask, token_type_ids, labels."""
        longest = max(len(self.ids[i]) for i in chosen)
        ids = torch.full((len(chosen), longest), self.padding)
        types, mask = torch.zeros_like(ids), torch.zeros_like(ids)
        for row, i in enumerate(chosen):
            length = len(self.ids[i])
            ids[row, :length] = torch.tensor(self.ids[i])
            types[row, :length] = torch.tensor(self.types[i])
            mask[row, :length] = 1
        return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types, "labels": self.labels[list(chosen)]}

    def part(self, fraction: float) -> "Examples":
        """The first share of the examples, at least one; a task's examples are in a random order."""
        count = max(1, round(fraction * len(self)))
        return Examples(self.ids[:count], self.types[:count], self.labels[:count], self.padding)


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The tokenizer's padding, or else the end of a text, which no text has inside."""
    found = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if found is None:
        raise AtlasError("The tokenizer has neither a padding token nor one for the end; set one in its config.")
    return found


def encode(frame: pl.DataFrame, tokenizer: PreTrainedTokenizerBase, length: int) -> dict[str, Examples]:
    """Each split of the table emoe_tasks as Examples of at most `length` tokens."""
    padding = padding_id(tokenizer)
    classes = frame["classes"][0]
    examples = {}
    for (split,), part in frame.group_by("split", maintain_order=True):
        pairs = None if part["pair"].null_count() == len(part) else part["pair"].to_list()
        encoded = tokenizer(part["text"].to_list(), pairs, truncation=True, max_length=length)
        types = encoded.get("token_type_ids") or [[0] * len(ids) for ids in encoded["input_ids"]]
        labels = torch.tensor(part["label"].to_list(), dtype=torch.int64 if classes else torch.float32)
        examples[split] = Examples(encoded["input_ids"], types, labels, padding)
    return examples
