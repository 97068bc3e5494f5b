"""The base model of a run: loaded for it, or a pipeline that is only borrowed."""

from __future__ import annotations

import logging
import os
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch.utils.checkpoint import checkpoint

from sefi_fast.conditioning import text_parts
from sefi_fast.errors import ModelError
from sefi_fast.pipelines import load_pipeline
from sefi_fast.pipelines.families import WORKS_WITH, check_pipeline, is_sdxl, unwrap
from sefi_fast.training.borrow import borrowed
from sefi_fast.training.config import TrainConfig
from sefi_fast.training.image import TIME_IDS
from sefi_fast.training.noise import NoiseSchedule
from sefi_fast.training.precision import choose_device, choose_dtype

logger = logging.getLogger(__name__)

BUNDLED = "the bundled tiny model"
_VAE_SCALING = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")


class Source(NamedTuple):
    """A base model and how to compute with it.

    pipe: the pipeline. name: for the subject's `base_model`. model: what `load_pipeline` takes to
    get it again, None for the bundled one. device, dtype: of the computation. owned: whether the
    pipeline was loaded for this run. model_config, vae: what it was loaded with. checksum: of the
    weights and the noise schedule.
    """

    pipe: Any
    name: str
    model: str | None
    device: torch.device
    dtype: torch.dtype
    owned: bool
    checksum: str
    model_config: str | None = None
    vae: str | None = None

    @property
    def text_encoders(self) -> list[Any]:
        """The text encoders in the order of their joined outputs: two for SDXL."""
        return [unwrap(part.text_encoder) for part in text_parts(self.pipe)]


MODEL_KEYS = ("model", "model_config", "vae")
"""How the settings of a subject, a run's file and a manifest name what a model is loaded from."""

ModelPath = str | os.PathLike[str] | None


def model_settings(
    model: Any, model_config: ModelPath = None, vae: ModelPath = None
) -> dict[str, str | None]:
    """Return what the settings of a subject keep of its base model, to load it again."""
    if not (model is None or isinstance(model, (str, os.PathLike))):
        model = getattr(model.config, "_name_or_path", None) or None
    given = {"model_config": model_config, "vae": vae}
    return {
        "model": None if model is None else os.fspath(model),
        **{name: os.fspath(value) for name, value in given.items() if value is not None},
    }


def find_source(
    model: Any, config: TrainConfig, model_config: ModelPath = None, vae: ModelPath = None
) -> Source:
    """Load the model, or look at the pipeline given, and choose device and dtype.

    Raises:
        ModelError: there is no such model, or it is of a family the method does not fit.
        ValueError: the device or the precision asked for cannot be had, or `model_config` or `vae`
            were given with a ready pipeline.
    """
    if model is not None and not isinstance(model, (str, os.PathLike)):
        if model_config is not None or vae is not None:
            raise ValueError(
                "model_config and vae are for a model that is loaded, and a ready pipeline was "
                "given: leave them out, and set pipe.vae instead"
            )
        check_pipeline(model)
        check_latent_channels(model)
        check_added_conditioning(model)
        device = choose_device(config.device, unwrap(model.unet).device)
        if config.device is None and device.type == "cpu" and torch.cuda.is_available():
            logger.warning(
                "the pipeline is on the CPU, and so training is: give device='cuda', or call "
                "pipe.to('cuda') first"
            )
        dtype = choose_dtype(config.precision, device, unwrap(model.unet).dtype)
        given = model_settings(model)["model"]
        checksum = model_checksum(model)
        return Source(model, given or type(model).__name__, given, device, dtype, False, checksum)
    device = choose_device(config.device)
    dtype = choose_dtype(config.precision, device, torch.float32)
    settings = model_settings(model, model_config, vae)
    name = settings["model"]
    # In float32 first: the text encoders keep it, since the learned rows enter there, and so does
    # the VAE, which is small and, SDXL's, overflows in float16.
    pipe = load_pipeline(name, dtype=torch.float32, device="cpu", config=model_config, vae=vae)
    check_added_conditioning(pipe)
    # Before the weights are cast, so that a run may go on on another device.
    checksum = model_checksum(pipe)
    source = Source(
        pipe, name or BUNDLED, device=device, dtype=dtype, owned=True, checksum=checksum, **settings
    )
    if device.type != "cpu":
        pipe.unet.to(device, dtype)
        for text_encoder in source.text_encoders:
            text_encoder.to(device)
    return source


def model_checksum(pipe: Any) -> str:
    """Return 8 hexadecimal digits that change with any weight, the noise schedule and the scaling.

    They do not change with the place of the weights, in memory or on disk. The bytes of each tensor
    are added up as integers, as fast as the memory is read.

    Raises:
        ModelError: the scheduler's noise schedule is not one to train with.
    """
    modules = [pipe.unet, pipe.vae, *(part.text_encoder for part in text_parts(pipe))]
    schedule = NoiseSchedule(pipe.scheduler, torch.device("cpu"))
    scaling = {key: value for key, value in pipe.vae.config.items() if key in _VAE_SCALING}
    value = zlib.crc32(repr((schedule.settings, scaling)).encode())
    for module in map(unwrap, modules):
        for tensor in (*module.parameters(), *module.buffers()):
            # Borrowing refuses offloaded weights.
            if tensor.is_meta:
                continue
            content = tensor.detach().contiguous().flatten().view(torch.uint8)
            if content.storage_offset() % 8:
                content = content.clone()
            whole = len(content) // 8 * 8
            total = int(content[:whole].view(torch.int64).sum())
            summed = (tensor.shape, tensor.dtype, total, content[whole:].tolist())
            value = zlib.crc32(repr(summed).encode(), value)
    return f"{value:08x}"


@contextmanager
def frozen(source: Source, config: TrainConfig) -> Iterator[None]:
    """U-Net and text encoders frozen and ready on the device; as they were on the way out."""
    unet = unwrap(source.pipe.unet)
    with ExitStack() as stack:
        # Channels-last pays on CUDA's tensor cores; on CPUs it was measured to gain nothing.
        channels_last = source.device.type == "cuda"
        stack.enter_context(borrowed(unet, source.device, source.dtype, channels_last))
        for text_encoder in source.text_encoders:
            stack.enter_context(borrowed(text_encoder, source.device, source.dtype))
        stack.enter_context(checkpointed(unet, config.gradient_checkpointing or config.low_memory))
        if config.low_memory and source.pipe.vae is not None:
            # Whoever needs it borrows it. The text encoders stay: every step needs them.
            stack.enter_context(borrowed(source.pipe.vae, torch.device("cpu"), None))
        yield


@contextmanager
def checkpointed(unet: Any, wanted: bool) -> Iterator[None]:
    """Gradient checkpointing on if `wanted`, in a form that a CUDA graph can capture.

    One that the U-Net has already stays on, in that form as well.
    """
    function = "_gradient_checkpointing_func"
    before = [
        (part, part.gradient_checkpointing, {k: v for k, v in vars(part).items() if k == function})
        for part in unet.modules()
        if hasattr(part, "gradient_checkpointing")
    ]
    try:
        if wanted or unet.is_gradient_checkpointing:
            unet.enable_gradient_checkpointing(_recompute)
        yield
    finally:
        for part, checkpointing, own in before:
            part.gradient_checkpointing = checkpointing
            vars(part).pop(function, None)
            vars(part).update(own)


def _recompute(module: torch.nn.Module, *inputs: Any) -> Any:
    # A frozen model in eval mode draws nothing at random, and the state of CUDA's generator cannot
    # be read in a capture.
    return checkpoint(module.__call__, *inputs, use_reentrant=False, preserve_rng_state=False)


def check_added_conditioning(pipe: Any) -> None:
    """Raise ModelError unless the U-Net takes, beside the words, what its family's training gives.

    For SDXL that is the second encoder's pooled embedding and six numbers of size and crop; nothing
    for Stable Diffusion 1.x and 2.x.
    """
    unet = unwrap(pipe.unet).config
    name = type(pipe).__name__
    if getattr(unet, "time_cond_proj_dim", None) is not None:
        raise ModelError(
            f"the U-Net of this {name} takes the guidance scale as an input, as models distilled "
            "for few steps do (LCM). What it predicts is guided already, and training needs the "
            "plain noise. Train on the model it was distilled from, and attach the subject here"
        )
    for key in ("class_embed_type", "num_class_embeds"):
        if (value := getattr(unet, key, None)) is not None:
            raise ModelError(
                f"the U-Net of this {name} takes class labels ({key} is {value!r}), which no "
                "prompt gives. Train on a text-to-image model"
            )
    kind = getattr(unet, "encoder_hid_dim_type", None)
    if kind not in (None, "ip_image_proj"):
        raise ModelError(
            f"the U-Net of this {name} changes the text embeddings first (encoder_hid_dim_type is "
            f"{kind!r}), as models of other families do. {WORKS_WITH}"
        )
    if kind is not None:
        raise ModelError(
            f"the U-Net of this {name} takes a picture beside the words (an "
            "IP-Adapter): call pipe.unload_ip_adapter() before training, and load it again behind"
        )
    kind, wanted = getattr(unet, "addition_embed_type", None), None
    if is_sdxl(pipe):
        wanted = "text_time"
    if kind != wanted:
        raise ModelError(
            f"the U-Net of this {type(pipe).__name__} takes added conditioning of type {kind!r}, "
            f"where {wanted!r} goes with its text encoders: are its parts of different models?"
        )
    taken = unet.cross_attention_dim
    made = sum(unwrap(part.text_encoder).config.hidden_size for part in text_parts(pipe))
    if taken != made and set(taken if isinstance(taken, (list, tuple)) else ()) != {made}:
        raise ModelError(
            f"the U-Net of this {name} takes text embeddings of width {taken}, but its text "
            f"encoders make {made}: are its parts of different models?"
        )
    if wanted is None:
        return
    pooled = unwrap(pipe.text_encoder_2).config.projection_dim
    made = pooled + len(TIME_IDS) * unet.addition_time_embed_dim
    taken = unet.projection_class_embeddings_input_dim
    if made != taken:
        raise ModelError(
            f"the U-Net of this {type(pipe).__name__} takes {taken} numbers beside the words, but "
            f"the pooled embedding of its second text encoder ({pooled}) and {', '.join(TIME_IDS)} "
            f"make {made}, as with SDXL's refiner: train on the base model"
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
