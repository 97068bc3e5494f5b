"""One training step: the loss of drawn samples, its gradient in the tokens, the update."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sefi_fast.attention_record import AttentionRecord
from sefi_fast.conditioning import stage_of
from sefi_fast.layers import cross_attention_layers, layer_resolutions
from sefi_fast.pipelines.families import unwrap
from sefi_fast.subject import SubjectTokens
from sefi_fast.training.borrow import TrainingProcessors
from sefi_fast.training.config import TrainConfig
from sefi_fast.training.latents import LatentDistribution
from sefi_fast.training.losses import alignment_loss, noise_loss
from sefi_fast.training.noise import Draw, NoiseSchedule, draw
from sefi_fast.training.precision import autocast
from sefi_fast.training.prompts import TrainingPrompts


class StepLoss(NamedTuple):
    """Scalars on the device: the noise loss, and the alignment (None when λ is 0)."""

    noise: Tensor
    alignment: Tensor | None


class StepResult(NamedTuple):
    """One step's numbers; `finite` is False when it changed nothing."""

    noise: float
    alignment: float
    finite: bool


class Engine:
    """Trains a subject's tokens against frozen models, one step a call.

    Args:
        unet: frozen, on its device.
        text_encoder: frozen, on its device.
        scheduler: of the pipeline, for its noise schedule and prediction type.
        tokens: the trained module.
        latents: of the picture.
        prompts: the training sentences.
        config: the settings.
        dtype: what the frozen models compute in.

    Raises:
        ModelError: the scheduler's configuration cannot be trained on.
        ValueError: `loss_resolutions` names a side that no layer has.
    """

    def __init__(
        self,
        *,
        unet: Any,
        text_encoder: Any,
        scheduler: Any,
        tokens: SubjectTokens,
        latents: LatentDistribution,
        prompts: TrainingPrompts,
        config: TrainConfig,
        dtype: torch.dtype,
    ) -> None:
        self._unet = unwrap(unet)
        self._text_encoder = text_encoder
        self._tokens = tokens
        self._latents = latents
        self._prompts = prompts
        self._config = config
        self._device = latents.mean.device
        self._dtype = dtype
        self._schedule = NoiseSchedule(scheduler, self._device)
        self._generator = torch.Generator().manual_seed(config.seed)
        self._record = AttentionRecord()
        self._references = self._project_references() if config.weight_lambda > 0 else {}
        self.processors = TrainingProcessors(
            unet, self._record, config.attention_backend, config.self_attention
        )
        self._optimizer = torch.optim.AdamW(
            tokens.parameter_groups(config.learning_rate), weight_decay=0.0
        )
        self._rates = [group["lr"] for group in self._optimizer.param_groups]
        scales = dtype == torch.float16
        self._scaler = torch.amp.GradScaler(self._device.type, init_scale=2.0**12, enabled=scales)
        self._started = 0
        self._evaluated = self.last_good = tokens().detach().clone()

    def draw(self) -> Draw:
        """The next step's random numbers."""
        return draw(
            self._generator,
            batch_size=self._config.batch_size,
            num_train_timesteps=self._schedule.num_train_timesteps,
            views=self._latents.views,
            templates=len(self._prompts),
            latent_shape=tuple(self._latents.mean.shape[1:]),
        )

    def loss(self, drawn: Draw) -> StepLoss:
        """Both terms of equation 6 for one draw, differentiable in the tokens.

        To be called, and its gradient taken, with the processors in place.
        """
        view, timesteps, latent_noise, noise = (
            part.to(self._device, non_blocking=True)
            for part in (drawn.view, drawn.timesteps, drawn.latent_noise, drawn.noise)
        )
        latents = self._latents.sample(view, latent_noise)
        noised = self._schedule.add_noise(latents, noise, timesteps)
        stages = stage_of(drawn.timesteps, self._tokens.stages, self._schedule.num_train_timesteps)
        rows = self._tokens()
        self._evaluated = rows.detach().clone()
        with autocast(self._device, self._dtype):
            streams = self._prompts.streams(self._text_encoder, rows, stages, drawn.template)
        self._hand_out_references(drawn.template)
        own_dtype = self._unet.dtype
        # Weights that are in half precision already need no autocast, which would only run the
        # normalisations in float32.
        casting = autocast(self._device, self._dtype) if own_dtype != self._dtype else nullcontext()
        with casting:
            # forward, not a call: a stage hook of attached subjects must not see these streams.
            prediction = self._unet.forward(
                noised.to(own_dtype), timesteps, encoder_hidden_states=streams.to(own_dtype)
            ).sample
        rebuilt = noise_loss(prediction, self._schedule.target(latents, noise, timesteps))
        if not self._references:
            return StepLoss(rebuilt, None)
        alignments = []
        for name in self._references:
            layer = self._record.layer(name)
            assert layer.alignment is not None
            alignments.append(layer.alignment)
            # The record must not keep the step's graph alive until the next one.
            layer.alignment = None
        return StepLoss(rebuilt, alignment_loss(alignments))

    def step(self) -> StepResult:
        """Draw, compute the loss and its gradient, and update the tokens if all is finite."""
        self._set_rates()
        self._started += 1
        self._optimizer.zero_grad(set_to_none=True)
        with self.processors.in_place():
            result = self._backward(self.loss(self.draw()))
        if result.finite:
            self._scaler.step(self._optimizer)
            self._scaler.update()
        return result

    def current(self) -> Tensor:
        """The tokens as they are now, float32 [S, 2 or 1, C] on the CPU.

        If the latest update took them out of the numbers, the last ones that gave a finite loss.
        """
        rows = self._tokens().detach().clone()
        return (rows if bool(torch.isfinite(rows).all()) else self.last_good).cpu()

    def _backward(self, terms: StepLoss) -> StepResult:
        total = terms.noise
        if terms.alignment is not None:
            total = total + self._config.weight_lambda * terms.alignment
        # One transfer, and so one wait for the device, a step.
        noise, alignment = torch.stack(
            [terms.noise, total if terms.alignment is None else terms.alignment]
        ).tolist()
        if terms.alignment is None:
            alignment = 0.0
        if not (math.isfinite(noise) and math.isfinite(alignment)):
            return StepResult(noise, alignment, False)
        self.last_good = self._evaluated
        self._scaler.scale(total).backward()
        for _, layer in self._record.items():
            # Under checkpointing the backward pass has filled it once more.
            layer.alignment = None
        # An overflow of scaled gradients is the scaler's affair: it skips the update itself.
        finite = self._scaler.is_enabled() or self._gradients_are_finite()
        return StepResult(noise, alignment, finite)

    def _set_rates(self) -> None:
        factor = 1.0
        if self._config.schedule == "cosine":
            factor = 0.5 * (1 + math.cos(math.pi * self._started / self._config.steps))
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor

    def _gradients_are_finite(self) -> bool:
        gradients = [p.grad for p in self._tokens.parameters() if p.grad is not None]
        return all(bool(torch.isfinite(gradient).all()) for gradient in gradients)

    def _project_references(self) -> dict[str, Tensor]:
        """W^k c_r of every layer that carries the attention loss, [P, M, inner]."""
        layers = cross_attention_layers(self._unet)
        chosen = self._chosen_layers()
        references = {}
        with torch.no_grad(), autocast(self._device, self._dtype):
            reference = self._prompts.reference(self._text_encoder)
            for name in chosen:
                attn = layers[name]
                prompt = reference.to(self._unet.dtype)
                if attn.norm_cross is not None:
                    prompt = attn.norm_encoder_hidden_states(prompt)
                references[name] = attn.to_k(prompt)
        return references

    def _chosen_layers(self) -> list[str]:
        wanted = self._config.loss_resolutions
        factors = layer_resolutions(self._unet)
        if wanted is None:
            return list(factors)
        sides = {
            name: math.ceil(max(self._latents.mean.shape[-2:]) / factor)
            for name, factor in factors.items()
        }
        missing = sorted(set(wanted) - set(sides.values()))
        if missing:
            present = ", ".join(str(side) for side in sorted(set(sides.values())))
            raise ValueError(
                f"loss_resolutions names {', '.join(map(str, missing))}, but at this resolution "
                f"the attention maps have the sides {present}"
            )
        return [name for name, side in sides.items() if side in wanted]

    def _hand_out_references(self, templates: Tensor) -> None:
        for name, keys in self._references.items():
            layer = self._record.layer(name)
            layer.reference_grad = self._config.reference_grad
            layer.reference_key = keys if len(keys) == 1 else keys[templates.to(keys.device)]
