"""A forward pass with one decoder layer of the checkpoint in memory at a time.

The model is built on the meta device. Its forward runs twice per batch with the decoder layers taken
out: once up to the last layer, to record what each layer is called with (masks, positions, the embedded
tokens), once, if logits are wanted, to hand the last hidden states to the final norm and the head. In
between, layer after layer gets its tensors, sees all batches, and gives its memory back. What lies outside
the layers is read when it is first called. So one pass reads each byte of the checkpoint once, in about the
order of its files, and memory holds one layer, the next one where it is read ahead (layer_weights.py), and hidden
states up to a bound: the rest of them lies in a file (spill.py).
"""

import contextlib
import os
import re
import sys
from collections import defaultdict
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from moe_atlas import architectures
from moe_atlas.architectures import internals, quantised
from moe_atlas.architectures.config import read_config
from moe_atlas.architectures.layers import decoder, decoder_layers
from moe_atlas.budget import Budget, Held, Sizes
from moe_atlas.checkpoints import Checkpoint
from moe_atlas.errors import AtlasError, first_line
from moe_atlas.layer_weights import ALL, LayerReader, Reading, sizes
from moe_atlas.memory import tune_allocator
from moe_atlas.spill import MEMORY_BYTES, Interned, Spill

UNBOUNDED = Budget()
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def run_dtype(name: str, config: PreTrainedConfig, checkpoint: Checkpoint) -> torch.dtype:
    """The precision a model runs in: `auto` is the config's, else the checkpoint's."""
    if name != "auto":
        return DTYPES[name]
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    return checkpoint.dtype


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


class _LayersReached(Exception):
    """Ends a forward pass that is run only to see what the layers are called with."""


@dataclass
class _Batch:
    """One batch on its way through the layers."""

    input_ids: torch.Tensor  # (b, t)
    calls: list[tuple[tuple, dict]] = field(default_factory=list)  # what each layer is called with
    stand_in: torch.Tensor | None = None  # what a layer seems to return while the calls are recorded


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

    Padding needs no mask: it comes after a row's tokens, and attention is causal. Hidden states (b, t, d) that
    do not fit into MEMORY_BYTES lie in a nameless file in `spill_directory`.
    Without `whole` a layer's experts come late and go early: whoever uses them asks with `wait_for` before, and says
    with `done_with` that the next layer's may take their place.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: str = "auto",
        device: str | torch.device = "cpu",
        spill_directory: str | os.PathLike | None = None,
        budget: Budget = UNBOUNDED,
        whole: bool = True,
    ):
        tune_allocator()
        self.spill_directory = spill_directory
        self.checkpoint, self.device = checkpoint, torch.device(device)
        self.config = read_config(checkpoint.directory)
        self.model = skeleton(self.config, run_dtype(dtype, self.config, checkpoint))
        self.layers = decoder_layers(self.model)
        self._module_of = {module: path for path, module in self.model.named_modules()}
        self._mapping = internals.weight_mapping(self.model)
        targets = internals.targets(self.model, self._mapping, checkpoint.names)
        self._target_of = {name: target for name, (target, _) in targets.items()}
        self._names = self._names_by_layer()
        plain = quantised.method(self.config) is None
        self._fused = internals.fused_targets(self.model, self._mapping, targets) if plain else {}
        checkpoint.expect([self._names[index] for index in range(len(self.layers))])
        for module in self._outside_the_layers():
            module.register_forward_pre_hook(lambda module, _args: self._fill(module))
        self._current, self._last = -1, False
        self._whole = whole or self.device.type != "cpu"
        self.held = Held.LAYERS if budget.memory is None else budget.holds(self.sizes(), str(checkpoint.directory))
        by_two, on_gpu = self.held is Held.EXPERTS, self.device.type == "cuda"
        self._reader = LayerReader(checkpoint, self._names, self._fused, by_two, on_gpu)
        self._reading: Reading | None = None
        self._ahead: tuple[int, Reading] | None = None
        self._batches: list[_Batch] = []

    def __len__(self) -> int:
        return len(self.layers)

    def _load(self, tensors: dict[str, torch.Tensor], modules: list[nn.Module]) -> None:
        """Put tensors into the model; every parameter of `modules` must then be there."""
        try:
            quantised.dequantise(tensors, self.config, self.model.dtype)
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

    def _names_by_layer(self) -> dict[int, list[str]]:
        """Layer index -> names of its tensors in the checkpoint."""
        layer = re.compile(re.escape(self._module_of[self.layers]) + r"\.(\d+)\.")
        names: dict[int, list[str]] = defaultdict(list)
        for name, target in self._target_of.items():
            if match := layer.match(target):
                names[int(match[1])].append(name)
        return names

    def _outside_the_layers(self) -> list[nn.Module]:
        """The decoder's other children and the head, where they have weights."""
        modules = [module for module in decoder(self.model).children() if module is not self.layers]
        return [module for module in (*modules, self.model.get_output_embeddings()) if list(module.parameters())]

    def _fill(self, module: nn.Module) -> None:
        """Give a module outside the layers its weights, which it then keeps."""
        if not any(parameter.is_meta for parameter in module.parameters()):
            return
        prefix = self._module_of[module] + "."
        names = [name for name, target in self._target_of.items() if target.startswith(prefix)]
        # A head that is stored is not the embeddings, whatever the config says of it.
        stored = f"{prefix}weight" in self._target_of.values()
        tied = getattr(self.model.config, "tie_word_embeddings", False)
        if module is self.model.get_output_embeddings() and tied and not stored:
            module.weight = self.model.get_input_embeddings().weight
        self._load(self.checkpoint.read_all(names), [module])

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

    def _fill_decoder(self) -> None:
        """Give the decoder the weights that it holds itself, outside its children."""
        module = decoder(self.model)
        wanted = {f"{self._module_of[module]}.{name}" for name, own in module._parameters.items() if own is not None}
        self._load(self.checkpoint.read_all([name for name, to in self._target_of.items() if to in wanted]), [])

    @torch.no_grad()
    def begin(self, batches: list[torch.Tensor], first: int = 0) -> None:
        """Embed the batches and record what each layer will be called with; `first` is the layer asked for first."""
        self._batches = [_Batch(ids.to(self.device)) for ids in batches]
        self._hidden = Spill(self.spill_directory, MEMORY_BYTES.get(self.device.type, MEMORY_BYTES["cuda"]))
        interned = Interned()
        # Some decoders look at the embeddings' weight before they call the module.
        self._fill(self.model.get_input_embeddings())
        self._fill_decoder()
        for number, batch in enumerate(self._batches):

            def record(index, hidden, *args, _batch=batch, _number=number, **kwargs):
                if index == 0:
                    self._hidden.put(_number, hidden)
                    # Layers are stood in for by NaN: what depends on them shows.
                    _batch.stand_in = torch.full_like(hidden, torch.nan)
                elif not _is_same(hidden, _batch.stand_in) or _holds_nan(args, kwargs):
                    raise self._entangled()
                _batch.calls.append(interned((args, kwargs)))
                if index == len(self) - 1:
                    raise _LayersReached
                return _batch.stand_in

            try:
                with self._without_layers(record), contextlib.suppress(_LayersReached):
                    decoder(self.model)(input_ids=batch.input_ids, use_cache=False)
            except (TypeError, ValueError):  # the decoder takes apart what a layer returns
                if not batch.calls:
                    raise
                raise self._entangled() from None
            batch.stand_in = None
        self._read_ahead(first)

    def _entangled(self) -> AtlasError:
        return AtlasError(
            f"{type(self.model).__name__}: its decoder layers hand on more than hidden states, so it cannot be read "
            'layer by layer; see "add an architecture" in CONTRIBUTING.md.'
        )

    def _read_ahead(self, index: int) -> None:
        if self._ahead is not None:
            self._reader.finish(self._ahead[1])
        ahead = index < len(self) and self.held is Held.LAYERS
        over = None if self._whole else self._reading
        self._ahead = (index, self._reader.start(index, over)) if ahead else None

    def sizes(self) -> Sizes:
        """What the layers and the rest take in memory."""
        names = [self._names[index] for index in range(len(self))]
        held = [sum(parameter.nbytes for parameter in layer.parameters()) for layer in self.layers]
        return sizes(self.checkpoint, names, held, self._fused, self._whole)

    @contextlib.contextmanager
    def layer(self, index: int, following: int | None = None) -> Iterator[nn.Module]:
        """The decoder layer with its weights in memory, which are another layer's when the block has ended.

        While the block runs, the layer that will be asked for next is read: `following`, by default index + 1.
        """
        if self._ahead is not None and self._ahead[0] == index:
            reading, self._ahead = self._ahead[1], None
        else:
            reading = self._reader.start(index)
        layer, self._current, self._reading = self.layers[index], index, reading
        try:
            self._read_ahead(index + 1 if following is None else following)
            if self._whole:
                reading.wait()
            self._load(reading.tensors(), [layer])
            yield layer
        finally:
            _free(layer)
            self._reading = None
            self._reader.finish(reading)

    def wait_for(self, experts: slice = ALL) -> None:
        """Return when these experts of the layer in memory are there; `at_once` of them at most."""
        self._reading.wait(experts)

    def done_with(self, experts: slice) -> None:
        """This batch needs these experts no more; in the last batch that is the end of them."""
        if self._last and not self._whole:
            self._reading.done(experts)

    @property
    def at_once(self) -> int:
        """How many experts of a layer are there together."""
        return 1 if self.held is Held.EXPERTS else sys.maxsize

    @torch.no_grad()
    def step(self, batch: int) -> torch.Tensor:
        """Send one batch through the layer in memory; hidden states (b, t, d) after it."""
        args, kwargs = self._batches[batch].calls[self._current]
        self._last = batch == len(self._batches) - 1
        hidden = self.layers[self._current](self._hidden.get(batch), *args, **kwargs)
        if not isinstance(hidden, torch.Tensor):
            raise self._entangled()
        self._hidden.put(batch, hidden)
        return hidden

    def state(self, batch: int) -> dict[str, torch.Tensor]:
        """What the layers to come need of the layers before: hidden states of a batch, and what layers have shared."""
        state = {"hidden": self._hidden.get(batch)}
        for number, shared in enumerate(_shared(self._batches[batch].calls)):
            for key, tensors in shared.items():
                state |= {f"{number}.{key}.{place}": tensor for place, tensor in enumerate(tensors)}
        return state

    def set_state(self, batch: int, state: dict[str, torch.Tensor]) -> None:
        """Put what `state` gave, of the same batch of another stream, into the place of what `begin` has made."""
        state = {name: tensor.to(self.device) for name, tensor in state.items()}
        self._hidden.put(batch, state["hidden"])
        for number, shared in enumerate(_shared(self._batches[batch].calls)):
            for key in {name.split(".")[1] for name in state if name.startswith(f"{number}.")}:
                places = range(sum(name.startswith(f"{number}.{key}.") for name in state))
                shared[key] = tuple(state[f"{number}.{key}.{place}"] for place in places)

    @torch.no_grad()
    def logits(self, batch: int) -> torch.Tensor:
        """Logits (b, t, vocabulary) of one batch after all layers."""
        hidden = self._hidden.get(batch)
        stand_in = torch.full_like(hidden, torch.nan)

        def last(index, *_args, **_kwargs):
            return hidden if index == len(self) - 1 else stand_in

        with self._without_layers(last):
            logits = self.model(input_ids=self._batches[batch].input_ids, use_cache=False).logits
        if _holds_nan(logits):
            raise self._entangled()
        return logits


def _shared(calls: list[tuple[tuple, dict]]) -> list[MutableMapping]:
    """Mappings that the layers of one batch fill for each other, such as keys and values that later ones reuse."""
    values = [value for args, kwargs in calls for value in (*args, *kwargs.values())]
    # A plain dict is copied for each call, so nothing can be handed on in it.
    found = (value for value in values if isinstance(value, MutableMapping) and type(value) is not dict)
    return list({id(value): value for value in found}.values())


def _is_same(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two tensors are one, or a view of all of it."""
    places = [(tensor.data_ptr(), tensor.shape, tensor.stride()) for tensor in (first, second)]
    return places[0] == places[1]


def _holds_nan(*values) -> bool:
    """Whether a tensor among nested arguments holds a NaN."""
    for value in values:
        if isinstance(value, torch.Tensor):
            if value.is_floating_point() and bool(value.isnan().any()):
                return True
        elif isinstance(value, dict):
            if _holds_nan(*value.values()):
                return True
        elif isinstance(value, tuple | list) and _holds_nan(*value):
            return True
    return False


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
