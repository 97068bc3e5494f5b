"""Training: one image in, one small subject file out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sefi_fast.training.config import TrainConfig
from sefi_fast.utils.lazy import lazy_names

# The command's options are made of TrainConfig, and --help is not to wait for PyTorch.
_HOME = {
    "Callbacks": "sefi_fast.training.subject_state",
    "CheckpointError": "sefi_fast.training.checkpoint",
    "History": "sefi_fast.training.monitor",
    "ManifestError": "sefi_fast.training.manifest",
    "ManyResult": "sefi_fast.training.summary",
    "NonFiniteLossError": "sefi_fast.training.subject_state",
    "TrainingInterrupted": "sefi_fast.training.signals",
    "UnsavedSubjectError": "sefi_fast.training.subject_state",
    "load_image": "sefi_fast.training.image",
    "prepare": "sefi_fast.training.image",
    "train": "sefi_fast.training.trainer",
    "train_many": "sefi_fast.training.many",
}
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

if TYPE_CHECKING:
    from sefi_fast.training.checkpoint import CheckpointError
    from sefi_fast.training.image import load_image, prepare
    from sefi_fast.training.manifest import ManifestError
    from sefi_fast.training.many import train_many
    from sefi_fast.training.monitor import History
    from sefi_fast.training.signals import TrainingInterrupted
    from sefi_fast.training.subject_state import Callbacks, NonFiniteLossError, UnsavedSubjectError
    from sefi_fast.training.summary import ManyResult
    from sefi_fast.training.trainer import train

__getattr__ = lazy_names(__name__, _HOME)
