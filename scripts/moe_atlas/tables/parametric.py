"""Tables of a model's weights."""

import polars as pl

from moe_atlas.tables.columns import INTEGER, LAYER, MODEL, NUMBER, PAIR, STRING, Table

PARAMETRIC: dict[str, Table] = {
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
}
