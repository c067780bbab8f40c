"""When runs end, on planted curves; how the rate goes; and what differences between arms are found."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from moe_atlas import tables
from moe_atlas.errors import AtlasError
from moe_atlas.moa.differences import differences, of_studies
from moe_atlas.moa.plateau import End, at_plateau
from moe_atlas.moa.settings import Schedule, load_settings

SETTINGS = load_settings(Path(__file__).resolve().parent.parent / "config" / "moa.yaml")
SCHEDULE = Schedule(
    warmup=20, evaluate=10, window=3, gain=0.01, decay=0.25, least=60, most=1000, margin=0.5, weight_decay=0.0
)


def ended(curve, schedule: Schedule = SCHEDULE, unlearned: float = 6.0) -> End:
    """The end of a run whose validation loss at a step is curve(step)."""
    end, step = End(schedule, unlearned), 0
    while step != end.last:
        step += 1
        if step % schedule.evaluate == 0 or step == end.last:
            end.look(step, curve(step))
    return end


def test_a_plateau_is_a_small_gain_over_the_window():
    """Means of two losses and of the two before: too few, none at all, 0.5 of 4, exactly the share, a rise."""
    assert not at_plateau([4.0, 4.0, 4.0], 2, 0.1) and at_plateau([4.0, 4.0, 4.0, 4.0], 2, 0.1)
    assert not at_plateau([4.5, 3.5, 3.25, 3.75], 2, 0.12) and at_plateau([4.5, 3.5, 3.25, 3.75], 2, 0.126)
    assert not at_plateau([4.0, 4.0, 3.0, 3.0], 2, 0.25)
    assert at_plateau([4.0, 4.0, 5.0, 6.0], 2, 0.01)
    # What was long before, or is a single good look, does not count.
    assert at_plateau([9.0, 4.0, 4.0, 4.0, 4.0], 2, 0.01)
    assert at_plateau([4.0, 3.0, 4.0, 4.0, 4.0, 4.0], 2, 0.01) and not at_plateau([5.0, 5.0, 4.0, 4.5], 2, 0.1)


def test_a_run_ends_after_its_plateau():
    """Exponential fall of 5 nats to 3: the look at which the mean of 30 steps gained under 1 %, and a quarter."""
    end = ended(lambda step: 3 + 2 * math.exp(-step / 50))
    loss = {step: 3 + 2 * math.exp(-step / 50) for step in range(10, 1000, 10)}
    means = {step: (loss[step - 20] + loss[step - 10] + loss[step]) / 3 for step in loss if step >= 50}
    expected = next(step for step in means if step >= 80 and means[step - 30] - means[step] < 0.01 * means[step - 30])
    assert end.plateau and end.decay_from == expected and end.last == expected + round(expected / 4)


def test_a_run_that_goes_on_falling_ends_at_the_most_steps():
    """2 % every 10 steps without an end: no plateau, and the decay is within the most steps."""
    end = ended(lambda step: 5 * 0.98 ** (step / 10))
    assert not end.plateau and end.decay_from == 800 and end.last == 1000
    assert not ended(lambda step: 5 * 0.98 ** (step / 10), replace(SCHEDULE, most=995)).plateau
    assert ended(lambda step: 5 * 0.98 ** (step / 10), replace(SCHEDULE, most=995)).last <= 995


def test_the_plateau_of_token_frequencies_is_not_the_end():
    """A masked model stays at the unigram loss for 300 steps and then learns: it is not stopped there."""
    end = ended(lambda step: 5.9 if step <= 300 else 3 + 2.9 * math.exp(-(step - 300) / 40))
    assert end.plateau and end.decay_from > 350
    never = ended(lambda step: 5.9)
    assert not never.plateau and never.last == 1000
    # The same curve under another bound is a plateau at the first step that may be one.
    assert ended(lambda step: 5.9, unlearned=7.0).decay_from == 80


def test_an_early_plateau_waits_for_the_least_steps():
    # Looks while the rate rises do not count: six are needed after step 20, or 100.
    assert ended(lambda step: 3.0).decay_from == 80
    assert ended(lambda step: 3.0, replace(SCHEDULE, warmup=100)).decay_from == 160
    assert ended(lambda step: 3.0, replace(SCHEDULE, least=200)).decay_from == 200


def test_the_rate_rises_stays_and_falls():
    end = End(SCHEDULE, 6.0)
    assert [end.factor(step) for step in (0, 9, 19, 20, 700)] == [0.05, 0.5, 1.0, 1.0, 1.0]
    end.decay_from, end.last = 100, 120
    assert [end.factor(step) for step in (99, 100, 110, 119)] == [1.0, 1.0, 0.5, 0.05]
    end = End(replace(SCHEDULE, warmup_rate=0.5), 6.0)
    assert end.factor(0) == pytest.approx(0.525) and end.factor(19) == 1.0


def test_the_published_schedule_falls_with_the_root_of_the_step():
    end = End(replace(SCHEDULE, shape="inverse-sqrt"), 6.0)
    end.look(500, 3.0)
    assert end.last == 1000 and not end.plateau
    assert end.factor(19) == 1.0 and end.factor(79) == 0.5 and end.factor(319) == 0.25


# Comparison


def settings(*contrasts: tuple[str, str], **studies: tuple[str, ...]):
    """Settings of studies of the causal objective by their arms."""
    one = next(iter(SETTINGS.studies.values()))
    made = {
        name: replace(one, name=name, objective="causal", arms=arms, contrasts=contrasts)
        for name, arms in studies.items()
    }
    return replace(SETTINGS, studies=made)


def runs(*rows: tuple) -> pl.DataFrame:
    """A table moa_runs of (study, arm, seed, test, metric, value)."""
    schema = tables.declared("moa_runs").schema
    keys = ("study", "arm", "seed", "test", "metric", "value")
    fixed = {"objective": "causal", "attention": "mha", "chosen": True, "learning_rate": 0.01}
    return pl.DataFrame([fixed | dict(zip(keys, row, strict=True)) for row in rows], schema=schema)


def logged(study: str, logs: dict) -> list[tuple]:
    """Rows of perplexities by arm and seed, of their logarithms."""
    return [
        (study, arm, seed, "test", "perplexity", math.exp(value))
        for arm, part in logs.items()
        for seed, value in enumerate(part)
    ]


def test_differences_are_paired_and_of_logarithms():
    """Log ratios 0.1, 0.2, 0.6: mean 0.3; with 2 degrees of freedom t's distribution is known in closed form."""
    logs = {0: 0.1, 1: 0.2, 2: 0.6}
    rows = [("s", "a", seed, "test", "perplexity", math.exp(3 + seed + apart)) for seed, apart in logs.items()]
    rows += [("s", "b", seed, "test", "perplexity", math.exp(3 + seed)) for seed in reversed(logs)]
    rows += [("s", "b", 3, "test", "perplexity", 5.0), ("s", "a", 0, "validation", "perplexity", 9.0)]
    rows += [("s", arm, seed, "test", "exact", value) for arm, value in (("a", 0.75), ("b", 0.5)) for seed in range(2)]
    found = differences(settings(("a", "b"), s=("a", "b")), runs(*rows)).sort("metric", descending=True)
    row = found.row(0, named=True)
    error = math.sqrt((0.2**2 + 0.1**2 + 0.3**2) / 2 / 3)
    assert row["seeds"] == 3 and math.isclose(row["difference"], 0.3)
    assert math.isclose(row["low"], 0.3 - 4.302652729911275 * error, rel_tol=1e-9)
    assert math.isclose(row["high"], 0.3 + 4.302652729911275 * error, rel_tol=1e-9)
    t = 0.3 / error
    assert math.isclose(row["p_value"], 1 - t / math.sqrt(2 + t * t), rel_tol=1e-9)
    assert math.isclose(row["p_adjusted"], row["p_value"], rel_tol=1e-9)
    other = found.row(1, named=True)
    assert (other["metric"], other["difference"], other["p_value"], other["p_adjusted"]) == ("exact", 0.25, None, None)


def test_p_is_adjusted_within_a_study_by_holm():
    rng = np.random.default_rng(0)
    values = {"a": rng.normal(3.0, 0.1, 4), "b": rng.normal(3.1, 0.1, 4), "c": rng.normal(3.2, 0.1, 4)}
    rows = [*logged("s", values), *logged("u", {arm: values[arm] for arm in "ab"})]
    made = settings(("a", "b"), ("a", "c"), s=("a", "b", "c"))
    made.studies["u"] = replace(made.studies["s"], name="u", arms=("a", "b"), contrasts=(("a", "b"),))
    found = differences(made, runs(*rows))
    inside = found.filter(study="s").sort("p_value")
    p, adjusted = inside["p_value"].to_list(), inside["p_adjusted"].to_list()
    np.testing.assert_allclose(adjusted, [min(2 * p[0], 1), max(2 * p[0], p[1])], rtol=1e-12)
    alone = found.filter(study="u").row(0, named=True)
    assert alone["p_adjusted"] == alone["p_value"]


def test_a_planted_better_arm_is_found_and_equal_arms_are_not():
    """Five seeds whose own level varies by 0.1 nats: 0.05 nats between the arms are found 200 times of 200, as pairs;
    arms that differ by noise alone are told apart in one of twenty."""
    rng = np.random.default_rng(1)
    made, found = settings(("better", "base"), ("same", "base"), s=("base", "better", "same")), []
    for _ in range(200):
        level, noise = rng.normal(3, 0.1, 5), rng.normal(0, 0.005, (3, 5))
        logs = {"base": level + noise[0], "better": level - 0.05 + noise[1], "same": level + noise[2]}
        found.append(differences(made, runs(*logged("s", logs))))
    every = pl.concat(found)
    better, same = every.filter(arm="better"), every.filter(arm="same")
    assert (better["p_adjusted"] < 0.05).mean() > 0.98 and (better["high"] < 0).mean() > 0.98
    assert abs(better["difference"].mean() + 0.05) < 0.002
    rejected = (same["p_value"] < 0.05).mean()
    assert 0.0 < rejected < 0.05 + 4 * math.sqrt(0.05 * 0.95 / 200)


def test_an_arm_that_two_studies_share_is_in_both():
    made = settings(("a", "b"), s=("a", "b"), u=("a", "c"))
    frames = [runs(("s", arm, 0, "test", "perplexity", 1.0 + place)) for place, arm in enumerate("ab")]
    frames.append(runs(("u", "c", 0, "test", "perplexity", 9.0)))
    found = of_studies(made, "moa_runs", frames).select("study", "arm", "value").rows()
    assert found == [("s", "a", 1.0), ("s", "b", 2.0), ("u", "a", 1.0), ("u", "c", 9.0)]
    with pytest.raises(AtlasError, match="moa_runs: u, c was not trained"):
        of_studies(made, "moa_runs", frames[:2])


def test_a_run_that_is_there_twice_is_refused():
    row = ("s", "a", 0, "test", "perplexity", 2.0)
    with pytest.raises(AtlasError, match="a run is there twice"):
        differences(settings(("a", "b"), s=("a", "b")), runs(row, row))


def test_rates_that_were_not_chosen_do_not_count():
    rows = [("s", arm, seed, "test", "perplexity", 2.0) for arm in "ab" for seed in range(2)]
    frame = pl.concat([runs(*rows), runs(*rows).with_columns(chosen=False, value=pl.lit(7.0))])
    found = differences(settings(("a", "b"), s=("a", "b")), frame)
    assert found["difference"].to_list() == [0.0] and found["seeds"].to_list() == [2]
