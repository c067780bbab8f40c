"""The estimators by name, with what the sheet of claims must say of each."""

from collections.abc import Callable
from dataclasses import dataclass

from moe_atlas.claims import behavior, weights
from moe_atlas.claims.estimate import Estimate, Evidence


@dataclass(frozen=True)
class Estimator:
    """A function of the evidence, the tables it reads, its null and interval as the sheet names them, its parameters.

    of_text: whether it is about a text, so that it is judged on each long corpus.
    """

    function: Callable[[Evidence], Estimate]
    tables: tuple[str, ...]
    null: str
    interval: str
    parameters: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()

    @property
    def of_text(self) -> bool:
        return set(self.tables) != {"similarity"}


_WEIGHTS, _OUTPUTS, _TEXT = ("similarity",), ("output_similarity",), ("documents",)

ESTIMATORS: dict[str, Estimator] = {
    "weight_similarity": Estimator(weights.weight_similarity, _WEIGHTS, "random matrices", "experts"),
    "unlike_expert": Estimator(weights.unlike_expert, _WEIGHTS, "permuted pairs", "experts"),
    "weight_trend": Estimator(
        weights.weight_trend, _WEIGHTS, "permuted layers", "experts", optional=("leave_out_last",)
    ),
    "matrix_patterns": Estimator(weights.matrix_patterns, _WEIGHTS, "permuted experts", "experts"),
    "router_r": Estimator(weights.router_r, _WEIGHTS, "permuted experts", "experts"),
    "router_r2": Estimator(weights.router_r2, _WEIGHTS, "permuted experts", "experts"),
    "router_act_excess": Estimator(weights.router_act_excess, _WEIGHTS, "permuted experts", "experts"),
    "output_trend": Estimator(
        behavior.output_trend, _TEXT, "permuted layers", "documents", optional=("leave_out_last",)
    ),
    "norm_trend": Estimator(behavior.norm_trend, _TEXT, "permuted layers", "documents", optional=("leave_out_last",)),
    "diversity_trend": Estimator(
        behavior.diversity_trend, _WEIGHTS + _TEXT, "permuted layers", "experts and documents", (), ("leave_out_last",)
    ),
    "last_layer_output": Estimator(
        behavior.last_layer_output, _TEXT + _OUTPUTS, "like experts", "documents", ("before",)
    ),
    "last_layer_outlier": Estimator(behavior.last_layer_outlier, _TEXT + _OUTPUTS, "like experts", "documents"),
    "outputs_mirror_weights": Estimator(
        behavior.outputs_mirror_weights, _WEIGHTS + _OUTPUTS, "permuted experts", "experts"
    ),
    "alike_outputs_of_unlike_weights": Estimator(
        behavior.alike_outputs_of_unlike_weights, _WEIGHTS + _OUTPUTS, "random matrices", "experts", ("weights_below",)
    ),
    "largest_norm_largest_score": Estimator(
        behavior.largest_norm_largest_score, (*_TEXT, "norm_score_cross"), "permuted experts", "documents"
    ),
    "norm_score_correlation": Estimator(
        behavior.norm_score_correlation, (*_TEXT, "norm_score_cross"), "permuted experts", "documents"
    ),
    "top_score_gap": Estimator(behavior.top_score_gap, _TEXT + _OUTPUTS, "normal logits", "documents"),
    "active_share": Estimator(
        behavior.active_share, (*_TEXT, "activation_ratio"), "symmetric weights", "documents", ("share",)
    ),
    "routing_overlap": Estimator(behavior.routing_overlap, ("saturation",), "half-way to chance", "documents"),
}
