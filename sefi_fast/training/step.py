"""The training step as one function over static buffers: called on a CPU, captured on CUDA."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sefi_fast.attention.processor import AttentionRecord, PromptState
from sefi_fast.prompts import stage_of
from sefi_fast.training.base_model import autocast
from sefi_fast.training.latents import LatentDistribution
from sefi_fast.training.losses import AttentionLoss, clear, noise_loss
from sefi_fast.training.noise import NoiseSample, NoiseSchedule
from sefi_fast.training.optimizer import BatchedAdamW
from sefi_fast.training.prompts import BatchedPrompts, batched_gather


class FrozenModels(NamedTuple):
    """The parts of a step that are not trained.

    forward: of the U-Net, perhaps compiled. record: requests to the attention layers, and their
    results. dtype: of the computation.
    """

    unet: Any
    forward: Callable[..., Any]
    text_encoders: tuple[Any, ...]
    schedule: NoiseSchedule
    record: AttentionRecord
    dtype: torch.dtype


class StepLosses(NamedTuple):
    """Noise loss and attention loss of each subject, float32 [L], differentiable."""

    noise: Tensor
    attention: Tensor


class TrainingStep:
    """One optimizer step of L subjects, from random numbers to updated parameters.

    It never waits for the device, and its operations do not depend on the random numbers, so that
    it can be captured as one CUDA graph: it reads `noise` and `state.rate`, changes `state`, and
    writes `results`. The subjects' losses are added up, and none depends on another's parameters.

    Args:
        weight: λ of the attention loss.
        time_ids: float32 [L, 6] for models with two text encoders, else None.
        timestep_weights: float32 [T] of the noise loss; None for ones.

    Attributes:
        results: float32 [3, L]: noise loss (weighted by timestep), attention loss, and 1 where the
            step was good.
    """

    def __init__(
        self,
        models: FrozenModels,
        state: BatchedAdamW,
        latents: LatentDistribution,
        prompts: BatchedPrompts,
        attention: AttentionLoss,
        weight: float,
        noise: NoiseSample,
        time_ids: Tensor | None = None,
        timestep_weights: Tensor | None = None,
    ) -> None:
        self._models, self._weight, self._timestep_weights = models, weight, timestep_weights
        self.state, self.latents, self.prompts = state, latents, prompts
        self.attention, self.noise, self.time_ids = attention, noise, time_ids
        self.results = torch.zeros(3, len(state), dtype=torch.float32, device=latents.mean.device)

    def __call__(self) -> None:
        """Take one step. It changes `state.tensors()` and `results` only."""
        rows = self.state.rows()
        count = len(self.noise.timesteps)
        gradient: Tensor | None = None
        sums = torch.zeros_like(self.results[:2])
        for batch in range(count):
            losses = self.losses(rows, NoiseSample(*(part[batch] for part in self.noise)))
            sums += torch.stack(losses).detach()
            total = (self.state.scale / count) * (losses.noise + self._weight * losses.attention)
            (grad_rows,) = torch.autograd.grad(total.sum(), rows)
            # With gradient checkpointing the backward pass has filled the records again.
            clear(self._models.record)
            gradient = grad_rows if gradient is None else gradient + grad_rows
        sums /= count
        (gradient,) = torch.autograd.grad(rows, self.state.parameters, gradient)
        loss_is_finite = torch.isfinite(sums).all(0)
        good = self.state.update(gradient, rows.detach(), loss_is_finite)
        self.results.copy_(torch.cat([sums, good.to(sums.dtype).unsqueeze(0)]))

    def losses(self, rows: Tensor, sample: NoiseSample) -> StepLosses:
        """Return the losses of tokens [L, S, 2 or 1, W, C] for one batch of numbers [L, B, …]."""
        models = self._models
        subjects, batch = sample.timesteps.shape
        timesteps = sample.timesteps.flatten()
        noise = sample.noise.flatten(0, 1)
        mean, std = (
            batched_gather(part, sample.view) for part in (self.latents.mean, self.latents.std)
        )
        latents = (mean + std * sample.latent_noise).flatten(0, 1)
        noised = models.schedule.add_noise(latents, noise, timesteps)
        stages = stage_of(sample.timesteps, rows.shape[1], models.schedule.num_train_timesteps)
        with autocast(rows.device, models.dtype):
            words = self.prompts.condition(models.text_encoders, rows, stages, sample.template)
        self.attention.request(models.record, sample.template)
        own_dtype = models.unet.dtype
        streams: Any = words.streams.to(own_dtype)
        # The training's processors know its prompts from those of other threads by this.
        PromptState(training=True).put_on(streams)
        inputs: dict[str, Any] = {"encoder_hidden_states": streams}
        if words.pooled is not None:
            assert self.time_ids is not None
            inputs["added_cond_kwargs"] = {
                "text_embeds": words.pooled.to(own_dtype),
                # Half precision rounds sizes in pixels.
                "time_ids": self.time_ids.repeat_interleave(batch, 0),
            }
        # Weights that are in half precision already need no autocast, which would only run the
        # normalizations in float32.
        casts = own_dtype != models.dtype
        with autocast(rows.device, models.dtype) if casts else nullcontext():
            prediction = models.forward(noised.to(own_dtype), timesteps, **inputs).sample
        rebuilt = noise_loss(prediction, models.schedule.target(latents, noise, timesteps))
        if self._timestep_weights is not None:
            rebuilt = rebuilt * self._timestep_weights[timesteps]
        rebuilt = rebuilt.view(subjects, batch).mean(1)
        if not self.attention.is_on:
            return StepLosses(rebuilt, torch.zeros_like(rebuilt))
        attention = self.attention.collect(models.record, sample.view)
        clear(models.record)
        return StepLosses(rebuilt, attention.view(subjects, batch).mean(1))

    def take_over(self, other: TrainingStep) -> bool:
        """Copy the subjects of another step into this one's tensors; False if they do not fit."""
        mine, theirs = self.tensors(), other.tensors()
        if {n: t.shape for n, t in mine.items()} != {n: t.shape for n, t in theirs.items()}:
            return False
        for name, tensor in mine.items():
            tensor.copy_(theirs[name])
        return True

    def keep(self, index: Tensor, noise: NoiseSample) -> None:
        """Keep the subjects of `index` only, in its order, and read `noise` from then on."""
        self.state.keep(index)
        self.latents = LatentDistribution(self.latents.mean[index], self.latents.std[index])
        self.prompts.keep(index)
        self.attention.keep(index)
        self.time_ids = None if self.time_ids is None else self.time_ids[index]
        self.noise = noise
        self.results = self.results[:, : len(index)].clone()

    def tensors(self) -> dict[str, Tensor]:
        """Return everything that belongs to the subjects, by name."""
        return {
            **({} if self.time_ids is None else {"time_ids": self.time_ids}),
            "latents.mean": self.latents.mean,
            "latents.std": self.latents.std,
            "input_ids": self.prompts.input_ids,
            "slots": self.prompts.slots,
            **{f"attention.{name}": part for name, part in self.attention.tensors.items()},
            **self.state.fixed_tensors(),
            **self.state.tensors(),
        }
