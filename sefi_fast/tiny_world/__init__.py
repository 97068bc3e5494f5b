"""The drawn world and the tiny Stable Diffusion model of it that comes with the package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

CLASS_WORD = "creature"
SUBJECT_SCENE = "desert"
"""The scene of the bundled image, which shows `drawing.SUBJECT_IDENTITY`."""

SAMPLING: dict[str, Any] = {"steps": 20, "guidance": 3.0}
"""Denoising steps and guidance for the bundled model, as `sefi_fast.generate` takes them."""

_FOLDER = Path(__file__).parent

__all__ = [
    "CLASS_WORD",
    "SAMPLING",
    "SUBJECT_SCENE",
    "bundled_model_path",
    "bundled_subject_image",
    "two_creatures_lora",
]


def bundled_model_path() -> Path:
    """Return the folder of the bundled model, for `StableDiffusionPipeline.from_pretrained`."""
    return _FOLDER / "model"


def bundled_subject_image() -> Path:
    """Return the PNG file, 192×192, of a creature that no training image shows."""
    return _FOLDER / "subject.png"


def two_creatures_lora() -> Path:
    """Return the LoRA of the bundled model for two creatures, for `pipe.load_lora_weights`.

    With it, images of 96×48 pixels show two creatures. The one that is named first is on the left.
    """
    return _FOLDER / "two_creatures.safetensors"
