"""Blocks whose loads, keys included, are asked for ahead give what keys held over the loop give."""

from __future__ import annotations

import functools

import pytest
import torch

pytest.importorskip("triton")

from sefi_fast.kernels import (
    Device,
    Gradients,
    Inputs,
    KernelConfig,
    empty_statistics,
    plan_backward_key_value,
    plan_backward_query,
    plan_forward,
)
from torch import Tensor

from sefi_fast.ops.triton import interpreted

DEVICE = Device(80, 2, True)
HELD = KernelConfig(32, 4, 1)
PIPELINED = KernelConfig(64, 4, 2, reload=True)
SCALE = 0.15


@functools.cache
def call(head_dim: int, masked: bool) -> tuple[Inputs, Gradients]:
    generator = torch.Generator().manual_seed(head_dim)
    batch, heads, rows, keys = 2, 1, 100, 77

    def normal(length: int) -> Tensor:
        return torch.randn((batch, length, heads, head_dim), generator=generator).transpose(1, 2)

    mask = torch.ones(batch, keys, dtype=torch.uint8)
    mask[0, 5] = mask[1, keys - 1] = 0
    weights = torch.rand(1, keys, generator=generator) if masked else None
    inputs = Inputs(
        normal(rows), normal(keys), normal(keys), normal(keys), weights,
        mask if masked else None, None,
    )  # fmt: skip
    return inputs, Gradients(normal(rows), torch.randn(batch, generator=generator), None)


def nan_like(rows: Tensor) -> Tensor:
    return rows.new_full(rows.transpose(1, 2).shape, float("nan"))


def results(head_dim: int, masked: bool, config: KernelConfig, key_tile: int) -> list[Tensor]:
    """Output, subject loss, dQ, dK, dV, whose unwritten parts are NaN."""
    inputs, gradients = call(head_dim, masked)
    assert inputs.value is not None
    output = nan_like(inputs.query)
    launch, partials = plan_forward(inputs, output, None, SCALE, DEVICE, config)
    assert partials is not None
    partials.fill_(float("nan"))
    launch.run()
    grad_query, statistics = nan_like(inputs.query), empty_statistics(inputs.query)
    statistics.fill_(float("nan"))
    plan_backward_query(
        inputs, gradients, grad_query, statistics, SCALE, False, DEVICE, config
    ).run()
    totals = (nan_like(inputs.key), nan_like(inputs.value), None)
    for each in plan_backward_key_value(
        inputs, gradients, statistics, totals, SCALE, DEVICE, config._replace(key_tile=key_tile)
    ):
        each.run()
    return [output, partials.sum((1, 2)), grad_query, *totals[:2]]


@pytest.mark.skipif(not interpreted(), reason="runs in Triton's interpreter")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("head_dim", "key_tile"), [(40, 0), (64, 16), (80, 64)])
def test_what_is_asked_for_ahead_changes_nothing(
    head_dim: int, key_tile: int, masked: bool
) -> None:
    wanted = results(head_dim, masked, HELD, 0)
    for got, true in zip(results(head_dim, masked, PIPELINED, key_tile), wanted, strict=True):
        torch.testing.assert_close(got, true, rtol=1e-5, atol=1e-5)


def half(maps: bool) -> tuple[Inputs, Gradients]:
    """A call in half precision on tensors without memory."""

    def rows(length: int) -> Tensor:
        return torch.empty((1, length, 8, 80), dtype=torch.bfloat16, device="meta").transpose(1, 2)

    tokens = torch.empty((1, 2), dtype=torch.int64, device="meta") if maps else None
    inputs = Inputs(rows(4096), rows(77), rows(77), rows(77), None, None, tokens)
    of_maps = torch.empty((1, 8, 2, 4096), device="meta") if maps else None
    return inputs, Gradients(rows(4096), torch.empty(1, device="meta"), of_maps)


@pytest.mark.parametrize("maps", [False, True])
@pytest.mark.parametrize("reference_grad", [False, True])
def test_calls_that_triton_does_not_pipeline_have_other_configurations(
    maps: bool, reference_grad: bool
) -> None:
    """A loop over maps stands inside the loop over the rows, or registers do not suffice."""
    inputs, gradients = half(maps)
    assert inputs.value is not None
    device = Device(80, 108, False)
    of_maps = torch.empty((1, 8, 2, 4096), device="meta") if maps else None
    forward, _ = plan_forward(inputs, nan_like(inputs.query), of_maps, SCALE, device)
    assert forward.config.pipelined == (not maps)
    statistics = empty_statistics(inputs.query)
    dq = plan_backward_query(
        inputs, gradients, nan_like(inputs.query), statistics, SCALE, reference_grad, device
    )
    totals = tuple(nan_like(x) for x in (inputs.key, inputs.value, inputs.key))
    wanted = totals if reference_grad else (*totals[:2], None)
    keys, *_ = plan_backward_key_value(inputs, gradients, statistics, wanted, SCALE, device)
    for launch in (dq, keys):
        assert launch.config.pipelined == (not maps and not reference_grad)
        assert launch.arguments["PIPELINED"] == launch.config.pipelined
        assert launch.arguments["RELOAD"] or not launch.config.pipelined


def test_a_mask_keeps_the_kernel_of_the_keys_from_the_pipeline_alone() -> None:
    inputs, gradients = half(maps=False)
    assert inputs.value is not None
    inputs = inputs._replace(key_mask=torch.empty((1, 77), dtype=torch.uint8, device="meta"))
    device, statistics = Device(80, 108, False), empty_statistics(inputs.query)
    dq = plan_backward_query(
        inputs, gradients, nan_like(inputs.query), statistics, SCALE, False, device
    )
    totals = (nan_like(inputs.key), nan_like(inputs.value), None)
    keys, *_ = plan_backward_key_value(inputs, gradients, statistics, totals, SCALE, device)
    assert dq.config.pipelined and not keys.config.pipelined
