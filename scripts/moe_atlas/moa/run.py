"""All runs of a job: one arm with every seed, at the learning rate that is best on the validation set."""

import hashlib
import math
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import polars as pl
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM, PreTrainedModel

from moe_atlas import architectures, tables
from moe_atlas.architectures.moa_config import MoAConfig
from moe_atlas.architectures.moa_costs import macs, matched_heads, parameters
from moe_atlas.errors import AtlasError
from moe_atlas.files import sha256, write_json
from moe_atlas.log import say
from moe_atlas.moa.objectives import Objective, Score
from moe_atlas.moa.settings import Arm, Job, Settings, Task
from moe_atlas.moa.state import StateFile
from moe_atlas.moa.train import Trained, train
from moe_atlas.training.loop import make_deterministic
from moe_atlas.training.save import save_checkpoint

TABLES = ("moa_runs", "moa_curves", "moa_throughput")
_CLASSES = {"causal": AutoModelForCausalLM, "masked": AutoModelForMaskedLM, "translation": AutoModelForSeq2SeqLM}


@dataclass(frozen=True)
class Run:
    """One trained model. scores: by test; None where its learning rate is not the arm's."""

    seed: int
    rate: float
    trained: Trained
    scores: dict[str, list[Score]] | None = None


def configuration(settings: Settings, objective: Objective, task: Task, name: str) -> MoAConfig:
    """Configuration of an arm's models. One that is matched has the heads that come nearest to the arm it names."""
    arm = settings.arms[name]
    if arm.match:
        tokens, source = objective.shape()
        other = configuration(settings, objective, task, arm.of)
        found, apart = matched_heads(other, arm.match, tokens=tokens, source_tokens=source)
        say(
            f"{name}: {found.num_attention_heads} heads of {found.head_dim}, "
            f"{apart:+.2%} {arm.match} of attention beside {arm.of}"
        )
        return found
    values = settings.model | task.model | _attention(arm) | objective.special
    values |= {"objective": task.kind, "vocab_size": objective.tokenizer.get_vocab_size()}
    try:
        return MoAConfig(**values)
    except (TypeError, ValueError) as error:
        raise AtlasError(f"arm {name} on the objective {task.objective} makes no model: {error}") from None


def _attention(arm: Arm) -> dict:
    if arm.attention == "mha":
        return {"attention": "mha", "num_attention_heads": arm.heads, "head_dim": arm.head_dim}
    return {
        "attention": "moa",
        "num_attention_experts": arm.experts,
        "num_experts_per_tok": arm.k,
        "head_dim": arm.head_dim,
        "normalization": arm.normalization,
        "balance_loss": float(arm.balance),
        "z_loss": float(arm.z),
        "frozen_router": arm.router == "frozen",
    }


def build(config: MoAConfig, seed: int) -> PreTrainedModel:
    """A model with random weights that depend on the seed alone."""
    architectures.register()
    make_deterministic(seed)
    return _CLASSES[config.objective].from_config(config, dtype=torch.float32)


def run_job(
    settings: Settings, job: Job, objective: Objective, checkpoint: Path, device: str = "cpu"
) -> dict[str, pl.DataFrame]:
    """Train every run of a job, keep the model of seed 0 at the chosen rate in `checkpoint`; tables TABLES by name.

    Tests are scored at the chosen rate alone. checkpoint/done.json is written last and says which run it is.
    """
    task = settings.tasks[job.objective]
    config, states = configuration(settings, objective, task, job.arm), checkpoint.with_name("states")

    def fit(rate: float, seed: int) -> tuple[Run, PreTrainedModel]:
        model = build(config, seed)
        state = _state(states, objective, task, config, rate, seed) if task.schedule.keep_state else None
        found = train(model, objective, rate, task.schedule, seed, device, state)
        end = "plateau" if found.plateau else "largest number of steps"
        say(f"{job.arm}, seed {seed}, rate {rate:g}: {found.validation:.4f} nats, {found.steps} steps, {end}")
        return Run(seed, rate, found), model

    tried = range(task.selection_seeds if len(task.rates) > 1 else 0)
    candidates = {rate: [fit(rate, seed) for seed in tried] for rate in task.rates}
    best = chosen_rate({rate: [run.trained.validation for run, _ in found] for rate, found in candidates.items()})
    waiting = candidates.pop(best)
    runs = [run for found in candidates.values() for run, _ in found]
    candidates.clear()  # models that are not scored need not wait
    for seed in range(task.seeds):
        run, model = waiting.pop(0) if waiting else fit(best, seed)
        runs.append(replace(run, scores=_scores(objective, model, device, task)))
        if seed == 0:
            _keep(job, run, model, objective, checkpoint)
    made = _tables(job, settings.arms[job.arm], objective, config, runs)
    shutil.rmtree(states, ignore_errors=True)
    return made


def _state(folder: Path, objective: Objective, task: Task, config: MoAConfig, rate: float, seed: int) -> StateFile:
    """The state of one run, bound to all that it was told, and by what token frequencies lose to the texts it reads."""
    folder.mkdir(parents=True, exist_ok=True)
    told = repr((objective.unlearned, objective.looked, task, sorted(config.to_dict().items(), key=str), rate, seed))
    return StateFile(folder / f"rate-{rate:g}-seed-{seed}.pt", hashlib.sha256(told.encode()).hexdigest())


def chosen_rate(losses: dict[float, list[float]]) -> float:
    """The rate with the smallest mean loss, of losses by rate; the first of equal ones, or the only one."""
    if len(losses) == 1:
        return next(iter(losses))
    finite = {rate: found for rate, found in losses.items() if all(map(math.isfinite, found))}
    if not finite:
        raise AtlasError("no learning rate of this arm gives a finite loss; write smaller ones under rates.")
    return min(finite, key=lambda rate: sum(finite[rate]) / len(finite[rate]))


def _scores(objective: Objective, model: PreTrainedModel, device: str, task: Task) -> dict[str, list[Score]]:
    precision = task.schedule.precision
    return {test: objective.scores(model, test, device, precision) for test in objective.tests}


def _keep(job: Job, run: Run, model: PreTrainedModel, objective: Objective, folder: Path) -> None:
    (folder / "done.json").unlink(missing_ok=True)  # while weights change, nothing vouches for them
    names = save_checkpoint(model, objective.tokenizer, folder, 0)
    named = {"study": job.study, "objective": job.objective, "arm": job.arm, "seed": run.seed}
    files = {name: sha256(folder / name) for name in names}
    write_json(folder / "done.json", named | {"learning_rate": run.rate, "steps": run.trained.steps, "files": files})


def _tables(job: Job, arm: Arm, objective: Objective, config: MoAConfig, runs: list[Run]) -> dict[str, pl.DataFrame]:
    named = {"study": job.study, "objective": job.objective, "arm": job.arm}
    tokens, source = objective.shape()
    sizes, routed = parameters(config), config.attention == "moa"
    shape = {
        "attention": config.attention,
        "experts": config.num_attention_experts if routed else None,
        "k": config.num_experts_per_tok if routed else None,
        "head_dim": config.head_dim,
        "heads": None if routed else config.num_attention_heads,
        "selects": config.num_experts_per_tok < config.num_attention_experts if routed else None,
        "normalization": arm.normalization,
        "balance": arm.balance,
        "z": arm.z,
        "router": arm.router if routed else "none",
        "parameters": sizes.total,
        "attention_parameters": sizes.attention,
        "macs": macs(config, tokens=tokens, source_tokens=source).total / tokens,
    }
    rows: dict[str, list[dict]] = {name: [] for name in TABLES}
    for run in runs:
        found, at = run.trained, {"seed": run.seed, "learning_rate": run.rate}
        chosen = run.scores is not None
        length = {"steps": found.steps, "tokens": found.tokens}
        looked = Score("perplexity", math.exp(found.validation), math.exp(objective.unlearned), objective.looked)
        scores = [
            ("validation", looked),
            *((test, score) for test, part in (run.scores or {}).items() for score in part),
        ]
        for test, score in scores:
            values = {"test": test, **asdict(score), "chosen": chosen, "plateau": found.plateau}
            rows["moa_runs"].append(named | shape | at | values | length)
        for step, split, loss in found.curve:
            values = {"chosen": chosen, "step": step, "split": split, "loss": loss}
            rows["moa_curves"].append(named | at | values)
        speed = {"seconds": found.seconds, "tokens_per_second": found.tokens / found.seconds}
        rows["moa_throughput"].append(named | at | length | speed)
    return {name: pl.DataFrame(part, schema=tables.declared(name).schema) for name, part in rows.items()}
