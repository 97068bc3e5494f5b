"""Encode prompts with subjects into the packed conditioning that pipelines take."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from sefi_fast.errors import SubjectFileError
from sefi_fast.prompts.stages import has_stage_hook, pack
from sefi_fast.prompts.text_encoder import (
    Pipeline,
    TextEncoder,
    encode_text,
    encode_text_pooled,
    text_encoders,
    token_table,
    unwrap,
)
from sefi_fast.prompts.tokenization import tokenize_prompts, with_all_vectors
from sefi_fast.utils.files import MOST_STAGES
from sefi_fast.utils.text import check_distinct, mentions

if TYPE_CHECKING:
    from sefi_fast.subject import Subject

logger = logging.getLogger(__name__)


class PromptEmbeds(NamedTuple):
    """Conditioning of B prompts, named as the arguments of diffusers' pipelines.

    prompt_embeds: packed [B, M, S·(2·C + 1)] or plain [B, M, C].
    pooled_prompt_embeds: [B, P] for one embedding a prompt, [B, S·P] for one a stage; None for
        models that take none.
    """

    prompt_embeds: Tensor
    pooled_prompt_embeds: Tensor | None


def encode(
    pipe: Pipeline,
    prompt: str | list[str],
    *,
    subjects: Subject | Iterable[Subject] | None = None,
    clip_skip: int | None = None,
) -> Tensor:
    """Return the packed conditioning of prompts: all stages and streams (docs/method.md §1).

    Pass it as ``prompt_embeds`` to a pipeline with attached subjects, and that of the negative
    prompt, encoded with the same subjects, as ``negative_prompt_embeds``. The text encoder runs
    each distinct sequence once: 2·S for a prompt with a subject (S if its K and V are tied), one
    for a prompt without.
    SDXL takes pooled embeddings too: `encode_with_pooled` returns both. After encoding, the text
    encoders may be dropped (``pipe.text_encoder = None``).

    Example:
        >>> sefi_fast.attach(pipe, "me.safetensors")
        >>> embeds = sefi_fast.encode(pipe, "a photo of <me> in the snow")
        >>> negative = sefi_fast.encode(pipe, "")
        >>> image = pipe(prompt_embeds=embeds, negative_prompt_embeds=negative).images[0]

    Args:
        pipe: a Stable Diffusion 1.x, 2.x or SDXL pipeline.
        prompt: one prompt or B of them.
        subjects: whose placeholders count; default: those attached to the pipeline. Subjects of
            different S are brought to the least common multiple of their stages.
        clip_skip: as in the pipeline's call.

    Returns:
        [B, M, S·(2·C + 1)] on the pipeline's device, in the text encoder's dtype, with S = 1 if
        there are no subjects. For SDXL C is the sum of both encoders' widths.

    Raises:
        PromptError: a placeholder cannot be used in this position.
        SubjectFileError: a subject is of another width than the pipeline's text encoders.
        ModelError: the pipeline lacks a text encoder or a tokenizer.
        ValueError: two subjects share a placeholder, or need too many stages together.
        TypeError: prompt is neither a string nor a list of strings.
    """
    return encode_with_pooled(pipe, prompt, subjects=subjects, clip_skip=clip_skip).prompt_embeds


@torch.no_grad()
def encode_with_pooled(
    pipe: Pipeline,
    prompt: str | list[str],
    prompt_2: str | list[str] | None = None,
    *,
    subjects: Subject | Iterable[Subject] | None = None,
    clip_skip: int | None = None,
) -> PromptEmbeds:
    """Return the result of `encode`, and for SDXL the pooled embeddings that belong to it.

    On an attached SDXL pipeline, ``pipe(**encode_with_pooled(pipe, "a <me>")._asdict())`` generates
    the same image as ``pipe("a <me>")``.

    Args:
        pipe, prompt, subjects, clip_skip: as for `encode`.
        prompt_2: for SDXL's second text encoder; default: the same as the first.

    Returns:
        prompt_embeds as `encode` returns them, and pooled_prompt_embeds [B, S·P], the second
        encoder's projected embedding of each stage's V sequence (docs/method.md §4); None for
        Stable Diffusion 1.x and 2.x.

    Raises:
        As `encode`.
        ValueError: prompt_2 is of another number than prompt, or the pipeline has one encoder.
    """
    encoders = text_encoders(pipe)
    # Without the stage hook a U-Net would attend to all stages and both streams at once.
    unet = unwrap(getattr(pipe, "unet", None))
    if unet is not None and not has_stage_hook(unet):
        logger.warning(
            "this pipeline cannot generate from packed prompts: call sefi_fast.attach on the one "
            "that generates"
        )
    chosen = _subjects(pipe, subjects)
    prompts = _prompts(prompt)
    second = prompts if prompt_2 is None else _prompts(prompt_2)
    if prompt_2 is not None and len(encoders) == 1:
        raise ValueError(f"prompt_2 is for SDXL; {type(pipe).__name__} has one text encoder")
    if len(second) != len(prompts):
        raise ValueError(f"prompt_2 holds {len(second)} prompts, prompt {len(prompts)}")
    widths = [token_table(one.text_encoder).embedding_dim for one in encoders]
    for subject in chosen:
        found = [tokens.shape[-1] for tokens in subject.tokens]
        if found != widths:
            raise SubjectFileError(
                f"the subject {subject.placeholder!r}, trained on {subject.base_model!r}, has "
                f"tokens of width {found}. The text encoders of this pipeline take {widths}."
            )
    stages = common_stages([subject.stages for subject in chosen])
    device = getattr(pipe, "_execution_device", None) or encoders[0].text_encoder.device
    # Several images of one prompt, and a hundred attached subjects, cost no more than one.
    pairs = list(zip(prompts, second, strict=True))
    distinct = list(dict.fromkeys(pairs))
    named = [
        subject
        for subject in chosen
        if any(mentions(text, subject.placeholder) for pair in distinct for text in pair)
    ]
    streams, pooled = [], None
    for number, encoder in enumerate(encoders):
        texts = with_all_vectors(pipe, [pair[number] for pair in distinct], encoder.tokenizer)
        own, pooled = _encode_by(
            encoder, number, texts, named, stages, device, clip_skip, sdxl=len(encoders) > 1
        )
        streams.append(own)
    dtype = encoders[-1].text_encoder.dtype
    packed = pack(torch.cat([own.to(device, dtype) for own in streams], -1))
    pooled = None if pooled is None else pooled.to(device, dtype)
    if len(distinct) < len(prompts):
        places = torch.tensor([distinct.index(pair) for pair in pairs], device=device)
        packed = packed[places]
        pooled = None if pooled is None else pooled[places]
    return PromptEmbeds(packed, pooled)


def _encode_by(
    encoder: TextEncoder,
    number: int,
    texts: list[str],
    subjects: list[Subject],
    stages: int,
    device: Any,
    clip_skip: int | None,
    *,
    sdxl: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return streams [B, stages, 2, M, C] and pooled [B, stages · P] of one text encoder."""
    placeholders = [subject.in_prompts(encoder.tokenizer) for subject in subjects]
    input_ids, slots = tokenize_prompts(encoder.tokenizer, texts, placeholders)
    rows = [_rows(subjects, row, number) for row in slots]
    counts = [one.shape[0] * one.shape[1] for one in rows]
    repeats = torch.tensor(counts)
    arguments = (
        encoder.text_encoder,
        input_ids.repeat_interleave(repeats, 0).to(device),
        slots.repeat_interleave(repeats, 0) if subjects else None,
        torch.cat([one.flatten(0, 1) for one in rows]) if subjects else None,
        clip_skip,
    )
    encoded, pooled = encode_text_pooled(*arguments) if sdxl else (encode_text(*arguments), None)

    def by_stage(states: Tensor) -> list[Tensor]:
        """Return [stages, 1 or 2, …] of each prompt."""
        return [
            torch.unflatten(x, 0, own.shape[:2]).repeat_interleave(stages // len(own), 0)
            for own, x in zip(rows, torch.split(states, counts), strict=True)
        ]

    streams = torch.stack([x.expand(-1, 2, -1, -1) for x in by_stage(encoded)])
    if pooled is not None:
        pooled = torch.stack([x[:, -1].flatten() for x in by_stage(pooled)])
    return streams, pooled


def _rows(subjects: Sequence[Subject], slots: Tensor, encoder: int) -> Tensor:
    """Return the rows of all subjects [stages, streams, K, C] in the sequences of one prompt."""
    named = set(slots.tolist())
    ends = itertools.accumulate(subject.num_vectors for subject in subjects)
    present = [end in named for end in ends]
    in_prompt = list(itertools.compress(subjects, present))
    stages = math.lcm(*(subject.stages for subject in in_prompt))
    streams = 2 if any(subject.split for subject in in_prompt) else 1
    rows = []
    for subject, there in zip(subjects, present, strict=True):
        tokens = subject.tokens[encoder]
        if not there:
            # No slot names these rows: only their number matters.
            tokens = tokens.new_zeros(1, 1, *tokens.shape[2:])
        rows.append(tokens.repeat_interleave(stages // len(tokens), 0).expand(-1, streams, -1, -1))
    return torch.cat(rows, 2) if rows else torch.empty(1, 1, 0, 0)


def common_stages(stages: Sequence[int]) -> int:
    """Return the least common multiple of subjects' stages."""
    common = math.lcm(*stages)
    if common > MOST_STAGES:
        raise ValueError(
            f"subjects of {', '.join(map(str, stages))} stages need {common} stages together. At "
            f"most {MOST_STAGES} are possible. Train them with stages that divide one another."
        )
    return common


def _subjects(pipe: Pipeline, subjects: Subject | Iterable[Subject] | None) -> list[Subject]:
    if subjects is None:
        # The patch of encode_prompt holds the attached subjects.
        subjects = getattr(vars(pipe).get("encode_prompt"), "subjects", ())
    chosen = list(subjects) if isinstance(subjects, Iterable) else [subjects]
    check_distinct([subject.placeholder for subject in chosen])
    return chosen


def _prompts(prompt: str | list[str]) -> list[str]:
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, (list, tuple)) or not all(isinstance(p, str) for p in prompts):
        raise TypeError(f"prompt must be a string or a list of strings, got {prompt!r}")
    if not prompts:
        raise ValueError("prompt is an empty list; give at least one prompt")
    return list(prompts)
