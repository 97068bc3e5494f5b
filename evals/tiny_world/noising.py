"""The noise process of the bundled model, and noised latents for its training."""

from __future__ import annotations

import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor


def make_scheduler() -> DPMSolverMultistepScheduler:
    """The noise process, v-prediction.

    It ends at a signal of 1.6 %, against Stable Diffusion's 6.8 %: with so few latents the place
    of a creature shows through 6.8 %, and a model that can read it from its input ignores the
    prompt's "on the left".
    """
    return DPMSolverMultistepScheduler(
        beta_start=0.00085,
        beta_end=0.02,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        steps_offset=1,
    )


class Noising:
    """Noises latents at random timesteps.

    Args:
        device: that the latents are on.
    """

    def __init__(self, device: torch.device) -> None:
        self._signal = make_scheduler().alphas_cumprod.sqrt().to(device)
        self._spread = (1 - self._signal**2).sqrt()

    def __call__(self, clean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What a step of training needs of latents [B, C, h, w].

        Returns:
            The noised latents (channels last), their timesteps int64 [B], and the velocity that
            the U-Net shall predict.
        """
        timesteps = _timesteps(len(clean)).to(clean.device)
        noise = torch.randn_like(clean)
        a, s = (part[timesteps, None, None, None] for part in (self._signal, self._spread))
        noisy = (a * clean + s * noise).contiguous(memory_format=torch.channels_last)
        return noisy, timesteps, a * noise - s * clean


def _timesteps(count: int) -> Tensor:
    """One timestep a stratum, somewhat more of them at high noise, where places are decided."""
    places = (torch.randperm(count) + torch.rand(count)) / count
    return (places**0.85 * 1000).long().clamp(0, 999)
