"""The results of many subjects, one line of JSON each, written by one or several processes."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from sefi_fast.errors import printable
from sefi_fast.subject import Subject
from sefi_fast.subject.subject import summarise
from sefi_fast.training.manifest import Shard
from sefi_fast.training.subject_state import SubjectSpec
from sefi_fast.utils.files import atomic_write, read_regular, remove_partials
from sefi_fast.utils.strict_json import parse_json

logger = logging.getLogger(__name__)

FILE = "summary.jsonl"
_PART_LIMIT = 2**30


class ManyResult(NamedTuple):
    """The result of one subject of `train_many`.

    name: the subject's. path: its file; None if there is none. subject: None if it failed. error:
    why it failed; None if it did not. before: whether an earlier run had trained it.
    """

    name: str
    path: Path | None
    subject: Subject | None
    error: Exception | None = None
    before: bool = False


class Summary:
    """The file `summary.jsonl`, a line for each subject in the order of the manifest.

    Each of several processes writes its own lines to a file next to it; the last one joins them.
    """

    def __init__(self, folder: Path, shard: Shard) -> None:
        self._folder = folder
        self._parts = [
            folder / f".{FILE}.{index + 1}-of-{shard.count}" for index in range(shard.count)
        ]
        self._own = self._parts[shard.index]
        self._alone = shard.count == 1
        # Of killed runs, with as many processes or another number. No process has begun to write.
        for part in folder.glob(f".{FILE}.[0-9]*-of-[0-9]*"):
            part.unlink(missing_ok=True)
        for path in (folder / FILE, self._own):
            remove_partials(path)

    def write(self, rows: Iterable[dict[str, Any]]) -> None:
        """Write the lines of this process so far, whole or not at all."""
        atomic_write(self._folder / FILE if self._alone else self._own, _lines(rows))

    def join(self) -> None:
        """Join the lines of all processes to one file, if every process has ended."""
        if self._alone:
            return
        try:
            texts = [read_regular(part, _PART_LIMIT).decode() for part in self._parts]
            rows = [parse_json(line) for text in texts for line in text.splitlines()]
            ended, lines = all(row["state"] != "open" for row in rows), _lines(rows)
        except FileNotFoundError:
            # Another process is still at work, or has joined them all.
            return
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning(
                "%s is not written, because a process's part of it is damaged: %s", FILE, error
            )
            return
        if ended:
            atomic_write(self._folder / FILE, lines)
            for part in self._parts:
                part.unlink(missing_ok=True)


def row_of(number: int, spec: SubjectSpec, result: ManyResult | None) -> dict[str, Any]:
    """Return the line of a subject; one without a result is still open."""
    image = spec.image
    row: dict[str, Any] = {
        "number": number,
        "name": spec.name,
        "placeholder": spec.placeholder,
        "image": str(image) if isinstance(image, (str, Path)) else type(image).__name__,
        "state": "open",
    }
    if result is None:
        return row
    row["state"] = "failed" if result.error else "before" if result.before else "trained"
    if result.error is not None:
        row["error"] = printable(f"{type(result.error).__name__}: {result.error}")
    if result.subject is not None and result.path is not None:
        row["file"] = result.path.name
        row["class_word"] = result.subject.class_word
        row = {**(summarise(result.subject.history) or result.subject.summary), **row}
    return row


def _lines(rows: Iterable[dict[str, Any]]) -> bytes:
    ordered = sorted(rows, key=lambda row: row["number"])
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ordered)
    # JSON writes a lone surrogate as Python escapes it.
    return text.encode(errors="backslashreplace")
