"""Pipelines that take images beside the prompt: ControlNet hints, an image to change."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
    ControlNetModel,
)

from sefi_fast.errors import ModelError
from sefi_fast.pipelines.loading import as_model_error, check_whole, load_part
from sefi_fast.pipelines.support import unwrap
from sefi_fast.pipelines.weight_files import check_config, read_header
from sefi_fast.utils.files import expanded, user_path


def load_controlnet(source: str | Path, pipe: Any) -> ControlNetModel:
    """Load a ControlNet for a pipeline, in its dtype and on its device.

    Args:
        source: a diffusers folder, a hub id or a single .safetensors file.
        pipe: the pipeline whose U-Net it shall steer.

    Raises:
        ModelError: there is none, its weights are not safetensors, or it was made for another
            family of base models.
    """
    path = user_path(source)
    then = ". Give a diffusers folder, a hub id or a .safetensors file of a ControlNet"
    with as_model_error(f"the ControlNet {source}", then):
        if path.is_file():
            read_header(path)
            model = ControlNetModel.from_single_file(str(path), torch_dtype=pipe.unet.dtype)
            check_whole(model, path)
        elif path.is_dir():
            check_config(path, "")
            model = load_part(ControlNetModel, path, "", pipe.unet.dtype)
        else:
            model = ControlNetModel.from_pretrained(
                expanded(source), torch_dtype=pipe.unet.dtype, use_safetensors=True
            )
    wanted, found = pipe.unet.config.cross_attention_dim, model.config.cross_attention_dim
    if wanted != found:
        raise ModelError(
            f"the ControlNet {source} takes prompts of width {found}, and this pipeline's are "
            f"{wanted} wide: it was made for another family; give one of this model's family"
        )
    return model.to(pipe.device).eval()


def steered(
    pipe: Any, *, controlnets: Sequence[Any] = (), image: bool = False, mask: bool = False
) -> Any:
    """A pipeline over the same models that takes images beside the prompt.

    Attach subjects to what comes back: those attached to `pipe` stay with `pipe`.

    Args:
        pipe: a text-to-image pipeline of Stable Diffusion 1.x, 2.x or SDXL.
        controlnets: the models that the hints go to, in their order; one or several.
        image: whether an image is to be changed (img2img).
        mask: whether only a part of it is (inpainting).

    Raises:
        ValueError: a mask without an image to change.
        ModelError: a mask, and a U-Net that cannot inpaint.
    """
    if mask and not image:
        raise ValueError("a mask says which part of an image to change: give the image too")
    if not controlnets and not image:
        return pipe
    channels = unwrap(pipe.unet).config.in_channels
    if mask and channels not in (4, 9):
        raise ModelError(
            f"a mask was given, and this model's U-Net takes latents of {channels} channels: "
            "inpainting wants 4 or 9; give a model that has them (--model), or leave the mask out"
        )
    kind = AutoPipelineForInpainting if mask else AutoPipelineForImage2Image
    kind = kind if image else AutoPipelineForText2Image
    if not controlnets:
        return kind.from_pipe(pipe)
    nets = list(controlnets)
    return kind.from_pipe(pipe, controlnet=nets[0] if len(nets) == 1 else nets)
