"""Settings as a YAML or JSON file: written whole or not at all, read with every name checked."""

from __future__ import annotations

import importlib
import json
import os
import types
import typing
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from sefi_fast.training.config import TrainConfig, named_with_nearest
from sefi_fast.utils.files import atomic_write

RUN_KEYS = (
    "image", "mask", "model", "model_config", "vae", "class_word", "placeholder", "output", "preset"
)  # fmt: skip
"""What a run's file may name beside the fields of TrainConfig."""


class RunFile(NamedTuple):
    """A file's contents: fields of TrainConfig, preset included, and what the run was given."""

    fields: dict[str, Any]
    run: dict[str, Any]


def write_settings(path: str | os.PathLike[str], settings: Mapping[str, Any]) -> None:
    """Write a flat mapping to a file: JSON if its name ends in .json, else YAML.

    Raises:
        OSError: the file cannot be written.
    """
    target = Path(path)
    if target.suffix.lower() == ".json":
        text = json.dumps(dict(settings), indent=2, ensure_ascii=False) + "\n"
    else:
        yaml = importlib.import_module("yaml")
        text = yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True, width=100)
    atomic_write(target, text.encode())


def read_settings(path: str | os.PathLike[str]) -> RunFile:
    """Read a file that `write_settings` wrote or a person did.

    Paths of the run's files stand as they are, relative to the current folder.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no flat mapping, or holds an unknown name.
    """
    source = Path(path)
    values = _parse(source)
    known = [field.name for field in fields(TrainConfig)]
    unknown = sorted(set(values) - set(known) - set(RUN_KEYS))
    if unknown:
        raise ValueError(
            f"{source} holds unknown settings: {named_with_nearest(unknown, [*known, *RUN_KEYS])}; "
            f"the settings are {', '.join([*RUN_KEYS, *known])}"
        )
    run = {name: values.pop(name) for name in RUN_KEYS if name in values}
    for name, value in run.items():
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{source}: {name} must be a string, got {value!r}")
    given = {name: _number(name, value) for name, value in values.items()}
    preset = run.pop("preset", None)
    if preset is not None:
        from sefi_fast.training.presets import preset_settings

        given = {**preset_settings(preset), **given}
    return RunFile(given, run)


def _parse(source: Path) -> dict[str, Any]:
    try:
        text = source.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"there is no config file at {source}") from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"the config file {source} is no text: give a YAML or JSON file"
        ) from error
    except OSError as error:
        raise OSError(f"the config file {source} cannot be read: {error.strerror}") from error
    yaml = importlib.import_module("yaml")
    try:
        # JSON is YAML too.
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"the config file {source} is no YAML: {reason}") from error
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise ValueError(
            f"the config file {source} must hold settings line by line, as 'steps: 600', got "
            f"{type(values).__name__}"
        )
    return values


def _number(name: str, value: Any) -> Any:
    """YAML 1.1 takes 1e-3, without a point, for a word: meant is a number."""
    if not isinstance(value, str) or float not in _types_of(name):
        return value
    try:
        return float(value)
    except ValueError:
        return value


def _types_of(name: str) -> tuple[Any, ...]:
    hint = typing.get_type_hints(TrainConfig)[name]
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return typing.get_args(hint)
    return (hint,)
