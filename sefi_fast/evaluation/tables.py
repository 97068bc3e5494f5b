"""Tables of scores as CSV and Markdown."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from sefi_fast.utils.files import atomic_write


def csv_bytes(rows: Iterable[Mapping[str, object]]) -> bytes:
    """Return rows as CSV, with all their columns in the order in which they appear."""
    listed = list(rows)
    stream = io.StringIO()
    names = dict.fromkeys(name for row in listed for name in row)
    writer = csv.DictWriter(stream, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(listed)
    return stream.getvalue().encode()


def markdown_table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return rows of cells as a table in Markdown."""
    lines = [f"| {' | '.join(titles)} |", "|" + "---|" * len(titles)]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join(lines) + "\n"


def write_files(folder: Path, contents: Mapping[str, bytes]) -> list[Path]:
    """Write files by name into a folder, each whole or not at all, and return their paths.

    Raises:
        OSError: a file cannot be written.
    """
    for name, content in contents.items():
        atomic_write(folder / name, content)
    return [folder / name for name in contents]
