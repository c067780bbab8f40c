"""Make the C allocator hand out the same memory again, and return what a layer held to the system."""

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc, malloc.h
_LARGE = 32 << 20  # the most that glibc takes
_KEPT = 96 << 20  # of smaller blocks, at the end of the heap


def tune_allocator() -> None:
    """Give every block of 32 MiB or more pages of its own, unmapped when it is freed; keep those of smaller blocks.

    By itself glibc raises its threshold for that to the size of the blocks it sees, after which the freed tensors of
    one layer leave holes that those of the next do not fill: measured over 16 layers of 24 MiB, the resident memory of
    a streamed pass grew by 11 MiB a layer, and with this by none. What is smaller is made and freed thousands of times,
    and a page costs more to get than to fill: the pass over 3 layers of Mixtral that took 22 s with a threshold of
    1 MiB takes 16. Where the C library has no mallopt (macOS, musl) nothing is changed.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGE)
        mallopt(_M_TRIM_THRESHOLD, _KEPT)
