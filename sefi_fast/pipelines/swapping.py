"""Keys from one prompt and values from another: the experiment behind splitting K and V tokens."""

from __future__ import annotations

import math
from typing import Any

import torch
from PIL import Image

from sefi_fast.conditioning import Encoded, encode_with_pooled, pack, unpack
from sefi_fast.pipelines.families import check_pipeline
from sefi_fast.pipelines.freed_text import TextShape
from sefi_fast.pipelines.generation import check_sentence, draw
from sefi_fast.pipelines.prompt_encoder import PromptEncoder


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

    In every cross-attention layer the keys, which decide where the picture looks, come from
    `key_prompt`, and the values, which say what it finds there, from `value_prompt`. Token i of one
    meets token i of the other, so prompts that differ in single words tell the most. With both
    prompts alike the picture is the pipeline's own (docs/method.md §3; the authors' page,
    "Motivation").

    Args:
        pipe: a Stable Diffusion 1.x, 2.x or SDXL pipeline, with subjects attached or without.
        key_prompt, value_prompt: sentences; placeholders of attached subjects may stand in both.
        n, seed, steps, guidance, negative_prompt, batch_size, call_arguments: as for `generate`.
        clip_skip: as in the pipeline's call, for both prompts.

    Returns:
        `n` pictures; equal seeds start from equal noise, whatever the prompts are.

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
