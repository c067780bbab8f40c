"""Formulas of parameters and MACs: against built models, against counted products, and against published columns."""

from pathlib import Path

import moa_reference as reference
import polars as pl
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    JetMoeConfig,
    JetMoeForCausalLM,
)

from moe_atlas import architectures
from moe_atlas.architectures.moa_config import MoAConfig
from moe_atlas.architectures.moa_costs import attention_parameters, macs, matched_heads, parameters
from moe_atlas.architectures.moa_published import jetmoe_parameters, published_costs
from moe_atlas.errors import AtlasError

AUTO = {"causal": AutoModelForCausalLM, "masked": AutoModelForMaskedLM, "translation": AutoModelForSeq2SeqLM}
PUBLISHED = Path(__file__).resolve().parent.parent / "config" / "moa_published.tsv"


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("attention", ["moa", "mha"])
@pytest.mark.parametrize("objective", AUTO)
def test_parameters_are_those_of_the_built_model(objective, attention, bias, tied, norm):
    architectures.register()
    config = reference.config(
        objective=objective, attention=attention, attention_bias=bias, tie_word_embeddings=tied, norm=norm
    )
    config.num_encoder_layers += objective == "translation"  # the stacks are not of one height
    with torch.device("meta"):
        model = AUTO[objective].from_config(config)
    found, sizes = parameters(config), {"attention": 0, "ffn": 0, "embedding": 0, "norm": 0}
    for name, parameter in model.named_parameters():
        kinds = {"norm": "norm", "attn": "attention", "mlp": "ffn", "embed": "embedding", "lm_head": "embedding"}
        sizes[next(kind for part, kind in kinds.items() if part in name)] += parameter.numel()
    assert found._asdict() == {"total": sum(sizes.values())} | sizes


@pytest.mark.parametrize(("experts", "k", "width"), [(8, 8, 12), (32, 3, 8), (5, 1, 2)])
def test_attention_parameters_are_the_formula(experts, k, width):
    config = reference.config(num_attention_experts=experts, num_experts_per_tok=k, head_dim=width)
    assert attention_parameters(config) == 2 * experts * 16 * width + 2 * 16 * width + 16 * experts


@pytest.mark.parametrize("attention", ["moa", "mha"])
@pytest.mark.parametrize("objective", AUTO)
def test_macs_are_the_products_that_a_pass_computes(objective, attention):
    """Counted by torch while the model runs with its tokens sorted by expert, attention maps and all."""
    architectures.register()
    model = AUTO[objective].from_config(reference.config(objective=objective, attention=attention)).eval()
    for module in model.modules():
        if hasattr(module, "dispatch"):
            module.dispatch = "sparse"
    source, target = torch.randint(3, 50, (1, 7)), torch.randint(3, 50, (1, 5))
    pair = objective == "translation"
    given = {"input_ids": source, "decoder_input_ids": target} if pair else {"input_ids": target}
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**given, output_attentions=True, use_cache=False)
    counted = macs(model.config, 5, 7 if pair else 0)
    assert counter.get_total_flops() == 2 * counted.total == 2 * sum(counted[1:])
    assert macs(model.config, 5, 7 if pair else 0, attention_map=False).total == counted.total - counted.maps


def test_macs_of_a_translation_model_need_a_source():
    with pytest.raises(AtlasError, match="source_tokens is 0 for the objective translation"):
        macs(reference.config(objective="translation"), 5)
    with pytest.raises(AtlasError, match="source_tokens is 3 for the objective causal"):
        macs(reference.config(), 5, 3)


# --- matched sizes


@pytest.mark.parametrize("by", ["parameters", "macs"])
@pytest.mark.parametrize(("experts", "k", "width"), [(8, 4, 32), (16, 4, 32), (32, 4, 32), (8, 2, 16), (4, 4, 64)])
def test_matched_heads_are_close_and_of_about_the_width_of_the_experts(experts, k, width, by):
    config = MoAConfig(
        hidden_size=128, num_attention_experts=experts, num_experts_per_tok=k, head_dim=width, num_hidden_layers=3
    )
    match = matched_heads(config, by, tokens=64)
    if by == "parameters":
        ours, wanted = attention_parameters(match.config), attention_parameters(config)
    else:
        ours, wanted = (
            counted.total - counted.ffn - counted.output for counted in (macs(match.config, 64), macs(config, 64))
        )
    assert match.difference == pytest.approx(ours / wanted - 1, abs=1e-12) and abs(match.difference) <= 0.03
    assert width / 2 <= match.config.head_dim <= 2 * width
    # No width nearer to the experts' has a number of heads that comes as close.
    unit = ours / match.config.num_attention_heads / match.config.head_dim
    for nearer in range(1, 4 * width):
        if abs(nearer - width) < abs(match.config.head_dim - width):
            assert all(abs(heads * nearer * unit / wanted - 1) > 0.03 for heads in range(1, 200))
    assert match.config.attention == "mha" and config.attention == "moa"
    assert match.config.hidden_size == 128 and parameters(match.config).ffn == parameters(config).ffn


def test_matched_heads_are_of_even_width_with_rotary_positions():
    config = reference.config(positions="rotary", head_dim=14, hidden_size=128)
    assert matched_heads(config, "parameters").config.head_dim % 2 == 0


def test_matching_needs_to_know_by_what():
    for by, tokens in (("size", 4), ("macs", 0)):
        with pytest.raises(AtlasError, match=f"matched_heads by '{by}' at {tokens} tokens"):
            matched_heads(reference.config(), by, tokens)


# --- published numbers


@pytest.fixture(scope="module")
def costs():
    return published_costs(PUBLISHED)


def rows(costs: pl.DataFrame, task: str, quantity: str, model: str = "") -> dict[str, bool]:
    chosen = costs.filter(
        pl.col("task").str.starts_with(task), pl.col("quantity") == quantity, pl.col("model").str.contains(model)
    )
    return dict(zip(chosen["model"], chosen["agrees"], strict=True))


@pytest.mark.parametrize("task", ["WMT14 En-De", "WMT14 En-Fr"])
def test_the_parameters_of_moa_are_the_published_ones_in_translation(costs, task):
    assert rows(costs, task, "parameters", "MoA") == {"MoA base 8K8E128D": True, "MoA big 16K32E256D": True}


def test_the_macs_of_moa_and_of_transformers_are_the_published_ones_in_translation(costs):
    found = rows(costs, "WMT14", "macs")
    assert {model for model, agrees in found.items() if not agrees} == {"LightConv", "DynamicConv"} and len(found) == 10


def test_the_parameters_of_the_masked_models_are_the_published_ones(costs):
    found = rows(costs, "WikiText-103 masked", "parameters")
    assert len(found) == 6 and all(found.values()) and rows(costs, "WikiText-103 masked", "macs") == {"dense": True}


def test_differences_of_the_masked_models_need_nothing_that_is_inferred(costs):
    """What MoA adds to the dense model, by the formula of one block alone; both ends are rounded to 0.01M."""
    published = dict(costs.filter(pl.col("quantity") == "parameters").select("model", "published").iter_rows())
    for experts, width in ((8, 128), (8, 256), (16, 256), (32, 256), (64, 256)):
        block = 2 * experts * 512 * width + 2 * 512 * width + 512 * experts + experts * (width + 512) + 2 * width
        added = 8 * (block - 4 * 512 * 512 - 4 * 512) / 1e6
        k = f"MoA 8K{experts}E{width}D"
        assert published[k] - published["dense"] == pytest.approx(added, abs=0.0101)


def test_what_does_not_agree_is_in_the_table_and_says_why(costs):
    differing = costs.filter(~pl.col("agrees"))
    assert set(differing["model"]) >= {"MAE-7", "JetMoE-8B", "MoA k=2, 47M", "Transformer base"}
    assert costs["note"].str.len_chars().min() > 10
    unknown = costs.filter(pl.col("computed").is_null())
    assert not unknown["agrees"].any() and unknown["note"].str.contains("no formula").all()
    far = costs.filter(pl.col("model").str.contains("47M"))
    assert ((far["computed"] / far["published"] - 1).abs() < 0.0015).all()


def test_jetmoe_8b_has_8_52_billion_parameters_of_which_a_token_meets_2_33(costs):
    """Against transformers' own model of that shape; what a token does not meet are six of eight experts a site."""
    config = JetMoeConfig(num_hidden_layers=24)
    with torch.device("meta"):
        model = JetMoeForCausalLM(config)
    experts = sum(p.numel() for name, p in model.named_parameters() if "put_linear" in name)
    whole = sum(p.numel() for p in model.parameters())
    shape = (config.hidden_size, config.intermediate_size, 24, 8, 2, 16, 128, config.vocab_size)
    assert jetmoe_parameters(*shape) == (whole, whole - experts * 6 // 8)
    assert [round(number / 1e9, 2) for number in jetmoe_parameters(*shape)] == [8.52, 2.33]
    assert costs.filter(pl.col("model") == "JetMoE-8B")["computed"].to_list() == [whole / 1e6]


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(AtlasError, match="the published numbers are not there"):
        published_costs(tmp_path / "none.tsv")
