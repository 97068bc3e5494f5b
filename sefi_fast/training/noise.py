"""Random numbers of a training step, the noised latents and the targets of the noise loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sefi_fast.errors import ModelError
from sefi_fast.pipelines.support import check_scheduler


class NoiseSample(NamedTuple):
    """All random numbers of one step of B samples, on the CPU.

    timesteps: int64 [B]. view: int64 [B], index of the image's view. template: int64 [B], index of
    the training sentence. latent_noise, noise: float32 [B, C, h, w], standard normal.
    """

    timesteps: Tensor
    view: Tensor
    template: Tensor
    latent_noise: Tensor
    noise: Tensor


def sample_noise(
    generator: torch.Generator,
    *,
    batch_size: int,
    num_train_timesteps: int,
    views: int,
    templates: int,
    latent_shape: tuple[int, ...],
) -> NoiseSample:
    """Sample one step. Timesteps are stratified, one in each of B equal parts of [0, T).

    The numbers come from the CPU on every device, so that a seed gives the same everywhere and the
    host knows the stages without waiting for the device.
    """
    within = torch.rand(batch_size, generator=generator, dtype=torch.float32)
    where = torch.arange(batch_size) + within
    timesteps = (where / batch_size * num_train_timesteps).long()
    shape = (batch_size, *latent_shape)
    return NoiseSample(
        timesteps.clamp_(max=num_train_timesteps - 1),
        torch.randint(views, (batch_size,), generator=generator),
        torch.randint(templates, (batch_size,), generator=generator),
        torch.randn(shape, generator=generator, dtype=torch.float32),
        torch.randn(shape, generator=generator, dtype=torch.float32),
    )


class NoiseSampler:
    """Random numbers of the coming step of L subjects, each from its own generator.

    `prefetch` may run while the device is busy. `states` always returns the generators' states
    before the coming step.

    Args:
        generators: one for each subject, on the CPU.
        buffers: the numbers of a step: each part of a `NoiseSample` as [k, L, B, …] for k batches.
        sample: `sample_noise` with all arguments but the generator.
    """

    def __init__(
        self,
        generators: Sequence[torch.Generator],
        buffers: NoiseSample,
        sample: Callable[[torch.Generator], NoiseSample],
    ) -> None:
        self._generators = list(generators)
        self._sample = sample
        self._before: list[Tensor] | None = None
        self._make_host_buffers(buffers)

    def prefetch(self) -> None:
        """Sample the coming step, unless that is done."""
        if self._before is not None:
            return
        self._before = [generator.get_state() for generator in self._generators]
        # The buffers before the latest may still be on their way to the device.
        self._host.reverse()
        for batch in range(len(self.buffers.timesteps)):
            for row, generator in enumerate(self._generators):
                for place, part in zip(self._host[0], self._sample(generator), strict=True):
                    place[batch, row].copy_(part)

    def load(self) -> None:
        """Put the coming step's numbers into the buffers; the one after it is the coming one."""
        self.prefetch()
        self._before = None
        for buffer, place in zip(self.buffers, self._host[0], strict=True):
            if buffer is not place:
                buffer.copy_(place, non_blocking=True)

    def states(self) -> list[Tensor]:
        """Return the generators' states before the coming step."""
        return self._before or [generator.get_state() for generator in self._generators]

    def set_state(self, row: int, state: Tensor) -> None:
        """Put the generator of one subject to a state of `states`."""
        self._forget()
        self._generators[row].set_state(state)

    def keep(self, index: Sequence[int]) -> None:
        """Keep the subjects of `index` only, in its order, with new buffers."""
        self._forget()
        self._generators = [self._generators[row] for row in index]
        self._make_host_buffers(
            NoiseSample(*(buffer[:, : len(index)].clone() for buffer in self.buffers))
        )

    def move(self, buffers: NoiseSample) -> None:
        """Go on in other buffers of the same shapes."""
        self._forget()
        self._make_host_buffers(buffers)

    def _forget(self) -> None:
        if self._before is not None:
            for generator, state in zip(self._generators, self._before, strict=True):
                generator.set_state(state)
            self._before = None

    def _make_host_buffers(self, buffers: NoiseSample) -> None:
        self.buffers = buffers
        self._host = [buffers]
        if buffers.noise.device.type != "cpu":
            self._host = [
                NoiseSample(*(torch.empty_like(x, device="cpu", pin_memory=True) for x in buffers))
                for _ in range(2)
            ]


def empty_buffers(
    shape: tuple[int, int, int], latent_shape: tuple[int, ...], device: torch.device
) -> NoiseSample:
    """Return buffers for `NoiseSampler`: batches, subjects and samples on the computing device."""
    whole = [torch.zeros(shape, dtype=torch.int64, device=device) for _ in range(3)]
    sizes = (*shape, *latent_shape)
    real = [torch.zeros(sizes, dtype=torch.float32, device=device) for _ in range(2)]
    return NoiseSample(*whole, *real)


class NoiseSchedule:
    """The forward process of a diffusers scheduler's configuration, and its target.

    The square roots are rounded from float64. `DDPMScheduler.add_noise` and `get_velocity`, and
    diffusers' `compute_snr`, take them in float32: their results differ in the last bit.

    Args:
        scheduler: any scheduler of the pipeline; only its configuration is read.
        device: of the latents.

    Attributes:
        settings: the part of the scheduler's configuration that training depends on.
    """

    def __init__(self, scheduler: Any, device: torch.device) -> None:
        from diffusers import DDPMScheduler

        check_scheduler(scheduler)
        config = scheduler.config
        name = type(scheduler).__name__
        if config.get("num_train_timesteps") is None or "beta_schedule" not in config:
            raise ModelError(
                f"the pipeline's {name} has no beta schedule, so the noise its model was trained "
                "with is unknown: set pipe.scheduler to one of DDIM, DPM-Solver++, Euler …"
            )
        self.prediction_type: str = config.get("prediction_type", "epsilon")
        if self.prediction_type not in ("epsilon", "v_prediction"):
            raise ModelError(
                f"the model predicts {self.prediction_type!r} by its {name}; training works with "
                "'epsilon' and 'v_prediction'"
            )
        # The forward process alone: how the sampler spaces or thresholds its steps does not matter.
        keys = (
            "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas",
            "rescale_betas_zero_snr",
        )  # fmt: skip
        process = DDPMScheduler(**{key: config[key] for key in keys if key in config})
        self.settings = {key: process.config[key] for key in keys} | {
            "prediction_type": self.prediction_type
        }
        self.num_train_timesteps: int = process.config.num_train_timesteps
        kept = process.alphas_cumprod.to(torch.float64)
        if len(kept) != self.num_train_timesteps or not bool(((kept >= 0) & (kept <= 1)).all()):
            raise ModelError(
                f"the betas of the pipeline's {name} are not a noise schedule of "
                f"{self.num_train_timesteps} steps. Numbers from 0 to 1 are wanted, one for each "
                "step: set pipe.scheduler to that of the model, or get the model again"
            )
        self._signal = kept.sqrt().float().to(device)
        self._noise = (1 - kept).sqrt().float().to(device)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return √ᾱ·latents + √(1−ᾱ)·noise at the timesteps [B]."""
        signal, spread = self._at(timesteps)
        return signal * latents + spread * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the target: the noise, or the velocity √ᾱ·noise − √(1−ᾱ)·latents."""
        if self.prediction_type == "epsilon":
            return noise
        signal, spread = self._at(timesteps)
        return signal * noise - spread * latents

    def min_snr_weights(self, gamma: float) -> Tensor:
        """Return weights [T] of the noise loss: min(SNR, γ) in units of the clean image's error.

        Divided by SNR for a model that predicts the noise, and by SNR + 1 for the velocity, whose
        squared errors are that many times the clean image's (Hang et al. 2023, "Efficient
        Diffusion Training via Min-SNR Weighting Strategy"). Their mean is 1, so that λ weighs the
        attention loss against the noise loss alike with and without them.
        """
        snr = (self._signal / self._noise).double().square()
        unit = snr if self.prediction_type == "epsilon" else snr + 1
        # 0/0 at zero terminal SNR, where the limit is 1.
        weights = (snr.clamp(max=gamma) / unit).nan_to_num(1.0)
        normalized: Tensor = weights / weights.mean()
        return normalized.float()

    def _at(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        return (
            self._signal[timesteps].view(-1, 1, 1, 1),
            self._noise[timesteps].view(-1, 1, 1, 1),
        )
