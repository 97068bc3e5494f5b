"""The training step as one CUDA graph: rehearsed, captured, replayed."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

# What libraries set up on first use, workspaces and compiled kernels, must not fall into a capture.
_REHEARSALS = 3


def wants_capture(capture: str, device: torch.device) -> bool:
    """Whether a run with this setting captures its step.

    Raises:
        ValueError: "always" on a device that captures nothing.
    """
    if capture == "always" and device.type != "cuda":
        raise ValueError(
            f"capture='always' works on CUDA only, and this run is on {device.type}: give 'auto' "
            "or 'never'"
        )
    return capture != "never" and device.type == "cuda"


def rehearse(run: Callable[[], None], changed: Iterable[Tensor], times: int = _REHEARSALS) -> None:
    """Run a few times and put back what it changed, whatever happens."""
    before = [(tensor, tensor.clone()) for tensor in changed]
    try:
        for _ in range(times):
            run()
    finally:
        for tensor, copy in before:
            tensor.copy_(copy)


def is_lost(device: torch.device) -> bool:
    """Whether an illegal access or the like has left this process nothing but errors there."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


class Replay:
    """A captured step; a call does what `run()` did, on the same tensors.

    Args:
        run: reads and writes tensors that stay where they are, and does not wait for the device.
        changed: every tensor that outlives `run` and is changed by it.
        device: a CUDA device.

    Raises:
        RuntimeError: something in `run` cannot be captured; `changed` is as it was.
    """

    def __init__(
        self, run: Callable[[], None], changed: Iterable[Tensor], device: torch.device
    ) -> None:
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device):
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                rehearse(run, changed)
            torch.cuda.current_stream().wait_stream(aside)
            with torch.cuda.graph(self._graph):
                run()

    def __call__(self) -> None:
        self._graph.replay()
