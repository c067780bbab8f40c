"""The benchmarks: true names and shapes, contenders that agree where they do the same, rows that say what happened."""

import importlib.util
import itertools

import numpy as np
import polars as pl
import pytest
import torch
from benchmarks import contenders, floors, plan, plot, report, run, synthetic, weights
from benchmarks.measured import Run
from benchmarks.plan import Case
from benchmarks.shapes import SHAPES
from conftest import ROOT
from transformers import AutoModelForCausalLM

from moe_atlas.checkpoints import Checkpoint
from moe_atlas.errors import AtlasError
from moe_atlas.layerwise import each_layer

SHRINK, LAYERS, TOKENS = 32, 2, 64
IN_TRANSFORMERS = ("mixtral-8x7b", "mixtral-8x22b", "olmoe")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A function: a run of one shape on a float32 checkpoint, in which no two router logits tie by rounding."""
    folder = tmp_path_factory.mktemp("checkpoints")

    def made(name: str, **options) -> Run:
        shape = SHAPES[name](LAYERS, SHRINK)
        synthetic.write(shape, folder / name, dtype=torch.float32)
        return Run(folder / name, shape, TOKENS, **options)

    return made


@pytest.mark.parametrize("name", SHAPES)
def test_a_checkpoint_has_the_published_names(written, name):
    of = written(name)
    checkpoint = Checkpoint(of.directory)
    assert set(checkpoint.names) == {*of.shape.outside, *of.shape.layer(0), *of.shape.layer(1)}
    read = weights.read_layer(of)
    (_, bank, _), *_ = each_layer(checkpoint, None, [0])
    for role, stack in bank.matrices.items():
        assert torch.equal(stack, read[role])
    assert torch.equal(bank.router, read["router"])
    if name in IN_TRANSFORMERS:
        _, said = AutoModelForCausalLM.from_pretrained(of.directory, output_loading_info=True)
        assert not said["missing_keys"] and not said["unexpected_keys"] and not said["mismatched_keys"]


@pytest.mark.parametrize(
    ("name", "layer_bytes", "experts", "width", "neurons"),
    [
        ("mixtral-8x7b", 2.90e9, 8, 4096, 14336),
        ("mixtral-8x22b", 5.01e9, 8, 6144, 16384),
        ("olmoe", 0.84e9, 64, 2048, 1024),
        ("deepseek", 1.18e9, 64, 2048, 1408),
        ("grok-1", 9.84e9, 8, 6144, 32768),
    ],
)
def test_shapes_are_the_published_ones(name, layer_bytes, experts, width, neurons):
    shape = SHAPES[name](1)
    assert (shape.experts, shape.width, shape.neurons) == (experts, width, neurons)
    assert floors.needed(Case("weights", name), 0) == pytest.approx(layer_bytes, rel=0.01)


def test_statistics_of_weights_are_those_of_the_papers_method(written):
    of = written("mixtral-8x7b")
    ours, theirs = weights.weights_atlas(of), weights.weights_paper(of)
    assert set(theirs) == set(ours) and len(ours) == 1 + 4 * 3
    for name, values in theirs.items():
        assert np.ptp(values) > 2e-5  # one number for all would agree with anything
        np.testing.assert_allclose(ours[name], values, atol=2e-6, err_msg=name)


def test_matchings_are_one_and_the_best(written):
    of = written("mixtral-8x7b")
    ours, scipys, papers = (getattr(weights, f"matching_{name}")(of) for name in plan.SUITES["matching"])
    for other in (scipys, papers):
        assert ours["sum"] == pytest.approx(float(other["sum"]), rel=1e-6)
        assert (ours["order"] == other["order"]).all()
    assert ours["sum"] > 0.05 * of.shape.neurons


def test_components_are_those_of_scikit_learn(written):
    of = written("mixtral-8x7b")
    ours, full, covariance = (getattr(weights, f"pca_{name}")(of) for name in plan.SUITES["pca"])
    for other in (full, covariance):
        np.testing.assert_allclose(ours["ratio"], other["ratio"], rtol=1e-4)
        lengths = np.linalg.norm(ours["coordinates"], axis=0) * np.linalg.norm(other["coordinates"], axis=0)
        # Components of random weights are close in variance, and mix as their differences are small.
        aligned = np.abs((ours["coordinates"] * other["coordinates"]).sum(0)) / lengths
        assert aligned == pytest.approx(np.ones(3), abs=1e-3)


@pytest.mark.parametrize("other", ["memory", "disk"])
def test_the_chosen_experts_and_their_outputs_are_those_of_transformers(written, other):
    if other == "disk" and not importlib.util.find_spec("accelerate"):
        pytest.skip("transformers leaves layers on disk with accelerate alone; make bench installs it")
    ours = contenders.CONTENDERS["extraction_atlas"](written("mixtral-8x7b"))
    of = written("mixtral-8x7b", memory=2 if other == "disk" else None)
    theirs = contenders.CONTENDERS[f"extraction_transformers_{other}"](of)
    assert torch.equal(ours["choices"], theirs["choices"])
    assert ours["choices"].sum(1).tolist() == [2 * TOKENS] * LAYERS
    torch.testing.assert_close(ours["largest"], theirs["largest"], rtol=1e-4, atol=1e-6)
    if other == "disk":
        assert of.found["disk_written"] > 0


def test_both_readers_read_everything(written):
    of = written("olmoe")
    total = sum(4 * torch.Size(size).numel() for layer in range(LAYERS) for size in of.shape.layer(layer).values())
    ours, theirs = (contenders.CONTENDERS[f"reading_{name}"](of) for name in ("atlas", "safetensors"))
    assert ours == theirs and of.found["weights_read"] > total
    assert len(ours) == len(Checkpoint(of.directory).names)


def test_operations_count_each_product_once():
    case = Case("weights", "mixtral-8x7b", shrink=SHRINK)
    n, m, d = 8, 14336 // SHRINK, 4096 // SHRINK
    experts = sum(2 * m * d for _ in itertools.combinations_with_replacement(range(n), 2))
    coordinates = sum(2 * n * m for _ in itertools.combinations_with_replacement(range(d), 2))
    assert floors.operations(case) == 3 * (2 * experts + coordinates)
    assert floors.operations(Case("pca", "mixtral-8x7b", shrink=SHRINK)) == coordinates
    one = Case("extraction", "mixtral-8x7b", layers=1, tokens=1)
    assert floors.operations(one) == pytest.approx(floors.needed(Case("weights", "mixtral-8x7b"), 0), rel=0.04)


def rows(**changed) -> pl.DataFrame:
    """Two contenders, three runs each, cold and warm: 2 s and 5 s in the median when cold, 1 s and 4 s when warm."""
    fixed = dict.fromkeys(plan.SCHEMA) | {"suite": "reading", "shape": "olmoe", "shrink": 1, "layers": 2, "tokens": 0}
    fixed |= {
        "threads": 2,
        "memory": 0,
        "device": "cpu",
        "cpu": "some",
        "cores": 2,
        "torch": "2",
        "began": "2026-01-01",
    }
    fixed |= {"bytes": 1000, "floor_disk": 1.6, "floor_arithmetic": 0.5, "disk_read": 500, "disk_written": 250}
    seconds = {("atlas", True): (9, 2, 1), ("atlas", False): (1, 1, 8), ("other", True): (5, 4, 6)}
    seconds |= {("other", False): (3, 4, 4)}
    made = [
        fixed
        | {"contender": name, "cold": cold, "repeat": repeat, "seconds": second, "peak_mib": 10 * second}
        | changed
        for (name, cold), of in seconds.items()
        for repeat, second in enumerate(of)
    ]
    return pl.DataFrame(made, schema=plan.SCHEMA)


def test_ratios_are_of_medians():
    found = {(row["contender"], row["cold"]): row for row in report.summary(rows()).iter_rows(named=True)}
    assert {key: row["seconds"] for key, row in found.items()} == {
        ("atlas", True): 2, ("atlas", False): 1, ("other", True): 5, ("other", False): 4,
    }  # fmt: skip
    other = found["other", True]
    assert other["times_ours"] == 2.5 and other["over_floor"] == pytest.approx(5 / 1.6) and other["peak_mib"] == 50
    assert (other["read"], other["written"], other["runs"]) == (0.5, 0.25, 3)
    # Warm files owe the disk nothing.
    assert found["other", False]["times_ours"] == 4 and found["other", False]["over_floor"] == pytest.approx(4 / 0.5)
    assert report.summary(rows(weights_read=1.0))["read"].unique().to_list() == [1.0]
    assert "| other | cold | 5 (3) | 2.50 | 3.12 | 50 | 0.50 | 0.25 |" in report.markdown(rows())
    assert report.summary(rows(floor_disk=0.0, floor_arithmetic=0.0, bytes=0))["over_floor"].null_count() == 4


def test_a_case_that_is_run_again_takes_the_place_of_its_old_rows(tmp_path):
    path = tmp_path / "reading.parquet"
    for frame in (rows(), rows(cpu="another"), rows(torch="3")):
        plan.merge(path, frame)
    kept = pl.read_parquet(path)
    assert len(kept) == 24
    assert dict(kept.group_by("cpu").agg(pl.col("torch").unique().first()).iter_rows()) == {"some": "3", "another": "2"}
    plot.draw(kept, tmp_path / "benchmarks.png")
    assert (tmp_path / "benchmarks.png").stat().st_size > 10_000 and (tmp_path / "benchmarks.pdf").exists()


def test_one_that_fails_is_a_row_with_its_words_and_the_others_run(tmp_path, capsys):
    words = f"--suite extraction --shape deepseek --layers 1 --shrink {SHRINK} --tokens {TOKENS} --cold 2 --warm 0"
    words = [*words.split(), "--contenders", "atlas", "transformers_memory", "airllm"]
    run.main([*words, "--output", str(tmp_path), "--checkpoints", str(tmp_path / "checkpoints")])
    found = pl.read_parquet(tmp_path / "extraction.parquet")
    assert dict(found.schema) == plan.SCHEMA
    ran = found.filter(contender="atlas")
    assert ran["repeat"].to_list() == [0, 1] and ran["failed"].null_count() == 2 and ran["seconds"].min() > 0
    assert ran["disk_read"].min() > 0 and 0.5 < ran["weights_read"][0] <= 1
    # transformers has no DeepSeekMoE of the first version, and one that failed is not tried again.
    failed = {row["contender"]: row for row in found.drop_nulls("failed").iter_rows(named=True)}
    assert set(failed) == {"transformers_memory", "airllm"} and len(found) == 4
    assert "deepseek" in failed["transformers_memory"]["failed"]
    assert "failed: " in capsys.readouterr().out and (tmp_path / "benchmarks.png").exists()
    assert not list((tmp_path / "checkpoints").iterdir())
    run.main(["--table", "--output", str(tmp_path)])
    assert "| airllm | cold | failed: " in capsys.readouterr().out


def test_plans_name_what_there_is_and_the_command_line_narrows_them():
    for cases in plan.PLANS.values():
        assert all(case.names()[0] == "atlas" for case in cases)
    words = ["--shape", "olmoe", "--layers", "2", "--suite", "matching", "--cold", "0"]
    (case,) = run.chosen(run.parse(words))
    assert (case.shape, case.layers, case.names()) == ("olmoe", 2, ["atlas", "scipy", "paper"])
    assert {case.suite for case in run.chosen(run.parse(["--device", "cuda"]))} == {"extraction", "matching", "pca"}


def test_a_disk_that_is_too_small_is_said_before_anything_is_written(tmp_path):
    with pytest.raises(AtlasError, match="GB of disk"):
        run.runner.check_room(Case("reading", "grok-1", layers=1000), tmp_path)


def test_files_are_small_enough_to_read():
    for path in (ROOT / "benchmarks").glob("*.py"):
        assert len(path.read_text().splitlines()) <= 200, path
