"""Text from files and users, made safe to print."""

from __future__ import annotations

import unicodedata

LONGEST_MESSAGE = 2000
"""Characters: about one screen of a terminal."""
_MOST_LINES = 40
_GAP = " […] "


def printable(text: str, limit: int = LONGEST_MESSAGE) -> str:
    r"""Escape what a terminal would obey or an encoding refuse, and shorten the middle.

    Control characters, text-direction marks and lone surrogates become backslash escapes, and so do
    line feeds where there are more than 40. Text longer than `limit` characters keeps its beginning
    and its end.

    Example:
        >>> printable("\x1b[31m<me>")
        '\\x1b[31m<me>'
    """
    text = _shortened(text, limit)
    if text.isascii() and text.isprintable():
        return text
    # The joiners of Hindi, Persian and emoji are of the same kind as direction marks.
    kept = "\n\u200c\u200d" if text.count("\n") <= _MOST_LINES else "\u200c\u200d"
    # An escape has up to ten characters.
    return _shortened("".join(x if x in kept else _escaped(x) for x in text), limit)


def is_unicode(text: str) -> bool:
    """Whether a text can be written: it has no lone surrogate, half of a character."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _shortened(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    head = limit * 2 // 3
    return text[:head] + _GAP + text[head + len(_GAP) - limit :]


def _escaped(character: str) -> str:
    if unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Zl", "Zp"):
        return character
    return character.encode("unicode_escape").decode("ascii")
