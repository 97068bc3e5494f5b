"""Stage of a timestep: exact at every boundary, for every kind of number."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sefi_fast.prompts import stage_of


@pytest.mark.parametrize("stages", [1, 2, 3, 5, 7, 9, 10, 15, 60])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float32, torch.float64])
@pytest.mark.parametrize("total", [1000, 999, 50])
def test_all_whole_timesteps(stages, dtype, total):
    found = stage_of(torch.arange(total).to(dtype), stages, total)
    assert found.dtype == torch.int64
    assert found.tolist() == [t * stages // total for t in range(total)]


@settings(max_examples=200, deadline=None)
@given(timestep=st.floats(0, 999.875, width=32), stages=st.integers(1, 60))
def test_fractional_timesteps(timestep, stages):
    exact = Fraction(timestep) * stages / 1000
    near_a_border = abs(exact - round(exact)) < Fraction(1, 10**4)
    found = stage_of(torch.tensor(timestep), stages).item()
    if near_a_border:
        assert found in (int(exact), min(round(exact), stages - 1))
    else:
        assert found == int(exact)


def test_outside_the_range_is_clamped():
    assert stage_of(torch.tensor([-3, 1000, 5000]), 5).tolist() == [0, 4, 4]
    assert stage_of(torch.tensor([-0.5, 1000.0, 1e6]), 5).tolist() == [0, 4, 4]


@pytest.mark.parametrize("timestep", [600, 600.0, torch.tensor(600), torch.tensor(600.0)])
def test_numbers_and_scalar_tensors(timestep):
    found = stage_of(timestep, 5)
    assert found.shape == () and found.item() == 3


def test_half_precision_timesteps_are_not_lost():
    # 999 · 60 is beyond what float16 can hold.
    assert stage_of(torch.tensor(999.0, dtype=torch.float16), 60).item() == 59


@pytest.mark.parametrize("arguments", [(0, 1000), (-1, 1000), (5, 0)])
def test_wrong_numbers_are_told(arguments):
    with pytest.raises(ValueError, match="at least 1"):
        stage_of(10, *arguments)
