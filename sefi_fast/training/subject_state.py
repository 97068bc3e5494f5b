"""One subject in training: its specification, its state and its results."""

from __future__ import annotations

import logging
import math
import os
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sefi_fast.errors import ImageError, TrainingError
from sefi_fast.pipelines.support import is_sdxl
from sefi_fast.prompts import class_token_ids, placeholder_ids, text_encoders, tokenize_prompts
from sefi_fast.prompts.text_encoder import token_table
from sefi_fast.prompts.tokenization import with_all_vectors
from sefi_fast.subject import Subject, SubjectTokens
from sefi_fast.training.base_model import MODEL_KEYS, Source, model_settings, resolution_of
from sefi_fast.training.checkpoint import Checkpoint, CheckpointFolder, Unfinished, folder_of
from sefi_fast.training.config import TrainConfig
from sefi_fast.training.engine import Lane, StepResult, check_saved
from sefi_fast.training.image import LARGEST_FILE, load_image, prepare, time_ids
from sefi_fast.training.latents import encode_image
from sefi_fast.training.monitor import History
from sefi_fast.training.optimizer import LaneState, MovingAverage
from sefi_fast.training.prompts import TrainingPrompts
from sefi_fast.utils.files import check_folder, check_output, checksum, expanded, remove_partials
from sefi_fast.utils.text import check_placeholder, composed, is_unicode

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    Picture = str | os.PathLike[str] | Image.Image | np.ndarray


_WINDOW = 50
_LEAST_GAIN = 0.01


class Plateau:
    """Watches the loss of each step, smoothed exponentially over about 50 steps.

    Args:
        patience: steps without a new lowest smoothed loss, lower by at least a hundredth of it,
            after which the run has reached its plateau; None: never.
    """

    def __init__(self, patience: int | None) -> None:
        self._patience = patience
        self._average = 0.0
        self._count = 0
        self._lowest = math.inf
        self._since = 0

    def reached(self, loss: float) -> bool:
        """Takes in one step's loss and says whether the plateau is reached."""
        if self._patience is None:
            return False
        # A plain mean at first; a mean of few is no mark to hold later ones to.
        self._count += 1
        self._average += (loss - self._average) / min(self._count, _WINDOW)
        if self._count < _WINDOW:
            return False
        if self._average < self._lowest * (1 - _LEAST_GAIN):
            self._lowest, self._since = self._average, 0
        else:
            self._since += 1
        return self._since >= self._patience


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
        image: an image file, a PIL image or an array [h, w, 3].
        class_word: what it is.
        placeholder: the new word.
        seed: of everything drawn at random; default: the configuration's.
        scene: where the image was taken; default: the configuration's.
        mask: where the subject is in the image, for `attention_loss="mask"`.
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


logger = logging.getLogger(__name__)

NON_FINITE_LIMIT = 3


class Learner:
    """One job in training.

    To be made with the VAE on the source's device in float32.

    Args:
        job: what is learnt.
        source: the model.
        config: settings of the run; the job's seed and scene go before them.

    Attributes:
        job, config: of this subject.
        done: steps so far, skipped ones included.
        saved: step of the newest checkpoint; 0 if there is none.
        history: what its training saw.
        lane: what the engine needs.
        folder: of its checkpoints; None without an output, or where none are wanted.

    Raises:
        ImageError, PromptError, ValueError, TypeError, OSError: the job cannot be done.
    """

    def __init__(self, job: Job, source: Source, config: TrainConfig) -> None:
        given = {"seed": job.seed, "scene": job.scene}
        own: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        self.job, self.config = job, replace(config, **own)
        picture, self._files = load_image(job.image), seen_files(job)
        self.folder: CheckpointFolder | None = None
        if job.output is not None:
            check_output(job.output)
            remove_partials(job.output)
            self.folder = CheckpointFolder(folder_of(job.output), config.keep_checkpoints)
            if config.checkpoint_every != 0:
                self.folder.check()
                check_folder(self.folder.path, make=False)
        pipe = source.pipe
        self._source, self.size = source, resolution_of(pipe, config.resolution)
        tokenizers = [part.tokenizer for part in text_encoders(pipe)]
        class_ids = placeholder_ids(tokenizers, composed(job.class_word), config.num_vectors)
        prompts = TrainingPrompts(
            tokenizers, self.config.sentences(), job.placeholder, class_ids, source.device,
            partial(with_all_vectors, pipe),
        )  # fmt: skip
        for tokenizer, ids in zip(tokenizers, class_ids, strict=True):
            # A bad one is to be told now, not when it is drawn.
            texts = [x.replace("{}", job.placeholder) for x in config.validation_prompts]
            if texts:
                texts = with_all_vectors(pipe, texts, tokenizer)
                tokenize_prompts(tokenizer, texts, [(job.placeholder, ids)])
        pixels = prepare(picture, self.size, config.crop)
        tables = [token_table(encoder) for encoder in source.text_encoders]
        with torch.no_grad():
            # One row a vector: rows that only repeat the last one are not kept with the subject.
            self._start_rows = [
                table(torch.tensor(ids, device=source.device)).float()
                for table, ids in zip(tables, class_ids, strict=True)
            ]
            self._class_embeddings = [
                rows[: len(class_token_ids(tokenizer, job.class_word))]
                for rows, tokenizer in zip(self._start_rows, tokenizers, strict=True)
            ]
        tokens = self._start_tokens()
        mask = self._mask(picture)
        sizes = time_ids(picture, self.size, config.crop) if is_sdxl(pipe) else None
        self.lane = Lane(
            tokens,
            encode_image(pipe.vae, pixels, config.flip),
            prompts,
            self.config.seed,
            mask,
            sizes,
        )
        self.average: MovingAverage | None = None
        if config.ema_decay is not None:
            start = torch.cat([module().detach() for module in tokens], -1)
            self.average = MovingAverage(config.ema_decay, start)
        self._identity = {
            "placeholder": job.placeholder,
            "class_word": job.class_word,
            "the model's weights or noise schedule": source.checksum,
            "the image": _checksum(pixels),
            "mask": "none" if mask is None else _checksum(mask),
        }
        if sizes is not None:
            self._identity["the image's size and crop"] = str([int(x) for x in sizes])
        self.history = History()
        self.done = self.saved = 0
        self._failures = 0
        self._plateau = Plateau(config.patience)
        self._seconds_before = 0.0

    def unfinished(self) -> Unfinished:
        """What it takes to find this subject's checkpoints."""
        return Unfinished(self.folder, self._identity, self.config, self._check)

    def take(self, result: StepResult, seconds: float) -> bool:
        """Notes the result of one more step.

        Args:
            result: of this lane.
            seconds: since this process began to train.

        Returns:
            Whether the subject has failed, by too many steps in a row without a finite loss.
        """
        self.done += 1
        if not result.finite:
            self.history.skipped.append(self.done - 1)
            self._failures += 1
            return self._failures >= NON_FINITE_LIMIT
        self._failures = 0
        self.history.record(result.noise, result.subject_loss, self._seconds_before + seconds)
        return False

    def ends_early(self) -> bool:
        """Whether the subject is to end after the latest step, which gave a finite loss.

        To be asked once after each such step, since a callback is called and a plateau watched.
        """
        history, config = self.history, self.config
        callback = self.job.callback
        called = callback.on_step if isinstance(callback, Callbacks) else callback
        ended = called is not None and bool(called(self.done, history))
        if self._plateau.reached(self._total(len(history.loss) - 1)):
            logger.warning(
                "%s: the loss has not fallen for %d steps, training ends after %d",
                self.job.title, config.patience, self.done,
            )  # fmt: skip
            ended = True
        return ended or (
            config.max_seconds is not None and history.seconds[-1] >= config.max_seconds
        )

    def subject(self, tokens: Tensor) -> Subject:
        """The subject with these tokens [S, 2 or 1, W, C], all encoders' side by side."""
        widths = [rows.shape[1] for rows in self._class_embeddings]
        return Subject(
            placeholder=self.job.placeholder,
            class_word=self.job.class_word,
            tokens=list(tokens.cpu().split(widths, -1)),
            class_embeddings=[rows.cpu() for rows in self._class_embeddings],
            base_model=self._source.name,
            settings={
                **self.config.as_dict(),
                **model_settings(*(getattr(self._source, name) for name in MODEL_KEYS)),
                **self._files,
            },
            history=self.history,
        )

    def checkpoint(self, engine_state: Mapping[str, Tensor]) -> Checkpoint:
        """The whole state; `engine_state` is the engine's part of it."""
        parts: dict[str, Mapping[str, Tensor]] = {
            "engine": engine_state,
            "history": self.history.state_dict(),
            "run": {"failures": torch.tensor(self._failures)},
        }
        if self.average is not None:
            parts["average"] = self.average.state_dict()
        tensors = {
            f"{part}.{name}": tensor
            for part, state in parts.items()
            for name, tensor in state.items()
        }
        return Checkpoint(self.done, self.config.as_dict(), self._identity, tensors)

    def _check(self, checkpoint: Checkpoint) -> None:
        """Raise ValueError unless `load` and the engine can take all of a checkpoint's contents."""
        state = LaneState([self.lane.tokens], 1.0, torch.device("cpu"), scaling=False).state_dict(0)
        state["generator"], state["step"] = torch.Generator().get_state(), torch.tensor(0)
        given = checkpoint.tensors
        for name, own in self.checkpoint(state).tensors.items():
            if not name.startswith("history."):
                check_saved(name, given.get(name), own)
        try:
            torch.Generator().set_state(given["engine.generator"])
        except RuntimeError as error:
            raise ValueError("its generator's state is not one") from error
        history = History.from_state_dict(checkpoint.part("history"))
        steps = len(history.loss) + len(history.skipped)
        if not steps == int(given["engine.step"]) == checkpoint.step:
            raise ValueError(
                f"it is of step {checkpoint.step}, its engine of {int(given['engine.step'])} and "
                f"its history of {steps}"
            )
        if not 0 <= int(given["run.failures"]) < NON_FINITE_LIMIT:
            raise ValueError(f"its run had {int(given['run.failures'])} failures and went on")
        if not 0 <= int(given.get("average.updates", 0)) <= steps:
            raise ValueError(f"its average has {int(given['average.updates'])} updates")

    def load(self, checkpoint: Checkpoint) -> None:
        """Goes on from a checkpoint; the engine loads its own part."""
        self.done = self.saved = checkpoint.step
        self.history = History.from_state_dict(checkpoint.part("history"))
        self._failures = int(checkpoint.part("run")["failures"])
        self._seconds_before = self.history.seconds[-1] if self.history.seconds else 0.0
        for index in range(len(self.history.loss)):
            self._plateau.reached(self._total(index))
        if self.average is not None:
            self.average.load_state_dict(checkpoint.part("average"))

    def _total(self, index: int) -> float:
        history = self.history
        return history.loss[index] + self.config.weight_lambda * history.subject_loss[index]

    def _start_tokens(self) -> tuple[SubjectTokens, ...]:
        config = self.config
        generator = torch.Generator().manual_seed(config.seed)
        return tuple(
            SubjectTokens(
                rows,
                stages=config.stages,
                split=config.split,
                train_base=config.train_base,
                module=config.module,
                generator=generator,
            ).to(self._source.device)
            for rows in self._start_rows
        )

    def _mask(self, picture: Any) -> Tensor | None:
        if self.job.mask is None:
            return None
        from sefi_fast.training.latents import load_mask

        return load_mask(self.job.mask, picture, self.size, self.config.crop)


def save_partial(learner: Learner, subject: Subject) -> bool:
    """Saves an unfinished subject where its job wants one; a full disk hides no other error."""
    path = learner.job.partial
    if path is None or not learner.history.loss:
        return False
    try:
        subject.save(path)
    except (OSError, ValueError) as error:
        logger.warning("the subject as it is could not be saved to %s: %s", path, error)
        return False
    return True


def unsaved_error(learner: Learner, subject: Subject, error: Exception) -> UnsavedSubjectError:
    """The error of a subject that is learnt but could not be written."""
    kept = f"the checkpoint of step {learner.saved} stays, resume goes on from it"
    outcome = UnsavedSubjectError(
        f"the subject is learnt, but {learner.job.output} could not be written: {error}; "
        + (kept if learner.saved else "it is in this error's `subject`"),
        subject,
    )
    outcome.__cause__ = error
    return outcome


def _checksum(tensor: Tensor) -> str:
    return f"{zlib.crc32(tensor.detach().cpu().contiguous().numpy().tobytes()):08x}"
