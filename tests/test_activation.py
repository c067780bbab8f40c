"""The activation of experts, sigma(W_act x) before the product with up, against its definition on the weights."""

import families
import model_types
import pytest
import torch
from torch.nn import functional
from transformers.activations import ACT2FN

from moe_atlas.architectures.ffn import dense_ffn, ffn_activation
from moe_atlas.architectures.layers import decoder_layers
from moe_atlas.architectures.sites import find_sites
from moe_atlas.checkpoints import Checkpoint
from moe_atlas.probe import Text, extract_texts

# Families whose gate is x sigmoid(alpha x), with bounds that these weights do not reach.
SCALED = {"gpt_oss": 1.702, "minimax_m3_vl_text": 1.702}


def ffn_sites(network):
    return [site for layer in decoder_layers(network) for site in find_sites(layer) if site.name == "ffn"]


@pytest.mark.parametrize("name", model_types.MOE)
def test_activation_is_the_act_branch_before_up(name):
    network = model_types.model(name).double()
    config = network.config.get_text_config()
    for site in ffn_sites(network):
        bank = site.bank()
        x = torch.randn(5, bank.up.shape[-1], dtype=torch.float64, generator=torch.Generator().manual_seed(1)) / 10
        first = bank.up if bank.act is None else bank.act
        before = torch.einsum("nmd,td->ntm", first, x)
        experts = getattr(site, "experts", None)
        if getattr(experts, "has_bias", False):
            bias = experts.gate_up_proj_bias
            before = before + (bias.chunk(2, -1)[0] if experts.is_concatenated else bias[:, ::2])[:, None]
        if name in SCALED:
            wanted = before * torch.sigmoid(SCALED[name] * before)
        else:
            names = ("hidden_act", "hidden_activation", "activation_function", "mlp_hidden_act")
            given = next((getattr(config, key) for key in names if isinstance(getattr(config, key, None), str)), "silu")
            wanted = ACT2FN[given](before)
        with torch.no_grad():
            outputs, found = site.answer(x)
            torch.testing.assert_close(found, wanted, atol=1e-9, rtol=1e-6)
            assert torch.equal(site.activation(x), found) and torch.equal(site.evaluate(x), outputs)
        assert found.std() > 1e-3


def test_attention_experts_have_no_activation(tmp_path):
    families.save("jetmoe", tmp_path)
    (record,) = extract_texts(Checkpoint(tmp_path), [Text(families.token_ids([6, 3]), keep_tokens=True)])
    names = {name for name in record.tensors if name.endswith("activation_histogram")}
    assert names and all(".ffn." in name for name in names)
    assert set(record.states) == {name.split(".")[0] for name in names}


def test_activation_of_a_dense_ffn():
    layer = decoder_layers(families.model("mistral"))[0]
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    ffn = dense_ffn(layer)
    with torch.no_grad():
        torch.testing.assert_close(ffn_activation(ffn, x), functional.silu(ffn.gate_proj(x)))
        hidden = ffn_activation(ffn, x) * ffn.up_proj(x)
        torch.testing.assert_close(ffn.down_proj(hidden), ffn(x))


def test_activation_of_a_fused_ffn_and_of_one_without_a_gate():
    class Fused(torch.nn.Module):
        def __init__(self, width):
            super().__init__()
            self.gate_up_proj, self.down_proj = torch.nn.Linear(8, width), torch.nn.Linear(6, 8)
            self.activation_fn = torch.tanh

    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for width in (12, 6):
            module = Fused(width)
            torch.testing.assert_close(ffn_activation(module, x), torch.tanh(module.gate_up_proj(x)[:, :6]))
        del module.activation_fn
        assert ffn_activation(module, x) is None
