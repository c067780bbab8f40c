"""Llama 4: experts outside the experts interface, and router scores that multiply their input.

transformers runs every expert on every token, on zeros where it was not chosen; here the chosen ones are run
on the scaled input and all of them on the unscaled one (modeling_llama4 of transformers 5.23, Llama4TextMoe).
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from transformers.models.llama4 import modeling_llama4

from moe_atlas.architectures.bank import ExpertBank
from moe_atlas.architectures.ffn import ffn_view
from moe_atlas.architectures.sites import ALL, Answer, ExpertSite, Observer, multiply


class Llama4Site(ExpertSite):
    """Llama4TextMoe: the mixture is the sum of E_e(s_e x) over the chosen experts e, s_e = sigmoid of its logit.

    The weight s_e is inside the expert, and E_e is not linear, so no output "before the weight" gives the mixture
    as a weighted sum. What is recorded as the output of expert e is E_e(x), on the input as it is: the same input
    for every expert, as in every other family, so that outputs can be compared with each other and with the shared
    expert's. The recorded weights are the s_e of the chosen. The mixture is computed apart from the outputs, from
    the scaled inputs, so what the model goes on with stays exact.
    """

    def __init__(self, module: nn.Module):
        self.module = self.block = module
        self.experts = module.experts
        self.router, self.shared = module.router, module.shared_expert
        self.num_experts, self.top_k = module.num_experts, module.top_k

    def route(self, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits (T, N), ids (T, k) and weights (T, k): the k largest logits, then sigmoid in float32."""
        _, logits = self.router(inputs)
        values, ids = logits.topk(self.top_k, dim=1)
        return logits, ids, torch.sigmoid(values.float()).to(inputs.dtype)

    def answer(self, inputs: torch.Tensor, experts: slice = ALL) -> Answer:
        """On the unscaled inputs."""
        gate, up = multiply(inputs, self.experts.gate_up_proj[experts]).chunk(2, dim=-1)
        activation = self.experts.act_fn(gate)
        return multiply(up * activation, self.experts.down_proj[experts]), activation

    def chosen(self, inputs: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Sum of the chosen experts (T, k) on inputs (T, d) times their weights (T, k): (T, d), at least float32."""
        mixture = torch.zeros_like(inputs, dtype=torch.promote_types(inputs.dtype, torch.float32))
        for expert in ids.unique().tolist():
            rows, slots = torch.where(ids == expert)
            scaled = inputs[rows] * weights[rows, slots, None]
            mixture[rows] += self.answer(scaled, slice(expert, expert + 1))[0][0]
        return mixture

    def forward(self, observer: Observer, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = hidden_states.reshape(-1, hidden_states.shape[-1])
        logits, ids, weights = self.route(inputs)
        width, hidden = self.experts.down_proj.shape[1:]
        mixture = self._mixture(
            observer,
            inputs,
            ids,
            weights,
            4 * width + hidden,
            combine=lambda tokens: self.chosen(inputs[tokens], ids[tokens], weights[tokens]),
        )
        return self.shared(inputs) + mixture, logits

    @contextlib.contextmanager
    def _attached(self, observer: Observer) -> Iterator[None]:
        self.module.forward = lambda hidden_states: self.forward(observer, hidden_states)
        try:
            yield
        finally:
            del self.module.forward

    def bank(self) -> ExpertBank:
        act, up = self.experts.gate_up_proj.transpose(1, 2).chunk(2, dim=1)
        down = self.experts.down_proj.transpose(1, 2)
        return ExpertBank(up, act, down, self.router_weight, ffn_view(self.shared))


def find_sites(layer: nn.Module) -> list[ExpertSite]:
    """The experts of a Llama4TextDecoderLayer; none for any other layer."""
    return [Llama4Site(module) for module in layer.modules() if isinstance(module, modeling_llama4.Llama4TextMoe)]
