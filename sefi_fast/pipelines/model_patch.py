"""Make a U-Net take packed prompts, and restore it."""

from __future__ import annotations

import threading
from typing import Any
from weakref import WeakSet

import torch
from diffusers.models import attention_processor as diffusers_processors
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sefi_fast.attention.layers import cross_attention_layers
from sefi_fast.attention.processor import SeFiAttnProcessor, TrainingProcessor
from sefi_fast.errors import ModelError
from sefi_fast.prompts.stages import StageHook, install_stage_hook


class StreamHook:
    """Forward-pre-hook of a projection: of two streams [B, M, 2·C] side by side it passes on one.

    A prompt of width C is passed on as it is.

    Args:
        width: C, columns of a plain prompt.
        stream: 0 for keys, 1 for values, None for diffusers' fused projection, which gets both as
            [B, 2, M, C].
    """

    def __init__(self, width: int, stream: int | None) -> None:
        self.width = width
        self.stream = stream

    def __call__(self, projection: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        prompt = args[0]
        if prompt.shape[-1] != 2 * self.width:
            return None
        if self.stream is None:
            return prompt.unflatten(-1, (2, self.width)).transpose(1, 2), *args[1:]
        return prompt.chunk(2, dim=-1)[self.stream], *args[1:]


def _join_fused(projection: nn.Module, args: tuple[Any, ...], projected: Tensor) -> Tensor | None:
    """Forward hook of a fused projection: keys of the K stream next to values of the V stream."""
    if projected.dim() != 4:
        return None
    keys, values = projected.unbind(1)
    return torch.cat([keys.chunk(2, dim=-1)[0], values.chunk(2, dim=-1)[1]], dim=-1)


def hook_streams(attn: Attention) -> list[RemovableHandle]:
    """Hook the projections of a cross-attention layer that are not hooked."""
    handles = []
    width = attn.cross_attention_dim
    for name, stream in (("to_k", 0), ("to_v", 1), ("to_kv", None)):
        projection = getattr(attn, name, None)
        if projection is None or _is_hooked(projection):
            continue
        if stream is None:
            handles.append(projection.register_forward_hook(_join_fused))
        handles.append(projection.register_forward_pre_hook(StreamHook(width, stream)))
    return handles


def _is_hooked(projection: nn.Module) -> bool:
    return any(isinstance(hook, StreamHook) for hook in projection._forward_pre_hooks.values())


LOCK = threading.RLock()
"""Held while a prompt is encoded and while anything is put on a model or taken off."""

_ATTRIBUTE = "_sefi_installation"

# These compute plain attention, so SeFiAttnProcessor can stand in for them. Any other (IP-Adapter,
# perturbed-attention guidance) adds something that would be lost.
_PLAIN = (
    SeFiAttnProcessor,
    diffusers_processors.AttnProcessor,
    diffusers_processors.AttnProcessor2_0,
    diffusers_processors.AttnProcessorNPU,
    diffusers_processors.FusedAttnProcessor2_0,
    diffusers_processors.SlicedAttnProcessor,
    diffusers_processors.XFormersAttnProcessor,
    diffusers_processors.XLAFlashAttnProcessor2_0,
)


class Installation:
    """What is on one model, and who needs it.

    The hooks leave plain prompts and the attention processors alone, so that calls of other threads
    give the same while hooks come and go.

    Attributes:
        users: who gives packed prompts.
        watchers: who follows the attention of single layers, for which these need our processors.
    """

    def __init__(self, width: int, num_train_timesteps: int) -> None:
        self.users: WeakSet[Any] = WeakSet()
        self.watchers: WeakSet[Any] = WeakSet()
        self._width = width
        self._num_train_timesteps = num_train_timesteps
        self._hooks: list[RemovableHandle] = []
        self._layers: list[Attention] = []
        # Layers with a processor of ours: (layer, ours, the one before).
        self._processors: list[tuple[Attention, Any, Any]] = []

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the model alone must not drag pipelines along; those copied register themselves.
        return {k: v for k, v in vars(self).items() if k not in ("users", "watchers")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state | {"users": WeakSet(), "watchers": WeakSet()}

    def put(self, model: nn.Module) -> None:
        """Install whatever is missing."""
        self._layers = list(cross_attention_layers(model).values())
        self.hook_streams(model)
        if not any(isinstance(hook, StageHook) for hook in model._forward_pre_hooks.values()):
            # Before each packed prompt, because an adapter may have wrapped projections since.
            hook = install_stage_hook(
                model, self._width, self._num_train_timesteps, before=self.hook_streams
            )
            self._hooks.append(hook)
        if self.watchers:
            self._put_processors()
        else:
            self._put_back_processors()

    def hook_streams(self, model: nn.Module) -> None:
        """Hook the projections that are not hooked."""
        with LOCK:
            for attn in self._layers:
                self._hooks += hook_streams(attn)

    def _put_processors(self) -> None:
        for attn in self._layers:
            before = processor_of(attn)
            if type(before) in _PLAIN and not isinstance(before, SeFiAttnProcessor):
                ours = SeFiAttnProcessor()
                _set_processor(attn, ours)
                self._processors.append((attn, ours, before))

    def _put_back_processors(self) -> None:
        """Put back every processor that is still ours to put back."""
        for attn, ours, before in self._processors:
            if processor_of(attn) is ours:
                _set_processor(attn, before)
        self._processors.clear()

    def remove(self) -> None:
        """Make the model what it was."""
        # A call that has begun hooks no more.
        self._layers = []
        # Last the hooks of the projections, which a call that has begun still needs.
        for hook in reversed(self._hooks):
            hook.remove()
        self._put_back_processors()


def processor_of(attn: Attention) -> Any:
    """Return the processor that pipelines' prompts get, also while a training is at a step."""
    found = attn.processor
    return found.replaced if isinstance(found, TrainingProcessor) else found


def _set_processor(attn: Attention, processor: Any) -> None:
    if isinstance(attn.processor, TrainingProcessor):
        attn.processor.replaced = processor
    else:
        attn.set_processor(processor)


def install(
    model: nn.Module, user: Any, width: int, num_train_timesteps: int, watching: bool
) -> None:
    """Make `model` take packed prompts on behalf of `user`.

    Args:
        model: a U-Net or ControlNet.
        user: held weakly.
        width: C, columns of a plain prompt.
        num_train_timesteps: T of the scheduler.
        watching: whether a trace or regions of this user need our processors.
    """
    with LOCK:
        installation = getattr(model, _ATTRIBUTE, None)
        if installation is None:
            installation = Installation(width, num_train_timesteps)
            setattr(model, _ATTRIBUTE, installation)
        installation.users.add(user)
        (installation.watchers.add if watching else installation.watchers.discard)(user)
        installation.put(model)


def watch(model: nn.Module, user: Any, watching: bool) -> None:
    """Say whether a trace or regions of `user` follow the layers of `model`."""
    with LOCK:
        installation = getattr(model, _ATTRIBUTE)
        (installation.watchers.add if watching else installation.watchers.discard)(user)
        installation.put(model)


def adopt(model: nn.Module, user: Any) -> None:
    """Register `user` with a model that was copied together with its installation."""
    with LOCK:
        getattr(model, _ATTRIBUTE).users.add(user)


def uninstall(model: nn.Module, user: Any) -> None:
    """End `user`'s need; with the last one the model becomes what it was."""
    with LOCK:
        installation = getattr(model, _ATTRIBUTE, None)
        if installation is not None:
            installation.users.discard(user)
            uninstall_unused(model)


def uninstall_unused(model: nn.Module) -> None:
    """Make the model what it was if nobody needs it otherwise any more."""
    with LOCK:
        installation = getattr(model, _ATTRIBUTE, None)
        # As a list: the length of a WeakSet may count users that are dying just now.
        if installation is not None and not list(installation.users):
            installation.remove()
            delattr(model, _ATTRIBUTE)


def check_replaceable(model: nn.Module, name: str, processor: Any) -> None:
    """Raise ModelError when `processor` does what SeFiAttnProcessor does not."""
    if type(processor) not in _PLAIN:
        raise ModelError(
            f"layer {name} of {type(model).__name__} has the processor "
            f"{type(processor).__name__}. Training replaces processors, and wants plain ones. Call "
            "unet.set_attn_processor(AttnProcessor2_0()) first, or load the model again."
        )
