"""The patches of a pipeline's models: packed prompts for a U-Net, a guard for a text encoder."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any, TypeVar
from weakref import WeakKeyDictionary, WeakSet

import torch
from diffusers.models import attention_processor as diffusers_processors
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sefi_fast.attention.layers import cross_attention_layers
from sefi_fast.attention.processor import SeFiAttnProcessor, TrainingProcessor
from sefi_fast.errors import ModelError, PromptError
from sefi_fast.prompts.stages import has_stage_hook, install_stage_hook
from sefi_fast.prompts.tokenization import PlainPlaceholder

LOCK = threading.RLock()
"""Held while a prompt is encoded and while a model is patched or restored."""

_ATTRIBUTE = "_sefi_patch"

# SeFiAttnProcessor can replace these, which compute plain attention. Any other (IP-Adapter,
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

Patch = TypeVar("Patch", bound="ModelPatch")


class ModelPatch:
    """The hooks on one model, and the pipelines that need them.

    Attributes:
        users: the `EncodePromptPatch` of each such pipeline, held weakly. The model is restored
            with the last one.
    """

    def __init__(self) -> None:
        self.users: WeakSet[Any] = WeakSet()
        self._hooks: list[RemovableHandle] = []

    @classmethod
    def of(cls: type[Patch], model: nn.Module) -> Patch | None:
        """Return the patch of a model, or None."""
        found: Patch | None = getattr(model, _ATTRIBUTE, None)
        return found

    @classmethod
    def on(cls: type[Patch], model: nn.Module, user: Any) -> Patch:
        """Return the patch of a model, created at first use, with `user` among its users."""
        patch = cls.of(model)
        if patch is None:
            patch = cls()
            setattr(model, _ATTRIBUTE, patch)
        patch.users.add(user)
        return patch

    def __getstate__(self) -> dict[str, Any]:
        for user in list(self.users):
            user.check_may_be_copied()
        # A copy of the model alone has no users; copied pipelines register themselves.
        state = {name: value for name, value in vars(self).items() if name not in _NOT_COPIED}
        # PyTorch cannot copy the handle of a module that is gone, such as an unloaded adapter's.
        return state | {"_hooks": [one for one in self._hooks if one.hooks_dict_ref() is not None]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]
        vars(self).update(state)

    def remove(self) -> None:
        """Restore the model."""
        # Last the hooks of the projections, which a call that has begun still needs.
        for hook in reversed(self._hooks):
            hook.remove()


_NOT_COPIED = ("users", "watchers", "_placeholders")


def release(model: nn.Module, user: Any = None) -> None:
    """End the need of `user`; restore the model if it has no other user."""
    with LOCK:
        patch = ModelPatch.of(model)
        if patch is None:
            return
        if user is not None:
            patch.users.discard(user)
        # As a list: the length of a WeakSet may count users that are dying just now.
        if not list(patch.users):
            patch.remove()
            delattr(model, _ATTRIBUTE)


class UNetPatch(ModelPatch):
    """Hooks that make a U-Net or ControlNet take packed prompts.

    They leave plain prompts and the attention processors as they are, so that calls of other
    threads give the same while hooks come and go.

    Attributes:
        watchers: the users that follow single layers, which need our processors for it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.watchers: WeakSet[Any] = WeakSet()
        self._layers: list[Attention] = []
        # Layers with a processor of ours: (layer, ours, the one before).
        self._processors: list[tuple[Attention, Any, Any]] = []

    def apply(self, model: nn.Module, width: int, num_train_timesteps: int) -> None:
        """Install the hooks that are missing, for plain prompts of `width` columns."""
        self._layers = self._layers or list(cross_attention_layers(model).values())
        self.hook_streams(model)
        if not has_stage_hook(model):
            # Before each packed prompt, because an adapter may have wrapped projections since.
            hook = install_stage_hook(model, width, num_train_timesteps, before=self.hook_streams)
            self._hooks.append(hook)

    def hook_streams(self, model: nn.Module) -> None:
        """Hook the projections that are not hooked."""
        with LOCK:
            for attn in self._layers:
                self._hooks += hook_streams(attn)

    def watch(self, user: Any, watching: bool) -> None:
        """Put our processors on the layers while a user watches them."""
        (self.watchers.add if watching else self.watchers.discard)(user)
        if not self.watchers:
            self._restore_processors()
            return
        for attn in self._layers:
            before = processor_of(attn)
            if type(before) in _PLAIN and not isinstance(before, SeFiAttnProcessor):
                ours = SeFiAttnProcessor()
                _set_processor(attn, ours)
                self._processors.append((attn, ours, before))

    def _restore_processors(self) -> None:
        for attn, ours, before in self._processors:
            # A processor that was set since is not ours to replace.
            if processor_of(attn) is ours:
                _set_processor(attn, before)
        self._processors.clear()

    def remove(self) -> None:
        """Restore the model."""
        # A call that has begun hooks no more.
        self._layers = []
        super().remove()
        self._restore_processors()


def watch(model: nn.Module, user: Any, watching: bool) -> None:
    """Start or end watching the layers of a patched model on behalf of `user`."""
    with LOCK:
        patch = UNetPatch.of(model)
        assert patch is not None
        patch.watch(user, watching)


@dataclass(frozen=True, eq=False)
class StreamHook:
    """Forward-pre-hook of a projection that picks one of two streams side by side, [B, M, 2·C].

    `stream` is 0 for keys, 1 for values, None for diffusers' fused projection, which gets both as
    [B, 2, M, C]. A prompt of width C is passed on as it is.
    """

    width: int
    stream: int | None

    def __call__(self, projection: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        prompt = args[0]
        if prompt.shape[-1] != 2 * self.width:
            return None
        if self.stream is None:
            return prompt.unflatten(-1, (2, self.width)).transpose(1, 2), *args[1:]
        return prompt.chunk(2, dim=-1)[self.stream], *args[1:]


def _join_fused(projection: nn.Module, args: tuple[Any, ...], projected: Tensor) -> Tensor | None:
    """Join the keys of the K stream and the values of the V stream of a fused projection."""
    if projected.dim() != 4:
        return None
    keys, values = projected.unbind(1)
    return torch.cat([keys.chunk(2, dim=-1)[0], values.chunk(2, dim=-1)[1]], dim=-1)


def hook_streams(attn: Attention) -> list[RemovableHandle]:
    """Hook the projections of a cross-attention layer that are not hooked."""
    handles = []
    for name, stream in (("to_k", 0), ("to_v", 1), ("to_kv", None)):
        projection = getattr(attn, name, None)
        hooks = () if projection is None else projection._forward_pre_hooks.values()
        if projection is None or any(isinstance(hook, StreamHook) for hook in hooks):
            continue
        if stream is None:
            handles.append(projection.register_forward_hook(_join_fused))
        hook = StreamHook(attn.cross_attention_dim, stream)
        handles.append(projection.register_forward_pre_hook(hook))
    return handles


def processor_of(attn: Attention) -> Any:
    """Return the processor for pipelines' prompts, also during a step of a training."""
    found = attn.processor
    return found.replaced if isinstance(found, TrainingProcessor) else found


def _set_processor(attn: Attention, processor: Any) -> None:
    if isinstance(attn.processor, TrainingProcessor):
        attn.processor.replaced = processor
    else:
        attn.set_processor(processor)


def check_replaceable(model: nn.Module, name: str, processor: Any) -> None:
    """Raise ModelError if SeFiAttnProcessor cannot replace `processor`."""
    if type(processor) not in _PLAIN:
        raise ModelError(
            f"layer {name} of {type(model).__name__} has the processor "
            f"{type(processor).__name__}. Training replaces processors, and needs plain ones. Call "
            "unet.set_attn_processor(AttnProcessor2_0()) first, or load the model again."
        )


class TextEncoderPatch(ModelPatch):
    """Forward-pre-hook that refuses placeholders as plain words, on a shared text encoder.

    Other pipelines over the same models, and any tool that calls the text encoder itself, would
    read "<me>" as three plain words and generate someone else.
    """

    def __init__(self) -> None:
        super().__init__()
        # Of each tokenizer, by placeholder.
        self._placeholders = WeakKeyDictionary[Any, dict[str, PlainPlaceholder]]()

    def apply(self, text_encoder: nn.Module) -> None:
        """Install the hook if it is missing."""
        if not self._hooks:
            hook = text_encoder.register_forward_pre_hook(self._check, with_kwargs=True)
            self._hooks.append(hook)

    def _check(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
    ) -> None:
        # torch leaves the keywords out while another thread registers or removes the hook.
        # Training encodes sentences of its own, and many of them.
        if kwargs is None or torch.compiler.is_compiling() or torch.is_grad_enabled():
            return
        input_ids = args[0] if args else kwargs.get("input_ids")
        if not isinstance(input_ids, Tensor) or input_ids.is_meta or input_ids.ndim != 2:
            return
        if input_ids.is_cuda and torch.cuda.is_current_stream_capturing():
            return
        rows = {tuple(row) for row in input_ids.tolist()}
        with LOCK:
            users = list(self.users)
        for user in users:
            tokenizer, placeholders = user.guarded(module)
            known = self._placeholders.setdefault(tokenizer, {}) if placeholders else {}
            for placeholder in placeholders:
                if placeholder not in known:
                    known[placeholder] = PlainPlaceholder(tokenizer, placeholder)
                for text in filter(None, map(known[placeholder].text_with_it, rows)):
                    raise PromptError(_MESSAGE.format(text=text, placeholder=placeholder))


_MESSAGE = (
    "the prompt {text!r} reached the text encoder with the placeholder {placeholder!r} as plain "
    "words, so that its subject would be missing from the image. Subjects are attached to one "
    "pipeline, not to others that share its models: call sefi_fast.attach on the pipeline that "
    "generates, write the placeholder exactly as it is, make embeddings with sefi_fast.encode, or "
    "call sefi_fast.detach on the pipeline that has it"
)
