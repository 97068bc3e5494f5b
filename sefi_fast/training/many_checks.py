"""Find out before many subjects are trained what is wrong with them, or done already."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from typing import Any

from sefi_fast.conditioning import placeholder_ids
from sefi_fast.errors import SubjectFileError, TrainingError
from sefi_fast.subject import Subject
from sefi_fast.training.config import TrainConfig, unsaid_settings
from sefi_fast.training.job import Job, seen_files
from sefi_fast.training.manifest import Entry, ManifestError, listed_problems
from sefi_fast.training.shard import Shard
from sefi_fast.training.source import MODEL_KEYS, ModelPath, model_settings


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
    # Subjects of earlier versions do not say what picture they were learnt from.
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
