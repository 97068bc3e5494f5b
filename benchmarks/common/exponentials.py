"""Exponential rate of a CUDA device, by a kernel that computes nothing else."""

from __future__ import annotations

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
        # Settles near 0.64, far from overflow, and needs the last result before the next.
        x = tl.exp2(-x)
    tl.store(results + offsets, x)


def exponentials_per_second(device: torch.device) -> float:
    """Measure float32 exponentials a second; eight chains a thread hide the unit's latency."""
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    programs = multiprocessors * _PROGRAMS_PER_MULTIPROCESSOR
    values = torch.rand(programs * _BLOCK, device=device)
    results = torch.empty_like(values)
    fastest = float("inf")
    for _ in range(6):
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        start.record()
        _exponentials[(programs,)](values, results, LOOPS=_LOOPS, BLOCK=_BLOCK, num_warps=4)
        end.record()
        end.synchronize()
        fastest = min(fastest, start.elapsed_time(end) * 1e-3)
    return programs * _BLOCK * _LOOPS / fastest
