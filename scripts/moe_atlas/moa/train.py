"""Training of one model up to its plateau."""

import time
from dataclasses import dataclass

import torch
from torch import nn

from moe_atlas.log import Progress
from moe_atlas.moa.objectives import Batch, Objective, mean_loss
from moe_atlas.moa.plateau import End
from moe_atlas.moa.settings import Schedule


@dataclass(frozen=True)
class Trained:
    """What a run did.

    validation: nats a token after the last step; tokens: read in training; seconds: of the steps alone; curve: rows
    (step, split, loss).
    """

    validation: float
    steps: int
    tokens: int
    plateau: bool
    seconds: float
    curve: list[tuple[int, str, float]]


def loss_of(model: nn.Module, batch: Batch, device: str, schedule: Schedule) -> tuple[torch.Tensor, torch.Tensor]:
    """(what is minimised, loss of the task alone), nats a token: the routers' own losses are in the first."""
    moved = {name: value.to(device) for name, value in batch.items()}
    with torch.autocast(device, getattr(torch, schedule.precision), enabled=schedule.precision != "float32"):
        output = model(**moved)
    return output.loss, output.task_loss


def optimizer_of(model: nn.Module, rate: float, schedule: Schedule) -> torch.optim.Optimizer:
    """AdamW of the parameters that learn; matrices and tables alone decay, not norms and biases."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [part for part in learning if part.dim() > 1], "weight_decay": schedule.weight_decay},
        {"params": [part for part in learning if part.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=rate, betas=tuple(schedule.betas), eps=schedule.epsilon, fused=True)


def train(
    model: nn.Module, objective: Objective, rate: float, schedule: Schedule, seed: int, device: str = "cpu"
) -> Trained:
    """Train in place until the plateau and the decay behind it, or `most` steps; the last weights are kept.

    The batches depend on the seed alone, so that arms with the same seed read the same texts in the same order.
    """
    model.to(device).train()
    optimizer, end = optimizer_of(model, rate, schedule), End(schedule, objective.unlearned)
    batches, progress = objective.batches(seed), Progress(schedule.most, "step", interval=10)
    step = tokens = 0
    seconds, since, curve = 0.0, [], []
    while step != end.last:
        started = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = rate * end.factor(step)
        for _ in range(schedule.accumulate):
            batch = next(batches)
            loss, task = loss_of(model, batch, device, schedule)
            (loss / schedule.accumulate).backward()
            since.append(task.item())
            tokens += objective.tokens(batch)
        if schedule.clip:
            nn.utils.clip_grad_norm_(
                (part for group in optimizer.param_groups for part in group["params"]), schedule.clip
            )
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        seconds += time.perf_counter() - started
        progress.step(f"loss {since[-1]:.3f}")
        if step % schedule.evaluate and step != end.last:
            continue
        validation, _ = mean_loss(model, objective.validation(), device, schedule.precision)
        curve += [(step, "train", sum(since) / len(since)), (step, "validation", validation)]
        since = []
        end.look(step, validation)
    model.eval()
    return Trained(validation, step, tokens, end.plateau, seconds, curve)
