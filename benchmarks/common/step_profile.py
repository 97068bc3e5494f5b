"""Time of a training step by part, and its memory.

Both watch the calls of a step from outside, so that they work for the step of any provider.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch

from common.timing import profiled_memory, scratch_of_native_core, traced_bytes
from sefi_fast.prompts import text_encoders

Step = Callable[[], Any]

PARTS = ("noise", "image", "text", "U-Net forward", "loss", "backward", "optimizer")
_STEP_MARK = "training step"


class _Clock:
    """Note begin and end of each outermost part; wait for CUDA at both."""

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
    """Time the pipeline's models and autograd's backward until the exit."""
    # A step may hold the U-Net's forward function: hooks of its first and last modules still run.
    spans = [
        (pipe.unet.time_proj, pipe.unet.conv_out, "U-Net forward"),
        *((part.text_encoder, part.text_encoder, "text") for part in text_encoders(pipe)),
    ]
    if pipe.vae is not None:
        spans.append((pipe.vae.encoder, pipe.vae.encoder, "image"))
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
    """Return the seconds of each of PARTS, the fastest of some steps in each.

    Time between the calls belongs to a part too: "noise" before the U-Net, "loss" between the U-Net
    and the backward, "optimizer" after the backward. A replayed CUDA graph has no visible parts.
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
    place, gap = start, "noise"
    for part, begin, finish in spans:
        seconds[gap] += begin - place
        seconds[part] += finish - begin
        place = finish
        gap = {"U-Net forward": "loss", "backward": "optimizer"}.get(part, gap)
    seconds[gap] += end - place
    return seconds


class StepMemory(NamedTuple):
    """Bytes: held between steps (weights, states, caches), and at the highest point of a step."""

    held: int
    peak: int


def memory_of(build: Callable[[], Step], device: torch.device) -> StepMemory:
    """Measure a provider that is alone in memory, from its models to the end of a later step.

    On CUDA by the caching allocator's count. On the CPU by a profile of PyTorch's allocator, with
    the native core's scratch added at its largest.
    """
    gc.collect()
    if device.type == "cuda":
        return _memory_cuda(build)
    with scratch_of_native_core() as scratch, profiled_memory() as profile:
        step = build()
        step()
        gc.collect()
        scratch.clear()
        with torch.profiler.record_function(_STEP_MARK):
            step()
    held, peak = traced_bytes(profile, _STEP_MARK)
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
