"""The patch of a pipeline's `encode_prompt` for subjects, traces and regions."""

from __future__ import annotations

import inspect
import logging
import re
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from diffusers.utils import USE_PEFT_BACKEND, scale_lora_layers, unscale_lora_layers
from torch import Tensor, nn

from sefi_fast.errors import ModelError
from sefi_fast.pipelines.model_patch import LOCK, ModelPatch, TextEncoderPatch, UNetPatch, release
from sefi_fast.pipelines.support import (
    TextShape,
    check_scheduler,
    conditioned_models,
    encodes_apart,
)
from sefi_fast.pipelines.watcher import PipelineCall, Watcher
from sefi_fast.prompts import PromptEmbeds, encode_with_pooled, packed_stages
from sefi_fast.prompts.encoding import common_stages
from sefi_fast.prompts.stages import match_pooled_stages, match_stages
from sefi_fast.prompts.text_encoder import (
    Pipeline,
    is_sdxl,
    missing_text_components,
    present_text_encoders,
    text_encoders,
    unwrap,
)
from sefi_fast.prompts.tokenization import unknown_placeholders
from sefi_fast.utils.text import mentions

if TYPE_CHECKING:
    from sefi_fast.subject import Subject

logger = logging.getLogger(__name__)

Texts: TypeAlias = "str | list[str]"

_TIME_IDS = "_get_add_time_ids"


class PromptRequest:
    """The arguments of one call of encode_prompt, in the same terms for every pipeline.

    Args:
        pipe: the pipeline.
        given: the arguments by name, defaults included.

    Attributes:
        prompts, negatives: the texts for each text encoder; None where none were given.
        embeds, negative_embeds: prompts given as tensors; None where texts are to be encoded.
        pooled, negative_pooled: SDXL's pooled embeddings that were given.
        images: images (or videos) of each prompt.
        guidance: whether a negative prompt is needed.
    """

    def __init__(self, pipe: Pipeline, given: Mapping[str, Any]) -> None:
        self.prompts: tuple[Texts | None, ...] = (given["prompt"],)
        self.negatives: tuple[Texts | None, ...] = (given["negative_prompt"],)
        if "prompt_2" in given:
            self.prompts += (given["prompt_2"] or given["prompt"],)
            self.negatives += (given["negative_prompt_2"] or given["negative_prompt"],)
        self.embeds: Tensor | None = given["prompt_embeds"]
        self.negative_embeds: Tensor | None = given["negative_prompt_embeds"]
        self.pooled: Tensor | None = given.get("pooled_prompt_embeds")
        self.negative_pooled: Tensor | None = given.get("negative_pooled_prompt_embeds")
        self.device: torch.device = given["device"] or pipe._execution_device
        self.images: int = given[_count_name(given)]
        self.guidance = bool(given["do_classifier_free_guidance"])
        self.lora_scale: float | None = given["lora_scale"]
        self.clip_skip: int | None = given.get("clip_skip")

    def negative_texts(self, batch: int) -> tuple[list[str], ...]:
        """Return the negative texts for each text encoder, one a prompt; empty by default."""
        prompt, negative = self.prompts[0], self.negatives[0]
        mixed = None not in (prompt, negative) and type(prompt) is not type(negative)
        if len(self.prompts) == 1 and mixed:
            raise TypeError(
                f"negative_prompt must be of the type of prompt, {type(prompt).__name__}, but it "
                f"is {type(negative).__name__}"
            )
        listed: list[list[str]] = []
        for texts in self.negatives:
            if texts is None or isinstance(texts, str):
                texts = [texts or ""] * batch
            if len(texts) != batch:
                raise ValueError(
                    f"there are {len(texts)} negative prompts for {batch} prompts; give as many"
                )
            listed.append(texts)
        return tuple(listed)


def _count_name(parameters: Iterable[str]) -> str:
    """Return num_images_per_prompt, or the pipeline's name for it."""
    return next(name for name in parameters if name.startswith("num_"))


class EncodePromptPatch:
    """Replacement of a pipeline's `encode_prompt` that packs prompts with placeholders.

    It stays for as long as subjects are attached or a `Watcher` follows the calls, and keeps the
    U-Net, the ControlNets and the text encoders patched for that long. It refers to the pipeline
    weakly: a pipeline that is dropped frees its memory at once.
    """

    def __init__(self, pipe: Pipeline) -> None:
        self.subjects: tuple[Subject, ...] = ()
        self.watcher: Watcher[Any] | None = None
        self.text = TextShape.of(pipe)
        self._pipe = weakref.ref(pipe)
        self._replaced = vars(pipe).get("encode_prompt")
        if isinstance(self._replaced, EncodePromptPatch):
            self._replaced = self._replaced._replaced
        # `inspect.signature` shows that of the function it replaces.
        self.__signature__ = inspect.signature(self._own(pipe))
        self._warned: set[str] = set()
        self._models: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._release_when_dropped()

    def _release_when_dropped(self) -> None:
        weakref.finalize(self, _release_all, self._models).atexit = False

    @property
    def pipe(self) -> Pipeline:
        """The pipeline; ReferenceError if it no longer exists."""
        pipe = self._pipe()
        if pipe is None:
            raise ReferenceError("the pipeline of this encode_prompt no longer exists")
        return pipe

    @classmethod
    def of(cls, pipe: Pipeline) -> EncodePromptPatch | None:
        """Return the patch of a pipeline, or None."""
        found = vars(pipe).get("encode_prompt")
        # A shallow copy of a pipeline has its original's.
        return found if isinstance(found, cls) and found._pipe() is pipe else None

    @classmethod
    def acquire(cls, pipe: Pipeline) -> EncodePromptPatch:
        """Return the patch of a pipeline, created if there is none."""
        with LOCK:
            patch = cls.of(pipe)
            if patch is None:
                patch = cls(pipe)
                patch._apply(pipe)
                pipe.encode_prompt = patch
            return patch

    def release(self) -> None:
        """Restore the pipeline and its models if neither subjects nor a watcher need the patch."""
        with LOCK:
            pipe = self._pipe()
            if pipe is None:
                return
            if self.subjects or self.watcher:
                self._let_watch()
                return
            _release_all(self._models, self)
            if vars(pipe).get("encode_prompt") is self:
                _restore(pipe, "encode_prompt", self._replaced)
            if isinstance(getattr(vars(pipe).get(_TIME_IDS), "__self__", None), EncodePromptPatch):
                delattr(pipe, _TIME_IDS)

    def check_may_be_copied(self) -> None:
        """Raise ModelError while a trace or regions run."""
        if self.watcher:
            raise ModelError(
                "a trace or regions run on this pipeline, and a copy would have a part of them. "
                "Leave their with block before the pipeline or a model of it is copied."
            )

    def __getstate__(self) -> dict[str, Any]:
        self.check_may_be_copied()
        references = {"_pipe": self._pipe(), "_models": list(self._models)}
        return vars(self) | references | {"_warned": set()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._pipe = weakref.ref(state["_pipe"])
        self._models = weakref.WeakSet(state["_models"])
        with LOCK:
            for model in self._models:
                ModelPatch.on(model, self)
        self._release_when_dropped()

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor | None, ...]:
        """Run the pipeline's own encode_prompt, or pack the prompts that hold placeholders.

        Arguments and results are those of the pipeline's own. Both embeddings have one length;
        pooled ones are S·P wide with one embedding a stage.
        """
        pipe = self.pipe
        bound = self.__signature__.bind(*args, **kwargs)
        bound.apply_defaults()
        request = PromptRequest(pipe, bound.arguments)
        if self.watcher and encodes_apart(pipe):
            raise ModelError(
                f"{type(pipe).__name__} encodes its prompts in several calls. A trace or regions "
                "cannot tell which of them the U-Net gets. Generate without a trace or regions."
            )
        with LOCK:
            self._warn_of_unknown(pipe, _listed(request.prompts + request.negatives))
            self._apply(pipe)
            _check_nothing_to_encode(pipe, request)
            if self._is_plain(pipe, request):
                result: tuple[Tensor | None, ...] = self._own(pipe)(*args, **kwargs)
            else:
                result = self._encode_both(pipe, request)
            if self.watcher:
                first = request.prompts[0]
                prompts = [first] if isinstance(first, str) else first
                encode = partial(self._encode_one, pipe, request)
                call = PipelineCall(prompts, request.images, request.guidance, encode)
                self.watcher.start(call)
        return result

    def _apply(self, pipe: Pipeline) -> None:
        """Patch what is not patched, and release the models that the pipeline no longer has."""
        check_scheduler(pipe.scheduler)
        models = list(conditioned_models(pipe))
        if not missing_text_components(pipe):
            self.text = TextShape.of(pipe)
        for model in models:
            timesteps = pipe.scheduler.config.num_train_timesteps
            UNetPatch.on(model, self).apply(model, self.text.width, timesteps)
            self._models.add(model)
        for encoder in map(unwrap, (one.text_encoder for one in present_text_encoders(pipe))):
            TextEncoderPatch.on(encoder, self).apply(encoder)
            self._models.add(encoder)
            models.append(encoder)
        for model in set(self._models).difference(models):
            release(model, self)
            self._models.discard(model)
        self._let_watch()
        # Without its second text encoder, SDXL takes the width of the pooled embeddings for that
        # of one, but packed prompts have one a stage.
        if getattr(pipe, "text_encoder_2", pipe) is None and _TIME_IDS not in vars(pipe):
            setattr(pipe, _TIME_IDS, self._time_ids)

    def _let_watch(self) -> None:
        for patch in map(ModelPatch.of, self._models):
            if isinstance(patch, UNetPatch):
                patch.watch(self, self.watcher is not None)

    def _time_ids(self, *args: Any, **kwargs: Any) -> Any:
        kwargs["text_encoder_projection_dim"] = self.text.pooled_width
        return getattr(type(self.pipe), _TIME_IDS)(self.pipe, *args, **kwargs)

    def guarded(self, text_encoder: nn.Module) -> tuple[Any, list[str]]:
        """Return the tokenizer of a text encoder, and the placeholders it must not read as words.

        A placeholder that is a word of some subject's class remains in encoded prompts.
        """
        pipe = self._pipe()
        if pipe is None:
            return None, []
        classes = " ".join(subject.class_word for subject in self.subjects).lower()
        names = [
            name
            for name in (subject.placeholder for subject in self.subjects)
            if not re.search(rf"(?<!\w){re.escape(name.lower())}(?!\w)", classes)
        ]
        for encoder in present_text_encoders(pipe):
            if unwrap(encoder.text_encoder) is text_encoder:
                return encoder.tokenizer, names
        return None, []

    def _warn_of_unknown(self, pipe: Pipeline, texts: list[str]) -> None:
        """Warn once of each placeholder whose subject is not attached."""
        names = [subject.placeholder for subject in self.subjects]
        tokenizers = [encoder.tokenizer for encoder in present_text_encoders(pipe)]
        for word in unknown_placeholders(texts, names, tokenizers):
            if word not in self._warned:
                self._warned.add(word)
                logger.warning(
                    "the prompt holds %r, which is not an attached subject's placeholder "
                    "(attached: %s) nor a word of the tokenizer, so that its pieces are read as "
                    "plain words: attach its subject, or write something else",
                    word, ", ".join(map(repr, names)) or "none",
                )  # fmt: skip

    def _is_plain(self, pipe: Pipeline, request: PromptRequest) -> bool:
        """Return whether the pipeline's own way is right, because no subject is in the prompts."""
        if self.subjects and encodes_apart(pipe):
            return False
        marked = request.embeds is None and self._named(request.prompts)
        if request.guidance and request.negative_embeds is None:
            marked = marked or self._named(request.negatives)
        embeds = (x for x in (request.embeds, request.negative_embeds) if x is not None)
        packed = any(packed_stages(x.shape[-1], self.text.width) for x in embeds)
        pooled = (x for x in (request.pooled, request.negative_pooled) if x is not None)
        return not (marked or packed or any(x.shape[-1] != self.text.pooled_width for x in pooled))

    def _encode_both(self, pipe: Pipeline, request: PromptRequest) -> tuple[Tensor | None, ...]:
        if request.embeds is None:
            texts = tuple(text for text in request.prompts if text is not None)
            positive = self._encode(pipe, texts, request, clip_skip=request.clip_skip)
            if request.pooled is not None:
                positive = positive._replace(pooled_prompt_embeds=request.pooled)
        else:
            positive = _given(pipe, request.embeds, request.pooled)
        both = [positive]
        if request.guidance:
            both.append(self._negative(pipe, request, positive))
            if len(both[1].prompt_embeds) != len(positive.prompt_embeds):
                raise ValueError(
                    f"negative_prompt_embeds is for {len(both[1].prompt_embeds)} prompts, but "
                    f"there are {len(positive.prompt_embeds)}; give one a prompt"
                )
        apart = self.subjects and encodes_apart(pipe)
        stages = common_stages([s.stages for s in self.subjects]) if apart else None
        found: list[Any] = match_stages(
            [one.prompt_embeds for one in both], self.text.width, stages
        )
        found += [None] * (2 - len(found))
        if is_sdxl(pipe):
            pooled = [one.pooled_prompt_embeds for one in both]
            found += match_pooled_stages(
                [x for x in pooled if x is not None], self.text.pooled_width
            )
            found += [None] * (4 - len(found))
        last = getattr(pipe, "text_encoder_2", pipe.text_encoder)
        dtype = (pipe.unet if last is None else last).dtype
        return tuple(
            None if x is None else x.to(request.device, dtype).repeat_interleave(request.images, 0)
            for x in found
        )

    def _negative(
        self, pipe: Pipeline, request: PromptRequest, positive: PromptEmbeds
    ) -> PromptEmbeds:
        if request.negative_embeds is not None:
            return _given(pipe, request.negative_embeds, request.negative_pooled)
        if request.negatives[0] is None and pipe.config.get("force_zeros_for_empty_prompt"):
            embeds, pooled = positive
            zeros = None if pooled is None else torch.zeros_like(pooled)
            return PromptEmbeds(torch.zeros_like(embeds), zeros)
        texts = request.negative_texts(len(positive.prompt_embeds))
        # diffusers applies clip_skip to the prompt alone.
        negative = self._encode(pipe, texts, request, clip_skip=None)
        if request.negative_pooled is not None:
            negative = negative._replace(pooled_prompt_embeds=request.negative_pooled)
        return negative

    def _encode(
        self,
        pipe: Pipeline,
        texts: tuple[Texts, ...],
        request: PromptRequest,
        *,
        clip_skip: int | None,
    ) -> PromptEmbeds:
        """Return [B, L, C], packed if a placeholder is in it, else as the pipeline encodes it."""
        # Subjects that are not in it could make the packed prompt longer by their stages.
        subjects = self._named(texts)
        if subjects:
            with _text_lora(pipe, request.lora_scale):
                return encode_with_pooled(pipe, *texts, subjects=subjects, clip_skip=clip_skip)
        arguments: dict[str, Any] = {
            "prompt": texts[0],
            "device": request.device,
            _count_name(self.__signature__.parameters): 1,
            "do_classifier_free_guidance": False,
            "lora_scale": request.lora_scale,
        }
        if len(texts) > 1:
            arguments["prompt_2"] = texts[1]
        if "clip_skip" in self.__signature__.parameters:
            arguments["clip_skip"] = clip_skip
        result = self._own(pipe)(**arguments)
        return PromptEmbeds(result[0], result[2] if len(result) > 2 else None)

    def _encode_one(self, pipe: Pipeline, request: PromptRequest, text: str) -> Tensor:
        self._warn_of_unknown(pipe, [text])
        texts: tuple[Texts, ...] = ([text],) * len(request.prompts)
        return self._encode(pipe, texts, request, clip_skip=request.clip_skip).prompt_embeds

    def _own(self, pipe: Pipeline) -> Any:
        return self._replaced or type(pipe).encode_prompt.__get__(pipe)

    def _named(self, prompts: Sequence[Texts | None]) -> list[Subject]:
        """Return the subjects whose placeholders are in the prompts."""
        texts = _listed(prompts)
        return [s for s in self.subjects if any(mentions(text, s.placeholder) for text in texts)]

    @contextmanager
    def watched_by(self, watcher: Watcher[Any]) -> Iterator[None]:
        """Let `watcher` follow each call of the pipeline, and undo it on exit."""
        if self.watcher:
            raise ValueError(
                "a trace or regions of this pipeline already run. Name all words in one trace, and "
                "generate with regions outside of it."
            )
        pipe = self.pipe
        replaced = vars(pipe).get("maybe_free_model_hooks")
        # Every pipeline calls this at its end.
        free = pipe.maybe_free_model_hooks

        def end() -> Any:
            watcher.end()
            return free()

        pipe.maybe_free_model_hooks = end
        self.watcher = watcher
        try:
            yield
        finally:
            watcher.remove()
            _restore(pipe, "maybe_free_model_hooks", replaced)
            self.watcher = None
            self.release()


def _restore(pipe: Pipeline, name: str, method: Any) -> None:
    """Set a pipeline's method to the one that was set on it before, or unset it if none was."""
    if method is None:
        delattr(pipe, name)
    else:
        setattr(pipe, name, method)


def _release_all(models: weakref.WeakSet[nn.Module], user: EncodePromptPatch | None = None) -> None:
    for model in list(models):
        release(model, user)
    models.clear()


def _listed(prompts: Sequence[Texts | None]) -> list[str]:
    given = (texts for texts in prompts if texts is not None)
    return [text for texts in given for text in ([texts] if isinstance(texts, str) else texts)]


def _given(pipe: Pipeline, embeds: Tensor, pooled: Tensor | None) -> PromptEmbeds:
    if is_sdxl(pipe) and pooled is None:
        raise ValueError(
            "prompt embeddings were given without their pooled ones. SDXL needs both. Make them "
            "with sefi_fast.prompts.encode_with_pooled."
        )
    return PromptEmbeds(embeds, pooled)


def _check_nothing_to_encode(pipe: Pipeline, request: PromptRequest) -> None:
    """Raise ModelError if a text is to be encoded without a text encoder."""
    missing = missing_text_components(pipe)
    if not missing:
        return
    zeros = request.negatives[0] is None and pipe.config.get("force_zeros_for_empty_prompt")
    if request.embeds is None:
        what, name, otherwise = "prompt", "prompt_embeds", ""
    elif request.guidance and request.negative_embeds is None and not zeros:
        what, name = "negative prompt", "negative_prompt_embeds"
        otherwise = ", or generate with guidance_scale=1"
    else:
        return
    maker = "prompts.encode_with_pooled" if is_sdxl(pipe) else "encode"
    raise ModelError(
        f"the {' and the '.join(missing)} of this {type(pipe).__name__} are gone, and the {what} "
        f"is still to be encoded. Give it (or '') as {name}, which are made by sefi_fast.{maker} "
        f"before they go{otherwise}."
    )


@contextmanager
def _text_lora(pipe: Pipeline, scale: float | None) -> Iterator[None]:
    """Set the scale of LoRA as the pipeline's own encode_prompt does, and reset it on exit."""
    if scale is not None:
        # The pipeline's class reads this attribute.
        setattr(pipe, "_lora_scale", scale)  # noqa: B010
    encoders = []
    if scale is not None and USE_PEFT_BACKEND:
        encoders = [one.text_encoder for one in text_encoders(pipe)]
    for encoder in encoders:
        scale_lora_layers(encoder, scale)
    try:
        yield
    finally:
        for encoder in encoders:
            unscale_lora_layers(encoder, scale)
