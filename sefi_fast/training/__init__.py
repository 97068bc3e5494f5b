"""Training: one picture in, one small subject file out."""

from __future__ import annotations

from sefi_fast.training.checkpoint import CheckpointError
from sefi_fast.training.config import TrainConfig
from sefi_fast.training.history import History
from sefi_fast.training.image import load_image, prepare
from sefi_fast.training.job import Callbacks, NonFiniteLossError, UnsavedSubjectError
from sefi_fast.training.manifest import ManifestError
from sefi_fast.training.many import train_many
from sefi_fast.training.signals import TrainingInterrupted
from sefi_fast.training.summary import ManyResult
from sefi_fast.training.trainer import train

__all__ = [
    "Callbacks",
    "CheckpointError",
    "History",
    "ManifestError",
    "ManyResult",
    "NonFiniteLossError",
    "TrainConfig",
    "TrainingInterrupted",
    "UnsavedSubjectError",
    "load_image",
    "prepare",
    "train",
    "train_many",
]
