"""Prompts of their own for parts of the image, so that several subjects do not mix."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from numbers import Real
from typing import Any

from diffusers import ControlNetModel, ControlNetUnionModel, UNetMotionModel
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sefi_fast.attention.layers import call_argument, cross_attention_layers
from sefi_fast.attention.processor import SeFiAttnProcessor
from sefi_fast.attention.regions import Box, RegionPrompts, down_factors
from sefi_fast.errors import ModelError, PromptError
from sefi_fast.pipelines.encode_prompt import PipelineCall, PromptEncoder, TextShape, watched
from sefi_fast.pipelines.model_patch import processor_of
from sefi_fast.pipelines.support import (
    check_not_compiled,
    check_pipeline,
    conditioned_models,
    given_models,
    unwrap,
)
from sefi_fast.prompts.stages import StageHook


@contextmanager
def regions(pipe: Any, prompts: Mapping[str, Box] | Iterable[tuple[str, Box]]) -> Iterator[None]:
    """Give parts of the image prompts of their own while `pipe` samples.

    ```python
    sefi_fast.attach(pipe, ["me.safetensors", "cat.safetensors"])
    boxes = {"<me> on the beach": (0, 0, 0.5, 1), "a <cat> on the beach": (0.5, 0, 1, 1)}
    with sefi_fast.regions(pipe, boxes):
        image = pipe("two friends on the beach").images[0]
    ```

    Two subjects in one sentence mix: in the text encoder every later word sees the earlier subject,
    and each image token looks at both. Here the image tokens of a box attend to the words of its
    prompt alone, in every cross-attention layer of the U-Net and the ControlNets; those outside all
    boxes attend to the call's prompt. Self-attention and convolutions still see the whole image,
    and so does SDXL's pooled embedding, which is that of the call's prompt. The negative prompt is
    the same everywhere; clip_skip and LoRA hold for the boxes' prompts too. On exit, also by an
    exception, everything is as it was; until then regions hold for every call of `pipe`, whichever
    thread makes it.

    Args:
        pipe: a Stable Diffusion 1.x, 2.x or SDXL pipeline, with subjects attached or without, of
            which no part is compiled; not AnimateDiff or Panorama, not with an IP-Adapter.
        prompts: sentences and their boxes, (left, top, right, bottom) in fractions of the image,
            0 to 1; where boxes overlap the later one counts.

    Raises:
        ModelError: the pipeline is of another family, or one that regions cannot reach; from the
            call, if an IP-Adapter has its layers, the U-Net is run on something else than the
            call's prompts, or its layers get other image tokens than those of its input's size
            (token merging, HyperTile, deep shrink).
        PromptError: from the call, if a placeholder cannot be used where it stands, or the call's
            prompt was given as a tensor.
        ValueError: there is no region, a box does not lie within the image, or a trace or regions
            of this pipeline already run.
        TypeError: a prompt is no string, or a box is not four numbers.
    """
    pairs = _checked(prompts)
    check_pipeline(pipe)
    check_not_compiled(given_models(pipe), "give regions")
    _check_reach(pipe)
    encoder = PromptEncoder.acquire(pipe)
    if encoder.watchers:
        raise ValueError("a trace or regions of this pipeline already run: one of them at a time")
    placed = _Regions(pipe, pairs)
    with watched(pipe, encoder, placed):
        try:
            yield
        finally:
            placed.remove()


def _check_reach(pipe: Any) -> None:
    if isinstance(unwrap(pipe.unet), UNetMotionModel):
        raise ModelError(
            f"{type(pipe).__name__} repeats its prompt for every frame, where regions would be "
            "lost: give regions to single images"
        )
    if "Panorama" in type(pipe).__name__:
        raise ModelError(
            f"{type(pipe).__name__} draws crops one by one, and a region's box would be taken for "
            "a part of each crop: draw without regions, or with another pipeline"
        )


class _Regions:
    """Encodes the regions' prompts when the pipeline is called, and leaves them on the models'."""

    def __init__(self, pipe: Any, pairs: list[tuple[str, Box]]) -> None:
        self._pipe = pipe
        self._texts = [text for text, _ in pairs]
        self._boxes = [box for _, box in pairs]
        self._hooks: dict[nn.Module, list[RemovableHandle]] = {}
        # By thread, since one pipeline may serve several.
        self._calls: dict[int, _Call] = {}

    def begin(self, call: PipelineCall) -> None:
        """Encode the regions' prompts for a call that starts."""
        if call.prompts is None:
            raise PromptError(
                "regions count the images of a call by its prompts, but they were given as "
                "prompt_embeds: give them as text"
            )
        check_not_compiled(given_models(self._pipe), "give regions")
        for model in conditioned_models(self._pipe):
            if model not in self._hooks:
                hook = _ModelCall(model, self._calls)
                self._hooks[model] = [
                    model.register_forward_pre_hook(hook, with_kwargs=True),
                    model.register_forward_hook(hook.after),
                ]
        pictures = len(call.prompts) * call.images
        prompts = [call.encode(text) for text in self._texts]
        own = _Call(self._pipe, prompts, self._boxes, pictures, call.guidance)
        self._calls[threading.get_ident()] = own

    def end(self) -> None:
        """Leave the models to other calls of this thread."""
        self._calls.pop(threading.get_ident(), None)

    def remove(self) -> None:
        """Take everything off the models."""
        for hooks in self._hooks.values():
            for hook in hooks:
                hook.remove()


class _Call:
    """The encoded regions of one call of the pipeline."""

    def __init__(
        self, pipe: Any, prompts: list[Tensor], boxes: list[Box], pictures: int, guidance: bool
    ) -> None:
        self._pipe = pipe
        self._prompts = prompts
        self._boxes = boxes
        self._pictures = pictures
        self._guidance = guidance
        # Of the latest call of a model.
        self.placed: RegionPrompts | None = None
        self._stages = StageHook(
            TextShape.of(pipe).width, pipe.scheduler.config.num_train_timesteps
        )

    def at(
        self,
        model: nn.Module,
        prompt: Tensor,
        timestep: Any,
        size: tuple[int, int],
        factors: Mapping[int, int],
    ) -> RegionPrompts:
        """The regions of a model's call with this prompt, of which the stage is chosen already."""
        samples = self._samples(model, len(prompt))
        self._prompts = [own.to(prompt.device, prompt.dtype) for own in self._prompts]
        streams = [self._stages.select(own, timestep) for own in self._prompts]
        return RegionPrompts(streams, self._boxes, samples, size, factors)

    def _samples(self, model: nn.Module, batch: int) -> int:
        """How many samples of a batch, its last ones, are not the negative prompt's."""
        if self._guidance and batch > self._pictures and batch % self._pictures == 0:
            return batch - self._pictures
        if batch == self._pictures:
            # ControlNet's guess mode has the positive half alone, and a callback may end guidance.
            ended = not getattr(self._pipe, "do_classifier_free_guidance", self._guidance)
            if not self._guidance or ended or isinstance(model, _CONTROLNETS):
                return batch
        raise ModelError(
            f"with regions, the {type(model).__name__} was called with a batch of {batch} for "
            f"{self._pictures} image(s): {type(self._pipe).__name__} runs it on something else "
            "than the negative and the positive prompts, and regions cannot tell which"
        )


_CONTROLNETS = (ControlNetModel, ControlNetUnionModel)


class _ModelCall:
    """Forward-pre-hook of a U-Net or ControlNet, after the one that picks the stage."""

    def __init__(self, model: nn.Module, calls: Mapping[int, _Call]) -> None:
        self._layers = cross_attention_layers(model)
        self._factors = down_factors(model)
        self._calls = calls

    def __call__(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
    ) -> None:
        call = self._calls.get(threading.get_ident())
        # torch leaves the keywords out while another thread registers or removes the hook.
        if call is None or kwargs is None:
            return
        for name, attn in self._layers.items():
            processor = processor_of(attn)
            if not isinstance(processor, SeFiAttnProcessor):
                raise ModelError(
                    f"layer {name} of {type(model).__name__} has the processor "
                    f"{type(processor).__name__}, which knows no regions: unload an "
                    "IP-Adapter with pipe.unload_ip_adapter()"
                )
        height, width = call_argument(args, kwargs, 0, "sample").shape[-2:]
        timestep = call_argument(args, kwargs, 1, "timestep")
        prompt = call_argument(args, kwargs, 2, "encoder_hidden_states")
        if not isinstance(prompt, Tensor):
            raise ModelError(
                f"{type(model).__name__} was given a prompt of type {type(prompt).__name__}, as "
                "IP-Adapter makes it: regions need pipe.unload_ip_adapter()"
            )
        placed = call.at(model, prompt, timestep, (height, width), self._factors)
        prompt.sefi_regions = call.placed = placed  # type: ignore[attr-defined]

    def after(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Raise ModelError where something put another tensor in the place of the prompt."""
        call = self._calls.get(threading.get_ident())
        if call is not None and call.placed is not None and not call.placed.reached:
            raise ModelError(
                f"no cross-attention layer of {type(model).__name__} saw the regions. A hook or a "
                "projection of the model replaced its prompt on the way. Take it off, or draw "
                "without regions."
            )


def _checked(prompts: Mapping[str, Box] | Iterable[tuple[str, Box]]) -> list[tuple[str, Box]]:
    pairs = list(prompts.items() if isinstance(prompts, Mapping) else prompts)
    if not pairs:
        raise ValueError("there is no region: give at least one prompt and its box")
    checked = []
    for pair in pairs:
        if isinstance(pair, str) or not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise TypeError(
                f"a region is a prompt and its box, ('a cat', (0, 0, 1, 1)); got {pair!r}"
            )
        text, box = pair
        if not isinstance(text, str):
            raise TypeError(f"the prompt of a region must be one sentence, got {text!r}")
        numbers = isinstance(box, (tuple, list)) and len(box) == 4
        if not numbers or not all(isinstance(side, Real) for side in box):
            raise TypeError(
                f"the box of {text!r} must be four numbers, left, top, right, bottom, got {box!r}"
            )
        left, top, right, bottom = map(float, box)
        if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
            raise ValueError(
                f"the box {box} of {text!r} must lie within (0, 0, 1, 1), its left side left of "
                "its right one and its top above its bottom"
            )
        checked.append((text, (left, top, right, bottom)))
    return checked
