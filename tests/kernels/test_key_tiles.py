"""Tiles of keys on the grid give the gradients that one program for all keys gives."""

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
)
from torch import Tensor

from sefi_fast.ops.triton import interpreted

pytestmark = pytest.mark.skipif(not interpreted(), reason="runs in Triton's interpreter")
DEVICE = Device(90, 2, True)
ALL_KEYS = KernelConfig(32, 4, 1)


@functools.cache
def gradients_of_keys(keys: int, config: KernelConfig, seed: int = 0) -> list[Tensor]:
    """dK, dV and dK_r of a call with a mask, weights and two columns of the maps, one absent."""
    generator = torch.Generator().manual_seed(seed)
    batch, heads, rows, head_dim = 2, 1, 70, 40

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    query, grad_output = (normal(batch, rows, heads, head_dim).transpose(1, 2) for _ in range(2))
    key, value = (normal(batch, keys, heads, head_dim).transpose(1, 2) for _ in range(2))
    reference = normal(1, keys, heads, head_dim).transpose(1, 2)
    mask = torch.ones(batch, keys, dtype=torch.uint8)
    mask[0, keys // 2] = mask[1, keys - 1] = 0
    probs_positions = torch.tensor([[keys - 2, keys + 5]])
    weights = torch.rand(1, keys, generator=generator)
    inputs = Inputs(query, key, value, reference, weights, mask, probs_positions)
    gradients = Gradients(grad_output, normal(batch), normal(batch, heads, 2, rows))
    statistics = empty_statistics(query).fill_(float("nan"))
    scale = head_dim**-0.5
    plan_backward_query(inputs, gradients, None, statistics, scale, True, DEVICE, ALL_KEYS).run()
    totals = tuple(
        query.new_full((size, keys, heads, head_dim), float("nan")) for size in (batch, batch, 1)
    )
    for launch in plan_backward_key_value(
        inputs, gradients, statistics, totals, scale, DEVICE, config
    ):
        launch.run()
    return list(totals)


@pytest.mark.parametrize(("keys", "key_tile"), [(33, 16), (77, 16), (77, 32), (77, 64), (128, 64)])
def test_a_tile_of_keys_a_program_changes_nothing(keys: int, key_tile: int) -> None:
    wanted = gradients_of_keys(keys, ALL_KEYS)
    reload = key_tile == 16
    found = gradients_of_keys(keys, KernelConfig(64, 4, 1, reload=reload, key_tile=key_tile))
    for got, true in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, true, rtol=1e-5, atol=1e-5)


def test_each_gradient_may_have_a_launch_of_its_own_with_tiles_too() -> None:
    wanted = gradients_of_keys(77, ALL_KEYS)
    found = gradients_of_keys(77, KernelConfig(16, 4, 1, separate=True, key_tile=32))
    for got, true in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, true, rtol=1e-5, atol=1e-5)
