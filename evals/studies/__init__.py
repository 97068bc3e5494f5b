"""Studies of the method on the tiny world: `python -m evals.studies NAME …`."""

from evals.studies.overfit import attention_overfit
from evals.studies.study import StudyResult, run_study
from evals.studies.two_subjects import compare_two_subjects

__all__ = ["StudyResult", "attention_overfit", "compare_two_subjects", "run_study"]
