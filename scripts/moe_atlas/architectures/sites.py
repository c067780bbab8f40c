"""Where a decoder layer has experts, how all of them are evaluated, and how the mixture is made of that.

An expert site is one router with its N experts: the FFN experts of a layer, or its attention experts.
Its experts are all evaluated on every token, in token order, in chunks of tokens of bounded size; the
model goes on with the mixture of the k chosen ones, so its output stays what it would have been.
"""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import nn
from torch.nn import functional

from moe_atlas.architectures import internals
from moe_atlas.architectures.bank import ExpertBank
from moe_atlas.architectures.ffn import ffn_view, is_ffn
from moe_atlas.errors import AtlasError

# Numbers that evaluating all experts on one chunk of tokens may hold at a time (256 MiB in float32).
CHUNK_NUMBERS = 64 << 20


class Observer(Protocol):
    """Who looks at a site while the model runs."""

    def tokens(self) -> torch.Tensor:
        """Indices (n,) int64 of the call's tokens that are not padding, in token order."""

    def record(
        self,
        tokens: torch.Tensor,
        inputs: torch.Tensor,
        logits: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        outputs: torch.Tensor,
    ) -> None:
        """Take one chunk of c tokens.

        tokens (c,) their indices; inputs (c, d) what the experts see; logits (c, N) float32 of the
        router; ids (c, k) and weights (c, k) as the model applies them, an id of N is an empty slot;
        outputs (N, c, d) of every expert, before the weight.
        """


class ExpertSite(ABC):
    """One router and its experts. Subclasses say how the experts are evaluated and how they are attached to.

    Attributes: name ("ffn" or "attention"), num_experts, shared (module of the shared expert or None).
    """

    name = "ffn"
    shared: nn.Module | None = None
    num_experts: int

    def logits(self, inputs: torch.Tensor) -> torch.Tensor:
        """Router logits (T, N) in float32 of the inputs (T, d): W x + b, before any scoring rule."""
        router = self.router
        bias = getattr(router, "bias", None)
        return functional.linear(inputs.float(), router.weight.float(), None if bias is None else bias.float())

    def bank(self) -> ExpertBank:
        """The weights of the site as an ExpertBank."""
        raise AtlasError(f"the weights of {self.name} experts have no view of up, act and down.")

    @abstractmethod
    def observed(self, observer: Observer) -> AbstractContextManager[None]:
        """Let `observer` see every call of the site while the block runs."""

    def _mixture(
        self,
        observer: Observer,
        inputs: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        evaluate: Callable[[torch.Tensor], torch.Tensor],
        numbers_per_token: int,
    ) -> torch.Tensor:
        """Evaluate all experts in token chunks, show them to the observer, return the mixture (T, d).

        `evaluate(tokens)` gives (N, c, d) for indices (c,). Padding gets zeros: nothing attends to it.
        """
        mixture = torch.zeros_like(inputs)
        for tokens in observer.tokens().split(max(1, CHUNK_NUMBERS // numbers_per_token)):
            outputs = evaluate(tokens)
            mixture[tokens] = mix(outputs, ids[tokens], weights[tokens]).to(inputs.dtype)
            seen = inputs[tokens]
            observer.record(tokens, seen, self.logits(seen), ids[tokens], weights[tokens], outputs)
        return mixture


def mix(outputs: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted sum over the chosen experts: outputs (N, T, d), ids (T, k), weights (T, k) -> (T, d) float32 or better.

    An id equal to N is an empty slot.
    """
    count, tokens = outputs.shape[0], torch.arange(outputs.shape[1], device=outputs.device)
    dtype = torch.promote_types(outputs.dtype, torch.float32)
    used = (ids < count).to(dtype) * weights.to(dtype)
    chosen = outputs[ids.clamp(max=count - 1), tokens[:, None]].to(dtype)
    return (chosen * used[..., None]).sum(1)


class InterfaceSite(ExpertSite):
    """FFN experts that transformers sends through its experts interface: no code a family."""

    def __init__(self, experts: nn.Module, block: nn.Module):
        self.experts, self.num_experts = experts, experts.num_experts
        down = experts.down_proj.shape[1:]
        self.width, self.hidden = down if experts.is_transposed else reversed(down)
        self.shared = next(
            (child for name, child in block.named_children() if "shared" in name and is_ffn(child)), None
        )
        self.router = self._router(block)

    def _router(self, block: nn.Module) -> nn.Module:
        """The module of the block whose weight is (N, d)."""
        for module in block.modules():
            weight = getattr(module, "weight", None)
            if isinstance(weight, torch.Tensor) and weight.shape == (self.num_experts, self.hidden):
                return module
        raise AtlasError(
            f"{type(block).__name__}: no router with a weight of shape ({self.num_experts}, {self.hidden}) was found; "
            'see "add an architecture" in CONTRIBUTING.md.'
        )

    def _linear(self, name: str, inputs: torch.Tensor) -> torch.Tensor:
        """Each expert's linear map: inputs (T, i) for all experts or (N, T, i) -> (N, T, o)."""
        weight = getattr(self.experts, name)
        weight = weight if self.experts.is_transposed else weight.transpose(1, 2)
        result = torch.matmul(inputs, weight)
        return result + getattr(self.experts, f"{name}_bias")[:, None] if self.experts.has_bias else result

    def evaluate(self, inputs: torch.Tensor) -> torch.Tensor:
        """Outputs (N, T, d) of all experts on inputs (T, d)."""
        experts = self.experts
        if experts.has_gate:
            hidden = experts._apply_gate(self._linear("gate_up_proj", inputs))
        else:
            hidden = experts.act_fn(self._linear("up_proj", inputs))
        outputs = self._linear("down_proj", hidden)
        return experts.post_expert_norm(outputs) if experts.has_post_expert_norm else outputs

    @contextlib.contextmanager
    def observed(self, observer: Observer) -> Iterator[None]:
        numbers = self.num_experts * (3 * self.width + 6 * self.hidden)

        def experts_function(inputs, ids, weights):
            return self._mixture(observer, inputs, ids, weights, lambda tokens: self.evaluate(inputs[tokens]), numbers)

        with internals.observing(self.experts, experts_function):
            yield

    def bank(self) -> ExpertBank:
        experts = self.experts
        first = experts.gate_up_proj if experts.has_gate else experts.up_proj
        down = experts.down_proj
        if experts.is_transposed:
            first, down = first.transpose(1, 2), down.transpose(1, 2)
        if not experts.has_gate:
            act, up = None, first
        elif experts.is_concatenated:
            act, up = first.chunk(2, dim=1)
        else:
            act, up = first[:, ::2], first[:, 1::2]
        shared = None if self.shared is None else ffn_view(self.shared)
        return ExpertBank(up, act, down, self.router.weight, shared)


def find_sites(layer: nn.Module) -> list[ExpertSite]:
    """The expert sites of a decoder layer; none for a dense layer.

    Raises AtlasError for a layer whose experts are in a layout that is not known.
    """
    from moe_atlas.architectures import jetmoe  # it builds on ExpertSite

    sites = jetmoe.find_sites(layer)
    for path, module in layer.named_modules():
        if internals.uses_experts_interface(module):
            sites.append(InterfaceSite(module, layer.get_submodule(path.rpartition(".")[0])))
    if not sites:
        for path, module in layer.named_modules():
            if path.rpartition(".")[2] == "experts":
                raise AtlasError(
                    f"{type(module).__name__}: this layout of experts is not known; "
                    'see "add an architecture" in CONTRIBUTING.md.'
                )
    return sites
