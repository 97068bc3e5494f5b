"""The training steps that sefi_fast is compared with: its method written plainly, and its peer's.

Both are written from their descriptions: docs/method.md, and diffusers' Textual Inversion examples
for Stable Diffusion and for SDXL.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sefi_fast.attention.layers import cross_attention_layers
from sefi_fast.pipelines.support import is_sdxl
from sefi_fast.prompts import encode_texts, placeholder_ids, stage_of, text_parts
from sefi_fast.subject import SubjectTokens
from sefi_fast.training import TrainConfig
from sefi_fast.training.base_model import autocast
from sefi_fast.training.latents import encode_image
from sefi_fast.training.noise import NoiseSchedule, sample_noise
from sefi_fast.training.prompts import TrainingPrompts

PLACEHOLDER = "<it>"
CLASS_WORD = "creature"


def class_ids(pipe: Any) -> list[list[int]]:
    """Token ids of the class word, here one, for each text encoder."""
    return placeholder_ids([part.tokenizer for part in text_parts(pipe)], CLASS_WORD)


def start_tokens(pipe: Any, config: TrainConfig) -> tuple[SubjectTokens, ...]:
    """A module for each text encoder, begun from the class word's row of its token table."""
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
        for part, ids in zip(text_parts(pipe), class_ids(pipe), strict=True)
    )


def training_prompts(pipe: Any, config: TrainConfig) -> TrainingPrompts:
    """The settings' sentences for every text encoder, on the pipeline's device."""
    tokenizers = [part.tokenizer for part in text_parts(pipe)]
    return TrainingPrompts(
        tokenizers, config.sentences(), PLACEHOLDER, class_ids(pipe), pipe.unet.device
    )


def size_and_crop(pipe: Any, pixels: Tensor) -> Tensor | None:
    """SDXL's time ids of an image [3, h, w] kept whole, float32 [6]; None for other models."""
    if not is_sdxl(pipe):
        return None
    height, width = pixels.shape[1:]
    ids = [height, width, 0, 0, height, width]
    return torch.tensor(ids, dtype=torch.float32, device=pipe.unet.device)


def _added(pooled: Tensor | None, time_ids: Tensor | None, dtype: torch.dtype) -> Any:
    """What SDXL's U-Net is given beside the words, for pooled embeddings [B, D]; else None."""
    if pooled is None or time_ids is None:
        return None
    return {"text_embeds": pooled.to(dtype), "time_ids": time_ids.expand(len(pooled), -1)}


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
    """The method on diffusers' own parts: maps in memory, the reference encoded every step.

    The image is encoded once, only the stages drawn are encoded, and self-attention is
    diffusers' own SDPA: nothing is slower than it need be, except for not being fused.
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
        # Of each text encoder [1, M]; the places are the same for all.
        self._ids, self._slots = [ids[:1] for ids in prompts.input_ids], prompts.slots[:1]
        self._encoders = [part.text_encoder for part in text_parts(pipe)]
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
        """Noise loss and mean subject loss of the next draw."""
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
            # That of the V sequence (docs/method.md §4).
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
    """A step as diffusers' Textual Inversion examples take it, without an attention loss.

    The image and the prompt are encoded every step, the whole token table of each text encoder
    is in AdamW with weight decay, and all rows but the placeholder's are put back after the update.
    """

    def __init__(self, pipe: Any, config: TrainConfig, pixels: Tensor, dtype: torch.dtype) -> None:
        self.pipe, self.config, self.dtype = pipe, config, dtype
        self.device = pipe.unet.device
        views = torch.stack([pixels, pixels.flip(-1)])
        self._views = views.to(self.device, dtype)
        self._generator = torch.Generator().manual_seed(config.seed)
        self._schedule = NoiseSchedule(pipe.scheduler, self.device)
        # The class word's own row serves as the placeholder's, which costs the same.
        self._rows = class_ids(pipe)
        self._sentence = config.sentences()[0].replace("{}", CLASS_WORD)
        self._time_ids = size_and_crop(pipe, pixels)
        self._tables = [
            part.text_encoder.get_input_embeddings().weight.requires_grad_(True)
            for part in text_parts(pipe)
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
        """[B, M, C], and of SDXL's second text encoder the pooled embedding [B, D]."""
        parts = text_parts(self.pipe)
        outputs = []
        for tokenizer, encoder in parts:
            ids = tokenizer(
                [self._sentence] * size, padding="max_length", truncation=True, return_tensors="pt"
            ).input_ids
            outputs.append(encoder(ids.to(self.device), output_hidden_states=len(parts) > 1))
        if len(parts) == 1:
            return outputs[0][0], None
        return torch.cat([output.hidden_states[-2] for output in outputs], -1), outputs[-1][0]
