"""Paths of users, reading of regular files with a limit, and atomic writing."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import stat
import zlib
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from sefi_fast.errors import PathError

MOST_STAGES = 100
"""Stages of a subject: more than a sampler has steps. A prompt of SDXL then takes 126 MB."""
MOST_VECTORS = 75
"""Vectors of a subject: the tokens of a CLIP prompt between its start and its end."""
MOST_TEXT_ENCODERS = 4
LONGEST_NAME = 255
"""Bytes of a file name that almost every file system takes."""

_CHUNK = 2**20
_LONGEST_STEM = 32
_NO_SYNC = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


def expanded(given: str | os.PathLike[str]) -> str:
    """Expand ~ and ~name at the start of a path to home folders.

    Raises:
        PathError: there is no such home folder, or the text cannot be a path.
    """
    text = os.fspath(given)
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        raise PathError(f"The path {text} holds an unpaired surrogate. Write it again.") from None
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
    """Return `expanded` as a Path. Applying it twice changes nothing.

    Raises:
        PathError: as `expanded`.
    """
    path = Path(expanded(given))
    # pathlib drops the "./" that keeps a "~" from being expanded again.
    return path.absolute() if str(path).startswith("~") else path


def fitting_name(name: str, limit: int) -> str:
    """Return a file name, or a short hash of it if it is longer than `limit` bytes."""
    encoded = os.fsencode(name)
    return name if len(encoded) <= limit else hashlib.sha256(encoded).hexdigest()[:_LONGEST_STEM]


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a regular file, or a link to one, for reading.

    Raises:
        OSError: the file is missing or unreadable, or it is a folder, a device, a FIFO or a socket.
            Nothing was read.
    """
    try:
        # Without O_NONBLOCK, open waits for the writer of a FIFO.
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
        while chunk := stream.read(_CHUNK):
            value = zlib.crc32(chunk, value)
    return f"{value:08x}"


def _check_size(stream: BinaryIO, path: str | os.PathLike[str], limit: int) -> int:
    size = os.fstat(stream.fileno()).st_size
    if size > limit:
        reason = f"it has {size:,} bytes, and at most {limit:,} are read"
        raise OSError(errno.EFBIG, reason, str(path))
    return size


def check_output(output: str | os.PathLike[str]) -> Path:
    """Return the path of a file to write if it can be written. Nothing is left on disk.

    Raises:
        OSError: the path is a folder or a dangling link, or saving would fail.
    """
    path = user_path(output)
    if os.path.isdir(path):
        raise IsADirectoryError(
            f"output {path} is a folder: give the name of a file, as {path / 'me.safetensors'}"
        )
    _check_writable(path, path, "another place or a shorter name")
    return path


def check_folder(output: str | os.PathLike[str], *, make: bool = True) -> Path:
    """Return a folder if files can be written in it. Create it if `make` is True.

    Raises:
        OSError: the path is a file or a dangling link, or nothing can be written there.
    """
    folder = user_path(output)
    if os.path.exists(folder) and not folder.is_dir():
        raise NotADirectoryError(f"output {folder} is a file: give the name of a folder")
    _check_writable(folder, folder / f".{secrets.token_hex(4)}", "another folder")
    if make:
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def _check_writable(output: Path, file: Path, advice: str) -> None:
    try:
        try_atomic_write(file)
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"output {output} cannot be written ({reason}): choose {advice}") from error


def is_one_of(path: Path, sources: Iterable[object]) -> bool:
    """Return whether a path is the same file as one of `sources`; ignore those without a path."""
    # Path.resolve raises RuntimeError for links that lead to each other.
    place = os.path.realpath(path)
    files = (user_path(x) for x in sources if isinstance(x, (str, os.PathLike)))
    return any(os.path.realpath(file) == place for file in files)


def atomic_write(path: Path, content: bytes) -> None:
    """Write a temporary file next to `path`, sync it and rename it. Create missing folders.

    If `path` is a link, its target is written and the link stays.

    Raises:
        OSError: the file cannot be written, or the link is dangling. An earlier file at `path` is
            unchanged, and no temporary file remains.
    """
    target = _target(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(target.parent, target.name)
    try:
        _write_synced(partial, content)
        os.replace(partial, target)
    except OSError as error:
        # The error of a full disk names no file, others name the temporary one.
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        partial.unlink(missing_ok=True)
    # Some systems cannot sync a folder, which only a power cut would show.
    with suppress(OSError):
        handle = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def try_atomic_write(path: Path) -> None:
    """Do what `atomic_write` does and undo it. An existing file is unchanged.

    Raises:
        OSError: `atomic_write` would fail.
    """
    target = _target(path.absolute())
    folder = _nearest_folder(target.parent)
    for name in target.relative_to(folder).parts:
        # Raises for a name that is too long.
        with suppress(FileNotFoundError):
            os.lstat(folder / name)
    if target.is_file():
        _check_mutable(target)
    source = _partial(folder, target.name)
    is_new = folder == target.parent and not target.exists()
    destination = target if is_new else _partial(folder, target.name)
    try:
        _write_synced(source, b"try")
        if not is_new:
            _write_synced(destination, b"try")
        os.replace(source, destination)
    finally:
        source.unlink(missing_ok=True)
        destination.unlink(missing_ok=True)


def remove_partials(path: Path) -> None:
    """Remove temporary files that killed processes left while they wrote to this path."""
    target = Path(os.path.realpath(path))
    stem = re.escape(fitting_name(target.name, _LONGEST_STEM))
    pattern = re.compile(rf"\.{stem}\.[0-9a-f]{{8}}")
    if target.parent.is_dir():
        for entry in target.parent.iterdir():
            if pattern.fullmatch(entry.name):
                entry.unlink(missing_ok=True)


def _partial(folder: Path, name: str) -> Path:
    """Return a new temporary name, short even if the final name has the maximal length."""
    return folder / f".{fitting_name(name, _LONGEST_STEM)}.{secrets.token_hex(4)}"


def _write_synced(path: Path, content: bytes) -> None:
    with open(path, "xb") as stream:
        stream.write(content)
        stream.flush()
        try:
            os.fsync(stream.fileno())
        except OSError as error:
            # Mounted cloud folders cannot sync.
            if error.errno not in _NO_SYNC:
                raise


def _check_mutable(path: Path) -> None:
    """Raise OSError for a file that cannot be replaced; one without write permission can be."""
    try:
        os.close(os.open(path, os.O_WRONLY))
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.ETXTBSY):
            raise


def _target(path: Path) -> Path:
    """Return the path or the target of a link; refuse a dangling link, a device and a pipe."""
    target = path
    if path.is_symlink():
        try:
            target = Path(os.path.realpath(path, strict=True))
        except OSError as error:
            raise _dangling(path) from error
    if os.path.exists(target) and not (target.is_file() or target.is_dir()):
        raise OSError(errno.EINVAL, "it is a device, a pipe or a socket", str(path))
    return target


def _nearest_folder(folder: Path) -> Path:
    """Return the folder, or the nearest existing one above it."""
    for place in (folder, *folder.parents):
        try:
            os.lstat(place)
        except FileNotFoundError:
            continue
        if place.is_dir():
            return place
        if place.is_symlink():
            raise _dangling(place)
        raise NotADirectoryError(errno.ENOTDIR, "it is a file, not a folder", str(place))
    raise FileNotFoundError(errno.ENOENT, "there is no such folder", str(folder))


def _dangling(link: Path) -> FileNotFoundError:
    return FileNotFoundError(errno.ENOENT, f"{link} is a link that leads nowhere", str(link))
