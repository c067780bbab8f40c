"""Two model types that no other test and no code of ours names: one row of the sheet each, and every table is there."""

import re
import shutil

import polars as pl
import pytest
import torch
from conftest import ROOT
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from workflow_runs import copy_repository, read_sheet, snakemake, write_sheet

from moe_atlas import tables
from moe_atlas.files import read_json

ORACLE = ROOT / "tests/data/oracle/checkpoints"
COMMON = {
    "vocab_size": 512,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
}
# Model type -> values of its config, and what checkpoint.json must then say.
TYPES = {
    "ernie4_5_moe": (
        {"moe_num_experts": 8, "moe_k": 3, "moe_intermediate_size": 16}
        | {"moe_num_shared_experts": 2, "moe_layer_start_index": 1},
        {"N": 8, "k": 3, "m": 16, "shared": 2, "moe_layers": [1], "dense_layers": [0]},
    ),
    "hunyuan_v1_moe": (
        {"num_experts": 6, "moe_topk": 2, "intermediate_size": 24},
        {"N": 6, "k": 2, "m": 24, "shared": 1, "moe_layers": [0, 1], "dense_layers": []},
    ),
}  # fmt: skip


def test_nobody_else_names_them():
    files = [path for part in ("scripts", "workflow", "config", "tests") for path in (ROOT / part).rglob("*")]
    for path in files:
        if path.suffix in (".py", ".smk", ".yaml", ".tsv") and path.name != "test_new_family.py":
            assert not re.search("ernie4_5_moe|hunyuan_v1_moe", path.read_text(encoding="utf-8")), path


@pytest.fixture(scope="module")
def atlas(tmp_path_factory):
    """A run of two rows that were added to the sheet, on random weights."""
    folder = copy_repository(tmp_path_factory.mktemp("new") / "atlas")
    rows = read_sheet(folder / "config/models.tsv")
    for model_type, (values, _) in TYPES.items():
        torch.manual_seed(len(model_type))
        network = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**COMMON | values))
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        network.save_pretrained(folder / model_type)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(ORACLE / "mixtral" / name, folder / model_type)
    added = [
        rows[1] | {"model": name.replace("_", "-"), "source": f"path:{name}", "dense_reference": ""} for name in TYPES
    ]
    write_sheet(folder / "config/models.tsv", added)
    write_sheet(folder / "config/corpora.tsv", read_sheet(folder / "config/corpora.tsv")[:1])
    snakemake(folder, "parametric", "behavioral")
    return folder


@pytest.mark.parametrize("model_type", TYPES)
def test_a_row_is_all_it_takes(atlas, model_type):
    directory = atlas / "results/models" / model_type.replace("_", "-")
    manifest = read_json(directory / "checkpoint.json")
    expected = TYPES[model_type][1]
    assert {key: manifest[key] for key in expected} == expected and manifest["model_type"] == model_type
    for name, declared in tables.TABLES.items():
        if name != "domain" and (not declared.kinds or "short" in declared.kinds):  # domain: of long corpora
            frame = tables.read(name, directory / declared.path.format(corpus="prompt"))
            assert len(frame) > 0 and (name == "tokens" or set(frame["layer"]) == set(expected["moe_layers"])), name


@pytest.mark.parametrize("model_type", TYPES)
def test_its_routing_is_the_models_own(atlas, model_type):
    """What the tables say was chosen, against what the experts of the fully loaded model are called with."""
    directory = atlas / "results/models" / model_type.replace("_", "-") / "behavioral/prompt"
    ids = pl.read_parquet(directory / "tokens.parquet")["token_id"].to_list()
    network = AutoModelForCausalLM.from_pretrained(atlas / model_type).eval()
    called = []
    for module in network.modules():
        if module.__class__.__name__.endswith("Experts"):
            module.register_forward_pre_hook(lambda _module, arguments: called.append(arguments[1:]))
    with torch.no_grad():
        network(torch.tensor([ids]))
    routing = pl.read_parquet(directory / "routing.parquet")
    layers = sorted(set(routing["layer"]))
    assert len(called) == len(layers) > 0
    for layer, (chosen, weights) in zip(layers, called, strict=True):
        order = weights.argsort(dim=-1, descending=True)
        frame = routing.filter(pl.col("layer") == layer).sort("position", "rank")
        ours = torch.tensor([int(expert) for expert in frame["expert"]]).view(chosen.shape)
        assert torch.equal(ours, chosen.gather(1, order))
        ours = torch.tensor(frame["weight"].to_list()).view(chosen.shape)
        torch.testing.assert_close(ours, weights.gather(1, order).double().float(), atol=1e-5, rtol=0)
