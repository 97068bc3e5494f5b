"""Settings that the studies compare, each trained once for all studies."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any

from sefi_fast.training import TrainConfig
from sefi_fast.training.config import preset_settings

BASELINE = "sefi"
"""Name of the variant with the default settings, to which all others are compared."""
SPELLED_OUT = "spelled out"
CONTROLS = ("class word", SPELLED_OUT)
"""Controls without training: the class word in place of the subject, and the identity in words."""


@dataclass(frozen=True)
class Variant:
    """Settings under one name, or a control.

    Attributes:
        name: name in the tables.
        config: the settings; None for a control.
        value: position on the axis of the study's plot; None if the plot has no axis.
        scene_named: whether the training sentence names the image's scene.
        place_named: whether it names the creature's position too, which a mirrored image changes.
    """

    name: str
    config: TrainConfig | None
    value: float | None = None
    scene_named: bool = True
    place_named: bool = False

    @property
    def key(self) -> str:
        """Return 12 characters that are equal for variants of equal training."""
        if self.config is None:
            return self.name.replace(" ", "-")
        kept: dict[str, Any] = {
            field.name: getattr(self.config, field.name)
            for field in fields(TrainConfig)
            if not field.metadata["resumable"]
        }
        if kept["weight_lambda"] == 0 or kept["attention_loss"] == "none":
            kept |= {"weight_lambda": 0.0, "attention_loss": "none"}
        kept |= {"scene_named": self.scene_named, "place_named": self.place_named}
        text = json.dumps(kept, sort_keys=True, default=list)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Study:
    """Variants that are compared with one another.

    Attributes:
        name: name on the command line.
        title: subject of the comparison.
        variants: in the order of the table.
        axis: label of the variants' values; empty if they have none.
        log: whether that axis is logarithmic.
    """

    name: str
    title: str
    variants: tuple[Variant, ...]
    axis: str = ""
    log: bool = False


def make_studies(
    names: str | Iterable[str] = "all", base: TrainConfig | None = None
) -> list[Study]:
    """Make the studies of these names.

    Args:
        names: one of STUDIES, "all", or several.
        base: settings that all variants share; default: TrainConfig().

    Raises:
        ValueError: there is no study of that name.
    """
    asked = [names] if isinstance(names, str) else list(names)
    asked = list(STUDIES) if "all" in asked else asked
    unknown = [name for name in asked if name not in STUDIES]
    if unknown or not asked:
        raise ValueError(f"study must be all or of {', '.join(STUDIES)}; got {unknown or asked}")
    return [_MAKERS[name](base or TrainConfig()) for name in dict.fromkeys(asked)]


def _variant(base: TrainConfig, name: str, value: float | None = None, **fields: Any) -> Variant:
    return Variant(name, TrainConfig.from_overrides(base, fields), value)


def _preset(base: TrainConfig, preset: str, name: str, **same: Any) -> Variant:
    """Return a preset over the base, with the base's steps and batch."""
    equal = {"steps": base.steps, "batch_size": base.batch_size, **same}
    return _variant(base, name, **{**preset_settings(preset), **equal})


def _recipe(base: TrainConfig) -> dict[str, Any]:
    same = ("schedule", "flip", "learning_rate", "snr_gamma")
    return {name: getattr(base, name) for name in same}


def _lambda(base: TrainConfig) -> Study:
    weights = (0.0, 1e-4, 1e-3, 0.003, 0.01, 0.05)
    found = [_variant(base, f"λ = {w:g}", w, weight_lambda=w) for w in weights]
    return Study("lambda", "weight of the subject-wise loss", tuple(found), "λ", log=True)


def _loss(base: TrainConfig) -> Study:
    variants = (
        _variant(base, "none", weight_lambda=0.0, attention_loss="none"),
        _variant(base, "mask, λ = 0.01", weight_lambda=0.01, attention_loss="mask"),
        _variant(base, "mask, λ = 0.1", weight_lambda=0.1, attention_loss="mask"),
        _variant(base, "class word's column", attention_loss="class"),
        _variant(base, "subject-wise", attention_loss="subject"),
    )
    return Study("loss", "attention loss", variants)


def _pairs(base: TrainConfig) -> Study:
    split = [_variant(base, f"{n} split", n, stages=n, split=True) for n in (1, 3, 5, 7, 9, 10)]
    tied = [_variant(base, f"{n} tied", n, stages=n, split=False) for n in (1, 5, 10)]
    return Study("pairs", "number of K-V pairs", (*split, *tied), "pairs")


def _vectors(base: TrainConfig) -> Study:
    weights = (0.0, 0.01, 0.05)
    likeness = {"num_vectors": 3, "weight_lambda": 0.01}
    half = max(1, base.steps // 2)
    variants = (
        Variant("1 vector", base),
        *(_variant(base, f"{n} vectors", num_vectors=n) for n in (2, 3, 5)),
        *(_variant(base, f"3 vectors, λ = {w:g}", num_vectors=3, weight_lambda=w) for w in weights),
        _variant(base, "3 vectors, λ = 0.01, half the steps", **likeness, steps=half),
        _variant(base, "3 vectors, λ = 0.01, 1 stage", **likeness, stages=1),
        _variant(base, "3 vectors, λ = 0.01, 1 tied stage", **likeness, stages=1, split=False),
        _preset(
            base, "textual-inversion", "Textual Inversion in our recipe, 3 vectors",
            num_vectors=3, **_recipe(base),
        ),
    )  # fmt: skip
    return Study("vectors", "tokens per placeholder", variants)


def _peers(base: TrainConfig) -> Study:
    ours = _recipe(base)
    variants = (
        _preset(base, "textual-inversion", "Textual Inversion"),
        _preset(base, "textual-inversion", "Textual Inversion in our recipe", **ours),
        _preset(base, "prospect", "ProSpect's conditioning"),
        _preset(base, "prospect", "ProSpect's conditioning in our recipe", **ours),
        Variant(BASELINE, base),
    )
    return Study("peers", "other conditionings at equal steps", variants)


def _module(base: TrainConfig) -> Study:
    variants = (
        _variant(base, "self-attention module", module="attention"),
        _variant(base, "free rows", module="free"),
    )
    return Study("module", "parameters of the tokens", variants)


def _rate(base: TrainConfig) -> Study:
    rates = (1e-3, 2e-3, 5e-3, 1e-2)
    found = [_variant(base, f"{rate:g}", rate, learning_rate=rate) for rate in rates]
    return Study("rate", "learning rate", tuple(found), "learning rate", log=True)


def _steps(base: TrainConfig) -> Study:
    counts = sorted({max(1, int(base.steps * part)) for part in (0.25, 0.5, 1, 2)})
    found = [_variant(base, f"{count} steps", count, steps=count) for count in counts]
    return Study("steps", "training steps", tuple(found), "steps", log=True)


def _choices(base: TrainConfig) -> Study:
    batch, steps = base.batch_size, base.steps
    changes: dict[str, dict[str, Any]] = {
        "constant rate": {"schedule": "constant"},
        "warm-up of a tenth": {"warmup_steps": max(1, steps // 10)},
        "average of the last tokens": {"ema_decay": 0.98},
        "base embedding kept": {"train_base": False},
        "gradient through the reference": {"reference_grad": True},
        "loss at 12×12 alone": {"loss_resolutions": (12,)},
        "loss at 6×6 alone": {"loss_resolutions": (6,)},
        "loss at 6×6 and 3×3": {"loss_resolutions": (3, 6)},
        "loss at 6×6 alone, λ = 0.01": {"loss_resolutions": (6,), "weight_lambda": 0.01},
        "half the copies, twice the steps": {"batch_size": max(1, batch // 2), "steps": 2 * steps},
        "twice the copies, half the steps": {"batch_size": 2 * batch, "steps": max(1, steps // 2)},
        "ended on a plateau": {"patience": max(1, steps // 6)},
    }
    variants = (
        Variant(BASELINE, base),
        Variant("scene not named", base, scene_named=False),
        *(_variant(base, name, **fields) for name, fields in changes.items()),
    )
    return Study("choices", "choices that the authors leave open", variants)


def _better(base: TrainConfig) -> Study:
    unmirrored = TrainConfig.from_overrides(base, {"flip": False})
    variants = (
        Variant(BASELINE, base),
        _variant(base, "timesteps weigh alike", snr_gamma=None),
        _variant(base, "timesteps weigh alike, rate 0.002", snr_gamma=None, learning_rate=2e-3),
        _variant(base, "Min-SNR, γ = 1", snr_gamma=1.0),
        Variant("no mirrored image", unmirrored),
        Variant("no mirrored image, place named", unmirrored, place_named=True),
    )
    return Study("better", "attempts to beat the defaults", variants)


_MAKERS: dict[str, Callable[[TrainConfig], Study]] = {
    "lambda": _lambda,
    "loss": _loss,
    "pairs": _pairs,
    "vectors": _vectors,
    "peers": _peers,
    "module": _module,
    "rate": _rate,
    "steps": _steps,
    "choices": _choices,
    "better": _better,
}
STUDIES = tuple(_MAKERS)
