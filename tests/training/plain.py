"""The training step as a page of formulas: all stages encoded, all attention maps in memory."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from sefi_fast.training.image import load_image, prepare
from sefi_fast.training.noise import Draw, draw


class PlainProcessor:
    """Cross-attention with separate prompts for keys, values and reference keys; maps kept."""

    def __init__(self, step: dict[str, Any], name: str) -> None:
        self.step, self.name = step, name

    def __call__(self, attn, hidden, encoder_hidden_states=None, attention_mask=None, temb=None):
        step = self.step

        def heads(x: Tensor) -> Tensor:
            return x.view(x.shape[0], x.shape[1], attn.heads, -1).transpose(1, 2)

        query = heads(attn.to_q(hidden))
        if encoder_hidden_states is None:
            key, value = heads(attn.to_k(hidden)), heads(attn.to_v(hidden))
        else:
            key, value = heads(attn.to_k(step["key"])), heads(attn.to_v(step["value"]))
        target = (query @ key.transpose(-1, -2) * attn.scale).softmax(-1)
        if encoder_hidden_states is not None:
            reference_key = heads(attn.to_k(step["reference"]))
            scores = query @ reference_key.transpose(-1, -2) * attn.scale
            reference = scores.softmax(-1)
            if not step["reference_grad"]:
                reference = reference.detach()
            step["maps"][self.name] = target, reference
        output = (target @ value).transpose(1, 2).flatten(2)
        return attn.to_out[1](attn.to_out[0](output))


class PlainTraining:
    """Equations 3 to 6 of docs/method.md for one image, in the pipeline's own dtype."""

    def __init__(self, pipe, image, config, class_word: str, rows, mask=None) -> None:
        self.pipe, self.config, self.rows, self.mask = pipe, config, rows, mask
        self.step_data: dict[str, Any] = {"reference_grad": config.reference_grad}
        for name, processor in pipe.unet.attn_processors.items():
            assert type(processor).__name__ == "AttnProcessor2_0", name
        pipe.unet.set_attn_processor(
            {name: PlainProcessor(self.step_data, name) for name in pipe.unet.attn_processors}
        )
        for part in (pipe.unet, pipe.text_encoder, pipe.vae):
            part.requires_grad_(False).eval()
        size = pipe.unet.config.sample_size * pipe.vae_scale_factor
        pixels = prepare(load_image(image), config.resolution or size).to(pipe.vae.dtype)
        views = [pixels, pixels.flip(2)] if config.flip else [pixels]
        posterior = pipe.vae.encode(torch.stack(views)).latent_dist
        scale = pipe.vae.config.scaling_factor
        self.mean, self.std = posterior.mean * scale, posterior.std * scale
        self.generator = torch.Generator().manual_seed(config.seed)
        self.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
        self.class_word = class_word
        self.class_ids = pipe.tokenizer(class_word, add_special_tokens=False).input_ids

    def encode(self, rows: Tensor | None) -> Tensor:
        """[P, M, C]: the templates with `rows` in the class words' places; None for the words."""
        texts = [text.replace("{}", self.class_word) for text in self.config.sentences()]
        tokenizer, text_encoder = self.pipe.tokenizer, self.pipe.text_encoder
        ids = tokenizer(texts, padding="max_length", max_length=77, return_tensors="pt").input_ids
        self.ids = ids
        if rows is None:
            return text_encoder(ids)[0]
        table = changed = text_encoder.get_input_embeddings().weight
        for class_id, row in zip(self.class_ids, rows, strict=True):
            changed = torch.where(torch.arange(len(table))[:, None] == class_id, row, changed)
        name = next(n for n, p in text_encoder.named_parameters() if p is table)
        return torch.func.functional_call(text_encoder, {name: changed}, (ids,))[0]

    def terms(self) -> tuple[Tensor, Tensor]:
        """Noise loss and subject loss of the next draw."""
        config, step = self.config, self.step_data
        drawn = draw(
            self.generator,
            batch_size=config.batch_size,
            num_train_timesteps=1000,
            views=len(self.mean),
            templates=len(config.templates),
            latent_shape=tuple(self.mean.shape[1:]),
        )
        noise = drawn.noise.to(self.mean.dtype)
        latents = self.mean[drawn.view] + self.std[drawn.view] * drawn.latent_noise
        noised = self.scheduler.add_noise(latents, noise, drawn.timesteps)
        target = noise
        if self.scheduler.config.prediction_type == "v_prediction":
            target = self.scheduler.get_velocity(latents, noise, drawn.timesteps)
        added = self.condition(drawn)
        prediction = self.pipe.unet(
            noised, drawn.timesteps, step["key"], added_cond_kwargs=added
        ).sample
        wanted = config.loss_resolutions
        is_subject = torch.isin(self.ids, torch.tensor(self.class_ids))
        columns = [is_subject[template] for template in drawn.template]
        terms = [
            self.attention(maps, reference, columns, drawn.view.tolist())
            for maps, reference in step["maps"].values()
            if wanted is None or round(maps.shape[2] ** 0.5) in wanted
        ]
        errors = (prediction - target).square().flatten(1).mean(1)
        if config.snr_gamma is not None:
            clean = self.scheduler.alphas_cumprod.to(errors.dtype)
            snr = clean / (1 - clean)
            velocity = self.scheduler.config.prediction_type == "v_prediction"
            weights = snr.clamp(max=config.snr_gamma) / (snr + 1 if velocity else snr)
            errors = errors * (weights / weights.mean())[drawn.timesteps]
        return errors.mean(), torch.stack(terms).mean()

    def condition(self, drawn: Draw) -> dict[str, Tensor] | None:
        """Sets the samples' prompts; what the U-Net is given beside them."""
        rows = self.rows().to(self.mean.dtype)
        encoded = torch.stack([torch.stack([self.encode(own) for own in stage]) for stage in rows])
        stages = drawn.timesteps * self.config.stages // 1000
        picked = encoded[stages, :, drawn.template]
        self.step_data.update(
            key=picked[:, 0],
            value=picked[:, -1],
            reference=self.encode(None)[drawn.template],
            maps={},
        )
        return None

    def attention(self, maps, reference, columns, views) -> Tensor:
        """Equation 5, 13 or 14 of one layer, mean over samples, from whole maps [B, H, N, M]."""
        kind = self.config.attention_loss
        if kind == "subject":
            return (maps - reference).square().sum((2, 3)).mean()
        samples = []
        for sample, column in enumerate(columns):
            own, other = maps[sample][..., column], reference[sample][..., column]
            if kind == "class":
                samples.append((own - other).square().sum((1, 2)).mean())
                continue
            side = round(own.shape[1] ** 0.5)
            mask = self.mask.flip(1) if views[sample] else self.mask
            # Sides that divide one another: the area's mean is a mean over whole blocks.
            blocks = mask.unflatten(0, (side, -1)).unflatten(2, (side, -1)).mean((1, 3)).flatten()
            heads = own.mean(0)
            places = [
                (heads[:, place] / heads[:, place].max() - blocks).square().mean()
                for place in range(heads.shape[1])
            ]
            samples.append(torch.stack(places).mean())
        return torch.stack(samples).mean()
