"""The library's own exceptions: each names what came, what was wanted and what to do."""

from __future__ import annotations


class SefiError(Exception):
    """Base of every error that sefi_fast raises on purpose."""


class SubjectFileError(SefiError, ValueError):
    """A subject file is damaged, of an unknown format, or made for another base model."""


class PromptError(SefiError, ValueError):
    """A prompt, a placeholder or a class word cannot be used as given."""


class ImageError(SefiError, ValueError):
    """A picture is missing, unreadable or of a kind that cannot be used."""


class ModelError(SefiError, ValueError):
    """A base model is missing or of a family that the method does not fit."""


class BackendError(SefiError, RuntimeError):
    """A backend asked for by name is unknown, unavailable or cannot take the input."""


class TrainingError(SefiError, RuntimeError):
    """A training run cannot go on; what was good before is kept."""
