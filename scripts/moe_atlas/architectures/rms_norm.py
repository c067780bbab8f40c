"""RMSNorm as the Llama family computes it, without losing float64."""

import torch


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The type that norms and softmaxes are computed in: float32, or float64 for a float64 model."""
    return torch.promote_types(dtype, torch.float32)


def rms_norm(hidden_states: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) over the last axis, cast back to x's dtype, then times `weight`.

    Shapes: hidden_states (..., d), weight (d,). Source: Zhang and Sennrich 2019, equation 4; the place of the
    cast is the published model files'.
    """
    x = hidden_states.to(at_least_float32(hidden_states.dtype))
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return weight * x.to(hidden_states.dtype)
