"""Split-stream processors and the stage hook on a U-Net or ControlNet, shared by their users."""

from __future__ import annotations

import copy
import threading
from typing import Any
from weakref import WeakSet

from diffusers.models import attention_processor as diffusers_processors
from torch import nn
from torch.utils.hooks import RemovableHandle

from sefi_fast.conditioning.stage_hook import StageHook, install_stage_hook
from sefi_fast.errors import ModelError
from sefi_fast.layers import cross_attention_layers
from sefi_fast.pipelines.split_adapter import is_ip_adapter, split_adapter
from sefi_fast.processor import SeFiAttnProcessor

_ATTRIBUTE = "_sefi_installation"
_LOCK = threading.RLock()

# These compute plain attention, so the split-stream processor can stand in for them. Any other
# but IP-Adapter's (perturbed-attention guidance) adds something that would be lost.
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
    """What was put on one model, what it replaced, and who still needs it."""

    def __init__(self, tokens: int, num_train_timesteps: int) -> None:
        self.users: WeakSet[Any] = WeakSet()
        self._tokens = tokens
        self._num_train_timesteps = num_train_timesteps
        self._replaced: dict[str, Any] = {}
        self._processors: dict[str, Any] = {}
        self._layers: dict[str, Any] = {}
        self._hook: RemovableHandle | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Installation:
        # Users are pipelines, which a copy of the model alone must not drag along; a copied
        # pipeline registers itself with the copy.
        copied = Installation(self._tokens, self._num_train_timesteps)
        memo[id(self)] = copied
        for name in ("_replaced", "_processors", "_layers", "_hook"):
            setattr(copied, name, copy.deepcopy(getattr(self, name), memo))
        return copied

    def put(self, model: nn.Module) -> list[str]:
        """Install whatever is missing; say in words what was.

        Raises:
            ModelError: a cross-attention layer has a processor that must not be replaced.
        """
        missing = []
        layers = cross_attention_layers(model)
        strangers = [
            name
            for name, attn in layers.items()
            if attn.processor is not self._processors.get(name)
        ]
        for name in strangers:
            check_replaceable(model, name, layers[name].processor)
        hooks = model._forward_pre_hooks.values()
        if self._hook is None or not any(isinstance(hook, StageHook) for hook in hooks):
            if self._hook is not None:
                self._hook.remove()
            self._hook = install_stage_hook(
                model, self._tokens, self._num_train_timesteps, before=self._check_processors
            )
            missing.append("the stage hook")
        for name in strangers:
            replaced = layers[name].processor
            ours = _stand_in(replaced)
            self._replaced[name] = replaced
            self._processors[name] = ours
            layers[name].set_processor(ours)
        self._layers = layers
        if strangers:
            missing.append(f"the attention processors of {len(strangers)} layers")
        return missing

    def _check_processors(self, model: nn.Module) -> None:
        """Raise ModelError where another processor would take K and V streams for one prompt."""
        for name, attn in self._layers.items():
            if attn.processor is not self._processors[name]:
                raise ModelError(
                    f"layer {name} of {type(model).__name__} got the processor "
                    f"{type(attn.processor).__name__} after the prompt was encoded, and would take "
                    "a subject's key and value streams for one long prompt: set processors before "
                    "the pipeline is called, or call sefi_fast.detach(pipe) first; pipelines that "
                    "set their own in each call (Attend-and-Excite) take no subject"
                )

    def remove(self, model: nn.Module) -> None:
        """Put back every processor that is still ours to put back, and take the hook away."""
        for name, attn in cross_attention_layers(model).items():
            if name in self._processors and attn.processor is self._processors[name]:
                attn.set_processor(self._replaced[name])
        if self._hook is not None:
            self._hook.remove()


def install(model: nn.Module, user: Any, tokens: int, num_train_timesteps: int) -> list[str]:
    """Make `model` take packed prompts on behalf of `user`; what was missing is told in words.

    Raises:
        ModelError: a cross-attention layer has a processor that must not be replaced.
    """
    with _LOCK:
        installation = getattr(model, _ATTRIBUTE, None)
        if installation is None:
            installation = Installation(tokens, num_train_timesteps)
        missing = installation.put(model)
        installation.users.add(user)
        setattr(model, _ATTRIBUTE, installation)
        return missing


def adopt(model: nn.Module, user: Any) -> None:
    """Register `user` with a model that was copied together with its installation."""
    with _LOCK:
        getattr(model, _ATTRIBUTE).users.add(user)


def uninstall(model: nn.Module, user: Any) -> None:
    """End `user`'s need; with the last one the model becomes what it was."""
    with _LOCK:
        installation = getattr(model, _ATTRIBUTE, None)
        if installation is not None:
            installation.users.discard(user)
            uninstall_unused(model)


def uninstall_unused(model: nn.Module) -> None:
    """Make the model what it was if nobody needs it otherwise any more."""
    with _LOCK:
        installation = getattr(model, _ATTRIBUTE, None)
        # As a list: the length of a WeakSet may count users that are dying just now.
        if installation is not None and not list(installation.users):
            installation.remove(model)
            delattr(model, _ATTRIBUTE)


def check_replaceable(model: nn.Module, name: str, processor: Any) -> None:
    """Raise ModelError when `processor` does what no stand-in does."""
    if type(processor) not in _PLAIN and not is_ip_adapter(processor):
        raise ModelError(
            f"layer {name} of {type(model).__name__} has the processor "
            f"{type(processor).__name__}, whose work sefi_fast would undo by replacing it: set a "
            "plain one of diffusers first, unet.set_attn_processor(AttnProcessor2_0())"
        )


def _stand_in(processor: Any) -> Any:
    """The split-stream processor to put in the place of this one."""
    if is_ip_adapter(processor):
        return split_adapter(processor)
    same_class = isinstance(processor, SeFiAttnProcessor)
    return SeFiAttnProcessor(
        split_streams=True,
        record=processor.record if same_class else None,
        backend=processor.backend if same_class else None,
    )
