"""One call of a pipeline's encode_prompt, in the same terms for every family."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from sefi_fast.conditioning import Encoded

Texts: TypeAlias = "str | list[str]"


@dataclass(frozen=True)
class PromptRequest:
    """What a pipeline asks of encode_prompt.

    Attributes:
        prompts, negatives: the texts for each text encoder; None where none were given.
        embeds, negative_embeds: what was given as tensors; None where prompts are to be encoded.
        pooled, negative_pooled: SDXL's pooled embeddings that were given.
        images: pictures (or videos) of each prompt.
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
            "them with sefi_fast.conditioning.encode_with_pooled"
        )
    return Encoded(embeds, pooled)


def _one_a_prompt(texts: Texts | None, batch: int) -> list[str]:
    listed = [texts or ""] * batch if texts is None or isinstance(texts, str) else texts
    if len(listed) != batch:
        raise ValueError(
            f"there are {len(listed)} negative prompts for {batch} prompts: give one a prompt"
        )
    return listed
