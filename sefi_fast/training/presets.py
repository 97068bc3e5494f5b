"""Named settings: the method, a variant nearer to the picture, and two older methods in it."""

from __future__ import annotations

from typing import Any

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

"likeness" gives the subject three vectors: nearer to the picture, and less ready to follow a prompt
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
