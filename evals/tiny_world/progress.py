"""A training loop's clock: progress bar with time left, share of the budget, learning rate."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

from tqdm import tqdm


class Budget:
    """Counts a loop down, in seconds or, for trials of the code, in steps.

    Args:
        name: shown by the progress bar.
        seconds: time that the loop may take.
        max_steps: ends the loop earlier; its share of the budget then counts in steps.
        show: show a progress bar.
    """

    def __init__(
        self, name: str, seconds: float, max_steps: int | None = None, show: bool = True
    ) -> None:
        self.name, self.seconds, self.max_steps, self.show = name, seconds, max_steps, show
        self.share = 0.0
        self.note = ""
        self.loss = 0.0
        self._losses = 0

    def steps(self) -> Iterator[int]:
        """Step numbers 0, 1, ... until the budget is spent; at least one step."""
        started, step = time.perf_counter(), 0
        form = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
        bar = tqdm(total=1.0, desc=self.name, disable=not self.show, bar_format=form, mininterval=2)
        with bar:
            while self.share < 1.0:
                yield step
                step += 1
                before = self.share
                self.share = (time.perf_counter() - started) / self.seconds
                if self.max_steps is not None:
                    self.share = max(self.share, step / self.max_steps)
                bar.set_postfix_str(f"step {step} {self.note}", refresh=False)
                bar.update(min(self.share, 1.0) - min(before, 1.0))

    def follow(self, loss: float) -> None:
        """Take a step's loss into the running mean `loss`, which the progress bar shows."""
        self._losses += 1
        self.loss += (loss - self.loss) * max(0.02, 1 / self._losses)
        self.note = f"loss {self.loss:.4f}"

    def rate(self, step: int, *, warm_up: int, flat: float, end: float) -> float:
        """Factor of the learning rate: linear warm-up, flat share, then a cosine down to `end`."""
        fall = max(0.0, self.share - flat) / (1 - flat)
        cosine = 0.5 * (1 + math.cos(math.pi * min(fall, 1.0)))
        return min(1.0, (step + 1) / warm_up) * (end + (1 - end) * cosine)
