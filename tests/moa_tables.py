"""Small made-up tables of the MoA experiments: what their figures, words and notebook are tried on."""

import itertools
import math
from types import SimpleNamespace

import polars as pl

from moe_atlas import tables
from moe_atlas.moa.arms import arms
from moe_atlas.moa.differences import differences
from moe_atlas.moa.settings import Study

UNIGRAM, DECAY, SEEDS = 200.0, 0.25, (0, 1, 2)
USUAL = {"normalization": "detached", "balance": 0.01, "z": 0.001, "router": "learned"}


def moa(k: int, experts: int, head_dim: int, **routing) -> dict:
    own = {"attention": "moa", "k": k, "experts": experts, "head_dim": head_dim, "selects": k < experts}
    return own | USUAL | routing


def mha(heads: int, head_dim: int) -> dict:
    return {"attention": "mha", "heads": heads, "head_dim": head_dim, "router": "none"}


# Arm -> shape and the mean of its losses, in nats.
ARMS = {
    "mha-3": (mha(3, 16), 3.10),
    "mha-parameters": (mha(9, 16), 2.95),
    "mha-macs": (mha(3, 10), 3.05),
    "moa-4k4e16d": (moa(4, 4, 16), 2.98),
    "moa-2k4e16d": (moa(2, 4, 16), 3.00),
    "moa-2k16e16d": (moa(2, 16, 16), 2.90),
    "moa-2k32e16d": (moa(2, 32, 16), 2.88),
    "moa-1k16e16d": (moa(1, 16, 16), 2.96),
    "moa-4k16e16d": (moa(4, 16, 16), 2.85),
    "moa-2k16e8d": (moa(2, 16, 8), 2.99),
    "moa-2k16e16d-no-loss": (moa(2, 16, 16, balance=0.0, z=0.0), 2.91),
    "moa-2k16e16d-none": (moa(2, 16, 16, normalization="none"), 2.87),
    "moa-2k16e16d-full": (moa(2, 16, 16, normalization="full"), 2.90),
    "moa-2k16e16d-frozen": (moa(2, 16, 16, balance=0.0, z=0.0, router="frozen"), 2.94),
}
MAIN = "moa-2k16e16d"
LANGUAGE = (
    *((MAIN, "mha-parameters"), (MAIN, "mha-macs"), (MAIN, "moa-2k4e16d"), ("moa-2k32e16d", "moa-2k4e16d")),
    *((MAIN, "moa-1k16e16d"), ("moa-4k16e16d", MAIN)),
)
STUDIES = {
    "language": Study("language", "causal", tuple(ARMS)[:10], LANGUAGE),
    "router": Study(
        "router",
        "causal",
        (MAIN, *tuple(ARMS)[10:]),
        ((f"{MAIN}-no-loss", f"{MAIN}-frozen"), (MAIN, f"{MAIN}-frozen")),
    ),
    "masked": Study("masked", "masked", (MAIN, "mha-3"), ((MAIN, "mha-3"),)),
    "translation": Study("translation", "translation", (MAIN, "mha-parameters"), ((MAIN, "mha-parameters"),)),
}
# What each seed adds to the loss of an arm, times 1, 2 or 3 as the arms go: differences vary too.
SPREAD = (-0.006, 0.0, 0.006)


def table(name: str, rows: list[dict]) -> pl.DataFrame:
    schema = tables.declared(name).schema
    return pl.DataFrame([dict.fromkeys(schema) | row for row in rows], schema=schema)


def size(arm: dict) -> dict:
    """Parameters and multiply-accumulates that grow as the real ones do."""
    wide, active = arm.get("experts") or 2 * arm["heads"], arm.get("k") or 2 * arm["heads"]
    attention = 200 * (wide + 1) * arm["head_dim"]
    macs = 60_000.0 + 250 * (active + 1) * arm["head_dim"] + 5.0 * (arm.get("experts") or 0)
    return {"parameters": 60_000 + attention, "attention_parameters": attention, "macs": macs}


def loss(arm: str, seed: int) -> float:
    return ARMS[arm][1] + SPREAD[seed] * (1 + tuple(ARMS).index(arm) % 3)


def scores(objective: str, arm: str, seed: int) -> list[tuple[str, str, float, float]]:
    """(test, metric, value, chance) of one run."""
    nats = loss(arm, seed)
    if objective != "translation":
        return [
            ("validation", "perplexity", math.exp(nats + 0.1), 0.8 * UNIGRAM),
            ("test", "perplexity", math.exp(nats), UNIGRAM),
        ]
    of_test = [
        ("bleu", 100 - 10 * (nats - 2), 60.0),
        ("exact", 1 - (nats - 2) / 2, 0.2),
        ("perplexity", math.exp(nats - 2), 90.0),
    ]
    harder = [
        ("bleu", 50.0 + seed * (1 + (arm == MAIN)), 62.0),
        ("exact", 0.1 + 0.01 * seed, 0.05),
        ("perplexity", 9.0 + seed, 90.0),
    ]
    tests = (("validation", of_test), ("test", of_test), ("test-longer", harder))
    return [(test, *row) for test, rows in tests for row in rows]


def runs(studies: dict[str, Study]) -> pl.DataFrame:
    rows = []
    for study in studies.values():
        for arm, seed in itertools.product(study.arms, SEEDS):
            run = {"study": study.name, "objective": study.objective, "arm": arm, "seed": seed, "chosen": True}
            run |= {"learning_rate": 0.01, "tokens": 1000, "count": 500}
            run |= {"steps": 1000 + 250 * seed, "plateau": arm != "mha-3"}
            for test, metric, value, chance in scores(study.objective, arm, seed):
                own = {"test": test, "metric": metric, "value": value, "chance": chance}
                rows.append(run | ARMS[arm][0] | size(ARMS[arm][0]) | own)
    return table("moa_runs", rows)


def curves(studies: dict[str, Study]) -> pl.DataFrame:
    rows = []
    for study in studies.values():
        for arm, seed in itertools.product(study.arms, SEEDS):
            last = 1000 + 250 * seed
            run = {"study": study.name, "objective": study.objective, "arm": arm, "seed": seed, "chosen": True}
            for step in sorted({*range(50, last, 50), last}):
                for split in ("train", "validation"):
                    nats = loss(arm, seed) + 2.2 * math.exp(-step / 200) + 0.1 * (split == "validation")
                    rows.append(run | {"learning_rate": 0.01, "step": step, "split": split, "loss": nats})
    return table("moa_curves", rows)


def throughput(studies: dict[str, Study]) -> pl.DataFrame:
    """Speeds as if time went with multiply-accumulates alone; seed 2 was slowed by a tenth."""
    rows = []
    for study in studies.values():
        for arm, seed in itertools.product(study.arms, SEEDS):
            run = {"study": study.name, "objective": study.objective, "arm": arm, "seed": seed, "learning_rate": 0.01}
            speed = 1e9 / size(ARMS[arm][0])["macs"] * (0.9 if seed == 2 else 1)
            rows.append(run | {"steps": 1000, "tokens": 1000, "seconds": 1000 / speed, "tokens_per_second": speed})
    return table("moa_throughput", rows)


def costs() -> pl.DataFrame:
    rows = [
        ("MoA base", "WMT14", "parameters", 65.0, 65.2, 0, True, "36,500 words"),
        ("Transformer base", "WMT14", "parameters", 65.0, 63.1, 0, False, "37,000 words"),
        ("LightConv", "WMT14", "macs", 1750.0, None, -1, False, "no formula"),
    ]
    return pl.DataFrame(rows, schema=tables.declared("moa_costs").schema, orient="row")


def tasks() -> pl.DataFrame:
    rows = [
        ("translation", "test", "sentences", None, 400.0, ""),
        ("translation", "test", "share reordered", None, 0.87, ""),
        ("translation", "test", "bleu", "order", 60.0, "nrefs:1"),
        ("translation", "test", "exact", "order", 0.2, ""),
    ]
    return pl.DataFrame(rows, schema=tables.declared("moa_tasks").schema, orient="row")


def frames(studies: dict[str, Study] = STUDIES) -> dict[str, pl.DataFrame]:
    """All tables of the experiments; intervals and differences by the program's own functions."""
    made = runs(studies)
    return {
        "moa_runs": made,
        "moa_curves": curves(studies),
        "moa_throughput": throughput(studies),
        "moa_arms": arms(made),
        "moa_differences": differences(SimpleNamespace(studies=studies), made),
        "moa_costs": costs(),
        "moa_tasks": tasks(),
    }
