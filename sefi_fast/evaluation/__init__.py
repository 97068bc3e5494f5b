"""Scores of trained subjects, contact sheets and training curves."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sefi_fast.evaluation.sheets import (
    Panel,
    contact_sheet,
    swap_sheet,
    training_curves,
    validation_sheet,
)
from sefi_fast.utils.lazy import lazy_names

# Scores need transformers and training. Sheets need neither.
_HOME = {
    "Evaluation": "sefi_fast.evaluation.scoring",
    "evaluate": "sefi_fast.evaluation.scoring",
    "score_image": "sefi_fast.evaluation.judge_scorer",
}
__all__ = [
    "Evaluation",
    "Panel",
    "contact_sheet",
    "evaluate",
    "score_image",
    "swap_sheet",
    "training_curves",
    "validation_sheet",
]

if TYPE_CHECKING:
    from sefi_fast.evaluation.judge_scorer import score_image
    from sefi_fast.evaluation.scoring import Evaluation, evaluate

__getattr__ = lazy_names(__name__, _HOME)
