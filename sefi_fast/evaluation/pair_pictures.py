"""Pictures of two creatures from the bundled model, asked for in one sentence or half by half."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from importlib.util import find_spec
from typing import Any

import torch
from PIL import Image

from sefi_fast.errors import ModelError
from sefi_fast.pipelines import load_pipeline, regions
from sefi_fast.tiny_world import two_creatures_lora
from sefi_fast.tiny_world.captions import SCENE_PHRASES
from sefi_fast.tiny_world.drawing import PICTURE_SIZE
from sefi_fast.tiny_world.pairs import HALVES


def pair_pipeline(dtype: torch.dtype) -> Any:
    """The bundled model with its LoRA for two creatures, merged in float32; without a bar.

    Raises:
        ModelError: peft, through which diffusers loads a LoRA, is not installed.
    """
    if find_spec("peft") is None:
        raise ModelError(
            "two creatures in a picture take a LoRA, which diffusers loads through peft: "
            "pip install peft"
        )
    unet = load_pipeline(None, dtype=torch.float32).unet
    unet.load_lora_adapter(two_creatures_lora(), prefix="unet")
    unet.fuse_lora()
    unet.unload_lora()
    pipe = load_pipeline(None, dtype=dtype)
    pipe.unet.load_state_dict(unet.state_dict())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.inference_mode()
def generate_pair(
    pipe: Any,
    words: tuple[str, str],
    scene: str,
    seeds: Iterable[int],
    *,
    by_halves: bool,
    steps: int,
    guidance: float,
) -> list[Image.Image]:
    """Draw two creatures, one picture a seed, 96×48 pixels.

    Args:
        pipe: of `pair_pipeline`; subjects may be attached.
        words: what stands for the left and the right creature, such as "a <a>".
        scene: of drawing.SCENES.
        seeds: of the noise.
        by_halves: a sentence for each half (`regions`) instead of one for both.
        steps: of the sampler.
        guidance: guidance scale.
    """
    where = SCENE_PHRASES[scene]
    sentences = [f"a photo of {one} {where}" for one in words]
    noise = [torch.Generator().manual_seed(seed) for seed in seeds]
    halves = regions(pipe, list(zip(sentences, HALVES, strict=True)))
    with halves if by_halves else nullcontext():
        images: list[Image.Image] = pipe(
            [f"a photo of {words[0]} and {words[1]} {where}"] * len(noise),
            width=2 * PICTURE_SIZE,
            height=PICTURE_SIZE,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=noise,
        ).images
    return images
