"""Settings of a training run, checked field by field before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, get_args

Precision = Literal["auto", "fp32", "bf16", "fp16"]
Module = Literal["attention", "free"]
Schedule = Literal["constant", "cosine"]
Crop = Literal["center", "top", "bottom", "left", "right"]
SelfAttention = Literal["sdpa", "xformers"]

_LARGEST_SEED = 2**63 - 1


def _setting(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class TrainConfig:
    """Settings of `sefi_fast.train`; docs/method.md §5 says which ones the authors leave open.

    Every field's `metadata["help"]` tells its meaning in one line.

    Raises:
        TypeError: a field of the wrong type.
        ValueError: a value out of range; the message names the field, the value and the range.
    """

    steps: int = _setting(600, "optimiser steps")
    batch_size: int = _setting(8, "noised copies of the picture a step")
    learning_rate: float = _setting(2e-3, "AdamW's rate for the embedding rows")
    schedule: Schedule = _setting("cosine", "the rate over the run: constant, or cosine to zero")
    weight_lambda: float = _setting(0.003, "weight λ of the subject-wise attention loss")
    stages: int = _setting(5, "stages of denoising, each with tokens of its own")
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
        None, "where the picture was taken, as 'in the forest': keeps it out of the subject"
    )
    flip: bool = _setting(True, "train on the mirrored picture too")
    resolution: int | None = _setting(None, "side length in pixels; the model's own")
    crop: Crop = _setting("center", "which square of the picture is kept")
    seed: int = _setting(0, "of everything drawn at random")
    device: str | None = _setting(None, "cpu, cuda, cuda:1 …; CUDA if there is one")
    precision: Precision = _setting("auto", "auto: bf16 or fp16 on CUDA, fp32 on a CPU")
    attention_backend: str | None = _setting(None, "backend of the fused operator, by name")
    self_attention: SelfAttention = _setting("sdpa", "how self-attention is computed")
    gradient_checkpointing: bool = _setting(False, "trade a third of the speed for memory")
    validation_prompts: tuple[str, ...] = _setting(
        (), "prompts drawn during training, {} where the subject stands"
    )
    validation_every: int = _setting(100, "training steps between validation pictures")
    validation_steps: int = _setting(30, "denoising steps of a validation picture")

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "stages", "validation_every", "validation_steps"):
            self._check_integer(name, 1)
        self._check_integer("seed", 0, _LARGEST_SEED)
        if self.resolution is not None:
            self._check_integer("resolution", 1)
        self._check_number("learning_rate", "above 0", lambda rate: rate > 0)
        self._check_number("weight_lambda", "0 or above", lambda weight: weight >= 0)
        flags = ("split", "train_base", "reference_grad", "flip", "gradient_checkpointing")
        for name in flags:
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        for name, choices in (
            ("schedule", Schedule),
            ("module", Module),
            ("crop", Crop),
            ("precision", Precision),
            ("self_attention", SelfAttention),
        ):
            if getattr(self, name) not in get_args(choices):
                allowed = ", ".join(repr(choice) for choice in get_args(choices))
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        for name in ("attention_backend", "device"):
            if getattr(self, name) is not None and not isinstance(getattr(self, name), str):
                raise TypeError(f"{name} must be a string or None, got {getattr(self, name)!r}")
        self._check_sentences("templates", at_least=1)
        self._check_sentences("validation_prompts", at_least=0)
        self._check_scene()
        self._check_loss_resolutions()

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
                f"there is no setting {', '.join(unknown)}; the settings are {', '.join(known)}"
            )
        return replace(config or cls(), **dict(overrides or {}))

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

    def _check_integer(self, name: str, lowest: int, highest: int | None = None) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an integer, got {value!r}")
        if value < lowest or (highest is not None and value > highest):
            limit = f"at least {lowest}" + ("" if highest is None else f" and at most {highest}")
            raise ValueError(f"{name} must be {limit}, got {value}")

    def _check_number(self, name: str, wanted: str, is_good: Any) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be a number, got {value!r}")
        if not math.isfinite(value) or not is_good(value):
            raise ValueError(f"{name} must be finite and {wanted}, got {value}")

    def _check_sentences(self, name: str, at_least: int) -> None:
        value = getattr(self, name)
        if isinstance(value, str):
            raise TypeError(f"{name} must be a tuple of sentences, got one string: {value!r}")
        if not isinstance(value, (list, tuple)) or not all(isinstance(x, str) for x in value):
            raise TypeError(f"{name} must be a tuple of sentences, got {value!r}")
        if len(value) < at_least:
            raise ValueError(f"{name} is empty: give at least one sentence with {{}} in it")
        for sentence in value:
            if "{}" not in sentence:
                raise ValueError(
                    f"{name} holds {sentence!r}, which has no {{}}: write {{}} where the subject "
                    "stands, as in 'a photo of a {}'"
                )
        object.__setattr__(self, name, tuple(value))

    def _check_scene(self) -> None:
        if self.scene is None:
            return
        if not isinstance(self.scene, str):
            raise TypeError(f"scene must be a string or None, got {self.scene!r}")
        if not self.scene.strip() or "{}" in self.scene:
            raise ValueError(
                f"scene must be a phrase without {{}}, such as 'in the forest', got {self.scene!r}"
            )

    def _check_loss_resolutions(self) -> None:
        sides = self.loss_resolutions
        if sides is None:
            return
        if not isinstance(sides, (list, tuple)) or not all(
            isinstance(side, int) and not isinstance(side, bool) for side in sides
        ):
            raise TypeError(f"loss_resolutions must be a tuple of integers or None, got {sides!r}")
        if not sides:
            raise ValueError(
                "loss_resolutions is empty: name the sides of the maps, as (16, 32), give None for "
                "all layers, or weight_lambda=0 for no attention loss"
            )
        object.__setattr__(self, "loss_resolutions", tuple(sides))
