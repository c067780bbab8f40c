"""From source sentences to the translations of a model: greedy or beam search with a cache of keys and values."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from transformers import PreTrainedModel

from moe_atlas.log import Progress
from moe_atlas.moa.ragged import Ragged, batches_by_length


@torch.no_grad()
def translate(
    model: PreTrainedModel,
    sources: Ragged,
    inputs: Callable[[np.ndarray], dict[str, torch.Tensor]],
    batch: int,
    beams: int = 1,
    length_penalty: float = 0.6,
    growth: tuple[float, int] = (2.0, 10),
) -> list[list[int]]:
    """Token ids of the translation of each source, in their order, without begin, end and padding.

    inputs: input_ids and attention_mask (B, S) of the sources at these places, on the model's device. beams: 1 for
    greedy search, else beam search by the sum of log probabilities over the number of tokens to the power of
    length_penalty. growth: a translation is cut after a * S + b tokens, S that of its batch's longest source.
    """
    model.eval()
    config = model.config
    ends = {config.eos_token_id, config.pad_token_id, config.bos_token_id}
    found: list[list[int]] = [[] for _ in range(len(sources))]
    batches = list(batches_by_length(sources.lengths, None, batch))
    progress = Progress(len(batches), "batch")
    for places in batches:
        given = inputs(places)
        options = {"num_beams": beams, "length_penalty": length_penalty, "early_stopping": True} if beams > 1 else {}
        longest = int(growth[0] * given["input_ids"].shape[1]) + growth[1]
        longest = min(longest, config.max_position_embeddings - 1)
        answers = model.generate(**given, do_sample=False, max_new_tokens=longest, use_cache=True, **options)
        for place, ids in zip(places, answers.tolist(), strict=True):
            found[place] = list(
                _until_end(ids[1:], config.eos_token_id, ends)
            )  # the first is what decoding starts with
        progress.step()
    return found


def _until_end(ids: list[int], end: int, special: set[int]) -> Iterator[int]:
    for index in ids:
        if index == end:
            return
        if index not in special:
            yield index
