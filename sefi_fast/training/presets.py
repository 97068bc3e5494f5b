"""Named settings: the method itself, and two older ones it contains as special cases."""

from __future__ import annotations

from typing import Any

_NO_ATTENTION_LOSS: dict[str, Any] = {"weight_lambda": 0.0, "split": False, "module": "free"}

PRESETS: dict[str, dict[str, Any]] = {
    "sefi": {},
    "textual-inversion": {
        **_NO_ATTENTION_LOSS,
        "stages": 1,
        "schedule": "constant",
        "steps": 3000,
        "batch_size": 4,
        "flip": False,
    },
    "prospect": {**_NO_ATTENTION_LOSS, "stages": 10, "schedule": "constant", "flip": False},
}
"""What each preset sets; everything else keeps `TrainConfig`'s default.

"textual-inversion" is one free row for all timesteps and both streams, with the steps, the batch
and the rate of diffusers' example (whose 5e-4 is scaled by its batch of 4). "prospect" is ten free
rows, one a stage, for both streams, in the 600 steps of its paper.
"""


def preset_settings(name: str) -> dict[str, Any]:
    """The fields that a preset sets.

    Raises:
        ValueError: there is no preset of that name.
    """
    if name not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(map(repr, PRESETS))}, got {name!r}")
    return dict(PRESETS[name])
