"""What figures of the experiments are told: for which of them the settings vary something, and the texts. No torch."""

from collections import Counter
from pathlib import Path

from moe_atlas.moa.settings import Arm, Settings, Task

ROUTING = ("normalization", "balance", "z", "router")


def objectives(settings: Settings) -> list[str]:
    """Objectives that a study trains on, in the order of the studies."""
    return list(dict.fromkeys(study.objective for study in settings.studies.values()))


def texts_of(task: Task) -> str:
    """The texts of an objective, for titles: demo prose and code, or the name of the file that names the data sets."""
    if task.data_file:
        return Path(task.data_file).stem
    if task.kind == "translation":
        return "demo prose"
    return f"demo {' and '.join(task.data.get('mix', ['prose']))}"


def varied(settings: Settings, objective: str) -> set[str]:
    """Which of the figures differences, grid and routing have something to show of an objective."""
    studies = [study for study in settings.studies.values() if study.objective == objective]
    arms = [settings.arms[name] for name in dict.fromkeys(name for study in studies for name in study.arms)]
    moa = [arm for arm in arms if arm.attention == "moa"]
    found = {"differences"} if any(study.contrasts for study in studies) else set()
    if moa and max(Counter(map(_shape, moa)).values()) > 1:
        found.add("routing")
    by_routing = Counter(routing for routing, _ in dict.fromkeys((_routing(arm), _shape(arm)) for arm in moa))
    if moa:
        usual = by_routing.most_common(1)[0][0]
        shapes = {_shape(arm) for arm in moa if _routing(arm) == usual}
        if any(sum(a != b for a, b in zip(one, other, strict=True)) == 1 for one in shapes for other in shapes):
            found.add("grid")
    return found


def _shape(arm: Arm) -> tuple:
    return arm.experts, arm.k, arm.head_dim


def _routing(arm: Arm) -> tuple:
    return tuple(getattr(arm, key) for key in ROUTING)
