"""Pictures of the subject as it is, drawn while it trains."""

from __future__ import annotations

import copy
from typing import Any

import torch
from PIL import Image

from sefi_fast.pipelines import attach, detach, generate
from sefi_fast.pipelines.prompt_encoder import PromptEncoder
from sefi_fast.subject import Subject


def draw_validation(
    pipe: Any, subject: Subject, sentences: tuple[str, ...], *, seed: int, size: int, steps: int
) -> list[Image.Image]:
    """One picture a sentence with `subject` attached, leaving the pipeline as it is.

    Args:
        pipe: a whole pipeline, with its own attention processors in place.
        subject: the current state.
        sentences: with {} where the subject stands.
        seed: of every picture, so that the pictures of a run can be compared.
        size: side length in pixels.
        steps: denoising steps.
    """
    # A call leaves traces on its pipeline and scheduler, so a twin with the same models is called.
    twin = copy.copy(pipe)
    if PromptEncoder.of(twin) is not None:
        del twin.encode_prompt
    twin.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    twin.set_progress_bar_config(disable=True)
    attach(twin, subject)
    try:
        with torch.no_grad():
            return [
                generate(
                    twin,
                    sentence.replace("{}", subject.placeholder),
                    n=1,
                    seed=seed,
                    steps=steps,
                    height=size,
                    width=size,
                )[0]
                for sentence in sentences
            ]
    finally:
        detach(twin)
