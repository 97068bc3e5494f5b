"""Use a pipeline's models for training and give them back exactly as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from sefi_fast.attention_record import AttentionRecord
from sefi_fast.errors import ModelError
from sefi_fast.layers import cross_attention_layers
from sefi_fast.pipelines.families import unwrap
from sefi_fast.pipelines.installation import LOCK, check_replaceable
from sefi_fast.processor import SeFiAttnProcessor, TrainingProcessor


@contextmanager
def borrowed(
    module: nn.Module, device: torch.device, dtype: torch.dtype | None, channels_last: bool = False
) -> Iterator[None]:
    """Freeze `module`, put it on `device` in eval mode, and undo all of it on the way out.

    Only conversions that lose nothing are made: weights of fewer bytes than `dtype` become `dtype`,
    so float8 weights become float16 and half-precision ones float32. Others keep their type.

    Args:
        module: U-Net, VAE or text encoder.
        device: where to compute.
        dtype: of the computation, to widen narrower weights; None to leave all types alone.
        channels_last: lay convolution weights out channels-last.

    Raises:
        ModelError: the weights are offloaded, on the meta device, quantised, or made in inference
            mode.
    """
    registries: list[Any] = [getattr(part, "_diffusers_hook", None) for part in module.modules()]
    hooks = [registry for registry in registries if registry is not None]
    _check_not_offloaded(module, hooks)
    _check_not_quantised(module)
    tensors = [*module.parameters(), *module.buffers()]
    if any(tensor.is_meta for tensor in tensors):
        raise ModelError(
            f"the {type(module).__name__} has no weights in memory (CPU offload or the meta "
            "device): load the pipeline without offloading"
        )
    if any(tensor.is_inference() for tensor in tensors):
        raise ModelError(
            f"the weights of the {type(module).__name__} were made in torch.inference_mode(), "
            "where no gradient can be taken. Training needs weights made outside of it. Load the "
            "pipeline again outside of inference mode, or under torch.no_grad()"
        )
    casts = [cast for one in hooks if (cast := one.get_hook("layerwise_casting")) is not None]
    # A stack puts back the rest when one of them fails or is interrupted.
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


def _check_not_offloaded(module: nn.Module, registries: list[Any]) -> None:
    """Raise ModelError where hooks of accelerate or diffusers move the weights at each call."""
    hook = getattr(module, "_hf_hook", None)
    hooks = getattr(hook, "hooks", (hook,))
    moved = any(type(one).__name__ == "CpuOffload" for one in hooks) or any(
        registry.get_hook("group_offloading") is not None for registry in registries
    )
    if moved:
        raise ModelError(
            f"the {type(module).__name__}'s weights are moved to the device for each call alone "
            "(CPU offload): call pipe.remove_all_hooks() or load the pipeline without offloading, "
            "and train with low_memory=True where memory is short"
        )


def _check_not_quantised(module: nn.Module) -> None:
    """Raise ModelError for weights that are not plain floating-point tensors."""
    for name, tensor in module.named_parameters():
        plain = type(tensor) is nn.Parameter and type(tensor.data) is Tensor
        if not plain or not tensor.is_floating_point():
            kind = type(tensor if type(tensor) is not nn.Parameter else tensor.data).__name__
            raise _quantised(module, f"{name} is a {kind} of {tensor.dtype}")
    for name, part in module.named_modules():
        # torch.ao keeps packed weights that are not parameters.
        if type(part).__module__.startswith(("torch.ao.nn.quantized", "torch.ao.nn.intrinsic")):
            raise _quantised(module, f"{name} is a quantised {type(part).__name__}")


def _quantised(module: nn.Module, what: str) -> ModelError:
    return ModelError(
        f"the {type(module).__name__} is quantised: {what}. Training needs weights in floating "
        "point. Load the model without quantisation; the subject can be attached to this pipeline"
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
    """Split-stream processors with records on a U-Net's cross-attention layers.

    Args:
        unet: a UNet2DConditionModel.
        record: where the layers leave their alignment.
        backend: of the fused operator, by name.
        self_attention: "sdpa" leaves the self-attention's processors alone, "xformers" replaces
            them too.

    Raises:
        ModelError: a layer's processor does more than plain attention (IP-Adapter).
    """

    def __init__(
        self,
        unet: nn.Module,
        record: AttentionRecord,
        backend: str | None = None,
        self_attention: str = "sdpa",
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
        """The processors on their layers; the ones before come back on the way out.

        Raises:
            ModelError: another training is at a step on this U-Net.
        """
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
