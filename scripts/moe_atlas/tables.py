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
# Measures of the table documents: each a mean over the tokens of a block of documents.
DOCUMENT_MEASURES = (
    *("pair_cosine", "pair_angular", "chosen_pair_cosine"),
    *("reference_cosine", "reference_same_input_cosine", "shared_cosine"),
    *("norm_score_diagonal", "top_norm_top_score", "norm_score_spearman"),
    *("norm", "top1_score", "top2_score", "active"),
)


@dataclass(frozen=True)
class Table:
    """One table: where it lives, for which corpora, and its columns (name, dtype, meaning)."""

    path: str  # below results/models/{model}/; of ACROSS below results/
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
    "matching": Table(
        "parametric/matching.parquet",
        (),
        (
            MODEL,
            LAYER,
            ("matrix", STRING, "up, act, down, or joint: one matching for a neuron's three vectors"),
            *PAIR,
            ("cosine_before", NUMBER, "cosine of the flattened matrices; null where the widths differ"),
            ("cosine_after", NUMBER, "the same once b's neurons are in the order that matches a's best"),
            ("tau", NUMBER, "Kendall's tau of that order against the one in the file; null where the widths differ"),
            ("null_after_mean", NUMBER, "mean of cosine_after for independent neurons of the same shape and norms"),
            ("null_after_sd", NUMBER, "its standard deviation over draws (n - 1)"),
            ("null_tau_sd", NUMBER, "standard deviation of tau over random orders; its mean is 0"),
            ("neurons", INTEGER, "neurons that are matched"),
        ),
    ),
    "projection": Table(
        "parametric/projection.parquet",
        (),
        (
            MODEL,
            LAYER,
            ("matrix", STRING, "up, act or down"),
            ("level", STRING, "matrix: a row is an expert's flattened weights; neuron: one neuron"),
            ("expert", STRING, "routed expert, or F"),
            ("neuron", INTEGER, "number of the neuron in its expert, a sample of many; null at level matrix"),
            ("pc1", NUMBER, "score on the first principal component, each coordinate standardised over the rows"),
            ("pc2", NUMBER, "on the second one; null where there are fewer"),
            ("pc3", NUMBER, "on the third one; null where there are fewer"),
            ("outlier", pl.Boolean, "in no cluster of DBSCAN by pc1 and pc2; null: level neuron, or too few experts"),
            ("null_outlier", NUMBER, "share of independent experts that are outliers by that rule"),
        ),
    ),
    "explained_variance": Table(
        "parametric/explained_variance.parquet",
        (),
        (
            MODEL,
            LAYER,
            ("matrix", STRING, "up, act or down"),
            ("level", STRING, "matrix or neuron, as in projection"),
            ("component", INTEGER, "1 is the principal component with the largest variance"),
            ("ratio", NUMBER, "its share of the variance of all rows; null where all rows are equal"),
            ("null_ratio", NUMBER, "mean share for independent Gaussian weights of the same shape"),
            ("null_sd", NUMBER, "standard deviation of that share over draws (n - 1)"),
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
            ("tokens_first", INTEGER, "of these, first tokens of a sequence (position 0)"),
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
            ("count_first", NUMBER, "of these, first tokens of a sequence (position 0)"),
        ),
    ),
    "norm_score_cross": Table(
        "behavioral/{corpus}/norm_score_cross.parquet",
        _LONG,
        (
            MODEL,
            CORPUS,
            LAYER,
            SITE,
            ("norm_expert", STRING, "routed expert whose output norm is looked at"),
            ("score_expert", STRING, "routed expert whose router score is looked at"),
            ("largest_both", NUMBER, "tokens on which these are the largest norm and the highest score; ties share"),
            ("rank_product", NUMBER, "sum of products of their centred ranks; the diagonal adds up to Spearman's rho"),
            ("tokens", INTEGER, "tokens summed over; the first of each sequence is left out"),
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
            ("cosine_q05", NUMBER, "5 % quantile of the cosine over tokens, to 0.01; above 8192 pairs to 0.04"),
            ("cosine_q25", NUMBER, "25 % quantile"),
            ("cosine_q50", NUMBER, "median"),
            ("cosine_q75", NUMBER, "75 % quantile"),
            ("cosine_q95", NUMBER, "95 % quantile"),
            ("cosine_mean_content", NUMBER, "mean cosine without the first token of each sequence"),
            ("angular_mean_content", NUMBER, "mean angular similarity without the first token of each sequence"),
            ("cosine_sd_documents", NUMBER, "standard deviation of the block means of the cosine; null below 2 blocks"),
        ),
    ),
    "activation_ratio": Table(
        "behavioral/{corpus}/activation_ratio.parquet",
        _LONG,
        (
            MODEL,
            CORPUS,
            LAYER,
            SITE,
            ("expert", STRING, "routed expert, on all tokens, chosen or not"),
            ("threshold", NUMBER, "0, or 0.001 times a power of 2 from 1/128 to 128"),
            ("ratio", NUMBER, "share of neurons and tokens with |sigma(W_act x)| above it"),
            ("tokens", INTEGER, "tokens it is over"),
        ),
    ),
    "intermediate": Table(
        "behavioral/{corpus}/intermediate.parquet",
        _SHORT,
        (
            MODEL,
            CORPUS,
            LAYER,
            SITE,
            SEQUENCE,
            POSITION,
            ("expert", STRING, "routed expert, or F"),
            ("neuron", INTEGER, "first neuron of a run of neighbours; at most 128 runs"),
            ("neurons", INTEGER, "neurons of a run"),
            ("value", NUMBER, "sigma(W_act x) of the run's neuron where it is largest in absolute value"),
        ),
    ),
    "documents": Table(
        "behavioral/{corpus}/documents.parquet",
        _LONG,
        (
            MODEL,
            CORPUS,
            LAYER,
            SITE,
            ("block", INTEGER, "run of documents, from 0; one document where there are at most 32"),
            ("measure", STRING, "see results/README.md; with _first of the tokens at position 0, else without them"),
            ("tokens", INTEGER, "tokens that have the measure"),
            ("value", NUMBER, "their mean; null without such a token"),
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
    "specialization": Table(
        "behavioral/{corpus}/specialization.parquet",
        _LONG,
        (
            MODEL,
            CORPUS,
            LAYER,
            SITE,
            ("measure", STRING, "load_entropy, max_vio, dead_share, load_share, co_activation, ...: results/README.md"),
            ("subject", STRING, "layer; an expert; of co_activation a pair i,j or mean_abs"),
            ("value", NUMBER, "null where it is undefined"),
            ("chance", NUMBER, "value of an even router, or of permuted choices, on as many tokens; null: none"),
            ("low", NUMBER, "95 % interval over blocks of documents; null below 5 blocks"),
            ("high", NUMBER, "95 % interval over blocks of documents; null below 5 blocks"),
            ("random_router", NUMBER, "value of a random router on the same inputs; null where tokens play no part"),
            ("tokens", INTEGER, "tokens counted; the first of each sequence is left out"),
        ),
    ),
    "domain": Table(
        "behavioral/domain.parquet",
        (),
        (
            MODEL,
            LAYER,
            SITE,
            ("measure", STRING, "share: of the corpus's tokens that chose the expert; js_divergence: of two loads"),
            ("corpus", STRING, "long corpus"),
            ("other", STRING, "the corpus it is compared with; null for a share"),
            ("expert", STRING, "routed expert; null for a divergence"),
            ("value", NUMBER, "a share, or bits from 0 to 1"),
            ("chance", NUMBER, "k/N; of a divergence its mean when blocks of documents are permuted"),
            ("p_value", NUMBER, "of a divergence: share of permutations that reach it; null for a share"),
            ("low", NUMBER, "95 % interval over blocks of documents; null below 5 blocks"),
            ("high", NUMBER, "95 % interval over blocks of documents; null below 5 blocks"),
            ("random_router", NUMBER, "the same of a random router on the same inputs"),
        ),
    ),
}

# Tables across models, made as one: below results/.
ACROSS: dict[str, Table] = {
    "claims": Table(
        "tables/claims.parquet",
        (),
        (
            ("claim", STRING, "row id of config/claims.tsv"),
            MODEL,
            ("corpus", STRING, "text the claim was judged on; null for claims about weights"),
            ("estimate", NUMBER, "what the claim's estimator gives; null where data are too few"),
            ("low", NUMBER, "95 % interval of the estimate"),
            ("high", NUMBER, "95 % interval of the estimate"),
            ("null", NUMBER, "value under the null"),
            ("p_value", NUMBER, "one-sided, in the claimed direction"),
            ("p_adjusted", NUMBER, "by Holm's method over all claims and texts of the model"),
            ("n", INTEGER, "units that p is over: pairs, layers, experts or tokens"),
            ("verdict", STRING, "holds, does not hold or cannot be told"),
            ("reason", STRING, "which part of the rule decided, or which data are missing"),
        ),
    ),
    "published": Table(
        "tables/published.parquet",
        (),
        (
            ("item", STRING, "what was published: docs/reproduction.md lists the items"),
            ("model", STRING, "repository on the Hub that the paper used"),
            ("row", STRING, "row id of the model sheet with that repository; null: none"),
            ("corpus", STRING, "text it is about; null: none"),
            ("layer", INTEGER, "null: of the whole model"),
            ("subject", STRING, "which matrix, ranks or experts; null: none"),
            ("published", STRING, "number or text as published"),
            ("ours", STRING, "the same of this run; null: there is no such row or table"),
            ("difference", NUMBER, "ours - published; null for texts"),
            ("tolerance", NUMBER, "largest difference that is agreement"),
            ("agrees", pl.Boolean, "null where there is no number of ours"),
            ("place", STRING, "in the paper"),
        ),
    ),
    "saturation": Table(
        "tables/saturation.parquet",
        (),
        (
            ("series", STRING, "rows of the model sheet that share it are revisions of one model"),
            MODEL,
            ("end", STRING, "the last model of the series"),
            CORPUS,
            LAYER,
            SITE,
            ("overlap", NUMBER, "mean share of a token's experts that the end chooses too"),
            ("chance", NUMBER, "of the overlap: k/N"),
            ("low", NUMBER, "of the overlap: 95 % interval over sequences or runs of tokens; null below 5 of them"),
            ("high", NUMBER, "its upper end"),
            ("top1", NUMBER, "share of tokens whose first choice is that of the end"),
            ("top1_chance", NUMBER, "1/N"),
            ("top1_low", NUMBER, "95 % interval, as of overlap"),
            ("top1_high", NUMBER, "its upper end"),
            ("js_divergence", NUMBER, "Jensen-Shannon divergence of the two loads, bits from 0 to 1"),
            ("js_chance", NUMBER, "its mean when the two models are exchanged at random in each unit"),
            ("js_p_value", NUMBER, "share of such exchanges that reach it"),
            ("js_low", NUMBER, "95 % interval, as of overlap"),
            ("js_high", NUMBER, "its upper end"),
            ("unit", STRING, "what is resampled: sequence or run (of tokens of one sequence)"),
            ("units", INTEGER, "how many of them"),
            ("tokens", INTEGER, "tokens compared; the first of each sequence is left out"),
        ),
    ),
}


def declared(name: str) -> Table:
    """The table of this name, of one model or across models."""
    return TABLES[name] if name in TABLES else ACROSS[name]


def conform(name: str, frame: pl.DataFrame) -> pl.DataFrame:
    """Give `frame` the declared columns in the declared order and dtypes.

    Raises AtlasError when a column is missing or too many; a column is never filled in.
    """
    schema = declared(name).schema
    if set(frame.columns) != set(schema):
        missing, extra = set(schema) - set(frame.columns), set(frame.columns) - set(schema)
        raise AtlasError(f"table {name}: columns missing {sorted(missing)}, not declared {sorted(extra)}.")
    return frame.select(pl.col(column).cast(dtype) for column, dtype in schema.items())


def empty(name: str) -> pl.DataFrame:
    """The table with its columns and no rows."""
    return pl.DataFrame(schema=declared(name).schema)


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
    if dict(frame.schema) != declared(name).schema:
        raise AtlasError(f"{path}: these are not the columns of the table {name}; delete it and run again.")
    return frame
