"""Streamed logits are the fully loaded model's, bytes are read once, memory does not grow with depth."""

import subprocess
import sys
from pathlib import Path

import families
import model_types
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from moe_atlas.checkpoints import Checkpoint
from moe_atlas.errors import AtlasError
from moe_atlas.stream import LayerStream

BATCHES = [torch.tensor(families.token_ids([17, 17])), torch.tensor(families.token_ids([9], seed=2))]


def run(stream: LayerStream) -> list[torch.Tensor]:
    stream.begin(BATCHES)
    for index in range(len(stream)):
        with stream.layer(index):
            for batch in range(len(BATCHES)):
                stream.step(batch)
    return [stream.logits(batch) for batch in range(len(BATCHES))]


@pytest.mark.parametrize("family", families.FAMILIES)
@pytest.mark.parametrize("shards", ["5GB", "40KB"])
def test_streamed_logits_equal_the_fully_loaded_models(tmp_path, family, shards):
    families.save(family, tmp_path, max_shard_size=shards)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    checkpoint = Checkpoint(tmp_path)
    assert len(checkpoint.files) > 1 or shards == "5GB"
    for streamed, ids in zip(run(LayerStream(checkpoint)), BATCHES, strict=True):
        with torch.no_grad():
            expected = loaded(ids).logits
        assert expected.std() > 0.05  # the comparison is about something
        torch.testing.assert_close(streamed, expected, atol=1e-5, rtol=0)


VARIANTS = {
    "layers that share keys and values": (
        "gemma4_text",
        {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2},
    ),
    "a head with a bias": ("phimoe", {"lm_head_bias": True}),
    "a head of its own": ("grok-1", {"tie_word_embeddings": False}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_a_type_give_the_fully_loaded_models_logits(tmp_path, variant):
    name, changes = VARIANTS[variant]
    model_types.save(name, tmp_path, **changes)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    for streamed, ids in zip(run(LayerStream(Checkpoint(tmp_path))), BATCHES, strict=True):
        with torch.no_grad():
            torch.testing.assert_close(streamed, loaded(ids, use_cache=False).logits, atol=1e-5, rtol=0)


def test_a_stored_head_is_used_whatever_the_config_says_of_it(tmp_path):
    """The config says that the head is the embeddings, the file holds another: transformers takes the file's."""
    families.save("grok", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].flip(0).contiguous()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.config.tie_word_embeddings
    streamed = run(LayerStream(Checkpoint(tmp_path)))[0]
    with torch.no_grad():
        torch.testing.assert_close(streamed, loaded(BATCHES[0]).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["mixtral", "deepseek", "jetmoe"])
def test_every_byte_is_read_once(tmp_path, family):
    families.save(family, tmp_path, max_shard_size="40KB")
    checkpoint = Checkpoint(tmp_path)
    run(LayerStream(checkpoint))
    assert checkpoint.bytes_read == sum(info.stop - info.start for info in checkpoint.tensors.values())


def test_bfloat16_checkpoint_runs_in_bfloat16_and_in_float32_when_told(tmp_path):
    families.save("mixtral", tmp_path, dtype=torch.bfloat16)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert run(LayerStream(Checkpoint(tmp_path)))[0].dtype == torch.bfloat16
    streamed = run(LayerStream(Checkpoint(tmp_path), dtype="float32"))[0]
    with torch.no_grad():
        torch.testing.assert_close(streamed, loaded(BATCHES[0]).logits, atol=1e-5, rtol=0)


def test_padding_does_not_change_what_a_sequence_gives(tmp_path):
    families.save("deepseek", tmp_path)
    alone = LayerStream(Checkpoint(tmp_path))
    padded = LayerStream(Checkpoint(tmp_path))
    ids = torch.tensor(families.token_ids([9], seed=2))
    wide = torch.cat([torch.nn.functional.pad(ids, (0, 8)), BATCHES[0][:1]])
    results = []
    for stream, batch in ((alone, ids), (padded, wide)):
        stream.begin([batch])
        for index in range(len(stream)):
            with stream.layer(index):
                state = stream.step(0)
        results.append(state[:1, :9])
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=0)


def test_a_layer_gives_its_memory_back(tmp_path):
    families.save("mixtral", tmp_path)
    stream = LayerStream(Checkpoint(tmp_path))
    with stream.layer(0) as layer:
        assert not any(parameter.is_meta for parameter in layer.parameters())
    assert all(parameter.is_meta for parameter in stream.layers.parameters())


def test_layers_can_be_read_in_any_order(tmp_path):
    network = families.save("mixtral", tmp_path)
    stream = LayerStream(Checkpoint(tmp_path))
    for index in (2, 0, 1):
        with stream.layer(index) as layer:
            expected = network.model.layers[index].mlp.experts.gate_up_proj
            torch.testing.assert_close(layer.mlp.experts.gate_up_proj, expected, atol=0, rtol=0)


def test_only_the_layers_that_are_asked_for_are_read(tmp_path):
    families.save("mixtral", tmp_path, num_hidden_layers=5)
    checkpoint = Checkpoint(tmp_path)
    stream = LayerStream(checkpoint)
    for index, following in ((0, 2), (2, 4), (4, len(stream))):
        with stream.layer(index, following):
            pass
    asked = [info for name, info in checkpoint.tensors.items() if any(f"layers.{i}." in name for i in (0, 2, 4))]
    assert checkpoint.bytes_read == sum(info.stop - info.start for info in asked)


def test_a_tensor_the_model_needs_is_named_when_missing(tmp_path):
    families.save("mixtral", tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    (name,) = (name for name in tensors if "layers.1" in name and "self_attn.o_proj" in name)
    del tensors[name]
    save_file(tensors, path, metadata={"format": "pt"})
    stream = LayerStream(Checkpoint(tmp_path))
    with pytest.raises(AtlasError, match=r"layers\.1\.self_attn\.o_proj"), stream.layer(1):
        pass


PEAK = """
import re, sys
sys.path[:0] = ["scripts", "tests"]
from moe_atlas.checkpoints import Checkpoint
from moe_atlas.probe import extract
import families
extract(Checkpoint(sys.argv[1]), families.token_ids([64] * 4), keep_tokens=False)
# Not ru_maxrss: that of a child begins at what its parent held.
print(int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) // 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from Linux's /proc")
def test_peak_memory_does_not_grow_with_the_number_of_layers(tmp_path):
    """4 layers against 16, of 24 MiB each: the whole larger model would be 288 MiB more."""
    peaks = {}
    for layers in (4, 16):
        directory = tmp_path / str(layers)
        shape = {"hidden_size": 256, "intermediate_size": 1024, "num_local_experts": 8}
        families.save("mixtral", directory, num_hidden_layers=layers, **shape)
        done = subprocess.run([sys.executable, "-c", PEAK, directory], capture_output=True, text=True, check=True)
        peaks[layers] = int(done.stdout.split()[-1])
    print(f"peak memory in MiB by number of layers: {peaks}")
    assert peaks[16] - peaks[4] < 36, peaks
