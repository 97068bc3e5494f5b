"""Follow the model calls of a pipeline: the base of traces and regions."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Generic, NamedTuple, TypeVar

from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sefi_fast.attention.layers import cross_attention_layers
from sefi_fast.attention.processor import PromptState
from sefi_fast.attention.regions import down_factors
from sefi_fast.pipelines.support import check_not_compiled, given_models
from sefi_fast.prompts.text_encoder import Pipeline

Call = TypeVar("Call")


class PipelineCall(NamedTuple):
    """A call of a pipeline that starts.

    prompts: its texts; None if it was given tensors.
    images: images a prompt.
    guidance: whether a negative prompt goes with them.
    encode: function from a sentence to embeddings [1, L, C], packed if a subject is in it, with the
        settings of the call (clip_skip, LoRA of the text encoders).
    """

    prompts: list[str] | None
    images: int
    guidance: bool
    encode: Callable[[str], Tensor]


class Watcher(ABC, Generic[Call]):
    """Puts a `PromptState` on the prompt of each model call that a pipeline makes.

    A call of the pipeline lasts from its encode_prompt to its end, and has one `Call`. Calls are
    kept by thread, because one pipeline may serve several.

    Messages call it by the wish of the user, `request` ("trace the pipeline").

    Attributes:
        layers: of each model that is followed, name → cross-attention layer.
        factors: of each such model, id of a layer → its down factor.
    """

    def __init__(self, pipe: Pipeline, request: str) -> None:
        self.pipe = pipe
        self.layers: dict[nn.Module, dict[str, Attention]] = {}
        self.factors: dict[nn.Module, dict[int, int]] = {}
        self._request = request
        self._calls: dict[int, Call] = {}
        self._prompts: dict[int, Tensor] = {}
        self._hooks: list[RemovableHandle] = []

    @abstractmethod
    def models(self) -> Iterable[nn.Module]:
        """Return the models whose calls are followed."""

    @abstractmethod
    def begin(self, call: PipelineCall) -> Call:
        """Prepare for a call of the pipeline."""

    @abstractmethod
    def before(self, model: nn.Module, call: Call, arguments: Mapping[str, Any]) -> PromptState:
        """Return the state for the prompt of a model call, of which the stage is selected."""

    @abstractmethod
    def after(self, model: nn.Module, call: Call, state: PromptState) -> None:
        """Collect the results that the layers left in the state."""

    def start(self, call: PipelineCall) -> None:
        """Follow the models from now on, for a call that starts in this thread."""
        check_not_compiled(given_models(self.pipe), self._request)
        self._calls[threading.get_ident()] = self.begin(call)
        for model in self.models():
            if model not in self.layers:
                self.layers[model] = cross_attention_layers(model)
                self.factors[model] = down_factors(model)
                self._hooks += [
                    model.register_forward_pre_hook(self._before, with_kwargs=True),
                    model.register_forward_hook(self._after),
                ]

    def end(self) -> None:
        """Leave the models to other calls of this thread."""
        self._calls.pop(threading.get_ident(), None)

    def remove(self) -> None:
        """Take the hooks off the models."""
        for hook in self._hooks:
            hook.remove()

    def _before(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
    ) -> None:
        thread = threading.get_ident()
        call = self._calls.get(thread)
        # torch leaves the keywords out while another thread registers or removes the hook.
        if call is None or kwargs is None:
            return
        names = ("sample", "timestep", "encoder_hidden_states")
        arguments = dict(zip(names, args, strict=False)) | kwargs
        state = self.before(model, call, arguments)
        self._prompts[thread] = arguments["encoder_hidden_states"]
        state.put_on(self._prompts[thread])

    def _after(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        thread = threading.get_ident()
        call, prompt = self._calls.get(thread), self._prompts.pop(thread, None)
        if call is None or prompt is None:
            return
        state = PromptState.take_off(prompt)
        self.after(model, call, state)
