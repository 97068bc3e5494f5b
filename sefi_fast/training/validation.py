"""Pictures of the subject as it is, drawn while it trains."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from sefi_fast.pipelines import attach, detach, generate
from sefi_fast.pipelines.families import is_sdxl
from sefi_fast.subject import Subject
from sefi_fast.training.borrow import borrowed
from sefi_fast.training.config import TrainConfig
from sefi_fast.training.precision import autocast
from sefi_fast.training.source import Source

_USUAL_GUIDANCE = 7.5
_USUAL_GUIDANCE_SDXL = 5.0


def validate(source: Source, subject: Subject, config: TrainConfig, size: int) -> list[Image.Image]:
    """One picture a validation prompt, with the model on its device meanwhile."""
    parts = [x for x in source.pipe.components.values() if isinstance(x, torch.nn.Module)]
    with ExitStack() as stack:
        for part in parts:
            stack.enter_context(borrowed(part, source.device, None))
        stack.enter_context(autocast(source.device, source.dtype))
        return draw_validation(
            source.pipe,
            subject,
            config.validation_prompts,
            seed=config.seed,
            size=size,
            steps=config.validation_steps,
            guidance=guidance_for(source, config),
        )


def guidance_for(source: Source, config: TrainConfig) -> float:
    """The guidance asked for, or what suits the model: the bundled one has its own."""
    if config.validation_guidance is not None:
        return config.validation_guidance
    from sefi_fast.tiny_world import SAMPLING, bundled_model_path

    is_bundled = (
        source.owned if source.model is None else Path(source.model) == bundled_model_path()
    )
    if is_bundled:
        return float(SAMPLING["guidance"])
    return _USUAL_GUIDANCE_SDXL if is_sdxl(source.pipe) else _USUAL_GUIDANCE


def draw_validation(
    pipe: Any,
    subject: Subject,
    sentences: tuple[str, ...],
    *,
    seed: int,
    size: int,
    steps: int,
    guidance: float,
) -> list[Image.Image]:
    """One picture a sentence with `subject` attached, leaving the pipeline as it is.

    Args:
        pipe: a whole pipeline, with its own attention processors in place.
        subject: the current state.
        sentences: with {} where the subject stands.
        seed: of every picture, so that the pictures of a run can be compared.
        size: side length in pixels.
        steps: denoising steps.
        guidance: strength of classifier-free guidance.
    """
    # A call leaves traces on its pipeline and scheduler, so a twin with the same models is called.
    twin = copy.copy(pipe)
    twin.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    twin.set_progress_bar_config(disable=True)
    if is_sdxl(pipe) and pipe.vae.config.force_upcast:
        twin.vae = _without_autocast(pipe.vae)
    try:
        attach(twin, subject)
        with torch.no_grad():
            return [
                generate(
                    twin,
                    sentence.replace("{}", subject.placeholder),
                    n=1,
                    seed=seed,
                    steps=steps,
                    guidance=guidance,
                    height=size,
                    width=size,
                )[0]
                for sentence in sentences
            ]
    finally:
        detach(twin)


def _without_autocast(vae: Any) -> Any:
    """The same VAE, decoding in its weights' own precision: SDXL's overflows in float16."""
    twin = copy.copy(vae)

    def decode(latents: torch.Tensor, *arguments: Any, **keywords: Any) -> Any:
        with torch.autocast(latents.device.type, enabled=False):
            return vae.decode(latents.to(vae.dtype), *arguments, **keywords)

    twin.decode = decode
    return twin
