"""Early stopping: whether the smoothed loss has ceased to fall."""

from __future__ import annotations

import math

_WINDOW = 50
_LEAST_GAIN = 0.01


class Plateau:
    """Watches the loss of each step, smoothed exponentially over about 50 steps.

    Args:
        patience: steps without a new lowest smoothed loss, lower by at least a hundredth of it,
            after which the run has reached its plateau; None: never.
    """

    def __init__(self, patience: int | None) -> None:
        self._patience = patience
        self._average = 0.0
        self._count = 0
        self._lowest = math.inf
        self._since = 0

    def reached(self, loss: float) -> bool:
        """Takes in one step's loss and says whether the plateau is reached."""
        if self._patience is None:
            return False
        # A plain mean at first; a mean of few is no mark to hold later ones to.
        self._count += 1
        self._average += (loss - self._average) / min(self._count, _WINDOW)
        if self._count < _WINDOW:
            return False
        if self._average < self._lowest * (1 - _LEAST_GAIN):
            self._lowest, self._since = self._average, 0
        else:
            self._since += 1
        return self._since >= self._patience
