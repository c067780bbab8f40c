"""Load balancing: router logits through hooks, and the auxiliary loss of Switch Transformers."""

import torch
from torch import nn

# A router is the module of this name that returns logits over experts.
_ROUTER_NAMES = ("gate", "router")


def load_balancing_loss(logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """N sum_i f_i P_i of one router (Fedus et al. 2021, equations 4 to 6, with top-k choices).

    `logits` (tokens, N); f_i is the share of the tokens x top_k choices that went to expert i, P_i the mean
    router probability. Returns a scalar, 1 for uniform routing, which is its minimum where f follows P.
    """
    count = logits.shape[-1]
    probabilities = logits.float().softmax(dim=-1)
    chosen = logits.topk(top_k, dim=-1).indices.flatten()
    share = torch.bincount(chosen, minlength=count).to(probabilities.dtype) / chosen.numel()
    return count * (share * probabilities.mean(dim=0)).sum()


class RouterLogits:
    """Collects the logits of every router of a model during a forward pass.

    transformers' own `output_router_logits` is not used: for JetMoE it returns the wrong items. A router is
    found by its name, and its logits by their shape: the first (tokens, N) floating-point item it returns.
    """

    def __init__(self, model: nn.Module):
        self.heard: list[tuple[nn.Module, torch.Tensor]] = []
        self.routers = [
            module
            for name, module in model.named_modules()
            if name.rsplit(".", 1)[-1] in _ROUTER_NAMES and getattr(module, "top_k", None)
        ]
        self.hooks = [module.register_forward_hook(self._keep) for module in self.routers]

    def remove(self) -> None:
        """Take the hooks off the model."""
        for hook in self.hooks:
            hook.remove()

    def _keep(self, module: nn.Module, _inputs: tuple, output: tuple) -> None:
        tensors = (item for item in output if isinstance(item, torch.Tensor) and item.is_floating_point())
        logits = next(item for item in tensors if item.dim() == 2 and item.shape[1] == module.num_experts)
        self.heard.append((module, logits))

    def loss(self) -> torch.Tensor:
        """Mean balancing loss over the routers of the last forward pass, which it forgets; 0 without routers."""
        heard, self.heard = self.heard, []
        if not heard:
            return torch.zeros(())
        return torch.stack([load_balancing_loss(logits, module.top_k) for module, logits in heard]).mean()
