"""The rate over a run, the moving average, and the plateau."""

from __future__ import annotations

import math

import pytest
import torch

from sefi_fast.training import TrainConfig
from sefi_fast.training.optimizer import MovingAverage, rate_factor
from sefi_fast.training.subject_state import Plateau


def rates(**settings):
    config = TrainConfig(**settings)
    return [rate_factor(config, done) for done in range(config.steps)]


def test_constant_cosine_and_linear():
    assert rates(steps=3, schedule="constant") == [1.0, 1.0, 1.0]
    assert rates(steps=4, schedule="linear") == [1.0, 0.75, 0.5, 0.25]
    wanted = [0.5 * (1 + math.cos(math.pi * n / 4)) for n in range(4)]
    assert rates(steps=4, schedule="cosine") == pytest.approx(wanted)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
def test_warm_up_rises_evenly_and_the_rest_follows_the_schedule(schedule):
    seen = rates(steps=9, schedule=schedule, warmup_steps=4)
    assert seen[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert seen[4:] == pytest.approx(rates(steps=5, schedule=schedule))


def test_the_rate_stays_in_range_whatever_the_numbers():
    for steps in (1, 2, 5):
        for warmup in (0, 1, 5, 50):
            for schedule in ("constant", "cosine", "linear"):
                config = TrainConfig(steps=steps, warmup_steps=warmup, schedule=schedule)
                assert all(0 <= rate_factor(config, done) <= 1 for done in range(steps + 3))
                assert rate_factor(config, 0) > 0


def test_the_average_is_the_recurrence_written_out():
    rows = torch.randn(30, 2, 2, 5, generator=torch.Generator().manual_seed(0))
    average = MovingAverage(0.7, rows[0])
    wanted = rows[0].double()
    for count, row in enumerate(rows[1:]):
        average.update(row)
        decay = min(0.7, (1 + count) / (10 + count))
        wanted = decay * wanted + (1 - decay) * row.double()
    torch.testing.assert_close(average.current().double(), wanted, rtol=1e-5, atol=1e-6)


def test_the_average_leaves_out_what_is_not_finite_and_goes_on_from_its_state():
    first, second = torch.ones(1, 2, 3), torch.full((1, 2, 3), 2.0)
    average = MovingAverage(0.9, first)
    average.update(torch.full((1, 2, 3), float("nan")))
    assert torch.equal(average.current(), first)
    other = MovingAverage(0.9, second)
    other.load_state_dict(average.state_dict())
    for one in (average, other):
        one.update(second)
    assert torch.equal(average.current(), other.current())
    assert not torch.equal(average.current(), first)


def losses(values, patience):
    plateau = Plateau(patience)
    return next((n for n, value in enumerate(values, 1) if plateau.reached(value)), None)


def test_a_plateau_ends_a_falling_loss_does_not():
    generator = torch.Generator().manual_seed(0)
    noise = (0.05 * torch.randn(1000, generator=generator)).tolist()
    trend = [2 - 0.0015 * n for n in range(1000)]
    falling = [value + x for value, x in zip(trend, noise, strict=True)]
    flat = [max(value, trend[500]) + x for value, x in zip(trend, noise, strict=True)]
    assert losses(falling, 100) is None
    ended = losses(flat, 100)
    assert ended is not None and 600 <= ended <= 800
    assert losses([1.0] * 99, 20) == 70
    assert losses([1.0] * 500, None) is None
