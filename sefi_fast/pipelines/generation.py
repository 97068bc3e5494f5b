"""Generate images from prompts, one seed an image, and swap subjects between them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from sefi_fast.pipelines.encode_prompt import EncodePromptPatch
from sefi_fast.pipelines.support import TextShape, check_pipeline
from sefi_fast.prompts import PromptEmbeds, encode_with_pooled, pack, unpack
from sefi_fast.prompts.text_encoder import Pipeline

_GIVEN_OTHERWISE = {
    "num_images_per_prompt": "give n",
    "num_inference_steps": "give steps",
    "guidance_scale": "give guidance",
    "generator": "give seed",
    "return_dict": "it returns the images alone",
}


def generate(
    pipe: Pipeline,
    prompt: str,
    n: int = 1,
    seed: int = 0,
    steps: int = 30,
    guidance: float = 7.5,
    negative_prompt: str | None = None,
    *,
    batch_size: int = 8,
    **call_arguments: Any,
) -> list[Image.Image]:
    """Call the pipeline for `n` images of one prompt.

    Image i depends on seed + i alone, not on `n` and `batch_size`. Its noise is made on the CPU,
    so that it is the same on every device.

    Example:
        >>> sefi_fast.attach(pipe, "me.safetensors")
        >>> images = sefi_fast.generate(pipe, "a photo of <me> in the snow", n=4, seed=1)

    Args:
        pipe: a pipeline, with subjects attached or without.
        prompt: the sentence, with placeholders of attached subjects.
        n: number of images.
        seed: of the first image.
        steps: number of denoising steps.
        guidance: strength of classifier-free guidance; 1 or less turns it off.
        negative_prompt: the content to avoid.
        batch_size: images generated at once.
        call_arguments: further arguments of the pipeline's call (height, width, image, …).

    Returns:
        A list of `n` images; with `output_type` "np", "pt" or "latent" each is an array
        [height, width, 3] or a tensor [channels, height, width] in place of a PIL image.

    Raises:
        TypeError: the prompt or the negative prompt is not a string, or an argument of the
            pipeline's call is given that has another name here.
        ValueError: `n`, `steps` or `batch_size` is below 1, `steps` is above those of the
            scheduler, `guidance` is infinite or NaN, or a seed is not within 0 and 2**63 - 1; or
            from the pipeline, a height or a width is not a multiple of 8.
    """
    _check_sentence("prompt", prompt)
    settings = (n, seed, steps, guidance, negative_prompt, batch_size)
    return _generate(pipe, {"prompt": prompt}, *settings, **call_arguments)


def swap(
    pipe: Pipeline,
    *,
    key_prompt: str,
    value_prompt: str,
    n: int = 1,
    seed: int = 0,
    steps: int = 30,
    guidance: float = 7.5,
    negative_prompt: str | None = None,
    batch_size: int = 8,
    clip_skip: int | None = None,
    **call_arguments: Any,
) -> list[Image.Image]:
    """Generate images with the attention of one prompt and the content of another.

    In every cross-attention layer the keys come from `key_prompt` and decide the place of the
    attention. The values come from `value_prompt` and decide the content. Token i of one meets
    token i of the other, so that prompts that differ in single words show the most. With equal
    prompts the image is the pipeline's own (docs/method.md §1; the authors' page, "Motivation").

    Example:
        >>> sefi_fast.attach(pipe, ["me.safetensors", "you.safetensors"])
        >>> images = sefi_fast.swap(
        ...     pipe, key_prompt="<me> at the beach", value_prompt="<you> at the beach", n=4
        ... )

    Args:
        pipe: a Stable Diffusion 1.x, 2.x or SDXL pipeline, with subjects attached or without.
        key_prompt, value_prompt: sentences; both may hold placeholders of attached subjects.
        n, seed, steps, guidance, negative_prompt, batch_size, call_arguments: as for `generate`.
        clip_skip: as in the pipeline's call, for both prompts.

    Returns:
        `n` images; equal seeds start from equal noise, for any prompts.

    Raises:
        ModelError: the pipeline is of another family.
        PromptError: a placeholder cannot be used in its position.
        TypeError, ValueError: as for `generate`.
    """
    check_pipeline(pipe)
    _check_sentence("key_prompt", key_prompt)
    _check_sentence("value_prompt", value_prompt)
    patch = EncodePromptPatch.acquire(pipe)
    try:
        keys, values = (
            encode_with_pooled(pipe, text, clip_skip=clip_skip)
            for text in (key_prompt, value_prompt)
        )
        joined = _joined(keys, values, TextShape.of(pipe).width)
        settings = (n, seed, steps, guidance, negative_prompt, batch_size)
        return _generate(pipe, joined._asdict(), *settings, **call_arguments)
    finally:
        patch.release()


def _joined(keys: PromptEmbeds, values: PromptEmbeds, width: int) -> PromptEmbeds:
    """Return the K streams of one packed prompt with the V streams and the pooled of another."""
    streams = [unpack(part.prompt_embeds, width) for part in (keys, values)]
    stages = math.lcm(*(part.shape[1] for part in streams))
    joined = [
        part[:, :, number].repeat_interleave(stages // part.shape[1], dim=1)
        for number, part in enumerate(streams)
    ]
    return PromptEmbeds(pack(torch.stack(joined, dim=2)), values.pooled_prompt_embeds)


def _generate(
    pipe: Pipeline,
    conditioning: Mapping[str, str | Tensor | None],
    n: int,
    seed: int,
    steps: int,
    guidance: float,
    negative_prompt: str | None,
    batch_size: int,
    **call_arguments: Any,
) -> list[Image.Image]:
    """Generate `n` images from the arguments of the pipeline's call for one prompt."""
    if negative_prompt is not None:
        _check_sentence("negative_prompt", negative_prompt)
    for name, instead in _GIVEN_OTHERWISE.items():
        if name in call_arguments:
            raise TypeError(f"generate gives the pipeline its {name} itself: {instead}")
    for name, value in (("n", n), ("steps", steps), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"generate needs {name} of at least 1, but it is {value}")
    # These give black images, or fail after some were generated.
    most_steps = pipe.scheduler.config.num_train_timesteps
    if steps > most_steps:
        raise ValueError(
            f"generate was asked for {steps} steps, and this model was trained on {most_steps}; "
            "give at most as many"
        )
    if not math.isfinite(guidance):
        raise ValueError(f"generate needs a finite guidance, but it is {guidance}; 7.5 is usual")
    if seed < 0 or seed + n > 2**63:
        raise ValueError(
            f"generate takes seeds between 0 and 2**63 - 1, but {n} from {seed} on are not all "
            "there; give another seed"
        )
    images: list[Image.Image] = []
    for first in range(0, n, batch_size):
        seeds = range(seed + first, seed + min(first + batch_size, n))
        count = len(seeds)
        batch = {
            name: one.expand(count, *one.shape[1:]) if isinstance(one, Tensor) else [one] * count
            for name, one in conditioning.items()
            if one is not None
        }
        output = pipe(
            **batch,
            negative_prompt=None if negative_prompt is None else [negative_prompt] * count,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=[torch.Generator().manual_seed(number) for number in seeds],
            **call_arguments,
        )
        # Not +=, which adds an array's numbers to those of the list.
        images.extend(output.images)
    return images


def _check_sentence(name: str, text: Any) -> None:
    """Raise TypeError for a list, which the tokenizer would take for words of one sentence."""
    if not isinstance(text, str):
        raise TypeError(
            f"{name} must be one sentence, got {text!r}. Call once for each sentence; images of "
            "equal seeds start from equal noise."
        )
