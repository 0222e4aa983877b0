"""How does a program on a CPU get its memory? From what the last one freed, if this process keeps it.

XLA takes all temporaries of a program as one block and frees it at the end. glibc gives so large a block back to the
kernel, which clears it page by page when the next step touches it: with 1.4 GB a third of a million page faults.
"""

import ctypes

# Options of glibc's mallopt (malloc.h), and their values.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
_OPTIONS = {
    _MMAP_MAX: 0,  # large blocks come from the heap, which outlives them …
    _ARENA_MAX: 1,  # … if there is only one: those of other threads are too small for them
    _TRIM_THRESHOLD: -1,  # and what is free at its end stays
}


def keep_freed_memory() -> bool:
    """From now on this process keeps what it frees. To be called before numpy and JAX are imported.

    Threads that were there before have heaps of their own, and leave them to later ones. The process then holds
    up to twice as much at its peak, as blocks of different programs do not fit each other's places.

    Returns:
      Whether the C library can do so; glibc can.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return all([mallopt(option, value) for option, value in _OPTIONS.items()])
