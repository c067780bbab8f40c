"""Small made-up tables of EMoE, before tuning and tuned: what its figures and notebook are tried on."""

import itertools

import numpy as np
import polars as pl

from moe_atlas import tables
from moe_atlas.plotting.emoe import GATES, SPLITS

GRID = {8: (2, 4), 16: (4, 8)}
LAYERS = (1, 3)
CORPORA = ("prose", "code")


def table(name: str, rows: list[dict]) -> pl.DataFrame:
    schema = tables.declared(name).schema
    return pl.DataFrame([dict.fromkeys(schema) | {"model": "toy"} | row for row in rows], schema=schema)


def around(value: float, **fields) -> dict:
    return {"value": value, "low": value - 0.02, "high": value + 0.02} | fields


def mechanism(layers=LAYERS) -> pl.DataFrame:
    """Values that say where they belong: the split in the second decimal, the gate in the first."""
    rows = []
    shapes = [(experts, k) for experts, ks in GRID.items() for k in ks]
    for corpus, (experts, k), (s, split) in itertools.product(CORPORA, shapes, enumerate(SPLITS)):
        fields = {"corpus": corpus, "experts": experts, "k": k, "split": split, "seeds": 5, "tokens": 100}
        for layer, (g, gate) in itertools.product(layers, enumerate(GATES)):
            rows.append(
                around(0.1 * g + 0.01 * s, measure="mass", layer=layer, gate=gate, chance=k / experts, **fields)
            )
        for layer in layers:
            for measure in ("agreement", "agreement_output"):
                rows.append(
                    around(0.6 + 0.01 * s, measure=measure, layer=layer, gate="avg-k", chance=k / experts, **fields)
                )
        for g, gate in enumerate(GATES):
            if gate == "not-top-k" and 2 * k == experts:  # it is bottom-k
                continue
            place = None if len(layers) > 1 else layers[0]
            rows.append(around(0.1 * g + 0.01 * s, measure="loss_rise", layer=place, gate=gate, chance=0.2, **fields))
        if (experts, k) == shapes[0] and len(layers) > 1:
            for layer, gate in itertools.product(layers, ("avg-k", "random")):
                rows.append(around(0.1 * layer, measure="loss_rise", layer=layer, gate=gate, chance=0.2, **fields))
    for corpus, layer, experts, (s, split) in itertools.product(CORPORA, layers, GRID, enumerate(SPLITS)):
        null = {"chance": 1.0, "chance_low": 0.95, "chance_high": 1.05, "p_value": 0.01}
        fields = {"corpus": corpus, "layer": layer, "experts": experts, "split": split, "measure": "correlation_ratio"}
        rows.append(around(1.5 - 0.2 * s, **null, **fields))
    rows += [{"corpus": corpus, "measure": "loss", "value": 4.5} for corpus in CORPORA]
    fields = {"experts": 8, "k": 2, "split": "cluster", "gate": "avg-k"}
    for corpus, layer in itertools.product(CORPORA, layers):
        rows.append(around(0.1, measure="mass_difference", other="random split", corpus=corpus, layer=layer, **fields))
        rows.append(around(-0.1, measure="loss_rise_difference", other="random gate", corpus=corpus, **fields))
    for layer in layers:
        pair = {"measure": "js_divergence", "corpus": CORPORA[0], "other": CORPORA[1], "p_value": 0.01}
        rows.append(around(0.1, layer=layer, chance=0.01, **fields, **pair))
        rows.append({"measure": "shared_experts", "layer": layer, "value": 3.0, "chance": 2.0} | fields)
    return table("emoe_mechanism", rows)


def correlation() -> pl.DataFrame:
    rows = [
        {"corpus": corpus, "layer": layer, "experts": 8, "order": order}
        | {"row": i, "column": j, "value": 0.3 if i == j else 0.1}
        for corpus, layer, order in itertools.product(CORPORA, LAYERS, ("index", "cluster"))
        for i, j in itertools.product(range(16), repeat=2)
    ]  # fmt: skip
    return table("emoe_correlation", rows)


def selection() -> pl.DataFrame:
    rows = []
    for corpus, layer, split in itertools.product(CORPORA, LAYERS, ("cluster", "random")):
        shares = np.arange(1, 9) / 36
        shares = shares if corpus == "prose" else shares[::-1]
        for expert, share in enumerate(shares):
            numbers = {"share": share, "chance": 1 / 8, "low": share - 0.02, "high": share + 0.02}
            fields = {"corpus": corpus, "layer": layer, "experts": 8, "k": 2, "split": split, "seed": 0}
            rows.append(fields | numbers | {"expert": str(expert)})
    return table("emoe_selection", rows)


TESTS = ("in-domain", "shifted")
TASKS = ("topic", "kind")
BOTH = "1,3"
VARIED = {
    "arms": [(8, 2, BOTH, 1.0)],
    "grid": [(8, 2, BOTH, 1.0), (8, 4, BOTH, 1.0), (16, 4, BOTH, 1.0)],
    "layers": [(8, 2, BOTH, 1.0), (8, 2, "1", 1.0), (8, 2, "3", 1.0)],
    "fraction": [(8, 2, BOTH, share) for share in (0.1, 0.5, 1.0)],
}
ARMS = ("emoe", "random-split", "gmoe", "dense-noise")
SHAPES = {"gmoe": (4, 2), "dense-noise": (None, None), "dense": (None, None)}


def run_of(study: str, arm: str, task: str, test: str, varied: tuple) -> dict:
    experts, k, layers, fraction = varied
    experts, k = SHAPES.get(arm, (experts, k))
    shape = {"experts": experts, "k": k, "layers": layers if experts else None, "fraction": fraction}
    return {"study": study, "arm": arm, "task": task, "test": test, "metric": "accuracy"} | shape


def differences(studies=VARIED) -> pl.DataFrame:
    rows = []
    for task, test, study in itertools.product(TASKS, TESTS, studies):
        for arm, varied in itertools.product(ARMS if study == "arms" else ARMS[:1], studies[study]):
            value = 0.01 * (1 + ARMS.index(arm)) * (1 if test == "in-domain" else -1)
            numbers = {"difference": value, "low": value - 0.005, "high": value + 0.005, "p_value": 0.1, "seeds": 5}
            rows.append(run_of(study, arm, task, test, varied) | numbers | {"baseline": "dense"})
            if study != "arms":  # another baseline, which is not drawn there, of one seed
                alone = {"low": None, "high": None, "p_value": None, "seeds": 1}
                rows.append(rows[-1] | {"baseline": "random-split", "difference": value / 2} | alone)
    return table("emoe_differences", rows)


def runs(studies=VARIED) -> pl.DataFrame:
    rows = []
    for task, test, study, seed in itertools.product(TASKS, ("validation", *TESTS), studies, range(3)):
        for arm, varied in itertools.product(("dense", "emoe"), studies[study]):
            value = 0.5 + 0.2 * varied[3] + 0.01 * seed + (0.05 if arm == "emoe" else 0)
            rows.append(
                run_of(study, arm, task, test, varied) | {"seed": seed, "value": value, "chance": 0.4, "chosen": True}
            )
    return table("emoe_runs", rows)


def training() -> pl.DataFrame:
    """Shares that turn around, and overlaps that fall, of two arms and seeds."""
    rows = []
    for arm, seed, step, layer in itertools.product(("emoe", "emoe-learn-one"), (0, 1), (0, 50, 100), LAYERS):
        fields = run_of("arms", arm, "topic", "", VARIED["arms"][0]) | {"seed": seed, "step": step, "layer": layer}
        fields = {key: value for key, value in fields.items() if key not in ("test", "metric")}
        shares = np.arange(1, 9) / 36
        for expert, share in enumerate(shares if step else shares[::-1]):
            rows.append(fields | {"measure": "share", "expert": str(expert), "value": share, "chance": 1 / 8})
        rows.append(fields | {"measure": "overlap_first", "value": 1 - step / 200 - 0.1 * seed, "chance": 0.25})
    return table("emoe_training_selection", rows)


def frames() -> dict[str, pl.DataFrame]:
    """All tables by name."""
    return {
        "emoe_mechanism": mechanism(), "emoe_correlation": correlation(), "emoe_selection": selection(),
        "emoe_differences": differences(), "emoe_runs": runs(), "emoe_training_selection": training(),
    }  # fmt: skip


def two_backbones() -> dict[str, pl.DataFrame]:
    """The same with a second model, an encoder that was only tuned, in a study of its own and in other layers."""
    found = frames()
    for name in ("emoe_differences", "emoe_runs", "emoe_training_selection"):
        second = found[name].filter(pl.col("study") == "arms")
        renamed = {"study": "encoder", "model": "toy-encoder", "backbone": "bert"}
        second = second.with_columns(**{key: pl.lit(value) for key, value in renamed.items()})
        if name == "emoe_differences":
            second = second.filter(pl.col("arm") != "dense-noise").with_columns(pl.col("difference") + 0.3)
        first = found[name].with_columns(backbone=pl.lit("mistral"))
        found[name] = pl.concat([first, second.select(first.columns)])
    return found
