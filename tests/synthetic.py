"""Small made-up tables that keep the data contract: what the figures are tried on. No model is run.

Values are random with a fixed seed, but consistent: ranks, loads and choices come from the same logits and norms.
"""

import itertools
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import polars as pl
from choice_records import arrays_of, choose

from moe_atlas import tables
from moe_atlas.behavioral.specialization import specialization
from moe_atlas.text_index import TextIndex

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
    found = {"similarity": pl.concat(similar), "regression": pl.concat(fits)}
    return found | {"domain": domain(toy), "matching": matching(toy)} | projection(toy)


def projection(toy: Toy) -> dict[str, pl.DataFrame]:
    """projection and explained_variance of one toy: random points, the last routed expert an outlier."""
    rng = np.random.default_rng(toy.experts)
    points, ratios = [tables.empty("projection")], [tables.empty("explained_variance")]
    labels = [str(e) for e in range(toy.experts)] + [x for x in toy.weight_extras if x == "F"]
    for layer, matrix, level in itertools.product(toy.layers, ("up", "act", "down"), ("matrix", "neuron")):
        fixed, whole = {"model": toy.model, "layer": layer, "matrix": matrix, "level": level}, level == "matrix"
        count = 1 if whole else 20
        scores = {f"pc{c}": rng.normal(0, 40 / c, len(labels) * count) for c in (1, 2, 3)}
        outlier = [whole and label == str(toy.experts - 1) for label in labels for _ in range(count)]
        columns = {
            "expert": np.repeat(labels, count), "neuron": [None if whole else n for _ in labels for n in range(count)],
            "outlier": outlier if whole else [None] * len(outlier),
            "null_outlier": [0.9 if whole else None] * len(outlier),
        }  # fmt: skip
        points.append(_table("projection", fixed, **columns, **scores))
        parts = {"component": (1, 2, 3), "ratio": (0.4, 0.2, 0.1), "null_ratio": (0.15,) * 3, "null_sd": (0.01,) * 3}
        ratios.append(_table("explained_variance", fixed, **parts))
    return {"projection": pl.concat(points), "explained_variance": pl.concat(ratios)}


def matching(toy: Toy) -> pl.DataFrame:
    """matching of one toy: half of its pairs; F and SE of another width, so without tau."""
    rng = np.random.default_rng(toy.experts)
    labels = [str(e) for e in range(toy.experts)] + list(toy.weight_extras)
    frames = [tables.empty("matching")]
    for layer in toy.layers:
        for a, b in list(itertools.combinations(labels, 2))[::2]:
            same = b.isdigit()
            for matrix in ("up", "act", "down", "joint"):
                before = float(rng.uniform(-0.1, 0.3))
                row = {
                    "model": toy.model, "layer": layer, "matrix": matrix, "a": a, "b": b,
                    "cosine_before": before if same else None, "cosine_after": before + 0.3,
                    "tau": float(rng.uniform(-0.2, 1)) if same else None, "null_after_mean": 0.28,
                    "null_after_sd": 0.004, "null_tau_sd": 0.07 if same else None, "neurons": 96,
                }  # fmt: skip
                frames.append(tables.conform("matching", pl.DataFrame([row])))
    return pl.concat(frames)


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
    top = np.zeros((n, n))
    np.add.at(top, (norms.argmax(1), scores.argmax(1)), 1)
    a, b = np.indices((n, n)).reshape(2, -1)
    products = (norm_rank - (n - 1) / 2).T @ (score_rank - (n - 1) / 2) / ((n**3 - n) / 12)
    parts["norm_score_cross"].append(
        _table(
            "norm_score_cross", fixed, norm_expert=map(str, a), score_expert=map(str, b), largest_both=top.ravel(),
            rank_product=products.ravel(), tokens=[total] * n * n,
        )
    )  # fmt: skip
    first, load_first = np.zeros((n, n)), np.zeros((n, k))
    np.add.at(first, (score_rank[0], norm_rank[0]), 1)
    load_first[order[0], np.arange(k)] = 1
    parts["rank_counts"].append(
        _table("rank_counts", fixed, score_rank=i, norm_rank=j, count=counts.ravel(), count_first=first.ravel())
    )
    i, j = np.indices((n, k)).reshape(2, -1)
    parts["load"].append(
        _table(
            "load", fixed, expert=map(str, i), rank=j, tokens=load.ravel(), tokens_first=load_first.ravel(),
            weight_sum=weight_sum.ravel(),
        )
    )  # fmt: skip
    parts["router_rule"].append(
        _table(
            "router_rule", fixed, score=["softmax"], normalised=["chosen experts"], scale=[1.0], scale_spread=[0.0],
            weight_error=[2e-7], selection=["largest logits"], selection_agreement=[1.0], logit_error=[1e-6],
            tokens=[total],
        )
    )  # fmt: skip
    labels = [str(e) for e in range(n)] + list(toy.output_extras if fixed["site"] == "ffn" else ())
    parts["specialization"].append(_specialization(fixed, order, n, rng))
    stack = np.stack([_cosines(rng, len(labels)) for _ in range(min(total, 12))])
    angular = 1 - np.arccos(np.clip(stack, -1, 1)) / np.pi
    pairs = _pairs(labels, stack.mean(axis=0))
    upper = np.triu_indices(len(labels))
    parts["output_similarity"].append(
        _table(
            "output_similarity", fixed, a=pairs["a"], b=pairs["b"], tokens=[total] * len(pairs["a"]),
            cosine_mean=pairs["value"], cosine_sd=stack.std(axis=0)[upper],
            angular_mean=angular.mean(axis=0)[upper], angular_sd=angular.std(axis=0)[upper],
            cosine_mean_content=stack[1:].mean(axis=0)[upper], angular_mean_content=angular[1:].mean(axis=0)[upper],
            cosine_sd_documents=stack.std(axis=0)[upper] / 3,
            **{f"cosine_q{q:02}": np.quantile(stack, q / 100, axis=0)[upper] for q in (5, 25, 50, 75, 95)},
        )
    )  # fmt: skip
    states = np.random.default_rng(n).standard_normal((total, n + 1, 100)) ** 3 / 50
    if fixed["site"] == "ffn":
        _active(parts, fixed, np.abs(states[:, :n]))
    _documents(parts, fixed, rng)
    if not short:
        return
    if fixed["site"] == "ffn":
        own = [*map(str, range(n)), *(["F"] if "F" in toy.output_extras else [])]
        t, e, m = np.indices((total, len(own), 100)).reshape(3, -1)
        parts["intermediate"].append(
            _table(
                "intermediate", fixed, sequence=np.zeros(len(t)), position=t, expert=np.array(own)[e], neuron=3 * m,
                neurons=[3] * len(t), value=states[t, e, m],
            )
        )  # fmt: skip
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


def _active(parts, fixed, magnitude):
    """activation_ratio of absolute activations (T, N, m)."""
    thresholds = [0.0, *(0.001 * 2.0**power for power in range(-7, 8))]
    e, i = np.indices((magnitude.shape[1], len(thresholds))).reshape(2, -1)
    ratios = np.stack([(magnitude > threshold).mean((0, 2)) for threshold in thresholds], 1)
    parts["activation_ratio"].append(
        _table(
            "activation_ratio", fixed, expert=map(str, e), threshold=np.array(thresholds)[i], ratio=ratios.ravel(),
            tokens=[len(magnitude)] * len(e),
        )
    )  # fmt: skip


def _documents(parts, fixed, rng):
    """Measures of six blocks of documents, 40 tokens each, and of their first tokens."""
    names = [name + suffix for name in tables.DOCUMENT_MEASURES for suffix in ("", "_first")]
    block, i = np.indices((6, len(names))).reshape(2, -1)
    tokens = [1 if names[number].endswith("_first") else 40 for number in i]
    values = rng.uniform(0.2, 0.6, len(i))
    measure = np.array(names)[i]
    parts["documents"].append(_table("documents", fixed, block=block, measure=measure, tokens=tokens, value=values))


def _specialization(fixed, order, experts, rng):
    """The measures of the toy's choices, as if it had read ten sequences of the same twelve token types."""
    index = TextIndex.of(
        [part.tolist() for part in np.array_split(rng.integers(12, size=len(order)), 10 if len(order) > 100 else 1)]
    )
    random_ids = choose(rng.random((len(order), experts)), order.shape[1])
    frame = specialization(
        arrays_of(order.copy(), index, experts, random_ids), [str(e) for e in range(experts)], np.arange(experts) == 1
    )
    return tables.conform("specialization", frame.with_columns(**{k: pl.lit(v) for k, v in fixed.items()}))


def domain(toy: Toy) -> pl.DataFrame:
    """Table domain of one toy: shares of its long corpora, and one divergence a layer."""
    rng = np.random.default_rng(toy.experts)
    corpora = [corpus for corpus in toy.tokens if KINDS[corpus] == "long"]
    rows = []
    for layer in toy.layers:
        key = {"model": toy.model, "layer": layer, "site": "ffn"}
        for corpus in corpora:
            for expert, value in enumerate(toy.top_k * rng.dirichlet(np.full(toy.experts, 9.0))):
                row = {"measure": "share", "corpus": corpus, "other": None, "expert": str(expert), "value": value}
                row |= {"chance": toy.top_k / toy.experts, "p_value": None, "low": value * 0.8, "high": value * 1.2}
                rows.append(key | row | {"random_router": toy.top_k / toy.experts})
        if len(corpora) == 2:
            row = {"measure": "js_divergence", "corpus": corpora[0], "other": corpora[1], "expert": None, "value": 0.02}
            row |= {"chance": 0.01, "p_value": 0.04, "low": 0.011, "high": 0.03, "random_router": 0.012}
            rows.append(key | row)
    return pl.DataFrame(rows, schema=tables.TABLES["domain"].schema)


def across(toy: Toy) -> dict[str, pl.DataFrame]:
    """Rows of the tables across models that are of this toy."""
    rng = np.random.default_rng(toy.experts)
    rows = []
    for layer, corpus in itertools.product(toy.layers, (corpus for corpus in toy.tokens if KINDS[corpus] == "short")):
        row = {"series": "toys", "model": toy.model, "end": "toy-end", "corpus": corpus, "layer": layer, "site": "ffn"}
        for prefix, name in (("", "overlap"), ("top1_", "top1"), ("js_", "js_divergence")):
            value = rng.uniform(0.4, 0.8)
            row |= {name: value, f"{prefix}low": value - 0.1, f"{prefix}high": value + 0.1}
        row |= {"chance": toy.top_k / toy.experts, "top1_chance": 1 / toy.experts, "js_chance": 0.1, "js_p_value": 0.01}
        rows.append(row | {"unit": "run", "units": 6, "tokens": toy.tokens[corpus] - 1})
    saturation = pl.DataFrame(rows, schema=tables.ACROSS["saturation"].schema)
    return {"saturation": saturation, "claims": claims(toy), "published": tables.empty("published")}


def claims(toy: Toy) -> pl.DataFrame:
    """Table claims of one toy: each verdict once, on weights and on two texts; a dense toy has reasons alone."""
    verdicts = (("holds", 0.4, 0.3, 0.5), ("does not hold", 0.01, -0.02, 0.03), ("cannot be told", 0.1, -0.1, 0.3))
    rows = []
    for number, (verdict, value, low, high) in enumerate(verdicts):
        for corpus in (None,) if number == 0 else ("prose", "code"):
            row = {"claim": f"o{number}-toy", "model": toy.model, "corpus": corpus, "verdict": "cannot be told"}
            row |= dict.fromkeys(("estimate", "low", "high", "null", "p_value", "p_adjusted", "n"))
            if toy.experts:
                row |= {"estimate": value, "low": low, "high": high, "null": 0.0, "p_value": 0.001, "p_adjusted": 0.01}
                row |= {"n": 28, "verdict": verdict}
            rows.append(row | {"reason": "a toy"})
    return tables.conform("claims", pl.DataFrame(rows, schema_overrides=tables.ACROSS["claims"].schema))


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
