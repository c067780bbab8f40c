"""Every model type of the table: what is streamed and recorded is what transformers computes with the whole model.

docs/model-types.md lists the types; a row in model_types.py is all that a new one needs.
"""

import contextlib
import re
from pathlib import Path

import model_types
import pytest
import torch
from model_types import TYPES
from own_choice import watched
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoModelForCausalLM

from moe_atlas.architectures.layers import decoder_layers
from moe_atlas.architectures.sites import find_sites, mix
from moe_atlas.checkpoints import Checkpoint
from moe_atlas.manifest import describe
from moe_atlas.probe import extract
from moe_atlas.stream import LayerStream

SEQUENCES = model_types.token_ids([13, 13])
IDS = torch.tensor(SEQUENCES)
TOKENS = IDS.numel()
ROOT = Path(__file__).resolve().parent.parent


class Case:
    """A saved checkpoint of one row, what the loaded model does with IDS, and what the probe records."""

    def __init__(self, name: str, directory: Path):
        self.name, self.row, self.directory = name, TYPES[name], directory
        # Every other type in several files.
        self.sharded = list(TYPES).index(name) % 2 == 1
        model_types.save(name, directory, max_shard_size="20KB" if self.sharded else "5GB")
        self.network = AutoModelForCausalLM.from_pretrained(directory).eval()
        self.layers = decoder_layers(self.network)
        self.sites = {
            f"layer_{index}.{site.name}": site for index, layer in enumerate(self.layers) for site in find_sites(layer)
        }
        with torch.no_grad(), watched(self.layers, self.row.experts, self.row.router) as self.own:
            self.logits = self.network(IDS, use_cache=False).logits
        self.recorded, self.tensors = extract(Checkpoint(directory), SEQUENCES, keep_tokens=True)

    def record(self, site: str, name: str) -> torch.Tensor:
        return self.tensors[f"{site}.{name}"]


@pytest.fixture(scope="module", params=model_types.MOE)
def case(request, tmp_path_factory):
    return Case(request.param, tmp_path_factory.mktemp(request.param))


def streamed(directory: Path, dtype: str = "auto") -> torch.Tensor:
    stream = LayerStream(Checkpoint(directory), dtype)
    stream.begin([IDS])
    for index in range(len(stream)):
        with stream.layer(index):
            stream.step(0)
    return stream.logits(0)


def test_streamed_logits_equal_the_fully_loaded_models(case):
    assert (len(Checkpoint(case.directory).files) > 1) == case.sharded
    assert case.logits.std() > 0.05  # the comparison is about something
    torch.testing.assert_close(streamed(case.directory), case.logits, atol=1e-5, rtol=0)


class Watcher:
    """An observer of a site that only counts the tokens it is shown."""

    seen = 0
    at_once = 2

    def ready(self, experts: slice) -> None:
        pass

    def done(self, experts: slice) -> None:
        pass

    def activation(self, tokens: torch.Tensor, experts: slice, activation: torch.Tensor) -> None:
        pass

    def tokens(self) -> torch.Tensor:
        return torch.arange(TOKENS)

    def record(self, tokens: torch.Tensor, *_values: torch.Tensor) -> None:
        self.seen += len(tokens)


def test_a_model_that_is_watched_gives_the_logits_it_gave(case):
    watchers = [Watcher() for _ in case.sites]
    with torch.no_grad(), contextlib.ExitStack() as stack:
        for site, watcher in zip(case.sites.values(), watchers, strict=True):
            stack.enter_context(site.observed(watcher))
        torch.testing.assert_close(case.network(IDS, use_cache=False).logits, case.logits, atol=1e-5, rtol=0)
    assert [watcher.seen for watcher in watchers] == [TOKENS] * len(watchers)
    with torch.no_grad():  # and it is as it was once nobody watches
        torch.testing.assert_close(case.network(IDS, use_cache=False).logits, case.logits, atol=1e-6, rtol=0)


def test_bfloat16_keeps_in_float32_what_transformers_keeps_in_it(case):
    """A correction bias rounded to bfloat16 would choose other experts."""
    network = AutoModelForCausalLM.from_pretrained(case.directory, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        expected = network(IDS, use_cache=False).logits
    ours = streamed(case.directory, "bfloat16")
    assert ours.dtype == expected.dtype
    torch.testing.assert_close(ours, expected, atol=0.02, rtol=0)


def test_recorded_choices_are_the_models_own(case):
    """Ids and weights, against what the experts of the whole model were given, or its routers returned."""
    assert set(case.own) == {f"layer_{site['layer']}.{site['site']}" for site in case.recorded}
    assert [site["layer"] for site in case.recorded if site["site"] == "ffn"] == list(case.row.layers)
    for name, own in case.own.items():
        ids, weights = case.record(name, "ids"), case.record(name, "weights")
        assert ids.shape == weights.shape == (TOKENS, case.row.top_k)
        chosen = torch.zeros(TOKENS, case.row.experts, dtype=torch.bool).scatter(1, ids, True)
        assert torch.equal(chosen, own.chosen)
        assert (chosen.sum(1) == case.row.top_k).all() and chosen.any(0).sum() > case.row.top_k  # choices differ
        dense = torch.zeros(TOKENS, case.row.experts).scatter(1, ids, weights)
        torch.testing.assert_close(dense, own.weights, atol=1e-5, rtol=1e-5)


def test_what_a_router_adds_to_its_scores_matters(case):
    """Where there is a selection bias, some tokens choose otherwise than their largest logits say."""
    for name, site in case.sites.items():
        if site.choice().bias is not None:
            largest = case.record(name, "logits").topk(case.row.top_k).indices.sort().values
            assert not torch.equal(largest, case.record(name, "ids").sort().values), name


def test_recorded_logits_are_the_routers_weight_times_its_input(case):
    """And those are what the router itself returns, but for Laguna's, which caps them."""
    cap = getattr(case.network.config, "moe_router_logit_softcapping", None)
    for name, own in case.own.items():
        weight = own.router.weight[: case.row.experts].float()
        expected = functional.linear(own.routed.float(), weight, getattr(own.router, "bias", None))
        torch.testing.assert_close(case.record(name, "logits"), expected, atol=1e-5, rtol=1e-5)
        returned = own.logits if isinstance(own.logits, tuple) else (own.logits,)
        returned = [part.float().reshape(expected.shape) for part in returned if part.numel() == expected.numel()]
        expected = expected if cap is None else cap * torch.tanh(expected / cap)
        assert any(torch.allclose(part, expected, atol=1e-5) for part in returned), name


def test_all_experts_recombine_to_what_the_model_mixes(case):
    for name, own in case.own.items():
        site = case.sites[name]
        if site.name == "attention":  # test_probe.py has those, which need masks and positions
            continue
        ids = own.chosen.nonzero()[:, 1].view(TOKENS, case.row.top_k)
        weights = own.weights.gather(1, ids)
        with torch.no_grad():
            if hasattr(site, "chosen"):  # the weight is in the experts' input
                mixture = site.chosen(own.inputs, ids, weights)
            else:
                mixture = mix(site.evaluate(own.inputs), ids, weights)
        torch.testing.assert_close(mixture, own.mixture, atol=1e-5 * own.mixture.abs().max().item(), rtol=0)


def test_each_expert_gives_what_the_models_own_gives_alone(case):
    """Also the experts that nobody chose: the model's experts module is asked for one expert with weight 1."""
    for name, own in case.own.items():
        if case.name in ("jetmoe", "llama4_text", "moa"):  # their experts are not asked by id
            continue
        outputs = case.sites[name].evaluate(own.inputs)
        for expert, ours in enumerate(outputs):
            inputs = own.inputs[None] if case.name == "dbrx" else own.inputs
            ids = torch.full((TOKENS, 1), expert)
            with torch.no_grad():
                alone = own.experts(inputs, ids, torch.ones(TOKENS, 1)).reshape(ours.shape)
            torch.testing.assert_close(ours, alone, atol=1e-5 * alone.abs().max().item(), rtol=0)


def test_the_shared_expert_is_the_models_own_before_any_gate(case):
    """What the module of the shared expert returned in the whole model, and its cosine to expert 0 as recorded."""
    labels = {f"layer_{site['layer']}.{site['site']}": site["labels"] for site in case.recorded}
    for name, own in case.own.items():
        shared, seen = case.sites[name].shared, []
        assert (shared is not None) == (labels[name][-1] == "SE") == bool(case.row.shared)
        if shared is None:
            continue
        handle = shared.register_forward_hook(lambda _module, _inputs, output, seen=seen: seen.append(output.clone()))
        with torch.no_grad():
            case.network(IDS, use_cache=False)
        handle.remove()
        (output,) = seen
        output = output.reshape(own.inputs.shape)
        with torch.no_grad():
            torch.testing.assert_close(shared(own.inputs), output, atol=1e-5, rtol=1e-5)
            expected = functional.cosine_similarity(case.sites[name].evaluate(own.inputs)[0], output)
        torch.testing.assert_close(case.record(name, "cosine")[:, 0, -1], expected, atol=1e-5, rtol=0)


def test_the_description_is_the_rows(case):
    row = case.row
    found = describe("m", f"path:{case.directory}", "", case.directory, dense_allowed=False)
    shape = {key: found[key] for key in ("model_type", "L", "N", "k", "d", "m", "shared", "moe_layers")}
    assert shape == {
        "model_type": case.name,
        "L": len(case.layers),
        "N": row.experts,
        "k": row.top_k,
        "d": model_types.COMMON["hidden_size"],
        "m": row.width,
        "shared": row.shared,
        "moe_layers": list(row.layers),
    }


# What the files call the matrices of an expert.
PER_EXPERT = {
    **dict.fromkeys(("up_proj", "w3", "linear_v"), "up"),
    **dict.fromkeys(("gate_proj", "w1", "linear"), "act"),
    **dict.fromkeys(("down_proj", "w2", "linear_1"), "down"),
}
FUSED = (("gate_up_proj", "down_proj"), ("input_linear", "output_linear"), ("fc1", "fc2"))


def stored_experts(tensors: dict[str, torch.Tensor], layer: int, row: model_types.ModelType) -> dict[str, torch.Tensor]:
    """up (N, m, d), act (N, m, d) and down (N, d, m) of one layer, put together from a file's tensors."""
    own = {name: tensor for name, tensor in tensors.items() if f".{layer}." in name and "shared" not in name}
    if row.fused is None:
        found = {}
        for name, tensor in own.items():
            if match := re.search(rf"\.{layer}\..*(?:experts|moe)\.(\d+)\.(\w+)\.weight$", name):
                found.setdefault(PER_EXPERT[match[2]], {})[int(match[1])] = tensor
        return {
            matrix: torch.stack([parts[expert] for expert in range(row.experts)]) for matrix, parts in found.items()
        }
    if row.fused == "stacked":
        stacks = {
            name.rpartition(".")[2]: t.unflatten(0, (row.experts, -1)) for name, t in own.items() if ".mlp." in name
        }
        return {"up": stacks["v1"], "act": stacks["w1"], "down": stacks["w2"].transpose(1, 2)}
    for names in FUSED:
        fits = [
            tensor
            for wanted in names
            for name, tensor in own.items()
            if tensor.dim() == 3 and name.removesuffix(".weight").endswith(wanted) and "attention" not in name
        ]
        if len(fits) == 2:
            first, down = fits
    if row.fused == "interleaved":
        first, down = torch.cat([first[..., ::2], first[..., 1::2]], dim=-1).transpose(1, 2), down.transpose(1, 2)
    elif row.fused == "columns":
        first, down = first.transpose(1, 2), down.transpose(1, 2)
    act, up = first.chunk(2, dim=1)
    return {"up": up, "act": act, "down": down}


def test_the_bank_holds_the_files_own_matrices(case):
    tensors = {name: t for file in case.directory.glob("*.safetensors") for name, t in load_file(file).items()}
    for layer in case.row.layers:
        bank = case.sites[f"layer_{layer}.ffn"].bank()
        stored = stored_experts(tensors, layer, case.row)
        assert bank.up.shape == (case.row.experts, case.row.width, model_types.COMMON["hidden_size"])
        assert bank.matrices.keys() == stored.keys()
        for name, matrix in bank.matrices.items():
            assert torch.equal(matrix, stored[name]), name
        assert len(bank.router) == case.row.experts


def test_the_list_of_model_types_is_the_table():
    listed = re.findall(r"^\| `([\w-]+)` \|", (ROOT / "docs" / "model-types.md").read_text(), re.MULTILINE)
    assert listed == sorted(model_types.MOE)
