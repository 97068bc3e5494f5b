"""The training step as a page of formulas: every sample encoded, all attention maps in memory."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor
from training.shared import Family

from sefi_fast.training.image import load_image, prepare
from sefi_fast.training.noise import NoiseSample, sample_noise


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

    def __init__(self, pipe, image, config, class_word: str, modules, mask=None) -> None:
        self.pipe, self.config, self.modules, self.mask = pipe, config, modules, mask
        self.family = Family(pipe)
        self.step_data: dict[str, Any] = {"reference_grad": config.reference_grad}
        for name, processor in pipe.unet.attn_processors.items():
            assert type(processor).__name__ == "AttnProcessor2_0", name
        pipe.unet.set_attn_processor(
            {name: PlainProcessor(self.step_data, name) for name in pipe.unet.attn_processors}
        )
        for part in (pipe.unet, pipe.vae, *(encoder for _, encoder in self.family.encoders)):
            part.requires_grad_(False).eval()
        pixels = prepare(load_image(image), config.resolution).to(pipe.vae.dtype)
        views = [pixels, pixels.flip(2)] if config.flip else [pixels]
        posterior = pipe.vae.encode(torch.stack(views)).latent_dist
        scale = pipe.vae.config.scaling_factor
        self.mean, self.std = posterior.mean * scale, posterior.std * scale
        self.generator = torch.Generator().manual_seed(config.seed)
        self.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
        self.class_word, self.class_ids = class_word, self.family.class_ids(class_word)
        self.time_ids = _time_ids(image, config.resolution)

    def encode(self, rows: list[Tensor] | None) -> tuple[Tensor, Tensor | None]:
        """[P, M, C] and pooled [P, D]: the templates with `rows`, or the class word's own."""
        texts = [text.replace("{}", self.class_word) for text in self.config.sentences()]
        hidden, pooled = [], None
        for number, (tokenizer, encoder) in enumerate(self.family.encoders):
            ids = tokenizer(texts, padding="max_length", max_length=77, return_tensors="pt")
            ids = ids.input_ids
            if number == 0:
                self.ids = ids
            table = changed = encoder.get_input_embeddings().weight
            for place, class_id in enumerate(self.class_ids[number] if rows else ()):
                is_word = torch.arange(len(table))[:, None] == class_id
                changed = torch.where(is_word, rows[number][place], changed)
            name = next(n for n, p in encoder.named_parameters() if p is table)
            output = torch.func.functional_call(
                encoder, {name: changed}, (ids,), {"output_hidden_states": True}
            )
            if self.family.is_sdxl:
                hidden.append(output.hidden_states[-2])
                pooled = output[0]
            else:
                hidden.append(output[0])
        return torch.cat(hidden, -1), pooled

    def terms(self) -> tuple[Tensor, Tensor]:
        """Noise loss and subject loss of the next sample of noise."""
        config, step = self.config, self.step_data
        sample = sample_noise(
            self.generator,
            batch_size=config.batch_size,
            num_train_timesteps=1000,
            views=len(self.mean),
            templates=len(config.templates),
            latent_shape=tuple(self.mean.shape[1:]),
        )
        noise = sample.noise.to(self.mean.dtype)
        latents = self.mean[sample.view] + self.std[sample.view] * sample.latent_noise
        noised = self.scheduler.add_noise(latents, noise, sample.timesteps)
        target = noise
        is_velocity = self.scheduler.config.prediction_type == "v_prediction"
        if is_velocity:
            target = self.scheduler.get_velocity(latents, noise, sample.timesteps)
        added = self.condition(sample)
        prediction = self.pipe.unet(
            noised, sample.timesteps, step["key"], added_cond_kwargs=added
        ).sample
        wanted = config.loss_resolutions
        is_subject = torch.isin(self.ids, torch.tensor(self.class_ids[0]))
        columns = [is_subject[template] for template in sample.template]
        terms = [
            self.attention(maps, reference, columns, sample.view.tolist())
            for maps, reference in step["maps"].values()
            if wanted is None or round(maps.shape[2] ** 0.5) in wanted
        ]
        errors = (prediction - target).square().flatten(1).mean(1)
        if config.snr_gamma is not None:
            clean = self.scheduler.alphas_cumprod.to(errors.dtype)
            snr = clean / (1 - clean)
            weights = snr.clamp(max=config.snr_gamma) / (snr + 1 if is_velocity else snr)
            errors = errors * (weights / weights.mean())[sample.timesteps]
        return errors.mean(), torch.stack(terms).mean()

    def condition(self, sample: NoiseSample) -> dict[str, Tensor] | None:
        """Set the samples' prompts; V's pooled embedding and the image's size and crop for SDXL."""
        rows = [module().to(self.mean.dtype) for module in self.modules]
        stages = sample.timesteps * self.config.stages // 1000
        keys, values, pooled = [], [], []
        for stage, template in zip(stages.tolist(), sample.template.tolist(), strict=True):
            key, _ = self.encode([own[stage, 0] for own in rows])
            value, of_value = self.encode([own[stage, -1] for own in rows])
            keys.append(key[template])
            values.append(value[template])
            pooled.append(None if of_value is None else of_value[template])
        reference, _ = self.encode(None)
        self.step_data.update(
            key=torch.stack(keys),
            value=torch.stack(values),
            reference=reference[sample.template],
            maps={},
        )
        if not self.family.is_sdxl:
            return None
        time_ids = self.time_ids.to(self.mean.dtype).repeat(len(stages), 1)
        return {"text_embeds": torch.stack(pooled), "time_ids": time_ids}

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


def _time_ids(image, size: int) -> Tensor:
    """As diffusers' SDXL examples do it: the shorter side is resized, then the center cut out."""
    width, height = image.size
    shorter = min(width, height)
    resized = (int(size * height / shorter), int(size * width / shorter))
    top, left = (round((side - size) / 2) for side in resized)
    return torch.tensor([[height, width, top, left, size, size]])
