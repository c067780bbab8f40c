"""Tables of fine-tuning, below results/. They are made by `make emoe`, not by `make atlas`."""

import polars as pl

from moe_atlas.tables.columns import INTEGER, MODEL, NUMBER, STRING, Table

_RUN = (
    ("study", STRING, "row of the settings' studies"),
    MODEL,
    ("backbone", STRING, "model_type of the pre-trained model"),
    ("task", STRING, "id of the task"),
    ("arm", STRING, "how it was tuned, or tuned and then evaluated with the mask on or off"),
    ("experts", INTEGER, "N of the converted FFNs; null: there are none"),
    ("k", INTEGER, "experts of a token; null: there are none"),
    ("layers", STRING, "FFNs that are converted, or have a dropout, from 0, separated by commas; null: none"),
    ("fraction", NUMBER, "share of the training set"),
)
_EXAMPLES = (
    ("task", STRING, "id of the task"),
    ("split", STRING, "train, validation, in-domain, shifted; of instructions shots too"),
    ("document", STRING, "what the text is from; no document is in two splits"),
    ("text", STRING, "the text; the prompt of an instruction; a question with its choices"),
    ("pair", STRING, "second text of a pair, response, or subject of a question; null: there is none"),
    ("label", NUMBER, "class, from 0, value of a regression, or right choice; null: of a response"),
    ("classes", INTEGER, "number of classes; 0: a regression"),
)

TUNING: dict[str, Table] = {
    "emoe_tasks": Table("emoe/tasks/{task}.parquet", (), _EXAMPLES),
    "emoe_runs": Table(
        "tables/emoe_runs.parquet",
        (),
        (
            *_RUN,
            ("seed", INTEGER, "of the head, the order of the examples and what the arm draws"),
            ("learning_rate", NUMBER, "peak"),
            ("chosen", pl.Boolean, "whether this learning rate is the arm's; of another only the validation is kept"),
            ("test", STRING, "validation, in-domain or shifted; test/subject: the questions of a subject"),
            ("metric", STRING, "what value is"),
            ("value", NUMBER, "1 is perfect"),
            ("chance", NUMBER, "of the best answer that is the same for all; 1/choices of letters; 0 of correlations"),
            ("examples", INTEGER, "of the test"),
            ("step", INTEGER, "after which the kept weights were reached"),
        ),
    ),
    "emoe_differences": Table(
        "tables/emoe_differences.parquet",
        (),
        (
            *_RUN,
            ("baseline", STRING, "arm that it is compared with, at the same seeds"),
            ("test", STRING, "in-domain or shifted"),
            ("metric", STRING, "what the difference is of"),
            ("seeds", INTEGER, "pairs of runs"),
            ("difference", NUMBER, "mean over seeds of the arm less the baseline"),
            ("low", NUMBER, "95 % interval of the mean by Student's t; null below 2 seeds, or if all agree but on 0"),
            ("high", NUMBER, "its upper end"),
            ("p_value", NUMBER, "two-sided paired t; null below 2 seeds or where no difference varies"),
            ("p_adjusted", NUMBER, "by Holm's method over all rows of the study and model"),
        ),
    ),
    "emoe_training_selection": Table(
        "tables/emoe_training_selection.parquet",
        (),
        (
            *_RUN,
            ("seed", INTEGER, "as in emoe_runs"),
            ("step", INTEGER, "of the tuning; 0 is before the first"),
            ("layer", INTEGER, "FFN, from 0"),
            ("measure", STRING, "share of choices; overlap_first, overlap_before: of a token's experts with before"),
            ("expert", STRING, "expert label; null: of all"),
            ("value", NUMBER, "0 to 1, over the same texts of the validation set at each step"),
            ("chance", NUMBER, "1/N of share, k/N of overlaps"),
        ),
    ),
}
