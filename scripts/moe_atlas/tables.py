"""Every table's columns, declared once: the data contract.

One row is one observation. Layers count from 0. Expert labels are strings: "0"... routed
experts, "F" the dense reference's FFN on its own model's hidden states, "F_same_input" the
same FFN on the MoE's inputs, "SE" the shared expert. Pairs are kept once, a before b in the
order of the labels, diagonal included. A dense model has the same tables; only tokens has rows.
"""

import os
from dataclasses import dataclass

import polars as pl

from moe_atlas.errors import AtlasError
from moe_atlas.files import atomic_path

STRING, INTEGER, NUMBER = pl.String, pl.Int64, pl.Float64

MODEL = ("model", STRING, "row id of config/models.tsv")
CORPUS = ("corpus", STRING, "row id of config/corpora.tsv")
LAYER = ("layer", INTEGER, "decoder layer, from 0")
SITE = ("site", STRING, "ffn or attention: which experts of the layer")
SEQUENCE = ("sequence", INTEGER, "sequence of the corpus, from 0")
POSITION = ("position", INTEGER, "token position in the sequence, from 0, special tokens included")
PAIR = (
    ("a", STRING, "expert label, first of the pair"),
    ("b", STRING, "expert label, second of the pair"),
)


# Axes of what extraction records of a router's rule, which is named in the table router_rule. Simplest first.
SCORES = ("softmax", "sigmoid", "sqrt softplus", "identity", "sparsemixer")
GROUPINGS = ("none", "largest", "two largest")  # what groups of experts are chosen by


@dataclass(frozen=True)
class Table:
    """One table: where it lives, for which corpora, and its columns (name, dtype, meaning)."""

    path: str  # below results/models/{model}/
    kinds: tuple[str, ...]  # corpus kinds it exists for; empty: not of a corpus
    columns: tuple[tuple[str, type[pl.DataType], str], ...]

    @property
    def schema(self) -> dict[str, type[pl.DataType]]:
        return {name: dtype for name, dtype, _ in self.columns}


_LONG, _SHORT = ("short", "long"), ("short",)

TABLES: dict[str, Table] = {
    "similarity": Table(
        "parametric/similarity.parquet",
        (),
        (
            MODEL,
            LAYER,
            ("matrix", STRING, "up, act, down or router"),
            ("level", STRING, "matrix: flattened weights (router: its rows); neuron_mean: mean neuron"),
            *PAIR,
            ("cosine", NUMBER, "cosine of the two vectors, -1..1"),
        ),
    ),
    "regression": Table(
        "parametric/regression.parquet",
        (),
        (
            MODEL,
            LAYER,
            ("matrix", STRING, "regressor: neuron-mean similarity of up, act or down"),
            ("n_pairs", INTEGER, "pairs of routed experts, N(N-1)/2"),
            ("r", NUMBER, "Pearson r with the router similarity, sign kept"),
            ("r2", NUMBER, "r squared; chance is 1/(n_pairs-1)"),
            ("slope", NUMBER, "least squares, router similarity on weight similarity"),
            ("intercept", NUMBER, "of the same line"),
            ("p_value", NUMBER, "two-sided, as if pairs were independent (they share experts)"),
            ("p_mantel", NUMBER, "two-sided Mantel test: experts permuted"),
            ("r_low", NUMBER, "2.5 % quantile of r over resampled experts"),
            ("r_high", NUMBER, "97.5 % quantile of r over resampled experts"),
        ),
    ),
    "tokens": Table(
        "behavioral/{corpus}/tokens.parquet",
        _LONG,
        (
            MODEL,
            CORPUS,
            SEQUENCE,
            POSITION,
            ("token_id", INTEGER, "id in the model's tokenizer"),
            ("token", STRING, "the token as text"),
        ),
    ),
    "routing": Table(
        "behavioral/{corpus}/routing.parquet",
        _SHORT,
        (
            MODEL,
            CORPUS,
            LAYER,
            SITE,
            SEQUENCE,
            POSITION,
            ("rank", INTEGER, "0 is the chosen expert with the largest weight"),
            ("expert", STRING, "chosen expert"),
            ("weight", NUMBER, "weight the model applies to its output"),
        ),
    ),
    "load": Table(
        "behavioral/{corpus}/load.parquet",
        _LONG,
        (
            MODEL,
            CORPUS,
            LAYER,
            SITE,
            ("expert", STRING, "routed expert"),
            ("rank", INTEGER, "0 is the chosen expert with the largest weight"),
            ("tokens", INTEGER, "tokens that chose this expert at this rank"),
            ("weight_sum", NUMBER, "sum of the weights applied there"),
        ),
    ),
    "router_rule": Table(
        "behavioral/{corpus}/router_rule.parquet",
        _LONG,
        (
            MODEL,
            CORPUS,
            LAYER,
            SITE,
            ("score", STRING, "softmax, sigmoid, sqrt softplus, identity or sparsemixer of the logits; any; other"),
            ("normalised", STRING, "the score's sum is 1 over all experts or chosen experts; none; other: by token"),
            ("scale", NUMBER, "weight / score, to weight_error; mean over experts; null where it differs by token"),
            ("scale_spread", NUMBER, "largest scale of an expert / smallest - 1; 0 where all have the same"),
            ("weight_error", NUMBER, "largest relative difference of the rule's weights from the model's"),
            ("selection", STRING, "largest logits, largest score + bias, groups, groups + bias or other"),
            ("selection_agreement", NUMBER, "share of tokens whose experts are chosen so"),
            ("logit_error", NUMBER, "largest difference of the recorded logits from the router's own"),
            ("tokens", INTEGER, "tokens the rule was found on"),
        ),
    ),
    "norm_score": Table(
        "behavioral/{corpus}/norm_score.parquet",
        _SHORT,
        (
            MODEL,
            CORPUS,
            LAYER,
            SITE,
            SEQUENCE,
            POSITION,
            ("expert", STRING, "routed expert, chosen or not"),
            ("norm", NUMBER, "L2 norm of its output, before the routing weight"),
            ("score", NUMBER, "softmax of the router logits over all N experts"),
            ("norm_rank", NUMBER, "0 is the smallest norm; ties get the average rank"),
            ("score_rank", NUMBER, "0 is the lowest score; ties get the average rank"),
        ),
    ),
    "rank_counts": Table(
        "behavioral/{corpus}/rank_counts.parquet",
        _LONG,
        (
            MODEL,
            CORPUS,
            LAYER,
            SITE,
            ("score_rank", INTEGER, "0 is the lowest score"),
            ("norm_rank", INTEGER, "0 is the smallest norm"),
            ("count", NUMBER, "tokens x experts at both ranks; a tie is shared out equally"),
        ),
    ),
    "output_similarity": Table(
        "behavioral/{corpus}/output_similarity.parquet",
        _LONG,
        (
            MODEL,
            CORPUS,
            LAYER,
            SITE,
            *PAIR,
            ("tokens", INTEGER, "tokens the means are over"),
            ("cosine_mean", NUMBER, "mean cosine of the two outputs"),
            ("cosine_sd", NUMBER, "its standard deviation over tokens (n - 1)"),
            ("angular_mean", NUMBER, "mean of 1 - arccos(cosine)/pi; orthogonal is 0.5"),
            ("angular_sd", NUMBER, "its standard deviation over tokens (n - 1)"),
        ),
    ),
    "output_similarity_tokens": Table(
        "behavioral/{corpus}/output_similarity_tokens.parquet",
        _SHORT,
        (
            MODEL,
            CORPUS,
            LAYER,
            SITE,
            SEQUENCE,
            POSITION,
            *PAIR,
            ("cosine", NUMBER, "cosine of the two outputs on this token"),
        ),
    ),
}


def conform(name: str, frame: pl.DataFrame) -> pl.DataFrame:
    """Give `frame` the declared columns in the declared order and dtypes.

    Raises AtlasError when a column is missing or too many; a column is never filled in.
    """
    schema = TABLES[name].schema
    if set(frame.columns) != set(schema):
        missing, extra = set(schema) - set(frame.columns), set(frame.columns) - set(schema)
        raise AtlasError(f"table {name}: columns missing {sorted(missing)}, not declared {sorted(extra)}.")
    return frame.select(pl.col(column).cast(dtype) for column, dtype in schema.items())


def empty(name: str) -> pl.DataFrame:
    """The table with its columns and no rows."""
    return pl.DataFrame(schema=TABLES[name].schema)


def write(name: str, frame: pl.DataFrame, path: str | os.PathLike) -> None:
    """Write one table as zstd parquet, atomically, after checking its columns."""
    frame = conform(name, frame)
    with atomic_path(path) as temporary:
        frame.write_parquet(temporary, compression="zstd")


def read(name: str, path: str | os.PathLike) -> pl.DataFrame:
    """Read one table; a file that is missing or has other columns is an AtlasError naming it."""
    try:
        frame = pl.read_parquet(path)
    except (FileNotFoundError, pl.exceptions.ComputeError) as error:
        raise AtlasError(f"{path}: this is not a readable parquet table ({error}); delete it and run again.") from None
    if dict(frame.schema) != TABLES[name].schema:
        raise AtlasError(f"{path}: these are not the columns of the table {name}; delete it and run again.")
    return frame
