"""Where a training step's time goes, and the memory that it and what stands around it take.

Both look at a step from outside, by what it calls: any contender's step can be taken apart.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from _native import scratch_of_native_core

from sefi_fast.prompts import text_encoders

Step = Callable[[], Any]

PARTS = ("draw", "picture", "text", "U-Net forward", "loss", "backward", "optimiser")
_STEP_MARK = "training step"


class _Clock:
    """Notes the begin and end of each outermost part; CUDA's queue is emptied at both."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._begun: list[float] = []
        self.spans: list[tuple[str, float, float]] = []

    def now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def begin(self) -> None:
        self._begun.append(self.now())

    def end(self, part: str) -> None:
        start = self._begun.pop()
        if not self._begun:
            self.spans.append((part, start, self.now()))

    def around(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **keywords: Any) -> Any:
            self.begin()
            try:
                return call(*arguments, **keywords)
            finally:
                self.end(part)

        return timed


@contextmanager
def _watched(pipe: Any, clock: _Clock) -> Iterator[None]:
    """The pipeline's models and autograd's backward, timed, until the way out."""
    # Whoever holds the U-Net's forward function calls its first and last parts all the same.
    spans = [
        (pipe.unet.time_proj, pipe.unet.conv_out, "U-Net forward"),
        *((part.text_encoder, part.text_encoder, "text") for part in text_encoders(pipe)),
    ]
    if pipe.vae is not None:
        spans.append((pipe.vae.encoder, pipe.vae.encoder, "picture"))
    calls = {name: getattr(torch.autograd, name) for name in ("backward", "grad")}
    with ExitStack() as stack:
        for first, last, part in spans:
            stack.callback(first.register_forward_pre_hook(lambda *_: clock.begin()).remove)
            stack.callback(last.register_forward_hook(lambda *_, p=part: clock.end(p)).remove)
        for name, call in calls.items():
            stack.callback(setattr, torch.autograd, name, call)
            setattr(torch.autograd, name, clock.around("backward", call))
        yield


def profile_step(step: Step, pipe: Any, device: torch.device, repeats: int) -> dict[str, float]:
    """Seconds of each of PARTS, the fastest of some steps in each.

    What lies between the calls belongs to the part it leads to or follows: all before the U-Net
    but the text and the image is "draw", all between the U-Net and the backward is "loss", all
    after the backward is "optimiser". A step that replays a CUDA graph has no parts to see.
    """
    found: list[dict[str, float]] = []
    for _ in range(repeats):
        clock = _Clock(device)
        with _watched(pipe, clock):
            start = clock.now()
            step()
            end = clock.now()
        found.append(_by_part(clock.spans, start, end))
    return {part: min(one[part] for one in found) for part in PARTS}


def _by_part(spans: list[tuple[str, float, float]], start: float, end: float) -> dict[str, float]:
    seconds = dict.fromkeys(PARTS, 0.0)
    place, gap = start, "draw"
    for part, begin, finish in spans:
        seconds[gap] += begin - place
        seconds[part] += finish - begin
        place = finish
        gap = {"U-Net forward": "loss", "backward": "optimiser"}.get(part, gap)
    seconds[gap] += end - place
    return seconds


class StepMemory(NamedTuple):
    """Bytes: held between steps (weights, states, caches), and at the highest point of a step."""

    held: int
    peak: int


def memory_of(build: Callable[[], Step], device: torch.device) -> StepMemory:
    """What a contender takes when it alone is there, from its models to the end of a later step.

    By the caching allocator's count on CUDA. On the CPU every allocation and release through
    PyTorch's allocator is traced in order from before the models are made, and the native core's
    own scratch is added at its largest.
    """
    gc.collect()
    if device.type == "cuda":
        return _memory_cuda(build)
    with (
        scratch_of_native_core() as scratch,
        torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profile,
    ):
        step = build()
        step()
        gc.collect()
        scratch.clear()
        with torch.profiler.record_function(_STEP_MARK):
            step()
    events = profile.profiler.kineto_results.events()
    begin = next(event.start_ns() for event in events if event.name() == _STEP_MARK)
    running = held = peak = 0
    for event in sorted(
        (event for event in events if event.name() == "[memory]"), key=lambda e: e.start_ns()
    ):
        if event.start_ns() < begin:
            running += event.nbytes()
            held = peak = running
            continue
        running += event.nbytes()
        peak = max(peak, running)
    return StepMemory(held, peak + max(scratch, default=0))


def _memory_cuda(build: Callable[[], Step]) -> StepMemory:
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    step = build()
    step()
    step()
    gc.collect()
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated() - before
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return StepMemory(held, torch.cuda.max_memory_allocated() - before)
