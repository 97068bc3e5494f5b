"""Settings of training: their checks, presets and files."""

from __future__ import annotations

import difflib
import json
import os
import re
import sys
import types
import typing
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import yaml

from sefi_fast.errors import ConfigError, printable
from sefi_fast.utils.files import MOST_STAGES, atomic_write, read_regular, user_path
from sefi_fast.utils.strict_json import parse_json
from sefi_fast.utils.text import composed, is_unicode

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
            pass  # MOVED

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


_OLDER_METHODS: dict[str, Any] = {
    "weight_lambda": 0.0,
    "split": False,
    "module": "free",
    "learning_rate": 2e-3,
    "schedule": "constant",
    "snr_gamma": None,
    "flip": False,
}

PRESETS: dict[str, dict[str, Any]] = {
    "sefi": {},
    "likeness": {"num_vectors": 3, "weight_lambda": 0.01},
    "textual-inversion": {
        **_OLDER_METHODS,
        "stages": 1,
        "steps": 3000,
        "batch_size": 4,
    },
    "prospect": {**_OLDER_METHODS, "stages": 10},
}
"""What each preset sets; everything else keeps `TrainConfig`'s default.

"likeness" gives the subject three vectors: nearer to the image, and less ready to follow a prompt
that contradicts it (docs/evidence.md §4). "textual-inversion" is one free row for all timesteps and
both streams, with the steps, the batch and the rate of diffusers' example (whose 5e-4 is scaled by
its batch of 4). "prospect" is ten free rows, one a stage, for both streams, in the 600 steps of its
paper.
"""


def preset_settings(name: str) -> dict[str, Any]:
    """The fields that a preset sets.

    Raises:
        ValueError: there is no preset of that name.
    """
    if name not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(map(repr, PRESETS))}, got {name!r}")
    return dict(PRESETS[name])


Precision = Literal["auto", "fp32", "bf16", "fp16"]
Module = Literal["attention", "free"]
Schedule = Literal["constant", "cosine", "linear"]
Crop = Literal["center", "top", "bottom", "left", "right"]
SelfAttention = Literal["sdpa", "xformers"]
AttentionLoss = Literal["subject", "mask", "class", "none"]
Capture = Literal["auto", "always", "never"]

_MOST_NAMES = 10
_LONGEST_NAME = 80
_MANY = 10_000_000
_COUNTS = {
    "steps": (1, _MANY),
    "batch_size": (1, 4096),
    "gradient_accumulation": (1, 4096),
    "warmup_steps": (0, _MANY),
    "patience": (1, _MANY),
    "stages": (1, MOST_STAGES),
    "num_vectors": (1, 32),
    "resolution": (1, 16384),
    "seed": (0, 2**63 - 1),
    "checkpoint_every": (0, _MANY),
    "keep_checkpoints": (1, _MANY),
    "validation_every": (1, _MANY),
    "validation_steps": (1, 10_000),
}
"""Lowest and highest values."""
_MAY_BE_NONE = ("patience", "num_vectors", "resolution", "checkpoint_every")
_MOST_TEXTS = 1000
_MOST_CHARACTERS = 20_000
"""Of a field's texts together, so that a config file of 2 MB holds all fields."""
_FLAGS = (
    "split",
    "train_base",
    "reference_grad",
    "flip",
    "gradient_checkpointing",
    "compile",
    "low_memory",
)


def named_with_nearest(unknown: Iterable[str], known: Iterable[str]) -> str:
    """Unknown names, each with the known one that it resembles."""
    choices, names = list(known), list(unknown)
    named = []
    for name in names[:_MOST_NAMES]:
        short = printable(name, _LONGEST_NAME)
        near = difflib.get_close_matches(short, choices, n=1)
        named.append(f"{short} (did you mean {near[0]}?)" if near else short)
    more = len(names) - len(named)
    return ", ".join(named) + (f" and {more} more" if more else "")


def unsaid_settings() -> dict[str, Any]:
    """What a file of an earlier version was made with in fields that it does not have."""
    return {**TrainConfig().as_dict(), "snr_gamma": None}


def _shown(value: Any) -> str:
    """Show a value in a message: shortened, and of a huge number its size only."""
    if isinstance(value, int) and abs(value) >= 2**64:
        return f"a number of {value.bit_length()} bits"
    return printable(repr(value), 200)


def _setting(default: Any, text: str, *, free: bool = False) -> Any:
    """A field; `free` if a run may be resumed with another value of it."""
    return field(default=default, metadata={"help": text, "free": free})


@dataclass(frozen=True)
class TrainConfig:
    """Settings of `sefi_fast.train`; docs/method.md §5 says which ones the authors leave open.

    Every field's `metadata["help"]` tells its meaning in one line.

    Raises:
        TypeError: a field of the wrong type.
        ValueError: a value out of range; the message names the field, the value and the range.
    """

    steps: int = _setting(600, "optimiser steps")
    batch_size: int = _setting(8, "noised copies of the image a step")
    gradient_accumulation: int = _setting(1, "batches whose mean gradient makes a step")
    learning_rate: float = _setting(5e-3, "AdamW's rate for the embedding rows")
    schedule: Schedule = _setting(
        "cosine", "the rate over the run: constant, or to zero along a cosine or a line"
    )
    warmup_steps: int = _setting(0, "steps over which the rate rises at the start")
    ema_decay: float | None = _setting(
        None, "keep a moving average of the tokens with this decay, as 0.99, and save that"
    )
    patience: int | None = _setting(
        None, "end when the smoothed loss has not fallen for so many steps"
    )
    max_seconds: float | None = _setting(None, "end after so many seconds of training", free=True)
    weight_lambda: float = _setting(0.003, "weight λ of the attention loss")
    attention_loss: AttentionLoss = _setting(
        "subject", "subject: maps like the class word's; class: its column only; mask; none"
    )
    snr_gamma: float | None = _setting(
        5.0, "weigh timesteps by Min-SNR with this γ; none: all alike"
    )
    stages: int = _setting(5, "stages of denoising, each with tokens of its own")
    num_vectors: int | None = _setting(
        None, "tokens that stand for the placeholder in a sentence; as many as the class word has"
    )
    split: bool = _setting(True, "separate K and V tokens; tied otherwise")
    module: Module = _setting("attention", "tokens from self-attention over slots, or free rows")
    train_base: bool = _setting(True, "train the base embedding that the tokens share")
    loss_resolutions: tuple[int, ...] | None = _setting(
        None, "side lengths of the attention maps that carry the attention loss, as 16 32; all"
    )
    reference_grad: bool = _setting(False, "let the gradient run through the reference map")
    templates: tuple[str, ...] = _setting(
        ("a photo of a {}",), "training sentences, {} where the subject stands"
    )
    scene: str | None = _setting(
        None, "where the image was taken, as 'in the forest': keeps it out of the subject"
    )
    flip: bool = _setting(True, "train on the mirrored image too")
    resolution: int | None = _setting(None, "side length in pixels; the model's own")
    crop: Crop = _setting("center", "which square of the image is kept")
    seed: int = _setting(0, "of everything drawn at random")
    device: str | None = _setting(
        None, "cpu, cuda, cuda:1 …; a ready pipeline's own, else CUDA if there is one", free=True
    )
    precision: Precision = _setting("auto", "auto: bf16 or fp16 on CUDA, fp32 on a CPU")
    attention_backend: str | None = _setting(
        None, "backend of the fused operator, by name", free=True
    )
    self_attention: SelfAttention = _setting("sdpa", "how self-attention is computed", free=True)
    gradient_checkpointing: bool = _setting(
        False, "trade a third of the speed for memory", free=True
    )
    capture: Capture = _setting("auto", "replay the step as one captured CUDA graph", free=True)
    compile: bool = _setting(False, "torch.compile the U-Net", free=True)
    low_memory: bool = _setting(
        False, "checkpointing, and on the CPU what is not in use", free=True
    )
    checkpoint_every: int | None = _setting(
        None, "steps between checkpoints beside the output, 0 for none; about one a minute",
        free=True,
    )  # fmt: skip
    keep_checkpoints: int = _setting(2, "newest checkpoints that are kept", free=True)
    trackers: tuple[str, ...] = _setting(
        (), "where the numbers go too: tensorboard, wandb, or another of accelerate's", free=True
    )
    log_dir: str | None = _setting(
        None, "folder of the trackers; logs beside the output", free=True
    )
    validation_prompts: tuple[str, ...] = _setting(
        (), "prompts drawn during training, {} where the subject stands", free=True
    )
    validation_every: int = _setting(100, "training steps between validation images", free=True)
    validation_steps: int = _setting(30, "denoising steps of a validation image", free=True)
    validation_guidance: float | None = _setting(
        None, "guidance of a validation image; what suits the model", free=True
    )

    def __post_init__(self) -> None:
        for name, (lowest, highest) in _COUNTS.items():
            if getattr(self, name) is not None or name not in _MAY_BE_NONE:
                self._check_integer(name, lowest, highest)
        self._check_number("learning_rate", "above 0", lambda rate: rate > 0)
        self._check_number("weight_lambda", "0 or above", lambda weight: weight >= 0)
        if self.snr_gamma is not None:
            self._check_number("snr_gamma", "above 0", lambda gamma: gamma > 0)
        if self.ema_decay is not None:
            self._check_number("ema_decay", "in (0, 1)", lambda decay: 0 < decay < 1)
        if self.max_seconds is not None:
            self._check_number("max_seconds", "above 0", lambda seconds: seconds > 0)
        if self.validation_guidance is not None:
            self._check_number("validation_guidance", "0 or above", lambda scale: scale >= 0)
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {_shown(getattr(self, name))}")
        for name, choices in (
            ("schedule", Schedule),
            ("module", Module),
            ("crop", Crop),
            ("precision", Precision),
            ("self_attention", SelfAttention),
            ("attention_loss", AttentionLoss),
            ("capture", Capture),
        ):
            if getattr(self, name) not in get_args(choices):
                allowed = ", ".join(repr(choice) for choice in get_args(choices))
                raise ValueError(
                    f"{name} must be one of {allowed}, got {_shown(getattr(self, name))}"
                )
        for name in ("attention_backend", "device", "log_dir", "scene"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise TypeError(f"{name} must be a string or None, got {_shown(value)}")
            self._check_text(name, [value or ""])
        self._check_sentences("templates", at_least=1)
        self._check_sentences("validation_prompts", at_least=0)
        self._check_scene()
        self._check_loss_resolutions()
        self._check_trackers()

    @classmethod
    def from_overrides(
        cls, config: TrainConfig | None = None, overrides: Mapping[str, Any] | None = None
    ) -> TrainConfig:
        """`config` (default: the defaults) with some fields replaced.

        Raises:
            TypeError: `config` is no TrainConfig, or a field of that name does not exist.
            ValueError: a value out of range.
        """
        if config is not None and not isinstance(config, cls):
            raise TypeError(f"config must be a TrainConfig, got {type(config).__name__}")
        known = [known.name for known in fields(cls)]
        unknown = sorted(set(overrides or {}) - set(known))
        if unknown:
            raise TypeError(
                f"there is no setting {named_with_nearest(unknown, known)}; the settings are "
                f"{', '.join(known)}"
            )
        return replace(config or cls(), **dict(overrides or {}))

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> TrainConfig:
        """The settings of a preset, with some fields replaced.

        Args:
            name: "sefi" (the defaults), "likeness", "textual-inversion" or "prospect";
                `presets.PRESETS` says what each sets.
            **overrides: fields by name; they win over the preset.

        Raises:
            ValueError: there is no such preset, or a value is out of range.
            TypeError: a field of that name does not exist, or has a value of the wrong type.
        """
        pass  # MOVED

        return cls.from_overrides(None, {**preset_settings(name), **overrides})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all fields to a YAML file, or JSON if the name ends in .json.

        Raises:
            OSError: the file cannot be written.
        """
        pass  # MOVED

        write_settings(path, self.as_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> TrainConfig:
        """Read a YAML or JSON file of settings; fields that it leaves out have their defaults.

        The image, model, words and output that a run's file may name are left aside.

        Raises:
            OSError: the file cannot be read.
            ConfigError: it is not a flat mapping, or holds an unknown name or a value that cannot
                be used.
        """
        pass  # MOVED

        return cls.from_overrides(None, read_settings(path).fields)

    def sentences(self) -> tuple[str, ...]:
        """The templates with the scene behind each."""
        if self.scene is None:
            return self.templates
        return tuple(f"{template} {self.scene}" for template in self.templates)

    def as_dict(self) -> dict[str, Any]:
        """All fields, in a form that JSON can hold."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }

    def _check_integer(self, name: str, lowest: int, highest: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an integer, got {_shown(value)}")
        if not lowest <= value <= highest:
            raise ValueError(
                f"{name} must be at least {lowest} and at most {highest}, got {_shown(value)}"
            )

    def _check_number(self, name: str, wanted: str, is_good: Any) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be a number, got {_shown(value)}")
        if not -sys.float_info.max <= value <= sys.float_info.max or not is_good(value):
            raise ValueError(f"{name} must be finite and {wanted}, got {_shown(value)}")
        # A whole number of 300 digits is not read again from every file.
        object.__setattr__(self, name, float(value))

    def _check_text(self, name: str, texts: Sequence[str]) -> None:
        for text in texts:
            if not is_unicode(text):
                raise ValueError(f"{name} holds half a character: {_shown(text)}")
        if len(texts) > _MOST_TEXTS or sum(map(len, texts)) > _MOST_CHARACTERS:
            raise ValueError(
                f"{name} must be at most {_MOST_TEXTS:,} texts of {_MOST_CHARACTERS:,} characters "
                f"in all, got {len(texts):,} of {sum(map(len, texts)):,}"
            )

    def _check_sentences(self, name: str, at_least: int) -> None:
        value = getattr(self, name)
        if isinstance(value, str):
            raise TypeError(f"{name} must be a tuple of sentences, got one string: {_shown(value)}")
        if not isinstance(value, (list, tuple)) or not all(isinstance(x, str) for x in value):
            raise TypeError(f"{name} must be a tuple of sentences, got {_shown(value)}")
        if len(value) < at_least:
            raise ValueError(f"{name} is empty: give at least one sentence with {{}} in it")
        for sentence in value:
            if "{}" not in sentence:
                raise ValueError(
                    f"{name} holds {_shown(sentence)}, which has no {{}}: write {{}} where the "
                    "subject stands, as in 'a photo of a {}'"
                )
        self._check_text(name, value)
        object.__setattr__(self, name, tuple(map(composed, value)))

    def _check_scene(self) -> None:
        if self.scene is None:
            return
        if not self.scene.strip() or "{}" in self.scene:
            raise ValueError(
                "scene must be a phrase without {}, such as 'in the forest', got "
                f"{_shown(self.scene)}"
            )
        object.__setattr__(self, "scene", composed(self.scene))

    def _check_trackers(self) -> None:
        names = self.trackers
        if isinstance(names, str) or not isinstance(names, (list, tuple)):
            raise TypeError(f"trackers must be a tuple of names, got {_shown(names)}")
        for name in names:
            if not isinstance(name, str) or not name.strip():
                raise TypeError(f"trackers must be names such as 'tensorboard', got {_shown(name)}")
        self._check_text("trackers", names)
        object.__setattr__(self, "trackers", tuple(names))

    def _check_loss_resolutions(self) -> None:
        sides = self.loss_resolutions
        if sides is None:
            return
        if not isinstance(sides, (list, tuple)) or not all(
            isinstance(side, int) and not isinstance(side, bool) for side in sides
        ):
            raise TypeError(
                f"loss_resolutions must be a tuple of integers or None, got {_shown(sides)}"
            )
        if not sides:
            raise ValueError(
                "loss_resolutions is empty: name the sides of the maps, as (16, 32), give None for "
                "all layers, or weight_lambda=0 for no attention loss"
            )
        if len(sides) > 100 or not all(1 <= side <= 16384 for side in sides):
            raise ValueError(
                "loss_resolutions must be at most 100 sides, each from 1 to 16384, got "
                f"{_shown(sides)}"
            )
        object.__setattr__(self, "loss_resolutions", tuple(sides))
