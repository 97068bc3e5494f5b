"""Exceptions of the library, and text that is safe to print."""

from __future__ import annotations

import errno
import re
import unicodedata

LONGEST_MESSAGE = 2000
"""Characters of an error message: about one screen of a terminal."""
_MOST_LINES = 40
_GAP = " […] "


class SefiError(Exception):
    """Base class of every error that sefi_fast raises on purpose.

    A message says what happened, what is expected and what to do. It is safe to print and at most
    a screen long, even if it quotes a file.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class PathError(SefiError, OSError):
    """A path of a user cannot be expanded or written as a path."""


class SubjectFileError(SefiError, ValueError):
    """A subject file is damaged, of an unknown format, or made for another base model."""


class PromptError(SefiError, ValueError):
    """A prompt, a placeholder or a class word cannot be used as given."""


class ImageError(SefiError, ValueError):
    """An image is missing, unreadable or of a kind that cannot be used."""


class ModelError(SefiError, ValueError):
    """A base model is missing or of a family that the method does not fit."""


class ConfigError(SefiError, ValueError, TypeError):
    """A config file cannot be read as settings, or one of its settings cannot be used."""


class BackendError(SefiError, RuntimeError):
    """A backend that was asked for is unknown, unavailable or does not support the input."""


class TrainingError(SefiError, RuntimeError):
    """A training run cannot continue; files of finished work are kept."""


# PyTorch, CUDA and their libraries raise RuntimeError with one of these. oneDNN's "could not create
# a primitive descriptor" is about an operation that it lacks.
_OUT_OF_MEMORY = re.compile(
    r"out[ _]?of[ _]?memory|not enough memory|can(no|')t allocate memory|bad[ _]alloc"
    r"|_ALLOC_FAILED|ALLOCATION_FAILED|CUBLAS_STATUS_NOT_INITIALIZED"
    r"|could not (create|execute) a primitive(?! descriptor)|could not create a memory",
    re.IGNORECASE,
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error of PyTorch, a library or the system says that memory ran out."""
    if isinstance(error, SefiError):
        return False
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, RuntimeError):
        named = f"{type(error).__name__}: {error}"
        return _OUT_OF_MEMORY.search(named) is not None
    return isinstance(error, MemoryError)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def printable(text: str, limit: int = LONGEST_MESSAGE) -> str:
    r"""Escape what a terminal would obey or an encoding refuse, and shorten the middle.

    Control characters, text-direction marks and lone surrogates become backslash escapes. Line
    feeds do too if there are more than 40. Text longer than `limit` characters keeps its beginning
    and its end.

    Example:
        >>> printable("\x1b[31m<me>")
        '\\x1b[31m<me>'
    """
    text = _shortened(text, limit)
    if text.isascii() and text.isprintable():
        return text
    # The joiners of Hindi, Persian and emoji are of the same category as direction marks.
    kept = "\n\u200c\u200d" if text.count("\n") <= _MOST_LINES else "\u200c\u200d"
    # An escape has up to ten characters.
    return _shortened("".join(x if x in kept else _escaped(x) for x in text), limit)


def _shortened(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    head = limit * 2 // 3
    return text[:head] + _GAP + text[head + len(_GAP) - limit :]


def _escaped(character: str) -> str:
    if unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Zl", "Zp"):
        return character
    return character.encode("unicode_escape").decode("ascii")
