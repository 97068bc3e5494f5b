"""Attach subjects to a pipeline of diffusers, and take them off again."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

from sefi_fast.pipelines.encode_prompt import EncodePromptPatch
from sefi_fast.pipelines.model_patch import LOCK
from sefi_fast.pipelines.support import check_pipeline
from sefi_fast.prompts.text_encoder import Pipeline, text_encoders
from sefi_fast.subject import Subject
from sefi_fast.utils.text import check_distinct

AnyPipeline = TypeVar("AnyPipeline", bound=Pipeline)


def attach(
    pipe: AnyPipeline, subjects: Subject | str | Path | Iterable[Subject | str | Path]
) -> AnyPipeline:
    """Make `pipe("… <me> …")` generate the subjects whose placeholders are in the prompt.

    Works with any scheduler, with guidance, negative prompts and several images a prompt, and
    with pipelines that share the U-Net. A prompt without a placeholder gives the image that the
    bare pipeline gives. Attaching again replaces the set of subjects.

    Example:
        >>> pipe = sefi_fast.load_pipeline("path/or/hub-id")
        >>> sefi_fast.attach(pipe, ["me.safetensors", "cat.safetensors"])
        >>> image = pipe("a photo of <me> in the snow").images[0]
        >>> sefi_fast.detach(pipe)

    Args:
        pipe: a Stable Diffusion 1.x, 2.x or SDXL pipeline (text to image, img2img, inpaint,
            ControlNet and the others of docs/compatibility.md).
        subjects: one subject or several, each a Subject or the path of its file.

    Returns:
        The same pipeline.

    Raises:
        ModelError: the pipeline is of another family, or a model of it cannot be patched.
        SubjectFileError: a file cannot be read, or a subject was made for another base model.
        ValueError: no subject was given, or two have the same placeholder.
    """
    check_pipeline(pipe)
    if isinstance(subjects, (Subject, str, Path)):
        subjects = [subjects]
    loaded = tuple(s if isinstance(s, Subject) else Subject.load(s) for s in subjects)
    if not loaded:
        raise ValueError("attach got no subject: give at least one, or call detach(pipe)")
    check_distinct([subject.placeholder for subject in loaded])
    tokenizers, encoders = zip(*text_encoders(pipe), strict=True)
    for subject in loaded:
        subject.check_fits(tokenizers, encoders)
    with LOCK:
        EncodePromptPatch.acquire(pipe).subjects = loaded
    return pipe


def detach(pipe: AnyPipeline) -> AnyPipeline:
    """Take all subjects off: processors, hooks and attributes are as before `attach`.

    Returns:
        The same pipeline, also if nothing was attached.
    """
    with LOCK:
        patch = EncodePromptPatch.of(pipe)
        if patch is not None:
            patch.subjects = ()
            patch.release()
    return pipe
