"""Read regular files only; write files whole or not at all."""

from __future__ import annotations

import errno
import os
import re
import secrets
import stat
import zlib
from pathlib import Path
from typing import BinaryIO

_PIECE = 2**20


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a regular file for reading, or a link to one.

    Raises:
        OSError: the file is missing or unreadable, or it is a folder, a device, a FIFO or a socket.
            Nothing was read and nothing waits.
    """
    try:
        # A FIFO without a writer would wait for one.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except ValueError as error:
        raise OSError(errno.EINVAL, str(error), str(path)) from error
    mode = os.fstat(handle).st_mode
    if not stat.S_ISREG(mode):
        os.close(handle)
        kind = "a folder" if stat.S_ISDIR(mode) else "a device, a pipe or a socket"
        raise OSError(errno.EINVAL, f"it is {kind}, not a regular file", str(path))
    return open(handle, "rb")


def read_regular(path: str | os.PathLike[str], limit: int) -> bytes:
    """Read a regular file of at most `limit` bytes.

    Raises:
        OSError: as `open_regular`, or the file is larger.
    """
    with open_regular(path) as stream:
        return stream.read(_check_size(stream, path, limit))


def checksum(path: str | os.PathLike[str], limit: int) -> str:
    """Return the CRC-32 of a regular file of at most `limit` bytes as 8 hexadecimal digits.

    Raises:
        OSError: as `read_regular`.
    """
    value = 0
    with open_regular(path) as stream:
        _check_size(stream, path, limit)
        while piece := stream.read(_PIECE):
            value = zlib.crc32(piece, value)
    return f"{value:08x}"


def _check_size(stream: BinaryIO, path: str | os.PathLike[str], limit: int) -> int:
    size = os.fstat(stream.fileno()).st_size
    if size > limit:
        reason = f"it has {size:,} bytes, and at most {limit:,} are read"
        raise OSError(errno.EFBIG, reason, str(path))
    return size


def atomic_write(path: Path, content: bytes) -> None:
    """Write a temporary file next to `path`, sync it and rename it; make missing folders.

    Raises:
        OSError: the file cannot be written. An earlier file at `path` is unchanged, and no
            temporary file remains.
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
    """Remove temporary files of killed processes: .<name>.<8 hexadecimal digits>."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{8}}")
    if path.parent.is_dir():
        for entry in path.parent.iterdir():
            if pattern.fullmatch(entry.name):
                entry.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut, where the system can."""
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
