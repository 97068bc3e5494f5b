"""The list of subjects that `train_many` trains, and its shards."""

from __future__ import annotations

import csv
import io
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from sefi_fast.errors import PathError, SefiError, TrainingError, printable
from sefi_fast.training.subject_state import SubjectSpec
from sefi_fast.utils.files import expanded, read_regular, user_path
from sefi_fast.utils.strict_json import parse_json
from sefi_fast.utils.text import check_placeholder, composed, is_unicode, placeholder_for

logger = logging.getLogger(__name__)

COLUMNS = (
    "image", "class_word", "name", "placeholder", "seed", "scene", "mask", "model", "model_config",
    "vae",
)  # fmt: skip
"""Fields of `SubjectSpec` that a manifest may hold."""
# fmt: off
IMAGE_SUFFIXES = (
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".avif", ".bmp", ".tif", ".tiff",
    ".gif", ".jp2", ".j2k", ".ppm", ".pgm", ".pbm", ".pnm",
)
_UNREADABLE_SUFFIXES = (
    ".heic", ".heif", ".hif", ".jxl", ".svg", ".eps", ".ai", ".pdf", ".psd", ".xcf", ".ico", ".tga",
    ".dds", ".exr", ".hdr", ".qoi", ".dng", ".raw", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2",
    ".raf", ".pef", ".srw",
)
# fmt: on
_MOST_PROBLEMS = 10
_ENOUGH_PROBLEMS = 1000
_LONGEST_PROBLEM = 300
_SIZE_LIMIT = 64 * 2**20
_LARGEST_CLASS_WORD = 2**16
_LONGEST_NAME = 120
_JSON_EXAMPLE = '{"image": "rex.jpg", "class_word": "dog"}'
_READERS: dict[str, Callable[[str], str]] = {
    "class_word": composed, "name": composed, "placeholder": check_placeholder, "scene": composed,
    "model": expanded, "model_config": expanded, "vae": expanded,
}  # fmt: skip
"""Checks of the columns that hold text, which return it in the form to use."""
_UNFIT = re.compile(r'[\x00-\x1f/\\:*?"<>|]')


class ManifestError(SefiError, ValueError):
    """The subjects to train cannot be read, or contradict one another; nothing was begun."""


def read_subjects(
    subjects: Any, model: Any = None, model_config: Any = None, vae: Any = None
) -> list[SubjectSpec]:
    """Return all subjects, each with its own name and placeholder.

    Args:
        subjects: a folder of images (a text file next to an image, `rex.txt` for `rex.jpg`, holds
            its class word); a .csv, .tsv or .jsonl file with the columns COLUMNS, of which `image`
            is needed, images relative to the file; or a list of images, of dictionaries with
            those keys, or of `SubjectSpec`.
        model, model_config, vae: of the run.

    Raises:
        ManifestError: there is no subject, a column or a value is unknown, two have one name, an
            image is missing, or they name several base models. The message lists the first ten
            problems, each with its line.
        TypeError: `subjects` is none of these.
    """
    problems: list[str] = []
    if isinstance(subjects, (str, os.PathLike)):
        path = user_path(subjects)
        specs = _read_path(path, problems)
        source = str(path)
    elif isinstance(subjects, Iterable) and not isinstance(subjects, Mapping):
        specs = _read_list(subjects, problems)
        source = "the list of subjects"
    else:
        raise TypeError(
            "subjects must be a folder, a .csv or .jsonl file, or a list of images or "
            f"dictionaries, got {type(subjects).__name__}"
        )
    if not specs and not problems:
        raise ManifestError(f"{source} is empty: give at least one subject")
    names: dict[str, SubjectSpec] = {}
    for spec in specs:
        # Two names that differ in case are one file on some systems.
        first = names.setdefault(spec.name.casefold(), spec)
        if first is not spec:
            problems.append(
                f"{spec.where}: the name {spec.name!r} is that of {first.where} already; give "
                "each subject its own name"
            )
    for key, given in (("model", model), ("model_config", model_config), ("vae", vae)):
        _check_same(specs, key, given, problems)
    if problems:
        raise ManifestError(
            f"{source} cannot be used; nothing was begun:{listed_problems(problems)}"
        )
    return _with_placeholders(specs)


def listed_problems(problems: Sequence[str]) -> str:
    """Return the first ten problems, a line each, and the number of the others."""
    shown = [
        printable(problem, _LONGEST_PROBLEM).replace("\n", "\\n")
        for problem in problems[:_MOST_PROBLEMS]
    ]
    if len(problems) > len(shown):
        shown.append(f"and {len(problems) - len(shown)} more")
    return "".join(f"\n  {line}" for line in shown)


def model_of(specs: Iterable[SubjectSpec], key: str = "model") -> str | None:
    """Return the base model that the subjects name, if any does; or their model_config or vae."""
    return next((value for spec in specs if (value := getattr(spec, key)) is not None), None)


def _read_path(path: Path, problems: list[str]) -> list[SubjectSpec]:
    if path.is_dir():
        return _read_folder(path, problems)
    if not path.exists():
        raise ManifestError(
            f"there is no manifest at {path}: give a folder of images, or a .csv or .jsonl file"
        )
    suffix = path.suffix.lower()
    if suffix not in (".csv", ".tsv", ".jsonl", ".ndjson"):
        is_image = suffix in IMAGE_SUFFIXES
        hint = ": it is an image; give the folder it is in, or a list" if is_image else ""
        raise ManifestError(f"{path} is not a manifest (.csv, .tsv, .jsonl or a folder){hint}")
    try:
        text = read_regular(path, _SIZE_LIMIT).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ManifestError(f"{path} cannot be read as UTF-8 text: {error}") from error
    if suffix in (".csv", ".tsv"):
        rows = _csv_rows(text, "," if suffix == ".csv" else "\t", problems)
    else:
        rows = _json_rows(text, problems)
    specs = []
    for where, row in rows:
        if len(problems) >= _ENOUGH_PROBLEMS:
            problems.append(f"{where} and the lines that follow are not read")
            break
        if row is None:
            continue
        if (spec := _spec_of(row, f"{path.name} {where}", path.parent, problems)) is not None:
            specs.append(spec)
    return specs


def _read_folder(folder: Path, problems: list[str]) -> list[SubjectSpec]:
    files = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    images = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
    others = [path.name for path in files if path.suffix.lower() in _UNREADABLE_SUFFIXES]
    if not images:
        found = f", only {', '.join(others[:_MOST_PROBLEMS])}" if others else ""
        raise ManifestError(
            f"the folder {folder} holds no image ({', '.join(IMAGE_SUFFIXES)}){found}: give at "
            "least one"
        )
    if others:
        logger.warning(
            "%d images of %s are skipped, because their formats cannot be read. Save them as PNG "
            "or JPEG: %s%s", len(others), folder, printable(", ".join(others[:_MOST_PROBLEMS])),
            " …" if len(others) > _MOST_PROBLEMS else "",
        )  # fmt: skip
    specs = []
    for image in images:
        row: dict[str, Any] = {"image": image}
        text = image.with_suffix(".txt")
        if text.is_file():
            try:
                word = read_regular(text, _LARGEST_CLASS_WORD).decode("utf-8-sig").strip()
            except (OSError, UnicodeDecodeError) as error:
                problems.append(f"{text.name} cannot be read as UTF-8 text: {error}")
                continue
            if not word or "\n" in word:
                problems.append(f"{text.name} must hold one line, the class word of the subject")
                continue
            row["class_word"] = word
        if (spec := _spec_of(row, image.name, Path(), problems)) is not None:
            specs.append(spec)
    return specs


def _read_list(subjects: Iterable[Any], problems: list[str]) -> list[SubjectSpec]:
    specs = []
    for number, given in enumerate(subjects, 1):
        where = f"subject {number}"
        if isinstance(given, SubjectSpec):
            row = {name: getattr(given, name) for name in COLUMNS}
            where = given.where or where
        else:
            row = dict(given) if isinstance(given, Mapping) else {"image": given}
        if not isinstance(row.get("image"), (str, os.PathLike)):
            row["name"] = row.get("name") or f"subject-{number:06d}"
        # Half a character in a phrase is an error of this subject alone, raised when it is trained.
        broken: dict[str, Any] = {
            name: row[name]
            for name in ("class_word", "scene")
            if isinstance(row.get(name), str) and not is_unicode(row[name])
        }
        spec = _spec_of({**row, **dict.fromkeys(broken)}, where, Path(), problems)
        if spec is not None:
            specs.append(replace(spec, **broken))
    return specs


_Rows = Iterator[tuple[str, "dict[str, Any] | None"]]
"""The place of a row, and the row; None if its problem is listed already."""


def _csv_rows(text: str, delimiter: str, problems: list[str]) -> _Rows:
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    try:
        for cells in lines:
            if not any(cell.strip() for cell in cells):
                continue
            where = f"line {lines.line_num}"
            if header is None:
                header = [cell.strip() for cell in cells]
                if not _good_header(header, where, problems):
                    return
            elif len(cells) > len(header):
                problems.append(
                    f"{where} has {len(cells)} values for {len(header)} columns: put quotes round "
                    "a value that holds a comma"
                )
                yield where, None
            else:
                named = zip(header, (cell.strip() for cell in cells), strict=False)
                yield where, {name: cell for name, cell in named if cell}
    except csv.Error as error:
        problems.append(f"line {lines.line_num} is not CSV: {error}")


def _good_header(header: list[str], where: str, problems: list[str]) -> bool:
    before = len(problems)
    if unknown := [name for name in header if name not in COLUMNS]:
        problems.append(
            f"{where}: unknown column {', '.join(map(repr, unknown))}; the first line names the "
            f"columns, which are {', '.join(COLUMNS)}"
        )
    elif "image" not in header:
        problems.append(f"{where}: there is no column 'image'")
    if len(set(header)) < len(header):
        problems.append(f"{where}: a column is named twice")
    return len(problems) == before


def _json_rows(text: str, problems: list[str]) -> _Rows:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        row: Any = None
        try:
            row = parse_json(line)
            if not isinstance(row, dict):
                problems.append(f"line {number} must be a JSON object, as {_JSON_EXAMPLE}")
                row = None
        except ValueError as error:
            problems.append(f"line {number} is not JSON: {error}")
        yield f"line {number}", row


def _spec_of(
    row: dict[str, Any], where: str, folder: Path, problems: list[str]
) -> SubjectSpec | None:
    """Return the subject of one row; None if it has problems, which are added to `problems`."""
    found: list[str] = []
    if unknown := [str(name) for name in row if name not in COLUMNS]:
        found.append(
            f"unknown column {', '.join(map(repr, unknown))}; there are {', '.join(COLUMNS)}"
        )
    values = {name: value for name, value in row.items() if name in COLUMNS and value is not None}
    if not values.get("name") and isinstance(values.get("image"), (str, os.PathLike)):
        values["name"] = Path(values["image"]).stem
    for name, reader in _READERS.items():
        try:
            if isinstance(values.get(name), str) and values[name]:
                values[name] = reader(values[name])
            elif values.get(name):
                found.append(f"{name} must be text, got {values[name]!r}")
        except SefiError as error:
            found.append(f"{name}: {error}")
    if "seed" in values:
        values["seed"] = _seed(values["seed"], found)
    for name in ("image", "mask"):
        if isinstance(values.get(name), (bool, int, float, list, dict)):
            found.append(f"{name} must be the path of an image, got {values[name]!r}")
        elif isinstance(values.get(name), (str, os.PathLike)):
            try:
                values[name] = folder / user_path(values[name])
            except PathError as error:
                found.append(f"{name}: {error}")
                continue
            # Path.is_file raises for a name that is too long.
            if not os.path.isfile(values[name]):
                found.append(f"there is no image at {values[name]}")
    if "image" not in values:
        found.append("it has no image")
    if found:
        problems.extend(f"{where}: {problem}" for problem in found)
        return None
    name = values["name"]
    if _UNFIT.search(name) or name.startswith(".") or name != name.strip():
        problems.append(
            f'{where}: the name {name!r} is not a file name: leave out / \\ : * ? " < > |, a '
            "leading point and spaces at the ends"
        )
    elif len(name.encode()) > _LONGEST_NAME:
        problems.append(
            f"{where}: the name {name!r} is longer than {_LONGEST_NAME} bytes: give a shorter one"
        )
    else:
        return SubjectSpec(**values, where=where)
    return None


def _with_placeholders(specs: list[SubjectSpec]) -> list[SubjectSpec]:
    """Give subjects without a placeholder one made of their name, distinct from the others."""
    plain = [spec.placeholder or placeholder_for(spec.name) for spec in specs]
    taken = Counter(plain)
    return [
        spec
        if spec.placeholder
        # No name holds a colon; of "rex 1" and "rex-1" the second keeps the plain form.
        else replace(spec, placeholder=placeholder_for(spec.name, space=":"))
        if taken[word] > 1
        else replace(spec, placeholder=word)
        for spec, word in zip(specs, plain, strict=True)
    ]


def _seed(value: Any, found: list[str]) -> int | None:
    if isinstance(value, str) and re.fullmatch(r"\d{1,19}", value):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
        found.append(f"seed must be a whole number from 0 to 2**63 - 1, got {value!r}")
        return None
    return value


def _check_same(specs: list[SubjectSpec], key: str, given: Any, problems: list[str]) -> None:
    """Find subjects that name another model, model_config or vae than the run or the first."""
    named = [(spec.where, value) for spec in specs if (value := getattr(spec, key)) is not None]
    where, first = named[0] if named else ("", None)
    if given is not None:
        path = isinstance(given, (str, os.PathLike))
        where, first = "the run", os.fspath(given) if path else f"a ready {type(given).__name__}"
    kind = "base model" if key == "model" else key
    problems.extend(
        f"{place} names the {kind} {name!r}, {where} {first!r}: one run trains on one model, "
        "so make a manifest for each"
        for place, name in named
        if name != first
    )


Item = TypeVar("Item")


@dataclass(frozen=True)
class Shard:
    """Process `index` of `count`; `state` is accelerate's, which gave it a device of its own."""

    index: int = 0
    count: int = 1
    state: Any = None

    def share(self, items: Sequence[Item]) -> list[Item]:
        """Return every `count`-th item from `index` on: each item goes to exactly one process."""
        return list(items[self.index :: self.count])

    def wait(self) -> None:
        """Wait until every process is here."""
        if self.state is not None:
            self.state.wait_for_everyone()


def current_shard() -> Shard:
    """Return the place of this process among those of a launcher; one of one without a launcher.

    Raises:
        TrainingError: accelerate was set up for fewer processes than were launched.
    """
    launched = int(os.environ.get("WORLD_SIZE") or 1)
    if launched < 2:
        return Shard()
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    # Without this argument accelerate sees no processes where there is no GPU.
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.cuda.is_available()
    state = PartialState(cpu=on_cpu)
    if state.num_processes != launched:
        raise TrainingError(
            f"{launched} processes were launched, but accelerate was set up for "
            f"{state.num_processes}, so each would train the same subjects: make its first "
            "PartialState or Accelerator with cpu=True on machines without a GPU"
        )
    return Shard(state.process_index, state.num_processes, state)
