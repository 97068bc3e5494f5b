"""The model that is trained on: load it, freeze it, and restore it afterwards."""

from __future__ import annotations

import logging
import os
import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sefi_fast.attention.layers import cross_attention_layers
from sefi_fast.attention.processor import AttentionRecord, SeFiAttnProcessor, TrainingProcessor
from sefi_fast.errors import ModelError, first_line
from sefi_fast.pipelines import load_pipeline
from sefi_fast.pipelines.model_patch import LOCK, check_replaceable
from sefi_fast.pipelines.support import WORKS_WITH, check_pipeline
from sefi_fast.prompts import text_encoders
from sefi_fast.prompts.text_encoder import is_sdxl, unwrap
from sefi_fast.training.config import SelfAttention, TrainConfig
from sefi_fast.training.image import TIME_IDS
from sefi_fast.training.noise import NoiseSchedule

logger = logging.getLogger(__name__)

BUNDLED = "the bundled tiny model"
MODEL_KEYS = ("model", "model_config", "vae")
"""Names of a model's sources in the settings of a subject, a run's file and a manifest."""
ModelPath = str | os.PathLike[str] | None
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_VAE_SCALING = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")


@dataclass(eq=False)
class BaseModel:
    """A base model and how to compute with it.

    Attributes:
        pipe: the pipeline, with its weights as they are stored.
        name: for the subject's `base_model`.
        model, model_config, vae: the arguments of `load_pipeline` to load it again.
        device, dtype: of the computation.
        owned: whether the pipeline was loaded for this run.
    """

    pipe: Any
    name: str
    model: str | None
    device: torch.device
    dtype: torch.dtype
    owned: bool
    model_config: str | None = None
    vae: str | None = None

    def __post_init__(self) -> None:
        # Freezing widens narrow weights, and the checksum is of the stored ones.
        self._stored_dtypes = [tensor.dtype for tensor in _weights(self.pipe)]

    @property
    def text_encoders(self) -> list[Any]:
        """The text encoders in the order of their joined outputs: two for SDXL."""
        return [unwrap(part.text_encoder) for part in text_encoders(self.pipe)]

    @cached_property
    def checksum(self) -> str:
        """8 hexadecimal digits that change with any weight, the noise schedule and the scaling.

        They do not depend on the place of the weights, in memory or on disk.
        """
        schedule = NoiseSchedule(self.pipe.scheduler, torch.device("cpu"))
        scaling = {key: x for key, x in self.pipe.vae.config.items() if key in _VAE_SCALING}
        value = zlib.crc32(repr((schedule.settings, scaling)).encode())
        # The bytes of each tensor are added up as integers, as fast as the memory is read.
        for tensor, dtype in zip(_weights(self.pipe), self._stored_dtypes, strict=True):
            content = tensor.detach().to(dtype).contiguous().flatten().view(torch.uint8)
            if content.storage_offset() % 8:
                content = content.clone()
            whole = len(content) // 8 * 8
            total = int(content[:whole].view(torch.int64).sum())
            summed = (tensor.shape, dtype, total, content[whole:].tolist())
            value = zlib.crc32(repr(summed).encode(), value)
        return f"{value:08x}"


def _weights(pipe: Any) -> Iterator[Tensor]:
    for module in (pipe.unet, pipe.vae, *(part.text_encoder for part in text_encoders(pipe))):
        if module is not None:
            yield from unwrap(module).parameters()
            yield from unwrap(module).buffers()


@contextmanager
def training_session(
    model: Any, config: TrainConfig, model_config: ModelPath = None, vae: ModelPath = None
) -> Iterator[BaseModel]:
    """Yield the model as `load_base_model` returns it, frozen on its device, with gradients on.

    The caller's autocast and default device are off inside, so that a seed gives one result.
    """
    # As a mode it costs each operation microseconds.
    default_device = torch.get_default_device()
    on_cpu = nullcontext() if default_device.type == "cpu" else torch.device("cpu")
    with on_cpu, torch.inference_mode(False), torch.enable_grad():
        base = load_base_model(model, config, model_config, vae)
        with torch.autocast(base.device.type, enabled=False), frozen(base, config):
            yield base


def model_settings(
    model: Any, model_config: ModelPath = None, vae: ModelPath = None
) -> dict[str, str | None]:
    """Return the entries of a subject's settings that name its base model."""
    if not (model is None or isinstance(model, (str, os.PathLike))):
        model = getattr(model.config, "_name_or_path", None) or None
    given = {"model_config": model_config, "vae": vae}
    return {
        "model": None if model is None else os.fspath(model),
        **{name: os.fspath(value) for name, value in given.items() if value is not None},
    }


def load_base_model(
    model: Any, config: TrainConfig, model_config: ModelPath = None, vae: ModelPath = None
) -> BaseModel:
    """Load the model, or check the pipeline given, and choose device and dtype."""
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
                "the pipeline is on the CPU, and so is training: give device='cuda', or call "
                "pipe.to('cuda') first"
            )
        dtype = choose_dtype(config.precision, device, unwrap(model.unet).dtype)
        path = model_settings(model)["model"]
        return BaseModel(model, path or type(model).__name__, path, device, dtype, owned=False)
    device = choose_device(config.device)
    dtype = choose_dtype(config.precision, device, torch.float32)
    settings = model_settings(model, model_config, vae)
    name = settings["model"]
    # In float32 first: the text encoders keep it, because the trained rows enter there, and so does
    # the VAE, which is small and, SDXL's, overflows in float16.
    pipe = load_pipeline(name, dtype=torch.float32, device="cpu", config=model_config, vae=vae)
    check_added_conditioning(pipe)
    base = BaseModel(pipe, name or BUNDLED, device=device, dtype=dtype, owned=True, **settings)
    if device.type != "cpu":
        if config.checkpoint_every != 0 and dtype != torch.float32:
            # Computed before weights are rounded, so that a run may go on on another device.
            _ = base.checksum
        pipe.unet.to(device, dtype)
        for text_encoder in base.text_encoders:
            text_encoder.to(device)
    return base


def choose_device(wanted: str | None, current: torch.device | None = None) -> torch.device:
    """Return the device of a run: `wanted`, or the pipeline's, or CUDA where there is one."""
    device = current or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if wanted is not None:
        try:
            device = torch.device(wanted)
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            raise ValueError(
                f"device {wanted!r} cannot be used here ({first_line(error)}); give 'cpu' or None"
            ) from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"training runs on the CPU and on CUDA, not on {str(device)!r}")
    return device


def choose_dtype(precision: str, device: torch.device, model_dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the computation.

    "auto" is float32 on a CPU, because the numbers of others would differ between processors. On
    CUDA it is the dtype of a half-precision model, else bfloat16, or float16 on devices without it.
    """
    if precision == "fp16" and device.type == "cpu":
        raise ValueError("precision 'fp16' works on CUDA only; on a CPU use 'fp32' or 'bf16'")
    if precision != "auto":
        return _DTYPES[precision]
    if device.type != "cuda":
        return torch.float32
    if model_dtype in (torch.float16, torch.bfloat16):
        return model_dtype
    with torch.cuda.device(device):
        # Emulated, as before compute capability 8.0, it is slower than float32.
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if native else torch.float16


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[None]:
    """Return an autocast to `dtype`; off for float32."""
    if dtype == torch.float32:
        return torch.autocast(device.type, enabled=False)
    # Frozen weights are never cached by autocast, so its cache would only hold memory.
    return torch.autocast(device.type, dtype=dtype, cache_enabled=False)


@contextmanager
def temporarily_frozen(
    module: nn.Module, device: torch.device, dtype: torch.dtype | None, channels_last: bool = False
) -> Iterator[None]:
    """Freeze `module` on `device` in eval mode, and restore everything on exit.

    Only conversions that lose nothing are made: weights of fewer bytes than `dtype` become `dtype`,
    so float8 weights become float16 and half-precision ones float32. With None all keep their type.
    """
    _check_freezable(module)
    tensors = [*module.parameters(), *module.buffers()]
    casts = _diffusers_hooks(module, "layerwise_casting")
    # A stack restores the rest when one of them fails or is interrupted.
    with ExitStack() as stack:
        for cast in casts if dtype is not None else ():
            # The backward pass needs the weights of the forward pass: no cast around each call.
            for name in ("storage_dtype", "compute_dtype"):
                stack.callback(setattr, cast, name, getattr(cast, name))
                setattr(cast, name, dtype)
        for part in module.modules():
            stack.callback(setattr, part, "training", part.training)
            part.training = False
        for tensor in tensors:
            own_dtype, own_layout = tensor.dtype, _is_channels_last(tensor)
            stack.callback(tensor.requires_grad_, tensor.requires_grad)
            stack.callback(_move, tensor, tensor.device, own_dtype, own_layout)
            tensor.requires_grad_(False)
            wanted = own_dtype
            if dtype and own_dtype.is_floating_point and own_dtype.itemsize < dtype.itemsize:
                wanted = dtype
            _move(tensor, device, wanted, own_layout or channels_last)
        yield


def _diffusers_hooks(module: nn.Module, name: str) -> list[Any]:
    registries = [x for part in module.modules() if (x := getattr(part, "_diffusers_hook", None))]
    return [hook for registry in registries if (hook := registry.get_hook(name)) is not None]


def _check_freezable(module: nn.Module) -> None:
    kind = type(module).__name__
    hook = getattr(module, "_hf_hook", None)
    moved = any(type(one).__name__ == "CpuOffload" for one in getattr(hook, "hooks", (hook,)))
    if moved or _diffusers_hooks(module, "group_offloading"):
        raise ModelError(
            f"the {kind}'s weights are moved to the device for each call alone (CPU offload): call "
            "pipe.remove_all_hooks() or load the pipeline without offloading, and train with "
            "low_memory=True where memory is short"
        )
    quantized = [
        # torch.ao keeps packed weights that are not parameters.
        f"{name} is a quantized {type(part).__name__}"
        for name, part in module.named_modules()
        if type(part).__module__.startswith(("torch.ao.nn.quantized", "torch.ao.nn.intrinsic"))
    ]
    for name, tensor in module.named_parameters():
        own = tensor.data if type(tensor) is nn.Parameter else tensor
        if type(own) is not Tensor or not tensor.is_floating_point():
            quantized.append(f"{name} is a {type(own).__name__} of {tensor.dtype}")
    if quantized:
        raise ModelError(
            f"the {kind} is quantized: {quantized[0]}. Training needs weights in floating point. "
            "Load the model without quantization; the subject can be attached to this pipeline"
        )
    tensors = [*module.parameters(), *module.buffers()]
    if any(tensor.is_meta for tensor in tensors):
        raise ModelError(
            f"the {kind} has no weights in memory (CPU offload or the meta device): load the "
            "pipeline without offloading"
        )
    if any(tensor.is_inference() for tensor in tensors):
        raise ModelError(
            f"the weights of the {kind} were made in torch.inference_mode(), where no gradient can "
            "be taken. Training needs weights made outside of it. Load the pipeline again outside "
            "of inference mode, or under torch.no_grad()"
        )


def _is_channels_last(tensor: Tensor) -> bool:
    return (
        tensor.ndim == 4
        and not tensor.is_contiguous()
        and tensor.is_contiguous(memory_format=torch.channels_last)
    )


def _move(tensor: Tensor, device: torch.device, dtype: torch.dtype, channels_last: bool) -> None:
    data = tensor.data.to(device, dtype)
    if data.ndim == 4 and _is_channels_last(data) != channels_last:
        layout = torch.channels_last if channels_last else torch.contiguous_format
        data = data.contiguous(memory_format=layout)
    tensor.data = data


def _check_no_training(attn: Attention) -> None:
    if isinstance(attn.processor, TrainingProcessor):
        raise ModelError(
            "another thread trains on this U-Net. One training at a time can have it. Train one "
            "after the other, several at once with sefi_fast.train_many, or give each thread a "
            "copy of the pipeline."
        )


class TrainingProcessors:
    """Split-stream processors with records for a U-Net's cross-attention layers.

    Self-attention keeps its processors with "sdpa", and gets others with "xformers".
    """

    def __init__(
        self,
        unet: nn.Module,
        record: AttentionRecord,
        backend: str | None,
        self_attention: SelfAttention,
    ) -> None:
        self._ours: list[tuple[Attention, SeFiAttnProcessor]] = []
        crossing = cross_attention_layers(unwrap(unet))
        for name, attn in crossing.items():
            _check_no_training(attn)
            check_replaceable(unet, name, attn.processor)
            processor = TrainingProcessor(
                split_streams=True, record=record.layer(name), backend=backend
            )
            self._ours.append((attn, processor))
        if self_attention == "xformers":
            shared = SeFiAttnProcessor(self_attention="xformers")
            for name, attn in unwrap(unet).named_modules():
                if isinstance(attn, Attention) and name not in crossing:
                    check_replaceable(unet, name, attn.processor)
                    self._ours.append((attn, shared))

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Put the processors on their layers, and restore the former ones on exit."""
        before: list[tuple[Attention, Any, Any]] = []
        try:
            with LOCK:
                for attn, processor in self._ours:
                    _check_no_training(attn)
                    found = attn.processor
                    if isinstance(processor, TrainingProcessor):
                        processor.replaced = found
                    before.append((attn, processor, found))
                    attn.set_processor(processor)
            yield
        finally:
            with LOCK:
                for attn, processor, found in before:
                    if attn.processor is processor:
                        ours = isinstance(processor, TrainingProcessor)
                        attn.set_processor(processor.replaced if ours else found)


@contextmanager
def frozen(base: BaseModel, config: TrainConfig) -> Iterator[None]:
    """Freeze the U-Net and the text encoders on the device, and restore them on exit."""
    unet = unwrap(base.pipe.unet)
    with ExitStack() as stack:
        # Channels-last pays on CUDA's tensor cores; on CPUs it was measured to gain nothing.
        channels_last = base.device.type == "cuda"
        stack.enter_context(temporarily_frozen(unet, base.device, base.dtype, channels_last))
        for text_encoder in base.text_encoders:
            stack.enter_context(temporarily_frozen(text_encoder, base.device, base.dtype))
        stack.enter_context(checkpointed(unet, config.gradient_checkpointing or config.low_memory))
        if config.low_memory and base.pipe.vae is not None:
            # It moves to the device for each use. The text encoders stay: every step needs them.
            stack.enter_context(temporarily_frozen(base.pipe.vae, torch.device("cpu"), None))
        yield


@contextmanager
def checkpointed(unet: Any, wanted: bool) -> Iterator[None]:
    """Turn gradient checkpointing on if `wanted` or on, in a form that a CUDA graph can capture."""
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


def _recompute(module: nn.Module, *inputs: Any) -> Any:
    # A frozen model in eval mode takes no random numbers, and a capture cannot read the state of
    # CUDA's generator.
    return checkpoint(module.__call__, *inputs, use_reentrant=False, preserve_rng_state=False)


def check_added_conditioning(pipe: Any) -> None:
    """Raise ModelError unless the U-Net takes the added conditioning of its family."""
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
    if kind == "ip_image_proj":
        raise ModelError(
            f"the U-Net of this {name} takes an image next to the words (an "
            "IP-Adapter): call pipe.unload_ip_adapter() before training, and load it again after"
        )
    if kind is not None:
        raise ModelError(
            f"the U-Net of this {name} changes the text embeddings first (encoder_hid_dim_type is "
            f"{kind!r}), as models of other families do. {WORKS_WITH}"
        )
    kind = getattr(unet, "addition_embed_type", None)
    wanted = "text_time" if is_sdxl(pipe) else None
    if kind != wanted:
        raise ModelError(
            f"the U-Net of this {name} takes added conditioning of type {kind!r}, "
            f"where {wanted!r} goes with its text encoders: are its parts of different models?"
        )
    taken = unet.cross_attention_dim
    made = sum(unwrap(part.text_encoder).config.hidden_size for part in text_encoders(pipe))
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
            f"the U-Net of this {name} takes {taken} numbers next to the words, but "
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
    """Return the side length in pixels to train at: `wanted`, or the model's own."""
    factor = 2 ** (len(pipe.vae.config.block_out_channels) - 1)
    sample_size = unwrap(pipe.unet).config.sample_size
    side = sample_size if isinstance(sample_size, int) else min(sample_size or (64,))
    own: int = side * factor
    if wanted is None:
        return own
    if wanted > own or wanted % factor:
        raise ValueError(
            f"resolution {wanted} does not fit this model: give a multiple of {factor}, at most "
            f"{own}"
        )
    return wanted
