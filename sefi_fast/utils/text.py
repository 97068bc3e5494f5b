"""Placeholders and prompts in one Unicode form, so that equal words are equal text."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from sefi_fast.errors import PromptError


def is_unicode(text: str) -> bool:
    """Return whether a text can be encoded: it has no unpaired surrogate."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def composed(text: str) -> str:
    """Return a text in Unicode's composed form (NFC), as CLIP's tokenizers read it.

    Raises:
        PromptError: the text holds an unpaired surrogate, which no tokenizer takes.
    """
    if not is_unicode(text):
        raise PromptError(f"The text {text!r} holds an unpaired surrogate. Write it again.")
    return unicodedata.normalize("NFC", text)


def check_placeholder(placeholder: object) -> str:
    """Return a placeholder in composed form.

    Raises:
        TypeError: the placeholder is not a string.
        PromptError: the placeholder is not one word.
    """
    if not isinstance(placeholder, str):
        raise TypeError(f"placeholder must be a string, got {type(placeholder).__name__}")
    if placeholder.split() != [placeholder]:
        raise PromptError(
            f"placeholder must be one word without spaces, such as '<it>', got {placeholder!r}"
        )
    return composed(placeholder)


def check_distinct(placeholders: Sequence[str]) -> None:
    """Raise PromptError if two subjects have the same placeholder."""
    for placeholder in placeholders:
        if (count := placeholders.count(placeholder)) > 1:
            raise PromptError(
                f"{count} of the subjects have the placeholder {placeholder!r}. Each needs its "
                "own. Train one with another placeholder, or rename it: s = Subject.load(file); "
                "s.placeholder = '<me>'; s.save(file)"
            )


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
    """Return whether a prompt contains a placeholder."""
    return placeholder in composed(prompt)
