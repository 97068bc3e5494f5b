"""One subject to learn: what a caller says of it, checked before anything is computed."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sefi_fast.errors import ImageError, TrainingError
from sefi_fast.subject import Subject
from sefi_fast.training.history import History
from sefi_fast.training.image import LARGEST_FILE
from sefi_fast.utils.files import checksum, expanded
from sefi_fast.utils.text import is_unicode
from sefi_fast.utils.words import check_placeholder, composed

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    Picture = str | os.PathLike[str] | Image.Image | np.ndarray


class Callbacks:
    """What a run tells while it trains; override what is wanted.

    A plain function is taken for `on_step`.
    """

    def on_step(self, step: int, history: History) -> bool | None:
        """After each step with a finite loss: steps done, history so far; True ends the subject."""

    def on_checkpoint(self, step: int, path: Path) -> None:
        """A checkpoint of that many steps lies at `path`."""

    def on_end(self, subject: Subject) -> None:
        """The subject is learnt, and saved if it has an output."""


Callback = Callable[[int, History], "bool | None"]


class NonFiniteLossError(TrainingError):
    """The loss or its gradient was NaN or infinite several steps in a row.

    Attributes:
        subject: the last state that gave a finite loss.
    """

    def __init__(self, message: str, subject: Subject) -> None:
        super().__init__(message)
        self.subject = subject


class UnsavedSubjectError(TrainingError):
    """A learnt subject could not be written; its checkpoints stay.

    Attributes:
        subject: the subject.
    """

    def __init__(self, message: str, subject: Subject) -> None:
        super().__init__(message)
        self.subject = subject


Outcome = Subject | Exception
"""What becomes of a job: the subject, or why there is none."""


@dataclass(frozen=True, eq=False)
class Job:
    """One subject to learn beside others.

    Attributes:
        image: a picture file, a PIL image or an array [h, w, 3].
        class_word: what it is.
        placeholder: the new word.
        seed: of everything drawn at random; default: the configuration's.
        scene: where the picture was taken; default: the configuration's.
        mask: where the subject is in the picture, for `attention_loss="mask"`.
        output: file for the finished subject; its checkpoints lie beside it.
        partial: file for the last good state of a subject that fails or is interrupted.
        name: for messages; default: the placeholder.
        callback: a function called after each step, or `Callbacks`.

    Raises:
        PromptError, TypeError: the placeholder is not one word, or the class word not a string.
    """

    image: Picture
    class_word: str
    placeholder: str = "<it>"
    seed: int | None = None
    scene: str | None = None
    mask: Any = None
    output: Path | None = None
    partial: Path | None = None
    name: str = ""
    callback: Callback | Callbacks | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "placeholder", check_placeholder(self.placeholder))
        if not isinstance(self.class_word, str):
            raise TypeError(f"class_word must be a string, got {type(self.class_word).__name__}")
        # Half a character is told when the subject is prepared: it concerns no other.
        if is_unicode(self.class_word):
            object.__setattr__(self, "class_word", composed(self.class_word))
        if not (self.callback is None or isinstance(self.callback, Callbacks)) and not callable(
            self.callback
        ):
            raise TypeError(f"callback must be a function or Callbacks, got {self.callback!r}")

    @property
    def title(self) -> str:
        """The name for messages."""
        return self.name or self.placeholder


def seen_files(job: Job) -> dict[str, str]:
    """Return the checksums of the image and the mask that are files, to know them again by.

    Raises:
        ImageError: a file is there and cannot be read, or is too large for an image.
    """
    sums = {}
    for name, source in (("picture", job.image), ("mask", job.mask)):
        if isinstance(source, (str, os.PathLike)):
            try:
                sums[name] = checksum(expanded(source), LARGEST_FILE)
            except FileNotFoundError:
                continue
            except OSError as error:
                raise ImageError(f"the {name} {source} cannot be read: {error.strerror}") from error
    return sums


def class_word_for(class_word: str | None, model: Any) -> str:
    """The class word given, or the bundled model's own.

    Raises:
        ValueError: none was given and the model is another.
    """
    if class_word is not None:
        return class_word
    if model is None:
        from sefi_fast.tiny_world import CLASS_WORD

        return CLASS_WORD
    raise ValueError(
        "class_word is missing: say what the subject is (person, cat, car); only the "
        "bundled model has a class word of its own"
    )
