"""Interleaved timing and extra memory of calls: the CPU's clock, CUDA's events and graphs.

`triton.testing.do_bench` times one call after the other, on CUDA only. Here the calls alternate, so
that a slow stretch of the machine falls on all of them.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sefi_fast.ops import cpu

# The profiler that counts allocations reports its start and stop otherwise.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")

Call = Callable[[], Any]


class Timing(NamedTuple):
    """Seconds a call over `rounds` interleaved rounds."""

    median: float
    fastest: float
    spread: float
    """Half the distance of the quartiles over the median: the noise of the machine."""
    rounds: int


class Memory(NamedTuple):
    """Bytes that a call allocates: at its peak, and beyond the results that it returns."""

    peak: int
    extra: int


class Effort(NamedTuple):
    """Length of a measurement: seconds a call in all, seconds a block of calls, fewest rounds."""

    seconds: float
    block: float
    rounds: int

    def rounds_of(self, seconds: float) -> int:
        """Return the number of rounds when the longest call takes `seconds` a round."""
        return min(_MOST_ROUNDS, max(self.rounds, int(self.seconds / max(seconds, 1e-7))))


FULL = Effort(1.0, 0.02, 9)
QUICK = Effort(0.25, 0.01, 5)
_MOST_ROUNDS = 60
FLUSH_BYTES = 256 << 20


def _timing(samples: list[float]) -> Timing:
    ordered = sorted(samples)
    median = statistics.median(ordered)
    low, high = ordered[len(ordered) // 4], ordered[(3 * len(ordered)) // 4]
    return Timing(median, ordered[0], (high - low) / 2 / median, len(ordered))


def _order(names: list[str], rounds: int) -> Iterator[str]:
    """Yield all names in each round, the first name rotating: no call always follows the same."""
    for turn in range(rounds):
        first = turn % len(names)
        yield from names[first:] + names[:first]


def interleaved(calls: dict[str, Call], effort: Effort) -> dict[str, Timing]:
    """Time CPU calls alternately: each round times a block of every call; medians count."""
    repeats, longest = {}, 0.0
    for name, call in calls.items():
        call()
        start = time.perf_counter()
        call()
        once = max(time.perf_counter() - start, 1e-7)
        repeats[name] = max(1, math.ceil(effort.block / once))
        longest = max(longest, repeats[name] * once)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for name in _order(list(calls), effort.rounds_of(longest)):
        start = time.perf_counter()
        for _ in range(repeats[name]):
            calls[name]()
        samples[name].append((time.perf_counter() - start) / repeats[name])
    return {name: _timing(values) for name, values in samples.items()}


def interleaved_cuda(
    calls: dict[str, Call], effort: Effort, flush_device: str = "cuda"
) -> dict[str, Timing]:
    """Time CUDA calls by events, alternately, each after a write that empties the L2 cache.

    The write also hides the host's launch time of the first kernels. A call of many small kernels
    may still wait for the host: therefore graph replays are timed as well.
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
    marks: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {n: [] for n in calls}
    for name in _order(list(calls), effort.rounds_of(longest)):
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


def interleaved_on(
    device: torch.device, calls: dict[str, Call], effort: Effort
) -> dict[str, Timing]:
    """Time calls on a device by its own clock."""
    return (interleaved_cuda if device.type == "cuda" else interleaved)(calls, effort)


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
    tensors = [results] if isinstance(results, Tensor) else results
    storages = [tensor.untyped_storage() for tensor in tensors if isinstance(tensor, Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def traced_bytes(profile: torch.profiler.profile, mark: str | None = None) -> tuple[int, int]:
    """Return (bytes held at the start, highest sum of bytes after it) of a profiled CPU run.

    Every allocation and release through PyTorch's allocator counts, in order. mark: name of the
    recorded function at whose begin the start lies; the whole run otherwise.
    """
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    events: list[Any] = profile.profiler.kineto_results.events()
    begin = next((event.start_ns() for event in events if event.name() == mark), 0)
    running = held = peak = 0
    memory_events = (event for event in events if event.name() == "[memory]")
    for event in sorted(memory_events, key=lambda event: event.start_ns()):
        running += event.nbytes()
        if event.start_ns() < begin:
            held = peak = running
        peak = max(peak, running)
    return held, peak


def memory(call: Call, device: torch.device) -> Memory:
    """Measure the bytes of one call: CUDA by the caching allocator's peak, CPU by a profile.

    On the CPU the native core's scratch, which PyTorch's allocator does not see, is added at its
    largest.
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
        with scratch_of_native_core() as scratch, profiled_memory() as profile:
            results = call()
        peak = traced_bytes(profile)[1] + max(scratch, default=0)
    return Memory(peak, max(0, peak - _result_bytes(results)))


def profiled_memory() -> torch.profiler.profile:
    """Return a profiler of CPU allocations."""
    return torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    )


class _CountingCore:
    """A native core that notes the bytes of scratch that each call returns."""

    def __init__(self, core: Any, taken: list[int]) -> None:
        self._core, self._taken = core, taken

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._core, name)
        if name not in ("forward", "backward"):
            return found

        def run(*arguments: Any) -> int:
            scratch: int = found(*arguments)
            self._taken.append(scratch)
            return scratch

        return run


@contextmanager
def scratch_of_native_core() -> Iterator[list[int]]:
    """Collect the bytes of scratch of every native call inside; none without a native core."""
    taken: list[int] = []
    core = cpu._C
    if core is not None:
        cpu._C = _CountingCore(core, taken)  # type: ignore[assignment]
    try:
        yield taken
    finally:
        cpu._C = core
