"""An emoe: row on a folder with a dense checkpoint goes through the workflow."""

import json

import polars as pl
import pytest
import torch
from emoe_models import streamed
from families import save
from workflow_runs import copy_repository, snakemake, write_sheet

MADE = "results/checkpoints/made"
IDS = torch.tensor([[5, 9, 20, 33, 7]])


@pytest.fixture(scope="module")
def atlas(tmp_path_factory):
    """A copy of the repository with a dense model in a folder and an EMoE made from it, through the weights' tables."""
    folder = copy_repository(tmp_path_factory.mktemp("emoe") / "atlas")
    save("mistral", folder / "my dense")
    rows = [
        {"model": "dense", "source": "path:my dense"},
        {"model": "made", "source": "emoe:dense", "dense_reference": "dense"}
        | {"emoe_experts": "5", "emoe_top_k": "5", "emoe_layers": "1,2"},
    ]
    write_sheet(folder / "config/models.tsv", [dict.fromkeys(rows[1], "") | row for row in rows])
    snakemake(folder, "--", "results/models/made/parametric/regression.parquet")
    return folder


def test_the_checkpoint_is_described_like_any_other(atlas):
    found = json.loads((atlas / "results/models/made/checkpoint.json").read_text())
    assert (found["model_type"], found["source"], found["N"], found["k"], found["m"]) == ("emoe", "emoe:dense", 5, 5, 8)
    assert found["moe_layers"] == [1, 2] and found["dense_layers"] == [0]
    record = json.loads((atlas / MADE / "emoe.json").read_text())
    dense = json.loads((atlas / "results/models/dense/checkpoint.json").read_text())
    assert record["model"] == "made" and record["dense"]["files"] == dense["files"]
    assert record["settings"]["experts"] == 5 and [layer["layer"] for layer in record["layers"]] == [1, 2]


def test_with_all_experts_at_work_it_computes_what_the_dense_model_does(atlas):
    expected = streamed(atlas / "my dense", IDS)
    torch.testing.assert_close(streamed(atlas / MADE, IDS), expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


def test_its_weights_have_the_tables_of_a_mixture(atlas):
    similarity = pl.read_parquet(atlas / "results/models/made/parametric/similarity.parquet")
    experts = similarity.filter(pl.col("a").is_in(list("01234")) & pl.col("b").is_in(list("01234")))
    assert set(experts["matrix"]) == {"up", "act", "down", "router"} and set(experts["layer"]) == {1, 2}
    # Router rows are mean keys: their cosines are those of the mean neurons of the activation branch.
    by_pair = {"on": ["layer", "a", "b"], "how": "inner"}
    router = experts.filter(pl.col("matrix") == "router")
    act = experts.filter((pl.col("matrix") == "act") & (pl.col("level") == "neuron_mean"))
    both = router.join(act, **by_pair)
    assert both.height == router.height == 2 * 15
    assert (both["cosine"] - both["cosine_right"]).abs().max() < 1e-5
    regression = pl.read_parquet(atlas / "results/models/made/parametric/regression.parquet")
    assert regression.filter(pl.col("matrix") == "act")["r"].min() > 0.9999


def test_a_fault_names_the_row_and_the_mend(atlas):
    rows = [
        {"model": "dense", "source": "path:my dense", "emoe_experts": "", "emoe_top_k": "", "emoe_layers": ""},
        {"model": "odd", "source": "emoe:dense", "emoe_experts": "7", "emoe_top_k": "2", "emoe_layers": ""},
        {"model": "deep", "source": "emoe:dense", "emoe_experts": "5", "emoe_top_k": "2", "emoe_layers": "3"},
    ]
    write_sheet(atlas / "config/models.tsv", rows)
    targets = [f"results/models/{name}/checkpoint.json" for name in ("odd", "deep")]
    text = snakemake(atlas, "--", *targets, check=False)
    assert "odd, made from dense: my dense: 7 experts of equal size cannot be made of 40 neurons; choose" in text
    assert "deep, made from dense: my dense: there is no layer 3, the layers are 0 to 2; correct emoe_layers." in text
    assert "Traceback" not in text
