"""What the studies compare: named settings, each trained once however many studies want it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

from sefi_fast.training import TrainConfig
from sefi_fast.training.config import preset_settings

BASELINE = "sefi"
"""Name of the variant with the default settings, to which all others are compared."""
SPELLED_OUT = "spelled out"
CONTROLS = ("class word", SPELLED_OUT)
"""What needs no training: the class word in the subject's place, and the identity in words."""


@dataclass(frozen=True)
class Variant:
    """Settings under one name, or a control.

    Attributes:
        name: as the tables show it.
        config: the settings; None for a control.
        value: where it stands on the axis of its study's plot; None where that has no scale.
        scene_named: whether the training sentence names the image's scene.
        place_named: whether it names the creature's place too. A mirrored image would have it
            wrong.
    """

    name: str
    config: TrainConfig | None
    value: float | None = None
    scene_named: bool = True
    place_named: bool = False

    @property
    def key(self) -> str:
        """The settings in 12 characters: variants of the same key are the same training."""
        if self.config is None:
            return self.name.replace(" ", "-")
        kept = {f.name: getattr(self.config, f.name) for f in fields(TrainConfig)
                if not f.metadata["resumable"]}  # fmt: skip
        if kept["weight_lambda"] == 0 or kept["attention_loss"] == "none":
            kept |= {"weight_lambda": 0.0, "attention_loss": "none"}
        if kept["num_vectors"] is None:
            # As before there was the setting, so that older results are found again.
            del kept["num_vectors"]
        if not self.scene_named:
            kept["scene_named"] = False
        if self.place_named:
            kept["place_named"] = True
        text = json.dumps(kept, sort_keys=True, default=list)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Study:
    """Variants beside one another.

    Attributes:
        name: as the command takes it.
        title: what is compared.
        variants: in the order of the table.
        axis: label of the variants' values; empty where they have none.
        log: whether that axis is logarithmic.
    """

    name: str
    title: str
    variants: tuple[Variant, ...]
    axis: str = ""
    log: bool = False


STUDIES = (
    "lambda",
    "loss",
    "pairs",
    "vectors",
    "peers",
    "module",
    "rate",
    "steps",
    "choices",
    "better",
)


def make_studies(
    names: str | Iterable[str] = "all", base: TrainConfig | None = None
) -> list[Study]:
    """The studies of these names.

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
    base = base or TrainConfig()
    return [_MAKERS[name](base) for name in dict.fromkeys(asked)]


def _variant(base: TrainConfig, name: str, value: float | None = None, **fields: Any) -> Variant:
    return Variant(name, TrainConfig.from_overrides(base, fields), value)


def _preset(base: TrainConfig, preset: str, name: str, **same: Any) -> Variant:
    """What a preset sets, over the base, but with the steps and the batch of the others."""
    equal = {"steps": base.steps, "batch_size": base.batch_size, **same}
    return _variant(base, name, **{**preset_settings(preset), **equal})


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
    more = [_variant(base, f"{n} vectors", num_vectors=n) for n in (2, 3, 5)]
    weights = (0.0, 0.01, 0.05)
    three = [
        _variant(base, f"3 vectors, λ = {w:g}", num_vectors=3, weight_lambda=w) for w in weights
    ]
    likeness = {"num_vectors": 3, "weight_lambda": 0.01}
    half = max(1, base.steps // 2)
    variants = (
        Variant("1 vector", base),
        *more,
        *three,
        _variant(base, "3 vectors, λ = 0.01, half the steps", **likeness, steps=half),
        _variant(base, "3 vectors, λ = 0.01, 1 stage", **likeness, stages=1),
        _variant(base, "3 vectors, λ = 0.01, 1 tied stage", **likeness, stages=1, split=False),
        _preset(
            base, "textual-inversion", "Textual Inversion in our recipe, 3 vectors",
            num_vectors=3, **_recipe(base),
        ),
    )  # fmt: skip
    return Study("vectors", "tokens that stand for the placeholder", variants)


def _recipe(base: TrainConfig) -> dict[str, Any]:
    same = ("schedule", "flip", "learning_rate", "snr_gamma")
    return {name: getattr(base, name) for name in same}


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
    return Study("module", "what makes the tokens", variants)


def _rate(base: TrainConfig) -> Study:
    rates = (1e-3, 2e-3, 5e-3, 1e-2)
    found = [_variant(base, f"{rate:g}", rate, learning_rate=rate) for rate in rates]
    return Study("rate", "learning rate", tuple(found), "learning rate", log=True)


def _steps(base: TrainConfig) -> Study:
    counts = sorted({max(1, int(base.steps * part)) for part in (0.25, 0.5, 1, 2)})
    found = [_variant(base, f"{count} steps", count, steps=count) for count in counts]
    return Study("steps", "training steps", tuple(found), "steps", log=True)


def _choices(base: TrainConfig) -> Study:
    variants = (
        Variant(BASELINE, base),
        Variant("scene not named", base, scene_named=False),
        _variant(base, "constant rate", schedule="constant"),
        _variant(base, "warm-up of a tenth", warmup_steps=max(1, base.steps // 10)),
        _variant(base, "average of the last tokens", ema_decay=0.98),
        _variant(base, "base embedding kept", train_base=False),
        _variant(base, "gradient through the reference", reference_grad=True),
        _variant(base, "loss at 12×12 alone", loss_resolutions=(12,)),
        _variant(base, "loss at 6×6 alone", loss_resolutions=(6,)),
        _variant(base, "loss at 6×6 and 3×3", loss_resolutions=(3, 6)),
        _variant(base, "loss at 6×6 alone, λ = 0.01", loss_resolutions=(6,), weight_lambda=0.01),
        _variant(
            base, "half the copies, twice the steps",
            batch_size=max(1, base.batch_size // 2), steps=2 * base.steps,
        ),
        _variant(
            base, "twice the copies, half the steps",
            batch_size=2 * base.batch_size, steps=max(1, base.steps // 2),
        ),
        _variant(base, "ended on a plateau", patience=max(1, base.steps // 6)),
    )  # fmt: skip
    return Study("choices", "what the authors leave open", variants)


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
    return Study("better", "attempts to do better than the seed", variants)


_MAKERS = {
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
