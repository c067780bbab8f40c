"""Which neuron belongs to which expert is kept for as long as the keys are the same."""

import hashlib

import pytest
import torch
from emoe_models import dense_model, tensors
from safetensors.torch import load_file, save_file

from moe_atlas.checkpoints import Checkpoint
from moe_atlas.emoe.derive import Settings, derive
from moe_atlas.emoe.labels import Labels


@pytest.fixture(scope="module")
def mistral(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mistral")
    dense_model("mistral").save_pretrained(folder)
    return folder


def test_labels_belong_to_the_weights_they_were_made_from(mistral, tmp_path):
    settings, folder = Settings(experts=8, top_k=2), tmp_path / "emoe"
    derive(Checkpoint(mistral), settings, folder)
    path = folder / "labels.safetensors"
    first = load_file(path)
    # Labels that the rule would not give show whether they are used.
    marked = {name: labels.flip(0).contiguous() for name, labels in first.items()}
    save_file(marked, path, dict(Labels(folder).digests))
    derive(Checkpoint(mistral), Settings(experts=8, top_k=4), folder)
    assert all(torch.equal(load_file(path)[name], marked[name]) for name in first)
    # One key of one layer is another: that layer is clustered anew, and no other.
    changed = tmp_path / "changed"
    changed.mkdir()
    stored = tensors(mistral)
    stored["model.layers.1.mlp.gate_proj.weight"][0, 0] += 1e-3
    save_file(stored, changed / "model.safetensors", {"format": "pt"})
    (changed / "config.json").write_text((mistral / "config.json").read_text())
    derive(Checkpoint(changed), settings, folder)
    again = load_file(path)
    assert [torch.equal(again[f"layer_{layer}"], marked[f"layer_{layer}"]) for layer in range(3)] == [True, False, True]
    for other in (Settings(experts=4, top_k=2), Settings(experts=8, top_k=2, seed=1), Settings(8, 2, split="random")):
        digests = set(Labels(folder).digests.values())
        derive(Checkpoint(changed), other, folder)
        assert not digests & set(Labels(folder).digests.values())


def test_the_digest_is_that_of_the_keys_bytes(mistral, tmp_path):
    derive(Checkpoint(mistral), Settings(experts=8, top_k=2, layers=(1,)), tmp_path)
    keys = tensors(mistral)["model.layers.1.mlp.gate_proj.weight"]
    expected = hashlib.sha256(b"torch.float32 (48, 32) 8 cluster 0\n" + keys.numpy().tobytes()).hexdigest()
    assert dict(Labels(tmp_path).digests) == {"layer_1": expected}
