"""A model of attention experts at work on a text: read one layer at a time, or, a MoA model, loaded whole."""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch.nn import functional

from moe_atlas.architectures.attention_experts import (
    Call,
    RoutedExperts,
    is_streamed,
    load_whole,
    objective_of,
    routed_experts,
)
from moe_atlas.architectures.config import read_config
from moe_atlas.checkpoints import Checkpoint
from moe_atlas.errors import AtlasError
from moe_atlas.heads.reading import ReadBatch
from moe_atlas.stream import LayerStream, run_dtype


class Observer(Protocol):
    """Who takes what one set of experts does."""

    def see(self, batch: ReadBatch, call: Call) -> None:
        """Take one call, which was on this batch."""


Make = Callable[[RoutedExperts], Observer]
OnLayer = Callable[[], None]


class Host(Protocol):
    """A model with attention experts. `passes` is how often `on_layer` is called by `observe` and by `losses`."""

    objective: str
    longest: int | None
    layers: int

    def each(self) -> Iterator[RoutedExperts]:
        """The experts of each layer, with their weights, one layer's after the other's."""

    def observe(self, batches: Sequence[ReadBatch], make: Make, on_layer: OnLayer) -> Iterator[Observer]:
        """One pass: the observer that `make` gives for each set of experts, once it has seen all batches."""

    def losses(self, batches: Sequence[ReadBatch], on_layer: OnLayer) -> tuple[list[tuple], torch.Tensor]:
        """What leaving out each expert does: ((site, kind, layer), expert) of each arm, and losses (1 + A, P) float64,
        those of the whole model first, in nats of the P tokens that the batches predict, in their order."""


def _losses(logits: torch.Tensor, batch: ReadBatch) -> torch.Tensor:
    """Losses (p,) of the predicted tokens of a batch, from logits (b, t, vocabulary)."""
    chosen = logits.flatten(0, 1)[batch.places.to(logits.device)].float()
    return functional.cross_entropy(chosen, batch.labels.to(logits.device), reduction="none").cpu().double()


def _key(experts: RoutedExperts) -> tuple[str, str, int]:
    return experts.site, experts.kind, experts.layer


class Whole:
    """A model that is loaded whole: as much memory as its weights, and twice that while it is loaded."""

    def __init__(self, directory: str | os.PathLike, dtype: str = "auto", device: str | torch.device = "cpu"):
        config = read_config(directory)
        self.model = load_whole(directory, config, run_dtype(dtype, config, Checkpoint(directory))).to(device)
        self.device, self.objective, self.longest = device, objective_of(config), config.max_position_embeddings
        self.found = routed_experts(self.model)
        self.layers = 1
        if not self.found:
            raise AtlasError(f"{directory}: the model has no attention experts; name one that has.")

    def each(self) -> Iterator[RoutedExperts]:
        return iter(self.found)

    @torch.no_grad()
    def _run(self, batch: ReadBatch) -> torch.Tensor:
        given = {name: tensor.to(self.device) for name, tensor in batch.arguments.items()}
        return self.model(**given, use_cache=False).logits

    def observe(self, batches: Sequence[ReadBatch], make: Make, on_layer: OnLayer) -> Iterator[Observer]:
        observers = [(experts, make(experts)) for experts in self.found]
        for batch in batches:
            with contextlib.ExitStack() as stack:
                for experts, observer in observers:
                    stack.enter_context(experts.watched(lambda call, own=observer, of=batch: own.see(of, call)))
                self._run(batch)
        on_layer()
        yield from (observer for _, observer in observers)

    def losses(self, batches: Sequence[ReadBatch], on_layer: OnLayer) -> tuple[list[tuple], torch.Tensor]:
        arms = [(experts, expert) for experts in self.found for expert in range(experts.experts)]
        rows = [torch.cat([_losses(self._run(batch), batch) for batch in batches])]
        for experts, expert in arms:
            with experts.without(expert):
                rows.append(torch.cat([_losses(self._run(batch), batch) for batch in batches]))
        on_layer()
        return [(_key(experts), expert) for experts, expert in arms], torch.stack(rows)


class Streamed:
    """A causal model of which one layer is in memory at a time, and the next one that is read.

    Up to the layer of its expert an arm is the whole model, whose hidden states it takes over.
    """

    objective, longest = "causal", None

    def __init__(
        self, directory: str | os.PathLike, dtype: str = "auto", device: str | torch.device = "cpu",
        spill_directory: str | os.PathLike | None = None,
    ):  # fmt: skip
        self._open = lambda: LayerStream(Checkpoint(directory), dtype, device, spill_directory)
        stream = self._open()
        self.layers = len(stream)
        self._found = [routed_experts(layer, index) for index, layer in enumerate(stream.layers)]
        if not any(self._found):
            raise AtlasError(f"{directory}: the model has no attention experts; name one that has.")

    def each(self) -> Iterator[RoutedExperts]:
        stream = self._open()
        for index in range(len(stream)):
            with stream.layer(index) as layer:
                yield from routed_experts(layer, index)

    def observe(self, batches: Sequence[ReadBatch], make: Make, on_layer: OnLayer) -> Iterator[Observer]:
        stream = self._open()
        stream.begin([batch.arguments["input_ids"] for batch in batches])
        for index in range(len(stream)):
            with stream.layer(index) as layer:
                observers = [(experts, make(experts)) for experts in routed_experts(layer, index)]
                for number, batch in enumerate(batches):
                    with contextlib.ExitStack() as stack:
                        for experts, observer in observers:
                            stack.enter_context(experts.watched(lambda call, own=observer, of=batch: own.see(of, call)))
                        stream.step(number)
                yield from (observer for _, observer in observers)
            on_layer()

    def losses(self, batches: Sequence[ReadBatch], on_layer: OnLayer) -> tuple[list[tuple], torch.Tensor]:
        arms = [
            (_key(experts), expert) for found in self._found for experts in found for expert in range(experts.experts)
        ]
        count, stream = len(batches), self._open()
        stream.begin([batch.arguments["input_ids"] for _ in range(1 + len(arms)) for batch in batches])
        for index in range(len(stream)):
            with stream.layer(index) as layer:
                own = {_key(experts): experts for experts in routed_experts(layer, index)}
                for number in range(count):
                    before = stream.state(number)
                    stream.step(number)
                    for place, (key, expert) in enumerate(arms, start=1):
                        arm = place * count + number
                        if key[2] == index:
                            stream.set_state(arm, before)
                            with own[key].without(expert):
                                stream.step(arm)
                        elif key[2] < index:
                            stream.step(arm)
            on_layer()
        rows = [
            torch.cat([_losses(stream.logits(place * count + number), batch) for number, batch in enumerate(batches)])
            for place in range(1 + len(arms))
        ]
        return arms, torch.stack(rows)


def open_host(
    directory: str | os.PathLike, dtype: str = "auto", device: str | torch.device = "cpu",
    spill_directory: str | os.PathLike | None = None,
) -> Host:  # fmt: skip
    """The model in a folder of the Hub's format. AtlasError where it has no attention experts."""
    if is_streamed(read_config(directory)):
        return Streamed(directory, dtype, device, spill_directory)
    return Whole(directory, dtype, device)
