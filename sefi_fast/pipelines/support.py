"""The pipelines that the method fits, their parts, and reasons for refusing others."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from diffusers import (
    ControlNetModel,
    ControlNetUnionModel,
    UNet2DConditionModel,
    UNetControlNetXSModel,
    UNetMotionModel,
)
from torch import nn

from sefi_fast.errors import ModelError
from sefi_fast.prompts.text_encoder import Pipeline, text_encoders, unwrap

WORKS_WITH = (
    "sefi_fast works with pipelines of diffusers for Stable Diffusion 1.x, 2.x and SDXL: CLIP text "
    "encoders and a UNet2DConditionModel, whose cross-attention takes the subject"
)


class TextShape(NamedTuple):
    """The widths of a pipeline's prompts, also known after its text encoders were taken off.

    width: C, columns of a plain prompt.
    pooled_width: P, numbers of one pooled embedding.
    """

    width: int
    pooled_width: int

    @classmethod
    def of(cls, pipe: Pipeline) -> TextShape:
        """Return the widths by the text encoders."""
        configs = [one.text_encoder.config for one in text_encoders(pipe)]
        return cls(sum(config.hidden_size for config in configs), configs[-1].projection_dim)


_SD_ARGUMENTS = (
    *("prompt", "device", "num_images_per_prompt", "do_classifier_free_guidance"),
    *("negative_prompt", "prompt_embeds", "negative_prompt_embeds", "lora_scale", "clip_skip"),
)
_SDXL_ARGUMENTS = (
    *_SD_ARGUMENTS,
    *("prompt_2", "negative_prompt_2", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"),
)

_CLASS_WORD_INSTEAD = "Write the class word in place of the subject there, or take another pipeline"

# Attributes of pipelines that use their prompt outside of encode_prompt too.
_OTHER_USES = {
    "prior_text_encoder": "encodes its prompt a second time, for a prior",
    "construct_direction": "moves its prompt by the difference of two plain ones",
}


def check_pipeline(pipe: Pipeline) -> None:
    """Raise ModelError unless `pipe` is a Stable Diffusion 1.x, 2.x or SDXL pipeline."""
    name = type(pipe).__name__
    transformer = getattr(pipe, "transformer", None)
    if transformer is not None:
        raise ModelError(
            f"{name} denoises with a transformer ({type(transformer).__name__}), which has no "
            f"U-Net with cross-attention layers; {WORKS_WITH}"
        )
    unet = unwrap(getattr(pipe, "unet", None))
    if not isinstance(unet, (UNet2DConditionModel, UNetMotionModel, UNetControlNetXSModel)):
        raise ModelError(f"{name} has a U-Net of type {type(unet).__name__}; {WORKS_WITH}")
    own = getattr(type(pipe), "encode_prompt", None)
    if own is None:
        raise ModelError(
            f"{name} has no encode_prompt, which subjects need. {_CLASS_WORD_INSTEAD}; {WORKS_WITH}"
        )
    wanted = _SDXL_ARGUMENTS if len(text_encoders(pipe)) == 2 else _SD_ARGUMENTS
    arguments = [arg.replace("videos", "images") for arg in inspect.signature(own).parameters][1:]
    missing = [arg for arg in wanted if arg not in (*arguments, "clip_skip")]
    further = [arg for arg in arguments if arg not in wanted]
    both = (("without", missing), ("with", further))
    if differs := [f"{word} {', '.join(some)}" for word, some in both if some]:
        raise ModelError(
            f"{name}.encode_prompt is another function than that of its family "
            f"({' and '.join(differs)}). {_CLASS_WORD_INSTEAD}; {WORKS_WITH}"
        )
    for attribute, use in _OTHER_USES.items():
        if getattr(pipe, attribute, None) is not None:
            raise ModelError(
                f"{name} {use}, where a subject would be missing. {_CLASS_WORD_INSTEAD}."
            )


def check_scheduler(scheduler: Any) -> None:
    """Raise ModelError for timesteps that are not steps of the training's noise schedule.

    EDM's schedulers, and Euler's with continuous times, hand the U-Net a quarter of log σ, -2 to 1:
    every step would be the subject's cleanest stage.
    """
    config, name = scheduler.config, type(scheduler).__name__
    continuous = getattr(config, "timestep_type", None) == "continuous"
    if name.startswith("EDM") or (continuous and config.prediction_type == "v_prediction"):
        raise ModelError(
            f"the pipeline's {name} counts time by the logarithm of the noise, which cannot be "
            "mapped to a subject's stages. Set pipe.scheduler to one of DDIM, DPM-Solver++, "
            "Euler …. Models trained with such times (Playground 2.5, CosXL) are not supported."
        )


def check_not_compiled(models: Iterable[nn.Module], request: str) -> None:
    """Raise ModelError if torch.compile hides the calls of a layer that `request` needs."""
    for model in models:
        inside = unwrap(model)
        parts = inside.modules()
        if inside is not model or any(part._compiled_call_impl is not None for part in parts):
            raise ModelError(
                f"the {type(inside).__name__} is compiled, which hides the calls of its layers. "
                f"{request.capitalize()} before torch.compile."
            )


def encodes_apart(pipe: Pipeline) -> bool:
    """Return whether the pipeline joins prompts of several calls of encode_prompt."""
    # FreeNoise of AnimateDiff encodes the negative prompts of all frames by themselves.
    return getattr(pipe, "free_noise_enabled", False) or type(pipe).__name__ in (
        "CycleDiffusionPipeline",
        "StableDiffusionDiffEditPipeline",
    )


def check_model_index(index: Mapping[str, Any], source: str) -> None:
    """Raise ModelError unless a model_index.json describes a family that the method fits."""
    name = index.get("_class_name", "no pipeline class")
    if not isinstance(name, str):
        raise ModelError(
            f"{source} names its pipeline's class as {name!r}, which is code of its own. Such code "
            "is not run. Load a model that the pipelines of diffusers fit."
        )
    if "transformer" in index:
        part = _component(index, "transformer") or "transformer"
        raise ModelError(
            f"{source} holds a {name}, which denoises with a {part}, not with a U-Net; {WORKS_WITH}"
        )
    clip = ("CLIPTokenizer", "CLIPTokenizerFast")
    wanted: dict[str, tuple[str, ...]] = {
        "unet": ("UNet2DConditionModel",),
        "text_encoder": ("CLIPTextModel",),
        "vae": ("AutoencoderKL",),
        "tokenizer": clip,
    }
    if is_sdxl_index(index):
        wanted |= {"text_encoder_2": ("CLIPTextModelWithProjection",), "tokenizer_2": clip}
        if _component(index, "text_encoder") is None:
            raise ModelError(
                f"{source} holds a {name} with the second text encoder alone, as SDXL's refiner "
                "has. Load the base model, and run the refiner on its images without subjects."
            )
    for part, kinds in wanted.items():
        found = _component(index, part)
        if found not in kinds:
            raise ModelError(
                f"{source} holds a {name} whose {part} is {found or 'missing'} instead of "
                f"{kinds[0]}; {WORKS_WITH}"
            )
    # diffusers imports the module that an entry names.
    for part in (*wanted, "scheduler"):
        library = "transformers" if part.startswith("t") else "diffusers"
        if _component(index, part) is None or index[part][0] != library:
            raise ModelError(
                f"{source} takes its {part} from {index.get(part)!r} instead of {library}. Code of "
                "a model's own is not run. Get the model from its publisher again."
            )


def is_sdxl_index(index: Mapping[str, Any]) -> bool:
    """Return whether a model_index.json describes a pipeline with a second text encoder."""
    return _component(index, "text_encoder_2") is not None


def given_models(pipe: Pipeline) -> Iterator[nn.Module]:
    """Yield the U-Net and every ControlNet as the pipeline has them, compiled or not."""
    yield pipe.unet
    if isinstance(unwrap(pipe.unet), UNetControlNetXSModel):
        # The U-Net has the ControlNet's layers among its own.
        return
    controlnet = getattr(pipe, "controlnet", None)
    for model in getattr(unwrap(controlnet), "nets", [controlnet]):
        if model is not None:
            yield model


def conditioned_models(pipe: Pipeline) -> Iterator[nn.Module]:
    """Yield the models that are called with the prompt: the U-Net and every ControlNet."""
    for number, model in enumerate(map(unwrap, given_models(pipe))):
        if number and not isinstance(model, (ControlNetModel, ControlNetUnionModel)):
            raise ModelError(
                f"{type(pipe).__name__} has a ControlNet of type {type(model).__name__}. Use a "
                "ControlNetModel, a ControlNetUnionModel or several of them."
            )
        yield model


def _component(index: Mapping[str, Any], part: str) -> str | None:
    entry = index.get(part)
    return entry[1] if isinstance(entry, (list, tuple)) and len(entry) == 2 else None
