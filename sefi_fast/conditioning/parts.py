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
        ModelError: a tokenizer or a text encoder is missing, a tokenizer is not of CLIP's kind, or
            the two of SDXL differ in length.
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
        if not _is_of_clips_kind(found.tokenizer):
            raise ModelError(
                f"{name} has a {names[0]} of type {type(found.tokenizer).__name__}, which does not "
                "cut text as CLIP's does (start, end, and </w> at the end of a word). A subject "
                "stands among CLIP's tokens: use a model with CLIP's tokenizer and text encoder"
            )
        parts.append(found)
    lengths = [part.tokenizer.model_max_length for part in parts]
    if len(set(lengths)) > 1:
        raise ModelError(
            f"the tokenizers of {name} take {lengths[0]} and {lengths[1]} tokens, but the prompts "
            "of both encoders stand side by side: set model_max_length of both to the same"
        )
    return parts


def _is_of_clips_kind(tokenizer: Any) -> bool:
    """Whether a tokenizer marks the start and end of a text, and the end of each word by </w>."""
    marks = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    # Every letter that ends a word is a token of CLIP's; another kind knows none of these.
    letter = tokenizer.convert_tokens_to_ids("a</w>")
    return None not in (*marks, letter) and letter != tokenizer.unk_token_id
