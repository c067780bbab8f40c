"""The tables of one model computed a second time: whole model in float64, one expert and one token at a time.

Nothing here uses the library's own reading, streaming, probing or statistics. Expert weights come from
the files by their Hub names, expert inputs from a hook on the fully loaded transformers model.
"""

import json
import math
from collections import defaultdict
from itertools import combinations, combinations_with_replacement
from pathlib import Path

import numpy as np
import polars as pl
import torch
from safetensors import safe_open
from scipy import stats
from transformers import AutoModelForCausalLM

from moe_atlas import architectures

# Hub names of one expert's (up, act, down), of the shared expert's, of the router and of a dense FFN.
NAMES = {
    "mixtral": {
        "expert": "model.layers.{layer}.block_sparse_moe.experts.{expert}.{matrix}.weight",
        "matrices": ("w3", "w1", "w2"),
        "router": "model.layers.{layer}.block_sparse_moe.gate.weight",
    },
    "deepseek": {
        "expert": "model.layers.{layer}.mlp.experts.{expert}.{matrix}.weight",
        "matrices": ("up_proj", "gate_proj", "down_proj"),
        "router": "model.layers.{layer}.mlp.gate.weight",
        "shared": "model.layers.{layer}.mlp.shared_experts.{matrix}.weight",
    },
    "mistral": {"dense": "model.layers.{layer}.mlp.{matrix}.weight"},
}
PROJECTIONS = ("up_proj", "gate_proj", "down_proj")


def read_tensors(directory: Path) -> dict[str, np.ndarray]:
    """All tensors of a safetensors checkpoint in float64."""
    tensors = {}
    for path in sorted(Path(directory).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name).double().numpy() for name in file.keys()}  # noqa: SIM118
    return tensors


def ffn(weights: tuple[np.ndarray, ...], x: np.ndarray) -> np.ndarray:
    """down(silu(act x) * up x) for x (T, d)."""
    up, act, down = weights
    gate = x @ act.T
    return (gate / (1 + np.exp(-gate)) * (x @ up.T)) @ down.T


def activation(weights: tuple[np.ndarray, ...], x: np.ndarray) -> np.ndarray:
    """silu(act x) for x (T, d)."""
    gate = x @ weights[1].T
    return gate / (1 + np.exp(-gate))


def mean(values: list[float]) -> float | None:
    """Mean of the values that are defined, None without any."""
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / (max(math.sqrt(a @ a), 1e-8) * max(math.sqrt(b @ b), 1e-8)))


class Reference:
    """One checkpoint, its weights by layer and expert, and its states on given token ids."""

    def __init__(self, directory: Path, dense: Path | None = None):
        architectures.register()
        # transformers' grouped products have no float64; the eager loop over experts has.
        self.model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float64, experts_implementation="eager"
        ).eval()
        self.config = json.loads((Path(directory) / "config.json").read_text())
        self.names = NAMES[self.config["model_type"]]
        self.tensors = read_tensors(directory)
        self.dense = Reference(dense) if dense else None
        self.layers = range(self.config["num_hidden_layers"])
        if "router" in self.names:
            self.layers = [i for i in self.layers if self.names["router"].format(layer=i) in self.tensors]

    def router(self, layer: int) -> np.ndarray:
        return self.tensors[self.names["router"].format(layer=layer)]

    def weights(self, layer: int) -> dict[str, tuple[np.ndarray, ...]]:
        """(up, act, down) by expert label: routed experts, F, SE."""
        matrices = self.names["matrices"]
        found = {}
        for expert in range(len(self.router(layer))):
            name = self.names["expert"].format(layer=layer, expert=expert, matrix="{}")
            found[str(expert)] = tuple(self.tensors[name.format(matrix)] for matrix in matrices)
        if self.dense:
            found["F"] = self.dense.dense_weights(layer)
        if "shared" in self.names:
            name = self.names["shared"].format(layer=layer, matrix="{}")
            found["SE"] = tuple(self.tensors[name.format(matrix)] for matrix in PROJECTIONS)
        return found

    def dense_weights(self, layer: int) -> tuple[np.ndarray, ...]:
        name = self.names["dense"].format(layer=layer, matrix="{}")
        return tuple(self.tensors[name.format(matrix)] for matrix in PROJECTIONS)

    def ffn_inputs(self, ids: list[int]) -> list[np.ndarray]:
        """Input (T, d) of every layer's FFN or MoE block for one sequence."""
        seen = []
        handles = [
            layer.mlp.register_forward_pre_hook(lambda _module, arguments: seen.append(arguments[0][0].numpy().copy()))
            for layer in self.model.model.layers
        ]
        with torch.no_grad():
            self.model(torch.tensor([ids]))
        for handle in handles:
            handle.remove()
        return seen

    def route(self, probabilities: np.ndarray) -> tuple[list[int], list[float]]:
        """Chosen experts, best first, and the weights the family applies, for one token."""
        k = self.config["num_experts_per_tok"]
        best = sorted(range(len(probabilities)), key=lambda expert: -probabilities[expert])[:k]
        kept = [float(probabilities[expert]) for expert in best]
        if self.config["model_type"] == "mixtral":  # softmax over the kept logits = kept probabilities, normalised
            kept = [value / sum(kept) for value in kept]
        return best, kept

    def similarity(self, model: str) -> pl.DataFrame:
        rows = []
        for layer in self.layers:
            weights = self.weights(layer)
            for position, matrix in enumerate(("up", "act", "down")):
                shape = weights["0"][position].shape
                same = [label for label in weights if weights[label][position].shape == shape]
                for a, b in combinations_with_replacement(same, 2):
                    pair = (weights[a][position].ravel(), weights[b][position].ravel())
                    rows.append((model, layer, matrix, "matrix", a, b, cosine(*pair)))
                axis = 1 if matrix == "down" else 0
                means = {label: found[position].mean(axis) for label, found in weights.items()}
                for a, b in combinations_with_replacement(means, 2):
                    rows.append((model, layer, matrix, "neuron_mean", a, b, cosine(means[a], means[b])))
            for a, b in combinations_with_replacement(range(len(self.router(layer))), 2):
                rows.append((model, layer, "router", "matrix", str(a), str(b), cosine(*self.router(layer)[[a, b]])))
        return pl.DataFrame(rows, ["model", "layer", "matrix", "level", "a", "b", "cosine"], orient="row")

    def regression(self, model: str) -> pl.DataFrame:
        rows = []
        for layer in self.layers:
            router, weights = self.router(layer), self.weights(layer)
            pairs = [(a, b) for a in range(len(router)) for b in range(a)]
            y = [cosine(router[a], router[b]) for a, b in pairs]
            for position, matrix in enumerate(("up", "act", "down")):
                axis = 1 if matrix == "down" else 0
                means = [weights[str(expert)][position].mean(axis) for expert in range(len(router))]
                line = stats.linregress([cosine(means[a], means[b]) for a, b in pairs], y)
                fit = (line.rvalue, line.rvalue**2, line.slope, line.intercept, line.pvalue)
                rows.append((model, layer, matrix, len(pairs), *fit))
        columns = ["model", "layer", "matrix", "n_pairs", "r", "r2", "slope", "intercept", "p_value"]
        return pl.DataFrame(rows, columns, orient="row")

    def behavior(
        self, model: str, corpus: str, sequences: list[list[int]], documents: list[int] | None = None
    ) -> dict[str, pl.DataFrame]:
        """All behavioral tables of one corpus, plus the number of near ties of norms by layer.

        documents: that of each sequence, at most 32 of them; by default one for each.
        """
        documents = list(range(len(sequences))) if documents is None else documents
        block_of = [sorted(set(documents)).index(document) for document in documents]
        routing, norm_score, by_token, pairs = [], [], [], defaultdict(list)
        load, counts = defaultdict(lambda: [0, 0, 0.0]), defaultdict(lambda: [0.0, 0.0])
        cross, active, measured = defaultdict(lambda: [0.0, 0.0]), defaultdict(list), defaultdict(list)
        self.near_ties = defaultdict(int)
        for sequence, ids in enumerate(sequences):
            inputs = self.ffn_inputs(ids)
            dense_inputs = self.dense.ffn_inputs(ids) if self.dense else None
            for layer in self.layers:
                x, weights = inputs[layer], self.weights(layer)
                outputs = {label: ffn(found, x) for label, found in weights.items()}
                if self.dense:
                    outputs["F_same_input"] = outputs.pop("F")
                    outputs["F"] = ffn(weights["F"], dense_inputs[layer])
                experts = [label for label in outputs if label.isdigit()]
                states = {label: np.abs(activation(weights[label], x)) for label in experts}
                logits = x @ self.router(layer).T
                for position in range(len(ids)):
                    place = (model, corpus, layer, "ffn", sequence, position)
                    probabilities = np.exp(logits[position] - logits[position].max())
                    probabilities /= probabilities.sum()
                    chosen, applied = self.route(probabilities)
                    for rank, (expert, weight) in enumerate(zip(chosen, applied, strict=True)):
                        routing.append((*place, rank, str(expert), weight))
                        entry = load[layer, str(expert), rank]
                        load[layer, str(expert), rank] = [entry[0] + 1, entry[1] + (position == 0), entry[2] + weight]
                    norms = [math.sqrt(outputs[label][position] @ outputs[label][position]) for label in experts]
                    gaps = [np.diff(np.sort(norms)) / max(norms), np.diff(np.sort(logits[position]))]
                    self.near_ties[layer] += int((np.concatenate(gaps) < 1e-5).sum())
                    ranks = stats.rankdata(norms) - 1, stats.rankdata(probabilities) - 1
                    for expert in range(len(experts)):
                        values = (norms[expert], probabilities[expert], ranks[0][expert], ranks[1][expert])
                        norm_score.append((*place, str(expert), *map(float, values)))
                        cell = counts[layer, int(ranks[1][expert]), int(ranks[0][expert])]
                        cell[0], cell[1] = cell[0] + 1, cell[1] + (position == 0)
                        active[layer, str(expert)].append(states[str(expert)][position])
                    centred = [rank - (len(experts) - 1) / 2 for rank in ranks]
                    length = math.sqrt(float((centred[0] ** 2).sum() * (centred[1] ** 2).sum()))
                    largest = (np.argmax(norms), np.argmax(probabilities))
                    for a, b in np.ndindex(len(experts), len(experts)) if position else ():
                        cross[layer, str(a), str(b)][0] += float(largest == (a, b))
                        cross[layer, str(a), str(b)][1] += float(centred[0][a] * centred[1][b]) / length
                    order = [*experts, *(label for label in ("F", "F_same_input", "SE") if label in outputs)]
                    for a, b in combinations_with_replacement(order, 2):
                        value = cosine(outputs[a][position], outputs[b][position])
                        by_token.append((*place, a, b, value))
                        pairs[layer, a, b].append((sequence, position, value))
                    at = {(a, b): pairs[layer, a, b][-1][2] for a, b in combinations_with_replacement(order, 2)}
                    best = sorted(probabilities, reverse=True)
                    values = {
                        "pair_cosine": mean([at[pair] for pair in combinations(experts, 2)]),
                        "pair_angular": mean([1 - math.acos(at[pair]) / math.pi for pair in combinations(experts, 2)]),
                        "chosen_pair_cosine": mean([at[str(a), str(b)] for a, b in combinations(sorted(chosen), 2)]),
                        "norm_score_diagonal": float((ranks[0] == ranks[1]).mean()),
                        "top_norm_top_score": float(np.argmax(norms) == np.argmax(probabilities)),
                        "norm_score_spearman": float(stats.spearmanr(norms, probabilities).statistic),
                        "norm": mean(norms),
                        "top1_score": float(best[0]),
                        "top2_score": float(best[1]),
                        "active": float(np.mean([states[label][position] > 0.001 for label in experts])),
                    }
                    names = {"F": "reference", "F_same_input": "reference_same_input", "SE": "shared"}
                    for label in set(order) - set(experts):
                        values[f"{names[label]}_cosine"] = mean([at[expert, label] for expert in experts])
                    for name, value in values.items():
                        measured[layer, block_of[sequence], name + "_first" * (position == 0)].append(value)
        place = ["model", "corpus", "layer", "site"]
        token = [*place, "sequence", "position"]
        mean_rows = []
        for (layer, a, b), found in pairs.items():
            values = np.array([value for _, _, value in found])
            angles = 1 - np.arccos(np.clip(values, -1, 1)) / np.pi
            moments = [float(f(v)) for v in (values, angles) for f in (np.mean, lambda v: np.std(v, ddof=1))]
            content = np.array([position > 0 for _, position, _ in found])
            moments += [float(values[content].mean()), float(angles[content].mean())]
            blocks = range(max(block_of) + 1)
            by_document = [mean([v for s, p, v in found if p and block_of[s] == block]) for block in blocks]
            by_document = [value for value in by_document if value is not None]
            moments.append(float(np.std(by_document, ddof=1)) if len(by_document) > 1 else None)
            mean_rows.append((model, corpus, layer, "ffn", a, b, len(values), *moments))
        ratio_rows = [
            (model, corpus, layer, "ffn", expert, threshold, float((np.stack(rows) > threshold).mean()), len(rows))
            for (layer, expert), rows in active.items()
            for threshold in (0.0, *(0.001 * 2.0**power for power in range(-7, 8)))
        ]
        document_rows = [
            (model, corpus, layer, "ffn", block, name, sum(value is not None for value in values), mean(values))
            for (layer, block, name), values in measured.items()
        ]
        load_rows = [(model, corpus, layer, "ffn", *key, *value) for (layer, *key), value in load.items()]
        count_rows = [(model, corpus, layer, "ffn", *key, *value) for (layer, *key), value in counts.items()]
        content = sum(len(ids) - 1 for ids in sequences)
        cross_rows = [(model, corpus, layer, "ffn", *key, *value, content) for (layer, *key), value in cross.items()]
        scores = ["expert", "norm", "score", "norm_rank", "score_rank"]
        total = sum(map(len, sequences))
        normalised = "chosen experts" if self.config["model_type"] == "mixtral" else "all experts"
        # The weights above are softmax scores of the k largest logits, divided by their sum or not.
        rule = ("softmax", normalised, 1.0, 0.0, 0.0, "largest logits", 1.0, total)
        rule_rows = [(model, corpus, layer, "ffn", *rule) for layer in self.layers]
        tables = {
            "routing": (routing, [*token, "rank", "expert", "weight"]),
            "load": (load_rows, [*place, "expert", "rank", *VALUES["load"]]),
            "norm_score": (norm_score, [*token, *scores]),
            "rank_counts": (count_rows, [*place, "score_rank", "norm_rank", *VALUES["rank_counts"]]),
            "norm_score_cross": (cross_rows, [*place, "norm_expert", "score_expert", *VALUES["norm_score_cross"]]),
            "output_similarity": (mean_rows, [*place, "a", "b", *VALUES["output_similarity"]]),
            "activation_ratio": (ratio_rows, [*place, "expert", "threshold", *VALUES["activation_ratio"]]),
            "documents": (document_rows, [*place, "block", "measure", *VALUES["documents"]]),
            "router_rule": (rule_rows, [*place, *VALUES["router_rule"]]),
            "output_similarity_tokens": (by_token, [*token, "a", "b", "cosine"]),
        }
        return {name: pl.DataFrame(rows, columns, orient="row") for name, (rows, columns) in tables.items()}


VALUES = {
    "similarity": ["cosine"],
    "regression": ["n_pairs", "r", "r2", "slope", "intercept", "p_value"],
    "routing": ["expert", "weight"],
    "load": ["tokens", "tokens_first", "weight_sum"],
    "norm_score": ["norm", "score", "norm_rank", "score_rank"],
    "rank_counts": ["count", "count_first"],
    "norm_score_cross": ["largest_both", "rank_product", "tokens"],
    "activation_ratio": ["ratio", "tokens"],
    "documents": ["tokens", "value"],
    "router_rule": [
        "score",
        "normalised",
        "scale",
        "scale_spread",
        "weight_error",
        "selection",
        "selection_agreement",
        "tokens",
    ],
    "output_similarity": [
        *("tokens", "cosine_mean", "cosine_sd", "angular_mean", "angular_sd"),
        *("cosine_mean_content", "angular_mean_content", "cosine_sd_documents"),
    ],
    "output_similarity_tokens": ["cosine"],
}


def largest_difference(name: str, ours: pl.DataFrame, reference: pl.DataFrame) -> dict[str, float]:
    """Largest difference of each value column over all rows; what only one side has counts as infinite.

    Differences are absolute up to 1 and relative above, as float32 is: norms reach tens, sums of weights thousands.
    A row of zeros (an expert nobody chose, an empty cell of rank counts) may be absent from the reference.
    """
    values = VALUES[name]
    keys = [column for column in reference.columns if column not in values]
    kept = ours.select(keys + values)
    joined = kept.join(reference, on=keys, how="full", suffix="_reference", coalesce=True)
    if name in ("load", "rank_counts"):
        joined = joined.with_columns(pl.col(f"{value}_reference").fill_null(0) for value in values)
    differences = {}
    for value in values:
        if joined.schema[value] == pl.String:
            expression = (pl.col(value) != pl.col(f"{value}_reference")).cast(pl.Float64)
        else:
            wanted = pl.col(f"{value}_reference")
            expression = (pl.col(value) - wanted).abs() / pl.max_horizontal(wanted.abs(), 1.0)
        neither = pl.col(value).is_null() & pl.col(f"{value}_reference").is_null()
        expression = pl.when(neither).then(0.0).otherwise(expression.fill_null(math.inf))
        differences[value] = joined.select(expression.max()).item()
    return differences
