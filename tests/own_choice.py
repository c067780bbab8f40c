"""What a fully loaded model does at its experts: hooks on the model's own modules, and nothing of the probe."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers.models.jetmoe.modeling_jetmoe import JetMoeAttention, JetMoeMoE
from transformers.models.llama4.modeling_llama4 import Llama4TextMoe

from moe_atlas.architectures.moa import MoAAttention


@dataclass
class Own:
    """One set of experts in one forward pass over T tokens.

    inputs (T, d); chosen (T, N) bool; weights (T, N), 0 where not chosen; mixture (T, d) what the experts give
    together; routed (T, r) and logits: what the module with the router's weight was called with and returned.
    """

    experts: nn.Module
    router: nn.Module
    inputs: torch.Tensor | None = None
    chosen: torch.Tensor | None = None
    weights: torch.Tensor | None = None
    mixture: torch.Tensor | None = None
    routed: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    handles: list = field(default_factory=list)

    def choose(self, tokens: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, shape: tuple[int, int]) -> None:
        """Set `chosen` and `weights` from flat lists of choices."""
        self.chosen, self.weights = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape)
        self.chosen[tokens, ids] = True
        self.weights.index_put_((tokens, ids), weights.float(), accumulate=True)


def flat(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _interface(own: Own, experts: int) -> None:
    """Experts that are given the hidden states, ids (T, k) and weights (T, k): the interface's, and DBRX's."""

    def before(_module, arguments):
        inputs, ids, weights = arguments
        own.inputs = flat(inputs)
        tokens = torch.arange(len(ids))[:, None].expand_as(ids)
        own.choose(tokens.flatten(), ids.flatten(), weights.flatten(), (len(ids), experts))

    def after(_module, _arguments, output):
        own.mixture = flat(output)

    own.handles += [own.experts.register_forward_pre_hook(before), own.experts.register_forward_hook(after)]


def _llama4(own: Own, experts: int) -> None:
    """Scores (T, N) are 0 where not chosen, and already in what the experts are given."""

    def scored(_module, arguments, output):
        own.inputs, scores = flat(arguments[0]), output[0]
        tokens, ids = scores.nonzero(as_tuple=True)
        own.choose(tokens, ids, scores[tokens, ids], tuple(scores.shape))

    def after(_module, _arguments, output):
        own.mixture = output.unflatten(0, (experts, -1)).sum(0)

    own.handles += [own.router.register_forward_hook(scored), own.experts.register_forward_hook(after)]


def _jetmoe(own: Own, block: nn.Module, gating: nn.Module, bias: torch.Tensor) -> None:
    """The gating module gives choices sorted by expert, the block the mixture plus a bias."""

    def gated(_module, arguments, output):
        own.inputs = flat(arguments[0])
        _, tokens, weights, sizes, logits = output
        own.choose(tokens, torch.arange(len(sizes)).repeat_interleave(torch.as_tensor(sizes)), weights, logits.shape)

    def after(_module, _arguments, output):
        own.mixture = flat(output[0] if isinstance(output, tuple) else output) - bias

    own.handles += [gating.register_forward_hook(gated), block.register_forward_hook(after)]


def _moa(own: Own, experts: int) -> None:
    """The block says which experts it chose with which weights; what it returns is their mixture."""

    def after(_module, arguments, output):
        own.inputs, own.mixture = flat(arguments[0]), flat(output.output)
        ids, weights = flat(output.routing.ids), flat(output.routing.weights)
        tokens = torch.arange(len(ids))[:, None].expand_as(ids)
        own.choose(tokens.flatten(), ids.flatten(), weights.flatten(), (len(ids), experts))

    own.handles.append(own.experts.register_forward_hook(after))


def _watch(layer: nn.Module, experts: int, router: str) -> dict[str, Own]:
    """The sets of experts of one decoder layer, by the names of their sites."""
    found = {}
    for path, module in layer.named_modules():
        block = layer.get_submodule(path.rpartition(".")[0])
        if isinstance(module, JetMoeMoE):
            found["ffn"] = Own(module, module.get_submodule(router))
            _jetmoe(found["ffn"], module, module.router, module.bias)
        elif isinstance(module, JetMoeAttention):
            found["attention"] = Own(module.experts, module.experts.get_submodule(router))
            _jetmoe(found["attention"], module, module.experts.router, module.experts.bias)
        elif isinstance(module, MoAAttention):
            found["attention"] = Own(module, module.get_submodule(router))
            _moa(found["attention"], experts)
        elif isinstance(module, Llama4TextMoe):
            found["ffn"] = Own(module.experts, module.get_submodule(router))
            _llama4(found["ffn"], experts)
        elif path.rpartition(".")[2] == "experts" and not isinstance(block, Llama4TextMoe | JetMoeAttention):
            found["ffn"] = Own(module, block.get_submodule(router))
            _interface(found["ffn"], experts)
    for own in found.values():

        def remember(_module, arguments, output, own=own):
            own.routed, own.logits = flat(arguments[0]), output

        own.handles.append(own.router.register_forward_hook(remember))
    return found


@contextlib.contextmanager
def watched(layers: nn.ModuleList, experts: int, router: str) -> Iterator[dict[str, Own]]:
    """`layer_{l}.{site}` -> Own, filled by the model's next forward within the block."""
    found = {}
    for index, layer in enumerate(layers):
        found |= {f"layer_{index}.{site}": own for site, own in _watch(layer, experts, router).items()}
    try:
        yield found
    finally:
        for own in found.values():
            for handle in own.handles:
                handle.remove()
