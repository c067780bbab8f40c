"""Reading checkpoints: files and lazy tensors, never code."""

from moe_atlas.checkpoints.checkpoint import Checkpoint

__all__ = ["Checkpoint"]
