"""Where a run goes on: whole checkpoints of the same run, or a clear word why there are none."""

from __future__ import annotations

import logging
import os
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

from sefi_fast.training.checkpoint import (
    Checkpoint,
    CheckpointError,
    CheckpointFolder,
    folder_of,
    read_checkpoint,
)
from sefi_fast.training.config import TrainConfig, unsaid_settings

logger = logging.getLogger(__name__)

Resume = bool | str | os.PathLike[str] | None
"""None: an unfinished run is an error. True: go on. "auto": go on, or begin where there is nothing
to go on from. False: begin anew. A path: go on from that checkpoint or folder of checkpoints."""


class Unfinished(NamedTuple):
    """A subject about to train: where its checkpoints lie, what it is, and its settings."""

    folder: CheckpointFolder | None
    identity: dict[str, str]
    config: TrainConfig


def newest_step(output: str | os.PathLike[str]) -> int:
    """Steps done in the newest whole checkpoint of an output file; 0 if there is none."""
    return max(_whole(CheckpointFolder(folder_of(Path(output))), None), default=0)


def check_resume(resume: Resume, subjects: int) -> None:
    """Raise TypeError or ValueError unless `resume` can be meant for that many subjects."""
    if not (resume is None or isinstance(resume, (bool, str, os.PathLike))):
        raise TypeError(f"resume must be True, False, None, 'auto' or a path, got {resume!r}")
    if _is_path(resume) and subjects != 1:
        raise ValueError(f"resume is {resume}, but {subjects} subjects train here: use 'auto'")


def checkpoints_to_resume(subject: Unfinished, resume: Resume) -> dict[int, Path]:
    """The subject's whole checkpoints by their steps, newest first; empty to begin at step 0.

    Raises:
        CheckpointError: there is an unfinished run and `resume` is None; there is none and
            `resume` wants one; none of the checkpoints is whole; or the newest is of another run
            or of other settings, which are named.
    """
    folder = subject.folder
    if _is_path(resume):
        path = Path(resume)  # type: ignore[arg-type]
        if path.is_dir():
            folder = CheckpointFolder(path.resolve())
        elif path.exists():
            checkpoint = read_checkpoint(path)
            _check_same(checkpoint, subject)
            return {checkpoint.step: path}
        else:
            raise CheckpointError(f"there is no checkpoint at {path}")
    steps = [] if folder is None else folder.steps()
    if not steps:
        if resume is True or _is_path(resume):
            where = "a run without an output" if folder is None else folder.path
            raise CheckpointError(
                f"there is no checkpoint to go on from in {where}: leave resume out to begin, or "
                "use resume='auto', which does either"
            )
        return {}
    assert folder is not None
    if resume is None:
        raise CheckpointError(
            f"an unfinished run of {steps[0]} steps lies in {folder.path}: resume=True (--resume) "
            "goes on from there, resume=False (--no-resume) removes it and begins anew"
        )
    if resume is False:
        logger.warning("training begins anew: the checkpoints in %s are removed", folder.path)
        folder.clear()
        return {}
    found = _whole(folder, subject)
    if not found:
        raise CheckpointError(
            f"none of the {len(steps)} checkpoints in {folder.path} is whole: move them away, or "
            "use resume=False (--no-resume), which removes them and begins anew"
        )
    if max(found) < steps[0]:
        logger.warning("the newest whole checkpoint in %s is of step %d", folder.path, max(found))
    return found


def _is_path(resume: Resume) -> bool:
    return isinstance(resume, (str, os.PathLike)) and resume != "auto"


def _whole(folder: CheckpointFolder, subject: Unfinished | None) -> dict[int, Path]:
    found: dict[int, Path] = {}
    for step in folder.steps():
        try:
            checkpoint = folder.read(step)
        except CheckpointError as error:
            logger.warning("%s; it is left aside", error)
            continue
        if subject is not None and not found:
            _check_same(checkpoint, subject)
        found[checkpoint.step] = folder.file(step)
    return found


def _check_same(checkpoint: Checkpoint, subject: Unfinished) -> None:
    config, usual = subject.config, unsaid_settings()
    now, then = config.as_dict(), checkpoint.settings
    fixed = [field.name for field in fields(config) if not field.metadata["free"]]
    differing = [
        (name, then.get(name, usual[name]), now[name])
        for name in fixed
        if name != "steps" and then.get(name, usual[name]) != now[name]
    ]
    differing += [
        (name, checkpoint.identity.get(name), value)
        for name, value in subject.identity.items()
        if checkpoint.identity.get(name) != value
    ]
    if differing:
        changes = "; ".join(f"{name} was {was!r}, is {value!r}" for name, was, value in differing)
        raise CheckpointError(
            f"the checkpoint of step {checkpoint.step} was made with other settings: {changes}. "
            "Resume with the same, or use resume=False (--no-resume) to begin anew"
        )
    if config.steps < checkpoint.step:
        raise CheckpointError(
            f"the checkpoint has done {checkpoint.step} steps, more than the {config.steps} asked "
            "for: give at least as many"
        )
    if config.steps != then.get("steps") and config.schedule != "constant":
        logger.warning(
            "the run was to have %s steps and has %d now: its learning rate follows the new length "
            "from here on",
            then.get("steps"),
            config.steps,
        )
