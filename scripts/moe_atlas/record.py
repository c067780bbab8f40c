"""A text that goes through a model, and what its experts did on it."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

from moe_atlas.errors import AtlasError
from moe_atlas.states import States


@dataclass(frozen=True)
class Part:
    """One of `count` parts that the batches of a long text are dealt to, one after another; `number` is from 1."""

    number: int
    count: int

    def __post_init__(self):
        if not 1 <= self.number <= self.count:
            raise AtlasError(f"there is no part {self.number} of {self.count}; parts are numbered from 1.")

    def __str__(self) -> str:
        return f"{self.number} of {self.count}"


@dataclass(frozen=True)
class Text:
    """A corpus as token ids, special tokens included; keep_tokens keeps a row a token (short corpora).

    documents: the document of each sequence, by default one for each. part: which batches are run, by default all.
    """

    sequences: Sequence[Sequence[int]]
    keep_tokens: bool
    documents: Sequence[int] | None = None
    part: Part | None = None


def digest(texts: Iterable[Text]) -> str:
    """Changes with anything in the texts, whatever part of them is run."""
    found = hashlib.sha256()
    for text in texts:
        documents = None if text.documents is None else list(text.documents)
        found.update(json.dumps([text.keep_tokens, documents, *map(list, text.sequences)]).encode())
    return found.hexdigest()


@dataclass
class Record:
    """What the experts did on one text: descriptions of the expert sites, tensors `layer_{l}.{site}.{name}`.

    Of a short text also the intermediate states of the FFN experts, `layer_{l}` (T, N, m) float32, and by the same
    names whose they are: the experts', and after them F's where it has as many neurons.
    """

    sites: list[dict] = field(default_factory=list)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    states: dict[str, torch.Tensor] = field(default_factory=dict)
    state_labels: dict[str, list[str]] = field(default_factory=dict)

    def add(self, site: dict, arrays: dict[str, torch.Tensor], states: States | None) -> None:
        """Take what was kept of one site of one layer; `site` is its description."""
        self.sites.append(site)
        self.tensors |= {f"layer_{site['layer']}.{site['site']}.{name}": array for name, array in arrays.items()}
        if states is not None and states.kept is not None:
            self.states[f"layer_{site['layer']}"] = states.kept
            self.state_labels[f"layer_{site['layer']}"] = states.labels

    def join(self, other: "Record") -> None:
        """Take what the record of other layers of the same text holds."""
        self.sites += other.sites
        self.tensors |= other.tensors
        self.states |= other.states
        self.state_labels |= other.state_labels


def packed(records: Sequence[Record]) -> tuple[dict[str, torch.Tensor], list]:
    """Records as tensors and what JSON can hold."""
    tensors = {
        f"{number}.{part}.{name}": tensor
        for number, record in enumerate(records)
        for part in ("tensors", "states")
        for name, tensor in getattr(record, part).items()
    }
    return tensors, [[record.sites, record.state_labels] for record in records]


def unpacked(tensors: dict[str, torch.Tensor], description: list) -> list[Record]:
    """The records that `packed` was given."""
    records = [Record(sites, state_labels=labels) for sites, labels in description]
    for name, tensor in tensors.items():
        number, part, own_name = name.split(".", 2)
        getattr(records[int(number)], part)[own_name] = tensor
    return records
