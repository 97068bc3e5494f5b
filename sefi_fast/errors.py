"""The library's own exceptions: each names what came, what was wanted and what to do."""

from __future__ import annotations

import errno
import re

from sefi_fast.utils.text import printable


class SefiError(Exception):
    """Base of every error that sefi_fast raises on purpose.

    The message is safe to print and at most a screen long, whatever text of a file it quotes.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class PathError(SefiError, OSError):
    """A path that a user gave cannot be one."""


class SubjectFileError(SefiError, ValueError):
    """A subject file is damaged, of an unknown format, or made for another base model."""


class PromptError(SefiError, ValueError):
    """A prompt, a placeholder or a class word cannot be used as given."""


class ImageError(SefiError, ValueError):
    """An image is missing, unreadable or of a kind that cannot be used."""


class ModelError(SefiError, ValueError):
    """A base model is missing or of a family that the method does not fit."""


class ConfigError(SefiError, ValueError, TypeError):
    """A config file cannot be read as settings, or holds one that cannot be used."""


class BackendError(SefiError, RuntimeError):
    """A backend asked for by name is unknown, unavailable or cannot take the input."""


class TrainingError(SefiError, RuntimeError):
    """A training run cannot go on; what was good before is kept."""


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
