"""Keep the C library from handing freed memory back to the kernel, which slows a CPU down."""

from __future__ import annotations

import ctypes
import os
import platform

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_KEPT_BYTES = 2**30
_MOST_OF_OLDER_GLIBC = 2**25
_PAD_BYTES = 2**26


def keep_freed_memory_on_cpu() -> None:
    """`keep_freed_memory` where there is no CUDA device, so that the CPU has all the work."""
    import torch

    if not torch.cuda.is_available():
        keep_freed_memory()


def keep_freed_memory() -> bool:
    """Let this process keep freed memory for its next tensors. Linux with glibc.

    By default glibc returns the end of its heap to the kernel as soon as it is free, and fetches
    large blocks there. Every step of training or sampling on a CPU then gets its tensors on new
    pages, each of which the kernel must clear: about a tenth of a training step
    (docs/performance-steps.md). With the setting, blocks below 1 GiB come from the heap and go back
    to it, and the heap's end is returned only when more than 1 GiB of it is free.

    It holds for the whole process until it ends, so `import sefi_fast` does not make it; the
    command `sefi-fast` does where there is no CUDA device. Whoever has set malloc's own variables
    (MALLOC_TRIM_THRESHOLD_ and the like, GLIBC_TUNABLES) keeps what they say.

    Returns:
        Whether the setting was made.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    if any(name.startswith("MALLOC_") for name in os.environ):
        return False
    if "malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    # Before all else, since the other settings end glibc's own adapting of this threshold.
    for threshold in (_KEPT_BYTES, _MOST_OF_OLDER_GLIBC):
        if set_option(_MMAP_THRESHOLD, threshold) == 1:
            break
    else:
        return False
    set_option(_TRIM_THRESHOLD, _KEPT_BYTES)
    set_option(_TOP_PAD, _PAD_BYTES)
    return True
