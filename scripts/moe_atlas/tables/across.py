"""Tables across models, each made as one: below results/."""

import polars as pl

from moe_atlas.tables.columns import CORPUS, INTEGER, LAYER, MODEL, NUMBER, SITE, STRING, Table

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
