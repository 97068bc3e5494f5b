"""Train many subjects of one manifest: `sefi_fast.train_many`."""

from __future__ import annotations

import logging
import os
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm

from sefi_fast.errors import (
    SubjectFileError,
    TrainingError,
    first_line,
    is_out_of_memory,
    printable,
)
from sefi_fast.prompts import placeholder_ids, text_encoders
from sefi_fast.subject import Subject
from sefi_fast.training.base_model import MODEL_KEYS, ModelPath, Source, model_settings
from sefi_fast.training.checkpoint import CheckpointFolder, discard, folder_of
from sefi_fast.training.config import TrainConfig, unsaid_settings
from sefi_fast.training.engine import Engine, is_lost
from sefi_fast.training.manifest import (
    Entry,
    ManifestError,
    Shard,
    current_shard,
    listed_problems,
    model_of,
    read_subjects,
)
from sefi_fast.training.monitor import check_trackers
from sefi_fast.training.signals import Stop, TrainingInterrupted, graceful
from sefi_fast.training.subject_state import Job, Outcome, class_word_for, seen_files
from sefi_fast.training.summary import FILE as SUMMARY_FILE
from sefi_fast.training.summary import ManyResult, Summary, row_of
from sefi_fast.training.trainer import Run, running
from sefi_fast.utils.files import check_folder, check_output, expanded


def finished_subject(
    job: Job,
    config: TrainConfig,
    model: Any,
    model_config: ModelPath = None,
    vae: ModelPath = None,
) -> Subject | None:
    """The subject in a job's output file; None if there is no file.

    Raises:
        TrainingError: the file is no whole subject, or one of other settings, which are named.
    """
    path = job.output
    if path is None or not path.exists():
        return None
    again = "remove the file, choose another output, or use overwrite"
    try:
        subject = Subject.load(path)
    except SubjectFileError as error:
        raise TrainingError(
            f"something else is in this subject's place: {error}; {again}"
        ) from error
    if differing := _differing(subject, job, config, model_settings(model, model_config, vae)):
        raise TrainingError(f"{path} was learnt with other settings: {differing}; {again}")
    return subject


def _differing(
    subject: Subject, job: Job, config: TrainConfig, models: dict[str, str | None]
) -> str:
    """What a finished subject was trained with that is not asked for now, in words."""
    own = {name: value for name in ("seed", "scene") if (value := getattr(job, name)) is not None}
    wanted = replace(config, **own).as_dict()
    now: dict[str, Any] = {
        field.name: wanted[field.name] for field in fields(config) if not field.metadata["free"]
    }
    usual = unsaid_settings()
    then = {name: subject.settings.get(name, usual[name]) for name in now}
    for name in MODEL_KEYS:
        now[name], then[name] = models.get(name), subject.settings.get(name)
    # Subjects of earlier versions do not say what image they were learnt from.
    for name, checksum in seen_files(job).items():
        if name in subject.settings:
            now[name], then[name] = checksum, subject.settings[name]
    now |= {"class_word": job.class_word, "placeholder": job.placeholder}
    then |= {"class_word": subject.class_word, "placeholder": subject.placeholder}
    return "; ".join(
        f"{name} was {then[name]!r}, is {value!r}"
        for name, value in now.items()
        if then[name] != value
    )


def check_entries(
    entries: Iterable[Entry], config: TrainConfig, class_word: str | None, model: Any
) -> None:
    problems = []
    for entry in entries:
        if model is not None and not (entry.class_word or class_word):
            problems.append(
                f"{entry.where}: class_word is missing: say what the subject is (person, cat)"
            )
        if (entry.mask is not None) != (config.attention_loss == "mask"):
            has = "has no mask" if entry.mask is None else "has a mask"
            problems.append(
                f"{entry.where} {has}, but attention_loss is {config.attention_loss!r}: give every "
                "subject a mask with attention_loss='mask', and with that only"
            )
    if problems:
        raise ManifestError(f"nothing was begun:{listed_problems(problems)}")


def vectors_of(job: Job, tokenizers: Sequence[Any], config: TrainConfig) -> int:
    """How many tokens stand for a job's placeholder; 0 if training will refuse its class."""
    try:
        return len(placeholder_ids(tokenizers, job.class_word, config.num_vectors)[0])
    except Exception:
        return 0


def check_device(config: TrainConfig, shard: Shard) -> None:
    if shard.count > 1 and config.device is not None and ":" in config.device:
        raise ValueError(
            f"device {config.device!r} would put all {shard.count} processes on one device: leave "
            "it out, the launcher gives each its own"
        )


logger = logging.getLogger(__name__)

OnResult = Callable[[ManyResult], None]

BATCH_SUBJECTS = 8
_SECONDS_BETWEEN_SUMMARIES = 10.0


def train_many(
    subjects: Any,
    *,
    model: Any = None,
    model_config: str | os.PathLike[str] | None = None,
    vae: str | os.PathLike[str] | None = None,
    output: str | os.PathLike[str],
    class_word: str | None = None,
    batch_subjects: int = BATCH_SUBJECTS,
    preset: str | None = None,
    config: TrainConfig | None = None,
    resume: bool = True,
    overwrite: bool = False,
    progress: bool = True,
    on_result: OnResult | None = None,
    **overrides: Any,
) -> list[ManyResult]:
    """Learn independent subjects side by side over one frozen model, each as if it were alone.

    A subject that fails is reported and left out, the others go on. Run again, it skips those whose
    file is there with the same settings and goes on from the checkpoints of the others. Under
    `accelerate launch` or `torchrun` each process takes its share of the batches. On a CPU a
    subject's tokens are the same bit for bit however many processes there are, as long as
    `batch_subjects` is.

    Args:
        subjects: a folder of images, a .csv or .jsonl manifest, or a list
            (`manifest.read_subjects` says what each may hold).
        model: as for `train`; default: what the manifest names, else the bundled tiny model.
        model_config, vae: as for `train`; default: what the manifest names.
        output: folder for a file `<name>.safetensors` a subject, and `summary.jsonl`.
        class_word: of the subjects that have none of their own.
        batch_subjects: how many train side by side; halved, with a word, when memory runs out.
        preset: "sefi", "likeness", "textual-inversion" or "prospect" in place of `config`.
        config: settings that all subjects share; default: TrainConfig().
        resume: go on from checkpoints; False removes what an unfinished run left and begins anew.
        overwrite: learn those anew too whose file is there.
        progress: show progress bars.
        on_result: called with each result as soon as there is one; a subject's file is on the disk
            by then. An exception in it ends the run, and what is in training has checkpoints.
        **overrides: fields of TrainConfig, by name; they win over `config` and `preset`.

    Returns:
        One result a subject of this process, in the order given.

    Raises:
        ManifestError: the subjects cannot be read or contradict one another; nothing was begun.
        ModelError: there is no such model, or the method does not fit its family.
        ValueError, TypeError: a setting is out of range or of the wrong type.
        OSError: the folder cannot be written; told before training begins.
        TrainingInterrupted: SIGTERM, SIGHUP or SIGINT came. Every subject in training has a
            checkpoint.
    """
    if preset is not None and config is not None:
        raise ValueError(f"preset {preset!r} and config were both given: give one of them")
    settings = (
        TrainConfig.from_overrides(config, overrides)
        if preset is None
        else TrainConfig.preset(preset, **overrides)
    )
    if isinstance(batch_subjects, bool) or not isinstance(batch_subjects, int):
        raise TypeError(f"batch_subjects must be a whole number, got {batch_subjects!r}")
    if batch_subjects < 1:
        raise ValueError(f"batch_subjects must be at least 1, got {batch_subjects}")
    check_trackers(settings.trackers)
    model, model_config, vae = (
        expanded(given) if isinstance(given, (str, os.PathLike)) else given
        for given in (model, model_config, vae)
    )
    entries = read_subjects(subjects, model, model_config, vae)
    model, model_config, vae = (
        model_of(entries, name) if given is None else given
        for name, given in zip(MODEL_KEYS, (model, model_config, vae), strict=True)
    )
    check_entries(entries, settings, class_word, model)
    folder = check_folder(output)
    check_output(folder / SUMMARY_FILE)
    shard = current_shard()
    check_device(settings, shard)
    numbered = [
        _Numbered(number, entry, _job(entry, folder, class_word, model))
        for number, entry in enumerate(entries)
    ]
    groups = [
        numbered[start : start + batch_subjects]
        for start in range(0, len(numbered), batch_subjects)
    ]
    many = _Many(
        shard.share(groups),
        (model, model_config, vae),
        settings,
        resume,
        Summary(folder, shard),
        overwrite,
        on_result,
    )
    shard.wait()
    return many(progress and shard.index == 0)


class _Numbered(NamedTuple):
    number: int
    entry: Entry
    job: Job


class _Many:
    """The groups of one process, one after another through one engine."""

    def __init__(
        self,
        groups: Sequence[Sequence[_Numbered]],
        models: tuple[Any, ModelPath, ModelPath],
        config: TrainConfig,
        resume: bool,
        summary: Summary,
        overwrite: bool,
        on_result: OnResult | None,
    ) -> None:
        self._all = [one for group in groups for one in group]
        self._models, self._config, self._resume = models, config, resume
        self._summary, self._overwrite, self._on_result = summary, overwrite, on_result
        self._results: dict[int, ManyResult] = {}
        self._limit = max((len(group) for group in groups), default=1)
        self._groups = deque(groups)
        self._engine: Engine | None = None
        self._written = time.monotonic()
        self._callback_error: Exception | None = None

    def __call__(self, progress: bool) -> list[ManyResult]:
        if not self._overwrite:
            self._take_finished()
        for one in self._open():
            if not self._resume and one.job.output is not None:
                discard(one.job.output)
        try:
            with tqdm(
                total=len(self._all), initial=len(self._results), unit="subject",
                disable=not progress,
            ) as bar:  # fmt: skip
                self._train(bar, progress)
        finally:
            self._write_summary()
        self._summary.join()
        return [self._results[one.number] for one in self._all]

    def _train(self, bar: Any, progress: bool) -> None:
        if not self._open():
            return
        model, *rest = self._models
        with graceful() as stop, running(model, self._config, *rest) as source:
            while self._groups:
                group = self._open(self._groups.popleft())
                if len(group) > self._limit:
                    self._groups.appendleft(group[self._limit :])
                    group = group[: self._limit]
                if not group:
                    continue
                group, others = self._alike(group, source)
                if others:
                    self._groups.appendleft(others)
                self._check_stop(stop)
                self._train_group(group, source, bar, progress)
                if time.monotonic() - self._written > _SECONDS_BETWEEN_SUMMARIES:
                    self._write_summary()

    def _alike(
        self, group: Sequence[_Numbered], source: Source
    ) -> tuple[list[_Numbered], list[_Numbered]]:
        """Those with as many vectors as the first, which can be one batch, and the others."""
        tokenizers = [part.tokenizer for part in text_encoders(source.pipe)]
        counts = [vectors_of(one.job, tokenizers, self._config) for one in group]
        alike: list[_Numbered] = []
        others: list[_Numbered] = []
        for one, count in zip(group, counts, strict=True):
            (alike if count == counts[0] else others).append(one)
        return alike, others

    def _train_group(
        self, group: Sequence[_Numbered], source: Source, bar: Any, progress: bool
    ) -> None:
        """Train a group to its end: in halves where memory runs out, one by one after a fault.

        A fault that all of them have alone too is the run's, and is raised.
        """
        fault = self._attempt(group, source, bar, progress)
        if fault is None:
            return
        left = self._open(group)
        if len(left) > 1 and is_out_of_memory(fault):
            self._limit = (len(left) + 1) // 2
            logger.warning(
                "%d subjects at once are too many for the memory (%s): from here on %d at once",
                len(left), first_line(fault), self._limit,
            )  # fmt: skip
            self._groups.appendleft(left)
            return
        faults: list[Exception | None] = [fault] * len(left)
        if len(left) > 1:
            logger.warning(
                "%d subjects cannot train side by side (%s): each is tried alone", len(left), fault
            )
            faults = [self._attempt([one], source, bar, progress) for one in left]
            if all(str(own) == str(fault) for own in faults):
                raise fault
        for one, own in zip(left, faults, strict=True):
            if own is None:
                continue
            if is_out_of_memory(own):
                own = TrainingError(
                    f"the memory is too small for even one subject ({first_line(own)}): lower "
                    "batch_size or resolution, or use gradient_checkpointing=True or "
                    "low_memory=True"
                )
            self._take(one, own)
            bar.update()

    def _attempt(
        self, group: Sequence[_Numbered], source: Source, bar: Any, progress: bool
    ) -> Exception | None:
        """Train a group, and return the fault that ended it, if one did.

        A subject's own fault is an outcome like another; this one is of the batch.
        """

        def take(index: int, outcome: Outcome) -> None:
            self._take(group[index], outcome)
            bar.update()

        run: Run | None = None
        try:
            run = Run(
                source,
                self._config,
                [one.job for one in group],
                resume="auto",
                engine=self._engine,
            )
            self._engine = run.engine
            run(progress=progress, on_outcome=take)
            return None
        except KeyboardInterrupt as error:
            error.args = (self._interrupted(),)
            raise
        except Exception as error:
            # An engine that cannot be made has a setting or a model that is the same for all.
            of_run = run is None and not is_out_of_memory(error)
            if of_run or error is self._callback_error or is_lost(source.device):
                raise
            fault = error
        # Outside of the handler, whose traceback holds what filled the memory.
        run = self._engine = None
        _clear_frames(fault)
        if source.device.type == "cuda":
            torch.cuda.empty_cache()
        return fault

    def _take(self, one: _Numbered, outcome: Outcome) -> None:
        name, path = one.entry.name, one.job.output
        if isinstance(outcome, Exception):
            words = printable(str(outcome) or type(outcome).__name__)
            logger.warning("%s (%s) is left out: %s", name, one.entry.where, words)
            _clear_frames(outcome)
            self._settle(one, ManyResult(name, None, None, outcome))
        else:
            self._settle(one, ManyResult(name, path, outcome))

    def _settle(self, one: _Numbered, result: ManyResult) -> None:
        self._results[one.number] = result
        if self._on_result is None:
            return
        try:
            self._on_result(result)
        except Exception as error:
            self._callback_error = error
            raise

    def _take_finished(self) -> None:
        """Those whose file is there already; a file of other settings is an error, and stays."""
        for one in self._all:
            try:
                subject = finished_subject(one.job, self._config, *self._models)
            except Exception as error:
                self._take(one, error)
                continue
            if subject is not None and one.job.output is not None:
                CheckpointFolder(folder_of(one.job.output)).clear_if_older(one.job.output)
                self._settle(one, ManyResult(one.entry.name, one.job.output, subject, before=True))

    def _open(self, among: Sequence[_Numbered] | None = None) -> list[_Numbered]:
        """Those without a result yet."""
        chosen = self._all if among is None else among
        return [one for one in chosen if one.number not in self._results]

    def _check_stop(self, stop: Stop) -> None:
        if stop.received is not None:
            raise TrainingInterrupted(self._interrupted(), stop.received, 0)

    def _interrupted(self) -> str:
        done = sum(result.error is None for result in self._results.values())
        return (
            f"training was interrupted with {done} of {len(self._all)} subjects learnt; the same "
            "call again skips those and goes on with the others from their checkpoints"
        )

    def _write_summary(self) -> None:
        try:
            self._summary.write(self._rows())
        except OSError as error:
            logger.warning("the summary could not be written: %s", error)
        self._written = time.monotonic()

    def _rows(self) -> list[dict[str, Any]]:
        return [row_of(one.number, one.entry, self._results.get(one.number)) for one in self._all]


def _job(entry: Entry, folder: Path, class_word: str | None, model: Any) -> Job:
    return Job(
        image=entry.image,
        class_word=class_word_for(entry.class_word or class_word, model),
        placeholder=entry.placeholder,
        seed=entry.seed,
        scene=entry.scene,
        mask=entry.mask,
        output=folder / f"{entry.name}.safetensors",
        name=entry.name,
    )


def _clear_frames(error: BaseException | None) -> None:
    """Clear the variables that an error's tracebacks hold: models, images, activations."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__
