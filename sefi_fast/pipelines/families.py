"""Tell the pipelines the method fits from those it does not, and say why."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from diffusers import ControlNetModel, UNet2DConditionModel
from torch import nn

from sefi_fast.errors import ModelError

WORKS_WITH = (
    "this version works with Stable Diffusion 1.x and 2.x pipelines of diffusers (text to image, "
    "img2img, inpaint, ControlNet): one CLIP text encoder and a UNet2DConditionModel"
)

_ENCODE_PROMPT_ARGUMENTS = (
    "prompt",
    "device",
    "num_images_per_prompt",
    "do_classifier_free_guidance",
    "negative_prompt",
    "prompt_embeds",
    "negative_prompt_embeds",
    "lora_scale",
    "clip_skip",
)


def check_pipeline(pipe: Any) -> None:
    """Raise ModelError unless `pipe` is a Stable Diffusion 1.x or 2.x pipeline."""
    name = type(pipe).__name__
    if getattr(pipe, "text_encoder_2", None) is not None:
        raise ModelError(f"{name} is of the SDXL family (two text encoders); {WORKS_WITH}")
    if getattr(pipe, "transformer", None) is not None:
        raise ModelError(
            f"{name} denoises with a transformer ({type(pipe.transformer).__name__}), which has no "
            f"U-Net with cross-attention layers; {WORKS_WITH}"
        )
    unet = unwrap(getattr(pipe, "unet", None))
    if not isinstance(unet, UNet2DConditionModel):
        raise ModelError(f"{name} has a U-Net of type {type(unet).__name__}; {WORKS_WITH}")
    for part in ("text_encoder", "tokenizer"):
        if getattr(pipe, part, None) is None:
            raise ModelError(
                f"{name} has no {part}, which is needed to encode prompts: load the pipeline with "
                f"its {part}"
            )
    own = getattr(type(pipe), "encode_prompt", None)
    arguments = tuple(inspect.signature(own).parameters)[1:] if own is not None else ()
    if arguments != _ENCODE_PROMPT_ARGUMENTS:
        raise ModelError(
            f"{name}.encode_prompt takes ({', '.join(arguments)}) and not what Stable Diffusion "
            f"1.x and 2.x pipelines take; {WORKS_WITH}"
        )


def check_model_index(index: Mapping[str, Any], source: str) -> None:
    """Raise ModelError unless a model_index.json describes a Stable Diffusion 1.x or 2.x folder."""
    name = index.get("_class_name", "no pipeline class")
    if "transformer" in index:
        part = _component(index, "transformer") or "transformer"
        raise ModelError(
            f"{source} holds a {name}, which denoises with a {part}, not with a U-Net; {WORKS_WITH}"
        )
    if _component(index, "text_encoder_2") is not None:
        raise ModelError(f"{source} holds a {name}, of the SDXL family; {WORKS_WITH}")
    wanted = {
        "unet": "UNet2DConditionModel",
        "text_encoder": "CLIPTextModel",
        "vae": "AutoencoderKL",
    }
    for part, kind in wanted.items():
        found = _component(index, part)
        if found != kind:
            raise ModelError(
                f"{source} holds a {name} whose {part} is {found or 'missing'} instead of "
                f"{kind}; {WORKS_WITH}"
            )


def conditioned_models(pipe: Any) -> Iterator[nn.Module]:
    """The models of a pipeline that are called with the prompt: the U-Net and every ControlNet."""
    yield unwrap(pipe.unet)
    controlnet = unwrap(getattr(pipe, "controlnet", None))
    for model in getattr(controlnet, "nets", [controlnet]):
        if model is None:
            continue
        model = unwrap(model)
        if not isinstance(model, ControlNetModel):
            raise ModelError(
                f"{type(pipe).__name__} has a ControlNet of type {type(model).__name__}; this "
                "version works with ControlNetModel and MultiControlNetModel"
            )
        yield model


def unwrap(model: Any) -> Any:
    """The module that torch.compile wrapped, or the module itself."""
    return getattr(model, "_orig_mod", model)


def _component(index: Mapping[str, Any], part: str) -> str | None:
    entry = index.get(part)
    return entry[1] if isinstance(entry, (list, tuple)) and len(entry) == 2 else None
