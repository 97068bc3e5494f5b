"""Parts of every training loop: a budget of time, the optimizer and its rate, averaged weights."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm


@dataclass(frozen=True)
class Settings:
    """Settings of every training.

    Attributes:
        seconds: training time. Two runs of the same time differ in their number of steps.
        seed: seed of the images, the weights and every random choice.
        device: "cpu" or "cuda".
        max_steps: ends training earlier.
        progress: whether to show a progress bar.
    """

    seconds: float
    seed: int = 0
    device: str = "cpu"
    max_steps: int | None = None
    progress: bool = True

    @property
    def place(self) -> torch.device:
        """Return the device."""
        return torch.device(self.device)


class Loop:
    """A training loop on a budget of time, or for tests of steps, with AdamW and a progress bar.

    The learning rate warms up over `warm_up` steps, stays flat for a share of the budget, and falls
    by a cosine to the share `end` of its peak.

    Args:
        name: title of the progress bar.
        weights: weights that are trained.
        rate: peak of the learning rate.
        settings: settings of the training. With max_steps the budget counts in steps.
        warm_up, flat, end: shape of the learning rate.
        beta2, decay: settings of AdamW.
        clip: largest norm of the gradient.
        slow: some of the weights, trained at the share `slow_rate` of the rate.
        slow_rate: that share.
    """

    def __init__(
        self,
        name: str,
        weights: Iterable[nn.Parameter],
        rate: float,
        settings: Settings,
        *,
        warm_up: int,
        flat: float,
        end: float,
        beta2: float = 0.98,
        decay: float = 0.01,
        clip: float = 1.0,
        slow: Sequence[nn.Parameter] = (),
        slow_rate: float = 1.0,
    ) -> None:
        self._name, self._settings, self._rate, self._clip = name, settings, rate, clip
        self._warm_up, self._flat, self._end = warm_up, flat, end
        self.weights = list(weights)
        groups = [{"params": self.weights, "share": 1.0}]
        if slow:
            groups.append({"params": list(slow), "share": slow_rate})
            self.weights = [*self.weights, *slow]
        self._optimizer = torch.optim.AdamW(
            groups, rate, betas=(0.9, beta2), weight_decay=decay, fused=True
        )
        self.share = 0.0
        """Share of the budget that is spent."""
        self.note = ""
        """Text of the progress bar."""
        self.loss = 0.0
        """Running mean of the loss."""

    @property
    def rate(self) -> float:
        """Return the current learning rate."""
        return float(self._optimizer.param_groups[0]["lr"])

    def steps(self) -> Iterator[int]:
        """Yield step numbers 0, 1, ... until the budget is spent; at least one."""
        started, step, settings = time.perf_counter(), 0, self._settings
        form = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
        hidden = not settings.progress
        with tqdm(
            total=1.0, desc=self._name, disable=hidden, bar_format=form, mininterval=2
        ) as bar:
            while self.share < 1.0:
                fall = max(0.0, self.share - self._flat) / (1 - self._flat)
                cosine = 0.5 * (1 + math.cos(math.pi * fall))
                factor = min(1.0, (step + 1) / self._warm_up)
                for group in self._optimizer.param_groups:
                    peak = self._rate * group["share"]
                    group["lr"] = peak * factor * (self._end + (1 - self._end) * cosine)
                yield step
                step += 1
                before, self.share = self.share, (time.perf_counter() - started) / settings.seconds
                if settings.max_steps is not None:
                    self.share = max(self.share, step / settings.max_steps)
                bar.set_postfix_str(f"step {step} {self.note}", refresh=False)
                bar.update(min(self.share, 1.0) - before)

    def descend(self, loss: Tensor, step: int) -> None:
        """Take a step down the gradient of a loss."""
        self._optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self.weights, self._clip)
        self._optimizer.step()
        self.loss += (loss.item() - self.loss) * max(0.02, 1 / (step + 1))
        self.note = f"loss {self.loss:.4f}"

    def update_average(self, average: Sequence[Tensor], step: int, decay: float) -> None:
        """Move an exponential average of the weights towards them."""
        keep = min(decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(average), [w.detach() for w in self.weights], 1 - keep)
