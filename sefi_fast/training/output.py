"""Find out before a long run whether its result can be written."""

from __future__ import annotations

import os
import tempfile
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
    # Saving makes missing folders, so what counts is the nearest one that is there.
    folder = path.absolute().parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(
            f"output {path} cannot be written, since no file can be made in {folder} "
            f"({error.strerror or error}): choose another place"
        ) from error
    return path
