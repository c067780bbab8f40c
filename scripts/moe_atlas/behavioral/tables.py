"""Behavioral tables from the recorded arrays of a layer and site: numpy in, polars out, no torch.

Source of the quantities: A Closer Look into Mixture-of-Experts (arXiv 2406.18219), section 5 and
appendices F, G and I. Each builder takes `arrays` (see activations.py), `labels` (the N routed
experts first, then F, F_same_input and SE where they exist) and, for short corpora, `tokens`: the rows
of the table tokens, (T,), in the order of the arrays.
"""

from collections.abc import Callable, Iterator

import numpy as np
import polars as pl

from moe_atlas import tables
from moe_atlas.behavioral.activations import Activations, Arrays
from moe_atlas.behavioral.documents import activation_ratio, documents
from moe_atlas.behavioral.router_rule import router_rule
from moe_atlas.behavioral.specialization import flags_by_layer, specialization
from moe_atlas.errors import AtlasError


def softmax(logits: np.ndarray) -> np.ndarray:
    """Softmax over the last axis in float64."""
    shifted = logits.astype(np.float64)
    exponentials = np.exp(shifted - shifted.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def average_ranks(values: np.ndarray) -> np.ndarray:
    """Ranks along the last axis of (T, N), ascending from 0, equal values sharing their mean rank."""
    order = np.argsort(values, axis=-1, kind="stable")
    ordered = np.take_along_axis(values, order, axis=-1)
    position = np.broadcast_to(np.arange(values.shape[-1]), values.shape)
    edge = np.ones((len(values), 1), dtype=bool)
    differs = ordered[:, 1:] != ordered[:, :-1]
    first = np.maximum.accumulate(np.where(np.hstack([edge, differs]), position, 0), axis=-1)
    after_last = np.where(np.hstack([differs, edge]), position, values.shape[-1])
    last = np.minimum.accumulate(after_last[:, ::-1], axis=-1)[:, ::-1]
    ranks = np.empty(values.shape)
    np.put_along_axis(ranks, order, (first + last) / 2, axis=-1)
    return ranks


def _names(labels: list[str], indices: np.ndarray) -> pl.Series:
    return pl.Series(labels, dtype=pl.String)[indices]


def _per_token(tokens: pl.DataFrame, count: int | np.ndarray) -> dict[str, np.ndarray]:
    """Columns sequence and position, every token repeated `count` times."""
    return {column: np.repeat(tokens[column].to_numpy(), count) for column in ("sequence", "position")}


def routing(arrays: Arrays, labels: list[str], tokens: pl.DataFrame) -> pl.DataFrame:
    """Chosen experts of every token, largest weight first; empty slots (-1) have no row (appendix I)."""
    ids = arrays["ids"]
    used = ids >= 0
    ranks = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    return pl.DataFrame(
        _per_token(tokens, used.sum(1))
        | {"rank": ranks[used], "expert": _names(labels, ids[used]), "weight": arrays["weights"][used]}
    )


def load(arrays: Arrays, labels: list[str]) -> pl.DataFrame:
    """Tokens and weight that each routed expert got, by rank; a row for every expert, used or not."""
    experts, top_k = arrays["load_tokens"].shape
    return pl.DataFrame(
        {
            "expert": _names(labels, np.repeat(np.arange(experts), top_k)),
            "rank": np.tile(np.arange(top_k), experts),
            "tokens": arrays["load_tokens"].ravel(),
            "tokens_first": arrays["load_tokens_first"].ravel(),
            "weight_sum": arrays["load_weight"].ravel(),
        }
    )


def norm_score(arrays: Arrays, labels: list[str], tokens: pl.DataFrame) -> pl.DataFrame:
    """Output norm and router score of every routed expert on every token, with ranks (section 5.2).

    The score is the softmax over all N logits for every architecture, whatever weight the model
    applies. Score ranks are those of the logits: the softmax keeps their order but may round two
    of them together.
    """
    logits, norms = arrays["logits"], arrays["norms"]
    count, experts = logits.shape
    return pl.DataFrame(
        _per_token(tokens, experts)
        | {
            "expert": _names(labels, np.tile(np.arange(experts), count)),
            "norm": norms.ravel(),
            "score": softmax(logits).ravel(),
            "norm_rank": average_ranks(norms).ravel(),
            "score_rank": average_ranks(logits).ravel(),
        }
    )


def rank_counts(arrays: Arrays, labels: list[str]) -> pl.DataFrame:
    """Counts at every pair of score rank and norm rank, zeros included (appendix G)."""
    counts = arrays["rank_counts"]
    score_rank, norm_rank = np.indices(counts.shape)
    return pl.DataFrame(
        {
            "score_rank": score_rank.ravel(),
            "norm_rank": norm_rank.ravel(),
            "count": counts.ravel(),
            "count_first": arrays["rank_counts_first"].ravel(),
        }
    )


def norm_score_cross(arrays: Arrays, labels: list[str]) -> pl.DataFrame:
    """Sums of norms of experts against scores of experts, each with each (moe_atlas/cross_ranks.py)."""
    norm_expert, score_expert = np.indices(arrays["cross_rank"].shape)
    return pl.DataFrame(
        {
            "norm_expert": _names(labels, norm_expert.ravel()),
            "score_expert": _names(labels, score_expert.ravel()),
            "largest_both": arrays["cross_largest"].ravel(),
            "rank_product": arrays["cross_rank"].ravel(),
        }
    ).with_columns(tokens=pl.lit(int(arrays["cross_tokens"][0]), dtype=pl.Int64))


def _moments(total: np.ndarray, squares: np.ndarray, count: int) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Mean and standard deviation (n - 1) from a sum and a sum of squares; None where undefined."""
    if count == 0:
        return None, None
    mean = total / count
    if count == 1:
        return mean, None
    # Equal values leave a variance of -1e-17 or so after the subtraction.
    return mean, np.sqrt(np.maximum(squares - total * mean, 0) / (count - 1))


def output_similarity(arrays: Arrays, labels: list[str]) -> pl.DataFrame:
    """Mean and standard deviation over tokens of the pairs' cosine and angular similarity (section 5.1).

    Content is all tokens but the first of each sequence; the standard deviation over documents is that of the blocks'
    means of content tokens. Quantiles are over all tokens, read from a histogram.
    """
    first, second = np.triu_indices(len(labels))
    count, content = int(arrays["tokens"][0]), int(arrays["tokens"][0] - arrays["tokens_first"][0])
    columns = {"a": _names(labels, first), "b": _names(labels, second)}
    frame = pl.DataFrame(columns).with_columns(tokens=pl.lit(count, dtype=pl.Int64))
    for measure in ("cosine", "angular"):
        sums = (arrays[f"{measure}_{moment}"][first, second] for moment in ("sum", "square"))
        for name, values in zip(("mean", "sd"), _moments(*sums, count), strict=True):
            column = pl.lit(None, dtype=pl.Float64) if values is None else pl.Series(values)
            frame = frame.with_columns(column.alias(f"{measure}_{name}"))
    columns = {f"cosine_q{100 * q:02.0f}": quantile(arrays["cosine_histogram"], arrays["cosine_range"], q) for q in QS}
    for measure in ("cosine", "angular"):
        sums = (arrays[f"{measure}_sum"] - arrays[f"{measure}_sum_first"])[first, second]
        columns[f"{measure}_mean_content"] = sums / content if content else np.full(len(first), np.nan)
    inside = arrays["document_tokens"][0]
    means = arrays["cosine_block"][inside > 0] / inside[inside > 0, None]
    columns["cosine_sd_documents"] = means.std(0, ddof=1) if len(means) > 1 else np.full(len(first), np.nan)
    return frame.with_columns(pl.Series(name, values).fill_nan(None) for name, values in columns.items())


def output_similarity_tokens(arrays: Arrays, labels: list[str], tokens: pl.DataFrame) -> pl.DataFrame:
    """Cosine of every pair of outputs on every token (section 5.1, figure 2)."""
    first, second = np.triu_indices(len(labels))
    cosine = arrays["cosine"]
    return pl.DataFrame(
        _per_token(tokens, len(first))
        | {
            "a": _names(labels, np.tile(first, len(cosine))),
            "b": _names(labels, np.tile(second, len(cosine))),
            "cosine": cosine[:, first, second].ravel(),
        }
    )


QS = (0.05, 0.25, 0.5, 0.75, 0.95)


def quantile(counts: np.ndarray, spans: np.ndarray, q: float) -> np.ndarray:
    """Quantiles (P,) of P series in -1..1 from counts (P, bins) in equal bins and their smallest and largest (P, 2).

    The value of rank ceil(q n), whose bin is known, as if the values of a bin were spread out evenly in it: the error
    is below 2 / bins. NaN without values.
    """
    bins, total = counts.shape[1], counts.sum(1)
    rank = np.maximum(np.ceil(q * total), 1)
    reached = counts.cumsum(1)
    cell = (reached < rank[:, None]).sum(1).clip(max=bins - 1)
    rows = np.arange(len(counts))
    inside = counts[rows, cell]
    place = (rank - (reached[rows, cell] - inside) - 0.5) / np.maximum(inside, 1)
    values = ((cell + place) * (2 / bins) - 1).clip(spans[:, 0], spans[:, 1])
    return np.where(total > 0, values, np.nan)


FROM_SUMS: dict[str, Callable[[Arrays, list[str]], pl.DataFrame]] = {
    "load": load,
    "rank_counts": rank_counts,
    "norm_score_cross": norm_score_cross,
    "output_similarity": output_similarity,
    "router_rule": router_rule,
    "activation_ratio": activation_ratio,
    "documents": documents,
}
FROM_TOKENS: dict[str, Callable[[Arrays, list[str], pl.DataFrame], pl.DataFrame]] = {
    "routing": routing,
    "norm_score": norm_score,
    "output_similarity_tokens": output_similarity_tokens,
}


# Made from sums too, but with a look at all layers of the model first.
FROM_LAYERS = {"specialization": specialization}


def layers(name: str, activations: Activations, tokens: pl.DataFrame) -> Iterator[pl.DataFrame]:
    """The table `name`, one frame for each layer and site, columns as declared.

    Raises AtlasError when the recorded tokens are not those of the table `tokens`.
    """
    metadata = activations.metadata
    flags = flags_by_layer(activations.each("importance_output_max")) if name in FROM_LAYERS else {}
    for entry, arrays in activations:
        recorded = int(arrays["tokens"][0])
        if recorded != len(tokens) or len(arrays.get("ids", tokens)) != len(tokens):
            raise AtlasError(
                f"{activations.path}: layer {entry['layer']} has {recorded} tokens and tokens.parquet {len(tokens)}; "
                "they are of different runs, so extract this model and corpus again."
            )
        if name in FROM_LAYERS:
            own = flags[entry["layer"], entry["site"]]
            frame = FROM_LAYERS[name](arrays, entry["labels"], own, entry["layer"])
        elif name in FROM_SUMS:
            frame = FROM_SUMS[name](arrays, entry["labels"])
        else:
            frame = FROM_TOKENS[name](arrays, entry["labels"], tokens)
        keys = {"model": metadata["model"], "corpus": metadata["corpus"], "site": entry["site"]}
        yield tables.conform(
            name, frame.with_columns(layer=pl.lit(entry["layer"]), **{k: pl.lit(v) for k, v in keys.items()})
        )
