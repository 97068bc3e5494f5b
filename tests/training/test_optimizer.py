"""AdamW of a batch against torch's own, learning rates, moving averages and early stopping."""

from __future__ import annotations

import math

import pytest
import torch

from sefi_fast.subject import SubjectTokens
from sefi_fast.training import TrainConfig
from sefi_fast.training.optimizer import BatchedAdamW, MovingAverage, rate_factor
from sefi_fast.training.subject_state import EarlyStopping

CPU = torch.device("cpu")


def modules_of(count, widths=(16,), vectors=1, **options):
    """Of each subject one module for each text encoder."""
    generator = torch.Generator().manual_seed(1)

    def start(index, width):
        return (1 + index) * torch.randn(vectors, width, generator=generator)

    return [
        [SubjectTokens(start(index, width), stages=3, **options) for width in widths]
        for index in range(count)
    ]


def scaled(learning_rate=1e-2):
    """Return the state of one subject with loss scaling, and a step of one gradient value."""
    state = BatchedAdamW(modules_of(1), learning_rate, CPU, scaling=True)

    def step(value):
        gradient = torch.full_like(state.parameters, value).detach()
        return bool(state.update(gradient, state.last_good, torch.tensor([True])))

    return state, step


def rows_of(modules):
    """Tokens of each subject, those of all text encoders side by side."""
    return torch.stack([torch.cat([module() for module in one], -1).detach() for one in modules])


@pytest.mark.parametrize("kind", ["attention", "free"])
@pytest.mark.parametrize("train_base", [True, False])
def test_rows_are_those_of_the_modules(kind, train_base):
    modules = modules_of(3, (16, 24), 2, module=kind, train_base=train_base)
    with torch.no_grad():
        for parameter in (p for one in modules for m in one for p in m.parameters()):
            parameter += 0.1 * torch.randn(parameter.shape)
    state = BatchedAdamW(modules, 1e-3, CPU, scaling=False)
    torch.testing.assert_close(state.rows().detach(), rows_of(modules))


@pytest.mark.parametrize(("widths", "vectors"), [((16,), 1), ((16, 24), 2)])
def test_updates_are_those_of_adamw_with_steps_left_out(widths, vectors):
    modules = modules_of(2, widths, vectors)
    state = BatchedAdamW(modules, 1e-2, CPU, scaling=False)
    plain = [
        torch.optim.AdamW([g for m in one for g in m.parameter_groups(1e-2)], weight_decay=0.0)
        for one in modules
    ]
    generator = torch.Generator().manual_seed(2)
    factors = (1.0, 0.5, 0.25, 2.0)
    for number, factor in enumerate(factors):
        target = torch.randn(2, 3, 2, vectors, sum(widths), generator=generator)
        rows = state.rows()
        (gradient,) = torch.autograd.grad(((rows - target) ** 2).sum(), state.parameters)
        good = torch.tensor([True, number != 1])
        state.rate.fill_(factor)
        if number == 2:
            gradient[0, 5] = float("inf")
            good[0] = False
        found = state.update(gradient, rows.detach(), torch.tensor([True, number != 1]))
        assert found.tolist() == good.tolist()
        for index, (own, optimizer) in enumerate(zip(modules, plain, strict=True)):
            if not good[index]:
                continue
            rates = [g for module in own for g in module.parameter_groups(1e-2 * factor)]
            for group, wanted in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = wanted["lr"]
            optimizer.zero_grad()
            tokens = torch.cat([module() for module in own], -1)
            ((tokens - target[index]) ** 2).sum().backward()
            optimizer.step()
    torch.testing.assert_close(state.rows().detach(), rows_of(modules), rtol=1e-4, atol=1e-5)
    assert state.updates.tolist() == [3, 3]


def test_the_state_of_a_subject_has_names_for_each_text_encoder():
    states = [BatchedAdamW(modules_of(2, (16, 24)), 1e-2, CPU, scaling=False) for _ in range(2)]
    gradient = torch.rand_like(states[0].parameters).detach()
    states[0].update(gradient, states[0].last_good, torch.tensor([True, True]))
    saved = states[0].state_dict(1)
    assert saved["parameters.slots"].shape == (6, 16)
    assert saved["exp_avg.encoder_2.slots"].shape == (6, 24)
    states[1].load_state_dict(1, saved)
    assert torch.equal(states[1].parameters[1], states[0].parameters[1])
    assert not torch.equal(states[1].parameters[0], states[0].parameters[0])


def test_an_overflow_halves_that_subjects_scale_alone():
    state = BatchedAdamW(modules_of(3), 1e-2, CPU, scaling=True)
    first = state.scale.clone()
    parameters = state.parameters.detach().clone()
    gradient = torch.ones_like(parameters)
    gradient[1, 3] = float("inf")
    finite = torch.tensor([True, True, False])
    found = state.update(gradient, state.rows().detach(), finite)
    assert found.tolist() == [True, True, False]
    assert (state.scale / first).tolist() == [1.0, 0.5, 1.0]
    assert (state.parameters != parameters).any(1).tolist() == [True, False, False]
    # Gradients are taken of scaled losses: the moment is that of the loss itself.
    torch.testing.assert_close(state.exp_avg[0], torch.full_like(gradient[0], 0.1 / first[0]))


def test_a_scale_falls_to_one_where_an_overflow_is_a_failure():
    state, step = scaled()
    assert [step(float("nan")) for _ in range(13)] == [True] * 12 + [False]
    assert state.scale.item() == 1.0 and step(1.0)


def test_scales_grow_after_many_good_steps():
    state, step = scaled(1e-9)
    first = state.scale.item()
    for _ in range(2000):
        step(1.0)
    assert state.scale.item() == 2 * first


def test_the_last_good_tokens_are_those_of_the_last_finite_loss():
    state = BatchedAdamW(modules_of(2), 1e-2, CPU, scaling=False)
    gradient = torch.ones_like(state.parameters).detach()
    evaluated = state.rows().detach() + 1
    start = state.last_good.clone()
    state.update(gradient, evaluated, torch.tensor([True, False]))
    assert torch.equal(state.last_good[0], evaluated[0])
    assert torch.equal(state.last_good[1], start[1])


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


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("warmup", [0, 1, 5, 50])
def test_the_rate_stays_in_range_for_all_settings(steps, warmup):
    for schedule in ("cosine", "linear"):
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


def test_the_average_skips_nan_and_goes_on_from_its_state():
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


def ended_at(values, patience):
    stopping = EarlyStopping(patience)
    return next((n for n, value in enumerate(values, 1) if stopping.reached(value)), None)


def test_a_flat_loss_ends_a_run_and_a_falling_one_does_not():
    generator = torch.Generator().manual_seed(0)
    noise = (0.05 * torch.randn(1000, generator=generator)).tolist()
    trend = [2 - 0.0015 * n for n in range(1000)]
    falling = [value + x for value, x in zip(trend, noise, strict=True)]
    flat = [max(value, trend[500]) + x for value, x in zip(trend, noise, strict=True)]
    assert ended_at(falling, 100) is None
    ended = ended_at(flat, 100)
    assert ended is not None and 600 <= ended <= 800
    assert ended_at([1.0] * 99, 20) == 70
    assert ended_at([1.0] * 500, None) is None
