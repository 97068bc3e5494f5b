"""Settings as a YAML or JSON file: written whole or not at all, read with every name checked."""

from __future__ import annotations

import json
import os
import re
import types
import typing
from collections import Counter
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from sefi_fast.errors import ConfigError
from sefi_fast.training.config import TrainConfig, named_with_nearest
from sefi_fast.utils.files import atomic_write, read_regular, user_path
from sefi_fast.utils.strict_json import parse_json
from sefi_fast.utils.text import printable

RUN_KEYS = (
    "image", "mask", "model", "model_config", "vae", "class_word", "placeholder", "output", "preset"
)  # fmt: skip
"""What a run's file may name beside the fields of TrainConfig."""
_LINE_ENDS = "\x85\u2028\u2029"
_SIZE_LIMIT = 2 * 2**20
_MOST_LEVELS = 8
_MOST_VALUES = 10_000


class RunFile(NamedTuple):
    """A file's contents: fields of TrainConfig, preset included, and what the run was given."""

    fields: dict[str, Any]
    run: dict[str, Any]


def write_settings(path: str | os.PathLike[str], settings: Mapping[str, Any]) -> None:
    """Write a flat mapping to a file: JSON if its name ends in .json, else YAML.

    Raises:
        OSError: the file cannot be written.
    """
    target = user_path(path)
    if target.suffix.lower() == ".json":
        text = json.dumps(dict(settings), indent=2, ensure_ascii=False) + "\n"
    else:
        # PyYAML folds these line ends unless it escapes all but ASCII.
        folded = any(end in json.dumps(dict(settings), ensure_ascii=False) for end in _LINE_ENDS)
        text = yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=not folded, width=100)
    # Half a character of a path: JSON has the same escape.
    atomic_write(target, text.encode(errors="backslashreplace"))


def read_settings(path: str | os.PathLike[str]) -> RunFile:
    """Read a file that `write_settings` wrote or a person did.

    Paths of the run's files stand as they are, relative to the current folder.

    Raises:
        OSError: the file cannot be read.
        ConfigError: it is not a flat mapping, holds an unknown name, or a value that TrainConfig
            refuses.
    """
    source = user_path(path)
    values = _parse(source)
    known = [field.name for field in fields(TrainConfig)]
    unknown = sorted(set(values) - set(known) - set(RUN_KEYS))
    if unknown:
        raise ConfigError(
            f"{source} holds unknown settings: {named_with_nearest(unknown, [*known, *RUN_KEYS])}; "
            f"the settings are {', '.join([*RUN_KEYS, *known])}"
        )
    run = {name: values.pop(name) for name in RUN_KEYS if name in values}
    for name, value in run.items():
        if value is not None and not isinstance(value, str):
            raise ConfigError(f"{source}: {name} must be a string, got {value!r}")
    given = {name: _number(name, value) for name, value in values.items()}
    try:
        TrainConfig.from_overrides(None, given)
        preset = run.pop("preset", None)
        if preset is not None:
            from sefi_fast.training.presets import preset_settings

            given = {**preset_settings(preset), **given}
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{source}: {error}") from error
    return RunFile(given, run)


def _parse(source: Path) -> dict[str, Any]:
    try:
        text = read_regular(source, _SIZE_LIMIT).decode("utf-8-sig")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"there is no config file at {source}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"the config file {source} is no text: give a YAML or JSON file in UTF-8"
        ) from error
    except OSError as error:
        raise OSError(
            printable(f"the config file {source} cannot be read: {error.strerror}")
        ) from error
    is_json = source.suffix.lower() == ".json"
    try:
        values = parse_json(text) if is_json else yaml.load(text, _Loader)
    except (ValueError, yaml.YAMLError) as error:
        kind, reason = "JSON" if is_json else "YAML", " ".join(str(error).split())
        raise ConfigError(f"the config file {source} is no {kind}: {reason}") from error
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise ConfigError(
            f"the config file {source} must hold settings line by line, as 'steps: 600', got "
            f"{type(values).__name__}"
        )
    return values


class _Loader(yaml.SafeLoader):
    """YAML of settings: nothing stands for something else, and whole numbers are decimal."""

    # Without 0600 for 384, 1:30 for 90, dates, and keys that merge.
    yaml_implicit_resolvers = {
        first: [
            (tag, pattern)
            for tag, pattern in resolvers
            if tag.rpartition(":")[2] not in ("int", "float", "timestamp", "merge", "value")
        ]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    _level = 0
    _values = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if getattr(event, "anchor", None) is not None or getattr(event, "tag", None) is not None:
            raise yaml.YAMLError("anchors, aliases and tags (&, * and !) are not read")
        if self._level == _MOST_LEVELS or self._values == _MOST_VALUES:
            raise yaml.YAMLError(
                f"it is nested more than {_MOST_LEVELS} levels deep, or has more than "
                f"{_MOST_VALUES} values"
            )
        self._level += 1
        self._values += 1
        node = super().compose_node(parent, index)
        self._level -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if len(set(names)) < len(names):
            twin = Counter(names).most_common(1)[0][0]
            raise yaml.YAMLError(f"{twin!r} stands in it twice")
        return super().construct_mapping(node, deep)


# Each a part of what YAML 1.1 takes for a number, so that a text is quoted wherever it must be.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int",
    re.compile(r"[-+]?(?:0|[1-9][0-9_]{0,30})$"),
    list("-+0123456789"),
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"(?:[-+]?[0-9][0-9_]*\.[0-9_]*|\.[0-9]+)(?:[eE][-+][0-9]+)?$"),
    list("-+.0123456789"),
)


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
