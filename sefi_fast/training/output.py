"""Files of a run: find out before it whether they can be written."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path


def check_output(output: str | os.PathLike[str]) -> Path:
    """The path of the file to write, if it can be written; nothing is left on disk.

    Raises:
        OSError: the path is a folder, or files cannot be made where it lies.
    """
    path = Path(output)
    if path.is_dir():
        raise IsADirectoryError(
            f"output {path} is a folder: give the name of a file, as {path / 'me.safetensors'}"
        )
    # Saving makes missing folders.
    folder = _nearest(path.absolute().parent)
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(
            f"output {path} cannot be written, since no file can be made in {folder} "
            f"({error.strerror or error}): choose another place"
        ) from error
    return path


def check_folder(output: str | os.PathLike[str], *, make: bool = True) -> Path:
    """The folder if files can be made in it; made if it is missing, unless it is to stay so.

    Raises:
        OSError: the path is a file, or nothing can be made there.
    """
    folder = Path(output)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"output {folder} is a file: give the name of a folder")
    try:
        if make:
            folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=_nearest(folder.absolute())):
            pass
    except OSError as error:
        raise OSError(
            f"output {folder} cannot be written ({error.strerror or error}): choose another folder"
        ) from error
    return folder


def is_one_of(path: Path, sources: Iterable[object]) -> bool:
    """Whether a path is that of a file among `sources`; those that are no paths are passed over."""
    # Path.resolve raises RuntimeError for links that lead to each other.
    place = os.path.realpath(path)
    files = (os.path.expanduser(x) for x in sources if isinstance(x, (str, os.PathLike)))
    return any(os.path.realpath(file) == place for file in files)


def _nearest(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder
