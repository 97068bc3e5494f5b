"""Checkpoints of one subject in training: safetensors files in a folder beside its output."""

from __future__ import annotations

import json
import logging
import os
import re
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from sefi_fast import __version__
from sefi_fast.errors import TrainingError
from sefi_fast.utils.files import atomic_write

logger = logging.getLogger(__name__)

FORMAT = "sefi_fast.checkpoint"
FORMAT_VERSION = 1
_SECONDS_BETWEEN = 60.0
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
    return output.with_name(output.name + ".checkpoints")


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
        CheckpointError: the file is missing, truncated, damaged, or no checkpoint of this library.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"the checkpoint {path} cannot be read: {error.strerror or error}"
        ) from error
    try:
        length = int.from_bytes(content[:8], "little")
        if len(content) < 8 + length:
            raise ValueError("it ends too soon")
        header = json.loads(content[8 : 8 + length])
        metadata = header.get("__metadata__", {})
        if metadata.get("format") != FORMAT:
            raise CheckpointError(f"{path} is no checkpoint of sefi_fast")
        if int(metadata["format_version"]) > FORMAT_VERSION:
            raise CheckpointError(
                f"the checkpoint {path} was written by sefi_fast {metadata['library_version']} in "
                "a format newer than this version reads; update sefi_fast"
            )
        checksum = metadata.pop("checksum")
        if checksum != _checksum(header, content[8 + length :]):
            raise ValueError("its checksum is wrong")
        return Checkpoint(
            step=int(metadata["step"]),
            settings=json.loads(metadata["settings"]),
            identity=json.loads(metadata["identity"]),
            tensors=safetensors.torch.load(content),
        )
    except CheckpointError:
        raise
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"the checkpoint {path} is damaged: {error}") from error


def _content(checkpoint: Checkpoint) -> bytes:
    tensors = {name: tensor.contiguous() for name, tensor in checkpoint.tensors.items()}
    plain = safetensors.torch.save(tensors)
    start = 8 + int.from_bytes(plain[:8], "little")
    data = plain[start:]
    header = json.loads(plain[8:start])
    metadata = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "library_version": __version__,
        "step": str(checkpoint.step),
        "settings": json.dumps(checkpoint.settings, sort_keys=True),
        "identity": json.dumps(checkpoint.identity, sort_keys=True),
    }
    header["__metadata__"] = metadata
    metadata["checksum"] = _checksum(header, data)
    text = _canonical(header)
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data


def _checksum(header: Mapping[str, Any], data: bytes) -> str:
    return f"{zlib.crc32(data, zlib.crc32(_canonical(header))):08x}"


def _canonical(header: Mapping[str, Any]) -> bytes:
    return json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
