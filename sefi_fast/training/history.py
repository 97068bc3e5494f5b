"""What a training run saw, step by step."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from PIL import Image
from torch import Tensor

from sefi_fast.training.image import decode


@dataclass(eq=False)
class History:
    """Numbers of every finished step, and the pictures drawn on the way.

    Attributes:
        loss: noise loss (the first term of equation 6) of each step.
        alignment: attention term of each step, before λ; 0 in runs with λ = 0, which skip it.
        seconds: time since training began, at the end of each step; a resumed run goes on from
            the time of its checkpoint.
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

    def state_dict(self) -> dict[str, Tensor]:
        """Everything as tensors: float64 and int64 [steps], pictures as the bytes of a PNG."""
        state = {
            name: torch.tensor(getattr(self, name), dtype=torch.float64)
            for name in ("loss", "alignment", "seconds")
        }
        state["skipped"] = torch.tensor(self.skipped, dtype=torch.int64)
        for step, pictures in self.validation:
            for number, picture in enumerate(pictures):
                state[f"validation.{step:09d}.{number:04d}"] = _png(picture)
        return state

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> History:
        """Return the history that `state_dict` was taken of.

        Raises:
            ValueError: `state` is not one of `state_dict`, or a validation image is damaged.
        """
        for name in ("loss", "alignment", "seconds", "skipped"):
            dtype = torch.int64 if name == "skipped" else torch.float64
            own = state.get(name)
            if own is None or own.dtype != dtype or own.dim() != 1:
                raise ValueError(f"its history has no {name}, a row of {dtype}")
        loss, alignment, seconds = (state[name] for name in ("loss", "alignment", "seconds"))
        alike = len(loss) == len(alignment) == len(seconds)
        if not alike or not bool(torch.stack([loss, alignment, seconds]).isfinite().all()):
            raise ValueError("its history is not of finite numbers, one of each kind a step")
        drawn: dict[int, list[Image.Image]] = {}
        for name in sorted(name for name in state if name.startswith("validation.")):
            step = re.fullmatch(r"validation\.([0-9]{1,12})\.[0-9]+", name)
            if step is None or state[name].dtype != torch.uint8 or state[name].dim() != 1:
                raise ValueError(f"its history holds {name}, which is not a validation picture")
            png = io.BytesIO(state[name].numpy().tobytes())
            image = decode(png, "a validation image of the checkpoint")
            drawn.setdefault(int(step[1]), []).append(image)
        return cls(
            loss.tolist(),
            alignment.tolist(),
            seconds.tolist(),
            validation=list(drawn.items()),
            skipped=state["skipped"].tolist(),
        )


def _png(picture: Image.Image) -> Tensor:
    stream = io.BytesIO()
    picture.save(stream, format="PNG")
    return torch.frombuffer(bytearray(stream.getvalue()), dtype=torch.uint8)
