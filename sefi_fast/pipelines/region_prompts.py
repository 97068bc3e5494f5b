"""Own prompts for parts of the image, so that several subjects do not mix."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from numbers import Real
from typing import Any, NamedTuple

from diffusers import ControlNetModel, ControlNetUnionModel, UNetMotionModel
from torch import Tensor, nn

from sefi_fast.attention.processor import PromptState, SeFiAttnProcessor
from sefi_fast.attention.regions import Box, RegionPrompts
from sefi_fast.errors import ModelError, PromptError
from sefi_fast.pipelines.encode_prompt import EncodePromptPatch
from sefi_fast.pipelines.model_patch import processor_of
from sefi_fast.pipelines.support import (
    TextShape,
    check_not_compiled,
    check_pipeline,
    conditioned_models,
    given_models,
)
from sefi_fast.pipelines.watcher import PipelineCall, Watcher
from sefi_fast.prompts.stages import select_stage
from sefi_fast.prompts.text_encoder import Pipeline, unwrap


@contextmanager
def regions(
    pipe: Pipeline, prompts: Mapping[str, Box] | Iterable[tuple[str, Box]]
) -> Iterator[None]:
    """Give parts of the image prompts of their own while `pipe` generates.

    Two subjects in one sentence mix: in the text encoder every later word sees the earlier subject,
    and each image token attends to both. With regions, the image tokens of a box attend to the
    words of its prompt alone, in every cross-attention layer of the U-Net and the ControlNets.
    Those outside all boxes attend to the call's prompt. Self-attention and convolutions still see
    the whole image. SDXL's pooled embedding is that of the call's prompt. The negative prompt is
    the same everywhere; clip_skip and LoRA apply to the boxes' prompts too. On exit, also by an
    exception, everything is restored. Until then regions apply to every call of `pipe`, in any
    thread.

    Example:
        >>> sefi_fast.attach(pipe, ["me.safetensors", "cat.safetensors"])
        >>> boxes = {"<me> on the beach": (0, 0, 0.5, 1), "a <cat> on the beach": (0.5, 0, 1, 1)}
        >>> with sefi_fast.regions(pipe, boxes):
        ...     image = pipe("two friends on the beach").images[0]

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
        PromptError: from the call, if a placeholder cannot be used in its position, or the call's
            prompt was given as a tensor.
        ValueError: there is no region, a box does not lie within the image, or a trace or regions
            of this pipeline already run.
        TypeError: a prompt is not a string, or a box is not four numbers.
    """
    pairs = _checked(prompts)
    check_pipeline(pipe)
    check_not_compiled(given_models(pipe), _REQUEST)
    name = type(pipe).__name__
    if isinstance(unwrap(pipe.unet), UNetMotionModel):
        raise ModelError(
            f"{name} repeats its prompt for every frame, where regions would be lost. Give regions "
            "to single images."
        )
    if "Panorama" in name:
        raise ModelError(
            f"{name} generates crops one by one, and a region's box would be taken for a part of "
            "each crop. Generate without regions, or with another pipeline."
        )
    patch = EncodePromptPatch.acquire(pipe)
    with patch.watched_by(_RegionWatcher(pipe, pairs)):
        yield


_REQUEST = "give regions"


class _Call(NamedTuple):
    """The encoded regions of one call of the pipeline, which generates `images` images."""

    prompts: list[Tensor]
    width: int
    images: int
    guidance: bool


class _RegionWatcher(Watcher[_Call]):
    """Encodes the regions' prompts for each call, and puts them on the prompts of the models."""

    def __init__(self, pipe: Pipeline, pairs: list[tuple[str, Box]]) -> None:
        super().__init__(pipe, _REQUEST)
        self._texts = [text for text, _ in pairs]
        self._boxes = [box for _, box in pairs]

    def models(self) -> Iterable[nn.Module]:
        return conditioned_models(self.pipe)

    def begin(self, call: PipelineCall) -> _Call:
        if call.prompts is None:
            raise PromptError(
                "regions count the images of a call by its prompts, but they were given as "
                "prompt_embeds; give them as text"
            )
        prompts = [call.encode(text) for text in self._texts]
        width = TextShape.of(self.pipe).width
        return _Call(prompts, width, len(call.prompts) * call.images, call.guidance)

    def before(self, model: nn.Module, call: _Call, arguments: Mapping[str, Any]) -> PromptState:
        prompt = arguments["encoder_hidden_states"]
        processors = map(processor_of, self.layers[model].values())
        unfit = [one for one in processors if not isinstance(one, SeFiAttnProcessor)]
        unfit += [] if isinstance(prompt, Tensor) else [prompt]
        if unfit:
            raise ModelError(
                f"a layer of {type(model).__name__} has a processor or a prompt of type "
                f"{type(unfit[0]).__name__}, which knows no regions: unload an IP-Adapter with "
                "pipe.unload_ip_adapter()"
            )
        samples = self._samples(model, call, len(prompt))
        call.prompts[:] = [own.to(prompt.device, prompt.dtype) for own in call.prompts]
        when = arguments["timestep"], self.pipe.scheduler.config.num_train_timesteps
        streams = [
            own if own.shape[-1] == call.width else select_stage(own, call.width, *when)
            for own in call.prompts
        ]
        size = tuple(arguments["sample"].shape[-2:])
        regions = RegionPrompts(streams, self._boxes, samples, size, self.factors[model])
        return PromptState(regions=regions)

    def _samples(self, model: nn.Module, call: _Call, batch: int) -> int:
        """Return the number of samples, the last of a batch, that are not the negative prompt's."""
        if call.guidance and batch > call.images and batch % call.images == 0:
            return batch - call.images
        if batch == call.images:
            # ControlNet's guess mode has the positive half alone, and a callback may end guidance.
            ended = not getattr(self.pipe, "do_classifier_free_guidance", call.guidance)
            controlnet = isinstance(model, (ControlNetModel, ControlNetUnionModel))
            if not call.guidance or ended or controlnet:
                return batch
        raise ModelError(
            f"with regions, the {type(model).__name__} was called with a batch of {batch} for "
            f"{call.images} image(s). {type(self.pipe).__name__} runs it on something else than "
            "the negative and the positive prompts, and regions cannot tell which."
        )

    def after(self, model: nn.Module, call: _Call, state: PromptState) -> None:
        if state.regions is None or not state.regions.reached:
            raise ModelError(
                f"no cross-attention layer of {type(model).__name__} saw the regions. A hook or a "
                "projection of the model replaced its prompt on the way. Take it off, or generate "
                "without regions."
            )


def _checked(prompts: Mapping[str, Box] | Iterable[tuple[str, Box]]) -> list[tuple[str, Box]]:
    pairs = list(prompts.items() if isinstance(prompts, Mapping) else prompts)
    if not pairs:
        raise ValueError("there is no region; give at least one prompt and its box")
    checked = []
    for pair in pairs:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
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
