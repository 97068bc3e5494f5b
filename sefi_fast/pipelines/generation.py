"""Generate images from prompts, one seed an image, and swap subjects between them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image

from sefi_fast.pipelines.encode_prompt import PromptEncoder, TextShape
from sefi_fast.pipelines.support import check_pipeline
from sefi_fast.prompts import Encoded, encode_with_pooled, pack, unpack

_GIVEN_OTHERWISE = {
    "num_images_per_prompt": "give n",
    "num_inference_steps": "give steps",
    "guidance_scale": "give guidance",
    "generator": "give seed",
    "return_dict": "it returns the images alone",
}


def generate(
    pipe: Any,
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

    Image i is drawn from seed + i alone, whatever `n` and `batch_size` are, and its noise is
    made on the CPU, so that every device starts from the same.

    Args:
        pipe: a pipeline, with subjects attached or without.
        prompt: the sentence, with placeholders of attached subjects.
        n: number of images.
        seed: of the first image.
        steps: number of denoising steps.
        guidance: strength of classifier-free guidance; 1 or less turns it off.
        negative_prompt: what not to draw.
        batch_size: images drawn at once.
        call_arguments: handed on to the pipeline (height, width, image, …).

    Returns:
        A list of `n` images; with `output_type` "np", "pt" or "latent" each is an array
        [height, width, 3] or a tensor [channels, height, width] in place of a PIL image.

    Raises:
        TypeError: the prompt or the negative prompt is no string, or an argument of the pipeline's
            call is named that this function gives by another name.
        ValueError: `n`, `steps` or `batch_size` is below 1, `steps` more than the scheduler has,
            `guidance` infinite or NaN, or a seed not within 0 and 2**63 - 1; or from the pipeline,
            a height or a width that is no multiple of 8.
    """
    check_sentence("prompt", prompt)
    return draw(
        pipe,
        lambda count: {"prompt": [prompt] * count},
        n=n,
        seed=seed,
        steps=steps,
        guidance=guidance,
        negative_prompt=negative_prompt,
        batch_size=batch_size,
        **call_arguments,
    )


def draw(
    pipe: Any,
    conditioning: Callable[[int], dict[str, Any]],
    *,
    n: int,
    seed: int,
    steps: int,
    guidance: float,
    negative_prompt: str | None,
    batch_size: int,
    **call_arguments: Any,
) -> list[Image.Image]:
    """`generate` for any conditioning: the pipeline's arguments for so many images at once."""
    if negative_prompt is not None:
        check_sentence("negative_prompt", negative_prompt)
    for name, instead in _GIVEN_OTHERWISE.items():
        if name in call_arguments:
            raise TypeError(f"generate gives the pipeline its {name} itself: {instead}")
    for name, value in (("n", n), ("steps", steps), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"generate needs {name} of at least 1, but it is {value}")
    _check_numbers(pipe.scheduler.config.num_train_timesteps, n, seed, steps, guidance)
    images: list[Image.Image] = []
    for first in range(0, n, batch_size):
        seeds = range(seed + first, seed + min(first + batch_size, n))
        count = len(seeds)
        drawn = pipe(
            **conditioning(count),
            negative_prompt=None if negative_prompt is None else [negative_prompt] * count,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=[torch.Generator().manual_seed(number) for number in seeds],
            **call_arguments,
        ).images
        # Not +=, which adds an array's numbers to those of the list.
        images.extend(drawn)
    return images


def check_sentence(name: str, text: Any) -> None:
    """Raise TypeError for a list, which the tokenizer would take for words of one sentence."""
    if not isinstance(text, str):
        raise TypeError(
            f"{name} must be one sentence, got {text!r}: call once for each sentence; images of "
            "equal seeds start from equal noise"
        )


def _check_numbers(most_steps: int, n: int, seed: int, steps: int, guidance: float) -> None:
    """Raise ValueError for numbers that give black images, or fail after some were drawn."""
    if steps > most_steps:
        raise ValueError(
            f"generate was asked for {steps} steps, and this model was trained on {most_steps}: "
            "give so many at most"
        )
    if not math.isfinite(guidance):
        raise ValueError(f"generate needs a finite guidance, but it is {guidance}: 7.5 is usual")
    if seed < 0 or seed + n > 2**63:
        raise ValueError(
            f"generate draws from seeds between 0 and 2**63 - 1, but {n} from {seed} on are not "
            "all there: give another seed"
        )


def swap(
    pipe: Any,
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
    """Draw with the attention of one prompt and the content of another.

    In every cross-attention layer the keys, which decide where the image looks, come from
    `key_prompt`, and the values, which say what it finds there, from `value_prompt`. Token i of one
    meets token i of the other, so prompts that differ in single words tell the most. With both
    prompts alike the image is the pipeline's own (docs/method.md §3; the authors' page,
    "Motivation").

    Args:
        pipe: a Stable Diffusion 1.x, 2.x or SDXL pipeline, with subjects attached or without.
        key_prompt, value_prompt: sentences; placeholders of attached subjects may stand in both.
        n, seed, steps, guidance, negative_prompt, batch_size, call_arguments: as for `generate`.
        clip_skip: as in the pipeline's call, for both prompts.

    Returns:
        `n` images; equal seeds start from equal noise, whatever the prompts are.

    Raises:
        ModelError: the pipeline is of another family.
        PromptError: a placeholder cannot be used where it stands.
        TypeError, ValueError: as for `generate`.
    """
    check_pipeline(pipe)
    check_sentence("key_prompt", key_prompt)
    check_sentence("value_prompt", value_prompt)
    encoder = PromptEncoder.acquire(pipe)
    try:
        joined = _joined(pipe, key_prompt, value_prompt, clip_skip)
        return draw(
            pipe,
            lambda count: {
                name: embeds.expand(count, *embeds.shape[1:])
                for name, embeds in joined._asdict().items()
                if embeds is not None
            },
            n=n,
            seed=seed,
            steps=steps,
            guidance=guidance,
            negative_prompt=negative_prompt,
            batch_size=batch_size,
            **call_arguments,
        )
    finally:
        encoder.release()


def _joined(pipe: Any, key_prompt: str, value_prompt: str, clip_skip: int | None) -> Encoded:
    """One packed prompt: the K streams of the first, the V streams and the pooled of the second."""
    width = TextShape.of(pipe).width
    keys, values = (
        encode_with_pooled(pipe, text, clip_skip=clip_skip) for text in (key_prompt, value_prompt)
    )
    streams = [unpack(part.prompt_embeds, width) for part in (keys, values)]
    stages = math.lcm(*(part.shape[1] for part in streams))
    joined = [
        part[:, :, number].repeat_interleave(stages // part.shape[1], dim=1)
        for number, part in enumerate(streams)
    ]
    return Encoded(pack(torch.stack(joined, dim=2)), values.pooled_prompt_embeds)
