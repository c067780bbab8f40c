"""When a run ends: the validation loss has stopped falling, the rate goes down to 0, and that is all. No torch.

At few steps the order of architectures is that of how fast they begin to learn; it is compared where more steps would
change little. A schedule with a fixed end would have to guess where that is for each arm.
"""

from collections.abc import Sequence

from moe_atlas.moa.settings import Schedule


def at_plateau(losses: Sequence[float], window: int, gain: float) -> bool:
    """Whether the mean of the last `window` losses is below that of the `window` before by less than the share `gain`.

    Means, because single losses go up and down while the rate is high, and the best of many is a lucky one.
    """
    if len(losses) < 2 * window:
        return False
    before = sum(losses[-2 * window : -window]) / window
    return before - sum(losses[-window:]) / window < gain * before


class End:
    """Follows the validation losses of a run and says when its rate begins to fall and when it ends.

    unlearned: loss of token frequencies alone, in nats a token. Models of masked text stay there for a while, and a
    plateau that is not below it by `margin` is that of a model which has not begun to learn.
    """

    def __init__(self, schedule: Schedule, unlearned: float):
        self.schedule, self.bound = schedule, unlearned - schedule.margin
        self.losses: list[float] = []
        self.plateau = False
        self.decay_from: int | None = None  # step after which the rate falls
        self.last: int | None = None  # step after which the run ends
        if schedule.shape != "plateau":
            self.decay_from = self.last = schedule.most

    def look(self, step: int, loss: float) -> None:
        """Take the validation loss after `step` steps. Once the end is set, nothing moves it."""
        if self.last is not None:
            return
        at = self.schedule
        if step > at.warmup:  # while the rate rises, slow gains are no plateau
            self.losses.append(loss)
        learned = min(self.losses, default=loss) < self.bound
        self.plateau = learned and step >= at.least and at_plateau(self.losses, at.window, at.gain)
        if self.plateau or step + at.evaluate > at.latest:
            self.decay_from, self.last = step, step + round(at.decay * step)

    def factor(self, step: int) -> float:
        """Share of the learning rate at `step`, from 0: rising, constant or as the inverse root, then down to 0."""
        at = self.schedule
        if step < at.warmup:
            return at.warmup_rate + (1 - at.warmup_rate) * (step + 1) / at.warmup
        if at.shape == "inverse-sqrt":
            return (at.warmup / (step + 1)) ** 0.5
        if self.last is None or step < self.decay_from:
            return 1.0
        return (self.last - step) / (self.last - self.decay_from)
