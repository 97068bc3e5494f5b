"""Files of a run: find out before it whether they can be written."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable
from pathlib import Path

from sefi_fast.utils.files import try_atomic_write, user_path


def check_output(output: str | os.PathLike[str]) -> Path:
    """The path of the file to write, if it can be written; nothing is left on disk.

    Raises:
        OSError: the path is a folder or a link that leads nowhere, or saving would fail.
    """
    path = user_path(output)
    if os.path.isdir(path):
        raise IsADirectoryError(
            f"output {path} is a folder: give the name of a file, as {path / 'me.safetensors'}"
        )
    try:
        try_atomic_write(path)
    except OSError as error:
        raise OSError(
            f"output {path} cannot be written ({error.strerror or error}): choose another place "
            "or a shorter name"
        ) from error
    return path


def check_folder(output: str | os.PathLike[str], *, make: bool = True) -> Path:
    """The folder if files can be made in it; made if it is missing, unless it is to stay so.

    Raises:
        OSError: the path is a file or a link that leads nowhere, or nothing can be made there.
    """
    folder = user_path(output)
    if os.path.exists(folder) and not folder.is_dir():
        raise NotADirectoryError(f"output {folder} is a file: give the name of a folder")
    try:
        try_atomic_write(folder / f".{secrets.token_hex(4)}")
        if make:
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"output {folder} cannot be written ({error.strerror or error}): choose another folder"
        ) from error
    return folder


def is_one_of(path: Path, sources: Iterable[object]) -> bool:
    """Whether a path is that of a file among `sources`; those that are no paths are passed over."""
    # Path.resolve raises RuntimeError for links that lead to each other.
    place = os.path.realpath(path)
    files = (user_path(x) for x in sources if isinstance(x, (str, os.PathLike)))
    return any(os.path.realpath(file) == place for file in files)
