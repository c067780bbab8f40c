"""Work dealt to threads so that its results do not depend on how many there are.

A product that several threads compute together is rounded as they share it. Here each piece of work is computed by one
thread, and only who computes it depends on their number. torch's products and lap's assignments leave Python's lock.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item, Result = TypeVar("Item"), TypeVar("Result")


@contextlib.contextmanager
def one_thread_each(workers: int) -> Iterator[ThreadPoolExecutor]:
    """A pool of so many threads, in each of which torch computes with that thread alone."""
    own = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(workers, "worker", torch.set_num_threads, (1,)) as pool:
            yield pool
    finally:
        # torch keeps part of this number for the whole process.
        torch.set_num_threads(own)


def each(function: Callable[[Item], Result], items: Iterable[Item], most: int = 0) -> list[Result]:
    """function(item) for every item, in their order, `most` at a time (0: as many as torch has threads here).

    Within `function` torch has one thread, so that a call of `each` there goes through its items one by one.
    """
    threads = torch.get_num_threads()
    if threads == 1:
        return [function(item) for item in items]
    with one_thread_each(min(threads, most or threads)) as pool:
        return list(pool.map(function, items))
