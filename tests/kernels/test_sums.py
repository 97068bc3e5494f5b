"""The kernel of the queries that sums up dK and dV gives what the kernels apart give."""

from __future__ import annotations

import functools
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton")

from sefi_fast.kernels import (
    Device,
    Gradients,
    Inputs,
    KernelConfig,
    empty_statistics,
    plan_backward,
    plan_backward_key_value,
    plan_backward_query,
    plan_backward_sums,
)
from sefi_fast.kernels.reduce import sum_partials
from torch import Tensor

from sefi_fast.ops.triton import interpreted

pytestmark = pytest.mark.skipif(not interpreted(), reason="runs in Triton's interpreter")
DEVICE = Device(90, 2, True)


class Call(NamedTuple):
    inputs: Inputs
    gradients: Gradients
    shared_keys: bool

    def empty(self, like: Tensor, batch: int | None = None) -> Tensor:
        """A gradient's buffer, [B, rows, H, D], of NaN: what is not written shows."""
        size, heads, rows, head_dim = like.shape
        return like.new_full((batch or size, rows, heads, head_dim), float("nan"))

    def totals(self) -> list[Tensor]:
        return [self.empty(x) for x in (self.inputs.query, self.inputs.key, self.inputs.value)]


@functools.cache
def call(keys: int, head_dim: int, shared_keys: bool, plain: bool, dtype: torch.dtype) -> Call:
    """A call with a mask, weights and two columns of the maps, one absent; or without all that."""
    generator = torch.Generator().manual_seed(keys + head_dim)
    batch, heads, rows = 2, 1, 100

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    query, grad_output = (normal(batch, rows, heads, head_dim).transpose(1, 2) for _ in range(2))
    samples = 1 if shared_keys else batch
    key, value = (normal(samples, keys, heads, head_dim).transpose(1, 2) for _ in range(2))
    if plain:
        return Call(
            Inputs(query, key, value, None, None, None, None),
            Gradients(grad_output, None, None),
            shared_keys,
        )
    reference = normal(1, keys, heads, head_dim).transpose(1, 2)
    mask = torch.ones(batch, keys, dtype=torch.uint8)
    mask[0, keys // 2] = mask[1, keys - 1] = 0
    probs_positions = torch.tensor([[keys - 2, keys + 5]])
    weights = torch.rand(1, keys, generator=generator)
    inputs = Inputs(query, key, value, reference, weights, mask, probs_positions)
    maps = torch.randn((batch, heads, 2, rows), generator=generator)
    subject_loss = torch.randn(batch, generator=generator)
    return Call(inputs, Gradients(grad_output, subject_loss, maps), shared_keys)


def apart(case: Call) -> list[Tensor]:
    """dQ, dK and dV by a kernel for the queries and one for the keys."""
    inputs, gradients, _ = case
    totals = case.totals()
    config = KernelConfig(32, 4, 1)
    statistics = empty_statistics(inputs.query).fill_(float("nan"))
    scale = inputs.query.shape[3] ** -0.5
    launches = [
        plan_backward_query(inputs, gradients, totals[0], statistics, scale, False, DEVICE, config),
        *plan_backward_key_value(
            inputs, gradients, statistics, (totals[1], totals[2], None), scale, DEVICE, config
        ),
    ]
    for launch in launches:
        launch.run()
    return totals


@pytest.mark.parametrize(
    ("keys", "head_dim", "shared_keys", "plain"),
    [(5, 40, False, False), (33, 64, True, False), (77, 40, False, True), (80, 80, True, False)],
)
@pytest.mark.parametrize("ways", [{}, {"prefetch": True}, {"late": True}], ids=str)
def test_the_sums_are_those_of_the_kernels_apart(
    keys: int, head_dim: int, shared_keys: bool, plain: bool, ways: dict[str, bool]
) -> None:
    case = call(keys, head_dim, shared_keys, plain, torch.float32)
    found = case.totals()
    config = KernelConfig(32, 4, 1, sums=2, **ways)
    for launch in plan_backward_sums(
        case.inputs, case.gradients, found[0], None, (found[1], found[2]), head_dim**-0.5, False,
        DEVICE, config,
    ):  # fmt: skip
        launch.run()
    for got, true in zip(found, apart(case), strict=True):
        torch.testing.assert_close(got, true, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("head_dim", "kernels"), [(40, 1), (64, 1), (80, 2), (160, 2)])
def test_a_call_takes_as_few_kernels_as_its_width_allows(head_dim: int, kernels: int) -> None:
    """dQ, dK and dV with one, besides the one that adds up partial sums, where registers allow."""
    case = call(77, head_dim, False, False, torch.float16)
    query_grad, key_grad, value_grad = case.totals()
    found = plan_backward(
        case.inputs, case.gradients, (query_grad, key_grad, value_grad, None), head_dim**-0.5,
        False, DEVICE,
    )  # fmt: skip
    assert len({launch.kernel for launch in found} - {sum_partials}) == kernels
    for launch in found:
        launch.run()
    true = apart(Call(*call(77, head_dim, False, False, torch.float16)))
    for got, wanted in zip((query_grad, key_grad, value_grad), true, strict=True):
        torch.testing.assert_close(got.float(), wanted.float(), rtol=2e-2, atol=2e-2)


def test_what_is_left_over_comes_from_the_kernel_of_the_keys() -> None:
    """The reference key's gradient is not among the sums; without dK nothing is."""
    case = call(77, 40, False, False, torch.float16)
    query_grad, key_grad, value_grad = case.totals()
    reference = case.inputs.reference_key
    assert reference is not None
    reference_grad = case.empty(reference)
    for totals in (
        (query_grad, key_grad, value_grad, reference_grad),
        (None, None, value_grad, reference_grad),
        (None, key_grad, None, None),
    ):
        for total in totals:
            if total is not None:
                total.fill_(float("nan"))
        for launch in plan_backward(
            case.inputs, case.gradients, totals, 40**-0.5, totals[3] is not None, DEVICE
        ):
            launch.run()
        assert not any(total is not None and total.isnan().any() for total in totals)
