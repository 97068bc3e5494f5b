"""Settings of training: their checks, presets and files."""

from __future__ import annotations

import difflib
import json
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import Field, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import yaml

from sefi_fast.errors import ConfigError, printable
from sefi_fast.training.losses import LOSS_HELP, AttentionLossName
from sefi_fast.utils.files import MOST_STAGES, atomic_write, read_regular, user_path
from sefi_fast.utils.strict_json import parse_json
from sefi_fast.utils.text import composed, is_unicode

Precision = Literal["auto", "fp32", "bf16", "fp16"]
Module = Literal["attention", "free"]
Schedule = Literal["constant", "cosine", "linear"]
Crop = Literal["center", "top", "bottom", "left", "right"]
SelfAttention = Literal["sdpa", "xformers"]
Capture = Literal["auto", "always", "never"]

RUN_KEYS = (
    "image", "mask", "model", "model_config", "vae", "class_word", "placeholder", "output", "preset"
)  # fmt: skip
"""Keys of a run's file that are not fields of TrainConfig."""
_CHOICES: dict[str, tuple[str, ...]] = {
    name: get_args(globals()[name])
    for name in (
        "Precision", "Module", "Schedule", "Crop", "SelfAttention", "AttentionLossName", "Capture"
    )
}  # fmt: skip
"""Values of the fields with these annotations."""
_MANY = 10_000_000
_MOST_TEXTS = 1000
# Of a field's texts together, so that a config file of 2 MB holds all fields.
_MOST_CHARACTERS = 20_000
_POSITIVE = math.nextafter(0.0, 1.0)
_BELOW_ONE = math.nextafter(1.0, 0.0)
_HIGHEST = sys.float_info.max


def _setting(
    default: Any,
    text: str,
    low: float = 0,
    high: float = _HIGHEST,
    wanted: str = "",
    *,
    resumable: bool = False,
) -> Any:
    """Declare a field of TrainConfig; `wanted` is the range of a float in words."""
    metadata = {"help": text, "low": low, "high": high, "wanted": wanted, "resumable": resumable}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class TrainConfig:
    """Settings of `sefi_fast.train` and `sefi_fast.train_many`.

    docs/method.md §5 says which values the paper leaves open. The `metadata["help"]` of each field
    explains it in one line, and `sefi-fast train --help` prints them.

    `precision` selects the dtype of the frozen models (mixed precision). "bf16" and "fp16" run the
    U-Net and the text encoders in half precision on CUDA. The trained tokens, their optimizer and
    the losses stay in float32, and "fp16" scales the loss of each subject.

    Example:
        >>> config = TrainConfig(steps=300, precision="bf16", ema_decay=0.99)
        >>> config.save("run.yaml")
        >>> sefi_fast.train("me.jpg", config=TrainConfig.load("run.yaml"), seed=1)

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a value is out of range. The message names the field, the value and the range.
    """

    steps: int = _setting(600, "optimizer steps", 1, _MANY)
    batch_size: int = _setting(8, "noised copies of the image in a step", 1, 4096)
    gradient_accumulation: int = _setting(1, "batches whose mean gradient makes a step", 1, 4096)
    learning_rate: float = _setting(
        5e-3, "AdamW's rate for the embedding rows", _POSITIVE, wanted="above 0"
    )
    schedule: Schedule = _setting(
        "cosine", "the rate over the run: constant, or to zero along a cosine or a line"
    )
    warmup_steps: int = _setting(0, "steps over which the rate rises at the start", 0, _MANY)
    ema_decay: float | None = _setting(
        None, "keep a moving average of the tokens with this decay, as 0.99, and save it",
        _POSITIVE, _BELOW_ONE, "in (0, 1)",
    )  # fmt: skip
    patience: int | None = _setting(
        None, "end when the smoothed loss has not fallen for so many steps", 1, _MANY
    )
    max_seconds: float | None = _setting(
        None, "end after so many seconds of training", _POSITIVE, wanted="above 0", resumable=True
    )
    weight_lambda: float = _setting(0.003, "weight λ of the attention loss", wanted="0 or above")
    attention_loss: AttentionLossName = _setting("subject", LOSS_HELP)
    snr_gamma: float | None = _setting(
        5.0, "weigh timesteps by Min-SNR with this γ; none: all alike", _POSITIVE, wanted="above 0"
    )
    stages: int = _setting(5, "stages of denoising, each with its own tokens", 1, MOST_STAGES)
    num_vectors: int | None = _setting(
        None, "tokens of the placeholder in a sentence; default: as many as the class word has",
        1, 32,
    )  # fmt: skip
    split: bool = _setting(True, "separate K and V tokens; tied otherwise")
    module: Module = _setting("attention", "tokens from self-attention over slots, or free rows")
    train_base: bool = _setting(True, "train the base embedding that the tokens share")
    loss_resolutions: tuple[int, ...] | None = _setting(
        None, "side lengths of the attention maps that carry the attention loss, as 16 32; all"
    )
    reference_grad: bool = _setting(False, "let the gradient run through the reference map")
    templates: tuple[str, ...] = _setting(
        ("a photo of a {}",), "training sentences, with {} in the subject's place"
    )
    scene: str | None = _setting(
        None, "where the image was taken, as 'in the forest': keeps it out of the subject"
    )
    flip: bool = _setting(True, "train on the mirrored image too")
    resolution: int | None = _setting(None, "side length in pixels; the model's own", 1, 16384)
    crop: Crop = _setting("center", "which square of the image is kept")
    seed: int = _setting(0, "seed of all random numbers", 0, 2**63 - 1)
    device: str | None = _setting(
        None, "cpu, cuda, cuda:1 …; a ready pipeline's own, else CUDA if there is one",
        resumable=True,
    )  # fmt: skip
    precision: Precision = _setting(
        "auto", "dtype of the frozen models; auto: bf16 or fp16 on CUDA, fp32 on a CPU"
    )
    attention_backend: str | None = _setting(
        None, "backend of the fused operator, by name", resumable=True
    )
    self_attention: SelfAttention = _setting(
        "sdpa", "how self-attention is computed", resumable=True
    )
    gradient_checkpointing: bool = _setting(
        False, "trade a third of the speed for memory", resumable=True
    )
    capture: Capture = _setting(
        "auto", "replay the step as one captured CUDA graph", resumable=True
    )
    compile: bool = _setting(False, "torch.compile the U-Net", resumable=True)
    low_memory: bool = _setting(
        False, "checkpointing, and on the CPU what is not in use", resumable=True
    )
    checkpoint_every: int | None = _setting(
        None, "steps between checkpoints next to the output, 0 for none; about one a minute",
        0, _MANY, resumable=True,
    )  # fmt: skip
    keep_checkpoints: int = _setting(
        2, "newest checkpoints that are kept", 1, _MANY, resumable=True
    )
    trackers: tuple[str, ...] = _setting(
        (), "log the numbers to tensorboard, wandb, or another of accelerate's trackers",
        resumable=True,
    )  # fmt: skip
    log_dir: str | None = _setting(
        None, "folder of the trackers; logs next to the output", resumable=True
    )
    validation_prompts: tuple[str, ...] = _setting(
        (), "prompts of the images generated during training, with {} in the subject's place",
        resumable=True,
    )  # fmt: skip
    validation_every: int = _setting(
        100, "training steps between validation images", 1, _MANY, resumable=True
    )
    validation_steps: int = _setting(
        30, "denoising steps of a validation image", 1, 10_000, resumable=True
    )
    validation_guidance: float | None = _setting(
        None, "guidance of a validation image; the model's usual one", wanted="0 or above",
        resumable=True,
    )  # fmt: skip

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            kind = str(one.type).removesuffix(" | None")
            if value is None and kind != one.type:
                continue
            if kind in ("int", "float"):
                self._check_number(one, kind == "int")
            elif kind == "bool" and not isinstance(value, bool):
                raise TypeError(f"{one.name} must be True or False, got {_shown(value)}")
            elif kind == "str" and not isinstance(value, str):
                raise TypeError(f"{one.name} must be a string or None, got {_shown(value)}")
            elif kind in ("str", "tuple[str, ...]"):
                self._check_texts(one.name, (value,) if kind == "str" else value)
            elif kind in _CHOICES and value not in _CHOICES[kind]:
                allowed = ", ".join(map(repr, _CHOICES[kind]))
                raise ValueError(f"{one.name} must be one of {allowed}, got {_shown(value)}")
        self._check_sentences()
        self._check_loss_resolutions()

    @classmethod
    def from_overrides(
        cls,
        config: TrainConfig | None = None,
        overrides: Mapping[str, Any] | None = None,
        preset: str | None = None,
    ) -> TrainConfig:
        """Return `config`, or the settings of `preset`, or the defaults, with some fields replaced.

        Raises:
            TypeError: `config` is not a TrainConfig, or a field of that name does not exist.
            ValueError: a value is out of range, or both `config` and `preset` are given.
        """
        if config is not None and preset is not None:
            raise ValueError(
                f"preset {preset!r} and config were both given: give one of them, and by name what "
                "shall differ"
            )
        if config is not None and not isinstance(config, cls):
            raise TypeError(f"config must be a TrainConfig, got {type(config).__name__}")
        known = [one.name for one in fields(cls)]
        if unknown := sorted(set(overrides or {}) - set(known)):
            raise TypeError(
                f"there is no setting {_named_with_nearest(unknown, known)}; the settings are "
                f"{', '.join(known)}"
            )
        base = {} if preset is None else preset_settings(preset)
        return replace(config or cls(), **{**base, **dict(overrides or {})})

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> TrainConfig:
        """Return the settings of a preset, with some fields replaced.

        Args:
            name: "sefi" (the defaults), "likeness", "textual-inversion" or "prospect"
                (`config.PRESETS`).
            **overrides: fields by name; they win over the preset.

        Raises:
            ValueError: there is no such preset, or a value is out of range.
            TypeError: a field of that name does not exist, or has a value of the wrong type.
        """
        return cls.from_overrides(None, overrides, name)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all fields to a YAML file, or JSON if the name ends in .json.

        Raises:
            OSError: the file cannot be written.
        """
        write_settings(path, self.as_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> TrainConfig:
        """Read a YAML or JSON file of settings; missing fields have their defaults.

        The image, model, words and output that a run's file may name are ignored.

        Raises:
            OSError: the file cannot be read.
            ConfigError: it is not a flat mapping, or holds an unknown name or a value that cannot
                be used.
        """
        return cls.from_overrides(None, read_settings(path).fields)

    def fixed(self) -> dict[str, Any]:
        """Return the fields that a resumed run must have as they were."""
        values = self.as_dict()
        return {one.name: values[one.name] for one in fields(self) if not one.metadata["resumable"]}

    def sentences(self) -> tuple[str, ...]:
        """Return the templates, each followed by the scene."""
        if self.scene is None:
            return self.templates
        return tuple(f"{template} {self.scene}" for template in self.templates)

    def as_dict(self) -> dict[str, Any]:
        """Return all fields, in a form that JSON can hold."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }

    def _check_number(self, one: Field[Any], whole: bool) -> None:
        value, low, high = getattr(self, one.name), one.metadata["low"], one.metadata["high"]
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
            kind = "an integer" if whole else "a number"
            raise TypeError(f"{one.name} must be {kind}, got {_shown(value)}")
        if not low <= value <= high:
            wanted = f"finite and {one.metadata['wanted']}"
            if whole:
                wanted = f"at least {low} and at most {high}"
            raise ValueError(f"{one.name} must be {wanted}, got {_shown(value)}")
        if not whole:
            # A whole number of 300 digits cannot be read again from every file.
            object.__setattr__(self, one.name, float(value))

    def _check_texts(self, name: str, texts: Any) -> None:
        if not isinstance(texts, (list, tuple)) or not all(isinstance(x, str) for x in texts):
            raise TypeError(f"{name} must be a tuple of strings, got {_shown(texts)}")
        for text in texts:
            if not is_unicode(text):
                raise ValueError(f"{name} holds an unpaired surrogate: {_shown(text)}")
        if len(texts) > _MOST_TEXTS or sum(map(len, texts)) > _MOST_CHARACTERS:
            raise ValueError(
                f"{name} must be at most {_MOST_TEXTS:,} texts of {_MOST_CHARACTERS:,} characters "
                f"in all, got {len(texts):,} of {sum(map(len, texts)):,}"
            )

    def _check_sentences(self) -> None:
        if not self.templates:
            raise ValueError("templates is empty: give at least one sentence with {} in it")
        for name in ("templates", "validation_prompts"):
            for sentence in getattr(self, name):
                if "{}" not in sentence:
                    raise ValueError(
                        f"{name} holds {_shown(sentence)}, which has no {{}}: write {{}} in the "
                        "subject's place, as in 'a photo of a {}'"
                    )
            object.__setattr__(self, name, tuple(map(composed, getattr(self, name))))
        if self.scene is not None:
            if not self.scene.strip() or "{}" in self.scene:
                raise ValueError(
                    "scene must be a phrase without {}, such as 'in the forest', got "
                    f"{_shown(self.scene)}"
                )
            object.__setattr__(self, "scene", composed(self.scene))
        if not all(name.strip() for name in self.trackers):
            raise ValueError("trackers must be names such as 'tensorboard', got an empty one")
        object.__setattr__(self, "trackers", tuple(self.trackers))

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
    "textual-inversion": {**_OLDER_METHODS, "stages": 1, "steps": 3000, "batch_size": 4},
    "prospect": {**_OLDER_METHODS, "stages": 10},
}
"""Fields that each preset sets; all others keep the defaults of `TrainConfig`.

"likeness" gives the subject three vectors: nearer to the image, and less ready to follow a prompt
that contradicts it (docs/evidence.md §4). "textual-inversion" is one free row for all timesteps and
both streams, with the steps, the batch and the rate of diffusers' example (whose 5e-4 is scaled by
its batch of 4). "prospect" is ten free rows, one for each stage, for both streams, in the 600 steps
of its paper.
"""


def preset_settings(name: str) -> dict[str, Any]:
    """Return the fields that a preset sets.

    Raises:
        ValueError: there is no preset of that name.
    """
    if name not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(map(repr, PRESETS))}, got {name!r}")
    return dict(PRESETS[name])


class RunFile(NamedTuple):
    """Contents of a run's file: fields of TrainConfig, those of its preset too, and RUN_KEYS."""

    fields: dict[str, Any]
    run: dict[str, Any]


_LINE_ENDS = "\x85\u2028\u2029"
_SIZE_LIMIT = 2 * 2**20
_MOST_LEVELS = 8
_MOST_VALUES = 10_000


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
    """Read a file of settings, written by `write_settings` or by hand.

    Paths in it are returned as they are, relative to the current folder.

    Raises:
        OSError: the file cannot be read.
        ConfigError: it is not a flat mapping, holds an unknown name, or a value that TrainConfig
            refuses.
    """
    source = user_path(path)
    values = _parse(source)
    known = {one.name: str(one.type) for one in fields(TrainConfig)}
    if unknown := sorted(set(values) - set(known) - set(RUN_KEYS)):
        named = _named_with_nearest(unknown, [*known, *RUN_KEYS])
        raise ConfigError(
            f"{source} holds unknown settings: {named}; the settings are "
            f"{', '.join([*RUN_KEYS, *known])}"
        )
    run = {name: values.pop(name) for name in RUN_KEYS if name in values}
    for name, value in run.items():
        if value is not None and not isinstance(value, str):
            raise ConfigError(f"{source}: {name} must be a string, got {value!r}")
    for name, value in values.items():
        if isinstance(value, str) and known[name].startswith("float"):
            # YAML 1.1 reads 1e-3, without a point, as a word.
            with suppress(ValueError):
                values[name] = float(value)
    try:
        TrainConfig.from_overrides(None, values)
        if (preset := run.pop("preset", None)) is not None:
            values = {**preset_settings(preset), **values}
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{source}: {error}") from error
    return RunFile(values, run)


def _parse(source: Path) -> dict[str, Any]:
    try:
        text = read_regular(source, _SIZE_LIMIT).decode("utf-8-sig")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"there is no config file at {source}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"the config file {source} is not text: give a YAML or JSON file in UTF-8"
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
        raise ConfigError(f"the config file {source} is not {kind}: {reason}") from error
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise ConfigError(
            f"the config file {source} must hold settings line by line, as 'steps: 600', got "
            f"{type(values).__name__}"
        )
    return values


class _Loader(yaml.SafeLoader):  # type: ignore[misc, unused-ignore]
    """YAML without anchors, aliases and tags, and with decimal whole numbers only."""

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


def _named_with_nearest(unknown: list[str], known: list[str]) -> str:
    """Return ten unknown names, each with the most similar known one, and the number of others."""
    named = []
    for name in unknown[:10]:
        short = printable(name, 80)
        near = difflib.get_close_matches(short, known, n=1)
        named.append(f"{short} (did you mean {near[0]}?)" if near else short)
    more = len(unknown) - len(named)
    return ", ".join(named) + (f" and {more} more" if more else "")


def _shown(value: Any) -> str:
    """Return a value for a message: shortened, and only the size of a huge number."""
    if isinstance(value, int) and abs(value) >= 2**64:
        return f"a number of {value.bit_length()} bits"
    return printable(repr(value), 200)
