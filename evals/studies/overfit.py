"""Attention overfit: does the placeholder look at the subject alone, and leave the others be?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sefi_fast.attention.layers import cross_attention_layers, layer_resolutions, reduced_size
from sefi_fast.attention.processor import LayerRecord, PromptState
from sefi_fast.pipelines.model_patch import watch
from sefi_fast.pipelines.support import unwrap
from sefi_fast.prompts import encode
from sefi_fast.prompts.tokenization import word_positions
from sefi_fast.subject import Subject
from sefi_fast.training.noise import NoiseSchedule


@dataclass(frozen=True)
class AttentionOverfit:
    """Maps of a sentence with the placeholder against those of the same one with the class word.

    All maps are means over heads, cross-attention layers, timesteps and draws of noise.

    Attributes:
        inside: share of the placeholder's map that lies inside the subject's mask.
        class_inside: the same of the class word's map in the reference sentence.
        mask: share of the image that the mask covers: what a map without any preference has.
        correlation: mean over all other words of the correlation of their map with the one they
            have in the reference sentence.
        taken: the placeholder's share of the attention of all words of the sentence, over that of
            the class word in the reference sentence; above 1 it takes attention from the others.
    """

    inside: float
    class_inside: float
    mask: float
    correlation: float
    taken: float

    def as_dict(self) -> dict[str, float]:
        """All numbers by name."""
        return asdict(self)


@torch.no_grad()
def attention_overfit(
    pipe: Any,
    subject: Subject,
    pixels: Tensor,
    mask: Tensor,
    sentence: str = "a photo of a {}",
    *,
    levels: int = 5,
    draws: int = 2,
    seed: int = 0,
) -> AttentionOverfit:
    """Measure on the noised latents of an image of the subject, best the one it was learnt from.

    Args:
        pipe: a pipeline with the subject attached.
        subject: whose placeholder is looked at; an image shows it at `mask`.
        pixels: the image, float32 [3, h, w] in -1..1, of the pipeline's size.
        mask: float32 [h, w] in 0..1, 1 on the subject.
        sentence: {} where the subject stands, other words around it.
        levels: timesteps, in the middle of so many equal parts of the noise schedule.
        draws: of noise at each.
        seed: of the noise.

    Raises:
        ValueError: the mask is empty, or the sentence has no {}.
    """
    if "{}" not in sentence:
        raise ValueError(
            f"the sentence {sentence!r} has no {{}}: write it where the subject stands"
        )
    if not bool(mask.max() > 0):
        raise ValueError("the mask is empty: it must be 1 where the image shows the subject")
    unet = unwrap(pipe.unet)
    schedule = NoiseSchedule(pipe.scheduler, unet.device)
    parts = torch.arange(levels) + 0.5
    times = (parts / levels * schedule.num_train_timesteps).long().repeat_interleave(draws)
    distribution = pipe.vae.encode(pixels[None].to(pipe.vae.device, pipe.vae.dtype)).latent_dist
    clean = distribution.mean.float() * pipe.vae.config.scaling_factor
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn((len(times), *clean.shape[1:]), generator=generator).to(clean.device)
    noised = schedule.add_noise(clean.expand_as(noise), noise, times.to(clean.device))

    mine, others = _columns(pipe, subject, sentence.replace("{}", subject.placeholder))
    target = _maps(pipe, sentence.replace("{}", subject.placeholder), noised, times, mine + others)
    class_mine, class_others = _columns(pipe, subject, sentence.replace("{}", subject.class_word))
    reference = _maps(
        pipe, sentence.replace("{}", subject.class_word), noised, times, class_mine + class_others
    )
    size = (target.shape[-2], target.shape[-1])
    shares = F.adaptive_avg_pool2d(mask[None, None].float(), size)[0, 0]

    def inside(maps: Tensor) -> float:
        return float((maps.sum(0) * shares).sum() / maps.sum())

    def share(maps: Tensor, count: int) -> float:
        return float(maps[:count].sum() / maps.sum())

    pairs = zip(target[len(mine) :], reference[len(class_mine) :], strict=True)
    alike = [float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]) for a, b in pairs]
    return AttentionOverfit(
        inside=inside(target[: len(mine)]),
        class_inside=inside(reference[: len(class_mine)]),
        mask=float(shares.mean()),
        correlation=sum(alike) / len(alike) if alike else 1.0,
        taken=share(target, len(mine)) / share(reference, len(class_mine)),
    )


def _columns(pipe: Any, subject: Subject, prompt: str) -> tuple[list[int], list[int]]:
    """Positions of the subject's word (or the class word), and of all other words."""
    tokenizer = pipe.tokenizer
    known = [subject.in_prompts(tokenizer)]
    words = prompt.split()
    own = subject.placeholder if subject.placeholder in words else subject.class_word
    mine = word_positions(tokenizer, prompt, own, known)
    found = {
        place
        for word in dict.fromkeys(words)
        if word != own
        for place in word_positions(tokenizer, prompt, word, known)
    }
    return mine, sorted(found - set(mine))


def _maps(pipe: Any, prompt: str, noised: Tensor, times: Tensor, columns: Sequence[int]) -> Tensor:
    """Mean maps [columns, h, w] of a prompt over the noised latents, at the largest map's size."""
    unet = unwrap(pipe.unet)
    layers, factors = cross_attention_layers(unet), layer_resolutions(unet)
    embeds = encode(pipe, prompt).to(unet.dtype)
    height, width = noised.shape[-2:]
    least = min(factors.values())
    largest = reduced_size((height, width), least)
    total = torch.zeros(len(columns), *largest)
    for time in times.unique().tolist():
        batch = noised[times == time].to(unet.dtype)
        records = {
            id(attn): LayerRecord(
                probs_positions=torch.tensor([list(columns)], device=batch.device)
            )
            for attn in layers.values()
        }
        with _recording(unet, records):
            unet(batch, time, encoder_hidden_states=embeds.expand(len(batch), -1, -1))
        for name, attn in layers.items():
            maps = records[id(attn)].attn_probs
            assert maps is not None
            size = reduced_size((height, width), factors[name])
            maps = maps.float().cpu().unflatten(-1, size)
            if size != largest:
                maps = F.interpolate(maps, largest, mode="bilinear", align_corners=False)
            total += maps.sum(0)
    return total / (len(noised) * len(layers))


@contextmanager
def _recording(unet: nn.Module, records: dict[int, LayerRecord]) -> Iterator[None]:
    """Lets the layers of every call inside write their maps into `records`."""

    def put(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        PromptState(records=records).put_on(kwargs["encoder_hidden_states"])

    watch(unet, put, True)
    handle = unet.register_forward_pre_hook(put, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
        watch(unet, put, False)
