"""Tidy tables to the dense arrays that are drawn."""

import numpy as np
import polars as pl

_EXTRAS = ("F", "F_same_input", "SE")


def label_order(labels: set[str]) -> list[str]:
    """Routed experts by number, then F, F_same_input, SE."""
    return sorted((label for label in labels if label.isdigit()), key=int) + [x for x in _EXTRAS if x in labels]


def pages_of(frame: pl.DataFrame, by: tuple[str, ...] = ("layer", "site")) -> dict[tuple, pl.DataFrame]:
    """Parts of a table, one for each layer (and site), ffn before attention, by layer."""
    if frame.is_empty():
        return {}
    parts = frame.partition_by(list(by), as_dict=True, maintain_order=True)
    if "site" in by:
        return dict(sorted(parts.items(), key=lambda item: (item[0][1] != "ffn", item[0][0])))
    return dict(sorted(parts.items()))


def numbered(column: pl.Series, labels: list[str]) -> np.ndarray:
    """Index of each label, int64 (rows,)."""
    index = {label: i for i, label in enumerate(labels)}
    return column.replace_strict(index, return_dtype=pl.Int64).to_numpy()


def square(frame: pl.DataFrame, value: str, labels: list[str] | None = None) -> tuple[list[str], np.ndarray]:
    """Pairs (a, b, value) to a symmetric (M, M) float64 array; pairs the table lacks are nan."""
    if labels is None:
        labels = label_order(set(frame["a"]) | set(frame["b"]))
    matrix = np.full((len(labels), len(labels)), np.nan)
    a, b, values = numbered(frame["a"], labels), numbered(frame["b"], labels), frame[value].to_numpy()
    matrix[a, b] = values
    matrix[b, a] = values
    return labels, matrix


def token_index(tokens: pl.DataFrame, limit: int | None = None) -> pl.DataFrame:
    """sequence, position, token and its row number `t`, in the order of the table, at most `limit` rows."""
    tokens = tokens.sort("sequence", "position").select("sequence", "position", "token")
    return (
        (tokens if limit is None else tokens.head(limit)).with_row_index("t").with_columns(pl.col("t").cast(pl.Int64))
    )


def token_squares(frame: pl.DataFrame, tokens: pl.DataFrame, value: str) -> tuple[list[str], np.ndarray]:
    """Pairs per token to (T, M, M) float64; `tokens` is a token_index, tokens outside it are left out."""
    labels = label_order(set(frame["a"].unique()) | set(frame["b"].unique()))
    frame = frame.join(tokens.select("sequence", "position", "t"), on=["sequence", "position"])
    stack = np.full((len(tokens), len(labels), len(labels)), np.nan)
    t = frame["t"].to_numpy()
    a, b, values = numbered(frame["a"], labels), numbered(frame["b"], labels), frame[value].to_numpy()
    stack[t, a, b] = values
    stack[t, b, a] = values
    return labels, stack


def token_experts(frame: pl.DataFrame, tokens: pl.DataFrame, value: str, experts: int) -> np.ndarray:
    """Rows (sequence, position, expert, value) to (T, N) float64, zero where the table has no row."""
    frame = frame.join(tokens.select("sequence", "position", "t"), on=["sequence", "position"])
    array = np.zeros((len(tokens), experts))
    array[frame["t"].to_numpy(), frame["expert"].cast(pl.Int64).to_numpy()] = frame[value].to_numpy()
    return array


def chosen_labels(routing: pl.DataFrame, tokens: pl.DataFrame) -> list[list[int]]:
    """Chosen experts of each token, largest weight first; T lists of int."""
    frame = routing.join(tokens.select("sequence", "position", "t"), on=["sequence", "position"]).sort("t", "rank")
    chosen: list[list[int]] = [[] for _ in range(len(tokens))]
    for t, expert in zip(frame["t"].to_list(), frame["expert"].to_list(), strict=True):
        chosen[t].append(int(expert))
    return chosen


def load_array(frame: pl.DataFrame, value: str = "tokens") -> np.ndarray:
    """Load of one layer and site as (N, k) float64: [expert, rank]."""
    expert, rank = frame["expert"].cast(pl.Int64).to_numpy(), frame["rank"].to_numpy()
    array = np.zeros((expert.max() + 1, rank.max() + 1))
    array[expert, rank] = frame[value].to_numpy()
    return array


def rank_array(frame: pl.DataFrame) -> np.ndarray:
    """Rank counts of one layer and site as (N, N) float64: [score rank, norm rank]."""
    score, norm = frame["score_rank"].to_numpy(), frame["norm_rank"].to_numpy()
    array = np.zeros((max(score.max(), norm.max()) + 1,) * 2)
    array[score, norm] = frame["count"].to_numpy()
    return array


def balance(load: np.ndarray) -> tuple[float, float]:
    """Normalised entropy and MaxVio of a load (N, k).

    f = share of the N experts in all choices. Entropy -sum f log f / log N is 1 for an even load, 0 when one
    expert takes everything. MaxVio = N max f - 1 (Wang et al. 2024, auxiliary-loss-free balancing) is 0 for an
    even load.
    """
    total = load.sum(axis=1)
    share = total / total.sum()
    positive = share[share > 0]
    entropy = float(-(positive * np.log(positive)).sum() / np.log(len(share))) if len(share) > 1 else 1.0
    return entropy, float(share.max() * len(share) - 1)


def diagonal_share(counts: np.ndarray) -> np.ndarray:
    """Share of each norm rank's counts whose score rank is the same, (N,); chance is 1/N."""
    total = counts.sum(axis=0)
    return np.divide(np.diag(counts), total, out=np.full(len(total), np.nan), where=total > 0)
