"""Attention experts of any model that has them, and the FFN experts beside them, in one form.

An attention expert is a query and an output projection, of one head or a group of heads; keys and values are shared by
all experts of a layer (MoA, arXiv 2210.05144, section 3; JetMoE, 2404.07413, section 2.2). In JetMoE a token's heads
are slot-major: head h of token t belongs to the expert ids[t, h // H], where slot 0 has the highest logit.
"""

import contextlib
import inspect
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM, PreTrainedConfig
from transformers.models.jetmoe import modeling_jetmoe

from moe_atlas.architectures import jetmoe, moa, register
from moe_atlas.errors import AtlasError

Maps = tuple[torch.Tensor, torch.Tensor]  # (b, E, H, t, s) float32, and (b, t, s) bool: which keys a token may see


@dataclass(frozen=True)
class Call:
    """What a layer's router and experts did in one call, on b sequences of t tokens, padding among them.

    inputs (b, t, d) what router and queries read; logits (b, t, E) float32; ids (b, t, k), the highest logit first;
    weights (b, t, k) as the model applies them; maps() the attention of every expert on every token, chosen or not,
    None for FFN experts.
    """

    inputs: torch.Tensor
    logits: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    maps: Callable[[], Maps] | None = None


@dataclass(frozen=True)
class Circuits:
    """Weights of a layer's attention experts, H heads each, in the checkpoint's dtype; positions and norms left out.

    query (E, H, D, d), key (H, D, d), value (H, D, d), output (E, H, d, D): head h of expert i attends by
    x W_q,ih^T W_k,h y and writes W_o,ih W_v,h y.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    output: torch.Tensor


Watcher = Callable[[Call], None]


class RoutedExperts(ABC):
    """One router and its experts in a model whose weights are there when its methods are called.

    Attributes: layer, from 0 in its stack; site ("attention" or "ffn"); kind ("causal", "encoder", "decoder" or "cross"
    of attention experts, else "ffn"); experts E; top_k k; heads H of an expert, 0 of an FFN expert; router, the module
    that gives the logits (..., E); frozen, whether the router was never trained.
    """

    layer: int
    kind: str
    site: str
    experts: int
    top_k: int
    heads: int
    router: nn.Module
    frozen = False

    @property
    def router_weight(self) -> torch.Tensor:
        """(E, d)."""
        return self.router.weight

    @abstractmethod
    def watched(self, watcher: Watcher) -> contextlib.AbstractContextManager[None]:
        """Give `watcher` every call while the block runs; the model's output stays what it is."""

    @contextlib.contextmanager
    def without(self, expert: int) -> Iterator[None]:
        """While the block runs no token can use this expert: its logit is minus infinity before the model chooses.

        The others are weighed as the model weighs them. Where k = E the expert stays chosen, with weight 0.
        """

        def mask(_router, _arguments, logits: torch.Tensor) -> torch.Tensor:
            return logits.index_fill(-1, torch.tensor([expert], device=logits.device), -torch.inf)

        handle = self.router.register_forward_hook(mask)
        try:
            yield
        finally:
            handle.remove()

    def circuits(self) -> Circuits:
        """The weights of attention experts."""
        raise AtlasError(f"{self.site} experts have no query and key circuits.")


@contextlib.contextmanager
def after(module: nn.Module, hook: Callable) -> Iterator[None]:
    """Call `hook(arguments, keywords, output)` after each forward of a module while the block runs."""
    handle = module.register_forward_hook(lambda _module, *seen: hook(*seen), with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


class _JetMoeExperts(RoutedExperts):
    """Either kind of JetMoE's experts: routing as JetMoeTopKGating does it, on what the module is called with."""

    def __init__(self, found: jetmoe._JetMoeSite, layer: int):
        self._found, self.layer, self.site = found, layer, found.name
        self.experts, self.top_k, self.router = found.num_experts, found.top_k, found.router

    def _maps(self, inputs: torch.Tensor, keywords: dict) -> Callable[[], Maps] | None:
        return None

    @contextlib.contextmanager
    def watched(self, watcher: Watcher) -> Iterator[None]:
        routed: list[torch.Tensor] = []

        def seen(arguments: tuple, keywords: dict, _output) -> None:
            logits = routed.pop().float()
            inputs = arguments[0] if arguments else keywords["hidden_states"]
            values, ids = logits.topk(self.top_k, dim=-1)
            shape = inputs.shape[:2]
            found = (part.unflatten(0, shape) for part in (logits, ids, torch.softmax(values, -1)))
            watcher(Call(inputs, *found, self._maps(inputs, keywords)))

        with after(self.router, lambda *call: routed.append(call[-1])), after(self._found.module, seen):
            yield


class JetMoeFFNExperts(_JetMoeExperts):
    """JetMoeMoE."""

    kind, heads = "ffn", 0


class JetMoeAttentionExperts(_JetMoeExperts):
    """JetMoeAttention: experts of H = num_key_value_heads heads, keys and values of H heads shared."""

    kind = "causal"

    def __init__(self, found: jetmoe.JetMoeAttentionSite, layer: int):
        super().__init__(found, layer)
        self.heads, self.width = found.module.num_key_value_heads, found.module.head_dim

    def _maps(self, inputs: torch.Tensor, keywords: dict) -> Callable[[], Maps]:
        def maps() -> Maps:
            module, (b, t) = self._found.module, inputs.shape[:2]
            query = self._found.first_maps(inputs.flatten(0, 1)).reshape(b, t, -1, self.width).transpose(1, 2)
            key = module.kv_proj(inputs).chunk(2, dim=-1)[0].view(b, t, -1, self.width).transpose(1, 2)
            query, key = modeling_jetmoe.apply_rotary_pos_emb(query, key, *keywords["position_embeddings"])
            query = query.float().unflatten(1, (self.experts, self.heads))
            scores = query @ key.float()[:, None].transpose(-1, -2) * module.scaling
            visible = torch.ones(t, t, dtype=torch.bool, device=inputs.device).tril().expand(b, t, t)
            return scores.masked_fill(~visible[:, None, None], -torch.inf).softmax(-1), visible

        return maps

    def circuits(self) -> Circuits:
        key, value = self._found.module.kv_proj.weight.unflatten(0, (2, self.heads, self.width))
        query = self._found.first.weight.unflatten(1, (self.heads, self.width))
        output = self._found.second.weight.unflatten(2, (self.heads, self.width)).permute(0, 2, 1, 3)
        return Circuits(query, key, value, output)


class MoAExperts(RoutedExperts):
    """An attention block of a MoA model: one head an expert, keys and values of one head."""

    site, heads = "attention", 1

    def __init__(self, module: moa.MoAAttention):
        self._module, self.router, self.frozen = module, module.router, module.router.frozen
        self.layer, self.kind = module.layer, module.kind
        self.experts, self.top_k = module.num_experts, module.top_k

    @contextlib.contextmanager
    def watched(self, watcher: Watcher) -> Iterator[None]:
        signature = inspect.signature(self._module.forward)

        def seen(arguments: tuple, keywords: dict, output: moa.AttentionOutput) -> None:
            given = signature.bind(*arguments, **keywords).arguments
            _, _, logits, ids, weights = output.routing
            watcher(Call(given["hidden"], logits, ids, weights, lambda: self._maps(given)))

        with after(self._module, seen):
            yield

    def _maps(self, given: dict) -> Maps:
        module, hidden, rotation = self._module, given["hidden"], given.get("rotation")
        source, mask = given.get("source"), given.get("mask")
        bias = None if module.query_bias is None else module.query_bias.flatten()
        query = functional.linear(hidden, module.query.flatten(0, 1), bias)
        query = query.view(*hidden.shape[:2], self.experts, -1).transpose(1, 2)
        query = query if rotation is None else moa.rotate(query, rotation)
        key, value = module.keys_and_values(hidden if source is None else source, None, rotation)
        _, maps = moa.attend(query, key, value, mask, module.is_causal, 0.0, with_maps=True)
        b, t, s = len(hidden), hidden.shape[1], key.shape[2]
        if mask is not None:
            mask = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
            visible = mask[:, 0].expand(b, t, s)
        else:
            visible = torch.ones(t, s, dtype=torch.bool, device=hidden.device)
            visible = (visible.tril() if module.is_causal else visible).expand(b, t, s)
        return maps.float()[:, :, None], visible

    def circuits(self) -> Circuits:
        module = self._module
        return Circuits(
            module.query[:, None], module.key.weight[None], module.value.weight[None], module.output[:, None]
        )


def routed_experts(module: nn.Module, index: int = 0) -> list[RoutedExperts]:
    """Attention experts of a decoder layer of this index, or of a whole MoA model, then FFN experts beside them.

    None where there are no attention experts.
    """
    heads = [MoAExperts(block) for block in module.modules() if isinstance(block, moa.MoAAttention)]
    found = jetmoe.find_sites(module)
    heads += [JetMoeAttentionExperts(site, index) for site in found if isinstance(site, jetmoe.JetMoeAttentionSite)]
    return [*heads, *(JetMoeFFNExperts(site, index) for site in found if isinstance(site, jetmoe.JetMoeFFNSite))]


_LOADERS = {
    "causal": AutoModelForCausalLM,
    "masked": AutoModelForMaskedLM,
    "translation": AutoModelForSeq2SeqLM,
}


def objective_of(config: PreTrainedConfig) -> str:
    """What a model was trained for: causal, masked or translation."""
    return getattr(config, "objective", "causal")


def is_streamed(config: PreTrainedConfig) -> bool:
    """Whether a model is read one layer at a time: a MoA model is small, or has two stacks, and is loaded whole."""
    return config.model_type != "moa"


def load_whole(directory: str | os.PathLike, config: PreTrainedConfig, dtype: torch.dtype) -> nn.Module:
    """A model of attention experts with all its weights, in eval mode."""
    register()
    model = _LOADERS[objective_of(config)].from_pretrained(directory, dtype=dtype, local_files_only=True)
    return model.eval().requires_grad_(False)
