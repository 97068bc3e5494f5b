"""A kernel of exponentials alone, for the exponential rate of a CUDA device."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl

_BLOCK = 1024
_LOOPS = 4096
_PROGRAMS_PER_MULTIPROCESSOR = 64


@triton.jit
def _exponentials(values, results, LOOPS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(values + offsets)
    for _ in range(LOOPS):
        # Converges to 0.64, far from overflow; each result depends on the one before.
        x = tl.exp2(-x)
    tl.store(results + offsets, x)


def exponentials(device: torch.device) -> tuple[Callable[[], object], int]:
    """Return a call and its number of float32 exponentials; eight chains a thread hide latency."""
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    programs = multiprocessors * _PROGRAMS_PER_MULTIPROCESSOR
    values = torch.rand(programs * _BLOCK, device=device)
    results = torch.empty_like(values)

    def run() -> None:
        _exponentials[(programs,)](values, results, LOOPS=_LOOPS, BLOCK=_BLOCK, num_warps=4)

    return run, programs * _BLOCK * _LOOPS
