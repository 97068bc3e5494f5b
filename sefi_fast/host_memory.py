"""Keep the C library from handing freed memory back to the kernel, which slows a CPU down."""

from __future__ import annotations

import ctypes
import os
import platform

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_KEPT_BYTES = 2**30
_PAD_BYTES = 2**26


def keep_freed_memory() -> bool:
    """Let this process keep up to 1 GiB of freed memory for its next tensors. Linux with glibc.

    By default glibc returns the end of its heap to the kernel as soon as it is free, and fetches
    large blocks there. Every step of training or sampling on a CPU then gets its tensors on new
    pages, each of which the kernel must clear: 9 to 13 % of a training step
    (docs/performance.md). The setting holds for the whole process until it ends, so the command
    `sefi-fast` makes it and `import sefi_fast` does not. Whoever has set glibc's own variables
    (MALLOC_TRIM_THRESHOLD_ and the like) keeps what they say.

    Returns:
        Whether the setting was made.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    if any(name.startswith("MALLOC_") for name in os.environ):
        return False
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    settings = (
        (_TRIM_THRESHOLD, _KEPT_BYTES),
        (_MMAP_THRESHOLD, _KEPT_BYTES),
        (_TOP_PAD, _PAD_BYTES),
    )
    return all([set_option(option, value) == 1 for option, value in settings])
