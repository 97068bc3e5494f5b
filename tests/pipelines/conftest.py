"""Pipelines and subjects with random weights, of the family that a test asks for."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from pipelines.sampling import subject_for

from sefi_fast.subject import Subject


@pytest.fixture
def family() -> str:
    """Return the family of a test that does not ask for both by `both_families`."""
    return "sd15"


@pytest.fixture
def pipe(request: pytest.FixtureRequest, family: str) -> Any:
    """Return a fresh random-weight pipeline of the family."""
    return request.getfixturevalue(f"{family}_pipeline")


@pytest.fixture
def make_subject(pipe: Any) -> Callable[..., Subject]:
    """Return `subject_for` of that pipeline."""
    return partial(subject_for, pipe)
