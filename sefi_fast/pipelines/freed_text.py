"""Packed prompts where a pipeline's text encoders are gone: what they were, and what wants them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from sefi_fast.conditioning.parts import TextPart, text_parts
from sefi_fast.errors import ModelError
from sefi_fast.pipelines.families import is_sdxl

if TYPE_CHECKING:
    from sefi_fast.pipelines.prompt_encoder import PromptEncoder
    from sefi_fast.pipelines.prompt_request import PromptRequest

_TIME_IDS = "_get_add_time_ids"


class TextShape(NamedTuple):
    """What has to be known of a pipeline's text encoders to draw what they encoded.

    width: C, columns of a plain prompt. pooled_width: P, numbers of one pooled embedding.
    """

    width: int
    pooled_width: int

    @classmethod
    def of(cls, pipe: Any) -> TextShape:
        """Raises ModelError if a tokenizer or a text encoder is missing."""
        parts = text_parts(pipe)
        return cls(
            sum(part.text_encoder.config.hidden_size for part in parts),
            parts[-1].text_encoder.config.projection_dim,
        )


def freed_parts(pipe: Any) -> list[str]:
    """Names of the tokenizers and text encoders that the pipeline should have and has not."""
    names = [name for pair in _names(pipe) for name in pair]
    return [name for name in names if getattr(pipe, name, None) is None]


def present_parts(pipe: Any) -> list[TextPart]:
    """The tokenizers and text encoders of which both are there."""
    pairs = (TextPart(*(getattr(pipe, name, None) for name in pair)) for pair in _names(pipe))
    return [pair for pair in pairs if None not in pair]


def _names(pipe: Any) -> list[tuple[str, str]]:
    suffixes = ("", "_2") if is_sdxl(pipe) else ("",)
    return [(f"tokenizer{suffix}", f"text_encoder{suffix}") for suffix in suffixes]


def check_nothing_to_encode(pipe: Any, request: PromptRequest) -> None:
    """Raise ModelError where a prompt is still to be encoded, and what encodes it is gone."""
    missing = freed_parts(pipe)
    zeros = request.negatives[0] is None and pipe.config.get("force_zeros_for_empty_prompt")
    if not missing:
        return
    if request.embeds is None:
        what, remedy = "prompt", "give it as prompt_embeds"
    elif request.guidance and request.negative_embeds is None and not zeros:
        what = "negative prompt"
        remedy = "give it (or '') as negative_prompt_embeds, or draw with guidance_scale=1,"
    else:
        return
    maker = "conditioning.encode_with_pooled" if is_sdxl(pipe) else "encode"
    raise ModelError(
        f"the {' and the '.join(missing)} of this {type(pipe).__name__} are gone, and the {what} "
        f"is still to be encoded: {remedy} made by sefi_fast.{maker} while they were there"
    )


def prompt_dtype(pipe: Any) -> torch.dtype:
    """That of the last text encoder; of the U-Net where that one is gone, as in diffusers."""
    last = pipe.text_encoder_2 if is_sdxl(pipe) else pipe.text_encoder
    dtype: torch.dtype = (pipe.unet if last is None else last).dtype
    return dtype


class TimeIds:
    """Stands at the `_get_add_time_ids` of an SDXL pipeline without its second text encoder.

    diffusers then takes the width of the pooled embeddings for that of one, but packed prompts have
    one a stage.
    """

    def __init__(self, encoder: PromptEncoder) -> None:
        self._encoder = encoder

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        kwargs["text_encoder_projection_dim"] = self._encoder.text.pooled_width
        return getattr(type(self._encoder.pipe), _TIME_IDS)(self._encoder.pipe, *args, **kwargs)


def put_time_ids(pipe: Any, encoder: PromptEncoder) -> None:
    """Put `TimeIds` on a pipeline that needs it; again is no more."""
    if is_sdxl(pipe) and pipe.text_encoder_2 is None and _TIME_IDS not in vars(pipe):
        setattr(pipe, _TIME_IDS, TimeIds(encoder))


def remove_time_ids(pipe: Any) -> None:
    """End that."""
    if isinstance(vars(pipe).get(_TIME_IDS), TimeIds):
        delattr(pipe, _TIME_IDS)
