"""Which figures there are and which tables each needs. Imported by the rules: no heavy imports here."""

from collections.abc import Collection
from dataclasses import dataclass

from moe_atlas.errors import AtlasError


@dataclass(frozen=True)
class Experiment:
    """One kind of figure of one model: its tables (names of moe_atlas.tables) and the corpus kinds it exists for."""

    title: str
    tables: tuple[str, ...]
    kinds: tuple[str, ...]  # empty: read from the weights or from all corpora together


_WEIGHTS, _ANY, _SHORT = (), ("short", "long"), ("short",)

EXPERIMENTS: dict[str, Experiment] = {
    "weight_similarity": Experiment("Weight similarity, matrix level", ("similarity",), _WEIGHTS),
    "weight_similarity_neuron_mean": Experiment("Weight similarity, mean neuron", ("similarity",), _WEIGHTS),
    "neuron_matching": Experiment("Neurons matched, cosine before, after and above chance", ("matching",), _WEIGHTS),
    "neuron_order": Experiment("Neurons matched, order kept", ("matching",), _WEIGHTS),
    "projection": Experiment("Experts by principal components", ("projection", "explained_variance"), _WEIGHTS),
    "neuron_projection": Experiment("Neurons by principal components", ("projection", "explained_variance"), _WEIGHTS),
    "router_similarity": Experiment("Router similarity beside weight similarity", ("similarity",), _WEIGHTS),
    "router_regression": Experiment(
        "Router similarity against weight similarity", ("similarity", "regression"), _WEIGHTS
    ),
    "output_similarity": Experiment("Mean similarity of expert outputs", ("output_similarity",), _ANY),
    "output_similarity_tokens": Experiment(
        "Similarity of expert outputs, token by token", ("output_similarity_tokens", "routing", "tokens"), _SHORT
    ),
    "norm_score": Experiment("Output norms and router scores", ("norm_score", "routing", "tokens"), _SHORT),
    "rank_counts": Experiment("Norm rank against score rank", ("rank_counts",), _ANY),
    "load": Experiment("Load of the experts", ("load",), _ANY),
    "intermediate": Experiment("Intermediate states, token by token", ("intermediate", "routing", "tokens"), _SHORT),
    "activation_ratio": Experiment("Active neurons", ("activation_ratio",), _ANY),
    "chosen_experts": Experiment("Chosen experts", ("routing", "load", "tokens"), _SHORT),
    "specialization": Experiment("Specialisation by layer", ("specialization",), _ANY),
    "co_activation": Experiment("Experts that are chosen together", ("specialization",), _ANY),
    "domain": Experiment("Use of the experts on different corpora", ("domain",), ()),
}

# Figures across models: name -> tables of results/tables/ it is drawn from.
COMPARISONS: dict[str, tuple[str, ...]] = {
    "weight_similarity": ("similarity",),
    "neuron_matching": ("matching",),
    "projection": ("explained_variance",),
    "router_regression": ("regression",),
    "output_similarity": ("output_similarity",),
    "norm_score": ("rank_counts",),
    "load_balance": ("load",),
    "top_score": ("load",),
    "specialization": ("specialization",),
    "saturation": ("saturation",),
    "claims": ("claims",),
}

COMPARISON_TITLES: dict[str, str] = {
    "weight_similarity": "Weight similarity by depth",
    "neuron_matching": "Neurons matched, by depth",
    "projection": "Variance on the first principal component, by depth",
    "router_regression": "Router against weight similarity by depth",
    "output_similarity": "Output similarity by depth",
    "norm_score": "Norm rank equal to score rank, by depth",
    "load_balance": "Load balance by depth",
    "top_score": "Weights of the first and second choice by depth",
    "specialization": "Specialisation of the experts by depth, minus chance",
    "saturation": "Choices of a series of models against its last",
    "claims": "Claims of the paper, judged for each model",
}

# Figures of EMoE, of one dense model: before any tuning, and of its fine-tuning.
EMOE_MECHANISM: dict[str, Experiment] = {
    "mass": Experiment("Activation that the chosen experts hold", ("emoe_mechanism",), ("long",)),
    "agreement": Experiment("Agreement of the avg-k gate with an oracle", ("emoe_mechanism",), ("long",)),
    "correlation": Experiment("Correlation of neurons within and between experts", ("emoe_mechanism",), ("long",)),
    "correlation_map": Experiment("Correlation of neurons, by index and by cluster", ("emoe_correlation",), ("long",)),
    "loss": Experiment("Rise of the loss with chosen experts only", ("emoe_mechanism",), ("long",)),
    "layer_loss": Experiment("Rise of the loss when one layer is masked", ("emoe_mechanism",), ("long",)),
    "corpora": Experiment("Experts by corpus", ("emoe_selection",), ()),
}
EMOE_TUNING: dict[str, Experiment] = {
    "arms": Experiment("Ways to tune, against dense tuning", ("emoe_differences",), ()),
    "grid": Experiment("Experts and chosen experts, against dense tuning", ("emoe_differences",), ()),
    "layers": Experiment("Place of the converted layers, against dense tuning", ("emoe_differences",), ()),
    "fraction": Experiment("Share of the training data", ("emoe_runs",), ()),
    "selection": Experiment("Chosen experts during tuning", ("emoe_training_selection",), ()),
}
EMOE_FIGURES = EMOE_MECHANISM | EMOE_TUNING

# Figures of attention experts, of one model of the sheet or one MoA model that was trained here.
HEADS_FIGURES: dict[str, Experiment] = {
    "load": Experiment("Load of attention experts", ("moa_load", "moa_routing"), ("long",)),
    "association": Experiment("Token types and experts", ("moa_association",), ("long",)),
    "circuits": Experiment("Similarity of circuits", ("moa_circuits",), ()),
    "distance": Experiment("Distance of attention", ("moa_maps",), ("long",)),
    "divergence": Experiment("Divergence of attention maps", ("moa_maps",), ("long",)),
    "ablation": Experiment("Loss without an expert", ("moa_ablation",), ("long",)),
    "sites": Experiment("Attention beside FFN experts", ("moa_sites",), ("long",)),
}

# Figures of the MoA experiments, of one objective; kinds are those of the objectives that have the figure.
_LANGUAGE, _TRANSLATION = ("causal", "masked"), ("translation",)
MOA_FIGURES: dict[str, Experiment] = {
    "perplexity": Experiment("Perplexity by size", ("moa_arms",), _LANGUAGE),
    "translation": Experiment("Translation by arm", ("moa_arms",), _TRANSLATION),
    "differences": Experiment("Arms against their baselines", ("moa_differences",), _LANGUAGE + _TRANSLATION),
    "grid": Experiment("Experts, chosen experts and their width", ("moa_arms",), _LANGUAGE + _TRANSLATION),
    "routing": Experiment("Losses, normalisation and router", ("moa_arms",), _LANGUAGE + _TRANSLATION),
    "curves": Experiment("Training curves", ("moa_curves", "moa_runs"), _LANGUAGE + _TRANSLATION),
    "throughput": Experiment("Speed of training", ("moa_throughput", "moa_runs"), _LANGUAGE + _TRANSLATION),
}

RANGES = ("auto", "full")
FORMATS = ("png", "pdf")


def split(name: str) -> tuple[str, str | None]:
    """`output_similarity.prose` -> (`output_similarity`, `prose`); without a corpus the second is None."""
    experiment, _, corpus = name.partition(".")
    return experiment, corpus or None


def requested(
    name: str, figures: dict[str, Experiment], tables: Collection[str], of: str = "corpus"
) -> tuple[str, str | None, Experiment]:
    """What `name`, FIGURE or FIGURE.CORPUS, asks for of `figures`: figure, corpus or None, and its entry.

    tables: names of those that are there; of: what stands behind the point. Raises AtlasError where there is no such
    figure, the corpus is missing or too many, or a table that the figure needs is not there.
    """
    base, corpus = split(name)
    if base not in figures:
        raise AtlasError(f"{name}: there is no such figure; the figures are {', '.join(figures)}.")
    figure = figures[base]
    if bool(figure.kinds) != bool(corpus):
        raise AtlasError(f"{name}: write {base}{f'.{of.upper()}' if figure.kinds else f' without a {of}'}.")
    if missing := [table for table in figure.tables if table not in tables]:
        raise AtlasError(f"{name}: the tables {', '.join(missing)} are missing; name them with --table.")
    return base, corpus, figure


def experiments_of(kinds: dict[str, str]) -> list[str]:
    """Full names of all figures of one model; `kinds` is corpus id -> short or long."""
    names = [name for name, experiment in EXPERIMENTS.items() if not experiment.kinds]
    for name, experiment in EXPERIMENTS.items():
        names += [f"{name}.{corpus}" for corpus, kind in kinds.items() if kind in experiment.kinds]
    return names
