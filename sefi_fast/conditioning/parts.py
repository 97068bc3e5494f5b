"""The tokenizers and text encoders of a pipeline, in the order of their joined outputs."""

from __future__ import annotations

from typing import Any, NamedTuple

from sefi_fast.errors import ModelError


class TextPart(NamedTuple):
    """One tokenizer and the text encoder that reads its tokens."""

    tokenizer: Any
    text_encoder: Any


def text_parts(pipe: Any) -> list[TextPart]:
    """One part for Stable Diffusion 1.x and 2.x, two for SDXL.

    Raises:
        ModelError: a tokenizer or a text encoder is missing, or the two of SDXL differ in length.
    """
    name = type(pipe).__name__
    two = hasattr(pipe, "text_encoder_2")
    if two and pipe.text_encoder_2 is not None and getattr(pipe, "text_encoder", None) is None:
        raise ModelError(
            f"{name} has the second text encoder of SDXL alone, as the refiner has; subjects need "
            "both. Use them with the base model and give the refiner the class word in their place"
        )
    parts = []
    for suffix in ("", "_2") if two else ("",):
        names = (f"tokenizer{suffix}", f"text_encoder{suffix}")
        found = TextPart(*(getattr(pipe, part, None) for part in names))
        for part, value in zip(names, found, strict=True):
            if value is None:
                raise ModelError(
                    f"{name} has no {part}, which is needed to encode prompts: load the pipeline "
                    f"with its {part}"
                )
        parts.append(found)
    lengths = [part.tokenizer.model_max_length for part in parts]
    if len(set(lengths)) > 1:
        raise ModelError(
            f"the tokenizers of {name} take {lengths[0]} and {lengths[1]} tokens, but the prompts "
            "of both encoders stand side by side: set model_max_length of both to the same"
        )
    return parts
