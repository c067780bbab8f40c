"""Instructions and questions as token ids: what a language model is tuned on, and what it is asked after examples."""

from dataclasses import dataclass, replace

import polars as pl
import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

from moe_atlas.errors import AtlasError
from moe_atlas.tuning.data import padded, padding_id
from moe_atlas.tuning.prompts import LETTERS, heading

_IGNORED = -100


@dataclass(frozen=True)
class Completions:
    """Token ids of prompts with their responses, and how many of them are the prompt's."""

    ids: list[list[int]]
    prompts: list[int]
    padding: int
    together: int  # most examples of a forward pass

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, chosen: range | list[int]) -> dict[str, torch.Tensor]:
        """These examples padded on the right: input_ids, attention_mask, labels, which are -100 but in the response."""
        ids, mask = padded([self.ids[i] for i in chosen], self.padding)
        starts = torch.tensor([self.prompts[i] for i in chosen])[:, None]
        response = mask.bool() & (torch.arange(ids.shape[1]) >= starts)
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(~response, _IGNORED)}

    def part(self, fraction: float) -> "Completions":
        """The first share of the examples, at least one; they are in a random order."""
        count = max(1, round(fraction * len(self)))
        return replace(self, ids=self.ids[:count], prompts=self.prompts[:count])

    def answers(self, model: nn.Module, inputs: dict[str, torch.Tensor], device: torch.device) -> torch.Tensor:
        """Logits (batch, vocabulary) at the last position: only the choices of experts on the way there matter."""
        return _logits(model, inputs, device, 1)[:, 0]

    def loss(self, model: nn.Module, inputs: dict[str, torch.Tensor], device: torch.device) -> torch.Tensor:
        """Mean over the examples of the mean cross-entropy of a response's tokens, a scalar float32.

        As the released code has it, where each example is a batch of its own, so that how many examples go through
        together changes nothing.
        """
        targets = inputs["labels"][:, 1:].to(device)
        asked = targets != _IGNORED
        kept = functional.pad(asked, (0, 1))
        losses = functional.cross_entropy(
            _logits(model, inputs, device, kept).float(), targets[asked], reduction="none"
        )
        shares = asked / asked.sum(1, keepdim=True) / len(asked)
        return (losses * shares[asked]).sum()


@dataclass(frozen=True)
class Questions:
    """Token ids of prompts that end before the letter of the answer; labels (n,) int64 of LETTERS.

    letters: token ids of the letters. subjects: of each question.
    """

    ids: list[list[int]]
    labels: torch.Tensor
    letters: list[int]
    subjects: list[str]
    padding: int
    together: int  # most examples of a forward pass

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, chosen: range | list[int]) -> dict[str, torch.Tensor]:
        """These questions padded on the right: input_ids, attention_mask, labels."""
        ids, mask = padded([self.ids[i] for i in chosen], self.padding)
        return {"input_ids": ids, "attention_mask": mask, "labels": self.labels[list(chosen)]}

    def head(self, count: int) -> "Questions":
        """The first questions."""
        return replace(self, ids=self.ids[:count], labels=self.labels[:count], subjects=self.subjects[:count])

    def groups(self) -> dict[str, list[int]]:
        """Numbers of the questions of each subject."""
        found: dict[str, list[int]] = {}
        for number, subject in enumerate(self.subjects):
            found.setdefault(subject, []).append(number)
        return found

    def answers(self, model: nn.Module, inputs: dict[str, torch.Tensor], device: torch.device) -> torch.Tensor:
        """Logits (batch, letters) of the token after each prompt."""
        last = inputs["attention_mask"].sum(1, keepdim=True) - 1
        return _logits(model, inputs, device, last.to(device))[:, 0, self.letters]


def _logits(
    model: nn.Module, inputs: dict[str, torch.Tensor], device: torch.device, kept: int | torch.Tensor
) -> torch.Tensor:
    """Logits at the kept positions: (batch, n, vocabulary), or (kept, vocabulary) where a mask says which."""
    ids, mask = (inputs[name].to(device) for name in ("input_ids", "attention_mask"))
    return model(input_ids=ids, attention_mask=mask, logits_to_keep=kept, use_cache=False).logits


def encode_instructions(
    frame: pl.DataFrame, tokenizer: PreTrainedTokenizerBase, length: int, context: int, together: int
) -> dict[str, Completions | Questions]:
    """The sets of a table emoe_tasks that is of instructions: Completions of at most `length` tokens, and Questions.

    A response ends with the end of a text. An example of which nothing but the prompt is left is left out. A question
    follows as many of its subject's shots, the first ones, as the `context` of the model holds with it.
    """
    padding = padding_id(tokenizer)
    if tokenizer.eos_token_id is None:
        raise AtlasError("The tokenizer has no token for the end of a text; set eos_token in tokenizer_config.json.")
    sets = {name: part for (name,), part in frame.group_by("split", maintain_order=True)}
    train, shots = sets.pop("train"), sets.pop("shots")
    prompts = [len(ids) for ids in tokenizer(train["text"].to_list())["input_ids"]]
    whole = tokenizer((train["text"] + train["pair"]).to_list())["input_ids"]
    whole = [[*ids, tokenizer.eos_token_id][:length] for ids in whole]
    kept = [i for i, ids in enumerate(whole) if len(ids) > prompts[i]]
    if not kept:
        raise AtlasError(f"No response begins within {length} tokens; raise the length in the settings.")
    encoded = {"train": Completions([whole[i] for i in kept], [prompts[i] for i in kept], padding, together)}
    letters, answered = _letters(tokenizer), _answered(shots)
    for name, part in sets.items():
        subjects = part["pair"].to_list()
        ids = [
            _prompt(tokenizer, subject, answered.get(subject, []), text, context)
            for subject, text in zip(subjects, part["text"], strict=True)
        ]
        labels = torch.tensor(part["label"].to_list(), dtype=torch.int64)
        encoded[name] = Questions(ids, labels, letters, subjects, padding, together)
    return encoded


def _answered(shots: pl.DataFrame) -> dict[str, list[str]]:
    """The shots of each subject with their letters."""
    found: dict[str, list[str]] = {}
    for subject, text, label in shots.select("pair", "text", "label").iter_rows():
        found.setdefault(subject, []).append(f"{text} {LETTERS[int(label)]}\n\n")
    return found


def _prompt(
    tokenizer: PreTrainedTokenizerBase, subject: str, shots: list[str], question: str, context: int
) -> list[int]:
    """Token ids up to the letter, which is written to see where its token begins, and taken off."""
    for count in range(len(shots), -1, -1):
        text = heading(subject) + "".join(shots[:count]) + f"{question} {LETTERS[0]}"
        ids = tokenizer(text)["input_ids"][:-1]
        if len(ids) <= context:
            break
    return ids[-context:]


def _letters(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token of each letter after "Answer:". AtlasError where a letter is not one token, alike but for itself."""
    ids = [tokenizer(f"Answer: {letter}")["input_ids"] for letter in LETTERS]
    last = [part[-1] for part in ids]
    if len({tuple(part[:-1]) for part in ids}) > 1 or len(set(last)) < len(LETTERS):
        raise AtlasError("The tokenizer does not write the letters of answers as one token each; take another model.")
    return last
