"""Which stage of the subject a denoising timestep belongs to."""

from __future__ import annotations

import torch
from torch import Tensor


def stage_of(timestep: Tensor | float, stages: int, num_train_timesteps: int = 1000) -> Tensor:
    """``clamp(floor(t·S/T), 0, S−1)`` as int64 (docs/method.md §1), of the timestep's shape.

    Timesteps may be fractional (Karras-type schedulers). Nothing is read back from the device.

    Args:
        timestep: t, 0 = clean; a number, or a tensor of any shape, dtype and device.
        stages: S, at least 1.
        num_train_timesteps: T of the scheduler the model was trained with.
    """
    if stages < 1:
        raise ValueError(f"stages must be at least 1, got {stages}")
    if num_train_timesteps < 1:
        raise ValueError(f"num_train_timesteps must be at least 1, got {num_train_timesteps}")
    if not isinstance(timestep, Tensor):
        timestep = torch.tensor(timestep)
    if timestep.is_floating_point():
        # Half precision cannot tell t·S apart from its neighbours.
        wide = timestep if timestep.dtype == torch.float64 else timestep.to(torch.float32)
        stage = torch.floor(wide * stages / num_train_timesteps).to(torch.int64)
    else:
        stage = (timestep.to(torch.int64) * stages).div(num_train_timesteps, rounding_mode="floor")
    return stage.clamp(0, stages - 1)
