"""The learning rate over a run, and the moving average of its tokens."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from sefi_fast.training.config import TrainConfig


def rate_factor(config: TrainConfig, done: int) -> float:
    """What the learning rate is multiplied by in the step after `done` others.

    Over `warmup_steps` it rises evenly to 1; then it stays (constant), or falls along half a cosine
    or a straight line, to 0 just after the last step.
    """
    warmup = config.warmup_steps
    if done < warmup:
        return (done + 1) / (warmup + 1)
    if config.schedule == "constant":
        return 1.0
    progress = min(1.0, (done - warmup) / max(1, config.steps - warmup))
    if config.schedule == "linear":
        return 1.0 - progress
    return 0.5 * (1 + math.cos(math.pi * progress))


class MovingAverage:
    """Exponential moving average of a lane's tokens, float32, on their device.

    The decay of update t, counted from 0, is min(decay, (1 + t) / (10 + t)), so that the start
    values do not linger in short runs.

    Args:
        decay: what is kept of the average in one step, below 1.
        start: the tokens before the first step.
    """

    def __init__(self, decay: float, start: Tensor) -> None:
        self._decay = decay
        self._updates = 0
        self._average = start.detach().clone()

    def update(self, rows: Tensor) -> None:
        """Takes in the rows after a step; rows that hold NaN or infinity are left out."""
        kept = min(self._decay, (1 + self._updates) / (10 + self._updates))
        self._updates += 1
        moved = self._average.lerp(rows.detach(), 1 - kept)
        # Chosen on the device: asking whether it is finite would wait for it.
        self._average = torch.where(torch.isfinite(moved).all(), moved, self._average)

    def current(self) -> Tensor:
        """The average, on the CPU."""
        return self._average.cpu()

    def state_dict(self) -> dict[str, Tensor]:
        """The average, and how many updates made it."""
        return {"updates": torch.tensor(self._updates), "average": self._average.cpu()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Goes on from what `state_dict` gave."""
        self._updates = int(state["updates"])
        self._average = state["average"].to(self._average.device, copy=True)
