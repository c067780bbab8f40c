"""All runs of a job: every arm with every shape, share of the data and seed, at a rate chosen on validation."""

import gc
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import torch
from transformers import AutoConfig

from moe_atlas import tables
from moe_atlas.log import Progress
from moe_atlas.tokens import load_tokenizer
from moe_atlas.training.loop import make_deterministic
from moe_atlas.tuning.arms import ARMS
from moe_atlas.tuning.classifier import (
    LANGUAGE_LORA,
    LORA,
    Classifier,
    build,
    load_classifier,
    load_language_model,
    masks_of,
)
from moe_atlas.tuning.data import Examples, encode
from moe_atlas.tuning.fit import Fitted, Schedule, evaluate_groups, fit
from moe_atlas.tuning.language import Completions, Questions, encode_instructions
from moe_atlas.tuning.metrics import chance
from moe_atlas.tuning.settings import GROUP, Job, Settings, Shape, Study


@dataclass(frozen=True)
class Material:
    """What all runs of a job share."""

    folder: Path
    model: str
    backbone: str
    task: str
    classes: int
    metric: str
    examples: dict[str, Examples | Completions | Questions]
    schedule: Schedule
    device: str
    language: bool = False  # whether a language model is tuned, and not a classifier
    precision: str = "float32"

    @property
    def tests(self) -> list[str]:
        """The sets that are reported: in-domain and shifted ones."""
        return [split for split in self.examples if split not in ("train", "validation")]

    def labels(self, test: str) -> torch.Tensor:
        """Labels of a test, or of one group of it, which is named after a stroke."""
        name, _, group = test.partition(GROUP)
        labels = self.examples[name].labels
        return labels[self.examples[name].groups()[group]] if group else labels

    def chance(self, test: str) -> float:
        """What the same answer to all texts of a test is worth at best; of questions, of a letter drawn at random."""
        if self.language:
            return 1 / self.classes
        return chance(self.metric, self.labels(test).numpy(), self.classes)


@dataclass(frozen=True)
class Run:
    """One tuned model: its values by (arm name, shape, test), arm name as tuned or toggled."""

    seed: int
    rate: float
    fitted: Fitted
    values: dict[tuple[str, Shape | None, str], float]


def material(settings: Settings, job: Job, frame: pl.DataFrame, device: str) -> Material:
    """Read the tokenizer and the task of a job."""
    folder = Path(settings.models[job.model]["folder"])
    training = settings.training | settings.tasks[job.task].get("training", {})
    length, together = training.pop("length"), training.pop("together", 64)
    precision = training.pop("precision", "float32")
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    tokenizer, language = load_tokenizer(folder), settings.language(job.task)
    if language:
        examples = encode_instructions(frame, tokenizer, length, config.max_position_embeddings, together)
    else:
        examples = encode(frame, tokenizer, length, together)
    metric, classes = settings.tasks[job.task]["metric"], frame["classes"][0]
    named = (folder, job.model, config.model_type, job.task, classes, metric)
    return Material(*named, examples, Schedule(**training), device, language, precision)


def run_job(
    settings: Settings, job: Job, frame: pl.DataFrame, device: str = "cpu"
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The tables emoe_runs and emoe_training_selection of one job."""
    study, data = settings.studies[job.study], material(settings, job, frame, device)
    runs, selection = [], []
    cells = [cell for arm in job.arms for cell in _cells(study, settings, arm)]
    progress = Progress(len(cells), "cell", interval=0)
    for arm, shape, fraction in cells:
        done = _chosen_rate(data, study, arm, shape, fraction)
        best = max(done, key=lambda rate: _mean([run.fitted.validation for run in done[rate]]))
        seeds = range(len(done[best]), study.seeds)
        done[best] += [tune(data, study, arm, shape, fraction, best, seed) for seed in seeds]
        for rate, group in done.items():
            for run in group:
                runs += _run_rows(data, study, arm, fraction, run, shape, rate == best)
        for run in done[best]:
            selection += _selection_rows(data, study, arm, fraction, run, shape)
        means = [f"{_mean([run.values[arm, shape, test] for run in done[best]]):.3f} {test}" for test in data.tests]
        progress.step(f"{arm}, {shape}: " + ", ".join(means) + f", learning rate {best:g}")
        gc.collect()
    schemas = [tables.declared(name).schema for name in ("emoe_runs", "emoe_training_selection")]
    return tuple(pl.DataFrame(rows, schema=schema) for rows, schema in zip((runs, selection), schemas, strict=True))


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _cells(study: Study, settings: Settings, arm: str) -> Iterator[tuple[str, Shape | None, float]]:
    """(arm, shape, fraction) of what is tuned: a dense model once for all shapes, copies with their own N and k.

    With dropout in the layers that others convert a dense model has these layers, and 0 experts.
    """
    shapes = list(study.shapes)
    if ARMS[arm].dropout:
        shapes = [Shape(0, 0, shape.layers) for shape in shapes]
    elif ARMS[arm].form == "dense":
        shapes = [None]
    elif ARMS[arm].form == "copies":
        shapes = [Shape(settings.copies["experts"], settings.copies["k"], shape.layers) for shape in shapes]
    for shape in dict.fromkeys(shapes):
        for fraction in study.fractions:
            yield arm, shape, fraction


def _chosen_rate(
    data: Material, study: Study, arm: str, shape: Shape | None, fraction: float
) -> dict[float, list[Run]]:
    """Runs by learning rate: one rate and no run yet, or all rates with the runs that the choice is made from."""
    rates = study.rates["lora" if ARMS[arm].lora else "full"]
    if len(rates) == 1:
        return {rates[0]: [tune(data, study, arm, shape, fraction, rates[0], 0)]}
    seeds = range(study.selection_seeds)
    return {rate: [tune(data, study, arm, shape, fraction, rate, seed) for seed in seeds] for rate in rates}


def tune(data: Material, study: Study, arm: str, shape: Shape | None, fraction: float, rate: float, seed: int) -> Run:
    """Tune once and evaluate: the model as it was tuned, and where the arm says so with its mask toggled.

    A dense model is evaluated under the masks of all shapes of the study, made from its weights before the tuning.
    """
    make_deterministic(seed)
    train = data.examples["train"].part(fraction)
    settings, kept = ARMS[arm], []
    if data.language:
        gc.collect()  # the model of the run before, of which two may not fit
        model = load_language_model(data.folder, settings, data.precision)
    else:
        model = load_classifier(data.folder, data.classes, train.padding, seed)
    model.to(data.device)  # before experts are made: a static mask is counted in a pass over the training set
    if settings.toggled and settings.form == "dense":
        kept = [masks_of(model, each.experts, each.k, list(each.layers), seed) for each in study.shapes]
    at = shape or study.shapes[0]
    lora = LANGUAGE_LORA if data.language else LORA
    built = build(model, settings, at.experts, at.k, list(at.layers), train, seed, lora).to(data.device)
    built.precision = data.precision
    fitted = fit(built, train, data.examples["validation"], data.metric, rate, data.schedule, seed)
    values = _values(built, data, arm, shape)
    if kept:
        for each, masks in zip(study.shapes, kept, strict=True):
            for mask in masks:
                mask.install()
            values |= _values(built, data, settings.toggled, each)
            for mask in masks:
                mask.remove()
    elif settings.toggled:
        for mask in built.masks:
            mask.remove()
        bare = Classifier(built.model, ARMS["dense"], precision=data.precision)
        values |= _values(bare, data, settings.toggled, shape)
    return Run(seed, rate, fitted, values)


def _values(built: Classifier, data: Material, arm: str, shape: Shape | None) -> dict:
    """Values of all tests and their groups by (arm, shape, test)."""
    return {
        (arm, shape, f"{test}{GROUP}{group}" if group else test): value
        for test in data.tests
        for group, value in evaluate_groups(built, data.examples[test], data.metric).items()
    }


def _columns(data: Material, study: Study, arm: str, fraction: float, shape: Shape | None, seed: int) -> dict:
    experts, k = (shape.experts or None, shape.k or None) if shape else (None, None)
    layers = ",".join(map(str, shape.layers)) if shape else None
    named = {"study": study.name, "model": data.model, "backbone": data.backbone, "task": data.task, "arm": arm}
    return named | {"experts": experts, "k": k, "layers": layers, "fraction": fraction, "seed": seed}


def _run_rows(
    data: Material, study: Study, arm: str, fraction: float, run: Run, shape: Shape | None, chosen: bool
) -> list[dict]:
    values = {(arm, shape, "validation"): run.fitted.validation} | (run.values if chosen else {})
    return [
        _columns(data, study, name, fraction, at, run.seed)
        | {"learning_rate": run.rate, "chosen": chosen, "test": test, "metric": data.metric, "value": value}
        | {"chance": data.chance(test), "examples": len(data.labels(test)), "step": run.fitted.step}
        for (name, at, test), value in values.items()
    ]


def _selection_rows(
    data: Material, study: Study, arm: str, fraction: float, run: Run, shape: Shape | None
) -> list[dict]:
    if not run.fitted.selection:
        return []
    chances = {"share": 1 / shape.experts}
    return [
        _columns(data, study, arm, fraction, shape, run.seed)
        | {"step": step, "layer": layer, "measure": measure, "expert": None if expert is None else str(expert)}
        | {"value": value, "chance": chances.get(measure, shape.k / shape.experts)}
        for step, layer, measure, expert, value in run.fitted.selection
    ]
