"""Attention overfit: whether the placeholder attends to the subject alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sefi_fast.attention.layers import cross_attention_layers, layer_resolutions, reduced_size
from sefi_fast.attention.processor import LayerRecord, PromptState
from sefi_fast.pipelines.model_patch import watch
from sefi_fast.prompts import encode
from sefi_fast.prompts.text_encoder import unwrap
from sefi_fast.prompts.tokenization import word_positions
from sefi_fast.subject import Subject
from sefi_fast.training.noise import NoiseSchedule


class AttentionOverfit(NamedTuple):
    """Attention maps of a sentence with the placeholder against those with the class word.

    All maps are means over heads, cross-attention layers, timesteps and noise samples.

    Attributes:
        inside: share of the placeholder's map inside the subject's mask.
        class_inside: the same share of the class word's map in the reference sentence.
        mask: share of the image that the mask covers, which a map without any preference has.
        correlation: mean over all other words of the correlation of their map with the one they
            have in the reference sentence.
        taken: the placeholder's share of the attention of all words, over that of the class word
            in the reference sentence. Above 1 it takes attention from the other words.
    """

    inside: float
    class_inside: float
    mask: float
    correlation: float
    taken: float


@torch.no_grad()
def attention_overfit(
    pipe: Any,
    subject: Subject,
    pixels: Tensor,
    mask: Tensor,
    sentence: str = "a photo of a {}",
    *,
    levels: int = 5,
    samples: int = 2,
    seed: int = 0,
) -> AttentionOverfit:
    """Measure on noised latents of an image of the subject, best the one it was trained on.

    Args:
        pipe: a pipeline with the subject attached.
        subject: the subject.
        pixels: the image, float32 [3, h, w] in -1..1, of the pipeline's size.
        mask: float32 [h, w] in 0..1, 1 on the subject.
        sentence: {} in place of the subject, other words around it.
        levels: number of timesteps, in the middle of equal parts of the noise schedule.
        samples: noise samples at each timestep.
        seed: seed of the noise.

    Raises:
        ValueError: the mask is empty, or the sentence has no {}.
    """
    if "{}" not in sentence:
        raise ValueError(
            f"The sentence {sentence!r} has no {{}}. Write it in place of the subject."
        )
    if not bool(mask.max() > 0):
        raise ValueError("The mask is empty. It must be 1 on the subject.")
    unet = unwrap(pipe.unet)
    schedule = NoiseSchedule(pipe.scheduler, unet.device)
    parts = torch.arange(levels) + 0.5
    times = (parts / levels * schedule.num_train_timesteps).long().repeat_interleave(samples)
    distribution = pipe.vae.encode(pixels[None].to(pipe.vae.device, pipe.vae.dtype)).latent_dist
    clean = distribution.mean.float() * pipe.vae.config.scaling_factor
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn((len(times), *clean.shape[1:]), generator=generator).to(clean.device)
    noised = schedule.add_noise(clean.expand_as(noise), noise, times.to(clean.device))

    def maps_of(word: str) -> tuple[Tensor, Tensor]:
        prompt = sentence.replace("{}", word)
        own, others = _positions(pipe, subject, prompt, word)
        maps = _maps(pipe, prompt, noised, times, own + others)
        return maps[: len(own)], maps[len(own) :]

    target, others = maps_of(subject.placeholder)
    reference, reference_others = maps_of(subject.class_word)
    shares = F.adaptive_avg_pool2d(mask[None, None].float(), (target.shape[-2], target.shape[-1]))[
        0, 0
    ]

    def inside(maps: Tensor) -> float:
        return float((maps.sum(0) * shares).sum() / maps.sum())

    def share(maps: Tensor, others: Tensor) -> float:
        return float(maps.sum() / (maps.sum() + others.sum()))

    pairs = zip(others.flatten(1), reference_others.flatten(1), strict=True)
    alike = [float(torch.corrcoef(torch.stack(pair))[0, 1]) for pair in pairs]
    return AttentionOverfit(
        inside=inside(target),
        class_inside=inside(reference),
        mask=float(shares.mean()),
        correlation=sum(alike) / len(alike) if alike else 1.0,
        taken=share(target, others) / share(reference, reference_others),
    )


def _positions(pipe: Any, subject: Subject, prompt: str, own: str) -> tuple[list[int], list[int]]:
    """Return the positions of a word, and of all other words."""
    known = [subject.in_prompts(pipe.tokenizer)]
    places = {
        word: word_positions(pipe.tokenizer, prompt, word, known)
        for word in dict.fromkeys(prompt.split())
    }
    mine = places.pop(own)
    return mine, sorted({place for found in places.values() for place in found} - set(mine))


def _maps(pipe: Any, prompt: str, noised: Tensor, times: Tensor, positions: list[int]) -> Tensor:
    """Return mean maps [positions, h, w] over the noised latents, at the largest map's size."""
    unet = unwrap(pipe.unet)
    layers, factors = cross_attention_layers(unet), layer_resolutions(unet)
    embeds = encode(pipe, prompt).to(unet.dtype)
    height, width = noised.shape[-2:]
    largest = reduced_size((height, width), min(factors.values()))
    total = torch.zeros(len(positions), *largest)
    for time in sorted(set(times.tolist())):
        batch = noised[times == time].to(unet.dtype)
        wanted = torch.tensor([positions], device=batch.device)
        records = {id(attn): LayerRecord(probs_positions=wanted) for attn in layers.values()}
        with _recording(unet, records):
            unet(batch, time, encoder_hidden_states=embeds.expand(len(batch), -1, -1))
        for name, attn in layers.items():
            maps = records[id(attn)].attn_probs
            assert maps is not None
            size = reduced_size((height, width), factors[name])
            maps = maps.float().cpu().reshape(*maps.shape[:2], *size)
            if size != largest:
                maps = F.interpolate(maps, largest, mode="bilinear", align_corners=False)
            total += maps.sum(0)
    return total / (len(noised) * len(layers))


@contextmanager
def _recording(unet: nn.Module, records: dict[int, LayerRecord]) -> Iterator[None]:
    """Let the layers of every call inside write their maps into `records`."""

    def put(module: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        PromptState(records=records).put_on(kwargs["encoder_hidden_states"])

    watch(unet, put, True)
    handle = unet.register_forward_pre_hook(put, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
        watch(unet, put, False)
