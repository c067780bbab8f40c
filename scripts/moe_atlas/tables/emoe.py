"""Tables of dense models whose FFNs are read as experts (EMoE): below results/."""

from moe_atlas.tables.columns import CORPUS, INTEGER, LAYER, MODEL, NUMBER, STRING, Table

_LAYER = ("layer", INTEGER, "decoder layer, from 0; null: all masked layers together")
_EXPERTS = ("experts", INTEGER, "N, the experts that the neurons of a layer are dealt to; null: the dense model")
_CHOSEN = ("k", INTEGER, "experts chosen for a token; null: of a split, whatever is chosen")
_SPLIT = ("split", STRING, "how neurons are dealt: cluster, random or contiguous; null: the dense model")

EMOE: dict[str, Table] = {
    "emoe_mechanism": Table(
        "tables/emoe_mechanism.parquet",
        (),
        (
            MODEL,
            ("corpus", STRING, "row id of config/corpora.tsv; null: of all corpora together"),
            _LAYER,
            _EXPERTS,
            _CHOSEN,
            _SPLIT,
            ("gate", STRING, "avg-k, oracle, random, not-top-k or bottom-k; null: nothing is chosen"),
            ("measure", STRING, "results/README.md lists the measures"),
            (
                "other",
                STRING,
                "of a difference what is taken off, such as random split or oracle gate; of a divergence a corpus",
            ),
            ("value", NUMBER, "mean over the seeds of the split"),
            ("chance", NUMBER, "what a choice or a split that knows nothing gives; results/README.md says which"),
            (
                "low",
                NUMBER,
                "95 % interval over documents, seeds; of correlations over seeds, Student's; null: below 5",
            ),
            ("high", NUMBER, "its upper end"),
            ("chance_low", NUMBER, "of correlations: 95 % of random splits lie above; null: not drawn"),
            ("chance_high", NUMBER, "and below"),
            (
                "p_value",
                NUMBER,
                "of correlations, divergences: share of random splits, or exchanges, that reach the value",
            ),
            ("seeds", INTEGER, "splits that the value is the mean of"),
            ("tokens", INTEGER, "tokens it is over; first ones of a sequence are left out"),
        ),
    ),
    "emoe_selection": Table(
        "tables/emoe_selection.parquet",
        (),
        (
            MODEL,
            CORPUS,
            LAYER,
            _EXPERTS,
            _CHOSEN,
            _SPLIT,
            ("seed", INTEGER, "of the split"),
            ("expert", STRING, "expert label"),
            ("share", NUMBER, "of all choices of the corpus: tokens that chose the expert by avg-k, over k tokens"),
            ("chance", NUMBER, "1/N"),
            ("low", NUMBER, "95 % interval over documents; null below 5 of them"),
            ("high", NUMBER, "its upper end"),
        ),
    ),
    "emoe_correlation": Table(
        "tables/emoe_correlation.parquet",
        (),
        (
            MODEL,
            CORPUS,
            LAYER,
            _EXPERTS,
            ("order", STRING, "index: neurons as in the matrix; cluster: sorted by expert, first clustering"),
            ("row", INTEGER, "run of neighbouring neurons in that order, from 0; at most 128"),
            ("column", INTEGER, "the same of the other neuron"),
            ("value", NUMBER, "mean |r| of the activations of two different neurons; null: they never change"),
        ),
    ),
}
