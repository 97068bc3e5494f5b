"""What a step draws at random, the noised latents and the targets of the noise loss."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sefi_fast.errors import ModelError


class Draw(NamedTuple):
    """Everything random of one step, on the CPU: B samples.

    timesteps: int64 [B]. view: int64 [B], which of the picture's views. template: int64 [B], which
    training sentence. latent_noise, noise: float32 [B, C, h, w], standard normal.
    """

    timesteps: Tensor
    view: Tensor
    template: Tensor
    latent_noise: Tensor
    noise: Tensor


def draw(
    generator: torch.Generator,
    *,
    batch_size: int,
    num_train_timesteps: int,
    views: int,
    templates: int,
    latent_shape: tuple[int, ...],
) -> Draw:
    """Draw one step. Timesteps are stratified, one in each of B equal parts of [0, T).

    Drawn on the CPU whatever the device, so that a seed means the same everywhere and the host
    knows the stages without waiting for the device.
    """
    where = torch.arange(batch_size) + torch.rand(batch_size, generator=generator)
    timesteps = (where / batch_size * num_train_timesteps).long()
    shape = (batch_size, *latent_shape)
    return Draw(
        timesteps.clamp_(max=num_train_timesteps - 1),
        torch.randint(views, (batch_size,), generator=generator),
        torch.randint(templates, (batch_size,), generator=generator),
        torch.randn(shape, generator=generator),
        torch.randn(shape, generator=generator),
    )


class NoiseSchedule:
    """The forward process of a diffusers scheduler's configuration, and its target.

    Args:
        scheduler: any scheduler of the pipeline; only its configuration is read.
        device: where latents will be.

    Raises:
        ModelError: the model predicts something else than noise or velocity, or its scheduler has
            no betas (flow matching).
    """

    def __init__(self, scheduler: Any, device: torch.device) -> None:
        from diffusers import DDPMScheduler

        config = scheduler.config
        name = type(scheduler).__name__
        if getattr(config, "num_train_timesteps", None) is None or not hasattr(
            config, "beta_schedule"
        ):
            raise ModelError(
                f"the pipeline's {name} has no beta schedule, so the noise its model was trained "
                "with is unknown: set pipe.scheduler to one of DDIM, DPM-Solver++, Euler …"
            )
        self.prediction_type: str = getattr(config, "prediction_type", "epsilon")
        if self.prediction_type not in ("epsilon", "v_prediction"):
            raise ModelError(
                f"the model predicts {self.prediction_type!r} by its {name}; training works with "
                "'epsilon' and 'v_prediction'"
            )
        # The forward process alone: how the sampler spaces or thresholds its steps does not matter.
        keys = (
            "num_train_timesteps",
            "beta_start",
            "beta_end",
            "beta_schedule",
            "trained_betas",
            "rescale_betas_zero_snr",
        )
        process = DDPMScheduler(**{key: config[key] for key in keys if key in config})
        self.num_train_timesteps: int = process.config.num_train_timesteps
        kept = process.alphas_cumprod.to(torch.float64)
        self._signal = kept.sqrt().float().to(device)
        self._noise = (1 - kept).sqrt().float().to(device)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """√ᾱ·latents + √(1−ᾱ)·noise at the timesteps [B]."""
        signal, spread = self._at(timesteps)
        return signal * latents + spread * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the model should predict: the noise, or the velocity √ᾱ·noise − √(1−ᾱ)·latents."""
        if self.prediction_type == "epsilon":
            return noise
        signal, spread = self._at(timesteps)
        return signal * noise - spread * latents

    def _at(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        return (
            self._signal[timesteps].view(-1, 1, 1, 1),
            self._noise[timesteps].view(-1, 1, 1, 1),
        )
