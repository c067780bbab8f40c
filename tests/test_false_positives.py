"""Two hundred models without any structure: no claim may hold more often than its level says."""

from collections import defaultdict

import numpy as np
import pytest
from claim_tables import Size, binomial_bound, frames_of, random_banks, run, text
from test_saturation import choices
from workflow_runs import ROOT

from moe_atlas.behavioral import saturation
from moe_atlas.claims import behavior, resample, weights
from moe_atlas.claims.estimate import Estimate
from moe_atlas.claims.judge import judge
from moe_atlas.claims.sheet import load_claims
from moe_atlas.claims.verdict import HOLDS, verdict
from moe_atlas.parametric import regression

MODELS = 200
SIZE = Size()


@pytest.fixture(scope="module")
def fewer_draws():
    """Fewer permutations and resamples: p keeps its level, and 200 models take a minute."""
    patch = pytest.MonkeyPatch()
    for module in (resample, weights, behavior):
        patch.setattr(module, "PERMUTATIONS", 999, raising=False)
    patch.setattr(resample, "DRAWS", 300)
    patch.setattr(regression, "RANDOM_PERMUTATIONS", 999)
    patch.setattr(saturation, "EXCHANGES", 9)
    yield
    patch.undo()


def structureless(seed: int) -> dict:
    """Tables of a model of independent Gaussian weights, and of its choices beside those of another such router."""
    banks, index = random_banks(SIZE, seed), text(seed=seed)
    layers = run(banks, index, seed)
    frames = frames_of(banks, layers, index)
    inputs, other = layers[0][0], random_banks(SIZE, seed + 100_000)[0].router
    lengths = np.bincount(index.sequence.numpy()).tolist()
    ids = [(inputs @ router.T).topk(2).indices.tolist() for router in (banks[0].router, other)]
    pair = [choices(name, own, lengths, SIZE.experts) for name, own in zip(("m", "end"), ids, strict=True)]
    return frames | {"saturation": saturation.saturation(pair)}


@pytest.fixture(scope="module")
def outcomes(fewer_draws):
    """(p, holds alone, holds after Holm) of each claim on each of the models."""
    claims, found = load_claims(ROOT / "config/claims.tsv"), defaultdict(list)
    for seed in range(MODELS):
        frames = structureless(seed)
        judged = judge("m", frames, SIZE.checkpoint, claims, ["c"], seed)
        for row in judged.iter_rows(named=True):
            assert row["estimate"] is not None, f"{row['claim']} could not be tried: {row['reason']}"
            numbers = (row[name] for name in ("estimate", "low", "high", "null", "p_value", "n"))
            alone = verdict(claims[row["claim"]], Estimate(*numbers), row["p_value"])[0] == HOLDS
            found[row["claim"]].append((row["p_value"], alone, row["verdict"] == HOLDS))
    return {name: np.array(values, dtype=np.float64) for name, values in found.items()}


def test_each_claim_holds_no_more_often_than_its_level(outcomes):
    claims = load_claims(ROOT / "config/claims.tsv")
    assert set(outcomes) == set(claims)
    for name, values in outcomes.items():
        p, alone, adjusted = values.T
        most = binomial_bound(claims[name].level, MODELS)
        print(f"{name:28} p below level {(p < claims[name].level).mean():.3f}, holds {alone.mean():.3f}, "
              f"holds after Holm {adjusted.mean():.3f}; at most {most / MODELS:.3f}")  # fmt: skip
        assert len(p) == MODELS
        assert (p < claims[name].level).sum() <= most, name
        assert alone.sum() <= most, name


def test_a_model_has_a_false_claim_no_more_often_than_the_level(outcomes):
    any_holds = np.any([values[:, 2] > 0 for values in outcomes.values()], axis=0)
    print(f"models with any claim that holds: {any_holds.mean():.3f}")
    assert any_holds.sum() <= binomial_bound(0.05, MODELS)


def test_the_tests_that_permute_are_not_idle(outcomes):
    """A p that is never small would pass the tests above: those of exact nulls reach their level."""
    exact = ("o03-weights-by-depth", "o05b-router-act-sign", "o04-matrix-patterns", "o06a-outputs-by-depth",
             "o09-largest-norm", "o11-norms-by-depth", "h2-large-norms", "o02-alike-weights")  # fmt: skip
    p = np.concatenate([outcomes[name][:, 0] for name in exact])
    assert abs((p < 0.2).mean() - 0.2) < 0.04
    assert abs((p < 0.05).mean() - 0.05) < 0.025
