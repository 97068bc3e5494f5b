"""Encode prompts with subjects into the packed conditioning that pipelines pass on."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from sefi_fast.errors import SubjectFileError
from sefi_fast.prompts.stages import StageHook, pack
from sefi_fast.prompts.text_encoder import (
    TextPart,
    encode_text,
    encode_text_pooled,
    text_parts,
    token_table,
)
from sefi_fast.prompts.tokenization import tokenize_prompts, with_all_vectors
from sefi_fast.utils.files import MOST_STAGES
from sefi_fast.utils.text import check_distinct, mentions

if TYPE_CHECKING:
    from sefi_fast.subject import Subject

logger = logging.getLogger(__name__)


class Encoded(NamedTuple):
    """Conditioning of B prompts, named as the pipelines of diffusers name it.

    prompt_embeds: packed [B, M, S·(2·C + 1)] or plain [B, M, C].
    pooled_prompt_embeds: [B, P] for one embedding a prompt, [B, S·P] for one a stage; None for
        models that take none.
    """

    prompt_embeds: Tensor
    pooled_prompt_embeds: Tensor | None


class _Plan(NamedTuple):
    """What one prompt asks of a text encoder: its distinct sequences only.

    stages, streams: of the subjects that stand in this prompt; 1, 1 without any.
    rows: [stages · streams, K, C], the rows of all subjects in each sequence.
    """

    stages: int
    streams: int
    rows: Tensor


def encode(
    pipe: Any,
    prompt: str | list[str],
    *,
    subjects: Subject | Iterable[Subject] | None = None,
    clip_skip: int | None = None,
) -> Tensor:
    """The packed conditioning of prompts: all stages, K and V streams (docs/method.md §1, §3).

    Pass it as ``prompt_embeds`` to a pipeline that subjects are attached to, and that of the
    negative prompt, encoded with the same subjects, as ``negative_prompt_embeds``. The text encoder
    sees each distinct sequence once: 2·S for a prompt with a subject (S if its K and V are tied),
    one for a prompt without.
    SDXL wants pooled embeddings beside it: `encode_with_pooled` gives both. Both prompts made, the
    text encoders may go (``pipe.text_encoder = None``).

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
        PromptError: a placeholder cannot be used where it stands.
        SubjectFileError: a subject is of another width than the pipeline's text encoders.
        ModelError: the pipeline lacks a text encoder or a tokenizer.
        ValueError: two subjects share a placeholder, or need too many stages together.
        TypeError: prompt is neither a string nor a list of strings.
    """
    return encode_with_pooled(pipe, prompt, subjects=subjects, clip_skip=clip_skip).prompt_embeds


@torch.no_grad()
def encode_with_pooled(
    pipe: Any,
    prompt: str | list[str],
    prompt_2: str | list[str] | None = None,
    *,
    subjects: Subject | Iterable[Subject] | None = None,
    clip_skip: int | None = None,
) -> Encoded:
    """`encode`, and for SDXL the pooled embeddings that belong to it.

    ``pipe(**encode_with_pooled(pipe, "a <me>")._asdict())`` draws what ``pipe("a <me>")`` draws on
    an attached SDXL pipeline.

    Args:
        pipe, prompt, subjects, clip_skip: as for `encode`.
        prompt_2: for SDXL's second text encoder; default: the same as the first.

    Returns:
        prompt_embeds as `encode` gives it, and pooled_prompt_embeds [B, S·P], the second encoder's
        projected embedding of each stage's V sequence (docs/method.md §4); None for Stable
        Diffusion 1.x and 2.x.

    Raises:
        As `encode`.
        ValueError: prompt_2 is of another number than prompt, or the pipeline has one encoder.
    """
    parts = text_parts(pipe)
    _warn_unless_packed_prompts_are_known(pipe)
    chosen = _subjects(pipe, subjects)
    prompts = _prompts(prompt)
    second = prompts if prompt_2 is None else _prompts(prompt_2)
    if prompt_2 is not None and len(parts) == 1:
        raise ValueError(f"prompt_2 is for SDXL; {type(pipe).__name__} has one text encoder")
    if len(second) != len(prompts):
        raise ValueError(f"prompt_2 holds {len(second)} prompts, prompt {len(prompts)}")
    widths = [token_table(part.text_encoder).embedding_dim for part in parts]
    for subject in chosen:
        found = [tokens.shape[-1] for tokens in subject.tokens]
        if found != widths:
            raise SubjectFileError(
                f"the subject {subject.placeholder!r}, trained on {subject.base_model!r}, has "
                f"tokens of width {found}, the text encoders of this pipeline take {widths}"
            )
    stages = common_stages([subject.stages for subject in chosen])
    device = getattr(pipe, "_execution_device", None) or parts[0].text_encoder.device
    # Several images of one prompt, and a hundred subjects attached, cost no more than one.
    distinct = {
        pair: place for place, pair in enumerate(dict.fromkeys(zip(prompts, second, strict=True)))
    }
    named = [
        s
        for s in chosen
        if any(mentions(text, s.placeholder) for pair in distinct for text in pair)
    ]
    streams, pooled = [], None
    for number, part in enumerate(parts):
        texts = with_all_vectors(pipe, [pair[number] for pair in distinct], part.tokenizer)
        own, pooled = _encode_part(
            part, number, texts, named, stages, device, clip_skip, penultimate=len(parts) > 1
        )
        streams.append(own)
    dtype = parts[-1].text_encoder.dtype
    packed = pack(torch.cat([own.to(device, dtype) for own in streams], -1))
    pooled = None if pooled is None else pooled.to(device, dtype)
    if len(distinct) < len(prompts):
        places = torch.tensor(
            [distinct[pair] for pair in zip(prompts, second, strict=True)], device=device
        )
        packed = packed[places]
        pooled = None if pooled is None else pooled[places]
    return Encoded(packed, pooled)


def _warn_unless_packed_prompts_are_known(pipe: Any) -> None:
    """A U-Net without the stage hook would look at all stages and both streams at once."""
    unet: Any = getattr(pipe, "unet", None)
    hooks = getattr(getattr(unet, "_orig_mod", unet), "_forward_pre_hooks", None)
    if hooks is not None and not any(isinstance(hook, StageHook) for hook in hooks.values()):
        logger.warning(
            "this pipeline cannot draw packed prompts: call sefi_fast.attach on the one that is to"
        )


def _encode_part(
    part: TextPart,
    number: int,
    texts: list[str],
    chosen: list[Subject],
    stages: int,
    device: Any,
    clip_skip: int | None,
    *,
    penultimate: bool,
) -> tuple[Tensor, Tensor | None]:
    """Streams [B, stages, 2, M, C] and pooled [B, stages · P] of one text encoder."""
    placeholders = [subject.in_prompts(part.tokenizer) for subject in chosen]
    input_ids, slots = tokenize_prompts(part.tokenizer, texts, placeholders)
    plans = [_plan(chosen, row, number) for row in slots]
    counts = torch.tensor([plan.rows.shape[0] for plan in plans])
    arguments = (
        part.text_encoder,
        input_ids.repeat_interleave(counts, 0).to(device),
        slots.repeat_interleave(counts, 0) if chosen else None,
        torch.cat([plan.rows for plan in plans]) if chosen else None,
        clip_skip,
    )
    if penultimate:
        encoded, pooled = encode_text_pooled(*arguments)
    else:
        encoded, pooled = encode_text(*arguments), None
    sequences = encoded.split(counts.tolist())
    streams = []
    for plan, own in zip(plans, sequences, strict=True):
        own = own.unflatten(0, (plan.stages, plan.streams)).expand(-1, 2, -1, -1)
        streams.append(own.repeat_interleave(stages // plan.stages, 0))
    if pooled is None:
        return torch.stack(streams), None
    by_stage = []
    for plan, own in zip(plans, pooled.split(counts.tolist()), strict=True):
        values = own.unflatten(0, (plan.stages, plan.streams))[:, -1]
        by_stage.append(values.repeat_interleave(stages // plan.stages, 0).flatten())
    return torch.stack(streams), torch.stack(by_stage)


def _plan(subjects: Sequence[Subject], slots: Tensor, encoder: int) -> _Plan:
    named = set(slots.tolist())
    ends = itertools.accumulate(subject.num_vectors for subject in subjects)
    present = [end in named for end in ends]
    standing = [subject for subject, there in zip(subjects, present, strict=True) if there]
    stages = math.lcm(*(subject.stages for subject in standing))
    streams = 2 if any(subject.split for subject in standing) else 1
    rows = []
    for subject, there in zip(subjects, present, strict=True):
        tokens = subject.tokens[encoder]
        if there:
            by_stage = tokens.repeat_interleave(stages // subject.stages, 0)
            rows.append(by_stage.expand(-1, streams, -1, -1).flatten(0, 1))
        else:
            # No slot names these rows: only their number matters.
            rows.append(tokens.new_zeros(stages * streams, *tokens.shape[2:]))
    return _Plan(stages, streams, torch.cat(rows, 1) if rows else torch.empty(1, 0, 0))


def common_stages(stages: Sequence[int]) -> int:
    """Return the least common multiple of subjects' stages.

    Raises:
        ValueError: it is above what one subject may have.
    """
    common = math.lcm(*stages)
    if common > MOST_STAGES:
        raise ValueError(
            f"subjects of {', '.join(map(str, stages))} stages need {common} stages together, "
            f"{MOST_STAGES} at most are possible; train them with stages that divide one another"
        )
    return common


def _subjects(pipe: Any, subjects: Subject | Iterable[Subject] | None) -> list[Subject]:
    if subjects is None:
        # Subjects are attached to what stands in for the pipeline's own encode_prompt.
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
