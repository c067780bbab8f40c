"""Layouts beside the plain one: text parts of image-text models, experts of another width, and what is refused."""

import model_types
import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from moe_atlas.architectures.sites import find_sites
from moe_atlas.checkpoints import Checkpoint
from moe_atlas.errors import AtlasError
from moe_atlas.manifest import describe
from moe_atlas.probe import extract
from moe_atlas.stream import LayerStream

SEQUENCES = model_types.token_ids([9, 9])
IDS = torch.tensor(SEQUENCES)

VISION = {"hidden_size": 16, "intermediate_size": 32, "image_size": 28, "patch_size": 14}
IMAGE_TEXT = {
    "llama4": (
        "Llama4ForConditionalGeneration",
        VISION
        | {"num_hidden_layers": 1, "num_attention_heads": 2, "vision_output_dim": 16}
        | {"projector_input_dim": 16, "projector_output_dim": 16},
    ),
    "qwen3_5_moe": (
        "Qwen3_5MoeForConditionalGeneration",
        {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
        | {"patch_size": 14, "num_position_embeddings": 4},
    ),
    "gemma4": (
        "Gemma4ForConditionalGeneration",
        {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        | {"num_key_value_heads": 2, "head_dim": 8},
    ),
}


@pytest.mark.parametrize("name", IMAGE_TEXT)
def test_the_text_part_of_an_image_text_checkpoint_is_read(tmp_path, name):
    """Its files have other names, and its config holds the language model's in `text_config`."""
    model_class, vision = IMAGE_TEXT[name]
    row = model_types.TYPES[f"{name}_text"]
    text = model_types.config(f"{name}_text").to_dict()
    network = getattr(transformers, model_class)(CONFIG_MAPPING[name](text_config=text, vision_config=vision)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
        expected = network(input_ids=IDS).logits
    network.save_pretrained(tmp_path)
    stream = LayerStream(Checkpoint(tmp_path))
    stream.begin([IDS])
    for index in range(len(stream)):
        with stream.layer(index):
            stream.step(0)
    assert expected.std() > 0.05
    torch.testing.assert_close(stream.logits(0), expected, atol=1e-5, rtol=0)
    found = describe("m", f"path:{tmp_path}", "", tmp_path, dense_allowed=False)
    assert [found[key] for key in "Nkm"] == [row.experts, row.top_k, row.width]
    assert found["moe_layers"] == list(row.layers)


def test_experts_of_another_width_than_the_models_have_no_shared_expert_beside_them(tmp_path):
    """Nemotron-H can project to a latent width before its routed experts; the shared one works on the model's."""
    network = model_types.save("nemotron_h", tmp_path, moe_latent_size=24)
    sites, tensors = extract(Checkpoint(tmp_path), SEQUENCES, keep_tokens=True)
    assert [site["labels"] for site in sites] == [[*map(str, range(8))]] * 2
    (site,) = find_sites(network.model.layers[1])
    assert site.bank().up.shape == (8, 16, 24) and site.bank().router.shape == (8, 32)
    seen = []
    site.experts.register_forward_pre_hook(lambda _module, arguments: seen.append(arguments))
    with torch.no_grad():
        network(IDS, use_cache=False)
    outputs = site.evaluate(seen[0][0])
    assert outputs.shape == (8, IDS.numel(), 24)
    norms = torch.linalg.vector_norm(outputs, dim=-1).T
    torch.testing.assert_close(tensors["layer_1.ffn.norms"], norms, atol=1e-5, rtol=1e-5)
    weights = seen[0][2].sort(dim=-1, descending=True).values
    torch.testing.assert_close(tensors["layer_1.ffn.weights"], weights, atol=1e-5, rtol=0)


def small(name: str, **values: object) -> torch.nn.Module:
    """A model of a type that is not in the table."""
    known = CONFIG_MAPPING[name]().to_dict()
    common = {key: value for key, value in model_types.COMMON.items() if key in known}
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[name](**common | values)).eval()


# Experts outside the experts interface, for which there is no class of ours: the config, and what the error says.
UNKNOWN = {
    "longcat_flash": (
        {key: value for key, value in model_types.LATENT.items() if value is not None}
        | {"num_layers": 2, "ffn_hidden_size": 24, "expert_ffn_hidden_size": 16, "n_routed_experts": 8}
        | {"moe_topk": 3, "zero_expert_num": 2},
        r"LongcatFlashExperts \(gate_up_proj \(10, 32, 32\), down_proj \(8, 32, 16\)\)",
    ),
    "doge": (
        {"is_moe": True, "num_experts": 16, "num_experts_per_tok": 2},
        r"DogeCDMoE \(gate_proj\.weight \(40, 32\)",
    ),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_experts_in_an_unknown_layout_are_described_in_the_error(tmp_path, name):
    values, described = UNKNOWN[name]
    small(name, **values).save_pretrained(tmp_path)
    sentence = rf"{described}.*: this layout of experts is not known; see \"add an architecture\" in CONTRIBUTING\.md\."
    with pytest.raises(AtlasError, match=sentence):
        describe("m", f"path:{tmp_path}", "", tmp_path, dense_allowed=True)
    with pytest.raises(AtlasError, match=sentence):
        extract(Checkpoint(tmp_path), SEQUENCES, keep_tokens=False)


LATENT_DEEPSEEK = {key: value for key, value in model_types.LATENT.items() if value is not None} | model_types.DEEPSEEK
ENTANGLED = {
    "glm_moe_dsa": LATENT_DEEPSEEK | model_types.INDEX | model_types.DENSE_FIRST,
    "hy_v4": LATENT_DEEPSEEK | model_types.INDEX,
    "zaya": {"num_experts": 8, "num_experts_per_tok": 1, "router_hidden_size": 16},
    "inkling2_text": {"n_routed_experts": 8, "unpadded_vocab_size": 96, "n_layers_per_attn_res_block": 1}
    | {"d_rel": 4, "rel_extent": 16, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8},
}


@pytest.mark.parametrize("name", ENTANGLED)
@pytest.mark.parametrize("rows", [1, 2])
def test_layers_that_hand_on_more_than_hidden_states_are_refused(tmp_path, name, rows):
    """Never a wrong number: one row or two, so that nothing is taken apart by chance."""
    small(name, **ENTANGLED[name] | {"num_hidden_layers": 3}).save_pretrained(tmp_path)
    stream = LayerStream(Checkpoint(tmp_path))
    with pytest.raises(AtlasError, match=r"its decoder layers hand on more than hidden states.*CONTRIBUTING\.md"):
        stream.begin([IDS[:rows]])
    with stream.layer(2) as layer:  # the weights can be looked at all the same
        assert find_sites(layer)[0].bank().up.shape[0] == 8
