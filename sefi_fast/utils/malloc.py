"""Keep the C library from returning freed memory to the kernel, which slows a CPU down."""

from __future__ import annotations

import ctypes
import os
import platform

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_KEPT_BYTES = 2**30
_MOST_OF_OLDER_GLIBC = 2**25
_PAD_BYTES = 2**26


def keep_freed_memory_on_cpu() -> None:
    """Call `keep_freed_memory` if there is no CUDA device."""
    import torch

    if not torch.cuda.is_available():
        keep_freed_memory()


def keep_freed_memory() -> bool:
    """Let this process keep freed memory for its next tensors (Linux with glibc only).

    By default glibc returns freed memory at the end of its heap, and every large block, to the
    kernel. Each step of training or sampling on a CPU then gets new pages for its tensors, which
    the kernel must clear: about a tenth of a training step (docs/performance.md). After this
    call blocks below 1 GiB stay in the heap, and only more than 1 GiB of free memory is returned.

    The setting holds until the process ends, so `import sefi_fast` does not make it. The command
    `sefi-fast` makes it if there is no CUDA device. malloc's own variables (MALLOC_TRIM_THRESHOLD_
    and the like, GLIBC_TUNABLES) take precedence.

    Returns:
        Whether the setting was made.

    Example:
        >>> import sefi_fast
        >>> sefi_fast.keep_freed_memory()  # doctest: +SKIP
        True
    """
    by_user = any(name.startswith("MALLOC_") for name in os.environ)
    by_user |= "malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if by_user or platform.libc_ver()[0] != "glibc":
        return False
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    # First, because the other settings stop glibc from adapting this threshold.
    if not any(set_option(_MMAP_THRESHOLD, x) == 1 for x in (_KEPT_BYTES, _MOST_OF_OLDER_GLIBC)):
        return False
    set_option(_TRIM_THRESHOLD, _KEPT_BYTES)
    set_option(_TOP_PAD, _PAD_BYTES)
    return True
