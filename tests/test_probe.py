"""What the probe records: batches, labels, long and short corpora. test_model_types.py compares it with the models."""

import families
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from moe_atlas.architectures.layers import decoder_layers
from moe_atlas.architectures.sites import find_sites, mix
from moe_atlas.checkpoints import Checkpoint
from moe_atlas.errors import AtlasError
from moe_atlas.probe import extract, make_batches

SEQUENCES = families.token_ids([11, 5, 11, 8])
TOTAL = sum(map(len, SEQUENCES))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A saved random checkpoint of every family."""
    root = tmp_path_factory.mktemp("families")
    for family in families.FAMILIES:
        families.save(family, root / family)
    return root


@pytest.mark.parametrize("family", ["mixtral", "jetmoe"])
def test_batching_and_chunks_do_not_change_the_result(checkpoints, family, monkeypatch):
    whole = extract(Checkpoint(checkpoints / family), SEQUENCES, keep_tokens=True)
    monkeypatch.setattr("moe_atlas.architectures.sites.CHUNK_BYTES", 4000)
    monkeypatch.setattr("moe_atlas.architectures.sites.GROUP_BYTES", 12000)
    pieces = extract(Checkpoint(checkpoints / family), SEQUENCES, keep_tokens=True, batch_tokens=12)
    assert whole[0] == pieces[0]
    for name, tensor in whole[1].items():
        if name.endswith("_histogram"):  # a value beside an edge may fall on the other side of it
            shift = (pieces[1][name] - tensor).cumsum(-1).abs()
            assert shift.max() <= 2 and shift.sum() <= 0.002 * tensor.sum(), name
            continue
        # The share of active neurons is such a count, too.
        atol = 0.01 if name.endswith("document_sum") else 2e-5
        torch.testing.assert_close(pieces[1][name], tensor, atol=atol, rtol=1e-5, msg=name)


def test_long_corpora_keep_the_same_sums_without_a_row_a_token(checkpoints):
    short = extract(Checkpoint(checkpoints / "mixtral"), SEQUENCES, keep_tokens=True)[1]
    long = extract(Checkpoint(checkpoints / "mixtral"), SEQUENCES, keep_tokens=False)[1]
    assert set(long) < set(short)
    for name, tensor in long.items():
        assert torch.equal(tensor, short[name]), name
    assert not any(TOTAL in tensor.shape for tensor in long.values())


def test_the_same_run_gives_the_same_bytes(checkpoints):
    first = extract(Checkpoint(checkpoints / "deepseek"), SEQUENCES, keep_tokens=True)[1]
    second = extract(Checkpoint(checkpoints / "deepseek"), SEQUENCES, keep_tokens=True)[1]
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_dense_model_has_no_sites(checkpoints):
    assert extract(Checkpoint(checkpoints / "mistral"), SEQUENCES, keep_tokens=True) == ([], {})


def test_labels_name_the_reference_and_the_shared_expert(checkpoints):
    dense = Checkpoint(checkpoints / "mistral")
    sites, _ = extract(Checkpoint(checkpoints / "mixtral"), SEQUENCES, keep_tokens=False, reference=dense)
    assert sites[0]["labels"] == ["0", "1", "2", "3", "4", "5", "F", "F_same_input"]
    sites, _ = extract(Checkpoint(checkpoints / "deepseek"), SEQUENCES, keep_tokens=False)
    assert [site["layer"] for site in sites] == [1, 2]
    assert sites[0]["labels"] == [*map(str, range(7)), "SE"]
    sites, _ = extract(Checkpoint(checkpoints / "jetmoe"), SEQUENCES, keep_tokens=False, reference=dense)
    labels = {site["site"]: site["labels"] for site in sites}
    assert labels == {"attention": [*"0123"], "ffn": [*"0123", "F", "F_same_input"]}


def test_a_reference_of_another_width_is_refused(checkpoints, tmp_path):
    families.save("mistral", tmp_path, hidden_size=48)
    with pytest.raises(AtlasError, match="hidden size 48 differs from the 32"):
        extract(Checkpoint(checkpoints / "mixtral"), SEQUENCES, keep_tokens=False, reference=Checkpoint(tmp_path))


def test_attention_experts_recombine_to_the_layers_attention(checkpoints):
    """All N attention experts on every token, mixed by the router, are what JetMoE's own attention returns."""
    network = AutoModelForCausalLM.from_pretrained(checkpoints / "jetmoe").double().eval()
    layer = decoder_layers(network)[0]
    (site,) = (site for site in find_sites(layer) if site.name == "attention")
    hidden = torch.randn(2, 6, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    positions = network.model.rotary_emb(hidden, torch.arange(6)[None])
    with torch.no_grad():
        own = layer.self_attention(hidden, attention_mask=None, position_embeddings=positions)[0]
        read = site.all_heads(hidden, None, positions)
        _, ids, weights = site.route(hidden.flatten(0, 1))
        ours = mix(site.second_maps(read), ids, weights) + site.experts.bias
    # The router's logits are float32 in JetMoE whatever the model's precision.
    np.testing.assert_allclose(ours.view_as(own).numpy(), own.numpy(), atol=1e-6)


def test_an_empty_slot_counts_for_nothing():
    outputs = torch.eye(3, dtype=torch.float64)[:, None, :].expand(3, 2, 3)
    ids, weights = torch.tensor([[0, 3], [2, 1]]), torch.tensor([[0.5, 9.0], [0.25, 0.75]])
    assert mix(outputs, ids, weights).tolist() == [[0.5, 0, 0], [0, 0.75, 0.25]]


def test_batches_hold_every_token_once_in_its_place():
    lengths = [5, 40, 1, 7, 7, 100]
    sequences = families.token_ids(lengths)
    batches = make_batches(sequences, batch_tokens=64)
    flat = torch.tensor([token for sequence in sequences for token in sequence])
    rows = torch.cat([batch.rows for batch in batches])
    assert rows.sort().values.tolist() == list(range(len(flat)))
    for batch in batches:
        assert torch.equal(batch.ids.flatten()[batch.tokens], flat[batch.rows])
        assert batch.ids.numel() <= 64 or len(batch.ids) == 1
