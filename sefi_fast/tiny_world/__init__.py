"""The drawn world and the tiny Stable Diffusion model of it that comes with the package."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sefi_fast.tiny_world.drawing import Identity

CLASS_WORD = "creature"
SUBJECT_SCENE = "desert"
SUBJECT_IDENTITY: Identity
"""The creature of the bundled picture: held out, so the bundled model has never seen it."""

SAMPLING: dict[str, Any] = {"steps": 20, "guidance": 3.0}
"""Denoising steps and guidance that suit the bundled model, for `sefi_fast.generate`."""

_FOLDER = Path(__file__).parent

__all__ = [
    "CLASS_WORD",
    "SAMPLING",
    "SUBJECT_IDENTITY",
    "SUBJECT_SCENE",
    "bundled_model_path",
    "bundled_subject_image",
    "two_creatures_lora",
]


def bundled_model_path() -> Path:
    """Folder of the bundled model, for `StableDiffusionPipeline.from_pretrained`."""
    return _FOLDER / "model"


def bundled_subject_image() -> Path:
    """PNG file, 192×192, of the creature SUBJECT_IDENTITY in SUBJECT_SCENE."""
    return _FOLDER / "subject.png"


def two_creatures_lora() -> Path:
    """LoRA of the bundled model for two creatures side by side, for `pipe.load_lora_weights`.

    With it, pictures of 96×48 pixels show two creatures, the one that is named first on the left.
    """
    return _FOLDER / "two_creatures.safetensors"


def __getattr__(name: str) -> Any:
    if name != "SUBJECT_IDENTITY":
        raise AttributeError(f"module 'sefi_fast.tiny_world' has no attribute {name!r}")
    from sefi_fast.tiny_world.drawing import Identity

    return Identity("purple", "orange", "spotted", "big", "round")
