"""Placeholders, class words and prompts in one Unicode form, so that equal words are equal text."""

from __future__ import annotations

import unicodedata
from typing import Any

from sefi_fast.errors import PromptError
from sefi_fast.utils.text import is_unicode


def composed(text: str) -> str:
    """Return a text in Unicode's composed form (NFC), as the tokenizers of CLIP read it.

    Raises:
        PromptError: it holds half a character (a lone surrogate), which no tokenizer takes.
    """
    if not is_unicode(text):
        raise PromptError(
            f"The text {text!r} holds half a character. Characters of Unicode are wanted: write "
            "it again."
        )
    return unicodedata.normalize("NFC", text)


def check_placeholder(placeholder: Any) -> str:
    """Return a placeholder in composed form.

    Raises:
        TypeError: it is not a string.
        PromptError: it is not one word.
    """
    if not isinstance(placeholder, str):
        raise TypeError(f"placeholder must be a string, got {type(placeholder).__name__}")
    if placeholder.split() != [placeholder]:
        raise PromptError(
            f"placeholder must be one word without spaces, such as '<it>', got {placeholder!r}"
        )
    return composed(placeholder)


def placeholder_for(name: str, *, space: str = "-") -> str:
    """Return the placeholder made of a name: the name in angle brackets, spaces replaced.

    With a `space` that names cannot hold, distinct names give distinct placeholders.
    """
    letters = (
        letter if not letter.isspace() else space if letter == " " else f"|{ord(letter):x}|"
        for letter in composed(name)
    )
    return f"<{''.join(letters)}>"


def mentions(prompt: str, placeholder: str) -> bool:
    """Tell whether a placeholder stands in a prompt."""
    return placeholder in composed(prompt)
