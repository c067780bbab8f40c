"""Masked language modelling (BERT, arXiv 1810.04805): which tokens are masked, the loss, the held-out evaluation.

Every chosen token becomes `<mask>`; none is kept or replaced by another one, which at small sizes costs more than it
brings (Wettig et al. 2022, arXiv 2202.08005, section 5).
"""

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from moe_atlas.training.data import pieces
from moe_atlas.training.tokenizer import BOS_ID, MASK_ID, PAD_ID

EVALUATED = 0.15  # share of the tokens that is masked in evaluation, BERT's, whatever the share in training
_IGNORED = -100  # what cross_entropy leaves out
_SEED = 0  # of the masks of the evaluation, which are the same for every model


def mask_tokens(ids: torch.Tensor, share: float, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Mask each token of `ids` (any shape, int64) with probability `share`, but no special token.

    Returns the ids with `<mask>` in these places, and targets of the same shape: the token there, -100 elsewhere.
    """
    drawn = torch.rand(ids.shape, generator=generator) < share
    chosen = drawn & (ids > MASK_ID)  # the special tokens come first
    return ids.masked_fill(chosen, MASK_ID), ids.masked_fill(~chosen, _IGNORED)


class MaskedLoss:
    """Mean cross-entropy (nats) of the masked tokens of a batch (batch, length), a scalar; each call masks anew."""

    def __init__(self, share: float, seed: int):
        self.share = share
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
        inputs, targets = mask_tokens(ids, self.share, self.generator)
        masked = targets != _IGNORED
        # Logits of the masked tokens alone: of the others they would be a third of the work, for nothing.
        head = model.get_output_embeddings()
        hook = head.register_forward_pre_hook(lambda _, given: (given[0][masked],))
        try:
            logits = model(input_ids=inputs).logits
        finally:
            hook.remove()
        return functional.cross_entropy(logits, targets[masked], reduction="sum") / masked.sum().clamp(min=1)


@torch.no_grad()
def held_out_masked_loss(
    model: nn.Module, encoded: list[list[int]], length: int, probabilities: np.ndarray, batch: int = 16
) -> tuple[float, float, int]:
    """Summed negative log-likelihood (nats) of masked tokens, that of the unigram model, and their number.

    Each text is cut into pieces of length - 1 tokens, each read behind `<s>`, of which EVALUATED are masked: the same
    ones for every model of the tokenizer. `probabilities` (size,) are those of the unigram model.
    """
    generator = torch.Generator().manual_seed(_SEED)
    texts = [torch.tensor([BOS_ID, *piece]) for piece in pieces(encoded, length)]
    masked = [mask_tokens(text, EVALUATED, generator) for text in texts]
    masked.sort(key=lambda pair: len(pair[0]))
    total = baseline = 0.0
    tokens = 0
    for start in range(0, len(masked), batch):
        inputs, targets = zip(*masked[start : start + batch], strict=True)
        ids = nn.utils.rnn.pad_sequence(inputs, batch_first=True, padding_value=PAD_ID)
        wanted = nn.utils.rnn.pad_sequence(targets, batch_first=True, padding_value=_IGNORED)
        logits = model(input_ids=ids, attention_mask=(ids != PAD_ID).long()).logits
        total += functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="sum").item()
        chosen = wanted[wanted != _IGNORED].numpy()
        baseline -= float(np.log(probabilities[chosen]).sum())
        tokens += len(chosen)
    return total, baseline, tokens
