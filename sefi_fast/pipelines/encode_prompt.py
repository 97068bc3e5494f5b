"""The patch of a pipeline's `encode_prompt` for subjects, traces and regions."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from diffusers.utils import USE_PEFT_BACKEND, scale_lora_layers, unscale_lora_layers
from torch import Tensor, nn

from sefi_fast.errors import ModelError
from sefi_fast.pipelines.model_patch import LOCK, adopt, install, uninstall, uninstall_unused, watch
from sefi_fast.pipelines.placeholders import (
    UnknownPlaceholderWarnings,
    guard,
    unguard,
    unguard_unused,
)
from sefi_fast.pipelines.prompt_request import (
    PromptRequest,
    Texts,
    checked,
    encodes_apart,
    own_arguments,
    same_packing,
    stages_of,
)
from sefi_fast.pipelines.support import check_scheduler, conditioned_models, is_sdxl, unwrap
from sefi_fast.prompts import Encoded, encode_with_pooled
from sefi_fast.prompts.encoding import common_stages
from sefi_fast.prompts.text_encoder import TextPart, text_parts
from sefi_fast.utils.text import mentions

if TYPE_CHECKING:
    pass
    from sefi_fast.pipelines.prompt_request import PromptRequest
    from sefi_fast.subject import Subject


@contextmanager
def text_lora(pipe: Any, scale: float | None) -> Iterator[None]:
    """Set the scale as the pipeline's own encode_prompt sets it, and take it back."""
    if scale is None:
        yield
        return
    pipe._lora_scale = scale
    if not USE_PEFT_BACKEND:
        yield
        return
    encoders = [part.text_encoder for part in text_parts(pipe)]
    for encoder in encoders:
        scale_lora_layers(encoder, scale)
    try:
        yield
    finally:
        for encoder in encoders:
            unscale_lora_layers(encoder, scale)


_TIME_IDS = "_get_add_time_ids"


class TextShape(NamedTuple):
    """What has to be known of a pipeline's text encoders to draw what they encoded.

    width: C, columns of a plain prompt. pooled_width: P, numbers of one pooled embedding.
    """

    width: int
    pooled_width: int

    @classmethod
    def of(cls, pipe: Any) -> TextShape:
        """Raises ModelError if a tokenizer or a text encoder is missing."""
        parts = text_parts(pipe)
        return cls(
            sum(part.text_encoder.config.hidden_size for part in parts),
            parts[-1].text_encoder.config.projection_dim,
        )


def freed_parts(pipe: Any) -> list[str]:
    """Names of the tokenizers and text encoders that the pipeline should have and has not."""
    names = [name for pair in _names(pipe) for name in pair]
    return [name for name in names if getattr(pipe, name, None) is None]


def present_parts(pipe: Any) -> list[TextPart]:
    """The tokenizers and text encoders of which both are there."""
    pairs = (TextPart(*(getattr(pipe, name, None) for name in pair)) for pair in _names(pipe))
    return [pair for pair in pairs if None not in pair]


def _names(pipe: Any) -> list[tuple[str, str]]:
    suffixes = ("", "_2") if is_sdxl(pipe) else ("",)
    return [(f"tokenizer{suffix}", f"text_encoder{suffix}") for suffix in suffixes]


def check_nothing_to_encode(pipe: Any, request: PromptRequest) -> None:
    """Raise ModelError where a prompt is still to be encoded, and what encodes it is gone."""
    missing = freed_parts(pipe)
    zeros = request.negatives[0] is None and pipe.config.get("force_zeros_for_empty_prompt")
    if not missing:
        return
    if request.embeds is None:
        what, remedy = "prompt", "give it as prompt_embeds"
    elif request.guidance and request.negative_embeds is None and not zeros:
        what = "negative prompt"
        remedy = "give it (or '') as negative_prompt_embeds, or draw with guidance_scale=1,"
    else:
        return
    maker = "conditioning.encode_with_pooled" if is_sdxl(pipe) else "encode"
    raise ModelError(
        f"the {' and the '.join(missing)} of this {type(pipe).__name__} are gone, and the {what} "
        f"is still to be encoded: {remedy} made by sefi_fast.{maker} while they were there"
    )


def prompt_dtype(pipe: Any) -> torch.dtype:
    """That of the last text encoder; of the U-Net where that one is gone, as in diffusers."""
    last = pipe.text_encoder_2 if is_sdxl(pipe) else pipe.text_encoder
    dtype: torch.dtype = (pipe.unet if last is None else last).dtype
    return dtype


class TimeIds:
    """Stands at the `_get_add_time_ids` of an SDXL pipeline without its second text encoder.

    diffusers then takes the width of the pooled embeddings for that of one, but packed prompts have
    one a stage.
    """

    def __init__(self, encoder: PromptEncoder) -> None:
        self._encoder = encoder

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        kwargs["text_encoder_projection_dim"] = self._encoder.text.pooled_width
        return getattr(type(self._encoder.pipe), _TIME_IDS)(self._encoder.pipe, *args, **kwargs)


def put_time_ids(pipe: Any, encoder: PromptEncoder) -> None:
    """Put `TimeIds` on a pipeline that needs it; again is no more."""
    if is_sdxl(pipe) and pipe.text_encoder_2 is None and _TIME_IDS not in vars(pipe):
        setattr(pipe, _TIME_IDS, TimeIds(encoder))


def remove_time_ids(pipe: Any) -> None:
    """End that."""
    if isinstance(vars(pipe).get(_TIME_IDS), TimeIds):
        delattr(pipe, _TIME_IDS)


class PipelineCall(NamedTuple):
    """A call of a pipeline that starts.

    prompts: its texts; None where it was given tensors. images: images a prompt. guidance:
    whether a negative prompt goes with them. encode: a sentence to embeddings [1, L, C], packed if
    a subject stands in it, as the call encodes its own (clip_skip, LoRA of the text encoders).
    """

    prompts: list[str] | None
    images: int
    guidance: bool
    encode: Callable[[str], Tensor]


class Watcher(Protocol):
    """A trace or regions: who wants to know of each call that a pipeline makes."""

    def begin(self, call: PipelineCall) -> None:
        """A call starts that will run the U-Net."""

    def end(self) -> None:
        """The call of this thread ends; later calls of the models are others'."""


class PromptEncoder:
    """Encodes prompts with placeholders into packed conditioning, all others as the pipeline does.

    One object stands at `pipe.encode_prompt` for as long as subjects are attached or someone
    watches, and keeps the U-Net and the ControlNets ready for packed prompts for that long. It
    refers to the pipeline weakly: a pipeline that is dropped frees its memory at once.
    """

    def __init__(self, pipe: Any) -> None:
        self.subjects: tuple[Subject, ...] = ()
        self.watchers: list[Watcher] = []
        self.text = TextShape.of(pipe)
        self._warn_of_unknown = UnknownPlaceholderWarnings()
        self._pipe = weakref.ref(pipe)
        self._replaced = pipe.__dict__.get("encode_prompt")
        if isinstance(self._replaced, PromptEncoder):
            self._replaced = self._replaced._replaced
        # What inspect.signature shows of this object: that of the function it stands in for.
        self.__signature__ = inspect.signature(self._own(pipe))
        self._models: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        # Each with its tokenizer.
        self._text_encoders: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()
        self._clean_up_when_dropped()

    def _clean_up_when_dropped(self) -> None:
        """A pipeline that goes without `detach` leaves nothing on models that others share."""
        dropped = weakref.finalize(self, _clean_up, self._models, self._text_encoders)
        dropped.atexit = False

    @property
    def pipe(self) -> Any:
        """The pipeline.

        Raises:
            ReferenceError: it no longer exists.
        """
        pipe = self._pipe()
        if pipe is None:
            raise ReferenceError("the pipeline of this encode_prompt no longer exists")
        return pipe

    @classmethod
    def of(cls, pipe: Any) -> PromptEncoder | None:
        """The one that stands at `pipe.encode_prompt` now."""
        found = pipe.__dict__.get("encode_prompt")
        # A shallow copy of a pipeline has its original's.
        return found if isinstance(found, cls) and found._pipe() is pipe else None

    @classmethod
    def acquire(cls, pipe: Any) -> PromptEncoder:
        """The pipeline's encoder, put in place when there is none.

        Raises:
            ModelError: an attention processor of the pipeline must not be replaced; the pipeline
                is then as it was.
        """
        with LOCK:
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
        """Take everything away again if neither subjects nor a watcher need it."""
        with LOCK:
            pipe = self._pipe()
            if pipe is None:
                return
            if self.subjects or self.watchers:
                for model in self._models:
                    watch(model, self, bool(self.watchers))
                return
            self._release_models()
            remove_time_ids(pipe)
            if pipe.__dict__.get("encode_prompt") is self:
                if self._replaced is None:
                    del pipe.encode_prompt
                else:
                    pipe.encode_prompt = self._replaced

    def __getstate__(self) -> dict[str, Any]:
        if self.watchers:
            raise ModelError(
                "a trace or regions run on this pipeline, and a copy would have a part of them. "
                "Leave their with block before the pipeline or a model of it is copied."
            )
        return vars(self) | {
            "_warn_of_unknown": UnknownPlaceholderWarnings(),
            "_pipe": self._pipe(),
            "_models": list(self._models),
            "_text_encoders": dict(self._text_encoders),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._pipe = weakref.ref(state["_pipe"])
        self._models = weakref.WeakSet(state["_models"])
        self._text_encoders = weakref.WeakKeyDictionary(state["_text_encoders"])
        for model in self._models:
            adopt(model, self)
        for text_encoder, tokenizer in self._text_encoders.items():
            guard(text_encoder, self, tokenizer)
        self._clean_up_when_dropped()

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor | None, ...]:
        """The pipeline's own encode_prompt, with packed prompts where placeholders stand.

        It takes what the pipeline's own takes; `inspect.signature` shows it.

        Returns:
            What the pipeline's own returns: (prompt_embeds, negative_prompt_embeds), for SDXL the
            pooled embeddings of both too. Embeddings are [B · num_images_per_prompt, L, C] of one
            length L for both, pooled ones [B · num_images_per_prompt, P], or S·P wide with one a
            stage; those of the negative prompt are None without guidance.

        Raises:
            PromptError: a placeholder cannot be used where it stands, or a prompt given as a
                tensor cannot be packed to go with one that is.
            ModelError: a prompt was given as words, and the text encoders are gone; or there is a
                trace or regions, and the pipeline encodes prompts in several calls.
            TypeError, ValueError: prompt and negative prompt differ in type or in number, or
                pooled embeddings are missing.
        """
        pipe = self.pipe
        bound = self.__signature__.bind(*args, **kwargs)
        bound.apply_defaults()
        request = PromptRequest.of(pipe, bound.arguments)
        if self.watchers and encodes_apart(pipe):
            raise ModelError(
                f"{type(pipe).__name__} encodes its prompts in several calls. A trace or regions "
                "cannot tell which of them the U-Net gets. Generate without a trace or regions."
            )
        with LOCK:
            self._prepare_models(pipe)
            check_nothing_to_encode(pipe, request)
            texts = _listed(request.prompts + request.negatives)
            self._warn_of_unknown(pipe, texts, self.subjects)
            if self._is_plain(pipe, request):
                result = self._own(pipe)(*args, **kwargs)
            else:
                result = self._encode_both(pipe, request)
            prompts = request.prompts[0]
            call = PipelineCall(
                [prompts] if isinstance(prompts, str) else prompts,
                request.images,
                request.guidance,
                lambda text: self._encode_one(pipe, text, request),
            )
            for watcher in self.watchers:
                watcher.begin(call)
        return result

    def _is_plain(self, pipe: Any, request: PromptRequest) -> bool:
        """Whether no subject stands in the prompts, so that the pipeline's own way is right."""
        if self.subjects and encodes_apart(pipe):
            return False
        marked = request.embeds is None and self._has_placeholder(request.prompts)
        if request.guidance and request.negative_embeds is None:
            marked = marked or self._has_placeholder(request.negatives)
        given = (request.embeds, request.negative_embeds)
        packed = any(stages_of(x, self.text.width) for x in given)
        pooled = (x for x in (request.pooled, request.negative_pooled) if x is not None)
        return not (marked or packed or any(x.shape[-1] != self.text.pooled_width for x in pooled))

    def _encode_both(self, pipe: Any, request: PromptRequest) -> tuple[Tensor | None, ...]:
        sdxl = is_sdxl(pipe)
        if request.embeds is None:
            texts = tuple(text for text in request.prompts if text is not None)
            positive = self._encode(pipe, texts, request, clip_skip=request.clip_skip)
            if request.pooled is not None:
                positive = positive._replace(pooled_prompt_embeds=request.pooled)
        else:
            positive = checked(request.embeds, request.pooled, sdxl)
        negative = self._negative(pipe, request, positive, sdxl) if request.guidance else None
        if negative is not None and len(negative.prompt_embeds) != len(positive.prompt_embeds):
            raise ValueError(
                f"negative_prompt_embeds is for {len(negative.prompt_embeds)} prompts, but there "
                f"are {len(positive.prompt_embeds)}: give one a prompt"
            )
        dtype = prompt_dtype(pipe)
        apart = self.subjects and encodes_apart(pipe)
        stages = common_stages([s.stages for s in self.subjects]) if apart else None
        matched = same_packing(positive, negative, *self.text, stages=stages)
        placed = [
            None
            if embeds is None
            else embeds.to(request.device, dtype).repeat_interleave(request.images, dim=0)
            for field in range(2 if sdxl else 1)
            for embeds in (None if one is None else one[field] for one in matched)
        ]
        return tuple(placed)

    def _negative(
        self, pipe: Any, request: PromptRequest, positive: Encoded, sdxl: bool
    ) -> Encoded:
        if request.negative_embeds is not None:
            return checked(request.negative_embeds, request.negative_pooled, sdxl)
        if request.negatives[0] is None and pipe.config.get("force_zeros_for_empty_prompt"):
            embeds, pooled = positive
            return Encoded(
                torch.zeros_like(embeds), None if pooled is None else torch.zeros_like(pooled)
            )
        texts = request.negative_texts(len(positive.prompt_embeds))
        # diffusers applies clip_skip to the prompt alone.
        negative = self._encode(pipe, texts, request, clip_skip=None)
        if request.negative_pooled is not None:
            negative = negative._replace(pooled_prompt_embeds=request.negative_pooled)
        return negative

    def _encode(
        self,
        pipe: Any,
        texts: tuple[Texts, ...],
        request: PromptRequest,
        *,
        clip_skip: int | None,
    ) -> Encoded:
        """[B, L, C], packed if a placeholder stands there, else as the pipeline encodes it."""
        if not self._has_placeholder(texts):
            arguments = own_arguments(self.__signature__, texts, request, clip_skip)
            result = self._own(pipe)(**arguments)
            return Encoded(result[0], result[2] if len(result) > 2 else None)
        # Others, by their numbers of stages, would make the packed prompt longer for nothing.
        subjects = [s for s in self.subjects if self._stands_in(s, texts)]
        with text_lora(pipe, request.lora_scale):
            return encode_with_pooled(pipe, *texts, subjects=subjects, clip_skip=clip_skip)

    def _encode_one(self, pipe: Any, text: str, request: PromptRequest) -> Tensor:
        self._warn_of_unknown(pipe, [text], self.subjects)
        texts: tuple[Texts, ...] = ([text],) * len(request.prompts)
        return self._encode(pipe, texts, request, clip_skip=request.clip_skip).prompt_embeds

    def _own(self, pipe: Any) -> Any:
        return self._replaced or type(pipe).encode_prompt.__get__(pipe)

    def _has_placeholder(self, prompts: Sequence[Texts | None]) -> bool:
        return any(self._stands_in(subject, prompts) for subject in self.subjects)

    @staticmethod
    def _stands_in(subject: Subject, prompts: Sequence[Texts | None]) -> bool:
        return any(mentions(text, subject.placeholder) for text in _listed(prompts))

    def _prepare_models(self, pipe: Any) -> None:
        """Install on every model of the pipeline what is not there."""
        check_scheduler(pipe.scheduler)
        if not freed_parts(pipe):
            self.text = TextShape.of(pipe)
        put_time_ids(pipe, self)
        models = list(conditioned_models(pipe))
        for model in models:
            timesteps = pipe.scheduler.config.num_train_timesteps
            install(model, self, self.text.width, timesteps, bool(self.watchers))
            self._models.add(model)
        for model in [m for m in self._models if m not in models]:
            uninstall(model, self)
            self._models.discard(model)
        self._guard_text_encoders(pipe)

    def _guard_text_encoders(self, pipe: Any) -> None:
        parts = present_parts(pipe)
        for part in parts:
            guard(unwrap(part.text_encoder), self, part.tokenizer)
            self._text_encoders[unwrap(part.text_encoder)] = part.tokenizer
        present = [unwrap(part.text_encoder) for part in parts]
        for text_encoder in [x for x in self._text_encoders if x not in present]:
            unguard(text_encoder, self)
            del self._text_encoders[text_encoder]

    def _release_models(self) -> None:
        for model in list(self._models):
            uninstall(model, self)
        self._models.clear()
        for text_encoder in list(self._text_encoders):
            unguard(text_encoder, self)
        self._text_encoders.clear()


@contextmanager
def watched(pipe: Any, encoder: PromptEncoder, watcher: Watcher) -> Iterator[None]:
    """Let `watcher` follow each call of the pipeline, and undo it on exit."""
    replaced = vars(pipe).get("maybe_free_model_hooks")
    # Every pipeline calls this at its end.
    free = pipe.maybe_free_model_hooks

    def end() -> Any:
        watcher.end()
        return free()

    pipe.maybe_free_model_hooks = end
    encoder.watchers.append(watcher)
    try:
        yield
    finally:
        if replaced is None:
            del pipe.maybe_free_model_hooks
        else:
            pipe.maybe_free_model_hooks = replaced
        encoder.watchers.remove(watcher)
        encoder.release()


def _listed(prompts: Sequence[Texts | None]) -> list[str]:
    """All sentences of what was given for the text encoders."""
    given = (texts for texts in prompts if texts is not None)
    return [text for texts in given for text in ([texts] if isinstance(texts, str) else texts)]


def _clean_up(
    models: weakref.WeakSet[nn.Module],
    text_encoders: weakref.WeakKeyDictionary[nn.Module, Any],
) -> None:
    for model in list(models):
        uninstall_unused(model)
    for text_encoder in list(text_encoders):
        unguard_unused(text_encoder)
