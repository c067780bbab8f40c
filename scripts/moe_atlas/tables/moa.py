"""Tables of the MoA experiments, below results/. They are made by `make moa`, not by `make atlas`."""

import polars as pl

from moe_atlas.tables.columns import INTEGER, NUMBER, STRING, Table

_STUDY = (
    ("study", STRING, "of the settings' studies"),
    ("objective", STRING, "causal, masked or translation"),
    ("arm", STRING, "of the settings' arms"),
)
_SEED = ("seed", INTEGER, "of the weights before the first step and of the order of the texts")
_RATE = ("learning_rate", NUMBER, "of the steps between warm-up and decay")

_ROUTED = (
    ("attention", STRING, "mha: multi-head attention; moa: heads as experts"),
    ("experts", INTEGER, "E; null: of mha"),
    ("k", INTEGER, "experts of a token; null: of mha"),
    ("head_dim", INTEGER, "D"),
    ("heads", INTEGER, "of mha; null: of moa"),
    ("selects", pl.Boolean, "false where k = E, so that every token has all experts; null: of mha"),
    ("normalization", STRING, "of the k weights: none, detached or full; null: of mha"),
    ("balance", NUMBER, "weight of the balance loss of a layer; null: of mha"),
    ("z", NUMBER, "weight of the z-loss; null: of mha"),
    ("router", STRING, "learned, frozen as it was drawn, or none, of mha"),
)
_COSTS = (
    ("parameters", INTEGER, "of the whole model, embeddings among them"),
    ("attention_parameters", INTEGER, "of all attention blocks, routers among them"),
    ("macs", NUMBER, "multiply-accumulates a token at the training length, attention maps among them"),
)

MOA: dict[str, Table] = {
    "moa_runs": Table(
        "tables/moa_runs.parquet",
        (),
        (
            *_STUDY,
            *_ROUTED,
            _SEED,
            _RATE,
            ("chosen", pl.Boolean, "whether this learning rate is the arm's; of another only the validation is kept"),
            *_COSTS,
            ("test", STRING, "validation, or a test set"),
            ("metric", STRING, "what value is: perplexity, bleu, exact"),
            ("value", NUMBER, "of the weights after the last step"),
            ("chance", NUMBER, "of token frequencies alone; of translation, of the best answer that knows no rule"),
            ("count", INTEGER, "tokens, or sentences, that value is over"),
            ("tokens", INTEGER, "that the run was trained on, counted as often as they were read"),
            ("steps", INTEGER, "of the optimizer, those of the decay among them"),
            ("plateau", pl.Boolean, "whether a plateau ended the run, not the largest number of steps"),
        ),
    ),
    "moa_curves": Table(
        "tables/moa_curves.parquet",
        (),
        (
            *_STUDY,
            _SEED,
            _RATE,
            ("chosen", pl.Boolean, "as in moa_runs"),
            ("step", INTEGER, "after which; of train, the last of those that the mean is over"),
            ("split", STRING, "train: mean over the steps since the look before; validation"),
            (
                "loss",
                NUMBER,
                "nats a token, without the routers' own losses; of train with dropout and label smoothing, if any",
            ),
        ),
    ),
    "moa_throughput": Table(
        "tables/moa_throughput.parquet",
        (),
        (
            *_STUDY,
            _SEED,
            _RATE,
            ("steps", INTEGER, "of the optimizer"),
            ("tokens", INTEGER, "that the run was trained on"),
            ("seconds", NUMBER, "of all steps, without the looks at the validation set"),
            ("tokens_per_second", NUMBER, "on the machine as it was, beside what else ran"),
        ),
    ),
    "moa_arms": Table(
        "tables/moa_arms.parquet",
        (),
        (
            *_STUDY[1:],
            ("test", STRING, "the test set"),
            ("metric", STRING, "perplexity, bleu or exact"),
            ("seeds", INTEGER, "runs at the chosen learning rate"),
            ("value", NUMBER, "mean over seeds; of perplexity the geometric mean, that of the mean loss"),
            ("low", NUMBER, "95 % interval of the mean by Student's t, of perplexity on its logarithm; null: one seed"),
            ("high", NUMBER, "its upper end"),
            ("chance", NUMBER, "as in moa_runs"),
            *_ROUTED,
            *_COSTS,
            ("plateaus", INTEGER, "runs that a plateau ended"),
            ("steps", NUMBER, "mean over seeds"),
        ),
    ),
    "moa_differences": Table(
        "tables/moa_differences.parquet",
        (),
        (
            *_STUDY,
            ("baseline", STRING, "arm that it is compared with, at the same seeds"),
            ("test", STRING, "the test set"),
            ("metric", STRING, "what the difference is of; of perplexity, of its natural logarithm"),
            ("seeds", INTEGER, "pairs of runs"),
            ("difference", NUMBER, "mean over seeds of the arm less the baseline; below 0 a perplexity is better"),
            ("low", NUMBER, "95 % interval of the mean by Student's t; null below 2 seeds, or if all agree but on 0"),
            ("high", NUMBER, "its upper end"),
            ("p_value", NUMBER, "two-sided paired t; null below 2 seeds or where no difference varies"),
            ("p_adjusted", NUMBER, "by Holm's method over all rows of the study"),
        ),
    ),
    "moa_tasks": Table(
        "tables/moa_tasks.parquet",
        (),
        (
            ("task", STRING, "id of the objective in the settings"),
            ("split", STRING, "train, validation or a test"),
            ("measure", STRING, "what value is: a number of the sentences, or bleu or exact of an answer"),
            ("answer", STRING, "which answer that follows not all rules is scored; null: none is"),
            ("value", NUMBER, "bleu from 0 to 100; exact and shares from 0 to 1; words and tokens a sentence"),
            ("note", STRING, "sacreBLEU's signature of bleu; empty otherwise"),
        ),
    ),
    "moa_costs": Table(
        "tables/moa_costs.parquet",
        (),
        (
            ("model", STRING, "as the paper names it"),
            ("task", STRING, "what the paper trained it on"),
            ("quantity", STRING, "parameters or macs"),
            ("published", NUMBER, "in millions, as printed"),
            ("computed", NUMBER, "in millions, by the formulas of this library; null: there is none for this model"),
            ("digits", INTEGER, "after the point that are compared; below 0, tens or hundreds of millions"),
            ("agrees", pl.Boolean, "whether both are the same once rounded so"),
            ("note", STRING, "what was assumed, and why the two may differ"),
        ),
    ),
}
