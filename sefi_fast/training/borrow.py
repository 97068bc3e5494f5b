"""Use a pipeline's models for training and give them back exactly as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from sefi_fast.attention_record import AttentionRecord
from sefi_fast.errors import ModelError
from sefi_fast.layers import cross_attention_layers
from sefi_fast.pipelines.families import unwrap
from sefi_fast.pipelines.installation import check_replaceable
from sefi_fast.processor import SeFiAttnProcessor


@contextmanager
def borrowed(
    module: nn.Module, device: torch.device, dtype: torch.dtype | None, channels_last: bool = False
) -> Iterator[None]:
    """Freeze `module`, put it on `device` in eval mode, and undo all of it on the way out.

    Only conversions that lose nothing are made: float16 and bfloat16 weights become float32 when
    `dtype` is float32, other weights keep their type.

    Args:
        module: U-Net, VAE or text encoder.
        device: where to compute.
        dtype: float32 to widen half-precision weights; None to leave all types alone.
        channels_last: lay convolution weights out channels-last.

    Raises:
        ModelError: the weights are offloaded or on the meta device.
    """
    _check_not_offloaded(module)
    tensors = [*module.parameters(), *module.buffers()]
    if any(tensor.is_meta for tensor in tensors):
        raise ModelError(
            f"the {type(module).__name__} has no weights in memory (CPU offload or the meta "
            "device): load the pipeline without offloading"
        )
    before = [
        (tensor, tensor.requires_grad, tensor.device, tensor.dtype, _is_channels_last(tensor))
        for tensor in tensors
    ]
    modes = [(part, part.training) for part in module.modules()]
    try:
        for part, _ in modes:
            part.training = False
        for tensor, requires_grad, _, own_dtype, own_layout in before:
            if requires_grad:
                tensor.requires_grad_(False)
            widen = dtype == torch.float32 and own_dtype in (torch.float16, torch.bfloat16)
            tensor.data = _laid_out(
                tensor.data.to(device, torch.float32 if widen else own_dtype),
                own_layout or channels_last,
            )
        yield
    finally:
        for tensor, requires_grad, own_device, own_dtype, own_layout in before:
            tensor.data = _laid_out(tensor.data.to(own_device, own_dtype), own_layout)
            if requires_grad:
                tensor.requires_grad_(True)
        for part, training in modes:
            part.training = training


def _check_not_offloaded(module: nn.Module) -> None:
    """Raise ModelError where hooks of accelerate or diffusers move the weights at each call."""
    hook = getattr(module, "_hf_hook", None)
    hooks = getattr(hook, "hooks", (hook,))
    registries: list[Any] = [getattr(part, "_diffusers_hook", None) for part in module.modules()]
    moved = any(type(one).__name__ == "CpuOffload" for one in hooks) or any(
        registry is not None and registry.get_hook("group_offloading") is not None
        for registry in registries
    )
    if moved:
        raise ModelError(
            f"the {type(module).__name__}'s weights are moved to the device for each call alone "
            "(CPU offload): call pipe.remove_all_hooks() or load the pipeline without offloading, "
            "and train with low_memory=True where memory is short"
        )


def _is_channels_last(tensor: Tensor) -> bool:
    return (
        tensor.ndim == 4
        and not tensor.is_contiguous()
        and tensor.is_contiguous(memory_format=torch.channels_last)
    )


def _laid_out(data: Tensor, channels_last: bool) -> Tensor:
    if data.ndim != 4 or _is_channels_last(data) == channels_last:
        return data
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return data.contiguous(memory_format=layout)


class _TrainingProcessor(SeFiAttnProcessor):
    """Split streams for the training's own prompts, which bear `sefi_training`.

    Prompts of pipelines that other threads run on the U-Net go to the processor that was there.
    """

    replaced: Any = None

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        own = torch.compiler.is_compiling() or hasattr(encoder_hidden_states, "sefi_training")
        attend: Any = super().__call__ if own else self.replaced
        output: Tensor = attend(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        return output


def _check_no_training(attn: Attention) -> None:
    if isinstance(attn.processor, _TrainingProcessor):
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
            processor = _TrainingProcessor(
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
            for attn, processor in self._ours:
                _check_no_training(attn)
                found = attn.processor
                if isinstance(processor, _TrainingProcessor):
                    processor.replaced = found
                before.append((attn, processor, found))
                attn.set_processor(processor)
            yield
        finally:
            for attn, processor, found in before:
                if attn.processor is processor:
                    attn.set_processor(found)
