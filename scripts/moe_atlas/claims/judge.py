"""All claims of one model: estimates, Holm's adjustment over them, verdicts."""

import math
import zlib
from collections.abc import Mapping, Sequence

import numpy as np
import polars as pl

from moe_atlas import tables
from moe_atlas.claims.estimate import Estimate, Evidence, NotEnough
from moe_atlas.claims.estimators import ESTIMATORS
from moe_atlas.claims.sheet import Claim
from moe_atlas.claims.verdict import CANNOT_BE_TOLD, holm, too_few, verdict

TABLES = tuple(dict.fromkeys(name for estimator in ESTIMATORS.values() for name in estimator.tables))


def evidence_of(
    claim: Claim, frames: Mapping[str, pl.DataFrame], corpus: str | None, sizes: Mapping[str, int], seed: int
) -> Evidence:
    """What a claim reads of one model's frames; random numbers depend on the seed, the claim and the text alone."""
    chosen = {}
    for name in ESTIMATORS[claim.estimator].tables:
        frame = frames[name]
        if "site" in frame.columns:
            frame = frame.filter(site="ffn")
        if name == "saturation":
            frame = frame.filter(pl.col("model") != pl.col("end"))
        chosen[name] = frame.filter(pl.col("corpus").eq_missing(corpus)) if "corpus" in frame.columns else frame
    generator = np.random.default_rng([seed, zlib.crc32(f"{claim.claim} {corpus}".encode())])
    return Evidence(chosen, sizes, claim.direction, claim.parameters, generator)


def _blocks(evidence: Evidence) -> int | None:
    """Blocks of documents that the evidence has; None where it has none by its nature."""
    if "documents" in evidence.tables:
        return evidence.tables["documents"].filter(pl.col("tokens") > 0)["block"].n_unique()
    return None


def _texts(claim: Claim, frames: Mapping[str, pl.DataFrame], corpora: Sequence[str]) -> Sequence[str]:
    """Texts that a claim is judged on: long ones; of two models' choices those that both have token by token."""
    estimator = ESTIMATORS[claim.estimator]
    if "saturation" in estimator.tables:
        return frames["saturation"]["corpus"].unique(maintain_order=True).to_list()
    return corpora if estimator.of_text else ()


def attempt(claim: Claim, evidence: Evidence) -> tuple[Estimate | None, str]:
    """The estimate, or None and the reason why there is none."""
    first = next(iter(evidence.tables.values()))
    layers = first["layer"].n_unique()
    if "saturation" in evidence.tables and not layers:
        return None, "no later model of its series has read the same text"
    reason = too_few(claim, layers, evidence.sizes["N"], _blocks(evidence))
    if reason:
        return None, reason
    try:
        estimate = ESTIMATORS[claim.estimator].function(evidence)
    except NotEnough as error:
        return None, str(error)
    if not (math.isfinite(estimate.value) and math.isfinite(estimate.p)):
        return None, "the estimate is not a number"
    return estimate, ""


def judge(
    model: str,
    frames: Mapping[str, pl.DataFrame],
    sizes: Mapping[str, int],
    claims: Mapping[str, Claim],
    corpora: Sequence[str],
    seed: int,
) -> pl.DataFrame:
    """Table "claims" of one model.

    frames: its rows of TABLES. sizes: its checkpoint.json (N, d, m). corpora: the long texts; a claim about what
    experts do is judged on each of them. A dense model has rows without a verdict, which say so.
    """
    rows, estimates = [], []
    for claim in claims.values():
        of_text = ESTIMATORS[claim.estimator].of_text
        texts = _texts(claim, frames, corpora)
        for corpus in texts or [None]:
            estimate, reason = None, "there is no long text"
            if texts or not of_text or "saturation" in ESTIMATORS[claim.estimator].tables:
                estimate, reason = attempt(claim, evidence_of(claim, frames, corpus, sizes, seed))
            rows.append({"claim": claim.claim, "model": model, "corpus": corpus, "reason": reason})
            estimates.append(estimate)
    tested = [
        i
        for i, (row, estimate) in enumerate(zip(rows, estimates, strict=True))
        if estimate is not None and estimate.smallest_p <= claims[row["claim"]].level
    ]
    adjusted = dict(zip(tested, holm([estimates[i].p for i in tested]), strict=True))
    for i, (row, estimate) in enumerate(zip(rows, estimates, strict=True)):
        row |= dict.fromkeys(("estimate", "low", "high", "null", "p_value", "p_adjusted", "n"))
        row["verdict"] = CANNOT_BE_TOLD
        if estimate is None:
            continue
        row["verdict"], row["reason"] = verdict(claims[row["claim"]], estimate, adjusted.get(i))
        finite = [value if math.isfinite(value) else None for value in (estimate.low, estimate.high)]
        row |= {"estimate": estimate.value, "low": finite[0], "high": finite[1], "null": estimate.null}
        row |= {"p_value": estimate.p, "p_adjusted": adjusted.get(i), "n": estimate.n}
    return tables.conform("claims", pl.DataFrame(rows, schema_overrides=tables.declared("claims").schema))
