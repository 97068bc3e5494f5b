"""Checkpoints of one subject in training: safetensors files in a folder beside its output."""

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
from typing import Any

from torch import Tensor

from sefi_fast import __version__
from sefi_fast.errors import TrainingError
from sefi_fast.utils.files import LONGEST_NAME, atomic_write, fitting_name, read_regular
from sefi_fast.utils.strict_json import parse_json
from sefi_fast.utils.tensor_file import pack_tensors, read_metadata, unpack_tensors

logger = logging.getLogger(__name__)

FORMAT = "sefi_fast.checkpoint"
FORMAT_VERSION = 1
_SECONDS_BETWEEN = 60.0
_SIZE_LIMIT = 2**31
_NAME = re.compile(r"step-(\d{6,})\.safetensors")
_PARTIAL = re.compile(r"\.step-\d{6,}\.safetensors\.[0-9a-f]{8}")


class CheckpointError(TrainingError, ValueError):
    """A checkpoint is missing, damaged, or of another run."""


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The whole state of one subject after `step` steps.

    Attributes:
        step: steps done.
        settings: all fields of TrainConfig.
        identity: what is learnt on which model, in words and checksums.
        tensors: the engine's state of the lane ("engine.…"), history ("history.…") and moving
            average ("average.…"), on the CPU.
    """

    step: int
    settings: dict[str, Any]
    identity: dict[str, str]
    tensors: dict[str, Tensor]

    def part(self, name: str) -> dict[str, Tensor]:
        """The tensors whose names begin with `name` and a point, without that."""
        start = name + "."
        return {
            key.removeprefix(start): tensor
            for key, tensor in self.tensors.items()
            if key.startswith(start)
        }


def folder_of(output: Path) -> Path:
    """Where the checkpoints of an output file lie: `me.safetensors.checkpoints`."""
    suffix = ".checkpoints"
    return output.with_name(fitting_name(output.name, LONGEST_NAME - len(suffix)) + suffix)


def discard(output: Path) -> None:
    """Remove the checkpoints of an output file, and their folder if nothing else is in it."""
    CheckpointFolder(folder_of(output)).clear()


class Timetable:
    """When checkpoints are due.

    Args:
        every: steps between them; 0: never; None: once a minute, or more seldom where writing one
            takes more than a fiftieth of the time.
    """

    def __init__(self, every: int | None) -> None:
        self._every = every
        self._next = time.perf_counter() + _SECONDS_BETWEEN

    def due(self, step: int) -> bool:
        """Whether one is due after `step` steps."""
        if self._every is None:
            return time.perf_counter() >= self._next
        return self._every > 0 and step % self._every == 0

    def written(self, seconds: float) -> None:
        """One was written, in that many seconds."""
        self._next = time.perf_counter() + max(_SECONDS_BETWEEN, 50 * seconds)


class CheckpointFolder:
    """The checkpoints of one output file.

    Args:
        path: the folder; it is made with the first checkpoint.
        keep: how many of the newest stay.
    """

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
        """Steps of the checkpoints that are there, whole or not, newest first."""
        if not self._is_there():
            return []
        names = (_NAME.fullmatch(entry.name) for entry in self.path.iterdir())
        return sorted((int(name[1]) for name in names if name), reverse=True)

    def file(self, step: int) -> Path:
        """The file of a step's checkpoint."""
        return self.path / f"step-{step:06d}.safetensors"

    def write(self, checkpoint: Checkpoint) -> Path:
        """Write a checkpoint, whole or not at all; the others stay until `prune`.

        Raises:
            OSError: it cannot be written.
        """
        path = self.file(checkpoint.step)
        if path.is_symlink():
            path.unlink()
        atomic_write(path, _content(checkpoint))
        return path

    def read(self, step: int) -> Checkpoint:
        """The checkpoint of a step.

        Raises:
            CheckpointError: it is missing or damaged.
        """
        return read_checkpoint(self.file(step))

    def prune(self, newest: int) -> None:
        """Remove all but the newest up to step `newest`, and what killed processes left behind.

        Later ones are of before a resumption from an older one, damaged or overtaken.
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
        """Remove all checkpoints unless the newest was written after the finished `output`.

        A newer one is of a run that was going to overwrite it.
        """
        newest = self.steps()[:1]
        finished = output.stat().st_mtime_ns
        if all(self.file(step).lstat().st_mtime_ns <= finished for step in newest):
            self.clear()

    def _is_there(self) -> bool:
        """Whether the folder is there. What a link leads to belongs to someone else."""
        return self.path.is_dir() and not self.path.is_symlink()

    def _remove_partials(self) -> None:
        for entry in list(self.path.iterdir()):
            if _PARTIAL.fullmatch(entry.name):
                _remove(entry)


def _remove(path: Path) -> None:
    """Remove a file that is no longer wanted; one that cannot be removed ends no training."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("the old checkpoint %s stays: %s", path, error.strerror or error)


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint, every byte of it checked.

    Raises:
        CheckpointError: the file is missing, truncated, damaged, larger than 2 GB, or not a
            checkpoint of this library.
    """
    try:
        content = read_regular(path, _SIZE_LIMIT)
    except OSError as error:
        raise CheckpointError(
            f"the checkpoint {path} cannot be read: {error.strerror or error}"
        ) from error
    try:
        metadata = read_metadata(content)
        if metadata.get("format") != FORMAT:
            raise CheckpointError(f"{path} is no checkpoint of sefi_fast")
        if _whole_number(metadata, "format_version") > FORMAT_VERSION:
            raise CheckpointError(
                f"the checkpoint {path} was written by sefi_fast {metadata['library_version']} in "
                "a format newer than this version reads; update sefi_fast"
            )
        metadata, tensors = unpack_tensors(content, checksum=True)
        return Checkpoint(
            step=_whole_number(metadata, "step"),
            settings=_mapping(metadata, "settings"),
            identity=_mapping(metadata, "identity"),
            tensors=tensors,
        )
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


def _content(checkpoint: Checkpoint) -> bytes:
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
    return content
