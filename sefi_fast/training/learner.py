"""One subject of a run: prepared for the engine, and everything of it that the engine lacks."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sefi_fast.conditioning import (
    class_token_ids,
    placeholder_ids,
    text_parts,
    tokenize_prompts,
)
from sefi_fast.conditioning.prompt import with_all_vectors
from sefi_fast.conditioning.text import token_table
from sefi_fast.pipelines.families import is_sdxl
from sefi_fast.subject import Subject, SubjectTokens
from sefi_fast.training.checkpoint import Checkpoint, CheckpointFolder, folder_of
from sefi_fast.training.config import TrainConfig
from sefi_fast.training.engine import StepResult, check_saved
from sefi_fast.training.history import History
from sefi_fast.training.image import load_image, prepare, time_ids
from sefi_fast.training.job import Callbacks, Job, UnsavedSubjectError, seen_files
from sefi_fast.training.lane_state import LaneState
from sefi_fast.training.lanes import Lane
from sefi_fast.training.latents import encode_picture
from sefi_fast.training.output import check_folder, check_output
from sefi_fast.training.plateau import Plateau
from sefi_fast.training.prompts import TrainingPrompts
from sefi_fast.training.resume import Unfinished
from sefi_fast.training.schedule import MovingAverage
from sefi_fast.training.source import MODEL_KEYS, Source, model_settings, resolution_of
from sefi_fast.utils.files import remove_partials
from sefi_fast.utils.words import composed

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
        tokenizers = [part.tokenizer for part in text_parts(pipe)]
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
            encode_picture(pipe.vae, pixels, config.flip),
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
            "the picture": _checksum(pixels),
            "mask": "none" if mask is None else _checksum(mask),
        }
        if sizes is not None:
            self._identity["the picture's size and crop"] = str([int(x) for x in sizes])
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
        self.history.record(result.noise, result.alignment, self._seconds_before + seconds)
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
        return history.loss[index] + self.config.weight_lambda * history.alignment[index]

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
        from sefi_fast.training.masks import load_mask

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
