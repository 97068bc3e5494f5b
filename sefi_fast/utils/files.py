"""Turn what users give into paths; read regular files only; write files whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import stat
import zlib
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from sefi_fast.errors import PathError

_PIECE = 2**20
LONGEST_NAME = 255
"""Bytes of a file name that almost every file system takes."""
_LONGEST_STEM = 32
_NO_SYNC = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


def expanded(given: str | os.PathLike[str]) -> str:
    """Return a path as the user means it: ~ and ~name in front are home folders.

    Raises:
        PathError: there is no such home folder, or the text cannot be a path.
    """
    text = os.fspath(given)
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        raise PathError(f"The path {text} holds half a character. Write it again.") from None
    if "\0" in text:
        raise PathError(f"The path {text} holds a null character. Leave it out.")
    found = os.path.expanduser(text)
    # A file may have such a name: "~draft.png".
    if found.startswith("~") and not os.path.lexists(found):
        raise PathError(
            f"The path {text} begins with a home folder that is not there. Give the whole path, "
            f"or ./{text} for a file of that name in the current folder."
        )
    return found


def user_path(given: str | os.PathLike[str]) -> Path:
    """Return the path that the user means by a text or a path.

    Raises:
        PathError: as `expanded`.
    """
    path = Path(expanded(given))
    # pathlib drops the "./" that keeps a "~" from being expanded again.
    return path.absolute() if str(path).startswith("~") else path


def fitting_name(name: str, limit: int) -> str:
    """Return a file name, or a short one made of it if it is longer than `limit` bytes."""
    encoded = os.fsencode(name)
    return name if len(encoded) <= limit else hashlib.sha256(encoded).hexdigest()[:_LONGEST_STEM]


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

    Where `path` is a link, the file that it leads to is written, and the link stays.

    Raises:
        OSError: the file cannot be written, or the link leads nowhere. An earlier file at `path`
            is unchanged, and no temporary file remains.
    """
    target = _target(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(target.parent, target.name)
    try:
        _write_synced(partial, content)
        os.replace(partial, target)
    except OSError as error:
        # A full disk names no file, and other errors name the temporary one.
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        partial.unlink(missing_ok=True)
    _sync_folder(target.parent)


def try_atomic_write(path: Path) -> None:
    """Do all that `atomic_write` does and take it back; a file that is there stays as it is.

    Raises:
        OSError: `atomic_write` would fail.
    """
    target = _target(path.absolute())
    folder = _nearest_folder(target.parent)
    for name in target.relative_to(folder).parts:
        # It tells a name that is too long, in folders that are yet to be made too.
        with suppress(FileNotFoundError):
            os.lstat(folder / name)
    own = folder == target.parent and not target.exists()
    if target.is_file():
        _check_mutable(target)
    written = [_partial(folder, target.name), target if own else _partial(folder, target.name)]
    try:
        _write_synced(written[0], b"try")
        if not own:
            _write_synced(written[1], b"try")
        os.replace(*written)
    finally:
        for place in written:
            place.unlink(missing_ok=True)


def remove_partials(path: Path) -> None:
    """Remove temporary files of `atomic_write` to this path that killed processes left."""
    target = Path(os.path.realpath(path))
    stem = re.escape(fitting_name(target.name, _LONGEST_STEM))
    pattern = re.compile(rf"\.{stem}\.[0-9a-f]{{8}}")
    if target.parent.is_dir():
        for entry in target.parent.iterdir():
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


def _write_synced(path: Path, content: bytes) -> None:
    with open(path, "xb") as stream:
        stream.write(content)
        stream.flush()
        try:
            os.fsync(stream.fileno())
        except OSError as error:
            # Mounted cloud folders cannot sync, and take the file all the same.
            if error.errno not in _NO_SYNC:
                raise


def _check_mutable(path: Path) -> None:
    """Raise OSError for a file that cannot be replaced; one without write permission can be."""
    try:
        os.close(os.open(path, os.O_WRONLY))
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.ETXTBSY):
            raise


def _partial(folder: Path, name: str) -> Path:
    """A new temporary name, short even where the final one is as long as can be."""
    return folder / f".{fitting_name(name, _LONGEST_STEM)}.{secrets.token_hex(4)}"


def _target(path: Path) -> Path:
    """The file that a link leads to; of anything else the path itself.

    Raises:
        OSError: the link leads nowhere, or a device, a pipe or a socket is there.
    """
    target = path
    if path.is_symlink():
        try:
            target = Path(os.path.realpath(path, strict=True))
        except OSError as error:
            raise _leads_nowhere(path) from error
    if os.path.exists(target) and not (target.is_file() or target.is_dir()):
        raise OSError(errno.EINVAL, "it is a device, a pipe or a socket", str(path))
    return target


def _nearest_folder(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    for place in (folder, *folder.parents):
        try:
            os.lstat(place)
        except FileNotFoundError:
            continue
        if place.is_dir():
            return place
        if place.is_symlink():
            raise _leads_nowhere(place)
        raise NotADirectoryError(errno.ENOTDIR, "it is a file, not a folder", str(place))
    raise FileNotFoundError(errno.ENOENT, "there is no such folder", str(folder))


def _leads_nowhere(link: Path) -> FileNotFoundError:
    return FileNotFoundError(errno.ENOENT, f"{link} is a link that leads nowhere", str(link))
