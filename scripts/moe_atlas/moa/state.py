"""What a run has after a look at its validation set, on disk, so that a run that was killed goes on from there."""

from collections import deque
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
from torch import nn

from moe_atlas.files import atomic_path
from moe_atlas.log import say
from moe_atlas.moa.plateau import End

Weights = dict[str, torch.Tensor]
_END = ("losses", "plateau", "decay_from", "last")


@dataclass
class Numbers:
    """What a run has counted. curve: rows (step, split, loss); seconds: of the steps alone; validation: last look."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    validation: float = float("nan")
    curve: list[tuple[int, str, float]] = field(default_factory=list)


def weights_of(model: nn.Module) -> Weights:
    """A copy of a model's weights in memory."""
    return {name: value.detach().to("cpu", copy=True) for name, value in model.state_dict().items()}


def load_mean(model: nn.Module, kept: deque[Weights]) -> None:
    """Give the model the mean of several weights, summed in float64."""
    mean = {}
    for name, last in kept[-1].items():
        total = sum(weights[name].double() for weights in kept)
        mean[name] = (total / len(kept)).to(last.dtype) if last.is_floating_point() else last
    model.load_state_dict(mean)


@dataclass(frozen=True)
class StateFile:
    """A file with the state of one run. digest: of all that the run was told; a state of another one is not used."""

    path: Path
    digest: str

    def save(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, end: End, numbers: Numbers, kept: deque[Weights]
    ) -> None:
        """Write what a run needs to go on, those of the generators of random numbers included."""
        random = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            random["cuda"] = torch.cuda.get_rng_state_all()
        content = {
            "digest": self.digest,
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "end": {name: getattr(end, name) for name in _END},
            "numbers": asdict(numbers),
            "kept": list(kept),
            "random": random,
        }
        with atomic_path(self.path) as temporary:
            torch.save(content, temporary)

    def load(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, end: End, numbers: Numbers, kept: deque[Weights]
    ) -> None:
        """Set all of them to what was saved, if something was for the same run."""
        if not self.path.is_file():
            return
        content = torch.load(self.path, map_location="cpu", weights_only=True)
        if content["digest"] != self.digest:
            say(f"{self.path} is of a run that was told something else; this run begins anew")
            return
        model.load_state_dict(content["model"])
        optimizer.load_state_dict(content["optimizer"])
        for name, value in content["end"].items():
            setattr(end, name, value)
        for each in fields(numbers):
            setattr(numbers, each.name, content["numbers"][each.name])
        kept.extend(content["kept"])
        torch.set_rng_state(content["random"]["cpu"])
        if "cuda" in content["random"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(content["random"]["cuda"])
        say(f"going on after step {numbers.step} with {self.path}")
