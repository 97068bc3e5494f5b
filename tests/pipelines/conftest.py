"""Subjects for the random-weight pipelines."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
from pipelines.sampling import subject_for

from sefi_fast.subject import Subject


@pytest.fixture
def make_subject(sd15_pipeline) -> Callable[..., Subject]:
    """Makes a subject for the random-weight model: untrained, or as far from its class as asked."""
    return partial(subject_for, sd15_pipeline)


@pytest.fixture
def make_sdxl_subject(sdxl_pipeline) -> Callable[..., Subject]:
    """The same for the random-weight SDXL model."""
    return partial(subject_for, sdxl_pipeline)
