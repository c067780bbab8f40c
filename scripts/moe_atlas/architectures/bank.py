"""ExpertBank: one view of a layer's experts, whatever the checkpoint calls them."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class FFN:
    """One gated or plain feed-forward network, in the checkpoint's dtype.

    Shapes: up (m, d), act (m, d) or None when the FFN has no gate branch, down (d, m).
    "act" is the branch under the activation function (gate_proj, w1): the paper's name for it,
    which keeps it apart from the router (A Closer Look, 2.1).
    """

    up: torch.Tensor
    act: torch.Tensor | None
    down: torch.Tensor


@dataclass(frozen=True)
class ExpertBank:
    """The N routed experts of one layer and what belongs to them, in the checkpoint's dtype.

    Shapes: up (N, m, d), act (N, m, d) or None, down (N, d, m), router (N, d) or None.
    `shared` is the shared expert as one FFN of its own width, or None.
    """

    up: torch.Tensor
    act: torch.Tensor | None
    down: torch.Tensor
    router: torch.Tensor | None = None
    shared: FFN | None = None

    def __len__(self) -> int:
        return self.up.shape[0]

    @property
    def matrices(self) -> dict[str, torch.Tensor]:
        """The matrices there are, by the names used in every table, in the order up, act, down."""
        named = {"up": self.up, "act": self.act, "down": self.down}
        return {name: tensor for name, tensor in named.items() if tensor is not None}
