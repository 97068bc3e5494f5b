"""The base model of a run: loaded for it, or a pipeline that is only borrowed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch.utils.checkpoint import checkpoint

from sefi_fast.errors import ModelError
from sefi_fast.pipelines import load_pipeline
from sefi_fast.pipelines.families import check_pipeline, is_sdxl, unwrap
from sefi_fast.training.borrow import borrowed
from sefi_fast.training.config import TrainConfig
from sefi_fast.training.precision import choose_device, choose_dtype

BUNDLED = "the bundled tiny model"


class Source(NamedTuple):
    """A base model and how to compute with it.

    pipe: the pipeline. name: for the subject's `base_model`. model: what `load_pipeline` takes to
    get it again, None for the bundled one. device, dtype: of the computation. owned: whether the
    pipeline was loaded for this run.
    """

    pipe: Any
    name: str
    model: str | None
    device: torch.device
    dtype: torch.dtype
    owned: bool


def find_source(model: Any, config: TrainConfig) -> Source:
    """Load the model, or look at the pipeline given, and choose device and dtype.

    Raises:
        ModelError: there is no such model, or it is of a family the method does not fit.
        ValueError: the device or the precision asked for cannot be had.
    """
    if model is not None and not isinstance(model, (str, os.PathLike)):
        check_pipeline(model)
        check_trainable(model)
        check_latent_channels(model)
        device = choose_device(config.device, unwrap(model.unet).device)
        dtype = choose_dtype(config.precision, device, unwrap(model.unet).dtype)
        given = getattr(model.config, "_name_or_path", None) or None
        return Source(model, given or type(model).__name__, given, device, dtype, False)
    device = choose_device(config.device)
    dtype = choose_dtype(config.precision, device, torch.float32)
    name = None if model is None else os.fspath(model)
    # In float32 first: the text encoder and the VAE keep it, since they are small and the learned
    # rows enter there.
    pipe = load_pipeline(name, dtype=torch.float32, device="cpu")
    check_trainable(pipe)
    if device.type != "cpu":
        pipe.unet.to(device, dtype)
        pipe.text_encoder.to(device)
    return Source(pipe, name or BUNDLED, name, device, dtype, True)


@contextmanager
def frozen(source: Source, config: TrainConfig) -> Iterator[None]:
    """U-Net and text encoder frozen and ready on the device; as they were on the way out."""
    unet = unwrap(source.pipe.unet)
    widen = torch.float32 if source.dtype == torch.float32 else None
    with ExitStack() as stack:
        # Channels-last pays on CUDA's tensor cores; on CPUs it was measured to gain nothing.
        channels_last = source.device.type == "cuda"
        stack.enter_context(borrowed(unet, source.device, widen, channels_last))
        stack.enter_context(borrowed(unwrap(source.pipe.text_encoder), source.device, widen))
        stack.enter_context(checkpointed(unet, config.gradient_checkpointing or config.low_memory))
        if config.low_memory and source.pipe.vae is not None:
            # Whoever needs it borrows it. The text encoder stays: every step needs it.
            stack.enter_context(borrowed(source.pipe.vae, torch.device("cpu"), None))
        yield


@contextmanager
def checkpointed(unet: Any, wanted: bool) -> Iterator[None]:
    """Gradient checkpointing on if `wanted`, in a form that a CUDA graph can capture.

    One that the U-Net has already stays on, in that form as well.
    """
    function = "_gradient_checkpointing_func"
    before = [
        (part, part.gradient_checkpointing, vars(part).get(function))
        for part in unet.modules()
        if hasattr(part, "gradient_checkpointing")
    ]
    if wanted or unet.is_gradient_checkpointing:
        unet.enable_gradient_checkpointing(_recompute)
    try:
        yield
    finally:
        for part, checkpointing, own in before:
            part.gradient_checkpointing = checkpointing
            if own is not None:
                setattr(part, function, own)
            else:
                vars(part).pop(function, None)


def _recompute(module: torch.nn.Module, *inputs: Any) -> Any:
    # A frozen model in eval mode draws nothing at random, and the state of CUDA's generator cannot
    # be read in a capture.
    return checkpoint(module.__call__, *inputs, use_reentrant=False, preserve_rng_state=False)


def check_trainable(pipe: Any) -> None:
    """Raise ModelError for SDXL, whose second text encoder training does not serve."""
    if is_sdxl(pipe):
        raise ModelError(
            f"training takes one text encoder, and {type(pipe).__name__} has two: train on a "
            "Stable Diffusion 1.x or 2.x model (subjects for SDXL are for drawing only)"
        )


def check_latent_channels(pipe: Any) -> None:
    """Raise ModelError for U-Nets that take more than a latent (inpainting, depth)."""
    taken, made = unwrap(pipe.unet).config.in_channels, pipe.vae.config.latent_channels
    if taken != made:
        raise ModelError(
            f"the U-Net of this {type(pipe).__name__} takes {taken} channels, but the latents of "
            f"its VAE have {made}, as in inpainting and depth models: train on the text-to-image "
            "model and attach the subject here"
        )


def resolution_of(pipe: Any, wanted: int | None) -> int:
    """Side length in pixels to train at: the model's own, or a smaller one asked for.

    Raises:
        ValueError: the one asked for is larger than the model's or no multiple of its grid.
    """
    factor = 2 ** (len(pipe.vae.config.block_out_channels) - 1)
    sample_size = unwrap(pipe.unet).config.sample_size
    side = sample_size if isinstance(sample_size, int) else min(sample_size or (64,))
    own = side * factor
    if wanted is None:
        return own
    if wanted > own or wanted % factor:
        raise ValueError(
            f"resolution {wanted} does not fit this model: give a multiple of {factor}, at most "
            f"{own}"
        )
    return wanted
