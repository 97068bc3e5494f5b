"""Attach subjects to a pipeline of diffusers, and take them off again."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

from sefi_fast.pipelines.encode_prompt import PromptEncoder
from sefi_fast.pipelines.model_patch import LOCK
from sefi_fast.pipelines.support import check_pipeline
from sefi_fast.prompts.text_encoder import text_parts
from sefi_fast.subject import Subject
from sefi_fast.utils.text import check_distinct

Pipeline = TypeVar("Pipeline")


def attach(
    pipe: Pipeline, subjects: Subject | str | Path | Iterable[Subject | str | Path]
) -> Pipeline:
    """Make `pipe("… <me> …")` draw the subjects whose placeholders stand in the prompt.

    Works with any scheduler, with guidance, negative prompts and several images a prompt, and
    with pipelines that share the U-Net. A prompt without a placeholder gives the image that the
    bare pipeline gives. Attaching again replaces the set of subjects.

    Args:
        pipe: a Stable Diffusion 1.x, 2.x or SDXL pipeline (text to image, img2img, inpaint,
            ControlNet and the others of docs/compatibility.md).
        subjects: one subject or several, each a Subject or the path of its file.

    Returns:
        The same pipeline.

    Raises:
        ModelError: the pipeline is of another family, or its attention processors do what a
            subject cannot stand beside.
        SubjectFileError: a file cannot be read, or a subject was made for another base model.
        ValueError: no subject was given, or two have the same placeholder.
    """
    check_pipeline(pipe)
    loaded = _load(subjects)
    tokenizers, text_encoders = zip(*text_parts(pipe), strict=True)
    for subject in loaded:
        subject.check_fits(tokenizers, text_encoders)
    with LOCK:
        PromptEncoder.acquire(pipe).subjects = loaded
    return pipe


def detach(pipe: Pipeline) -> Pipeline:
    """Take all subjects off: processors, hooks and attributes are as before `attach`.

    Returns:
        The same pipeline; one that has nothing attached is returned as it is.
    """
    with LOCK:
        encoder = PromptEncoder.of(pipe)
        if encoder is not None:
            encoder.subjects = ()
            encoder.release()
    return pipe


def _load(
    subjects: Subject | str | Path | Iterable[Subject | str | Path],
) -> tuple[Subject, ...]:
    if isinstance(subjects, (Subject, str, Path)):
        subjects = [subjects]
    loaded = tuple(s if isinstance(s, Subject) else Subject.load(s) for s in subjects)
    if not loaded:
        raise ValueError("attach got no subject: give at least one, or call detach(pipe)")
    check_distinct([subject.placeholder for subject in loaded])
    return loaded
