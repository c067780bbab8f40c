"""Everything of transformers that is not its public interface, in one place.

Pinned to transformers 5.23 (requirements.txt). tests/test_stream.py compares streamed logits with
the fully loaded model's for every family, so a release that moves one of these fails loudly there.
"""

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
    convert_and_load_state_dict_in_model,
    dot_natural_key,
    rename_source_key,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging

PROBE = "moe_atlas_probe"


def _dispatch(experts: nn.Module, hidden_states, top_k_index, top_k_weights) -> torch.Tensor:
    """The registered experts function: hands the call to whoever observes this experts module."""
    return experts.atlas_observer(hidden_states, top_k_index, top_k_weights)


ALL_EXPERTS_FUNCTIONS.register(PROBE, _dispatch)


@contextlib.contextmanager
def observing(experts: nn.Module, function: Callable) -> Iterator[None]:
    """Send the computation of one experts module to `function(hidden_states (T, d), ids (T, k), weights (T, k))`.

    `function` returns the mixture (T, d). It ends with the block.
    """
    implementation = experts.config._experts_implementation
    experts.atlas_observer = function
    experts.config._experts_implementation = PROBE
    try:
        yield
    finally:
        experts.config._experts_implementation = implementation
        del experts.atlas_observer


def uses_experts_interface(module: nn.Module) -> bool:
    """Whether transformers sends this module's forward through ALL_EXPERTS_FUNCTIONS."""
    return hasattr(type(module), "_apply_gate") and hasattr(module, "is_transposed")


def has_plain_gate(experts: nn.Module) -> bool:
    """Whether a gated experts module computes act_fn(gate) * up on the two halves of its first map, as most do."""
    return type(experts)._apply_gate is _default_apply_gate


def make_buffers(model: PreTrainedModel) -> None:
    """Give a meta-device model its non-persistent buffers (rotary tables), which no checkpoint holds."""
    for module in model.modules():
        missing = [name for name in module._non_persistent_buffers_set if module._buffers[name] is not None]
        missing = [name for name in missing if module._buffers[name].is_meta]
        for name in missing:
            # Plain buffers: a NaN shows if _init_weights did not fill one.
            real = torch.full_like(module._buffers[name], torch.nan, device="cpu")
            module.register_buffer(name, real, persistent=False)
        if missing:
            model._init_weights(module)


def load_tensors(
    model: PreTrainedModel, mapping: list, tensors: dict[str, torch.Tensor], device: torch.device
) -> set[str]:
    """Put checkpoint tensors into a model through transformers' own renaming and merging of weights.

    Returns the names of those that have no place in the model.
    """
    logging.disable_progress_bar()
    # The plan keeps in float32 what the family must have in it, such as a router's correction bias.
    plan = model._get_dtype_plan(model.dtype)
    config = LoadStateDictConfig(weight_mapping=mapping, device_map={"": device}, dtype=model.dtype, dtype_plan=plan)
    info, _ = convert_and_load_state_dict_in_model(model, tensors, config, None)
    for problems in (info.mismatched_keys, info.conversion_errors, info.error_msgs):
        if problems:
            raise ValueError(str(problems))
    return set(info.unexpected_keys)


def weight_mapping(model: PreTrainedModel) -> list:
    """How checkpoint tensor names become the model's parameters."""
    return get_model_conversion_mapping(model)


def targets(model: PreTrainedModel, mapping: list, names: Iterable[str]) -> dict[str, tuple[str, str | None]]:
    """Checkpoint tensor name -> name of the model's parameter that it becomes a part of, and the pattern of the
    conversion that makes it one, None where it is only renamed."""
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    known = model.state_dict()
    found = {}
    for name in names:
        found[name] = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        # A name that is the model's own already may still fit a pattern that is meant for another tensor.
        if found[name][0] not in known and name in known:
            found[name] = name, None
    return found


@dataclass(frozen=True)
class Fused:
    """A parameter (N, ...) that many of a checkpoint's tensors become a part of, and where each of them goes."""

    shape: torch.Size
    dtype: torch.dtype
    parts: dict[str, tuple[int, int, int]]  # name in the checkpoint -> expert, first row, one past the last row


def fused_targets(
    model: PreTrainedModel, mapping: list, found: Mapping[str, tuple[str, str | None]]
) -> dict[str, Fused]:
    """Parameters that are a plain stack of experts' tensors, so that these can be read where they belong.

    found: what `targets` gives.
    Without it a layer is in memory twice while transformers stacks it. Parameters that are made in any other way, or
    that a family keeps in another precision, are left to transformers.
    """
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    known, plan = model.state_dict(), list(model._get_dtype_plan(model.dtype) or {})
    kept_apart = build_glob_alternation(plan)[0].search if plan else lambda name: None
    sources: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in sorted(found, key=dot_natural_key):
        target, pattern = found[name]
        if pattern is not None and target in known and _stacks(by_pattern[pattern]):
            sources[target][pattern].append(name)
    fused = {}
    for target, by_source in sources.items():
        shape, patterns = known[target].shape, by_pattern[next(iter(by_source))].source_patterns
        whole = [len(by_source[pattern]) for pattern in patterns] == [shape[0]] * len(patterns)
        if whole and shape[1] % len(patterns) == 0 and not kept_apart(target):
            rows = shape[1] // len(patterns)
            parts = {
                name: (expert, place * rows, (place + 1) * rows)
                for place, pattern in enumerate(patterns)
                for expert, name in enumerate(by_source[pattern])
            }
            fused[target] = Fused(shape, known[target].dtype, parts)
    return fused


def _stacks(converter: WeightConverter) -> bool:
    """Whether a conversion stacks experts, and puts the stacks of several matrices below each other."""
    steps = [(type(step), step.dim) for step in converter.operations if isinstance(step, MergeModulelist | Concatenate)]
    plain = len(steps) == len(converter.operations) and len(converter.target_patterns) == 1
    first, second = (MergeModulelist, 0), (Concatenate, 1)
    return plain and (steps == [first, second] or (steps == [first] and len(converter.source_patterns) == 1))
