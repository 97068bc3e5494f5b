"""Pictures to look at, scores of subjects, and studies of the method on the tiny world."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sefi_fast.evaluation.sheets import (
    Panel,
    contact_sheet,
    training_curves,
    validation_sheet,
)
from sefi_fast.evaluation.swapping import swap_sheet
from sefi_fast.lazy import lazy_names

# Studies train, and training is not needed to look at pictures.
_HOME = {
    "Evaluation": "sefi_fast.evaluation.evaluation_report",
    "evaluate": "sefi_fast.evaluation.scoring",
    "StudyResult": "sefi_fast.evaluation.study",
    "compare_two_subjects": "sefi_fast.evaluation.two_subjects",
    "attention_overfit": "sefi_fast.evaluation.overfit",
    "run_study": "sefi_fast.evaluation.study",
    "score_picture": "sefi_fast.evaluation.scores",
}
__all__ = [
    "Evaluation",
    "Panel",
    "StudyResult",
    "attention_overfit",
    "compare_two_subjects",
    "contact_sheet",
    "evaluate",
    "run_study",
    "score_picture",
    "swap_sheet",
    "training_curves",
    "validation_sheet",
]

if TYPE_CHECKING:
    from sefi_fast.evaluation.evaluation_report import Evaluation
    from sefi_fast.evaluation.overfit import attention_overfit
    from sefi_fast.evaluation.scores import score_picture
    from sefi_fast.evaluation.scoring import evaluate
    from sefi_fast.evaluation.study import StudyResult, run_study
    from sefi_fast.evaluation.two_subjects import compare_two_subjects

__getattr__ = lazy_names(__name__, _HOME)
