"""What a command writes: whether it can is found out first, and no file that it reads is lost."""

from __future__ import annotations

import argparse
import io
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sefi_fast.training.output import check_folder, check_output, is_one_of
from sefi_fast.utils.files import atomic_write, remove_partials
from sefi_fast.utils.text import printable

if TYPE_CHECKING:
    from PIL import Image

logger = logging.getLogger(__name__)

_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


def report(text: object) -> None:
    """Print a line on standard output, whatever a file or an argument put into it."""
    print(printable(str(text)))


def check_kept(outputs: Iterable[Path], inputs: Sequence[str | Path | None]) -> None:
    """Raise ValueError if one of the outputs is a file that the command reads."""
    for path in outputs:
        if is_one_of(path, inputs):
            raise ValueError(
                f"{path} would be overwritten, and this command reads it: give the output another "
                "name"
            )


def check_safetensors(path: Path) -> None:
    """Raise ValueError or OSError if no safetensors file can be written there."""
    _check_suffix(path, (".safetensors",))
    check_output(path)


def check_sheet(options: argparse.Namespace, path: Path) -> None:
    """Raise ValueError or OSError if a command that draws cannot leave its picture there."""
    _check_suffix(path, tuple(_FORMATS))
    check_output(path)
    check_kept([path], _read_by(options))


def check_pictures_folder(options: argparse.Namespace, folder: Path) -> None:
    """Raise ValueError or OSError if a command that draws cannot leave its pictures there."""
    check_folder(folder, make=False)
    paths = [_numbered(folder, options.seed + number) for number in range(options.number)]
    check_kept(paths, _read_by(options))
    for path in paths:
        check_output(path)


def save_pictures(pictures: Sequence[Image.Image], folder: Path, seed: int) -> None:
    """Write each picture under the number of its seed, and print where."""
    for number, picture in enumerate(pictures, seed):
        path = _numbered(folder, number)
        write_picture(path, picture)
        report(path)


def write_picture(path: Path, picture: Image.Image) -> None:
    """Write a picture in the format of its name, whole or not at all, missing folders too."""
    remove_partials(path)
    stream = io.BytesIO()
    picture.save(stream, format=_FORMATS[path.suffix.lower()])
    atomic_write(path, stream.getvalue())


def leave_picture(path: Path, what: str, draw: Callable[[], Image.Image]) -> bool:
    """Leave a picture of a run, or warn: the subject is there, whatever becomes of a picture."""
    try:
        write_picture(path, draw())
    except Exception as error:
        logger.warning("%s could not be drawn to %s: %s", what, path, error)
        return False
    return True


def _numbered(folder: Path, seed: int) -> Path:
    return folder / f"{seed:05d}.png"


def _read_by(options: argparse.Namespace) -> list[Path | None]:
    """The pictures that steer a command that draws (`pictures.add_pictures`)."""
    return [options.image, options.mask, *options.control_image]


def _check_suffix(path: Path, known: tuple[str, ...]) -> None:
    if path.suffix.lower() not in known:
        raise ValueError(f"output {str(path)!r} must end in {' or '.join(known)}")
