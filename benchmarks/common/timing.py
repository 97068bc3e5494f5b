"""Interleaved timing and extra memory of calls: the CPU's clock, CUDA's events and graphs."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from _native import scratch_of_native_core
from torch import Tensor

Call = Callable[[], Any]


class Timing(NamedTuple):
    """Seconds a call over `rounds` interleaved rounds."""

    median: float
    fastest: float
    spread: float
    """Half the distance of the quartiles over the median: how noisy the machine was."""
    rounds: int


class Memory(NamedTuple):
    """Bytes that a call allocates: at its peak, and beyond the results it hands back."""

    peak: int
    extra: int


class Effort(NamedTuple):
    """How long to measure: seconds a call in all, seconds a block of calls, rounds at least."""

    seconds: float
    block: float
    rounds: int


FULL = Effort(1.0, 0.02, 9)
QUICK = Effort(0.25, 0.01, 5)
_MOST_ROUNDS = 60
FLUSH_BYTES = 256 << 20


def _timing(samples: list[float]) -> Timing:
    ordered = sorted(samples)
    median = statistics.median(ordered)
    low, high = ordered[len(ordered) // 4], ordered[(3 * len(ordered)) // 4]
    return Timing(median, ordered[0], (high - low) / 2 / median, len(ordered))


def interleaved(calls: dict[str, Call], effort: Effort) -> dict[str, Timing]:
    """Time CPU calls in turns: each round measures a block of every call, medians stand.

    The turns start at another call each round, so that no call always follows the same one and a
    slow stretch of the machine falls on all of them.
    """
    repeats, longest = {}, 0.0
    for name, call in calls.items():
        call()
        start = time.perf_counter()
        call()
        once = max(time.perf_counter() - start, 1e-7)
        repeats[name] = max(1, math.ceil(effort.block / once))
        longest = max(longest, repeats[name] * once)
    rounds = min(_MOST_ROUNDS, max(effort.rounds, int(effort.seconds / max(longest, 1e-7))))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            call, count = calls[name], repeats[name]
            start = time.perf_counter()
            for _ in range(count):
                call()
            samples[name].append((time.perf_counter() - start) / count)
    return {name: _timing(values) for name, values in samples.items()}


def interleaved_cuda(
    calls: dict[str, Call], effort: Effort, flush_device: str = "cuda"
) -> dict[str, Timing]:
    """Time CUDA calls by events, in turns, each behind a write that empties the L2 cache.

    The write also hides the host's launch time of the first kernels; a call of many small kernels
    may still wait for the host, which is why graph replays are timed beside it.
    """
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=flush_device)
    longest = 0.0
    for call in calls.values():
        call()
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        longest = max(longest, time.perf_counter() - start)
    rounds = min(_MOST_ROUNDS, max(effort.rounds, int(effort.seconds / max(longest, 1e-6))))
    marks: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {n: [] for n in calls}
    names = list(calls)
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            start_mark = torch.cuda.Event(enable_timing=True)
            end_mark = torch.cuda.Event(enable_timing=True)
            flush.zero_()
            start_mark.record()
            calls[name]()
            end_mark.record()
            marks[name].append((start_mark, end_mark))
    torch.cuda.synchronize()
    return {
        name: _timing([start.elapsed_time(end) * 1e-3 for start, end in pairs])
        for name, pairs in marks.items()
    }


def captured(call: Call) -> Call:
    """A CUDA graph of `call`, as a call that replays it. Raises RuntimeError if it cannot.

    The warm-up runs on the capturing stream, where a kept forward pass must have run too for its
    backward to be captured.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        kept = call()

    def replay() -> Any:
        graph.replay()
        return kept

    return replay


def _result_bytes(results: Any) -> int:
    if isinstance(results, Tensor):
        results = (results,)
    seen: dict[int, int] = {}
    for tensor in results:
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
    return sum(seen.values())


def memory(call: Call, device: torch.device) -> Memory:
    """Bytes one call takes: CUDA by the caching allocator's peak, CPU by the profiler's trace.

    On the CPU every allocation and release that PyTorch's allocator makes during the call is
    traced in order and the largest running sum is the peak. The native core's own scratch, which
    that allocator does not see, is added at its largest.
    """
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        results = call()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
    else:
        activities = [torch.profiler.ProfilerActivity.CPU]
        with (
            scratch_of_native_core() as scratch,
            torch.profiler.profile(activities=activities, profile_memory=True) as profile,
        ):
            results = call()
        running = peak = 0
        events = profile.profiler.kineto_results.events()
        for event in sorted(
            (event for event in events if event.name() == "[memory]"), key=lambda e: e.start_ns()
        ):
            running += event.nbytes()
            peak = max(peak, running)
        peak += max(scratch, default=0)
    return Memory(peak, max(0, peak - _result_bytes(results)))
