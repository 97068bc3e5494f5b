"""Checkpoints of a training run: write, read and continue."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from torch import Tensor

from sefi_fast import __version__
from sefi_fast.errors import TrainingError
from sefi_fast.utils.files import LONGEST_NAME, atomic_write, fitting_name, read_regular, user_path
from sefi_fast.utils.strict_json import parse_json
from sefi_fast.utils.tensor_file import pack_tensors, read_metadata, unpack_tensors

if TYPE_CHECKING:
    from sefi_fast.training.subject_state import SubjectState

logger = logging.getLogger(__name__)

FORMAT = "sefi_fast.checkpoint"
FORMAT_VERSION = 1
_SECONDS_BETWEEN = 60.0
_SIZE_LIMIT = 2**31
_NAME = re.compile(r"step-(\d{6,})\.safetensors")
_PARTIAL = re.compile(r"\.step-\d{6,}\.safetensors\.[0-9a-f]{8}")

Resume = bool | str | os.PathLike[str] | None
"""None: an unfinished run is an error. True: go on. "auto": go on, or begin where there is no
checkpoint. False: begin again. A path: go on from that checkpoint or folder of checkpoints."""


class CheckpointError(TrainingError, ValueError):
    """A checkpoint is missing, damaged, or of another run."""


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The whole state of one subject after `step` steps.

    Attributes:
        settings: all fields of TrainConfig.
        identity: image, words and model, as text and checksums.
        tensors: state of the engine ("engine.…"), history ("history.…") and moving average
            ("average.…"), on the CPU.
    """

    step: int
    settings: dict[str, Any]
    identity: dict[str, str]
    tensors: dict[str, Tensor]

    def part(self, name: str) -> dict[str, Tensor]:
        """Return the tensors whose names begin with `name` and a point, without that prefix."""
        start = name + "."
        return {
            key.removeprefix(start): tensor
            for key, tensor in self.tensors.items()
            if key.startswith(start)
        }


def folder_of(output: Path) -> Path:
    """Return the folder of an output file's checkpoints: `me.safetensors.checkpoints`."""
    suffix = ".checkpoints"
    return output.with_name(fitting_name(output.name, LONGEST_NAME - len(suffix)) + suffix)


def discard(output: Path) -> None:
    """Remove the checkpoints of an output file, and their folder if nothing else is in it."""
    CheckpointFolder(folder_of(output)).clear()


class CheckpointInterval:
    """The steps between checkpoints; 0: never.

    None: once a minute, or less often where writing one takes more than a fiftieth of the time.
    """

    def __init__(self, every: int | None) -> None:
        self._every = every
        self._next = time.perf_counter() + _SECONDS_BETWEEN

    def due(self, step: int) -> bool:
        """Return whether one is due after `step` steps."""
        if self._every is None:
            return time.perf_counter() >= self._next
        return self._every > 0 and step % self._every == 0

    def written(self, seconds: float) -> None:
        """Note that writing one took that many seconds."""
        self._next = time.perf_counter() + max(_SECONDS_BETWEEN, 50 * seconds)


class CheckpointFolder:
    """The checkpoints of one output file, of which `prune` keeps the newest `keep`."""

    def __init__(self, path: Path, keep: int = 1) -> None:
        self.path = path
        self._keep = keep

    def check(self) -> None:
        """Raise OSError if something else is in the folder's place, a link to a folder included."""
        if os.path.lexists(self.path) and not self._is_there():
            kind = "a link" if self.path.is_symlink() else "a file"
            raise FileExistsError(
                f"{self.path} is in the way: it is {kind}, and checkpoints go into a folder of "
                "that name. Move it, choose another output, or set checkpoint_every=0 for no "
                "checkpoints"
            )

    def steps(self) -> list[int]:
        """Return the steps of all checkpoints, whole or not, newest first."""
        if not self._is_there():
            return []
        names = (_NAME.fullmatch(entry.name) for entry in self.path.iterdir())
        return sorted((int(name[1]) for name in names if name), reverse=True)

    def file(self, step: int) -> Path:
        """Return the file of a step's checkpoint."""
        return self.path / f"step-{step:06d}.safetensors"

    def write(self, checkpoint: Checkpoint) -> Path:
        """Write a checkpoint, whole or not at all; the others stay until `prune`."""
        path = self.file(checkpoint.step)
        if path.is_symlink():
            path.unlink()
        metadata = {
            "format": FORMAT,
            "format_version": str(FORMAT_VERSION),
            "library_version": __version__,
            "step": str(checkpoint.step),
            "settings": json.dumps(checkpoint.settings, sort_keys=True),
            "identity": json.dumps(checkpoint.identity, sort_keys=True),
        }
        content = pack_tensors(checkpoint.tensors, metadata, checksum=True)
        if len(content) > _SIZE_LIMIT:
            reason = f"it has {len(content):,} bytes, and at most {_SIZE_LIMIT:,} are read again"
            raise OSError(errno.EFBIG, reason)
        atomic_write(path, content)
        return path

    def prune(self, newest: int) -> None:
        """Remove all but the newest up to step `newest`, and the partial files of killed processes.

        Later ones were written before the run was resumed from an older one.
        """
        steps = self.steps()
        kept = [step for step in steps if step <= newest][: self._keep]
        for step in set(steps) - set(kept):
            _remove(self.file(step))
        self._remove_partials()

    def clear(self) -> None:
        """Remove all checkpoints, and the folder if nothing else is in it."""
        if not self._is_there():
            return
        try:
            # Oldest first, so that a kill on the way leaves the newest.
            for step in reversed(self.steps()):
                _remove(self.file(step))
            self._remove_partials()
            if not any(self.path.iterdir()):
                self.path.rmdir()
        except OSError as error:
            logger.warning("the old checkpoints in %s stay: %s", self.path, error.strerror or error)

    def clear_if_older(self, output: Path) -> None:
        """Remove all checkpoints unless the newest was written after the finished `output`."""
        # A newer one is of a run that was going to overwrite it.
        newest = self.steps()[:1]
        finished = output.stat().st_mtime_ns
        if all(self.file(step).lstat().st_mtime_ns <= finished for step in newest):
            self.clear()

    def _is_there(self) -> bool:
        # The target of a link belongs to someone else.
        return self.path.is_dir() and not self.path.is_symlink()

    def _remove_partials(self) -> None:
        for entry in list(self.path.iterdir()):
            if _PARTIAL.fullmatch(entry.name):
                _remove(entry)


def _remove(path: Path) -> None:
    """Remove a file; one that cannot be removed does not end the training."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("the old checkpoint %s stays: %s", path, error.strerror or error)


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint and check every byte of it."""
    try:
        content = read_regular(path, _SIZE_LIMIT)
    except OSError as error:
        raise CheckpointError(
            f"the checkpoint {path} cannot be read: {error.strerror or error}"
        ) from error
    try:
        metadata = read_metadata(content)
        if metadata.get("format") != FORMAT:
            raise CheckpointError(f"{path} is not a checkpoint of sefi_fast")
        if _whole_number(metadata, "format_version") > FORMAT_VERSION:
            raise CheckpointError(
                f"the checkpoint {path} was written by sefi_fast {metadata['library_version']} in "
                "a format newer than this version reads; update sefi_fast"
            )
        metadata, tensors = unpack_tensors(content, checksum=True)
        settings, identity = (_mapping(metadata, name) for name in ("settings", "identity"))
        return Checkpoint(_whole_number(metadata, "step"), settings, identity, tensors)
    except CheckpointError:
        raise
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"the checkpoint {path} is damaged: {error}") from error


def _whole_number(metadata: Mapping[str, str], name: str) -> int:
    text = metadata[name]
    if not re.fullmatch(r"[0-9]{1,12}", text):
        raise ValueError(f"its {name} is {text!r}, not a whole number")
    return int(text)


def _mapping(metadata: Mapping[str, str], name: str) -> dict[str, Any]:
    value = parse_json(metadata[name])
    if not isinstance(value, dict):
        raise ValueError(f"its {name} are not a JSON object")
    return value


def check_resume(resume: Resume) -> None:
    """Raise TypeError unless `resume` is one of the values that it may have."""
    if not (resume is None or isinstance(resume, (bool, str, os.PathLike))):
        raise TypeError(f"resume must be True, False, None, 'auto' or a path, got {resume!r}")


def checkpoint_to_resume(subject: SubjectState, resume: Resume) -> Checkpoint | None:
    """Return the subject's newest whole checkpoint; None to begin at step 0.

    Raises:
        CheckpointError: there is an unfinished run and `resume` is None, or none to go on from.
    """
    folder = subject.folder
    if _is_path(resume):
        path = user_path(resume)
        if not path.exists():
            raise CheckpointError(f"there is no checkpoint at {path}")
        if not path.is_dir():
            checkpoint = read_checkpoint(path)
            _check_same(checkpoint, subject)
            _check_loadable(checkpoint, path, subject)
            return checkpoint
        folder = CheckpointFolder(path.resolve())
    steps = [] if folder is None else folder.steps()
    if not steps:
        if resume is True or _is_path(resume):
            where = "a run without an output" if folder is None else folder.path
            raise CheckpointError(
                f"there is no checkpoint to go on from in {where}: leave resume out to begin, or "
                "use resume='auto', which does either"
            )
        return None
    assert folder is not None
    if resume is None:
        raise CheckpointError(
            f"an unfinished run of {steps[0]} steps lies in {folder.path}: resume=True (--resume) "
            "goes on from there, resume=False (--no-resume) removes it and begins again"
        )
    if resume is False:
        logger.warning("training begins again: the checkpoints in %s are removed", folder.path)
        folder.clear()
        return None
    newest = _newest_whole(folder, steps, subject)
    if newest is None:
        raise CheckpointError(
            f"none of the {len(steps)} checkpoints in {folder.path} is whole: move them away, or "
            "use resume=False (--no-resume), which removes them and begins again"
        )
    if newest.step < steps[0]:
        logger.warning("the newest whole checkpoint in %s is of step %d", folder.path, newest.step)
    return newest


def _is_path(resume: Resume) -> TypeGuard[str | os.PathLike[str]]:
    return isinstance(resume, (str, os.PathLike)) and resume != "auto"


def _newest_whole(
    folder: CheckpointFolder, steps: list[int], subject: SubjectState
) -> Checkpoint | None:
    """Return the newest checkpoint that the subject can load, and warn of those that it cannot."""
    for step in steps:
        path = folder.file(step)
        try:
            checkpoint = read_checkpoint(path)
            if checkpoint.step != step:
                raise CheckpointError(f"the checkpoint {path} is of step {checkpoint.step}")
        except CheckpointError as error:
            logger.warning("%s; it is skipped", error)
            continue
        _check_same(checkpoint, subject)
        try:
            _check_loadable(checkpoint, path, subject)
        except CheckpointError as error:
            logger.warning("%s; it is skipped", error)
            continue
        return checkpoint
    return None


def _check_loadable(checkpoint: Checkpoint, path: Path, subject: SubjectState) -> None:
    try:
        subject.check(checkpoint)
    except ValueError as error:
        raise CheckpointError(f"the checkpoint {path} is damaged: {error}") from error


def _check_same(checkpoint: Checkpoint, subject: SubjectState) -> None:
    """Raise CheckpointError unless a checkpoint is of the same run; its steps may differ."""
    config, then = subject.config, checkpoint.settings
    now = {name: value for name, value in config.fixed().items() if name != "steps"}
    pairs = [(name, then.get(name), value) for name, value in now.items()]
    pairs += [(name, checkpoint.identity.get(name), x) for name, x in subject.identity.items()]
    if changes := "; ".join(f"{name} was {was!r}, is {x!r}" for name, was, x in pairs if was != x):
        raise CheckpointError(
            f"the checkpoint of step {checkpoint.step} was made with other settings: {changes}. "
            "Resume with the same, or use resume=False (--no-resume) to begin again"
        )
    if config.steps < checkpoint.step:
        raise CheckpointError(
            f"the checkpoint has done {checkpoint.step} steps, more than the {config.steps} asked "
            "for: give at least as many"
        )
    if config.steps != then.get("steps") and config.schedule != "constant":
        logger.warning(
            "the run was to have %s steps and has %d now: its learning rate follows the new length "
            "from here on", then.get("steps"), config.steps,
        )  # fmt: skip
