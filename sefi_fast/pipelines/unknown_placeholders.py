"""Words of a prompt that look like placeholders, `<me>`, and stand for nothing."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from sefi_fast.utils.words import composed

if TYPE_CHECKING:
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
