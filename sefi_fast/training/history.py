"""What a training run saw, step by step."""

from __future__ import annotations

from dataclasses import dataclass, field

from PIL import Image


@dataclass(eq=False)
class History:
    """Numbers of every finished step, and the pictures drawn on the way.

    Attributes:
        loss: noise loss (the first term of equation 6) of each step.
        alignment: attention term of each step, before λ; 0 in runs with λ = 0, which skip it.
        seconds: time since training began, at the end of each step.
        validation: (steps done, one picture a validation prompt).
        skipped: numbers of the steps, counted from 0, that were left out because the loss or a
            gradient was not finite.
    """

    loss: list[float] = field(default_factory=list)
    alignment: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    validation: list[tuple[int, list[Image.Image]]] = field(default_factory=list)
    skipped: list[int] = field(default_factory=list)

    def record(self, loss: float, alignment: float, seconds: float) -> None:
        """Append one finished step."""
        self.loss.append(loss)
        self.alignment.append(alignment)
        self.seconds.append(seconds)
