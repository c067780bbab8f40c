"""The demo's families, by the names its recipes give them: rows of model_types.py."""

from pathlib import Path

import model_types
import torch
from model_types import token_ids

__all__ = ["FAMILIES", "config", "model", "save", "token_ids"]

FAMILIES = ("mistral", "mixtral", "olmoe", "deepseek", "grok", "jetmoe")
_TYPES = {"grok": "grok-1"}


def config(family: str, **changes: object):
    """A small configuration of one family; `changes` override its values."""
    return model_types.config(_TYPES.get(family, family), **changes)


def model(family: str, **arguments: object) -> torch.nn.Module:
    """A model of the family with weights far from their initial values."""
    return model_types.model(_TYPES.get(family, family), **arguments)


def save(family: str, directory: Path, **arguments: object) -> torch.nn.Module:
    """Write a random checkpoint of the family and return the model it came from."""
    return model_types.save(_TYPES.get(family, family), directory, **arguments)
