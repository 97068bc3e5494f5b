"""The update of all lanes at once against torch's own optimiser, lane by lane."""

from __future__ import annotations

import pytest
import torch

from sefi_fast.subject import SubjectTokens
from sefi_fast.training.optimizer import LaneState

CPU = torch.device("cpu")


def modules_of(count, widths=(16,), vectors=1):
    """Of each lane one module for each text encoder."""
    generator = torch.Generator().manual_seed(1)
    return [
        [
            SubjectTokens((1 + lane) * torch.randn(vectors, width, generator=generator), stages=3)
            for width in widths
        ]
        for lane in range(count)
    ]


def rows_of(modules):
    """Tokens of each lane, those of all text encoders side by side."""
    return torch.stack([torch.cat([module() for module in lane], -1).detach() for lane in modules])


@pytest.mark.parametrize("vectors", [1, 2])
@pytest.mark.parametrize("widths", [(16,), (16, 24)])
def test_rows_are_those_of_the_modules(widths, vectors):
    for kind in ("attention", "free"):
        for train_base in (True, False):
            modules = [
                [
                    SubjectTokens(start, stages=3, train_base=train_base, module=kind)
                    for start in (torch.randn(vectors, n) for n in widths)
                ]
                for _ in range(3)
            ]
            with torch.no_grad():
                for parameter in (p for lane in modules for m in lane for p in m.parameters()):
                    parameter += 0.1 * torch.randn(parameter.shape)
            state = LaneState(modules, 1e-3, CPU, scaling=False)
            assert state.rows().shape == (3, 3, 2, vectors, sum(widths))
            torch.testing.assert_close(state.rows().detach(), rows_of(modules))


@pytest.mark.parametrize("vectors", [1, 2])
@pytest.mark.parametrize("widths", [(16,), (16, 24)])
def test_updates_are_those_of_adamw_with_steps_left_out(widths, vectors):
    modules = modules_of(2, widths, vectors)
    state = LaneState(modules, 1e-2, CPU, scaling=False)
    plain = [
        torch.optim.AdamW([g for m in lane for g in m.parameter_groups(1e-2)], weight_decay=0.0)
        for lane in modules
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
        for lane, (own, optimizer) in enumerate(zip(modules, plain, strict=True)):
            if not good[lane]:
                continue
            rates = [g for module in own for g in module.parameter_groups(1e-2 * factor)]
            for group, wanted in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = wanted["lr"]
            optimizer.zero_grad()
            tokens = torch.cat([module() for module in own], -1)
            ((tokens - target[lane]) ** 2).sum().backward()
            optimizer.step()
    torch.testing.assert_close(state.rows().detach(), rows_of(modules), rtol=1e-4, atol=1e-5)
    assert state.updates.tolist() == [3, 3]


def test_a_lanes_state_names_what_belongs_to_which_text_encoder():
    states = [LaneState(modules_of(2, (16, 24)), 1e-2, CPU, scaling=False) for _ in range(2)]
    gradient = torch.rand_like(states[0].parameters).detach()
    states[0].update(gradient, states[0].last_good, torch.tensor([True, True]))
    saved = states[0].state_dict(1)
    assert saved["parameters.slots"].shape == (6, 16)
    assert saved["exp_avg.encoder_2.slots"].shape == (6, 24)
    states[1].load_state_dict(1, saved)
    assert torch.equal(states[1].parameters[1], states[0].parameters[1])
    assert not torch.equal(states[1].parameters[0], states[0].parameters[0])


def test_an_overflow_halves_that_lanes_scale_alone():
    state = LaneState(modules_of(3), 1e-2, CPU, scaling=True)
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


def test_a_scale_that_can_fall_no_further_is_a_failure():
    state = LaneState(modules_of(1), 1e-2, CPU, scaling=True)
    bad = torch.full_like(state.parameters, float("nan")).detach()
    found = []
    while not found or found[-1]:
        found.append(bool(state.update(bad, state.rows().detach(), torch.tensor([True]))))
    assert len(found) == 13


def test_a_scale_does_not_fall_below_one():
    state = LaneState(modules_of(1), 1e-2, CPU, scaling=True)
    for _ in range(20):
        for value in (float("inf"), 1.0):
            gradient = torch.full_like(state.parameters, value).detach()
            state.update(gradient, state.rows().detach(), torch.tensor([True]))
    assert state.scale.item() == 1.0


def test_scales_grow_after_many_good_steps():
    state = LaneState(modules_of(1), 1e-9, CPU, scaling=True)
    first = state.scale.item()
    gradient = torch.ones_like(state.parameters).detach()
    for _ in range(2000):
        state.update(gradient, state.last_good, torch.tensor([True]))
    assert state.scale.item() == 2 * first


def test_the_last_good_tokens_are_those_of_the_last_finite_loss():
    state = LaneState(modules_of(2), 1e-2, CPU, scaling=False)
    gradient = torch.ones_like(state.parameters).detach()
    evaluated = state.rows().detach() + 1
    start = state.last_good.clone()
    state.update(gradient, evaluated, torch.tensor([True, False]))
    assert torch.equal(state.last_good[0], evaluated[0])
    assert torch.equal(state.last_good[1], start[1])
