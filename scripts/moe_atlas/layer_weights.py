"""The weights of one decoder layer on their way into memory: expert by expert, into pages that are used again.

A page that a program has not touched before costs the system more than filling it: a layer of 2.9 GB that lay in the
page cache was read in 1.5 s into fresh pages and in 0.2 s into used ones. So an expert is read into the memory of the
same expert of the layer before, as soon as that one is done with; or, where layers are wanted whole, of the layer
before that. The work on a layer begins when its other weights and the first expert are there. Where a layer does not
fit into memory, only the expert at work and the one after it are held.
"""

import math
import mmap
import threading
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from moe_atlas.architectures.internals import Fused
from moe_atlas.budget import Sizes
from moe_atlas.checkpoints import Checkpoint

ALL = slice(None)
Place = tuple[str, int, int, int]  # parameter, expert, first row, one past the last row


class Stack:
    """Memory for one parameter of stacked experts, `tensor` (N, ...), in pages of its own.

    locked: keep the pages in memory and tell CUDA of them, from where a copy to the GPU takes a fraction of the time.
    Where the system does not allow it, they stay as they are.
    """

    def __init__(self, shape: torch.Size, dtype: torch.dtype, locked: bool = False):
        size = math.prod(shape) * dtype.itemsize
        self._pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.tensor = torch.frombuffer(self._pages, dtype=dtype).view(shape)
        if locked:
            cuda, place = torch.cuda.cudart(), self.tensor.data_ptr()
            if cuda.cudaHostRegister(place, size, 0) == cuda.cudaError.success:
                weakref.finalize(self, cuda.cudaHostUnregister, place).atexit = False

    def drop(self, expert: int) -> None:
        """Give the pages of one expert back; it reads as zeros until it is filled again."""
        size = len(self._pages) // len(self.tensor)
        first, last = -(-expert * size // mmap.PAGESIZE), (expert + 1) * size // mmap.PAGESIZE
        if last > first:
            self._pages.madvise(mmap.MADV_DONTNEED, first * mmap.PAGESIZE, (last - first) * mmap.PAGESIZE)


class Reading:
    """A layer that is being read. stacks: where its stacked experts go; parts: the tensors of the file that do so."""

    def __init__(self, rest: Iterable[str], stacks: Mapping[str, Stack], parts: Mapping[str, Place]):
        self.stacks = dict(stacks)
        self.places = {name: stacks[target].tensor[expert, a:b] for name, (target, expert, a, b) in parts.items()}
        self.experts = max((len(stack.tensor) for stack in stacks.values()), default=0)
        self.expert_of = {name: part[1] for name, part in parts.items()}
        self._missing, self._to_come = Counter(self.expert_of.values()), set(rest)
        self._rest: dict[str, torch.Tensor] = {}
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self._done: set[int] = set()
        self.successor: Reading | None = None  # the one that has taken over the stacks

    def came(self, name: str, tensor: torch.Tensor) -> None:
        """Take note of one tensor that has been read."""
        with self._changed:
            if name in self.expert_of:
                self._missing[self.expert_of[name]] -= 1
            else:
                self._rest[name] = tensor
                self._to_come.discard(name)
            self._changed.notify_all()

    def done(self, experts: slice = ALL) -> None:
        """Nobody needs these experts any more: the next layer's may take their place."""
        with self._changed:
            self._done.update(range(self.experts)[experts])
            self._changed.notify_all()

    def wait_until_done(self, expert: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: expert in self._done)

    def failed(self, error: BaseException) -> None:
        with self._changed:
            self._error = error
            self._changed.notify_all()

    def _wait_for(self, ready) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._error is not None or ready())
            if self._error is not None:
                raise self._error

    def tensors(self) -> dict[str, torch.Tensor]:
        """The layer's tensors by name, once: stacks by the names of the model's parameters, maybe not filled yet."""
        self._wait_for(lambda: not self._to_come)
        rest, self._rest = self._rest, {}
        return rest | {target: stack.tensor for target, stack in self.stacks.items()}

    def wait(self, experts: slice = ALL) -> None:
        """Return when these experts are there; an error of the reader is raised here."""
        wanted = range(self.experts)[experts]
        self._wait_for(lambda: not any(self._missing[expert] for expert in wanted))


class _PlacesOnceDone(Mapping[str, torch.Tensor]):
    """Places of a reading that are another one's until it is done with them: who asks for one waits for that."""

    def __init__(self, reading: Reading, before: Reading):
        self._reading, self._before = reading, before

    def __getitem__(self, name: str) -> torch.Tensor:
        place = self._reading.places[name]
        self._before.wait_until_done(self._reading.expert_of[name])
        return place

    def __iter__(self) -> Iterator[str]:
        return iter(self._reading.places)

    def __len__(self) -> int:
        return len(self._reading.places)


class _OneByOne(Reading):
    """A layer of which one expert is held, and the next one read. One expert is asked for at a time."""

    def begin(self, checkpoint: Checkpoint, pool: ThreadPoolExecutor) -> None:
        self._checkpoint, self._pool = checkpoint, pool
        self._held: dict[int, Future] = {}

    def _drop(self, expert: int) -> None:
        self._held.pop(expert).exception()  # of one that was read ahead; who asks for it gets it
        for stack in self.stacks.values():
            stack.drop(expert)

    def end(self) -> None:
        """Give back what is held."""
        for expert in list(self._held):
            self._drop(expert)

    def _read(self, expert: int) -> None:
        if expert < self.experts and expert not in self._held:
            places = {name: place for name, place in self.places.items() if self.expert_of[name] == expert}
            self._held[expert] = self._pool.submit(self._checkpoint.read_all, list(places), places)

    def wait(self, experts: slice = ALL) -> None:
        if not self.experts:
            return
        (expert,) = range(self.experts)[experts]
        for other in [held for held in self._held if held not in (expert, expert + 1)]:
            self._drop(other)
        self._read(expert)
        self._held[expert].result()
        self._read(expert + 1)


class LayerReader:
    """Reads layers of a checkpoint in the background, one at a time.

    names: layer -> its tensors' names in the checkpoint; fused: parameters that are stacks of experts' tensors.
    one_by_one: hold two experts of a layer instead of all. for_gpu: what is read goes on to a GPU.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        names: Mapping[int, list[str]],
        fused: Mapping[str, Fused],
        one_by_one: bool = False,
        for_gpu: bool = False,
    ):
        self._checkpoint, self._names, self._fused, self._one_by_one = checkpoint, names, fused, one_by_one
        self._locked = for_gpu and not one_by_one
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead")
        self._free: list[Stack] = []
        self._futures: dict[Reading, Future] = {}

    def _stack(self, shape: torch.Size, dtype: torch.dtype) -> Stack:
        for stack in self._free:
            if stack.tensor.shape == shape and stack.tensor.dtype == dtype:
                self._free.remove(stack)
                return stack
        self._free.clear()  # of layers of another shape
        return Stack(shape, dtype, self._locked)

    def start(self, index: int, over: Reading | None = None) -> Reading:
        """Begin to read a layer, after what is being read already. `finish` must be called on what is returned.

        over: read experts into its place as it is done with them, where they are of the same form.
        """
        names = set(self._names[index])
        fused = {target: fused for target, fused in self._fused.items() if names.issuperset(fused.parts)}
        taken = list(over.stacks.values()) if over is not None and not self._one_by_one else []
        forms = [(own.shape, own.dtype) for own in fused.values()]
        if forms != [(stack.tensor.shape, stack.tensor.dtype) for stack in taken]:
            taken = []
        stacks = dict(zip(fused, taken or [self._stack(*form) for form in forms], strict=True))
        parts = {name: (target, *part) for target, own in fused.items() for name, part in own.parts.items()}
        rest = [name for name in self._names[index] if name not in parts]
        reading = (_OneByOne if self._one_by_one else Reading)(rest, stacks, parts)
        if isinstance(reading, _OneByOne):
            reading.begin(self._checkpoint, self._pool)
            order = rest
        else:
            order = [*rest, *sorted(parts, key=lambda name: parts[name][1])]
        places = reading.places
        if taken:
            over.successor, places = reading, _PlacesOnceDone(reading, over)
        self._futures[reading] = self._pool.submit(self._read, reading, order, places)
        return reading

    def _read(self, reading: Reading, names: list[str], places: Mapping[str, torch.Tensor]) -> None:
        try:
            self._checkpoint.read_all(names, places, reading.came)
        except BaseException as error:  # whoever waits gets it
            reading.failed(error)

    def finish(self, reading: Reading) -> None:
        """Nobody looks at the layer any more: its memory is read into again."""
        reading.done()
        self._futures.pop(reading).result()
        if isinstance(reading, _OneByOne):
            reading.end()
        if reading.successor is None:
            self._free += reading.stacks.values()


def sizes(
    checkpoint: Checkpoint,
    names: Sequence[Sequence[str]],
    held: Sequence[int],
    fused: Mapping[str, Fused],
    whole: bool,
) -> Sizes:
    """What a checkpoint's layers take in memory while they are read one after the other.

    names: of each layer's tensors in the checkpoint; held: bytes of its parameters; whole: all of its experts are there
    until its end, so that the next layer's cannot take their place.
    """
    tensors = checkpoint.tensors
    layer_of = {name: index for index, own in enumerate(names) for name in own}
    stacked = {name for own in fused.values() for name in own.parts}
    layers, outside, stacks, by_two = list(held), 0, [0] * len(held), [0] * len(held)
    for name, info in tensors.items():
        if name not in layer_of:
            outside += info.stop - info.start
        elif name not in stacked:  # what is not read where it belongs is there twice while transformers puts it there
            layers[layer_of[name]] += info.stop - info.start
    for own in () if whole else fused.values():
        index, expert = layer_of[next(iter(own.parts))], math.prod(own.shape[1:]) * own.dtype.itemsize
        stacks[index] += own.shape[0] * expert
        by_two[index] += min(2, own.shape[0]) * expert
    by_expert = [layer - all_of + two for layer, all_of, two in zip(layers, stacks, by_two, strict=True)]
    # Of two layers with stacks of one size, these are in memory once.
    pairs = zip(layers, layers[1:], stacks, stacks[1:], strict=False)
    ahead = [one + two - (first if first == second else 0) for one, two, first, second in pairs]
    return Sizes(max([*ahead, *layers]), layers, by_expert, outside)
