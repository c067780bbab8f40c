"""A forward pass with one decoder layer of the checkpoint in memory at a time.

The model is built on the meta device. Its forward runs twice per batch with the decoder layers taken
out: once to record what each layer is called with (masks, positions, the embedded tokens), once, if
logits are wanted, to hand the last hidden states to the final norm and the head. In between, layer
after layer gets its tensors, sees all batches, and gives its memory back, so one pass reads each byte
of the checkpoint once and memory holds one layer, the one being read ahead, and the hidden states.
"""

import contextlib
import re
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from moe_atlas import architectures
from moe_atlas.architectures import internals
from moe_atlas.architectures.config import read_config
from moe_atlas.checkpoints import Checkpoint
from moe_atlas.errors import AtlasError, first_line
from moe_atlas.memory import return_large_blocks

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def run_dtype(name: str, config: PreTrainedConfig, checkpoint: Checkpoint) -> torch.dtype:
    """The precision a model runs in: `auto` is the config's, else that of the checkpoint's largest tensor."""
    if name != "auto":
        return DTYPES[name]
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    return max(checkpoint.tensors.values(), key=lambda info: info.stop - info.start).dtype


def skeleton(config: PreTrainedConfig, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The causal language model of `config` on the meta device, with real rotary tables, in eval mode."""
    architectures.register()
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except (ValueError, TypeError, AttributeError) as error:  # no causal model of this type, or values that do not fit
        raise AtlasError(
            f"no causal language model can be built from the config of model type {config.model_type!r} "
            f'({first_line(error)}); see "add an architecture" in CONTRIBUTING.md.'
        ) from None
    internals.make_buffers(model)
    return model.eval().requires_grad_(False)


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The list of decoder layers of a causal language model."""
    layers = getattr(model.get_decoder(), "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise AtlasError(
            f"{type(model).__name__}: its decoder has no list called layers, so it cannot be read layer by layer; "
            'see "add an architecture" in CONTRIBUTING.md.'
        )
    return layers


@dataclass
class _Batch:
    """One batch on its way through the layers."""

    input_ids: torch.Tensor  # (b, t)
    hidden: torch.Tensor | None = None  # (b, t, d), input of the next layer
    calls: list[tuple[tuple, dict]] = field(default_factory=list)  # what each layer is called with


class LayerStream:
    """Runs batches of token ids through a checkpoint, one layer in memory at a time.

    Use::

        stream = LayerStream(checkpoint)
        stream.begin([ids, ...])          # each (b, t) int64, right-padded if rows differ in length
        for index in range(len(stream)):
            with stream.layer(index) as layer:
                for batch in range(n_batches):
                    stream.step(batch)    # hidden states (b, t, d) after the layer
        logits = stream.logits(0)         # (b, t, vocabulary)

    Padding needs no mask: it comes after a row's tokens, and attention is causal.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: str = "auto", device: str | torch.device = "cpu"):
        return_large_blocks()
        self.checkpoint, self.device = checkpoint, torch.device(device)
        self.config = read_config(checkpoint.directory)
        self.model = skeleton(self.config, run_dtype(dtype, self.config, checkpoint))
        self.layers = decoder_layers(self.model)
        self._mapping = internals.weight_mapping(self.model)
        self._names: dict[int | None, list[str]] = defaultdict(list)
        for name in checkpoint.tensors:
            match = _LAYER.search(name)
            self._names[int(match[1]) if match else None].append(name)
        self._current = -1
        self._ahead: tuple[int, Future] | None = None
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead")
        self._batches: list[_Batch] = []
        self._module_of = {module: path for path, module in self.model.named_modules()}

    def __len__(self) -> int:
        return len(self.layers)

    def _load(self, tensors: dict[str, torch.Tensor], modules: list[nn.Module]) -> None:
        """Put tensors into the model; every parameter of `modules` must then be there."""
        try:
            internals.load_tensors(self.model, self._mapping, tensors, self.device)
        except ValueError as error:
            raise AtlasError(
                f"{self.checkpoint.directory}: the weights do not fit config.json ({error}); fetch both again."
            ) from None
        for module in modules:
            module.requires_grad_(False)
            for name, tensor in (*module.named_parameters(), *module.named_buffers()):
                if tensor.is_meta:
                    path = ".".join(filter(None, (self._module_of[module], name)))
                    raise AtlasError(
                        f"{self.checkpoint.directory}: the weights hold nothing for {path}; fetch the checkpoint again."
                    )

    def _outer(self, head: bool) -> None:
        """Load what lies outside the decoder layers: the head, or everything else."""
        output = self.model.get_output_embeddings()
        prefix = self._module_of[output] + "."
        names = [name for name in self._names[None] if name.startswith(prefix) == head]
        tensors = self.checkpoint.read_all(names)
        if not head:
            self._load(tensors, [module for module in self.model.get_decoder().children() if module is not self.layers])
        elif self.config.tie_word_embeddings:
            output.weight = self.model.get_input_embeddings().weight
        else:
            self._load(tensors, [output])

    @contextlib.contextmanager
    def _without_layers(self, call) -> Iterator[None]:
        """Replace each layer's forward by `call(index, ...)` for the length of the block."""
        for index, layer in enumerate(self.layers):
            layer.forward = lambda *args, _index=index, **kwargs: call(_index, *args, **kwargs)
        try:
            yield
        finally:
            for layer in self.layers:
                del layer.forward

    @torch.no_grad()
    def begin(self, batches: list[torch.Tensor]) -> None:
        """Embed the batches and record what each layer will be called with."""
        self._outer(head=False)
        self._batches = [_Batch(ids.to(self.device)) for ids in batches]
        for batch in self._batches:

            def record(index, hidden, *args, _batch=batch, **kwargs):
                _batch.hidden = hidden
                _batch.calls.append((args, kwargs))
                return hidden

            with self._without_layers(record):
                self.model.get_decoder()(input_ids=batch.input_ids, use_cache=False)
        self._read_ahead(0)

    def _read_ahead(self, index: int) -> None:
        self._ahead = None
        if index < len(self):
            self._ahead = index, self._pool.submit(self.checkpoint.read_all, self._names[index])

    @contextlib.contextmanager
    def layer(self, index: int, following: int | None = None) -> Iterator[nn.Module]:
        """The decoder layer with its weights in memory; they are freed when the block ends.

        While the block runs, the layer that will be asked for next is read: `following`, by default index + 1.
        """
        if self._ahead is not None and self._ahead[0] == index:
            tensors = self._ahead[1].result()
        else:
            tensors = self.checkpoint.read_all(self._names[index])
        self._current = index
        self._read_ahead(index + 1 if following is None else following)
        layer = self.layers[index]
        try:
            self._load(tensors, [layer])
            del tensors
            yield layer
        finally:
            _free(layer)

    @torch.no_grad()
    def step(self, batch: int) -> torch.Tensor:
        """Send one batch through the layer in memory; hidden states (b, t, d) after it."""
        state = self._batches[batch]
        args, kwargs = state.calls[self._current]
        state.hidden = self.layers[self._current](state.hidden, *args, **kwargs)
        return state.hidden

    @torch.no_grad()
    def logits(self, batch: int) -> torch.Tensor:
        """Logits (b, t, vocabulary) of one batch after all layers."""
        if self.model.get_output_embeddings().weight.is_meta:
            self._outer(head=True)
        state = self._batches[batch]
        with self._without_layers(lambda index, *args, **kwargs: state.hidden):
            return self.model(input_ids=state.input_ids, use_cache=False).logits


def _free(layer: nn.Module) -> None:
    """Put a layer's parameters and persistent buffers back on the meta device."""
    for module in layer.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                meta = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
                module._parameters[name] = meta
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                module._buffers[name] = torch.empty_like(buffer, device="meta")
