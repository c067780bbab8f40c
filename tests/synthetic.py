"""Small made-up tables that keep the data contract: what the figures are tried on. No model is run.

Values are random with a fixed seed, but consistent: ranks, loads and choices come from the same logits and norms.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import polars as pl

from moe_atlas import tables

PROMPT = ["<s>", " As", " an", " open", "\n", " alter$native$", " 日to"]
KINDS = {"prompt": "short", "prose": "long", "code": "long"}


@dataclass(frozen=True)
class Toy:
    """A made-up model: its size and which labels its tables have."""

    model: str
    experts: int = 8
    top_k: int = 2
    layers: tuple[int, ...] = (0, 1, 2, 3)
    weight_extras: tuple[str, ...] = ()
    output_extras: tuple[str, ...] = ()
    attention: bool = False
    tokens: dict = field(default_factory=lambda: {"prompt": 7, "prose": 300, "code": 200})


TOYS = {
    "toy-eight": Toy("toy-eight", weight_extras=("F",), output_extras=("F", "F_same_input")),
    "toy-sixteen": Toy("toy-sixteen", 16, 4, (1, 2, 3), ("SE",), ("SE",)),
    "toy-attention": Toy("toy-attention", attention=True),
    "toy-dense": Toy("toy-dense", 0, 0, ()),
}


def _pairs(labels, matrix):
    i, j = np.triu_indices(len(labels))
    return {"a": [labels[x] for x in i], "b": [labels[x] for x in j], "value": matrix[i, j]}


def _cosines(rng, n, width=24, shared=0.6):
    vectors = rng.standard_normal((n, width)) + shared * rng.standard_normal(width)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors @ vectors.T


def _ranks(values):
    return np.argsort(np.argsort(values, axis=1, kind="stable"), axis=1, kind="stable")


def parametric(toy: Toy) -> dict[str, pl.DataFrame]:
    """similarity and regression of one toy; the regression's r and line are those of the drawn pairs."""
    rng = np.random.default_rng(len(toy.model) + toy.experts)
    numbers = [str(e) for e in range(toy.experts)]
    similar, fits = [tables.empty("similarity")], [tables.empty("regression")]
    for layer in toy.layers:
        means = {}
        for level in ("matrix", "neuron_mean"):
            for matrix in ("up", "act", "down"):
                labels = numbers + [x for x in toy.weight_extras if x != "SE" or level == "neuron_mean"]
                cosines = _cosines(rng, len(labels), shared=0.3 if level == "matrix" else 0.8)
                means[matrix] = cosines[: toy.experts, : toy.experts]
                pairs = _pairs(labels, cosines)
                similar.append(_frame("similarity", toy, pairs, layer=layer, matrix=matrix, level=level))
        router = 0.4 * means["act"] + 0.3 * _cosines(rng, toy.experts) + 0.3 * np.eye(toy.experts)
        pairs = _pairs(numbers, router)
        similar.append(_frame("similarity", toy, pairs, layer=layer, matrix="router", level="matrix"))
        lower = np.tril_indices(toy.experts, -1)
        for matrix in ("up", "act", "down"):
            x, y = means[matrix][lower], router[lower]
            r, (slope, intercept) = float(np.corrcoef(x, y)[0, 1]), np.polyfit(x, y, 1)
            row = {
                "model": toy.model, "layer": layer, "matrix": matrix, "n_pairs": len(x), "r": r, "r2": r * r,
                "slope": slope, "intercept": intercept, "p_value": 0.04, "p_mantel": 0.0005 if r > 0.5 else 0.21,
                "r_low": r - 0.2, "r_high": r + 0.15,
            }  # fmt: skip
            fits.append(tables.conform("regression", pl.DataFrame([row])))
    return {"similarity": pl.concat(similar), "regression": pl.concat(fits)}


def _frame(name, toy, pairs, **constants):
    value = {"similarity": "cosine", "output_similarity_tokens": "cosine"}[name]
    frame = pl.DataFrame({"a": pairs["a"], "b": pairs["b"], value: pairs["value"]})
    return tables.conform(
        name, frame.with_columns(model=pl.lit(toy.model), **{k: pl.lit(v) for k, v in constants.items()})
    )


def behavioral(toy: Toy, corpus: str) -> dict[str, pl.DataFrame]:
    """All tables of one toy and corpus; a long corpus has no tables token by token."""
    rng = np.random.default_rng(sum(map(ord, toy.model + corpus)))
    total, short = toy.tokens[corpus], KINDS[corpus] == "short"
    names = [name for name, table in tables.TABLES.items() if KINDS[corpus] in table.kinds]
    parts = {name: [tables.empty(name)] for name in names}
    texts = [PROMPT[t % len(PROMPT)] for t in range(total)]
    fixed = {"model": toy.model, "corpus": corpus}
    parts["tokens"].append(
        _table("tokens", fixed, sequence=np.zeros(total), position=range(total), token_id=range(total), token=texts)
    )
    for layer in toy.layers:
        for site in ("ffn", "attention") if toy.attention else ("ffn",):
            _layer(parts, toy, {**fixed, "layer": layer, "site": site}, total, short, rng)
    return {name: pl.concat(frames) for name, frames in parts.items()}


def _table(name, fixed, **columns):
    frame = pl.DataFrame({key: list(value) for key, value in columns.items()})
    return tables.conform(name, frame.with_columns(**{key: pl.lit(value) for key, value in fixed.items()}))


def _layer(parts, toy, fixed, total, short, rng):
    n, k = toy.experts, toy.top_k
    logits = rng.standard_normal((total, n)) * (1 + fixed["layer"]) + np.linspace(0, 1, n)
    scores = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    norms = np.exp(0.3 * logits + 0.5 * rng.standard_normal((total, n))) * (1 + fixed["layer"])
    order = np.argsort(-logits, axis=1)[:, :k]
    weights = np.take_along_axis(scores, order, axis=1)
    weights = weights / weights.sum(axis=1, keepdims=True)
    score_rank, norm_rank = _ranks(scores), _ranks(norms)
    counts, load, weight_sum = np.zeros((n, n)), np.zeros((n, k)), np.zeros((n, k))
    np.add.at(counts, (score_rank, norm_rank), 1)
    np.add.at(load, (order, np.arange(k)), 1)
    np.add.at(weight_sum, (order, np.arange(k)), weights)
    i, j = np.indices((n, n)).reshape(2, -1)
    parts["rank_counts"].append(_table("rank_counts", fixed, score_rank=i, norm_rank=j, count=counts.ravel()))
    i, j = np.indices((n, k)).reshape(2, -1)
    parts["load"].append(
        _table("load", fixed, expert=map(str, i), rank=j, tokens=load.ravel(), weight_sum=weight_sum.ravel())
    )
    parts["router_rule"].append(
        _table(
            "router_rule", fixed, score=["softmax"], normalised=["chosen experts"], scale=[1.0], scale_spread=[0.0],
            weight_error=[2e-7], selection=["largest logits"], selection_agreement=[1.0], logit_error=[1e-6],
            tokens=[total],
        )
    )  # fmt: skip
    labels = [str(e) for e in range(n)] + list(toy.output_extras if fixed["site"] == "ffn" else ())
    stack = np.stack([_cosines(rng, len(labels)) for _ in range(min(total, 12))])
    angular = 1 - np.arccos(np.clip(stack, -1, 1)) / np.pi
    pairs = _pairs(labels, stack.mean(axis=0))
    upper = np.triu_indices(len(labels))
    parts["output_similarity"].append(
        _table(
            "output_similarity", fixed, a=pairs["a"], b=pairs["b"], tokens=[total] * len(pairs["a"]),
            cosine_mean=pairs["value"], cosine_sd=stack.std(axis=0)[upper],
            angular_mean=angular.mean(axis=0)[upper], angular_sd=angular.std(axis=0)[upper],
        )
    )  # fmt: skip
    if not short:
        return
    t, r = np.indices((total, k)).reshape(2, -1)
    parts["routing"].append(
        _table(
            "routing", fixed, sequence=np.zeros(len(t)), position=t, rank=r, expert=map(str, order.ravel()),
            weight=weights.ravel(),
        )
    )  # fmt: skip
    t, e = np.indices((total, n)).reshape(2, -1)
    parts["norm_score"].append(
        _table(
            "norm_score", fixed, sequence=np.zeros(len(t)), position=t, expert=map(str, e), norm=norms.ravel(),
            score=scores.ravel(), norm_rank=norm_rank.ravel(), score_rank=score_rank.ravel(),
        )
    )  # fmt: skip
    for token in range(total):
        pairs = _pairs(labels, stack[token % len(stack)])
        parts["output_similarity_tokens"].append(
            _table(
                "output_similarity_tokens", {**fixed, "sequence": 0, "position": token}, a=pairs["a"], b=pairs["b"],
                cosine=pairs["value"],
            )
        )  # fmt: skip


def write_model(toy: Toy, results: Path) -> Path:
    """Write every table of a toy below results/models/{model}; returns that directory."""
    directory = results / "models" / toy.model
    for name, frame in parametric(toy).items():
        tables.write(name, frame, directory / tables.TABLES[name].path)
    for corpus in toy.tokens:
        for name, frame in behavioral(toy, corpus).items():
            tables.write(name, frame, directory / tables.TABLES[name].path.format(corpus=corpus))
    return directory


def table_paths(toy_directory: Path, names: tuple[str, ...], corpus: str | None) -> list[Path]:
    """Paths of these tables of one model."""
    return [toy_directory / tables.TABLES[name].path.format(corpus=corpus) for name in names]


def checkpoint(toy: Toy) -> dict:
    """checkpoint.json of a toy: the keys of the data contract, no files."""
    return {
        "model": toy.model, "source": "demo:toy", "revision": "", "directory": f"results/checkpoints/{toy.model}",
        "model_type": "mixtral", "architecture": "MixtralForCausalLM", "dtype": "float32", "L": 4, "N": toy.experts,
        "k": toy.top_k, "d": 64, "m": 96, "shared": int("SE" in toy.weight_extras),
        "dense_layers": [layer for layer in range(4) if layer not in toy.layers], "moe_layers": list(toy.layers),
        "attention_experts": toy.attention, "parameters": 1_234_567, "bytes": 4_938_268, "files": [],
    }  # fmt: skip
