"""Name the rule by which a router weighs and chooses experts, from the recorded bounds: numpy in, polars out, no torch.

moe_atlas/router_rule.py says what the bounds are of. Where several rules fit equally, the simplest is named:

- a score as it is before one divided by its sum over the chosen experts (with k = N both are the same);
- one scale for all experts before one for each, and that before one for each token;
- scores in the order of tables.SCORES; "constant" is the same weight for all. Divided by its sum, the score of a single
  expert is 1 whatever it was: "any".
- the largest logits before score + bias, and that before groups.
"""

from dataclasses import dataclass

import numpy as np
import polars as pl

from moe_atlas.tables import SCORES

# As much as float32 and the small numbers that routers add to a sum may change a weight, relatively.
SMALLEST_TOLERANCE = 1e-5
# Roundings of a weight: score, sum, quotient, scale; each is half of the dtype's epsilon.
ROUNDINGS = 4
# Choices per chosen expert from which a scale for each expert is more than the choices themselves.
CHOICES_PER_EXPERT = 4
# Ties that are broken otherwise in the model's precision may leave this share of tokens.
AGREEMENT = 0.99


@dataclass(frozen=True)
class Weighing:
    """A rule for the weights: columns of the table router_rule. `scale` is None where it differs by token."""

    score: str
    normalised: str
    scale: float | None
    scale_spread: float
    error: float


def fit(low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The scale c for which the largest |c score - weight| / weight is smallest, and that difference.

    low, high: bounds of score / weight. inf where they are not positive and finite, or there are none (low > high).
    """
    with np.errstate(all="ignore"):
        fits = (low > 0) & (low <= high) & np.isfinite(high)
        scale, error = 2 / (low + high), (high - low) / (high + low)
    return np.where(fits, scale, np.nan), np.where(fits, error, np.inf)


def tolerance(epsilon: float) -> float:
    """How far a weight may be from its rule, relatively, if its dtype has this epsilon."""
    return SMALLEST_TOLERANCE + ROUNDINGS * epsilon / 2


def _normalised(score: str, over_chosen: int) -> str:
    return "chosen experts" if over_chosen else "all experts" if score == "softmax" else "none"


def weighing(ratio: np.ndarray, spread: np.ndarray, chosen: np.ndarray, top_k: int, allowed: float) -> Weighing:
    """The rule that leads from the logits to the weights within the relative difference `allowed`.

    ratio (2, scores, N, 2) and spread (scores,): see results/README.md; chosen (N,): tokens that chose each expert.
    If there is none, the score is "other" and the error that of the nearest rule.
    """
    used = ratio[:, : len(SCORES) - (top_k == 1), chosen > 0]  # of a single expert, a constant is "any"
    scale, one_scale = fit(used[..., 0].min(-1), used[..., 1].max(-1))
    by_expert, errors = fit(used[..., 0], used[..., 1])
    enough = chosen.sum() >= CHOICES_PER_EXPERT * (chosen > 0).sum()
    each_scale = errors.max(-1) if enough else np.full(one_scale.shape, np.inf)
    for error, each in ((one_scale, False), (each_scale, True)):
        if error.min() > allowed:
            continue
        equal = np.argwhere(error <= error.min() + allowed / ROUNDINGS)
        over_chosen, index = equal[0]
        score = "any" if over_chosen and top_k == 1 else SCORES[index]
        scales = by_expert[over_chosen, index] if each else scale[over_chosen, index, None]
        return Weighing(
            score,
            _normalised(score, over_chosen),
            float(scales.mean()),
            float(scales.max() / scales.min() - 1),
            float(error[over_chosen, index]),
        )
    # `spread` is 1 - smallest / largest ratio of a token, and -inf where no token has two.
    spread = np.where(spread >= 0, spread, 1)[: used.shape[1]]
    by_token = spread / (2 - spread)
    if by_token.min() <= allowed:
        index = int(np.argmax(by_token <= by_token.min() + allowed / ROUNDINGS))
        return Weighing(SCORES[index], "other", None, 0.0, float(by_token[index]))
    return Weighing("other", "other", None, 0.0, float(one_scale.min()))


def choosing(selection: np.ndarray, tokens: int) -> tuple[str, float]:
    """The name of the rule by which experts are chosen, and the share of tokens that it holds for.

    selection (scores, 2, groupings): tokens whose experts are the largest scores [without, with bias], or -1.
    """
    ways = {
        "largest logits": selection[:, 0, 0],
        "largest score + bias": selection[:, 1, 0],
        "groups": selection[:, 0, 1:],
        "groups + bias": selection[:, 1, 1:],
    }
    counts = {name: int(count.max()) for name, count in ways.items()}
    name = max(counts, key=counts.__getitem__)  # the first of equals
    share = counts[name] / tokens
    return name if share >= AGREEMENT else "other", share


def router_rule(arrays: dict[str, np.ndarray], labels: list[str]) -> pl.DataFrame:
    """The rule of one layer and site: one row."""
    chosen, tokens = arrays["load_tokens"], int(arrays["tokens"][0])
    allowed = tolerance(float(arrays["rule_epsilon"][0]))
    rule = weighing(arrays["rule_ratio"], arrays["rule_spread"], chosen.sum(1), chosen.shape[1], allowed)
    selection, agreement = choosing(arrays["rule_selection"], tokens)
    return pl.DataFrame(
        {
            "score": [rule.score],
            "normalised": [rule.normalised],
            "scale": [rule.scale],
            "scale_spread": [rule.scale_spread],
            "weight_error": [rule.error],
            "selection": [selection],
            "selection_agreement": [agreement],
            "logit_error": [float(arrays["rule_logit_error"][0])],
            "tokens": [tokens],
        }
    )
