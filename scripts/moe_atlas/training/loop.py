"""The training loop and the held-out evaluation."""

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

from moe_atlas.log import Progress
from moe_atlas.training.balance import RouterLogits
from moe_atlas.training.data import Batches, pieces
from moe_atlas.training.tokenizer import BOS_ID

# Sums over a matrix are split among threads, so their last bits, and with them the trained weights, depend on
# the number of threads: it is fixed, whatever the job was given. One, because matrices this small gain little
# from a second thread: two recipes side by side on two cores are done sooner than one after the other.
THREADS = 1


def make_deterministic(seed: int) -> None:
    """Fix everything that the bytes of a trained checkpoint depend on, on one machine."""
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(seed)


def learning_rate_factor(step: int, steps: int) -> float:
    """Share of the peak learning rate at `step` (from 0): linear warm-up over a tenth, cosine down to a tenth."""
    warmup = max(1, steps // 10)
    if step < warmup:
        return (step + 1) / warmup
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def next_token_loss(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy (nats) of each next token of `ids` (batch, length), a scalar."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def train(
    model: nn.Module,
    batches: Batches,
    steps: int,
    learning_rate: float,
    balance: float,
    at_half: Callable[[], None] | None = None,
    objective: Callable[[nn.Module, torch.Tensor], torch.Tensor] = next_token_loss,
) -> list[float]:
    """Train `model` in place and return the cross-entropy of each step; `at_half` is called after steps // 2.

    `objective` gives the mean cross-entropy of a batch of token ids (batch, length).
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, steps))
    routers = RouterLogits(model)
    progress = Progress(steps, "step")
    losses = []
    model.train()
    for step in range(1, steps + 1):
        loss = objective(model, batches.next())
        balancing = routers.loss()
        (loss + balance * balancing).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        progress.step(f"loss {loss.item():.3f} · balance {balancing.item():.3f}")
        if at_half and step == max(1, steps // 2):
            at_half()
    routers.remove()
    model.eval()
    return losses


@torch.no_grad()
def held_out_loss(model: nn.Module, encoded: list[list[int]], length: int, batch: int = 16) -> tuple[float, int]:
    """Summed negative log-likelihood (nats) of the texts, and their number of tokens.

    Each text is cut into pieces of length - 1 tokens, each read behind `<s>`; every token but `<s>` counts.
    """
    cut = sorted(pieces(encoded, length), key=len)
    total, tokens = 0.0, 0
    for start in range(0, len(cut), batch):
        group = cut[start : start + batch]
        ids = torch.full((len(group), max(map(len, group)) + 1), BOS_ID)
        targets = torch.full_like(ids[:, 1:], -100)
        for row, piece in enumerate(group):
            ids[row, 1 : len(piece) + 1] = targets[row, : len(piece)] = torch.tensor(piece)
        # Padding is on the right, where a causal model cannot see it.
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        losses = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="none")
        total += losses.double().sum().item()
        tokens += sum(map(len, group))
    return total, tokens
