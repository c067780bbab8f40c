"""The tuning loop: one model, one learning rate, one seed; and what it is worth on each set."""

import copy
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from moe_atlas.training.balance import load_balancing_loss
from moe_atlas.tuning.classifier import Classifier, choices, forward
from moe_atlas.tuning.data import Examples
from moe_atlas.tuning.metrics import score

BALANCE = 0.01  # weight of the balancing loss of learned routers, as in the paper's code
PROBES = 64  # examples of the validation set whose choices are followed


@dataclass(frozen=True)
class Schedule:
    """Steps of `batch` examples, validation after every `evaluate` of them, an end after `patience` without gain."""

    steps: int
    batch: int
    evaluate: int
    patience: int
    weight_decay: float = 0.01


@dataclass(frozen=True)
class Fitted:
    """validation: the best value there; step: at which. selection: rows (step, layer, measure, expert, value)."""

    validation: float
    step: int
    selection: list[tuple[int, int, str, int | None, float]]


def rate_factor(step: int, steps: int) -> float:
    """Share of the peak learning rate at `step` (from 0): linear warm-up over a tenth, then linear to 0."""
    warm = max(1, steps // 10)
    return (step + 1) / warm if step < warm else (steps - step) / max(1, steps - warm)


def orders(count: int, batch: int, steps: int, seed: int) -> list[np.ndarray]:
    """Numbers of the examples of each step: all of them in a new order again and again."""
    rng = np.random.default_rng(seed)
    rounds = math.ceil(steps * batch / count)
    stream = np.concatenate([rng.permutation(count) for _ in range(rounds)])
    return [stream[step * batch : (step + 1) * batch] for step in range(steps)]


def evaluate(built: Classifier, examples: Examples, metric: str) -> tuple[float, float]:
    """(metric, mean loss) of the model on these examples."""
    logits = torch.cat([part for part, _ in choices(built, examples)])
    return score(metric, logits.numpy(), examples.labels.numpy()), float(_loss(logits, examples.labels))


def fit(
    built: Classifier, train: Examples, validation: Examples, metric: str, rate: float, schedule: Schedule, seed: int
) -> Fitted:
    """Tune in place, end with the weights that were best on the validation set, and say how good these were.

    Of two equally good ones those with the smaller loss are better, then the earlier ones. The order of the examples
    depends on the seed alone.
    """
    torch.manual_seed(seed)
    device = next(built.model.parameters()).device
    parameters = built.parameters()
    optimizer = torch.optim.AdamW(parameters.values(), lr=rate, weight_decay=schedule.weight_decay, fused=True)
    progress = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_factor(step, schedule.steps))
    best, kept, waited, at = (-math.inf, -math.inf), None, 0, 0
    watch = Watch(built, validation)
    built.model.train()
    for step, chosen in enumerate(orders(len(train), schedule.batch, schedule.steps, seed), start=1):
        inputs = train.batch(chosen)
        loss = _loss(forward(built.model, inputs, device), inputs["labels"].to(device))
        (loss + BALANCE * _balance(built, inputs["attention_mask"].to(device))).backward()
        nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
        progress.step()
        optimizer.zero_grad()
        if step % schedule.evaluate and step != schedule.steps:
            continue
        value, validation_loss = evaluate(built, validation, metric)
        watch(step)
        if (value, -validation_loss) > best:
            best, at, waited = (value, -validation_loss), step, 0
            kept = {name: copy.deepcopy(parameter.data) for name, parameter in parameters.items()}
        else:
            waited += 1
            if waited >= schedule.patience:
                break
    for name, parameter in parameters.items():
        parameter.data.copy_(kept[name])
    built.model.eval()
    return Fitted(best[0], at, watch.rows)


class Watch:
    """Which experts the tokens of the same texts choose while a model is tuned: from step 0, after each validation."""

    def __init__(self, built: Classifier, validation: Examples):
        self.built, self.rows = built, []
        self.probes = Examples(
            validation.ids[:PROBES], validation.types[:PROBES], validation.labels[:PROBES], validation.padding
        )
        self.first = self.before = None
        if built.arm.routed:
            self(0)

    def __call__(self, step: int) -> None:
        if not self.built.arm.routed:
            return
        parts = [chosen for _, chosen in choices(self.built, self.probes)]
        now = [np.concatenate(layer) for layer in zip(*parts, strict=True)]
        self.first = self.first or now
        for layer, first, before, chosen in zip(
            self.built.layers, self.first, self.before or self.first, now, strict=True
        ):
            k = chosen[0].sum()
            for expert, share in enumerate(chosen.mean(0) / k):
                self.rows.append((step, layer, "share", expert, float(share)))
            for measure, other in (("overlap_first", first), ("overlap_before", before)):
                self.rows.append((step, layer, measure, None, float((chosen & other).sum(1).mean() / k)))
        self.before = now


def _loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy, or the mean squared error of a regression."""
    if labels.is_floating_point():
        return functional.mse_loss(logits[:, 0].float(), labels)
    return functional.cross_entropy(logits.float(), labels)


def _balance(built: Classifier, attention: torch.Tensor) -> torch.Tensor:
    """Mean balancing loss of the learned routers over the tokens that are no padding; 0 without such routers."""
    if built.arm.gate != "cosine" or built.arm.form == "dense":
        return torch.zeros((), device=attention.device)
    losses = [load_balancing_loss(site.scores[attention.bool()], site.k) for site in built.routed]
    return torch.stack(losses).mean()
