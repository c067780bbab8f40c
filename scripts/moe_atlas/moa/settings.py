"""What the experiments are told: the file that the config names, checked against its schema. No torch here."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import jsonschema
import yaml

from moe_atlas.errors import AtlasError
from moe_atlas.sheets import schema

KINDS = ("causal", "masked", "translation")


@dataclass(frozen=True)
class Schedule:
    """How long a run lasts (see moe_atlas.moa.plateau) and how its steps are made.

    warmup, evaluate, least, most: steps; window: looks at the validation set; gain, decay: shares; margin: nats a
    token; accumulate: batches of a step; clip: largest norm of a gradient, 0 for any. shape inverse-sqrt is the
    published schedule: no plateau is looked for, and the rate falls with the square root of the step until `most`.
    average: looks whose weights' mean is kept; keep_state: a run that was killed goes on from its last look.
    """

    warmup: int
    evaluate: int
    window: int
    gain: float
    decay: float
    least: int
    most: int
    margin: float
    weight_decay: float
    accumulate: int = 1
    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = 1e-8
    clip: float = 1.0
    shape: str = "plateau"
    warmup_rate: float = 0.0
    precision: str = "float32"
    average: int = 1
    keep_state: bool = False

    @property
    def latest(self) -> int:
        """Last step at which the decay can begin so that all steps are at most `most`."""
        return int(self.most / (1 + self.decay))


@dataclass(frozen=True)
class Arm:
    """One kind of attention. Multi-head attention has `heads`, or `match` and the MoA arm `of` that it is sized by."""

    name: str
    attention: str
    head_dim: int | None
    experts: int | None
    k: int | None
    heads: int | None
    match: str | None
    of: str | None
    normalization: str | None
    balance: float | None
    z: float | None
    router: str | None


@dataclass(frozen=True)
class Task:
    """One objective with its texts. kind: which of KINDS it is, by default its name. model: what its models have other
    than those of the other objectives.

    rates: learning rates to choose from. Where there are several, each arm takes the one with the smallest mean
    validation loss over the first `selection_seeds` seeds.
    """

    objective: str
    source: str
    tokenizer: int
    length: int
    batch: int
    validation: int
    seeds: int
    selection_seeds: int
    rates: tuple[float, ...]
    schedule: Schedule
    model: dict[str, Any]
    data: dict[str, Any]
    kind: str

    @property
    def data_file(self) -> str:
        """The file that names the data sets; empty where the texts come with CPython."""
        scheme, _, locator = self.source.partition(":")
        return locator if scheme == "data" else ""


@dataclass(frozen=True)
class Study:
    """One question: an objective, the arms that are trained on it, and which of them are compared: (arm, baseline)."""

    name: str
    objective: str
    arms: tuple[str, ...]
    contrasts: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Job:
    """What one job trains: one arm with all its seeds and learning rates."""

    study: str
    objective: str
    arm: str


@dataclass(frozen=True)
class Settings:
    """The whole file. keep: (study, arm) of the trained models that are looked into afterwards."""

    model: dict[str, Any]
    tasks: dict[str, Task]
    arms: dict[str, Arm]
    studies: dict[str, Study]
    keep: tuple[tuple[str, str], ...]
    job_needs: dict[str, int]

    def owner(self, study: str, arm: str) -> Job:
        """The job that trains this arm of a study: an arm that several studies of an objective have is trained once."""
        objective = self.studies[study].objective
        for other in self.studies.values():
            if other.objective == objective and arm in other.arms:
                return Job(other.name, objective, arm)
        raise AtlasError(f"the settings have no arm {arm} in the study {study}.")

    def jobs(self) -> list[Job]:
        """All jobs, in the order of the file."""
        owners = [self.owner(study.name, arm) for study in self.studies.values() for arm in study.arms]
        return list(dict.fromkeys(owners))

    def job(self, study: str, objective: str, arm: str) -> Job:
        """The job of these names. AtlasError where there is none."""
        if (job := Job(study, objective, arm)) in self.jobs():
            return job
        raise AtlasError(f"the settings train no {arm} on the objective {objective} in the study {study}.")

    def kept(self) -> list[Job]:
        """Jobs whose models are looked into, in the order of the file."""
        return list(dict.fromkeys(self.owner(study, arm) for study, arm in self.keep))


def load_settings(path: str | Path) -> Settings:
    """The settings in a YAML file. AtlasError with the place for a value that the schema or another part refuses."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise AtlasError(f"{path}: the settings of the MoA experiments cannot be read ({error}); mend it.") from None
    for error in jsonschema.Draft202012Validator(schema("moa")).iter_errors(content):
        place = ", ".join(map(str, error.absolute_path)) or "the file"
        raise AtlasError(f"{path}, {place}: {error.message}; see workflow/schemas/moa.schema.yaml.")
    tasks = {name: _task(path, name, content, values) for name, values in content["objectives"].items()}
    arms = {name: _arm(name, content["routing"], values) for name, values in content["arms"].items()}
    for arm in arms.values():
        _check_arm(path, arm, arms)
    studies = {name: _study(name, values) for name, values in content["studies"].items()}
    for study in studies.values():
        _check_study(path, study, tasks, arms)
    keep = tuple(tuple(pair) for pair in content["keep"])
    for study, arm in keep:
        if study not in studies or arm not in studies[study].arms:
            raise AtlasError(f"{path}, keep: no study {study} has an arm {arm}; name a study and one of its arms.")
    return Settings(content["model"], tasks, arms, studies, keep, content["job_needs"])


def _arm(name: str, routing: dict[str, Any], values: dict[str, Any]) -> Arm:
    shared = routing if values["attention"] == "moa" else {}
    return Arm(**dict.fromkeys(field.name for field in fields(Arm)) | {"name": name} | shared | values)


def _check_arm(path: str | Path, arm: Arm, arms: dict[str, Arm]) -> None:
    where = f"{path}, arms, {arm.name}"
    routed = ("experts", "k", "normalization", "balance", "z", "router")
    if arm.attention == "moa":
        if None in (arm.experts, arm.k, arm.head_dim) or arm.heads or arm.match or arm.of:
            raise AtlasError(f"{where}: MoA is sized by experts, k and head_dim alone; write these three.")
        if arm.k > arm.experts:
            raise AtlasError(f"{where}: k {arm.k} is above the {arm.experts} experts; choose at most all of them.")
        return
    if given := [key for key in routed if getattr(arm, key) is not None]:
        raise AtlasError(f"{where}: multi-head attention has no {given[0]}; leave it out.")
    sized, matched = arm.heads and arm.head_dim, arm.match and arm.of
    if bool(sized) == bool(matched) or (matched and arm.heads) or (sized and (arm.match or arm.of)):
        raise AtlasError(f"{where}: multi-head attention is sized by heads and head_dim, or by match and of.")
    if matched and (arm.of not in arms or arms[arm.of].attention != "moa"):
        raise AtlasError(f"{where}, of: {arm.of} is no MoA arm of this file; name one.")


def _task(path: str | Path, name: str, content: dict[str, Any], values: dict[str, Any]) -> Task:
    merged = {"kind": name} | content["defaults"] | values
    if merged["kind"] not in KINDS:
        raise AtlasError(f"{path}, objectives, {name}, kind: it is one of {', '.join(KINDS)}; write which this is.")
    if merged.get("source", "").startswith("data:"):  # its file says the size of the tokenizer
        merged = {"tokenizer": 0} | merged
    schedule = content["training"] | merged.pop("training", {})
    known = {field.name for field in fields(Task)} - {"objective", "schedule", "model", "data"}
    missing = [key for key in sorted(known) if key not in merged]
    if missing:
        raise AtlasError(f"{path}, objectives, {name}: {missing[0]} is missing here and in defaults; write it.")
    if merged["selection_seeds"] > merged["seeds"] and len(merged["rates"]) > 1:
        raise AtlasError(f"{path}, objectives, {name}: selection_seeds is above seeds; choose on some of them.")
    own = {key: merged.pop(key) for key in known}
    own["rates"] = tuple(own["rates"])
    model = merged.pop("model", {})
    longest = (content["model"] | model).get("max_position_embeddings")
    if longest is not None and own["length"] > longest:
        raise AtlasError(f"{path}, objectives, {name}: length is above max_position_embeddings, {longest}; lower it.")
    task = Task(objective=name, schedule=Schedule(**schedule), model=model, data=merged, **own)
    at = task.schedule
    if max(at.warmup + at.evaluate * 2 * at.window, at.least) > at.latest:
        raise AtlasError(
            f"{path}, objectives, {name}, training: no plateau can be seen before step {at.latest}, where the decay "
            f"begins at the latest; raise most, or lower warmup, least, evaluate or window."
        )
    return task


def _study(name: str, values: dict[str, Any]) -> Study:
    contrasts = tuple(tuple(pair) for pair in values.get("contrasts", []))
    return Study(name, values["objective"], tuple(values["arms"]), contrasts)


def _check_study(path: str | Path, study: Study, tasks: dict[str, Task], arms: dict[str, Arm]) -> None:
    where = f"{path}, studies, {study.name}"
    if study.objective not in tasks:
        raise AtlasError(f"{where}, objective: {study.objective} is not one of {', '.join(tasks)}.")
    for name in study.arms:
        if name not in arms:
            raise AtlasError(f"{where}, arms: {name} is not one of {', '.join(arms)}.")
    for arm, baseline in study.contrasts:
        for name in (arm, baseline):
            if name not in study.arms:
                raise AtlasError(f"{where}, contrasts: {name} is no arm of this study; add it to its arms.")
        if arm == baseline:
            raise AtlasError(f"{where}, contrasts: {arm} is compared with itself; name another baseline.")
