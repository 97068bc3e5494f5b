"""Find placeholders that a text encoder would read as plain words."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sefi_fast.errors import PromptError
from sefi_fast.pipelines.model_patch import LOCK
from sefi_fast.prompts.tokenization import read_ids, readable
from sefi_fast.utils.text import composed

if TYPE_CHECKING:
    from sefi_fast.pipelines.encode_prompt import PromptEncoder
    from sefi_fast.subject import Subject


logger = logging.getLogger(__name__)

_LOOKS_LIKE_ONE = re.compile(r"<[^\s<>]+>")


def unknown_placeholders(pipe: Any, texts: Iterable[str], subjects: Sequence[Subject]) -> list[str]:
    """Words in angle brackets that the text encoders would read as pieces of junk.

    Args:
        pipe: its tokenizers know words of their own, such as embeddings that diffusers loaded.
        texts: prompts.
        subjects: whose placeholders the prompts may hold.
    """
    own = sorted((subject.placeholder for subject in subjects), key=len, reverse=True)
    found = [
        word
        for text in texts
        for word in _LOOKS_LIKE_ONE.findall(_without(composed(text), own))
        if not any(
            word in map(composed, tokenizer.get_added_vocab()) for tokenizer in _tokenizers(pipe)
        )
    ]
    return list(dict.fromkeys(found))


def names_of(subjects: Sequence[Subject]) -> str:
    """The placeholders of subjects in words."""
    return ", ".join(repr(subject.placeholder) for subject in subjects) or "none"


class UnknownPlaceholderWarnings:
    """Warns of each such word once, for as long as this object lives."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    def __call__(self, pipe: Any, texts: Iterable[str], subjects: Sequence[Subject]) -> None:
        for word in unknown_placeholders(pipe, texts, subjects):
            if word not in self._told:
                self._told.add(word)
                logger.warning(
                    "the prompt holds %r, which is no attached subject's placeholder (attached: "
                    "%s) and no word of the tokenizer, so that its pieces are read as plain words: "
                    "attach its subject, or write something else",
                    word, names_of(subjects),
                )  # fmt: skip


def _without(text: str, placeholders: Iterable[str]) -> str:
    for placeholder in placeholders:
        text = text.replace(placeholder, " ")
    return text


def _tokenizers(pipe: Any) -> Iterator[Any]:
    for name in ("tokenizer", "tokenizer_2"):
        tokenizer = getattr(pipe, name, None)
        if tokenizer is not None:
            yield tokenizer


_ATTRIBUTE = "_sefi_placeholder_guard"


class PlaceholderGuard:
    """Forward-pre-hook of a text encoder that several pipelines may share.

    Only the pipeline that subjects are attached to puts them into its prompts. Another one over the
    same models (by `from_pipe`, or with a ControlNet added), and any tool that calls the text
    encoder by itself, would read "<me>" as three plain words and draw someone else.
    """

    def __init__(self) -> None:
        # Of each attached pipeline the encoder that holds its subjects, and the tokenizer.
        self.users: WeakKeyDictionary[PromptEncoder, Any] = WeakKeyDictionary()
        self.handle: RemovableHandle | None = None
        self._patterns: dict[tuple[int, str], re.Pattern[str]] = {}

    def __getstate__(self) -> RemovableHandle | None:
        # Users are pipelines, which a copy of the text encoder alone must not drag along.
        return self.handle

    def __setstate__(self, handle: RemovableHandle | None) -> None:
        self.__init__()  # type: ignore[misc]
        self.handle = handle

    def __call__(
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
            users = list(self.users.items())
        for encoder, tokenizer in users:
            patterns = {
                s.placeholder: self._pattern(tokenizer, s.placeholder) for s in _guarded(encoder)
            }
            for row in rows if patterns else ():
                text = readable(tokenizer, row)
                for placeholder, pattern in patterns.items():
                    if pattern.search(text):
                        raise PromptError(_MESSAGE.format(text=text, placeholder=placeholder))

    def _pattern(self, tokenizer: Any, placeholder: str) -> re.Pattern[str]:
        known = (id(tokenizer), placeholder)
        if known not in self._patterns:
            self._patterns[known] = _pattern(tokenizer, placeholder)
        return self._patterns[known]


_MESSAGE = (
    "the prompt {text!r} reached the text encoder with the placeholder {placeholder!r} as plain "
    "words, so that its subject would be missing from the image. Subjects are attached to one "
    "pipeline, not to others that share its models: call sefi_fast.attach on the pipeline that "
    "draws, write the placeholder exactly as it is, make embeddings with sefi_fast.encode, or call "
    "sefi_fast.detach on the pipeline that has it"
)


def guard(text_encoder: nn.Module, encoder: PromptEncoder, tokenizer: Any) -> None:
    """Watch a text encoder on behalf of an attached pipeline; again is no more."""
    with LOCK:
        found = getattr(text_encoder, _ATTRIBUTE, None)
        if found is None:
            found = PlaceholderGuard()
            found.handle = text_encoder.register_forward_pre_hook(found, with_kwargs=True)
            setattr(text_encoder, _ATTRIBUTE, found)
        found.users[encoder] = tokenizer


def unguard(text_encoder: nn.Module, encoder: PromptEncoder) -> None:
    """End that; with the last pipeline the text encoder becomes what it was."""
    with LOCK:
        found = getattr(text_encoder, _ATTRIBUTE, None)
        if found is not None:
            found.users.pop(encoder, None)
            unguard_unused(text_encoder)


def unguard_unused(text_encoder: nn.Module) -> None:
    """Make the text encoder what it was if no pipeline needs it otherwise any more."""
    with LOCK:
        found = getattr(text_encoder, _ATTRIBUTE, None)
        if found is not None and not list(found.users):
            found.handle.remove()
            delattr(text_encoder, _ATTRIBUTE)


def _guarded(encoder: PromptEncoder) -> list[Any]:
    """The subjects whose placeholder no prompt can hold by rights once it is encoded.

    A placeholder that stands in the class of some subject is what that one leaves in its place.
    """
    classes = [subject.class_word.lower() for subject in encoder.subjects]

    def is_class(placeholder: str) -> bool:
        words = rf"(?<!\w){re.escape(placeholder.lower())}(?!\w)"
        return any(re.search(words, text) for text in classes)

    return [s for s in encoder.subjects if not is_class(s.placeholder)]


def _pattern(tokenizer: Any, placeholder: str) -> re.Pattern[str]:
    """The placeholder in a text of `readable`, whatever stands next to it."""
    written = readable(tokenizer, read_ids(tokenizer, placeholder)).replace(" ", "")
    before = r"(?<!\w)" if re.match(r"\w", written[:1]) else ""
    after = r"(?!\w)" if re.match(r"\w", written[-1:]) else ""
    return re.compile(before + r"\s*".join(map(re.escape, written)) + after)
