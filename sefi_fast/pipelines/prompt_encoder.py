"""What stands in for a pipeline's encode_prompt while subjects are attached or a trace runs."""

from __future__ import annotations

import copy
import logging
import math
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch
from diffusers.loaders import TextualInversionLoaderMixin
from diffusers.utils import USE_PEFT_BACKEND, scale_lora_layers, unscale_lora_layers
from torch import Tensor, nn

from sefi_fast.conditioning import encode
from sefi_fast.conditioning.packing import pack, packed_stages, unpack
from sefi_fast.conditioning.prompt import TOKENIZING
from sefi_fast.errors import PromptError
from sefi_fast.pipelines.families import conditioned_models
from sefi_fast.pipelines.installation import adopt, install, uninstall

if TYPE_CHECKING:
    from sefi_fast.subject import Subject

logger = logging.getLogger(__name__)


class Tracer(Protocol):
    """Who wants to know the words of each call that a pipeline makes."""

    def begin(self, prompts: list[str] | None, num_images_per_prompt: int, guidance: bool) -> None:
        """A call starts that will run the U-Net on these prompts."""


class PromptEncoder:
    """Encodes prompts with placeholders into packed conditioning, all others as the pipeline does.

    One object stands at `pipe.encode_prompt` for as long as subjects are attached or a trace runs,
    and keeps the U-Net and the ControlNets ready for packed prompts for that long. It refers to
    the pipeline weakly: a pipeline that is dropped frees its memory at once.
    """

    def __init__(self, pipe: Any) -> None:
        self.subjects: tuple[Subject, ...] = ()
        self.tracers: list[Tracer] = []
        self._pipe = weakref.ref(pipe)
        self._replaced = pipe.__dict__.get("encode_prompt")
        self._models: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    @classmethod
    def of(cls, pipe: Any) -> PromptEncoder | None:
        """The one that stands at `pipe.encode_prompt` now."""
        found = pipe.__dict__.get("encode_prompt")
        return found if isinstance(found, cls) else None

    @classmethod
    def acquire(cls, pipe: Any) -> PromptEncoder:
        """The pipeline's encoder, put in place when there is none.

        Raises:
            ModelError: an attention processor of the pipeline must not be replaced; the pipeline
                is then as it was.
        """
        encoder = cls.of(pipe)
        if encoder is None:
            encoder = cls(pipe)
            try:
                encoder._prepare_models(pipe)
            except BaseException:
                encoder._release_models()
                raise
            pipe.encode_prompt = encoder
        return encoder

    def release(self) -> None:
        """Take everything away again if neither subjects nor a trace need it."""
        pipe = self._pipe()
        if self.subjects or self.tracers or pipe is None:
            return
        self._release_models()
        if pipe.__dict__.get("encode_prompt") is self:
            if self._replaced is None:
                del pipe.encode_prompt
            else:
                pipe.encode_prompt = self._replaced

    def __deepcopy__(self, memo: dict[int, Any]) -> PromptEncoder:
        copied = PromptEncoder.__new__(PromptEncoder)
        memo[id(self)] = copied
        copied.subjects = self.subjects
        copied.tracers = []
        copied._pipe = weakref.ref(copy.deepcopy(self._pipe(), memo))
        copied._replaced = copy.deepcopy(self._replaced, memo)
        copied._models = weakref.WeakSet()
        for model in self._models:
            model = copy.deepcopy(model, memo)
            adopt(model, copied)
            copied._models.add(model)
        return copied

    def __call__(
        self,
        prompt: str | list[str] | None,
        device: torch.device,
        num_images_per_prompt: int,
        do_classifier_free_guidance: bool,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        lora_scale: float | None = None,
        clip_skip: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The pipeline's own encode_prompt, with packed prompts where placeholders stand.

        Returns:
            (prompt_embeds, negative_prompt_embeds), both [B · num_images_per_prompt, L, C] of the
            same length L; the second is None without guidance.

        Raises:
            PromptError: a placeholder cannot be used where it stands, or a prompt given as a
                tensor cannot be packed to go with one that is.
            TypeError, ValueError: prompt and negative prompt differ in type or in number.
        """
        pipe = self._pipe()
        if pipe is None:
            raise ReferenceError("the pipeline of this encode_prompt no longer exists")
        self._restore_what_was_replaced(pipe)
        guidance = do_classifier_free_guidance
        with TOKENIZING:
            embeds = self._encode_both(
                pipe,
                prompt,
                device,
                num_images_per_prompt,
                guidance,
                negative_prompt,
                prompt_embeds,
                negative_prompt_embeds,
                lora_scale,
                clip_skip,
            )
            prompts = [prompt] if isinstance(prompt, str) else prompt
            for tracer in self.tracers:
                tracer.begin(prompts, num_images_per_prompt, guidance)
        return embeds

    def _encode_both(
        self,
        pipe: Any,
        prompt: str | list[str] | None,
        device: torch.device,
        num_images_per_prompt: int,
        guidance: bool,
        negative_prompt: str | list[str] | None,
        prompt_embeds: Tensor | None,
        negative_prompt_embeds: Tensor | None,
        lora_scale: float | None,
        clip_skip: int | None,
    ) -> tuple[Tensor, Tensor | None]:
        marked = prompt_embeds is None and self._has_placeholder(prompt)
        marked_negative = (
            guidance and negative_prompt_embeds is None and self._has_placeholder(negative_prompt)
        )
        tokens = pipe.tokenizer.model_max_length
        given = (prompt_embeds, negative_prompt_embeds)
        if not (marked or marked_negative or any(_stages(x, tokens) for x in given)):
            return self._own(pipe)(
                prompt,
                device,
                num_images_per_prompt,
                guidance,
                negative_prompt,
                prompt_embeds=prompt_embeds,
                negative_prompt_embeds=negative_prompt_embeds,
                lora_scale=lora_scale,
                clip_skip=clip_skip,
            )
        positive, negative = prompt_embeds, negative_prompt_embeds if guidance else None
        if positive is None:
            assert prompt is not None
            positive = self._encode(
                pipe, prompt, device, marked, lora_scale=lora_scale, clip_skip=clip_skip
            )
        if guidance and negative is None:
            texts = _negative_texts(prompt, negative_prompt, len(positive))
            # diffusers applies clip_skip to the prompt alone.
            negative = self._encode(
                pipe, texts, device, marked_negative, lora_scale=lora_scale, clip_skip=None
            )
        if negative is not None and len(negative) != len(positive):
            raise ValueError(
                f"negative_prompt_embeds is for {len(negative)} prompts, but there are "
                f"{len(positive)}: give one a prompt"
            )

        def placed(embeds: Tensor) -> Tensor:
            embeds = embeds.to(device=device, dtype=pipe.text_encoder.dtype)
            return embeds.repeat_interleave(num_images_per_prompt, dim=0)

        positive, negative = _same_packing(positive, negative, tokens)
        return placed(positive), None if negative is None else placed(negative)

    def _encode(
        self,
        pipe: Any,
        texts: str | list[str],
        device: torch.device,
        marked: bool,
        *,
        lora_scale: float | None,
        clip_skip: int | None,
    ) -> Tensor:
        """[B, L, C], packed if `marked`, as the pipeline encodes it otherwise."""
        if not marked:
            own = self._own(pipe)
            return own(texts, device, 1, False, lora_scale=lora_scale, clip_skip=clip_skip)[0]
        if isinstance(pipe, TextualInversionLoaderMixin):
            texts = pipe.maybe_convert_prompt(texts, pipe.tokenizer)
        with _text_lora(pipe, lora_scale):
            return encode(pipe, texts, subjects=list(self.subjects), clip_skip=clip_skip)

    def _own(self, pipe: Any) -> Any:
        return self._replaced or type(pipe).encode_prompt.__get__(pipe)

    def _has_placeholder(self, texts: str | Sequence[str] | None) -> bool:
        if texts is None:
            return False
        texts = [texts] if isinstance(texts, str) else texts
        return any(subject.placeholder in text for subject in self.subjects for text in texts)

    def _prepare_models(self, pipe: Any) -> list[str]:
        """Install on every model of the pipeline; what had to be put on again, in words."""
        tokens = pipe.tokenizer.model_max_length
        missing = []
        models = list(conditioned_models(pipe))
        for model in models:
            known = model in self._models
            timesteps = pipe.scheduler.config.num_train_timesteps
            for what in install(model, self, tokens, timesteps):
                missing.append(f"{what} of the {'' if known else 'new '}{type(model).__name__}")
            self._models.add(model)
        for model in [m for m in self._models if m not in models]:
            uninstall(model, self)
            self._models.discard(model)
        return missing

    def _restore_what_was_replaced(self, pipe: Any) -> None:
        missing = self._prepare_models(pipe)
        if missing:
            logger.warning(
                "after sefi_fast was attached, something replaced %s; put on again for this call. "
                "Call sefi_fast.detach(pipe) first if you want yours",
                " and ".join(missing),
            )

    def _release_models(self) -> None:
        for model in list(self._models):
            uninstall(model, self)
        self._models.clear()


def _negative_texts(
    prompt: str | list[str] | None, negative: str | list[str] | None, batch: int
) -> list[str]:
    if negative is None:
        return [""] * batch
    if prompt is not None and type(prompt) is not type(negative):
        raise TypeError(
            f"negative_prompt must be of the type of prompt, {type(prompt).__name__}, but it is "
            f"{type(negative).__name__}"
        )
    texts = [negative] * batch if isinstance(negative, str) else negative
    if len(texts) != batch:
        raise ValueError(
            f"there are {len(texts)} negative prompts for {batch} prompts: give one a prompt"
        )
    return texts


def _stages(prompt_embeds: Tensor | None, tokens: int) -> int | None:
    """The stages of a packed prompt; None for a plain one."""
    return None if prompt_embeds is None else packed_stages(prompt_embeds.shape[1], tokens)


def _same_packing(
    positive: Tensor, negative: Tensor | None, tokens: int
) -> tuple[Tensor, Tensor | None]:
    """Both prompts packed with the same number of stages; plain ones repeat in every stage."""
    stages = [s for s in (_stages(positive, tokens), _stages(negative, tokens)) if s is not None]
    if not stages:
        return positive, negative
    common = math.lcm(*stages)
    return (
        _repack(positive, common, tokens),
        None if negative is None else _repack(negative, common, tokens),
    )


def _repack(prompt: Tensor, stages: int, tokens: int) -> Tensor:
    own_stages = _stages(prompt, tokens)
    if own_stages == stages:
        return prompt
    if own_stages is not None:
        return pack(unpack(prompt, tokens).repeat_interleave(stages // own_stages, dim=1))
    if prompt.shape[1] != tokens:
        raise PromptError(
            f"a prompt of {prompt.shape[1]} tokens was given as a tensor together with a prompt "
            f"that holds a subject: only prompts of {tokens} tokens can be packed with it"
        )
    return pack(prompt[:, None, None].expand(-1, stages, 2, -1, -1))


@contextmanager
def _text_lora(pipe: Any, scale: float | None) -> Iterator[None]:
    """LoRA layers of the text encoder at `scale`, as the pipeline's own encode_prompt sets them."""
    if scale is None:
        yield
        return
    pipe._lora_scale = scale
    if not USE_PEFT_BACKEND:
        yield
        return
    scale_lora_layers(pipe.text_encoder, scale)
    try:
        yield
    finally:
        unscale_lora_layers(pipe.text_encoder, scale)
