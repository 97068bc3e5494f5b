"""Training steps to compare: sefi_fast's, its method written plainly, and Textual Inversion's.

The plain step follows docs/method.md. Textual Inversion follows diffusers' examples for Stable
Diffusion and for SDXL.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sefi_fast.attention.layers import cross_attention_layers
from sefi_fast.prompts import encode_texts, placeholder_ids, stage_of, text_encoders
from sefi_fast.prompts.text_encoder import is_sdxl
from sefi_fast.subject import SubjectTokens
from sefi_fast.training import TrainConfig, prepare
from sefi_fast.training.base_model import BaseModel, autocast, frozen
from sefi_fast.training.engine import Engine, SubjectInputs
from sefi_fast.training.latents import encode_image
from sefi_fast.training.noise import NoiseSchedule, sample_noise
from sefi_fast.training.prompts import TrainingPrompts

PLACEHOLDER = "<it>"
CLASS_WORD = "creature"


def training_image(size: int) -> Tensor:
    """Return the image [3, size, size] in [-1, 1] that every provider trains on."""
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    return prepare(Image.fromarray(noise).resize((size, size), Image.Resampling.BICUBIC), size)


def class_ids(pipe: Any) -> list[list[int]]:
    """Return the token ids of the class word, here one, for each text encoder."""
    return placeholder_ids([part.tokenizer for part in text_encoders(pipe)], CLASS_WORD)


def start_tokens(pipe: Any, config: TrainConfig) -> tuple[SubjectTokens, ...]:
    """Return a module for each text encoder, initialized from the class word's embedding."""
    generator = torch.Generator().manual_seed(config.seed)
    return tuple(
        SubjectTokens(
            part.text_encoder.get_input_embeddings().weight[ids].detach().float(),
            stages=config.stages,
            split=config.split,
            train_base=config.train_base,
            module=config.module,
            generator=generator,
        ).to(pipe.unet.device)
        for part, ids in zip(text_encoders(pipe), class_ids(pipe), strict=True)
    )


def training_prompts(pipe: Any, config: TrainConfig) -> TrainingPrompts:
    """Return the settings' sentences for every text encoder, on the pipeline's device."""
    tokenizers = [part.tokenizer for part in text_encoders(pipe)]
    return TrainingPrompts(
        tokenizers, config.sentences(), PLACEHOLDER, class_ids(pipe), pipe.unet.device
    )


def size_and_crop(pipe: Any, pixels: Tensor) -> Tensor | None:
    """Return SDXL's time ids of an uncropped image [3, h, w], float32 [6]; else None."""
    if not is_sdxl(pipe):
        return None
    height, width = pixels.shape[1:]
    ids = [height, width, 0, 0, height, width]
    return torch.tensor(ids, dtype=torch.float32, device=pipe.unet.device)


def _added(pooled: Tensor | None, time_ids: Tensor | None, dtype: torch.dtype) -> Any:
    """Return the added conditions of SDXL's U-Net for pooled embeddings [B, D]; else None."""
    if pooled is None or time_ids is None:
        return None
    return {"text_embeds": pooled.to(dtype), "time_ids": time_ids.expand(len(pooled), -1)}


class SefiStep:
    """sefi_fast's training step on a ready pipeline, set up as `sefi_fast.train` does it."""

    def __init__(self, pipe: Any, config: TrainConfig, pixels: Tensor, dtype: torch.dtype) -> None:
        device = pipe.unet.device
        latents = encode_image(pipe.vae, pixels, config.flip)
        # Released as `train` does it: the latents are enough.
        pipe.vae = None
        # Never closed: no other step uses these models.
        self._models = ExitStack()
        base = BaseModel(pipe, "random weights", None, device, dtype, owned=True)
        self._models.enter_context(frozen(base, config))
        subject = SubjectInputs(
            start_tokens(pipe, config),
            latents,
            training_prompts(pipe, config),
            config.seed,
            time_ids=size_and_crop(pipe, pixels),
        )
        self.engine = Engine(
            unet=pipe.unet,
            text_encoders=base.text_encoders,
            scheduler=pipe.scheduler,
            subjects=[subject],
            config=config,
            dtype=dtype,
        )

    def __call__(self) -> tuple[float, float]:
        (result,) = self.engine.step()
        assert result is not None
        return result.noise, result.subject_loss


class _MapsProcessor:
    """Cross-attention that forms both maps of equation 5 in memory."""

    def __init__(self, step: dict[str, Any]) -> None:
        self._step = step

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        step = self._step

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(2, (attn.heads, -1)).transpose(1, 2)

        query = heads(attn.to_q(hidden_states))
        key, value = heads(attn.to_k(step["key"])), heads(attn.to_v(step["value"]))
        target = (query @ key.mT * attn.scale).softmax(-1)
        with torch.no_grad():
            reference_key = heads(attn.to_k(step["reference"]))
            reference = (query @ reference_key.mT * attn.scale).softmax(-1)
        difference = (target - reference).float()
        step["subject_losses"].append(difference.square().sum((2, 3)).mean())
        return attn.to_out[0]((target @ value).transpose(1, 2).flatten(2))


class PlainStep:
    """The method on diffusers' parts: maps in memory, the reference encoded every step.

    The image is encoded once, only sampled stages are encoded, and self-attention is diffusers'
    SDPA: only the missing fusion makes it slower.
    """

    def __init__(self, pipe: Any, config: TrainConfig, pixels: Tensor, dtype: torch.dtype) -> None:
        self.pipe, self.config, self.dtype = pipe, config, dtype
        self.device = pipe.unet.device
        with torch.no_grad():
            self.latents = encode_image(pipe.vae, pixels, config.flip)
        pipe.vae = None
        self._step: dict[str, Any] = {}
        for attn in cross_attention_layers(pipe.unet).values():
            attn.set_processor(_MapsProcessor(self._step))
        prompts = training_prompts(pipe, config)
        # [1, M] for each text encoder; the positions are the same for all.
        self._ids, self._slots = [ids[:1] for ids in prompts.input_ids], prompts.slots[:1]
        self._encoders = [part.text_encoder for part in text_encoders(pipe)]
        self._time_ids = size_and_crop(pipe, pixels)
        self.tokens = start_tokens(pipe, config)
        self._schedule = NoiseSchedule(pipe.scheduler, self.device)
        self._weights = (
            None if config.snr_gamma is None else self._schedule.min_snr_weights(config.snr_gamma)
        )
        self._generator = torch.Generator().manual_seed(config.seed)
        groups = [g for one in self.tokens for g in one.parameter_groups(config.learning_rate)]
        self._optimizer = torch.optim.AdamW(groups, weight_decay=0.0)

    def __call__(self) -> tuple[float, float]:
        noise, subject_loss = self.terms()
        loss = noise + self.config.weight_lambda * subject_loss
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        return float(noise.detach()), float(subject_loss.detach())

    def terms(self) -> tuple[Tensor, Tensor]:
        """Return noise loss and mean subject loss of the next noise sample."""
        config, schedule, step = self.config, self._schedule, self._step
        drawn = sample_noise(
            self._generator,
            batch_size=config.batch_size,
            num_train_timesteps=schedule.num_train_timesteps,
            views=self.latents.views,
            templates=1,
            latent_shape=tuple(self.latents.mean.shape[1:]),
        )
        view, timesteps, latent_noise, noise = (
            part.to(self.device)
            for part in (drawn.view, drawn.timesteps, drawn.latent_noise, drawn.noise)
        )
        latents = self.latents.sample(view, latent_noise)
        noised = schedule.add_noise(latents, noise, timesteps)
        stages = stage_of(timesteps, config.stages, schedule.num_train_timesteps)
        rows = [module()[stages].flatten(0, 1) for module in self.tokens]
        count = len(rows[0])
        with autocast(self.device, self.dtype):
            encoded, pooled = encode_texts(
                self._encoders,
                [ids.expand(count, -1) for ids in self._ids],
                self._slots.expand(count, -1),
                rows,
            )
            with torch.no_grad():
                reference, _ = encode_texts(self._encoders, self._ids)
        encoded = encoded.unflatten(0, (config.batch_size, -1))
        step["key"], step["value"] = encoded[:, 0].to(self.dtype), encoded[:, -1].to(self.dtype)
        step["reference"] = reference.expand(config.batch_size, -1, -1).to(self.dtype)
        step["subject_losses"] = []
        if pooled is not None:
            # The one of the V sequence (docs/method.md §4).
            pooled = pooled.unflatten(0, (config.batch_size, -1))[:, -1]
        prediction = self.pipe.unet(
            noised.to(self.dtype),
            timesteps,
            encoder_hidden_states=step["key"],
            added_cond_kwargs=_added(pooled, self._time_ids, self.dtype),
        ).sample
        target = schedule.target(latents, noise, timesteps)
        errors = (prediction.float() - target.float()).square().flatten(1).mean(1)
        if self._weights is not None:
            errors = errors * self._weights[timesteps]
        return errors.mean(), torch.stack(step["subject_losses"]).mean()


class TextualInversionStep:
    """A step of diffusers' Textual Inversion examples, without an attention loss.

    The image and the prompt are encoded every step, the whole token table of each text encoder
    is in AdamW with weight decay, and all rows except the placeholder's are reset after the update.
    """

    def __init__(self, pipe: Any, config: TrainConfig, pixels: Tensor, dtype: torch.dtype) -> None:
        self.pipe, self.config, self.dtype = pipe, config, dtype
        self.device = pipe.unet.device
        views = torch.stack([pixels, pixels.flip(-1)])
        self._views = views.to(self.device, dtype)
        self._generator = torch.Generator().manual_seed(config.seed)
        self._schedule = NoiseSchedule(pipe.scheduler, self.device)
        # The class word's row is used as the placeholder's, at the same cost.
        self._rows = class_ids(pipe)
        self._sentence = config.sentences()[0].replace("{}", CLASS_WORD)
        self._time_ids = size_and_crop(pipe, pixels)
        self._tables = [
            part.text_encoder.get_input_embeddings().weight.requires_grad_(True)
            for part in text_encoders(pipe)
        ]
        self._originals = [table.detach().clone() for table in self._tables]
        self._optimizer = torch.optim.AdamW(self._tables, lr=config.learning_rate)

    def __call__(self) -> tuple[float, float]:
        pipe, size = self.pipe, self.config.batch_size
        view = torch.randint(len(self._views), (size,), generator=self._generator)
        latents = pipe.vae.encode(self._views[view.to(self.device)]).latent_dist.sample()
        latents = latents.detach() * pipe.vae.config.scaling_factor
        noise = torch.randn_like(latents)
        steps = self._schedule.num_train_timesteps
        timesteps = torch.randint(steps, (size,), device=self.device)
        noised = self._schedule.add_noise(latents, noise, timesteps)
        with autocast(self.device, self.dtype):
            encoded, pooled = self._encode(size)
        added = _added(pooled, self._time_ids, self.dtype)
        prediction = pipe.unet(
            noised.to(self.dtype), timesteps, encoded.to(self.dtype), added_cond_kwargs=added
        ).sample
        target = self._schedule.target(latents, noise, timesteps)
        loss = torch.nn.functional.mse_loss(prediction.float(), target.float())
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        for table, originals, row in zip(self._tables, self._originals, self._rows, strict=True):
            others = torch.ones(len(table), dtype=torch.bool)
            others[row] = False
            with torch.no_grad():
                table[others] = originals[others]
        return float(loss.detach()), 0.0

    def _encode(self, size: int) -> tuple[Tensor, Tensor | None]:
        """Return [B, M, C], and the pooled embedding [B, D] of SDXL's second text encoder."""
        parts = text_encoders(self.pipe)
        outputs = []
        for tokenizer, encoder in parts:
            ids = tokenizer(
                [self._sentence] * size, padding="max_length", truncation=True, return_tensors="pt"
            ).input_ids
            outputs.append(encoder(ids.to(self.device), output_hidden_states=len(parts) > 1))
        if len(parts) == 1:
            return outputs[0][0], None
        return torch.cat([output.hidden_states[-2] for output in outputs], -1), outputs[-1][0]
