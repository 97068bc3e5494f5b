"""Training: one picture in, one small subject file out."""

from __future__ import annotations

from sefi_fast.training.config import TrainConfig
from sefi_fast.training.history import History
from sefi_fast.training.image import load_image, prepare
from sefi_fast.training.trainer import NonFiniteLossError, train

__all__ = ["History", "NonFiniteLossError", "TrainConfig", "load_image", "prepare", "train"]
