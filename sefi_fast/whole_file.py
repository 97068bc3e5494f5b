"""Files that are written whole or not at all, and last through a power cut."""

from __future__ import annotations

import os
import re
import secrets
from pathlib import Path


def write_whole(path: Path, content: bytes) -> None:
    """Write a file beside its place and move it there when it is on the disk, missing folders too.

    Raises:
        OSError: it cannot be written; what lay at `path` before still does, and nothing else.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with open(partial, "xb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def remove_partials(path: Path) -> None:
    """Remove what killed processes left of writing `path`: .<name>.<8 hexadecimal digits>."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{8}}")
    if path.parent.is_dir():
        for entry in path.parent.iterdir():
            if pattern.fullmatch(entry.name):
                entry.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make a renaming last through a power cut, where the system can."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)
