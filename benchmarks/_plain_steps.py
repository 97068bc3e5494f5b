"""The training steps that sefi_fast is compared with: its method written plainly, and its peer's.

Both are written from their descriptions, docs/method.md and diffusers' Textual Inversion example.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sefi_fast.conditioning import class_token_id, encode_text, stage_of, tokenize_prompts
from sefi_fast.layers import cross_attention_layers
from sefi_fast.subject import SubjectTokens
from sefi_fast.training import TrainConfig
from sefi_fast.training.latents import encode_picture
from sefi_fast.training.noise import NoiseSchedule, draw
from sefi_fast.training.precision import autocast

PLACEHOLDER = "<it>"
CLASS_WORD = "creature"


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
        step["alignments"].append(difference.square().sum((2, 3)).mean())
        return attn.to_out[0]((target @ value).transpose(1, 2).flatten(2))


class PlainStep:
    """The method on diffusers' own parts: maps in memory, the reference encoded every step.

    The picture is encoded once, only the stages drawn are encoded, and self-attention is
    diffusers' own SDPA: nothing is slower than it need be, except for not being fused.
    """

    def __init__(self, pipe: Any, config: TrainConfig, pixels: Tensor, dtype: torch.dtype) -> None:
        self.pipe, self.config, self.dtype = pipe, config, dtype
        self.device = pipe.unet.device
        with torch.no_grad():
            self.latents = encode_picture(pipe.vae, pixels, config.flip)
        pipe.vae = None
        self._step: dict[str, Any] = {}
        for attn in cross_attention_layers(pipe.unet).values():
            attn.set_processor(_MapsProcessor(self._step))
        class_id = class_token_id(pipe.tokenizer, CLASS_WORD)
        sentence = config.sentences()[0].replace("{}", PLACEHOLDER)
        tokens = tokenize_prompts(
            pipe.tokenizer, [sentence], [(PLACEHOLDER, class_id)], require=True
        )
        self._ids, self._slots = tokens.input_ids.to(self.device), tokens.slots.to(self.device)
        row = pipe.text_encoder.get_input_embeddings().weight[class_id].detach().float()
        self.tokens = SubjectTokens(
            row,
            stages=config.stages,
            split=config.split,
            train_base=config.train_base,
            module=config.module,
            generator=torch.Generator().manual_seed(config.seed),
        ).to(self.device)
        self._schedule = NoiseSchedule(pipe.scheduler, self.device)
        self._generator = torch.Generator().manual_seed(config.seed)
        self._optimizer = torch.optim.AdamW(
            self.tokens.parameter_groups(config.learning_rate), weight_decay=0.0
        )

    def __call__(self) -> tuple[float, float]:
        noise, alignment = self.terms()
        loss = noise + self.config.weight_lambda * alignment
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        return float(noise.detach()), float(alignment.detach())

    def terms(self) -> tuple[Tensor, Tensor]:
        """Noise loss and mean alignment of the next draw."""
        config, schedule, step = self.config, self._schedule, self._step
        drawn = draw(
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
        rows = self.tokens()[stages].flatten(0, 1).unsqueeze(1)
        count = len(rows)
        text_encoder = self.pipe.text_encoder
        with autocast(self.device, self.dtype):
            encoded = encode_text(
                text_encoder,
                self._ids.expand(count, -1),
                self._slots.expand(count, -1),
                rows,
            ).unflatten(0, (config.batch_size, -1))
            with torch.no_grad():
                reference = encode_text(text_encoder, self._ids).expand(config.batch_size, -1, -1)
        step["key"], step["value"] = encoded[:, 0].to(self.dtype), encoded[:, -1].to(self.dtype)
        step["reference"], step["alignments"] = reference.to(self.dtype), []
        prediction = self.pipe.unet(
            noised.to(self.dtype), timesteps, encoder_hidden_states=step["key"]
        ).sample
        target = schedule.target(latents, noise, timesteps)
        rebuilt = torch.nn.functional.mse_loss(prediction.float(), target.float())
        return rebuilt, torch.stack(step["alignments"]).mean()


class TextualInversionStep:
    """A step as diffusers' Textual Inversion example takes it, without an attention loss.

    The picture and the prompt are encoded every step, the whole token table is in AdamW with
    weight decay, and all rows but the placeholder's are put back after the update.
    """

    def __init__(self, pipe: Any, config: TrainConfig, pixels: Tensor, dtype: torch.dtype) -> None:
        self.pipe, self.config, self.dtype = pipe, config, dtype
        self.device = pipe.unet.device
        views = torch.stack([pixels, pixels.flip(-1)])
        self._views = views.to(self.device, dtype)
        self._generator = torch.Generator().manual_seed(config.seed)
        self._schedule = NoiseSchedule(pipe.scheduler, self.device)
        # The class word's own row serves as the placeholder's, which costs the same.
        self._row = class_token_id(pipe.tokenizer, CLASS_WORD)
        self._sentence = config.sentences()[0].replace("{}", CLASS_WORD)
        self._table = pipe.text_encoder.get_input_embeddings().weight.requires_grad_(True)
        self._originals = self._table.detach().clone()
        self._optimizer = torch.optim.AdamW([self._table], lr=config.learning_rate)

    def __call__(self) -> tuple[float, float]:
        pipe, size = self.pipe, self.config.batch_size
        ids = pipe.tokenizer(
            [self._sentence] * size, padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids.to(self.device)
        view = torch.randint(len(self._views), (size,), generator=self._generator)
        latents = pipe.vae.encode(self._views[view.to(self.device)]).latent_dist.sample()
        latents = latents.detach() * pipe.vae.config.scaling_factor
        noise = torch.randn_like(latents)
        steps = self._schedule.num_train_timesteps
        timesteps = torch.randint(steps, (size,), device=self.device)
        noised = self._schedule.add_noise(latents, noise, timesteps)
        with autocast(self.device, self.dtype):
            encoded = pipe.text_encoder(ids)[0].to(self.dtype)
        prediction = pipe.unet(noised.to(self.dtype), timesteps, encoded).sample
        target = self._schedule.target(latents, noise, timesteps)
        loss = torch.nn.functional.mse_loss(prediction.float(), target.float())
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        others = torch.ones(len(self._table), dtype=torch.bool)
        others[self._row] = False
        with torch.no_grad():
            self._table[others] = self._originals[others]
        return float(loss.detach()), 0.0
