"""Pipelines that take images in addition to the prompt: ControlNet hints, an image to change."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
    ControlNetModel,
    DiffusionPipeline,
)

from sefi_fast.errors import ModelError
from sefi_fast.pipelines.loading import as_model_error, check_whole, load_part
from sefi_fast.pipelines.weight_files import check_config, read_header
from sefi_fast.prompts.text_encoder import unwrap
from sefi_fast.utils.files import expanded, user_path


def load_controlnet(source: str | Path, pipe: DiffusionPipeline) -> ControlNetModel:
    """Load a ControlNet for a pipeline, in its dtype and on its device.

    Args:
        source: a diffusers folder, a hub id or a single .safetensors file.
        pipe: the pipeline for whose U-Net it is.

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
            f"{wanted} wide. Give a ControlNet of this model's family"
        )
    return model.to(pipe.device).eval()


def steered(
    pipe: DiffusionPipeline,
    *,
    controlnets: Sequence[ControlNetModel] = (),
    image: bool = False,
    mask: bool = False,
) -> DiffusionPipeline:
    """Return a pipeline with the same models that takes images in addition to the prompt.

    Attach subjects to the pipeline that is returned. Those of `pipe` stay with `pipe`.

    Args:
        pipe: a text-to-image pipeline of Stable Diffusion 1.x, 2.x or SDXL.
        controlnets: one model for each hint, in their order.
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
            f"a mask was given, and this model's U-Net takes latents of {channels} channels. "
            "Inpainting needs 4 or 9. Give such a model (--model), or leave the mask out"
        )
    kind = AutoPipelineForInpainting if mask else AutoPipelineForImage2Image
    kind = kind if image else AutoPipelineForText2Image
    nets = list(controlnets)
    if not nets:
        return kind.from_pipe(pipe)
    return kind.from_pipe(pipe, controlnet=nets[0] if len(nets) == 1 else nets)
