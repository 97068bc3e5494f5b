"""Bring a prompt and its negative prompt to one shape: the same stages, packed alike."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from sefi_fast.conditioning import Encoded, pack, packed_stages, unpack
from sefi_fast.errors import PromptError


def stages_of(prompt_embeds: Tensor | None, width: int) -> int | None:
    """The stages of a packed prompt; None for a plain one, or for none."""
    return None if prompt_embeds is None else packed_stages(prompt_embeds.shape[-1], width)


def encodes_apart(pipe: Any) -> bool:
    """Whether the pipeline joins prompts that it encodes in several calls of encode_prompt."""
    # FreeNoise of AnimateDiff encodes the negative prompts of all frames by themselves.
    free_noise = getattr(pipe, "free_noise_enabled", False)
    return free_noise or type(pipe).__name__ in (
        "CycleDiffusionPipeline",
        "StableDiffusionDiffEditPipeline",
    )


def same_packing(
    positive: Encoded,
    negative: Encoded | None,
    width: int,
    pooled_width: int,
    stages: int | None = None,
) -> tuple[Encoded, Encoded | None]:
    """Both packed with the same number of stages; plain ones repeat in every stage.

    Pooled embeddings meet on a number of stages of their own.

    Args:
        positive, negative: [B, …] each; negative None without guidance.
        width: C, columns of a plain prompt.
        pooled_width: P, numbers of one pooled embedding.
        stages: pack plain prompts too, with a multiple of so many stages.

    Raises:
        PromptError: a plain prompt meets a packed one of another number of tokens.
        ValueError: a prompt is neither plain nor packed for this width, or pooled embeddings are no
            whole number of embeddings wide.
    """
    both = [positive] if negative is None else [positive, negative]
    embeds = [one.prompt_embeds for one in both]
    found = [s for s in (stages, *(stages_of(one, width) for one in embeds)) if s is not None]
    if found:
        common = math.lcm(*found)
        embeds = [_repack(one, common, width) for one in embeds]
        tokens = [one.shape[1] for one in embeds]
        if len(set(tokens)) > 1:
            raise PromptError(
                f"the prompt has {tokens[0]} tokens, the negative prompt {tokens[1]} tokens, and "
                "one of them holds a subject. Both need the same number of tokens. Give "
                "prompt_embeds of one length."
            )
    pooled = [one.pooled_prompt_embeds for one in both if one.pooled_prompt_embeds is not None]
    widened = _same_width(pooled, pooled_width) if len(pooled) == len(both) else [None] * len(both)
    matched = [Encoded(*pair) for pair in zip(embeds, widened, strict=True)]
    return matched[0], None if negative is None else matched[1]


def _repack(prompt: Tensor, stages: int, width: int) -> Tensor:
    if prompt.shape[-1] == width:
        return pack(prompt[:, None, None].expand(-1, stages, 2, -1, -1))
    streams = unpack(prompt, width)
    return pack(streams.repeat_interleave(stages // streams.shape[1], dim=1))


def _same_width(pooled: list[Tensor], width: int) -> list[Tensor]:
    for one in pooled:
        if one.shape[-1] % width:
            raise ValueError(
                f"pooled embeddings of {one.shape[-1]} numbers are neither one embedding of this "
                f"pipeline ({width} numbers) nor one a stage (a multiple of that)"
            )
    stages = [one.shape[-1] // width for one in pooled]
    common = math.lcm(*stages)
    return [
        one.unflatten(-1, (count, width)).repeat_interleave(common // count, 1).flatten(1)
        for one, count in zip(pooled, stages, strict=True)
    ]
