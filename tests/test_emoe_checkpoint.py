"""A dense checkpoint becomes an EMoE and comes back: same outputs with all experts, same bits when merged."""

import json

import numpy as np
import pytest
import torch
from emoe_models import FAMILIES, IDS, SIZES, dense_model, loaded, logits, streamed, tensors
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MixtralConfig,
)

from moe_atlas.architectures.emoe import EMoE, EMoEConfig, EMoEForCausalLM
from moe_atlas.architectures.layers import decoder_layers
from moe_atlas.architectures.sites import find_sites
from moe_atlas.checkpoints import Checkpoint
from moe_atlas.emoe.derive import Settings, derive, merge
from moe_atlas.emoe.labels import Labels
from moe_atlas.emoe.split import gate_vectors
from moe_atlas.errors import AtlasError
from moe_atlas.manifest import describe
from moe_atlas.probe import extract


@pytest.fixture(scope="module", params=FAMILIES)
def dense(request, tmp_path_factory):
    """Folder and model of a dense checkpoint of each family."""
    folder = tmp_path_factory.mktemp(request.param)
    network = dense_model(request.param)
    network.save_pretrained(folder, max_shard_size="30KB")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "code.py").write_text("raise SystemExit")
    return folder, network


@pytest.fixture(scope="module")
def mistral(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mistral")
    dense_model("mistral").save_pretrained(folder)
    return folder


def masked(network, folder, layers, experts, top_k, score="gate"):
    """Logits of the dense model with a mask on what enters the down projections, written out in its own terms."""
    handles, kept = [], Labels(folder)
    for layer in layers:
        ffn = decoder_layers(network)[layer].mlp
        down = getattr(ffn, "down_proj", None) or ffn.c_proj
        labels = torch.from_numpy(kept.kept(layer))
        member = torch.nn.functional.one_hot(labels, experts).float()
        inputs = {}

        def remember(_module, args, inputs=inputs):
            inputs["x"] = args[0]

        def mask(_module, args, inputs=inputs, ffn=ffn, member=member):
            if hasattr(ffn, "c_fc"):
                gate, up = ffn.c_fc(inputs["x"]) - ffn.c_fc.bias, None
            elif hasattr(ffn, "gate_up_proj"):
                gate, up = ffn.gate_up_proj(inputs["x"]).chunk(2, dim=-1)
            else:
                gate, up = ffn.gate_proj(inputs["x"]), ffn.up_proj(inputs["x"])
            scores = (gate if score == "gate" else up) @ member / member.sum(0)
            chosen = torch.zeros_like(scores).scatter_(-1, scores.topk(top_k).indices, 1)
            return (args[0] * (chosen @ member.T),)

        handles += [ffn.register_forward_pre_hook(remember), down.register_forward_pre_hook(mask)]
    try:
        return logits(network)
    finally:
        for handle in handles:
            handle.remove()


def test_all_experts_together_are_the_dense_model(dense, tmp_path):
    folder, network = dense
    derive(Checkpoint(folder), Settings(experts=6, top_k=6), tmp_path)
    expected = logits(network)
    assert expected.std() > 0.05
    torch.testing.assert_close(
        logits(loaded(tmp_path)), expected, rtol=0, atol=1e-6 * float(expected.abs().max().clamp(1))
    )
    torch.testing.assert_close(streamed(tmp_path), expected, rtol=0, atol=2e-6 * float(expected.abs().max().clamp(1)))


@pytest.mark.parametrize("score", ["gate", "up"])
def test_some_experts_are_the_dense_model_with_a_mask_on_its_neurons(dense, score, tmp_path):
    folder, network = dense
    settings = Settings(experts=6, top_k=2, layers=(2, 0), score=score)
    if score == "up" and network.config.model_type == "gpt2":
        with pytest.raises(AtlasError, match="one matrix before its activation; write gate as emoe_score"):
            derive(Checkpoint(folder), settings, tmp_path)
        return
    derive(Checkpoint(folder), settings, tmp_path)
    expected = masked(network, tmp_path, (0, 2), 6, 2, score)
    assert (expected - logits(network)).abs().max() > 1e-2
    derived = loaded(tmp_path)
    torch.testing.assert_close(logits(derived), expected, rtol=0, atol=2e-5)
    torch.testing.assert_close(streamed(tmp_path), logits(derived), rtol=0, atol=1e-5)
    assert [bool(find_sites(layer)) for layer in decoder_layers(derived)] == [True, False, True]


def test_merged_back_every_tensor_has_the_bits_it_had(dense, tmp_path):
    folder, _ = dense
    derive(Checkpoint(folder), Settings(experts=4, top_k=1, layers=(1, 2)), tmp_path / "emoe", shard_bytes=20_000)
    assert len(list((tmp_path / "emoe").glob("model-*.safetensors"))) > 1
    merge(tmp_path / "emoe", tmp_path / "back")
    before, after = tensors(folder), tensors(tmp_path / "back")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and torch.equal(tensor, after[name]), name
    first, second = (json.loads((place / "config.json").read_text()) for place in (folder, tmp_path / "back"))
    assert first == second
    assert (tmp_path / "back" / "tokenizer.json").read_text() == "{}"
    assert not (tmp_path / "emoe" / "code.py").exists() and not (tmp_path / "back" / "labels.safetensors").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_router_is_the_mean_of_the_keys_and_scores_by_the_mean_preactivation(dtype, tmp_path):
    network = dense_model("mistral", dtype=dtype)
    network.save_pretrained(tmp_path / "dense")
    derive(Checkpoint(tmp_path / "dense"), Settings(experts=8, top_k=2), tmp_path / "emoe")
    derived, kept = loaded(tmp_path / "emoe"), Labels(tmp_path / "emoe")
    assert derived.dtype == dtype
    inputs = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    for layer, block in enumerate(module for module in derived.modules() if isinstance(module, EMoE)):
        keys, labels = network.model.layers[layer].mlp.gate_proj.weight.detach(), kept.kept(layer)
        assert np.bincount(labels).tolist() == [6] * 8
        assert block.router.weight.dtype == torch.float32
        assert torch.equal(block.router.weight, gate_vectors(keys.float(), labels, 8))
        torch.testing.assert_close(block.keys_mean(), block.router.weight, rtol=0, atol=1e-7)
        scores, weights, ids = block.router(inputs)
        preactivation = inputs.double() @ keys.double().T
        means = torch.stack([preactivation[:, labels == expert].mean(1) for expert in range(8)], 1)
        torch.testing.assert_close(scores.double(), means, rtol=0, atol=1e-5)
        assert torch.equal(weights, torch.ones(5, 2)) and torch.equal(ids, means.topk(2).indices)
        assert bool((scores < 0).any()) and bool((scores > 0).any())


def test_the_order_of_the_neurons_changes_nothing(mistral, tmp_path):
    """Neurons of the dense checkpoint in another order, the same experts: the same model."""
    stored, order = tensors(mistral), torch.randperm(48, generator=torch.Generator().manual_seed(2))
    for name in stored:
        if ".mlp." in name:
            stored[name] = (stored[name][:, order] if "down" in name else stored[name][order]).contiguous()
    shuffled = tmp_path / "shuffled"
    shuffled.mkdir()
    save_file(stored, shuffled / "model.safetensors", {"format": "pt"})
    (shuffled / "config.json").write_text((mistral / "config.json").read_text())
    torch.testing.assert_close(logits(loaded(shuffled)), logits(loaded(mistral)), rtol=0, atol=1e-5)
    settings = Settings(experts=8, top_k=3)
    derive(Checkpoint(mistral), settings, tmp_path / "first")
    # The labels of the first, each with its neuron, are what the second is given.
    kept = Labels(tmp_path / "first")
    derive(Checkpoint(shuffled), settings, tmp_path / "second")
    path = tmp_path / "second" / "labels.safetensors"
    save_file(
        {f"layer_{layer}": torch.from_numpy(kept.kept(layer))[order] for layer in range(3)},
        path,
        dict(Labels(path.parent).digests),
    )
    derive(Checkpoint(shuffled), settings, tmp_path / "second")
    torch.testing.assert_close(
        logits(loaded(tmp_path / "second")), logits(loaded(tmp_path / "first")), rtol=0, atol=1e-5
    )


def test_what_is_recorded_of_a_split(mistral, tmp_path):
    record = derive(Checkpoint(mistral), Settings(experts=8, top_k=2, layers=(0, 2)), tmp_path)
    assert record["settings"] == {
        "experts": 8, "top_k": 2, "layers": (0, 2), "score": "gate", "split": "cluster", "seed": 0
    }  # fmt: skip
    assert [(layer["layer"], layer["neurons"]) for layer in record["layers"]] == [(0, 48), (2, 48)]
    assert all(layer["objective"] < layer["objective_random"] for layer in record["layers"])


@pytest.mark.parametrize("name", ["mistral", "gpt2"])
def test_a_derived_model_generates_and_saves_like_any_other(name, tmp_path):
    dense_model(name).save_pretrained(tmp_path / "dense")
    derive(Checkpoint(tmp_path / "dense"), Settings(experts=8, top_k=2), tmp_path / "emoe")
    network = loaded(tmp_path / "emoe")
    assert type(network) is EMoEForCausalLM and network.config.hidden_size == 32
    cached = network.generate(IDS, max_new_tokens=5, do_sample=False)
    whole = network.generate(IDS, max_new_tokens=5, do_sample=False, use_cache=False)
    assert cached.shape == (2, 16) and torch.equal(cached, whole)
    network.save_pretrained(tmp_path / "saved")
    assert tensors(tmp_path / "saved").keys() == {f"dense.{key}" for key in tensors(tmp_path / "emoe")}
    assert torch.equal(logits(loaded(tmp_path / "saved")), logits(network))
    # What transformers has saved merges back too, with the labels beside it.
    (tmp_path / "saved" / "labels.safetensors").write_bytes((tmp_path / "emoe" / "labels.safetensors").read_bytes())
    merge(tmp_path / "saved", tmp_path / "back")
    before, after = tensors(tmp_path / "dense"), tensors(tmp_path / "back")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_in_training_the_gate_follows_the_keys_and_others_than_the_chosen_get_no_gradient(mistral, tmp_path):
    derive(Checkpoint(mistral), Settings(experts=8, top_k=2, layers=(1,)), tmp_path)
    network = loaded(tmp_path, experts_implementation="eager").train()
    block = next(module for module in network.modules() if isinstance(module, EMoE))
    chosen = []
    block.router.register_forward_hook(lambda module, args, output: chosen.append(output[2]))
    network(IDS[:1, :3], labels=IDS[:1, :3]).loss.backward()
    used = set(chosen[0][:-1].flatten().tolist())  # nothing is predicted from the last token
    gradient = block.experts.gate_up_proj.grad.abs().sum((1, 2))
    assert len(used) < 8 and {expert for expert in range(8) if gradient[expert] > 0} == used
    with torch.no_grad():
        block.experts.gate_up_proj.add_(0.1)
    network(IDS)
    assert torch.equal(block.router.weight, block.keys_mean())
    # A step after the last pass in training: what is saved, and what evaluates, has the gate of the new keys.
    for use in (lambda: network.state_dict(), lambda: network.eval()(IDS)):
        with torch.no_grad():
            block.experts.gate_up_proj.mul_(1.5)
        use()
        assert torch.equal(block.router.weight, block.keys_mean())


def test_experts_whose_rows_grouped_products_do_not_take_are_computed_one_by_one(mistral, tmp_path):
    derive(Checkpoint(mistral), Settings(experts=16, top_k=4), tmp_path)
    network = loaded(tmp_path, dtype=torch.bfloat16)
    assert network.config._experts_implementation == "eager"
    assert logits(network).isfinite().all()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (Settings(experts=7, top_k=2), "7 experts of equal size cannot be made of 48 neurons"),
        (
            Settings(experts=8, top_k=2, layers=(1, 3)),
            "no layer 3, the layers are 0 to 2; correct emoe_layers",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(mistral, settings, words, tmp_path):
    with pytest.raises(AtlasError, match=words) as error:
        derive(Checkpoint(mistral), settings, tmp_path / "emoe")
    assert str(mistral) in str(error.value) and not list(tmp_path.glob("emoe/*"))


def test_checkpoints_that_are_no_dense_model_of_this_kind_are_refused(tmp_path):
    small = {key: value for key, value in SIZES.items() if key != "head_dim"}
    cases = {
        "experts": (MixtralConfig(**small, num_local_experts=4), "layer 0 has experts already"),
        "bias": (LlamaConfig(**SIZES, mlp_bias=True), "without biases"),
    }
    for name, (config, words) in cases.items():
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / name)
        with pytest.raises(AtlasError, match=words):
            derive(Checkpoint(tmp_path / name), Settings(experts=4, top_k=2), tmp_path / "emoe")
    with pytest.raises(AtlasError, match="'mixtral' is no EMoE"):
        merge(tmp_path / "experts", tmp_path / "back")


def test_a_family_whose_ffn_computes_more_is_refused(mistral, tmp_path, monkeypatch):
    from transformers.models.mistral.modeling_mistral import MistralMLP

    original = MistralMLP.forward
    monkeypatch.setattr(MistralMLP, "forward", lambda self, x: 1.5 * original(self, x))
    with pytest.raises(AtlasError, match="MistralMLP computes more than its matrices"):
        derive(Checkpoint(mistral), Settings(experts=8, top_k=2), tmp_path)


@pytest.mark.parametrize(
    ("values", "words"),
    [({"emoe_score": "inter"}, "emoe_score is 'inter'"), ({"num_experts_per_tok": 9}, "between 1 and 8")],
)
def test_a_config_that_says_something_else_is_refused(values, words):
    with pytest.raises(Exception, match=words):
        EMoEConfig(**{"num_experts": 8, "num_experts_per_tok": 2} | values)


@pytest.mark.parametrize("name", ["mistral", "gpt2"])
def test_a_derived_model_is_looked_into_beside_its_dense_one(name, tmp_path):
    network = dense_model(name)
    network.save_pretrained(tmp_path / "dense")
    torch.testing.assert_close(streamed(tmp_path / "dense"), logits(network), rtol=0, atol=1e-5)
    derive(Checkpoint(tmp_path / "dense"), Settings(experts=6, top_k=2, layers=(0, 2)), tmp_path / "emoe")
    described = describe("emoe", "emoe:dense", "", tmp_path / "emoe", dense_allowed=False)
    sizes = {key: described[key] for key in ("N", "k", "m", "d", "L", "moe_layers", "dense_layers")}
    assert sizes == {"N": 6, "k": 2, "m": 8, "d": 32, "L": 3, "moe_layers": [0, 2], "dense_layers": [1]}
    assert describe("dense", "path:dense", "", tmp_path / "dense", dense_allowed=True)["m"] == 48
    sites, found = extract(
        Checkpoint(tmp_path / "emoe"), IDS.tolist(), keep_tokens=True, reference=Checkpoint(tmp_path / "dense")
    )
    assert [site["layer"] for site in sites] == [0, 2]
    labels = [*map(str, range(6)), "F", "F_same_input"]
    blocks = [module for module in loaded(tmp_path / "emoe").modules() if isinstance(module, EMoE)]
    for site, block in zip(sites, blocks, strict=True):
        assert site["labels"] == labels
        prefix = f"layer_{site['layer']}.ffn."
        scores, weights = found[f"{prefix}logits"], found[f"{prefix}weights"]
        assert torch.equal(weights, torch.ones(IDS.numel(), 2))
        assert torch.equal(found[f"{prefix}ids"], scores.topk(2).indices) and bool((scores < 0).any())
        assert find_sites(torch.nn.ModuleList([block]))[0].bank().router.equal(block.router.weight)
    # In the first layer both see the same inputs, so F is F_same_input.
    cosine = found["layer_0.ffn.cosine"]
    assert cosine[:, 6, 7].min() > 0.9999


def test_files_whose_names_lack_the_models_prefix_are_taken(tmp_path):
    """As the Hub's own gpt2, which also ships its attention masks."""
    network = dense_model("gpt2")
    network.save_pretrained(tmp_path / "dense")
    stored = {name.removeprefix("transformer."): tensor for name, tensor in tensors(tmp_path / "dense").items()}
    stored["h.0.attn.bias"] = torch.ones(1, 1, 64, 64)
    save_file(stored, tmp_path / "dense" / "model.safetensors", {"format": "pt"})
    derive(Checkpoint(tmp_path / "dense"), Settings(experts=4, top_k=4), tmp_path / "emoe")
    expected = logits(network)
    nearly = {"rtol": 0, "atol": 1e-6 * float(expected.abs().max().clamp(1))}
    torch.testing.assert_close(streamed(tmp_path / "emoe"), expected, **nearly)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "emoe")), expected, **nearly)
    merge(tmp_path / "emoe", tmp_path / "back")
    after = {name.removeprefix("transformer."): tensor for name, tensor in tensors(tmp_path / "back").items()}
    assert after.keys() == stored.keys() and all(torch.equal(after[name], stored[name]) for name in stored)
