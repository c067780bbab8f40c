"""FFN experts that transformers sends through its experts interface: one site class for all of them."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from moe_atlas.architectures import internals
from moe_atlas.architectures.bank import ExpertBank
from moe_atlas.architectures.ffn import ffn_view, input_width, is_ffn
from moe_atlas.architectures.sites import ALL, Answer, ExpertSite, Observer, multiply
from moe_atlas.errors import AtlasError

# What the families call the router, as a child of the module that holds the experts.
_ROUTERS = ("gate", "router")


class InterfaceSite(ExpertSite):
    """FFN experts of any family whose experts module declares its layout; no code a family.

    experts: the experts module. around: the modules that hold it, nearest first, up to the decoder layer.
    """

    def __init__(self, experts: nn.Module, around: list[nn.Module]):
        self.experts, self.num_experts = experts, experts.num_experts
        down = experts.down_proj.shape[1:]
        self.width, self.hidden = down if experts.is_transposed else reversed(down)
        self.block = around[0]
        self.router = _find_router(self.block, self.num_experts)
        self.shared = _find_shared(around, self.hidden)
        self._has_plain_gate = not experts.has_gate or internals.has_plain_gate(experts)

    def _linear(self, name: str, inputs: torch.Tensor, experts: slice) -> torch.Tensor:
        """Linear map of g experts: inputs (T, i) for all of them or (g, T, i) -> (g, T, o)."""
        weight = getattr(self.experts, name)[experts]
        weight = weight if self.experts.is_transposed else weight.transpose(1, 2)
        result = multiply(inputs, weight)
        return result + getattr(self.experts, f"{name}_bias")[experts, None] if self.experts.has_bias else result

    def answer(self, inputs: torch.Tensor, experts: slice = ALL) -> Answer:
        module = self.experts
        if not module.has_gate:
            hidden = activation = module.act_fn(self._linear("up_proj", inputs, experts))
        else:
            hidden, activation = self._gated(self._linear("gate_up_proj", inputs, experts))
        outputs = self._linear("down_proj", hidden, experts)
        return (module.post_expert_norm(outputs) if module.has_post_expert_norm else outputs), activation

    def _gated(self, both: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The gate branch times up, and the gate branch alone, of both (g, T, 2m): each (g, T, m)."""
        experts = self.experts
        if self._has_plain_gate:
            gate, up = both.chunk(2, dim=-1)
            activation = experts.act_fn(gate)
            return activation * up, activation
        # A family's own function of gate and up is linear in up, or in up + 1 as in gpt-oss, up to a bound on up.
        hidden, both = experts._apply_gate(both), both.clone()
        up = both.unflatten(-1, (2, -1))[..., 1, :] if experts.is_concatenated else both[..., 1::2]
        up.fill_(1.0)
        activation = experts._apply_gate(both)
        up.fill_(0.0)
        return hidden, activation - experts._apply_gate(both)

    @contextlib.contextmanager
    def _attached(self, observer: Observer) -> Iterator[None]:
        # Both halves of the first map, the activation and its product with up; a gate of a family's own takes twice it.
        numbers = self.hidden + (4 if self._has_plain_gate else 8) * self.width

        def experts_function(inputs, ids, weights):
            return self._mixture(observer, inputs, ids, weights, numbers)

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
        return ExpertBank(up, act, down, self.router_weight, shared)


def _find_router(block: nn.Module, experts: int) -> nn.Module:
    """The module with the weight that has a row for each expert, within the block's router.

    The router of some families has rows of its own besides, after the experts': a slot that skips the experts,
    or the shared experts. Then it is the module with the fewest rows, which is the router's last linear map.
    """
    routers = [child for name, child in block.named_children() if name in _ROUTERS]
    modules = [module for router in routers for module in router.modules()]
    rows = {module: module.weight.shape[0] for module in modules if _is_matrix(getattr(module, "weight", None))}
    enough = [module for module in rows if rows[module] >= experts]
    if not enough:
        raise AtlasError(
            f"{type(block).__name__}: no router with a weight of {experts} rows was found; "
            'see "add an architecture" in CONTRIBUTING.md.'
        )
    return min(enough, key=rows.get)


def _is_matrix(weight: torch.Tensor | None) -> bool:
    return isinstance(weight, torch.Tensor) and weight.dim() == 2


def _find_shared(around: list[nn.Module], hidden: int) -> nn.Module | None:
    """The shared expert: one FFN beside the experts or further out in the layer, on inputs of their width.

    What a family does with its output (Qwen2-MoE's shared_expert_gate, Cohere2-MoE's average) is outside this module.
    """
    for module in around:
        for name, child in module.named_children():
            if "shared" in name and is_ffn(child) and input_width(child) == hidden:
                return child
    return None


def find_sites(layer: nn.Module) -> list[ExpertSite]:
    """The sites of a decoder layer whose experts pass the experts interface."""
    sites: list[ExpertSite] = []
    for path, module in layer.named_modules():
        if internals.uses_experts_interface(module):
            steps = path.split(".")[:-1]
            around = [layer.get_submodule(".".join(steps[:depth])) for depth in range(len(steps), -1, -1)]
            sites.append(InterfaceSite(module, around))
    return sites
