"""Encode prompts with subjects into the packed conditioning that pipelines pass on."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from sefi_fast.conditioning.packing import pack
from sefi_fast.conditioning.prompt import class_token_id, tokenize_prompts
from sefi_fast.conditioning.text import encode_text, token_table
from sefi_fast.errors import ModelError, SubjectFileError

if TYPE_CHECKING:
    from sefi_fast.subject import Subject

MOST_STAGES = 60


class _Plan(NamedTuple):
    """What one prompt asks of the text encoder: its distinct sequences only.

    stages, streams: of the subjects that stand in this prompt; 1, 1 without any.
    rows: [stages · streams, K, C], the subjects' rows of each sequence.
    """

    stages: int
    streams: int
    rows: Tensor


@torch.no_grad()
def encode(
    pipe: Any,
    prompt: str | list[str],
    *,
    subjects: Subject | Iterable[Subject] | None = None,
    clip_skip: int | None = None,
) -> Tensor:
    """The packed conditioning of prompts: all stages, K and V streams (docs/method.md §1, §3).

    Pass it to the pipeline as ``prompt_embeds``, and that of the negative prompt, encoded with the
    same subjects, as ``negative_prompt_embeds``. The text encoder sees each distinct sequence once:
    2·S for a prompt with a subject (S if its K and V are tied), one for a prompt without.

    Args:
        pipe: a Stable Diffusion 1.x or 2.x pipeline.
        prompt: one prompt or B of them.
        subjects: whose placeholders count; default: those attached to the pipeline. Subjects of
            different S are brought to the least common multiple of their stages.
        clip_skip: as in the pipeline's call.

    Returns:
        [B, S·2·M + 1, C] on the pipeline's device, in the text encoder's dtype, with S = 1 if there
        are no subjects.

    Raises:
        PromptError: a placeholder cannot be used where it stands.
        SubjectFileError: a subject is of another width than the pipeline's text encoder.
        ModelError: the pipeline has no text encoder and tokenizer, or several.
        ValueError: two subjects share a placeholder, or need more than 60 stages together.
        TypeError: prompt is neither a string nor a list of strings.
    """
    tokenizer, text_encoder = _text_parts(pipe)
    chosen = _subjects(pipe, subjects)
    prompts = _prompts(prompt)
    placeholders = [(s.placeholder, class_token_id(tokenizer, s.class_word)) for s in chosen]
    width = token_table(text_encoder).embedding_dim
    for subject in chosen:
        found = [tokens.shape[-1] for tokens in subject.tokens]
        if found != [width]:
            raise SubjectFileError(
                f"the subject {subject.placeholder!r}, trained on {subject.base_model!r}, has "
                f"tokens of width {found}, this pipeline's text encoder takes [{width}]"
            )
    stages = _common_stages([subject.stages for subject in chosen])
    input_ids, slots = tokenize_prompts(tokenizer, prompts, placeholders)

    plans = [_plan(chosen, row) for row in slots]
    sequences = torch.tensor([plan.rows.shape[0] for plan in plans])
    device = getattr(pipe, "_execution_device", None) or text_encoder.device
    encoded = encode_text(
        text_encoder,
        input_ids.repeat_interleave(sequences, 0).to(device),
        slots.repeat_interleave(sequences, 0) if chosen else None,
        torch.cat([plan.rows for plan in plans]) if chosen else None,
        clip_skip,
    )
    streams = []
    for plan, part in zip(plans, encoded.split(sequences.tolist()), strict=True):
        own = part.unflatten(0, (plan.stages, plan.streams))
        own = own.expand(-1, 2, -1, -1).repeat_interleave(stages // plan.stages, 0)
        streams.append(own)
    return pack(torch.stack(streams)).to(device=device, dtype=text_encoder.dtype)


def _plan(subjects: Sequence[Subject], slots: Tensor) -> _Plan:
    present = [bool((slots == number).any()) for number in range(1, len(subjects) + 1)]
    standing = [subject for subject, there in zip(subjects, present, strict=True) if there]
    stages = math.lcm(*(subject.stages for subject in standing))
    streams = 2 if any(subject.split for subject in standing) else 1
    rows = []
    for subject, there in zip(subjects, present, strict=True):
        tokens = subject.tokens[0]
        if there:
            by_stage = tokens.repeat_interleave(stages // subject.stages, 0)
            rows.append(by_stage.expand(-1, streams, -1).flatten(0, 1))
        else:
            # No slot names these rows: only their number matters.
            rows.append(tokens.new_zeros(stages * streams, tokens.shape[-1]))
    return _Plan(stages, streams, torch.stack(rows, 1) if rows else torch.empty(1, 0, 0))


def _common_stages(stages: Sequence[int]) -> int:
    common = math.lcm(*stages)
    if common > max(MOST_STAGES, *stages, 1):
        raise ValueError(
            f"subjects of {', '.join(map(str, stages))} stages need {common} stages together, "
            f"{MOST_STAGES} at most are possible; train them with stages that divide one another"
        )
    return common


def _text_parts(pipe: Any) -> tuple[Any, Any]:
    tokenizer = getattr(pipe, "tokenizer", None)
    text_encoder = getattr(pipe, "text_encoder", None)
    name = type(pipe).__name__
    if getattr(pipe, "text_encoder_2", None) is not None:
        raise ModelError(
            f"{name} has several text encoders; this version encodes for Stable Diffusion 1.x and "
            "2.x pipelines, which have one"
        )
    if tokenizer is None or text_encoder is None:
        raise ModelError(
            f"{name} needs a tokenizer and a text_encoder to encode prompts; load the pipeline "
            "with both"
        )
    return tokenizer, text_encoder


def _subjects(pipe: Any, subjects: Subject | Iterable[Subject] | None) -> list[Subject]:
    if subjects is None:
        # Subjects are attached to what stands in for the pipeline's own encode_prompt.
        subjects = getattr(vars(pipe).get("encode_prompt"), "subjects", ())
    chosen = list(subjects) if isinstance(subjects, Iterable) else [subjects]
    names = [subject.placeholder for subject in chosen]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(
                f"{names.count(name)} subjects share the placeholder {name!r}; give each its own"
            )
    return chosen


def _prompts(prompt: str | list[str]) -> list[str]:
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, (list, tuple)) or not all(isinstance(p, str) for p in prompts):
        raise TypeError(f"prompt must be a string or a list of strings, got {prompt!r}")
    if not prompts:
        raise ValueError("prompt is an empty list; give at least one prompt")
    return list(prompts)
