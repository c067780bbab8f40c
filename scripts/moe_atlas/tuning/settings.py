"""What a tuning is told: the file that the config names, checked against its schema. Nothing here imports torch."""

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import yaml

from moe_atlas.errors import AtlasError
from moe_atlas.sheets import schema
from moe_atlas.tuning.arms import ARMS

GROUP = "/"  # stands between a test and one group of its examples that is reported on its own
_INSTRUCTIONS = "instructions:"  # scheme of the source of a task that tunes a language model


@dataclass(frozen=True)
class Shape:
    """Experts of the converted layers: N, k, and which FFNs, from 0."""

    experts: int
    k: int
    layers: tuple[int, ...]


@dataclass(frozen=True)
class Study:
    """One question: its models, tasks and arms, and the values that are crossed.

    rates: learning rates to choose from, by "full" or "lora". Where there are several, each arm takes the one that is
    best on the validation set on average over the first `selection_seeds` seeds.
    """

    name: str
    models: tuple[str, ...]
    tasks: tuple[str, ...]
    arms: tuple[str, ...]
    shapes: tuple[Shape, ...]
    fractions: tuple[float, ...]
    seeds: int
    selection_seeds: int
    rates: dict[str, tuple[float, ...]]


@dataclass(frozen=True)
class Job:
    """What one job tunes: some arms of a study, on one task, of one model. `part` counts from 1."""

    study: str
    model: str
    task: str
    part: int
    arms: tuple[str, ...]


@dataclass(frozen=True)
class Settings:
    """The whole file. copies: experts and k of GMoE; training: what goes into a Schedule, and of the examples."""

    models: dict[str, dict[str, str]]
    tasks: dict[str, dict[str, Any]]
    defaults: dict[str, Any]
    studies: dict[str, Study]
    training: dict[str, Any]
    copies: dict[str, int]
    arms_per_job: int
    job_needs: dict[str, int]

    def jobs(self) -> list[Job]:
        """All jobs, in the order of the file."""
        found = []
        for study in self.studies.values():
            step = self.arms_per_job
            parts = [study.arms[i : i + step] for i in range(0, len(study.arms), step)]
            for model, task in itertools.product(study.models, study.tasks):
                found += [Job(study.name, model, task, number, arms) for number, arms in enumerate(parts, start=1)]
        return found

    def language(self, task: str) -> bool:
        """Whether a task tunes a language model on instructions, and not a classifier."""
        return self.tasks[task]["source"].startswith(_INSTRUCTIONS)

    def varied(self, model: str) -> set[str]:
        """What the studies of a model vary: "grid" (N or k), "layers", "fraction"."""
        studies = [study for study in self.studies.values() if model in study.models]
        shapes = [shape for study in studies for shape in study.shapes]
        values = {
            "grid": {(shape.experts, shape.k) for shape in shapes},
            "layers": {shape.layers for shape in shapes},
            "fraction": {fraction for study in studies for fraction in study.fractions},
        }
        return {name for name, found in values.items() if len(found) > 1}

    def job(self, study: str, model: str, task: str, part: int) -> Job:
        """The job of these names. AtlasError where there is none."""
        for job in self.jobs():
            if (job.study, job.model, job.task, job.part) == (study, model, task, part):
                return job
        raise AtlasError(f"the settings have no part {part} of the study {study} of {model} on {task}.")


def load_settings(path: str | Path) -> Settings:
    """The settings in a YAML file. AtlasError with the place for a value that the schema or another part refuses."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise AtlasError(f"{path}: the settings of the tuning cannot be read ({error}); mend the file.") from None
    for error in jsonschema.Draft202012Validator(schema("emoe")).iter_errors(content):
        place = ", ".join(map(str, error.absolute_path)) or "the file"
        raise AtlasError(f"{path}, {place}: {error.message}; see workflow/schemas/emoe.schema.yaml.")
    for name, task in content["tasks"].items():
        if task["source"].startswith(_INSTRUCTIONS) and task["metric"] != "accuracy":
            raise AtlasError(f"{path}, tasks, {name}: answers to questions are measured by accuracy; write that.")
    studies = {name: _study(path, name, content["defaults"] | study) for name, study in content["studies"].items()}
    for study in studies.values():
        known = {"models": content["models"], "tasks": content["tasks"], "arms": ARMS}
        for key, names in known.items():
            for name in getattr(study, key):
                if name not in names:
                    raise AtlasError(f"{path}, studies, {study.name}, {key}: {name} is not one of {', '.join(names)}.")
    return Settings(**content | {"studies": studies})


def _study(path: str | Path, name: str, values: dict[str, Any]) -> Study:
    crossed = itertools.product(values["experts"], values["shares"], values["layers"])
    shapes = []
    for experts, share, layers in crossed:
        k = experts * share
        if abs(k - round(k)) > 1e-6 or k < 0.5:
            raise AtlasError(
                f"{path}, studies, {name}: {share} of {experts} experts is no whole number of them; change the share."
            )
        shapes.append(Shape(experts, round(k), tuple(layers)))
    if values["selection_seeds"] > values["seeds"] and max(map(len, values["rates"].values())) > 1:
        raise AtlasError(f"{path}, studies, {name}: selection_seeds is above seeds; choose on some of them.")
    lists = {key: tuple(values[key]) for key in ("models", "tasks", "arms", "fractions")}
    numbers = {key: values[key] for key in ("seeds", "selection_seeds")}
    rates = {key: tuple(part) for key, part in values["rates"].items()}
    return Study(name, shapes=tuple(shapes), rates=rates, **lists, **numbers)
