"""One call of `encode_prompt` in the terms of every family, and its packed answer."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from sefi_fast.errors import PromptError
from sefi_fast.prompts import Encoded, pack, packed_stages, unpack

Texts: TypeAlias = "str | list[str]"


@dataclass(frozen=True)
class PromptRequest:
    """What a pipeline asks of encode_prompt.

    Attributes:
        prompts, negatives: the texts for each text encoder; None where none were given.
        embeds, negative_embeds: what was given as tensors; None where prompts are to be encoded.
        pooled, negative_pooled: SDXL's pooled embeddings that were given.
        images: images (or videos) of each prompt.
        guidance: whether a negative prompt is wanted.
    """

    prompts: tuple[Texts | None, ...]
    negatives: tuple[Texts | None, ...]
    embeds: Tensor | None
    negative_embeds: Tensor | None
    pooled: Tensor | None
    negative_pooled: Tensor | None
    device: torch.device
    images: int
    guidance: bool
    lora_scale: float | None
    clip_skip: int | None

    @classmethod
    def of(cls, pipe: Any, given: Mapping[str, Any]) -> PromptRequest:
        """From the arguments of encode_prompt, bound by name, defaults included."""
        prompts, negatives = [given["prompt"]], [given["negative_prompt"]]
        if "prompt_2" in given:
            prompts.append(given["prompt_2"] or given["prompt"])
            negatives.append(given["negative_prompt_2"] or given["negative_prompt"])
        return cls(
            prompts=tuple(prompts),
            negatives=tuple(negatives),
            embeds=given["prompt_embeds"],
            negative_embeds=given["negative_prompt_embeds"],
            pooled=given.get("pooled_prompt_embeds"),
            negative_pooled=given.get("negative_pooled_prompt_embeds"),
            device=given["device"] or pipe._execution_device,
            images=given[count_name(given)],
            guidance=bool(given["do_classifier_free_guidance"]),
            lora_scale=given["lora_scale"],
            clip_skip=given.get("clip_skip"),
        )

    def negative_texts(self, batch: int) -> tuple[list[str], ...]:
        """The negative texts for each text encoder, one a prompt; empty where none were given.

        Raises:
            TypeError: prompt and negative prompt are of different types, which Stable Diffusion
                1.x and 2.x pipelines refuse.
            ValueError: there are not as many as prompts.
        """
        prompt, negative = self.prompts[0], self.negatives[0]
        one_encoder = len(self.prompts) == 1
        mixed = None not in (prompt, negative) and type(prompt) is not type(negative)
        if one_encoder and mixed:
            raise TypeError(
                f"negative_prompt must be of the type of prompt, {type(prompt).__name__}, but it "
                f"is {type(negative).__name__}"
            )
        return tuple(_one_a_prompt(texts, batch) for texts in self.negatives)


def count_name(parameters: Mapping[str, Any]) -> str:
    """num_images_per_prompt, or what the pipeline calls it."""
    return next(name for name in parameters if name.startswith("num_"))


def own_arguments(
    signature: inspect.Signature,
    texts: tuple[Texts, ...],
    request: PromptRequest,
    clip_skip: int | None,
) -> dict[str, Any]:
    """Arguments with which the pipeline's own encode_prompt encodes just these texts, once each."""
    arguments: dict[str, Any] = {
        "prompt": texts[0],
        "device": request.device,
        count_name(signature.parameters): 1,
        "do_classifier_free_guidance": False,
        "lora_scale": request.lora_scale,
    }
    if len(texts) > 1:
        arguments["prompt_2"] = texts[1]
    if "clip_skip" in signature.parameters:
        arguments["clip_skip"] = clip_skip
    return arguments


def checked(embeds: Tensor, pooled: Tensor | None, sdxl: bool) -> Encoded:
    """A prompt given as tensors.

    Raises:
        ValueError: SDXL's pooled embedding is missing.
    """
    if sdxl and pooled is None:
        raise ValueError(
            "prompt embeddings were given without their pooled ones, and SDXL needs both: make "
            "them with sefi_fast.prompts.encode_with_pooled"
        )
    return Encoded(embeds, pooled)


def _one_a_prompt(texts: Texts | None, batch: int) -> list[str]:
    listed = [texts or ""] * batch if texts is None or isinstance(texts, str) else texts
    if len(listed) != batch:
        raise ValueError(
            f"there are {len(listed)} negative prompts for {batch} prompts: give one a prompt"
        )
    return listed


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
