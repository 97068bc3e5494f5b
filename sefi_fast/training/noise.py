"""What a step draws at random, the noised latents and the targets of the noise loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sefi_fast.errors import ModelError
from sefi_fast.pipelines.support import check_scheduler


class Draw(NamedTuple):
    """Everything random of one step, on the CPU: B samples.

    timesteps: int64 [B]. view: int64 [B], which of the image's views. template: int64 [B], which
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
    within = torch.rand(batch_size, generator=generator, dtype=torch.float32)
    where = torch.arange(batch_size) + within
    timesteps = (where / batch_size * num_train_timesteps).long()
    shape = (batch_size, *latent_shape)
    return Draw(
        timesteps.clamp_(max=num_train_timesteps - 1),
        torch.randint(views, (batch_size,), generator=generator),
        torch.randint(templates, (batch_size,), generator=generator),
        torch.randn(shape, generator=generator, dtype=torch.float32),
        torch.randn(shape, generator=generator, dtype=torch.float32),
    )


class LaneDraws:
    """Random numbers of the coming step of L lanes, each from a generator of its own.

    `ahead` may draw while a device still computes; the generators' states that `states` gives are
    those before the coming step all the same.

    Args:
        generators: one a lane, on the CPU.
        buffers: where the numbers of a step go: each part of a `Draw` as [k, L, B, …] for k draws
            a step.
        settings: what `draw` takes besides the generator.
    """

    def __init__(
        self, generators: Sequence[torch.Generator], buffers: Draw, settings: Mapping[str, Any]
    ) -> None:
        self._generators = list(generators)
        self._settings = dict(settings)
        self.buffers = buffers
        self._before: list[Tensor] | None = None
        self._turn: int
        self._host_sets: list[Draw]
        self._make_host_sets()

    def ahead(self) -> None:
        """Draws the coming step, if that is not done yet."""
        if self._before is not None:
            return
        self._before = [generator.get_state() for generator in self._generators]
        # The set before the latest may still be on its way to the device.
        self._turn = (self._turn + 1) % len(self._host_sets)
        host = self._host_sets[self._turn]
        for number in range(len(self.buffers.timesteps)):
            for lane, generator in enumerate(self._generators):
                for place, part in zip(host, draw(generator, **self._settings), strict=True):
                    place[number, lane].copy_(part)

    def load(self) -> None:
        """Puts the coming step's numbers into the buffers; the one after it is the coming one."""
        self.ahead()
        self._before = None
        host = self._host_sets[self._turn]
        for buffer, place in zip(self.buffers, host, strict=True):
            if buffer is not place:
                buffer.copy_(place, non_blocking=True)

    def states(self) -> list[Tensor]:
        """The generators' states before the coming step."""
        return self._before or [generator.get_state() for generator in self._generators]

    def set_state(self, lane: int, state: Tensor) -> None:
        """Puts one lane's generator to a state of `states`."""
        self._forget()
        self._generators[lane].set_state(state)

    def keep(self, index: Sequence[int]) -> None:
        """Keeps the lanes of `index` only, in its order, with new buffers."""
        self._forget()
        self._generators = [self._generators[lane] for lane in index]
        self.buffers = Draw(*(buffer[:, : len(index)].clone() for buffer in self.buffers))
        self._make_host_sets()

    def move(self, buffers: Draw) -> None:
        """Goes on in other buffers of the same shapes."""
        self._forget()
        self.buffers = buffers
        self._make_host_sets()

    def _forget(self) -> None:
        if self._before is not None:
            for generator, state in zip(self._generators, self._before, strict=True):
                generator.set_state(state)
            self._before = None

    def _make_host_sets(self) -> None:
        self._turn = 0
        self._host_sets = [self.buffers]
        if self.buffers.noise.device.type != "cpu":
            self._host_sets = [
                Draw(*(torch.empty_like(x, device="cpu", pin_memory=True) for x in self.buffers))
                for _ in range(2)
            ]


def empty_buffers(
    draws: int, lanes: int, batch_size: int, latent_shape: tuple[int, ...], device: torch.device
) -> Draw:
    """Buffers for `LaneDraws`, on the device that computes."""
    shape = (draws, lanes, batch_size)

    def whole() -> Tensor:
        return torch.zeros(shape, dtype=torch.int64, device=device)

    def real() -> Tensor:
        return torch.zeros(*shape, *latent_shape, dtype=torch.float32, device=device)

    return Draw(whole(), whole(), whole(), real(), real())


class NoiseSchedule:
    """The forward process of a diffusers scheduler's configuration, and its target.

    Args:
        scheduler: any scheduler of the pipeline; only its configuration is read.
        device: where latents will be.

    Attributes:
        settings: of the scheduler's configuration, those that training depends on.

    Raises:
        ModelError: the model predicts something else than noise or velocity, or its scheduler has
            no betas (flow matching) or counts time by the noise's logarithm.
    """

    def __init__(self, scheduler: Any, device: torch.device) -> None:
        from diffusers import DDPMScheduler

        check_scheduler(scheduler)
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
        self.settings = {key: process.config[key] for key in keys} | {
            "prediction_type": self.prediction_type
        }
        self.num_train_timesteps: int = process.config.num_train_timesteps
        kept = process.alphas_cumprod.to(torch.float64)
        if len(kept) != self.num_train_timesteps or not bool(((kept >= 0) & (kept <= 1)).all()):
            raise ModelError(
                f"the betas of the pipeline's {name} are not a noise schedule of "
                f"{self.num_train_timesteps} steps. Numbers from 0 to 1 are wanted, one a step: "
                "set pipe.scheduler to that of the model, or get the model again"
            )
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

    def min_snr_weights(self, gamma: float) -> Tensor:
        """Weights [T] of the noise loss: min(SNR, γ) in units of the clean image's error.

        Divided by SNR for a model that predicts the noise, and by SNR + 1 for the velocity, whose
        squared errors are that many times the clean image's (Hang et al. 2023, "Efficient
        Diffusion Training via Min-SNR Weighting Strategy"). Their mean is 1, so that λ weighs the
        attention loss against the noise loss alike with and without them.
        """
        snr = (self._signal / self._noise).double().square()
        unit = snr if self.prediction_type == "epsilon" else snr + 1
        # 0/0 at zero terminal SNR, where the limit is 1.
        weights = (snr.clamp(max=gamma) / unit).nan_to_num(1.0)
        return (weights / weights.mean()).float()

    def _at(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        return (
            self._signal[timesteps].view(-1, 1, 1, 1),
            self._noise[timesteps].view(-1, 1, 1, 1),
        )
