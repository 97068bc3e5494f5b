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
from sefi_fast.prompts import class_token_ids, placeholder_ids, text_encoders, tokenize_prompts
from sefi_fast.prompts.text_encoder import is_sdxl, token_table
from sefi_fast.prompts.tokenization import with_all_vectors
from sefi_fast.subject import Subject, SubjectTokens
from sefi_fast.training.base_model import MODEL_KEYS, BaseModel, model_settings, resolution_of
from sefi_fast.training.checkpoint import Checkpoint, CheckpointFolder, folder_of
from sefi_fast.training.config import TrainConfig
from sefi_fast.training.engine import StepResult, SubjectInputs
from sefi_fast.training.image import LARGEST_FILE, load_image, prepare, time_ids
from sefi_fast.training.latents import encode_image, load_mask
from sefi_fast.training.monitor import History
from sefi_fast.training.optimizer import BatchedAdamW, MovingAverage
from sefi_fast.training.prompts import TrainingPrompts
from sefi_fast.utils.files import check_folder, checksum, expanded, remove_partials
from sefi_fast.utils.text import composed, is_unicode

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    ImageSource = str | os.PathLike[str] | Image.Image | np.ndarray

logger = logging.getLogger(__name__)

NON_FINITE_LIMIT = 3
_WINDOW = 50
_LEAST_GAIN = 0.01


class Callbacks:
    """Methods that a run calls while it trains; override those you need.

    A plain function in place of a `Callbacks` is `on_step`.

    Example:
        >>> class Print(sefi_fast.training.Callbacks):
        ...     def on_step(self, step, history):
        ...         print(step, history.loss[-1])
        ...         return history.loss[-1] < 0.01
        >>> sefi_fast.train("me.jpg", callback=Print())
    """

    def on_step(self, step: int, history: History) -> bool | None:
        """Run after each step with a finite loss; True ends the training of the subject.

        Args:
            step: steps done.
            history: of the subject so far.
        """

    def on_checkpoint(self, step: int, path: Path) -> None:
        """Run after a checkpoint of `step` steps was written to `path`."""

    def on_end(self, subject: Subject) -> None:
        """Run after the subject is trained, and saved if it has an output."""


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
    """A trained subject could not be written; its checkpoints stay.

    Attributes:
        subject: the subject.
    """

    def __init__(self, message: str, subject: Subject) -> None:
        super().__init__(message)
        self.subject = subject


Result = Subject | Exception
"""A trained subject, or the error that ended its training."""


@dataclass(frozen=True, eq=False)
class SubjectSpec:
    """One subject to train: a call of `train` or a line of a manifest.

    Attributes:
        image: an image file, a PIL image or an array [h, w, 3].
        class_word: what the subject is; default: that of the call.
        name: for messages, and of the file of a subject of `train_many`; default: the file name of
            the image.
        placeholder: its word in prompts; default in a manifest: its name in angle brackets, with
            hyphens for spaces (colons if another subject has that placeholder).
        seed: of all random numbers; default: the configuration's.
        scene: where the image was taken; default: the configuration's.
        mask: where the subject is in the image, for `attention_loss="mask"`.
        model, model_config, vae: the base model, as for `train`; the same in all lines of a
            manifest.
        where: the line of the manifest, for messages.
        output: file of the trained subject; its checkpoints go next to it.
        partial: file for the last good state of a subject that fails or is interrupted.
        callback: a function called after each step, or `Callbacks`.
        loaded: the image, if it has been read.

    Raises:
        TypeError: the class word is not a string, or the callback not a function.
    """

    image: ImageSource
    class_word: str | None = None
    name: str = ""
    placeholder: str = ""
    seed: int | None = None
    scene: str | None = None
    mask: Any = None
    model: str | None = None
    model_config: str | None = None
    vae: str | None = None
    where: str = ""
    output: Path | None = None
    partial: Path | None = None
    callback: Callback | Callbacks | None = None
    loaded: Image.Image | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.class_word, str | None):
            raise TypeError(f"class_word must be a string, got {type(self.class_word).__name__}")
        # Half a character is an error of this subject alone, raised when it is prepared.
        if self.class_word is not None and is_unicode(self.class_word):
            object.__setattr__(self, "class_word", composed(self.class_word))
        if self.callback is not None and not (
            isinstance(self.callback, Callbacks) or callable(self.callback)
        ):
            raise TypeError(f"callback must be a function or Callbacks, got {self.callback!r}")

    @property
    def title(self) -> str:
        """The name for messages."""
        return self.name or self.placeholder


def file_checksums(spec: SubjectSpec) -> dict[str, str]:
    """Return the checksums of the image and the mask that are files, to recognize them by."""
    sums = {}
    for name, source in (("image", spec.image), ("mask", spec.mask)):
        if isinstance(source, (str, os.PathLike)):
            try:
                sums[name] = checksum(expanded(source), LARGEST_FILE)
            except FileNotFoundError:
                continue
            except OSError as error:
                raise ImageError(f"the {name} {source} cannot be read: {error.strerror}") from error
    return sums


def class_word_for(class_word: str | None, model: Any) -> str:
    """Return the class word given, or that of the bundled model."""
    if class_word is not None:
        return class_word
    if model is None:
        from sefi_fast.tiny_world import CLASS_WORD

        return CLASS_WORD
    raise ValueError(
        "class_word is missing: say what the subject is (person, cat, car); only the "
        "bundled model has its own class word"
    )


class EarlyStopping:
    """Ends a run whose loss, smoothed exponentially over about 50 steps, no longer falls.

    `patience` steps pass without a new lowest one, lower by at least a hundredth; None: never.
    """

    def __init__(self, patience: int | None) -> None:
        self._patience = patience
        self._average, self._lowest = 0.0, math.inf
        self._count = self._since = 0

    def reached(self, loss: float) -> bool:
        """Add one step's loss, and return whether the run should end."""
        if self._patience is None:
            return False
        # A plain mean at first; the mean of few losses is not a mark to compare later ones with.
        self._count += 1
        self._average += (loss - self._average) / min(self._count, _WINDOW)
        if self._count < _WINDOW:
            return False
        if self._average < self._lowest * (1 - _LEAST_GAIN):
            self._lowest, self._since = self._average, 0
        else:
            self._since += 1
        return self._since >= self._patience


class SubjectState:
    """One subject in training. Make it with the VAE on the model's device in float32.

    Attributes:
        spec, config: of this subject, whose seed and scene go before those of the run.
        done: steps so far, skipped ones included.
        saved: step of the newest checkpoint; 0 if there is none.
        history: numbers of the steps.
        inputs: for the engine.
        average: of the tokens, with `ema_decay`.
        folder: of its checkpoints; None without an output.
    """

    def __init__(self, spec: SubjectSpec, base: BaseModel, config: TrainConfig) -> None:
        given = {"seed": spec.seed, "scene": spec.scene}
        own: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        self.spec, self.config = spec, replace(config, **own)
        self._base, self.size = base, resolution_of(base.pipe, config.resolution)
        image = load_image(spec.image) if spec.loaded is None else spec.loaded
        self._files = file_checksums(spec)
        self.folder = self._checkpoint_folder()
        prompts = self._prompts()
        pixels = prepare(image, self.size, config.crop)
        tokens = self._start_tokens()
        mask = None
        if spec.mask is not None:
            mask = load_mask(spec.mask, image, self.size, config.crop)
        sizes = time_ids(image, self.size, config.crop) if is_sdxl(base.pipe) else None
        latents = encode_image(base.pipe.vae, pixels, config.flip)
        self.inputs = SubjectInputs(tokens, latents, prompts, self.config.seed, mask, sizes)
        self.average: MovingAverage | None = None
        if config.ema_decay is not None:
            start = torch.cat([module().detach() for module in tokens], -1)
            self.average = MovingAverage(config.ema_decay, start)
        self._identity = {
            "placeholder": spec.placeholder,
            "class_word": self._class_word,
            "the image": _checksum(pixels),
            "mask": "none" if mask is None else _checksum(mask),
        }
        if sizes is not None:
            self._identity["the image's size and crop"] = str([int(x) for x in sizes])
        self.history = History()
        self.done = self.saved = 0
        self._failures = 0
        self._early_stopping = EarlyStopping(config.patience)
        self._seconds_before = 0.0

    @property
    def identity(self) -> dict[str, str]:
        """The image, words and model of this subject, as text and checksums."""
        return {**self._identity, "the model's weights or noise schedule": self._base.checksum}

    def record(self, result: StepResult, seconds: float) -> bool:
        """Record one more step, `seconds` after the start of this process's training.

        Return whether too many in a row had no finite loss.
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
        """Run the callback after a step with a finite loss; return whether to end there."""
        history, config = self.history, self.config
        callback = self.spec.callback
        called = callback.on_step if isinstance(callback, Callbacks) else callback
        ended = called is not None and bool(called(self.done, history))
        if self._early_stopping.reached(self._total(len(history.loss) - 1)):
            logger.warning(
                "%s: the loss has not fallen for %d steps, training ends after %d",
                self.spec.title, config.patience, self.done,
            )  # fmt: skip
            ended = True
        return ended or (
            config.max_seconds is not None and history.seconds[-1] >= config.max_seconds
        )

    def subject(self, tokens: Tensor) -> Subject:
        """Return the subject with these tokens [S, 2 or 1, W, C], those of all encoders joined."""
        widths = [rows.shape[1] for rows in self._class_embeddings]
        return Subject(
            placeholder=self.spec.placeholder,
            class_word=self._class_word,
            tokens=list(torch.split(tokens.cpu(), widths, -1)),
            class_embeddings=[rows.cpu() for rows in self._class_embeddings],
            base_model=self._base.name,
            settings={
                **self.config.as_dict(),
                **model_settings(*(getattr(self._base, name) for name in MODEL_KEYS)),
                **self._files,
            },
            history=self.history,
        )

    def checkpoint(self, engine_state: Mapping[str, Tensor]) -> Checkpoint:
        """Return the whole state; `engine_state` is the engine's part of it."""
        tensors = self._tensors(engine_state)
        return Checkpoint(self.done, self.config.as_dict(), self.identity, tensors)

    def check(self, checkpoint: Checkpoint) -> None:
        """Raise ValueError unless `load` and the engine can take all of a checkpoint's contents."""
        given = checkpoint.tensors
        blank = BatchedAdamW([self.inputs.tokens], 1.0, torch.device("cpu"), scaling=False)
        state = blank.state_dict(0)
        state["generator"], state["step"] = torch.Generator().get_state(), torch.tensor(0)
        for name, own in self._tensors(state).items():
            if not name.startswith("history."):
                _check_saved(name, given.get(name), own)
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
        """Restore the state of a checkpoint; the engine loads its own part."""
        self.done = self.saved = checkpoint.step
        self.history = History.from_state_dict(checkpoint.part("history"))
        self._failures = int(checkpoint.part("run")["failures"])
        self._seconds_before = self.history.seconds[-1] if self.history.seconds else 0.0
        for index in range(len(self.history.loss)):
            self._early_stopping.reached(self._total(index))
        if self.average is not None:
            self.average.load_state_dict(checkpoint.part("average"))

    def save_partial(self, subject: Subject) -> bool:
        """Save the unfinished subject if its spec wants that; a full disk hides no other error."""
        path = self.spec.partial
        if path is None or not self.history.loss:
            return False
        try:
            subject.save(path)
        except (OSError, ValueError) as error:
            logger.warning("the subject as it is could not be saved to %s: %s", path, error)
            return False
        return True

    @property
    def _class_word(self) -> str:
        assert self.spec.class_word is not None
        return self.spec.class_word

    def _checkpoint_folder(self) -> CheckpointFolder | None:
        if self.spec.output is None:
            return None
        remove_partials(self.spec.output)
        folder = CheckpointFolder(folder_of(self.spec.output), self.config.keep_checkpoints)
        if self.config.checkpoint_every != 0:
            folder.check()
            check_folder(folder.path, make=False)
        return folder

    def _prompts(self) -> TrainingPrompts:
        spec, config, pipe = self.spec, self.config, self._base.pipe
        self._tokenizers = [part.tokenizer for part in text_encoders(pipe)]
        self._class_ids = placeholder_ids(
            self._tokenizers, composed(self._class_word), config.num_vectors
        )
        prompts = TrainingPrompts(
            self._tokenizers, config.sentences(), spec.placeholder, self._class_ids,
            self._base.device, partial(with_all_vectors, pipe),
        )  # fmt: skip
        # A validation prompt that cannot be used is an error before training.
        if texts := [x.replace("{}", spec.placeholder) for x in config.validation_prompts]:
            for tokenizer, ids in zip(self._tokenizers, self._class_ids, strict=True):
                expanded_texts = with_all_vectors(pipe, texts, tokenizer)
                tokenize_prompts(tokenizer, expanded_texts, [(spec.placeholder, ids)])
        return prompts

    def _start_tokens(self) -> tuple[SubjectTokens, ...]:
        config, device = self.config, self._base.device
        with torch.no_grad():
            start_rows = [
                token_table(encoder)(torch.tensor(ids, device=device)).float()
                for encoder, ids in zip(self._base.text_encoders, self._class_ids, strict=True)
            ]
            # Rows that only repeat the last one are not kept with the subject.
            self._class_embeddings = [
                rows[: len(class_token_ids(tokenizer, self._class_word))]
                for rows, tokenizer in zip(start_rows, self._tokenizers, strict=True)
            ]
        generator = torch.Generator().manual_seed(config.seed)
        options = {x: getattr(config, x) for x in ("stages", "split", "train_base", "module")}
        return tuple(
            SubjectTokens(rows, generator=generator, **options).to(device) for rows in start_rows
        )

    def _tensors(self, engine_state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        parts: dict[str, Mapping[str, Tensor]] = {
            "engine": engine_state,
            "history": self.history.state_dict(),
            "run": {"failures": torch.tensor(self._failures)},
            "average": {} if self.average is None else self.average.state_dict(),
        }
        return {
            f"{part}.{name}": tensor
            for part, state in parts.items()
            for name, tensor in state.items()
        }

    def _total(self, step: int) -> float:
        history = self.history
        return history.loss[step] + self.config.weight_lambda * history.subject_loss[step]


def _check_saved(name: str, given: Any, own: Tensor) -> None:
    if not isinstance(given, Tensor):
        raise ValueError(f"the saved state has no {name}: it is not one of a run like this")
    if given.shape != own.shape or given.dtype != own.dtype:
        raise ValueError(
            f"{name} of the saved state is {given.dtype} {tuple(given.shape)}, and here it is "
            f"{own.dtype} {tuple(own.shape)}: resume with the model and the settings it began with"
        )


def _checksum(tensor: Tensor) -> str:
    return f"{zlib.crc32(tensor.detach().cpu().contiguous().numpy().tobytes()):08x}"
