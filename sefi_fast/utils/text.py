"""Text from files and users, made safe to print."""

from __future__ import annotations

import unicodedata

LONGEST_MESSAGE = 2000
"""Characters: about one screen of a terminal."""


def printable(text: str, limit: int = LONGEST_MESSAGE) -> str:
    r"""Escape what a terminal would obey or an encoding refuse, and shorten the middle.

    Control characters other than the line feed, text-direction marks and lone surrogates become
    backslash escapes. Text longer than `limit` characters keeps its beginning and its end.

    Example:
        >>> printable("\x1b[31m<me>")
        '\\x1b[31m<me>'
    """
    if len(text) > limit:
        head = limit * 2 // 3
        text = f"{text[:head]} […] {text[head - limit :]}"
    if text.isascii() and text.isprintable():
        return text
    return "".join(_escaped(character) for character in text)


def is_unicode(text: str) -> bool:
    """Whether a text can be written: it has no lone surrogate, half of a character."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _escaped(character: str) -> str:
    # Cf has direction marks, but also the joiners of Hindi, Persian and emoji.
    unsafe = unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp")
    if not unsafe or character in "\n\u200c\u200d":
        return character
    return character.encode("unicode_escape").decode("ascii")
