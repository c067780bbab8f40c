"""Sequences of the demo texts: what is trained on, looked at and tested, with no document in two of them."""

from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer

from moe_atlas.corpora import demo_documents
from moe_atlas.errors import AtlasError
from moe_atlas.moa.settings import Task
from moe_atlas.training.data import encode, pack, unigram
from moe_atlas.training.tokenizer import MASK, demo_tokenizer

_VALIDATION_EVERY = 8  # of the training documents, every eighth is kept for the looks at the validation set
_DOMAINS = ("prose", "code")


@dataclass(frozen=True)
class Texts:
    """encoded: token ids of the training texts by domain; validation, test: (sequences, length) int64.

    frequencies: (entries,) float64, smoothed shares of the tokens of the training texts, mixed as they are trained on.
    """

    tokenizer: Tokenizer
    encoded: dict[str, list[list[int]]]
    mix: dict[str, float]
    validation: torch.Tensor
    test: torch.Tensor
    frequencies: np.ndarray


def demo_texts(task: Task) -> Texts:
    """Texts of prose and code that CPython brings along, with the tokenizer of the task's size and `<mask>` behind it.

    Every eighth training document is for validation, whose first sequences are taken by the shares of the mix; the
    test is all held-out documents. The tokenizer was made from training and validation texts.
    """
    mix = task.data.get("mix", {})
    if not mix or set(mix) - set(_DOMAINS) or abs(sum(mix.values()) - 1) > 1e-9:
        raise AtlasError(f"objectives, {task.objective}, mix: {mix} must share 1 among {', '.join(_DOMAINS)}.")
    tokenizer = demo_tokenizer(task.tokenizer)
    tokenizer.add_special_tokens([MASK])
    trained, looked, tested = {}, [], []
    rng = np.random.default_rng(0)  # of the order of the texts in sequences, the same for every seed
    for domain, share in mix.items():
        documents = [texts for _, texts in demo_documents(f"{domain}-train")]
        kept = [texts for number, texts in enumerate(documents) if number % _VALIDATION_EVERY == 0]
        others = [texts for number, texts in enumerate(documents) if number % _VALIDATION_EVERY]
        trained[domain] = encode(tokenizer, [text for texts in others for text in texts])
        looks = pack(encode(tokenizer, [text for texts in kept for text in texts]), task.length, rng)
        looked.append(looks[: round(share * task.validation)])
        held_out = [text for _, texts in demo_documents(domain) for text in texts]
        tested.append(pack(encode(tokenizer, held_out), task.length, rng))
    size = tokenizer.get_vocab_size()
    frequencies = sum(share * unigram({domain: trained[domain]}, size) for domain, share in mix.items())
    sets = (torch.from_numpy(np.concatenate(part)) for part in (looked, tested))
    return Texts(tokenizer, trained, mix, *sets, frequencies)
