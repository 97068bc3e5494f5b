"""The training step as one function over static buffers: called on a CPU, captured on CUDA."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sefi_fast.attention.processor import PromptState
from sefi_fast.prompts import stage_of
from sefi_fast.training.base_model import autocast
from sefi_fast.training.latents import LatentDistribution
from sefi_fast.training.losses import AttentionTerm, noise_loss
from sefi_fast.training.noise import Draw, NoiseSchedule
from sefi_fast.training.optimizer import LaneState
from sefi_fast.training.prompts import LanePrompts, take


class FrozenModels(NamedTuple):
    """What is not trained. dtype: what it computes in. forward: of the U-Net, perhaps compiled."""

    unet: Any
    forward: Callable[..., Any]
    text_encoders: tuple[Any, ...]
    schedule: NoiseSchedule
    dtype: torch.dtype


class LaneTerms(NamedTuple):
    """Noise loss and attention term of each lane, float32 [L], differentiable."""

    noise: Tensor
    attention: Tensor


class TrainingStep:
    """Draws to updated parameters, for L lanes at once.

    Nothing in it waits for the device or depends on the numbers drawn, so that it can be captured
    as one graph: it reads `draws` and `state.rate`, changes `state`, and leaves its numbers in
    `results`. The lanes' losses are added up, and no lane's loss depends on another lane's
    parameters, so that each gradient is that of the lane alone.

    Args:
        weight: λ of the attention term.
        time_ids: float32 [L, 6] for models with two text encoders, else None.
        timestep_weights: float32 [T] of the noise loss; None for ones.

    Attributes:
        results: float32 [3, L]: noise loss (weighted by timestep), attention term, and 1 where the
            step was good.
    """

    def __init__(
        self,
        models: FrozenModels,
        state: LaneState,
        latents: LatentDistribution,
        prompts: LanePrompts,
        attention: AttentionTerm,
        weight: float,
        draws: Draw,
        time_ids: Tensor | None = None,
        timestep_weights: Tensor | None = None,
    ) -> None:
        self._models = models
        self.state, self.latents, self.prompts = state, latents, prompts
        self.attention = attention
        self._weight = weight
        self.draws = draws
        self.time_ids = time_ids
        self._timestep_weights = timestep_weights
        self.results = torch.zeros(3, len(state), dtype=torch.float32, device=latents.mean.device)

    def __call__(self) -> None:
        """One step: every tensor it changes is one of `state.tensors()` or `results`."""
        rows = self.state.rows()
        count = len(self.draws.timesteps)
        gradient: Tensor | None = None
        sums = torch.zeros_like(self.results[:2])
        for number in range(count):
            terms = self.terms(rows, Draw(*(part[number] for part in self.draws)))
            sums += torch.stack(terms).detach()
            total = (self.state.scale / count) * (terms.noise + self._weight * terms.attention)
            (grad_rows,) = torch.autograd.grad(total.sum(), rows)
            # Under checkpointing the backward pass has filled the records once more.
            self.attention.clear()
            gradient = grad_rows if gradient is None else gradient + grad_rows
        sums /= count
        (gradient,) = torch.autograd.grad(rows, self.state.parameters, gradient)
        loss_is_finite = torch.isfinite(sums).all(0)
        good = self.state.update(gradient, rows.detach(), loss_is_finite)
        self.results.copy_(torch.cat([sums, good.to(sums.dtype).unsqueeze(0)]))

    def terms(self, rows: Tensor, draw: Draw) -> LaneTerms:
        """Both terms of the loss for tokens [L, S, 2 or 1, W, C] and one draw of [L, B, …]."""
        models = self._models
        device = rows.device
        lanes, batch = draw.timesteps.shape
        timesteps = draw.timesteps.flatten()
        noise = draw.noise.flatten(0, 1)
        latents = self._latents_of(draw)
        noised = models.schedule.add_noise(latents, noise, timesteps)
        stages = stage_of(draw.timesteps, rows.shape[1], models.schedule.num_train_timesteps)
        with autocast(device, models.dtype):
            words = self.prompts.condition(models.text_encoders, rows, stages, draw.template)
        self.attention.ask(draw.template)
        own_dtype = models.unet.dtype
        # Weights that are in half precision already need no autocast, which would only run the
        # normalisations in float32.
        casting = autocast(device, models.dtype) if own_dtype != models.dtype else nullcontext()
        streams: Any = words.streams.to(own_dtype)
        # The training's processors leave prompts of other threads to the processors before.
        PromptState(training=True).put_on(streams)
        given: dict[str, Any] = {"encoder_hidden_states": streams}
        if words.pooled is not None:
            assert self.time_ids is not None
            given["added_cond_kwargs"] = {
                "text_embeds": words.pooled.to(own_dtype),
                # Not in half precision, which rounds sizes in pixels.
                "time_ids": self.time_ids.repeat_interleave(batch, 0),
            }
        with casting:
            prediction = models.forward(noised.to(own_dtype), timesteps, **given).sample
        rebuilt = noise_loss(prediction, models.schedule.target(latents, noise, timesteps))
        if self._timestep_weights is not None:
            rebuilt = rebuilt * self._timestep_weights[timesteps]
        rebuilt = rebuilt.view(lanes, batch).mean(1)
        if not self.attention.is_on:
            return LaneTerms(rebuilt, torch.zeros_like(rebuilt))
        return LaneTerms(rebuilt, self.attention.collect(draw.view).view(lanes, batch).mean(1))

    def _latents_of(self, draw: Draw) -> Tensor:
        mean, std = (take(part, draw.view) for part in (self.latents.mean, self.latents.std))
        return (mean + std * draw.latent_noise).flatten(0, 1)

    def take_over(self, other: TrainingStep) -> bool:
        """Copies another step's lanes into this one's tensors; False if they do not fit."""
        mine, theirs = self._tensors(), other._tensors()
        shapes, wanted = ({n: t.shape for n, t in some.items()} for some in (mine, theirs))
        if shapes != wanted:
            return False
        for name, tensor in mine.items():
            tensor.copy_(theirs[name])
        return True

    def keep(self, index: Tensor, draws: Draw) -> None:
        """Keeps the lanes of `index` only, in its order, reading `draws` from now on."""
        self.state.keep(index)
        self.latents = LatentDistribution(self.latents.mean[index], self.latents.std[index])
        self.prompts.keep(index)
        self.attention.keep(index)
        self.time_ids = None if self.time_ids is None else self.time_ids[index]
        self.draws = draws
        self.results = self.results[:, : len(index)].clone()

    def _tensors(self) -> dict[str, Tensor]:
        """Everything that belongs to the lanes, by name."""
        time_ids = {} if self.time_ids is None else {"time_ids": self.time_ids}
        return {
            **time_ids,
            "latents.mean": self.latents.mean,
            "latents.std": self.latents.std,
            "input_ids": self.prompts.input_ids,
            "slots": self.prompts.slots,
            **{f"attention.{name}": part for name, part in self.attention.tensors().items()},
            **self.state.fixed_tensors(),
            **self.state.tensors(),
        }
