"""The tuning loop: one model, one learning rate, one seed; and what it is worth on each set."""

import copy
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from moe_atlas.training.balance import load_balancing_loss
from moe_atlas.tuning.classifier import Classifier, choices, of_tokens, products_in
from moe_atlas.tuning.data import Examples, mean_loss
from moe_atlas.tuning.language import Completions, Questions
from moe_atlas.tuning.metrics import score

BALANCE = 0.01  # weight of the balancing loss of learned routers, as in the paper's code
PROBES = 64  # examples of the validation set whose choices are followed


@dataclass(frozen=True)
class Schedule:
    """Steps of `batch` examples, validation after every `evaluate` of them, an end after `patience` without gain.

    The learning rate rises over the share `warmup` of the steps and falls to 0, by decay "linear" or "cosine".
    """

    steps: int
    batch: int
    evaluate: int
    patience: int
    weight_decay: float = 0.01
    warmup: float = 0.1
    decay: str = "linear"


@dataclass(frozen=True)
class Fitted:
    """validation: the best value there; step: at which. selection: rows (step, layer, measure, expert, value)."""

    validation: float
    step: int
    selection: list[tuple[int, int, str, int | None, float]]


def rate_factor(step: int, steps: int, warmup: float = 0.1, decay: str = "linear") -> float:
    """Share of the peak learning rate at `step` (from 0): linear warm-up over a share of the steps, then down to 0."""
    warm = max(1, int(steps * warmup))
    if step < warm:
        return (step + 1) / warm
    left = (steps - step) / max(1, steps - warm)
    return left if decay == "linear" else (1 - math.cos(math.pi * left)) / 2


def orders(count: int, batch: int, steps: int, seed: int) -> list[np.ndarray]:
    """Numbers of the examples of each step: all of them in a new order again and again."""
    rng = np.random.default_rng(seed)
    rounds = math.ceil(steps * batch / count)
    stream = np.concatenate([rng.permutation(count) for _ in range(rounds)])
    return [stream[step * batch : (step + 1) * batch] for step in range(steps)]


def evaluate(built: Classifier, examples: Examples | Questions, metric: str) -> tuple[float, float]:
    """(metric, mean loss) of the model on these examples."""
    logits = torch.cat([part for part, _ in choices(built, examples)])
    return score(metric, logits.numpy(), examples.labels.numpy()), float(mean_loss(logits, examples.labels))


def evaluate_groups(built: Classifier, examples: Examples | Questions, metric: str) -> dict[str, float]:
    """The metric of all examples, under "", and of each of their groups."""
    outputs = torch.cat([part for part, _ in choices(built, examples)]).numpy()
    labels = examples.labels.numpy()
    groups = examples.groups().items()
    return {"": score(metric, outputs, labels)} | {name: score(metric, outputs[i], labels[i]) for name, i in groups}


def fit(
    built: Classifier,
    train: Examples | Completions,
    validation: Examples | Questions,
    metric: str,
    rate: float,
    schedule: Schedule,
    seed: int,
) -> Fitted:
    """Tune in place, end with the weights that were best on the validation set, and say how good these were.

    Of two equally good ones those with the smaller loss are better, then the earlier ones. The order of the examples
    depends on the seed alone. A step's examples go through in parts of train.together, whose gradients are summed.
    """
    torch.manual_seed(seed)
    device = next(built.model.parameters()).device
    parameters = built.parameters()
    optimizer = torch.optim.AdamW(parameters.values(), lr=rate, weight_decay=schedule.weight_decay, fused=True)
    progress = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: rate_factor(step, schedule.steps, schedule.warmup, schedule.decay)
    )
    best, kept, waited, at = (-math.inf, -math.inf), None, 0, 0
    watch = Watch(built, validation)
    built.model.train()
    for step, chosen in enumerate(orders(len(train), schedule.batch, schedule.steps, seed), start=1):
        for start in range(0, len(chosen), train.together):
            inputs = train.batch(chosen[start : start + train.together])
            share = len(inputs["labels"]) / len(chosen)
            with products_in(built.precision, device):
                loss = train.loss(built.model, inputs, device)
            (share * (loss + BALANCE * _balance(built, inputs["attention_mask"].to(device)))).backward()
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
            # After the last step the weights are where they are: a copy of a large model need not fit beside it.
            last = step == schedule.steps
            kept = {} if last else {name: copy.deepcopy(part.data) for name, part in parameters.items()}
        else:
            waited += 1
            if waited >= schedule.patience:
                break
    for name, value in kept.items():
        parameters[name].data.copy_(value)
    built.model.eval()
    return Fitted(best[0], at, watch.rows)


class Watch:
    """Which experts the tokens of the same texts choose while a model is tuned: from step 0, after each validation."""

    def __init__(self, built: Classifier, validation: Examples | Questions):
        self.built, self.rows = built, []
        self.probes = validation.head(PROBES)
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


def _balance(built: Classifier, attention: torch.Tensor) -> torch.Tensor:
    """Mean balancing loss of the learned routers over the tokens that are no padding; 0 without such routers."""
    if built.arm.gate != "cosine" or built.arm.form == "dense":
        return torch.zeros((), device=attention.device)
    losses = [load_balancing_loss(of_tokens(site.scores, attention.bool()), site.k) for site in built.routed]
    return torch.stack(losses).mean()
