"""Training of one model up to its plateau."""

import time
from collections import deque
from dataclasses import dataclass
from itertools import islice

import torch
from torch import nn

from moe_atlas.log import Progress
from moe_atlas.moa.objectives import Batch, Objective, mean_loss
from moe_atlas.moa.plateau import End
from moe_atlas.moa.settings import Schedule
from moe_atlas.moa.state import Numbers, StateFile, load_mean, weights_of


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
    model: nn.Module,
    objective: Objective,
    rate: float,
    schedule: Schedule,
    seed: int,
    device: str = "cpu",
    state: StateFile | None = None,
) -> Trained:
    """Train in place until the plateau and the decay behind it, or `most` steps; the last weights are kept, or the mean
    of those at the last `average` looks.

    The batches depend on the seed alone, so that arms with the same seed read the same texts in the same order. With a
    state file a run that was killed goes on from its last look, and ends as if it had not been.
    """
    model.to(device).train()
    optimizer, end = optimizer_of(model, rate, schedule), End(schedule, objective.unlearned)
    numbers, kept = Numbers(), deque(maxlen=schedule.average)
    if state:
        state.load(model, optimizer, end, numbers, kept)
    batches = islice(objective.batches(seed), numbers.step * schedule.accumulate, None)
    progress, since = Progress(schedule.most, "step", interval=10), []
    progress.skip(numbers.step)
    while numbers.step != end.last:
        started = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = rate * end.factor(numbers.step)
        for _ in range(schedule.accumulate):
            batch = next(batches)
            loss, task = loss_of(model, batch, device, schedule)
            (loss / schedule.accumulate).backward()
            since.append(task.item())
            numbers.tokens += objective.tokens(batch)
        if schedule.clip:
            nn.utils.clip_grad_norm_(
                (part for group in optimizer.param_groups for part in group["params"]), schedule.clip
            )
        optimizer.step()
        optimizer.zero_grad()
        numbers.step += 1
        numbers.seconds += time.perf_counter() - started
        progress.step(f"loss {since[-1]:.3f}")
        if numbers.step % schedule.evaluate and numbers.step != end.last:
            continue
        if schedule.average > 1:
            kept.append(weights_of(model))
            if numbers.step == end.last:
                load_mean(model, kept)
        numbers.validation, _ = mean_loss(model, objective.validation(), device, schedule.precision)
        numbers.curve += [
            (numbers.step, "train", sum(since) / len(since)),
            (numbers.step, "validation", numbers.validation),
        ]
        since = []
        end.look(numbers.step, numbers.validation)
        if state:
            state.save(model, optimizer, end, numbers, kept)
    model.eval()
    return Trained(numbers.validation, numbers.step, numbers.tokens, end.plateau, numbers.seconds, numbers.curve)
