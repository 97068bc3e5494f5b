"""Stops prompts whose placeholder reaches a text encoder as plain words, without its subject."""

from __future__ import annotations

import copy
import re
import threading
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sefi_fast.conditioning.prompt import TOKENIZING, readable
from sefi_fast.errors import PromptError

if TYPE_CHECKING:
    from sefi_fast.pipelines.prompt_encoder import PromptEncoder

_ATTRIBUTE = "_sefi_placeholder_guard"
_LOCK = threading.RLock()


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

    def __deepcopy__(self, memo: dict[int, Any]) -> PlaceholderGuard:
        # Users are pipelines, which a copy of the text encoder alone must not drag along.
        copied = PlaceholderGuard()
        memo[id(self)] = copied
        copied.handle = copy.deepcopy(self.handle, memo)
        return copied

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # Training encodes sentences of its own, and many of them.
        if torch.compiler.is_compiling() or torch.is_grad_enabled():
            return
        input_ids = args[0] if args else kwargs.get("input_ids")
        if not isinstance(input_ids, Tensor) or input_ids.is_meta or input_ids.ndim != 2:
            return
        if input_ids.is_cuda and torch.cuda.is_current_stream_capturing():
            return
        rows = {tuple(row) for row in input_ids.tolist()}
        for encoder, tokenizer in list(self.users.items()):
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
    "words, so that its subject would be missing from the picture. Subjects are attached to one "
    "pipeline, not to others that share its models: call sefi_fast.attach on the pipeline that "
    "draws, write the placeholder exactly as it is, make embeddings with sefi_fast.encode, or call "
    "sefi_fast.detach on the pipeline that has it"
)


def guard(text_encoder: nn.Module, encoder: PromptEncoder, tokenizer: Any) -> None:
    """Watch a text encoder on behalf of an attached pipeline; again is no more."""
    with _LOCK:
        found = getattr(text_encoder, _ATTRIBUTE, None)
        if found is None:
            found = PlaceholderGuard()
            found.handle = text_encoder.register_forward_pre_hook(found, with_kwargs=True)
            setattr(text_encoder, _ATTRIBUTE, found)
        found.users[encoder] = tokenizer


def copy_guard(
    text_encoder: nn.Module, encoder: PromptEncoder, copied: PromptEncoder, memo: dict[int, Any]
) -> nn.Module:
    """The text encoder's copy in a deep copy of its pipeline, watched on that one's behalf."""
    tokenizer = copy.deepcopy(getattr(text_encoder, _ATTRIBUTE).users[encoder], memo)
    twin = copy.deepcopy(text_encoder, memo)
    with _LOCK:
        getattr(twin, _ATTRIBUTE).users[copied] = tokenizer
    return twin


def unguard(text_encoder: nn.Module, encoder: PromptEncoder) -> None:
    """End that; with the last pipeline the text encoder becomes what it was."""
    with _LOCK:
        found = getattr(text_encoder, _ATTRIBUTE, None)
        if found is not None:
            found.users.pop(encoder, None)
            unguard_unused(text_encoder)


def unguard_unused(text_encoder: nn.Module) -> None:
    """Make the text encoder what it was if no pipeline needs it otherwise any more."""
    with _LOCK:
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
    """The placeholder in a text of `readable`, whatever stands beside it."""
    with TOKENIZING:
        ids = tokenizer(placeholder, add_special_tokens=False, verbose=False).input_ids
    written = readable(tokenizer, ids).replace(" ", "")
    before = r"(?<!\w)" if re.match(r"\w", written[:1]) else ""
    after = r"(?!\w)" if re.match(r"\w", written[-1:]) else ""
    return re.compile(before + r"\s*".join(map(re.escape, written)) + after)
