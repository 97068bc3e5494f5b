"""Train many subjects of one manifest: `sefi_fast.train_many`."""

from __future__ import annotations

import logging
import os
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

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
from sefi_fast.training.base_model import (
    MODEL_KEYS,
    BaseModel,
    ModelPath,
    model_settings,
    training_session,
)
from sefi_fast.training.checkpoint import CheckpointFolder, discard, folder_of
from sefi_fast.training.config import TrainConfig
from sefi_fast.training.engine import Engine, is_lost
from sefi_fast.training.losses import mask_problem
from sefi_fast.training.manifest import (
    ManifestError,
    current_shard,
    listed_problems,
    model_of,
    read_subjects,
)
from sefi_fast.training.monitor import check_trackers
from sefi_fast.training.signals import TrainingInterrupted, graceful
from sefi_fast.training.subject_state import Result, SubjectSpec, class_word_for, file_checksums
from sefi_fast.training.summary import FILE as SUMMARY_FILE
from sefi_fast.training.summary import ManyResult, Summary, row_of
from sefi_fast.training.trainer import Run
from sefi_fast.utils.files import check_folder, check_output, expanded

logger = logging.getLogger(__name__)

OnResult = Callable[[ManyResult], None]
Group = Mapping[int, SubjectSpec]
"""Subjects that train together, by their numbers in the manifest."""
BATCH_SUBJECTS = 8
_SECONDS_BETWEEN_SUMMARIES = 10.0


def train_many(
    subjects: Any,
    *,
    model: Any = None,
    model_config: ModelPath = None,
    vae: ModelPath = None,
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
    """Train independent subjects together over one frozen model, each as if it were alone.

    A subject that fails is reported and skipped, the others go on. Run again, it skips subjects
    whose file is there with the same settings, and goes on from the checkpoints of the others.
    Under `accelerate launch` or `torchrun` each process takes its share of the batches. On a CPU
    the tokens of a subject are the same bit for bit for any number of processes, as long as
    `batch_subjects` is the same.

    Example:
        >>> results = sefi_fast.train_many("photos/", class_word="dog", model="path/or/hub-id",
        ...                                output="subjects/", batch_subjects=4, steps=300)
        >>> [result.path for result in results if result.error is None]

    Args:
        subjects: a folder of images, a .csv or .jsonl manifest, or a list
            (`manifest.read_subjects` describes each).
        model: as for `train`; default: that of the manifest, else the bundled tiny model.
        model_config, vae: as for `train`; default: those of the manifest.
        output: folder for a file `<name>.safetensors` of each subject, and `summary.jsonl`.
        class_word: of the subjects without their own.
        batch_subjects: number that train together; halved, with a warning, when memory runs out.
        preset: "sefi", "likeness", "textual-inversion" or "prospect" in place of `config`.
        config: settings that all subjects share; default: TrainConfig().
        resume: go on from checkpoints; False removes those of an unfinished run and begins again.
        overwrite: also train subjects whose file is there.
        progress: show progress bars.
        on_result: called with each result as soon as there is one; a subject's file is on the disk
            by then. An exception in it ends the run, and subjects in training have checkpoints.
        **overrides: fields of TrainConfig, by name; they win over `config` and `preset`.

    Returns:
        The result of each subject of this process, in the order given.

    Raises:
        ManifestError: the subjects cannot be read or contradict one another; nothing was begun.
        ModelError: there is no such model, or the method does not fit its family.
        ValueError, TypeError: a setting is out of range or of the wrong type.
        OSError: the folder cannot be written; raised before training begins.
        TrainingInterrupted: SIGTERM, SIGHUP or SIGINT came. Every subject in training has a
            checkpoint.
    """
    settings = TrainConfig.from_overrides(config, overrides, preset)
    if isinstance(batch_subjects, bool) or not isinstance(batch_subjects, int):
        raise TypeError(f"batch_subjects must be a whole number, got {batch_subjects!r}")
    if batch_subjects < 1:
        raise ValueError(f"batch_subjects must be at least 1, got {batch_subjects}")
    check_trackers(settings.trackers)
    model, model_config, vae = (
        expanded(given) if isinstance(given, (str, os.PathLike)) else given
        for given in (model, model_config, vae)
    )
    specs = read_subjects(subjects, model, model_config, vae)
    model, model_config, vae = (
        model_of(specs, name) if given is None else given
        for name, given in zip(MODEL_KEYS, (model, model_config, vae), strict=True)
    )
    _check_specs(specs, settings, class_word, model)
    folder = check_folder(output)
    check_output(folder / SUMMARY_FILE)
    shard = current_shard()
    if shard.count > 1 and settings.device is not None and ":" in settings.device:
        raise ValueError(
            f"device {settings.device!r} would put all {shard.count} processes on one device: "
            "leave it out, the launcher gives each process a device"
        )
    for number, spec in enumerate(specs):
        word = class_word_for(spec.class_word or class_word, model)
        path = folder / f"{spec.name}.safetensors"
        specs[number] = replace(spec, class_word=word, output=path)
    numbered = list(enumerate(specs))
    starts = shard.share(range(0, len(specs), batch_subjects))
    groups = [dict(numbered[start : start + batch_subjects]) for start in starts]
    models, summary = (model, model_config, vae), Summary(folder, shard)
    many = _Many(groups, models, settings, resume, summary, overwrite, on_result)
    shard.wait()
    return many(progress and shard.index == 0)


def _check_specs(
    specs: Iterable[SubjectSpec], config: TrainConfig, class_word: str | None, model: Any
) -> None:
    problems = []
    for spec in specs:
        if model is not None and not (spec.class_word or class_word):
            problems.append(
                f"{spec.where}: class_word is missing: say what the subject is (person, cat)"
            )
        if problem := mask_problem(spec.mask is not None, config.attention_loss):
            problems.append(f"{spec.where}: {problem}")
    if problems:
        raise ManifestError(f"nothing was begun:{listed_problems(problems)}")


def finished_subject(
    spec: SubjectSpec, config: TrainConfig, model: Any, model_config: ModelPath, vae: ModelPath
) -> Subject | None:
    """Return the subject in the output file of a spec; None if there is no file.

    Raises:
        TrainingError: the file is not a whole subject, or one of other settings, which are named.
    """
    path = spec.output
    if path is None or not path.exists():
        return None
    again = "remove the file, choose another output, or use overwrite"
    try:
        subject = Subject.load(path)
    except SubjectFileError as error:
        raise TrainingError(
            f"something else is in this subject's place: {error}; {again}"
        ) from error
    own = {name: value for name in ("seed", "scene") if (value := getattr(spec, name)) is not None}
    now = {
        **replace(config, **own).fixed(),
        **dict.fromkeys(MODEL_KEYS),
        **model_settings(model, model_config, vae),
        **file_checksums(spec),
    }
    words = ("class_word", "placeholder")
    pairs = [(name, subject.settings.get(name), value) for name, value in now.items()]
    pairs += [(name, getattr(subject, name), getattr(spec, name)) for name in words]
    if differing := "; ".join(
        f"{name} was {was!r}, is {x!r}" for name, was, x in pairs if was != x
    ):
        raise TrainingError(f"{path} was trained with other settings: {differing}; {again}")
    return subject


@dataclass
class _Many:
    """The groups of one process, trained one after another by one engine."""

    _first_groups: Sequence[Group]
    _models: tuple[Any, ModelPath, ModelPath]
    _config: TrainConfig
    _resume: bool
    _summary: Summary
    _overwrite: bool
    _on_result: OnResult | None

    def __post_init__(self) -> None:
        groups = self._first_groups
        self._specs = {number: spec for group in groups for number, spec in group.items()}
        self._results: dict[int, ManyResult] = {}
        self._limit = max((len(group) for group in groups), default=1)
        self._groups = deque(groups)
        self._engine: Engine | None = None
        self._written = time.monotonic()
        self._callback_error: Exception | None = None

    def __call__(self, progress: bool) -> list[ManyResult]:
        if not self._overwrite:
            self._take_finished()
        for spec in self._open(self._specs).values():
            if not self._resume and spec.output is not None:
                discard(spec.output)
        try:
            with tqdm(
                total=len(self._specs), initial=len(self._results), unit="subject",
                disable=not progress,
            ) as bar:  # fmt: skip
                self._train(bar, progress)
        finally:
            self._write_summary()
        self._summary.join()
        return [self._results[number] for number in self._specs]

    def _train(self, bar: Any, progress: bool) -> None:
        if not self._open(self._specs):
            return
        model, *rest = self._models
        with graceful() as stop, training_session(model, self._config, *rest) as base:
            tokenizers = [part.tokenizer for part in text_encoders(base.pipe)]
            while self._groups:
                group = self._next_group(tokenizers, bar)
                if not group:
                    continue
                if stop.received is not None:
                    raise TrainingInterrupted(self._interrupted(), stop.received, 0)
                self._train_group(group, base, bar, progress)
                if time.monotonic() - self._written > _SECONDS_BETWEEN_SUMMARIES:
                    self._write_summary()

    def _next_group(self, tokenizers: Sequence[Any], bar: Any) -> Group:
        """Return the next subjects that can be one batch, and put the rest of their group back."""
        numbers = list(group := self._open(self._groups.popleft()))
        counts = {number: self._vectors_of(group[number], tokenizers) for number in numbers}
        alike = [n for n in numbers if counts[n] == counts[numbers[0]]][: self._limit]
        if rest := {n: group[n] for n in numbers if n not in alike}:
            self._groups.appendleft(rest)
        for number in alike:
            output = group[number].output
            assert output is not None
            try:
                check_output(output)
            except OSError as error:
                self._take(number, error)
                bar.update()
        return self._open({n: group[n] for n in alike})

    def _vectors_of(self, spec: SubjectSpec, tokenizers: Sequence[Any]) -> int:
        """Return the number of the placeholder's tokens; 0 if training will refuse its class."""
        try:
            return len(
                placeholder_ids(tokenizers, spec.class_word or "", self._config.num_vectors)[0]
            )
        except Exception:
            return 0

    def _train_group(self, group: Group, base: BaseModel, bar: Any, progress: bool) -> None:
        """Train a group to its end: in halves where memory runs out, one by one after a fault.

        A fault that all of them have alone too is the run's, and is raised.
        """
        fault = self._attempt(group, base, bar, progress)
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
        faults: dict[int, Exception | None] = dict.fromkeys(left, fault)
        if len(left) > 1:
            logger.warning(
                "%d subjects cannot train together (%s): each is tried alone", len(left), fault
            )
            faults = {n: self._attempt({n: left[n]}, base, bar, progress) for n in left}
            if all(str(own) == str(fault) for own in faults.values()):
                raise fault
        for number, own in faults.items():
            if own is None:
                continue
            if is_out_of_memory(own):
                own = TrainingError(
                    f"the memory is too small for even one subject ({first_line(own)}): lower "
                    "batch_size or resolution, or use gradient_checkpointing=True or "
                    "low_memory=True"
                )
            self._take(number, own)
            bar.update()

    def _attempt(self, group: Group, base: BaseModel, bar: Any, progress: bool) -> Exception | None:
        """Train a group, and return the fault that ended it, if one did.

        The error of one subject is its result. A fault is of the batch.
        """

        def take(index: int, result: Result) -> None:
            self._take([*group][index], result)
            bar.update()

        run: Run | None = None
        try:
            run = Run(base, self._config, [*group.values()], resume="auto", engine=self._engine)
            self._engine = run.engine
            run(progress=progress, on_result=take)
            return None
        except KeyboardInterrupt as error:
            error.args = (self._interrupted(),)
            raise
        except Exception as error:
            # An engine that cannot be made has a setting or a model that is the same for all.
            of_run = run is None and not is_out_of_memory(error)
            if of_run or error is self._callback_error or is_lost(base.device):
                raise
            fault = error
        # Outside of the handler, whose traceback holds what filled the memory.
        run = self._engine = None
        _clear_frames(fault)
        if base.device.type == "cuda":
            torch.cuda.empty_cache()
        return fault

    def _take(self, number: int, result: Result, before: bool = False) -> None:
        spec = self._specs[number]
        if isinstance(result, Exception):
            words = printable(str(result) or type(result).__name__)
            logger.warning("%s (%s) is skipped: %s", spec.name, spec.where, words)
            _clear_frames(result)
            taken = ManyResult(spec.name, None, None, result)
        else:
            taken = ManyResult(spec.name, spec.output, result, before=before)
        self._results[number] = taken
        if self._on_result is not None:
            try:
                self._on_result(taken)
            except Exception as error:
                self._callback_error = error
                raise

    def _take_finished(self) -> None:
        """Settle subjects whose file is there; a file of other settings is an error, and stays."""
        for number, spec in self._specs.items():
            try:
                subject = finished_subject(spec, self._config, *self._models)
            except Exception as error:
                self._take(number, error)
                continue
            if subject is not None and spec.output is not None:
                CheckpointFolder(folder_of(spec.output)).clear_if_older(spec.output)
                self._take(number, subject, before=True)

    def _open(self, group: Group) -> dict[int, SubjectSpec]:
        """Return the subjects without a result."""
        return {number: spec for number, spec in group.items() if number not in self._results}

    def _interrupted(self) -> str:
        done = sum(result.error is None for result in self._results.values())
        return (
            f"training was interrupted with {done} of {len(self._specs)} subjects trained; the "
            "same call again skips those and goes on with the others from their checkpoints"
        )

    def _write_summary(self) -> None:
        rows = [row_of(n, spec, self._results.get(n)) for n, spec in self._specs.items()]
        try:
            self._summary.write(rows)
        except OSError as error:
            logger.warning("the summary could not be written: %s", error)
        self._written = time.monotonic()


def _clear_frames(error: BaseException | None) -> None:
    """Clear the variables that an error's tracebacks hold: models, images, activations."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__
