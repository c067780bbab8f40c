"""Pairing of runs, intervals and p values against float64 values by hand; the settings of the tuning."""

import copy
import math
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import yaml

from moe_atlas import tables
from moe_atlas.errors import AtlasError
from moe_atlas.tuning.arms import ARMS, TOGGLED, contrasts
from moe_atlas.tuning.differences import differences, paired
from moe_atlas.tuning.settings import Shape, load_settings

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "config" / "emoe.yaml"


def runs(*rows: tuple) -> pl.DataFrame:
    """A table emoe_runs of (arm, k, seed, test, value)."""
    fixed = {"study": "s", "model": "m", "backbone": "bert", "task": "t", "fraction": 1.0, "learning_rate": 0.1}
    fixed |= {"chosen": True, "metric": "accuracy", "chance": 0.5, "examples": 10, "step": 3}
    named = [
        fixed
        | {"arm": arm, "experts": k and 8, "k": k, "layers": k and "1", "seed": seed, "test": test, "value": value}
        for arm, k, seed, test, value in rows
    ]
    return tables.conform("emoe_runs", pl.DataFrame(named, infer_schema_length=None))


def test_paired_interval_and_p_by_hand():
    """Three differences 0.1, 0.2, 0.6: mean 0.3, standard error 0.152753, t = 1.963961 with 2 degrees of freedom.

    With 2 degrees t's distribution is known in closed form: P(|T| > t) = 1 - t / sqrt(2 + t^2), and its 97.5 % point
    is 4.302653.
    """
    low, high, p = paired(np.array([0.1, 0.2, 0.6]))
    error = math.sqrt((0.2**2 + 0.1**2 + 0.3**2) / 2 / 3)
    t = 0.3 / error
    assert math.isclose(low, 0.3 - 4.302652729911275 * error, rel_tol=1e-9)
    assert math.isclose(high, 0.3 + 4.302652729911275 * error, rel_tol=1e-9)
    assert math.isclose(p, 1 - t / math.sqrt(2 + t * t), rel_tol=1e-9)


def test_paired_without_spread_or_pairs():
    assert paired(np.array([0.2])) == (None, None, None)
    assert paired(np.zeros(4)) == (0.0, 0.0, None)
    assert paired(np.full(4, -0.25)) == (None, None, None)


def test_a_coin_is_significant_as_often_as_it_should_be():
    """Null differences: p below 0.05 in one of twenty, and the interval holds 0 in the rest."""
    generator = np.random.default_rng(0)
    found = [paired(generator.normal(size=5)) for _ in range(4000)]
    rejected = np.array([p < 0.05 for _, _, p in found])
    assert abs(rejected.mean() - 0.05) < 4 * math.sqrt(0.05 * 0.95 / 4000)
    assert ((np.array([low > 0 or high < 0 for low, high, _ in found])) == rejected).all()


def test_runs_are_paired_by_seed_and_shape():
    values = {0: (0.5, 0.7, 0.9), 1: (0.6, 0.7, 0.8), 2: (0.4, 0.1, 0.2)}
    rows = [("dense", None, seed, "shifted", v[0]) for seed, v in values.items()]
    rows += [("emoe", 2, seed, "shifted", v[1]) for seed, v in reversed(values.items())]
    rows += [
        ("emoe", 4, 0, "shifted", 0.9),
        ("random-split", 2, 0, "shifted", 0.6),
        ("random-split", 4, 0, "shifted", 0.5),
    ]
    rows += [("dense", None, seed, "validation", 0.0) for seed in values]
    found = differences(runs(*rows))
    dense = found.filter(pl.col("baseline") == "dense", pl.col("k") == 2, pl.col("arm") == "emoe").row(0, named=True)
    assert dense["seeds"] == 3 and math.isclose(dense["difference"], (0.2 + 0.1 - 0.3) / 3, abs_tol=1e-12)
    alone = found.filter(pl.col("baseline") == "dense", pl.col("k") == 4, pl.col("arm") == "emoe").row(0, named=True)
    assert alone["seeds"] == 1 and math.isclose(alone["difference"], 0.4) and alone["low"] is alone["p_value"] is None
    split = found.filter(pl.col("baseline") == "random-split").sort("k")
    assert split["k"].to_list() == [2, 4]
    np.testing.assert_allclose(split["difference"], [0.1, 0.4], rtol=1e-9)
    assert set(found["test"]) == {"shifted"}


def test_copies_of_other_layers_are_no_partner():
    """Each EMoE has the copies in its own layers as its partner, so that there are as many pairs as seeds."""
    rows = [(arm, k, seed, "shifted", 0.5 + 0.1 * k) for arm, k in (("emoe", 2), ("gmoe", 1)) for seed in range(2)]
    first, second = runs(*rows), runs(*rows).with_columns(layers=pl.lit("3"), value=pl.col("value") * 2)
    found = differences(pl.concat([first, second])).sort("layers")
    assert found["layers"].to_list() == ["1", "3"] and found["seeds"].to_list() == [2, 2]
    np.testing.assert_allclose(found["difference"], [0.1, 0.2], rtol=1e-9)


def test_p_is_adjusted_over_the_study_by_holm():
    rows = []
    for arm, k, shift in (("dense", None, 0.0), ("emoe", 2, 0.2), ("dense-noise", None, 0.01)):
        rows += [(arm, k, seed, "in-domain", 0.5 + shift * (1 + seed / 3)) for seed in range(4)]
    found = differences(runs(*rows)).sort("p_value")
    p, adjusted = found["p_value"].to_list(), found["p_adjusted"].to_list()
    assert len(p) == 2
    np.testing.assert_allclose(adjusted, [2 * p[0], max(2 * p[0], p[1])], rtol=1e-9)


def test_a_run_that_is_there_twice_is_refused():
    row = ("dense", None, 0, "shifted", 0.5)
    with pytest.raises(AtlasError, match="a run is there twice"):
        differences(runs(row, row))


def test_rates_that_were_not_chosen_do_not_count():
    frame = runs(("dense", None, 0, "shifted", 0.5), ("emoe", 2, 0, "shifted", 0.7), ("emoe", 2, 0, "shifted", 0.9))
    frame = frame.with_columns(chosen=pl.Series([True, True, False]))
    assert math.isclose(differences(frame)["difference"].item(), 0.2)


def test_every_arm_is_compared_with_the_dense_model_of_its_kind():
    pairs = contrasts()
    for name in [*ARMS, *TOGGLED]:
        lora = "lora" in name
        assert name in ("dense", "lora") or (name, "lora" if lora else "dense") in pairs
    assert ("emoe", "static-mask") in pairs and ("emoe2dense", "emoe") in pairs and len(set(pairs)) == len(pairs)


# Settings


def test_the_shipped_settings_cross_their_values():
    settings = load_settings(CONFIG)
    assert set(settings.studies["arms"].arms) == set(ARMS) and settings.studies["arms"].seeds >= 5
    assert Shape(8, 1, (1, 3)) in settings.studies["grid"].shapes and len(settings.studies["grid"].shapes) == 9
    jobs = settings.jobs()
    assert len({(job.study, job.model, job.task, job.part) for job in jobs}) == len(jobs)
    for study in settings.studies.values():
        for model in study.models:
            for task in study.tasks:
                parts = [job for job in jobs if (job.study, job.model, job.task) == (study.name, model, task)]
                assert [arm for job in parts for arm in job.arms] == list(study.arms)
                assert settings.job(study.name, model, task, len(parts)) == parts[-1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"studies": {"a": {"arms": ["denes"]}}}, "studies, a, arms: denes is not one of dense"),
        ({"studies": {"a": {"arms": ["dense"], "tasks": ["x"]}}}, "studies, a, tasks: x is not one of source"),
        ({"studies": {"a": {"arms": ["dense"], "shares": [0.3]}}}, r"studies, a: 0.3 of 16 experts is no whole number"),
        ({"studies": {"a": {"arms": ["dense"], "seeds": 1, "selection_seeds": 2}}}, "selection_seeds is above seeds"),
        ({"studies": {"a": {"arm": ["dense"]}}}, r"studies, a: .*'arm' was unexpected"),
        ({"arms_per_job": 0}, "arms_per_job: 0 is less than"),
        ({"speed": 1}, "the file: .*'speed' was unexpected"),
    ],
)
def test_faulty_settings_are_refused(tmp_path, change, message):
    content = copy.deepcopy(yaml.safe_load(CONFIG.read_text())) | change
    (tmp_path / "emoe.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(AtlasError, match=message):
        load_settings(tmp_path / "emoe.yaml")


def test_a_missing_file_of_settings_is_refused(tmp_path):
    with pytest.raises(AtlasError, match="none.yaml: the settings of the tuning cannot be read"):
        load_settings(tmp_path / "none.yaml")
