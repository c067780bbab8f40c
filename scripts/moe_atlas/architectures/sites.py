"""Where a decoder layer has experts, how all of them are evaluated, and how the mixture is made of that.

An expert site is one router with its N experts: the FFN experts of a layer, or its attention experts.
Its experts are all evaluated on every token, in token order, in chunks of tokens and groups of experts of
bounded size; the model goes on with the mixture of the k chosen ones, so its output stays what it would have been.
"""

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import nn
from torch.nn import functional

from moe_atlas.architectures import routers
from moe_atlas.architectures.bank import ExpertBank
from moe_atlas.errors import AtlasError

# Bytes of one chunk of tokens: the outputs of all experts, and what is computed of their pairs.
CHUNK_BYTES = 256 << 20
# Tokens of a chunk: more at a time are no faster, and make the peak of memory higher.
CHUNK_TOKENS = 1024
# Bytes that a group of experts holds while it is evaluated. An expert's weights pass through the caches once a chunk;
# what it computes should stay in them, and in blocks that the allocator hands out again (memory.py).
GROUP_BYTES = 64 << 20
ALL = slice(None)
Answer = tuple[torch.Tensor, torch.Tensor | None]  # of g experts: outputs (g, T, d), activation (g, T, m)


class Observer(Protocol):
    """Who looks at a site while the model runs. at_once: how many experts may be asked for at a time."""

    at_once: int

    def tokens(self) -> torch.Tensor:
        """Indices (n,) int64 of the call's tokens that are not padding, in token order."""

    def ready(self, experts: slice) -> None:
        """Return when the weights of these experts are there; asked before they are evaluated."""

    def done(self, experts: slice) -> None:
        """Take note that this call of the site will not ask for these experts again."""

    def activation(self, tokens: torch.Tensor, experts: slice, activation: torch.Tensor) -> None:
        """Take the activation (g, c, m) of g experts on c tokens: their act branch, before the product with up.

        Every expert that has one gives it for all tokens of a chunk before the chunk is recorded.
        """

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
        router, on what the router sees; ids (c, k) and weights (c, k) as the model applies them, an id
        of N is an empty slot; outputs (N, c, d) of every expert, before the weight.
        """


class ExpertSite(ABC):
    """One router and its experts. Subclasses say how the experts are evaluated and how they are attached to.

    Attributes: name ("ffn" or "attention"); num_experts; block, the module that holds router and experts; router,
    the module with the weight (R, r) that makes the logits, of which the first N of R rows are the experts'; shared,
    the module of the shared expert or None, which gives its output before any gate of its own. While the site is
    observed, own_logits (T, N) are the router's own, in the dtype it computes them in, or None if it gives none,
    and routed (T, r) is what the router saw.
    """

    name = "ffn"
    shared: nn.Module | None = None
    own_logits: torch.Tensor | None = None
    routed: torch.Tensor | None = None
    num_experts: int
    block: nn.Module
    router: nn.Module
    _call: tuple | None = None  # inputs (T, r) and output of the router's last call

    @property
    def router_weight(self) -> torch.Tensor:
        """The experts' rows (N, r) of the router; r is d unless the router has a width of its own."""
        return self.router.weight[: self.num_experts]

    def logits(self, inputs: torch.Tensor) -> torch.Tensor:
        """Router logits (T, N) in float32 of router inputs (T, r): W x + b, before any scoring rule."""
        bias = getattr(self.router, "bias", None)
        bias = None if bias is None else bias[: self.num_experts].float()
        return functional.linear(inputs.float(), self.router_weight.float(), bias)

    def choice(self) -> routers.Choice:
        """What the router uses besides its logits."""
        return routers.choice(self.block, self.router, self.num_experts)

    def bank(self) -> ExpertBank:
        """The weights of the site as an ExpertBank."""
        raise AtlasError(f"the weights of {self.name} experts have no view of up, act and down.")

    def answer(self, inputs: torch.Tensor, experts: slice = ALL) -> Answer:
        """What experts make of inputs (T, d): outputs before any weight, and the activation sigma(W_act x)."""
        raise AtlasError(f"{self.name} experts do not answer to single tokens.")

    def evaluate(self, inputs: torch.Tensor) -> torch.Tensor:
        """Outputs (N, T, d) of all experts on inputs (T, d)."""
        return self.answer(inputs)[0]

    def activation(self, inputs: torch.Tensor) -> torch.Tensor | None:
        """sigma(W_act x) of all experts, (N, T, m), before the product with up; sigma(W_up x) without a gate branch."""
        return self.answer(inputs)[1]

    @abstractmethod
    def _attached(self, observer: Observer) -> AbstractContextManager[None]:
        """Let the experts be computed by `_mixture` while the block runs."""

    @contextlib.contextmanager
    def observed(self, observer: Observer) -> Iterator[None]:
        """Let `observer` see every call of the site while the block runs."""

        # Norms and projections may lie between the experts' input and the router's, so the router is watched itself.
        def remember(_router, args, kwargs, output):
            called_with = args[0] if args else next(iter(kwargs.values()))
            self._call = called_with.reshape(-1, called_with.shape[-1]), output

        handle = self.router.register_forward_hook(remember, with_kwargs=True)
        try:
            with self._attached(observer):
                yield
        finally:
            handle.remove()
            self._call = self.own_logits = self.routed = None

    def _mixture(
        self,
        observer: Observer,
        inputs: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        numbers: int,
        answer: Callable[[torch.Tensor, slice], Answer] | None = None,
        given: torch.Tensor | None = None,
        combine: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Evaluate all experts in token chunks, show them to the observer, return the mixture (T, d).

        `answer(rows, experts)` gives what experts make of some rows of `given` (T, ...), by default of the inputs, and
        holds `numbers` for each expert and token meanwhile. Padding gets zeros: nothing attends to it.
        `combine(tokens)` gives the mixture (c, d) of the tokens at indices (c,) where it is not `mix` of the outputs.
        """
        answer, given = answer or self.answer, inputs if given is None else given
        # A router that is not called as a module of its own sees what the experts see.
        self.routed, output = (inputs, None) if self._call is None else self._call
        logits = self.logits(self.routed)
        self.own_logits = None if output is None else routers.logits_of(output, logits)
        self._call = None
        mixture = torch.zeros_like(inputs)
        size = inputs.element_size()
        # A token's outputs, and half a dozen float64 matrices of their pairs.
        token_bytes = self.num_experts * (inputs.shape[1] * size + 48 * self.num_experts)
        chunks = _chunks(observer.tokens(), CHUNK_BYTES // token_bytes)
        for tokens in chunks:
            outputs, rows = inputs.new_empty(self.num_experts, len(tokens), inputs.shape[1]), given[tokens]
            for experts, part in _groups(
                self.num_experts, len(tokens), GROUP_BYTES // (numbers * size), observer.at_once
            ):
                observer.ready(experts)
                outputs[experts, part], activation = answer(rows[part], experts)
                if activation is not None:
                    observer.activation(tokens[part], experts, activation)
                if tokens is chunks[-1] and part.stop == len(tokens):
                    observer.done(experts)
            mixed = mix(outputs, ids[tokens], weights[tokens]) if combine is None else combine(tokens)
            mixture[tokens] = mixed.to(inputs.dtype)
            seen = inputs[tokens], logits[tokens], ids[tokens], weights[tokens]
            observer.record(tokens, *seen, outputs)
        return mixture


def _chunks(tokens: torch.Tensor, most: int) -> tuple[torch.Tensor, ...]:
    """The tokens in as few chunks of about equal size as hold at most so many, and CHUNK_TOKENS, each."""
    count = math.ceil(len(tokens) / max(1, min(CHUNK_TOKENS, most)))
    return tokens.tensor_split(count) if count > 1 else (tokens,)


def _groups(experts: int, tokens: int, most: int, widest: int) -> Iterator[tuple[slice, slice]]:
    """Ranges of experts, and of the tokens of a chunk, that together are at most so many pairs of one and the other."""
    width, height = max(1, min(widest, most // max(1, tokens))), max(1, min(tokens, most))
    for first in range(0, experts, width):
        for start in range(0, tokens, height):
            yield slice(first, min(first + width, experts)), slice(start, min(start + height, tokens))


def mix(outputs: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted sum over the chosen experts: outputs (N, T, d), ids (T, k), weights (T, k) -> (T, d) float32 or better.

    An id equal to N is an empty slot.
    """
    count, tokens = outputs.shape[0], torch.arange(outputs.shape[1], device=outputs.device)
    dtype = torch.promote_types(outputs.dtype, torch.float32)
    used = (ids < count).to(dtype) * weights.to(dtype)
    chosen = outputs[ids.clamp(max=count - 1), tokens[:, None]].to(dtype)
    return (chosen * used[..., None]).sum(1)


def multiply(inputs: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Inputs (T, i) for all of g experts, or (g, T, i), times their weights (g, i, o): (g, T, o)."""
    if len(weights) > 1:
        return torch.matmul(inputs, weights)
    # Of a stack of one, matmul would make a copy before the product.
    return torch.mm(inputs.reshape(-1, inputs.shape[-1]), weights[0])[None]


def find_sites(layer: nn.Module) -> list[ExpertSite]:
    """The expert sites of a decoder layer; none for a dense layer.

    Raises AtlasError for a layer whose experts are in a layout that is not known.
    """
    from moe_atlas.architectures import dbrx, interface, jetmoe, llama4, moa_site  # they build on ExpertSite

    sites = [site for family in (jetmoe, interface, llama4, dbrx, moa_site) for site in family.find_sites(layer)]
    if not sites:
        _refuse_unknown_experts(layer)
    return sites


def _refuse_unknown_experts(layer: nn.Module) -> None:
    """AtlasError that describes the experts of a layer in which no site was found, if it has any."""
    for path, module in layer.named_modules():
        several = getattr(module, "num_experts", None)
        if path.rpartition(".")[2] == "experts" or (isinstance(several, int) and several > 1):
            shapes = [f"{name} {tuple(parameter.shape)}" for name, parameter in module.named_parameters()]
            raise AtlasError(
                f"{type(module).__name__} ({', '.join(shapes[:4]) or 'no weights'}): "
                'this layout of experts is not known; see "add an architecture" in CONTRIBUTING.md.'
            )
