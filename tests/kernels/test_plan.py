"""Every way to split a backward among kernels and programs gives the same gradients."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import pytest
import torch

pytest.importorskip("triton")

from hypothesis import given
from hypothesis import strategies as st
from sefi_fast.kernels import (
    Device,
    KernelConfig,
    empty_row_stats,
    plan_backward,
    plan_backward_fused,
    plan_backward_key_value,
    plan_backward_query,
    plan_forward,
)
from sefi_fast.kernels.plan import (
    CTA_OVERHEAD_BLOCKS,
    Layout,
    Layouts,
    SplitPlan,
    choose_num_splits,
)
from sefi_fast.kernels.reduce import _reduce_splits
from torch import Tensor

from sefi_fast.ops.inputs import AttentionInputs, OutputGrads
from sefi_fast.ops.triton import interpreted

needs_interpreter = pytest.mark.skipif(not interpreted(), reason="runs in Triton's interpreter")
DEVICE = Device(90, 2, True)
PLAIN = KernelConfig(32, 4, 1)
PIPELINED = KernelConfig(64, 4, 2, kv_in_loop=True)


class Call(NamedTuple):
    inputs: AttentionInputs
    grads: OutputGrads
    scale: float
    reference_grad: bool

    def buffers(self) -> list[Tensor]:
        """Return buffers of the four gradients, full of NaN: what is not written shows."""
        return [nan_like(x) for x in self.inputs[:4] if x is not None]


def nan_like(tensor: Tensor) -> Tensor:
    return tensor.new_full(tensor.transpose(1, 2).shape, float("nan"))


@functools.cache
def call(
    keys: int, head_dim: int, *, shared_keys: bool = False, extras: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Call:  # fmt: skip
    """Return a call; with extras it has a mask, weights, and two positions, one past the end."""
    generator = torch.Generator().manual_seed(keys + head_dim)
    batch, heads, rows = 2, 1, 100

    def normal(samples: int, length: int) -> Tensor:
        made = torch.randn((samples, length, heads, head_dim), generator=generator)
        return made.to(dtype).transpose(1, 2)

    samples = 1 if shared_keys else batch
    query, key, value = normal(batch, rows), normal(samples, keys), normal(samples, keys)
    inputs = AttentionInputs(query, key, value, normal(1, keys))
    grads = OutputGrads(normal(batch, rows), torch.randn(batch, generator=generator), None)
    if extras:
        mask = torch.ones(batch, keys, dtype=torch.uint8)
        mask[0, keys // 2] = mask[1, keys - 1] = 0
        inputs = inputs._replace(
            token_weights=torch.rand(1, keys, generator=generator),
            key_mask=mask,
            probs_positions=torch.tensor([[keys - 2, keys + 5]]),
        )
        grads = grads._replace(attn_probs=torch.randn((batch, heads, 2, rows), generator=generator))
    return Call(inputs, grads, head_dim**-0.5, extras)


def run_apart(case: Call, config: KernelConfig, keys_config: KernelConfig) -> list[Tensor]:
    """Return output, loss and the gradients by one kernel for dQ and one for dK and dV."""
    inputs, grads, scale, reference_grad = case
    output, (dq, dk, dv, dk_ref) = nan_like(inputs.query), case.buffers()
    forward, partials = plan_forward(inputs, output, None, scale, DEVICE, config)
    assert partials is not None
    partials.fill_(float("nan"))
    row_stats = empty_row_stats(inputs.query).fill_(float("nan"))
    totals = (dk, dv, dk_ref if reference_grad else None)
    for launch in (
        forward,
        plan_backward_query(inputs, grads, dq, row_stats, scale, reference_grad, DEVICE, config),
        *plan_backward_key_value(inputs, grads, row_stats, totals, scale, DEVICE, keys_config),
    ):
        launch.run()
    return [output, partials.sum((1, 2)), dq, *(x for x in totals if x is not None)]


@functools.cache
def wanted(keys: int, head_dim: int, **options: Any) -> list[Tensor]:
    return run_apart(call(keys, head_dim, **options), PLAIN, PLAIN)


def assert_close(found: list[Tensor], true: list[Tensor], tolerance: float = 1e-5) -> None:
    for got, want in zip(found, true, strict=True):
        torch.testing.assert_close(
            got.float(), want.float(), rtol=tolerance, atol=tolerance, check_dtype=False
        )


@needs_interpreter
@pytest.mark.parametrize(
    ("keys", "head_dim", "config", "keys_config"),
    [
        (33, 40, PLAIN, PLAIN._replace(block_n=16, kv_in_loop=True)),
        (77, 40, PLAIN, KernelConfig(64, 4, 1, block_n=32)),
        (128, 40, PLAIN, KernelConfig(64, 4, 1, block_n=64)),
        (77, 40, PLAIN, KernelConfig(16, 4, 1, split_dk_dv=True, block_n=32)),
        (77, 40, PIPELINED, PIPELINED),
        (77, 64, PIPELINED, PIPELINED._replace(block_n=16)),
    ],
    ids=["16 keys", "32 keys", "64 keys", "a launch a gradient", "pipelined", "pipelined tiles"],
)
@pytest.mark.parametrize("extras", [False, True])
def test_configurations_change_nothing(keys, head_dim, config, keys_config, extras) -> None:
    found = run_apart(call(keys, head_dim, extras=extras), config, keys_config)
    assert_close(found, wanted(keys, head_dim, extras=extras))


@needs_interpreter
@pytest.mark.parametrize(
    ("keys", "head_dim", "options"),
    [
        (5, 40, {}),
        (33, 64, {"shared_keys": True}),
        (77, 40, {"extras": False}),
    ],
)
@pytest.mark.parametrize("ways", [{}, {"prefetch": True}, {"load_do_late": True}], ids=str)
def test_fused_dk_and_dv_are_those_of_separate_kernels(keys, head_dim, options, ways) -> None:
    case = call(keys, head_dim, **options)
    dq, dk, dv, _ = case.buffers()
    config = KernelConfig(32, 4, 1, fuse_dkv="dkdv", **ways)
    for launch in plan_backward_fused(
        case.inputs, case.grads, dq, None, (dk, dv), case.scale, case.reference_grad, DEVICE, config
    ):
        launch.run()
    assert_close([dq, dk, dv], wanted(keys, head_dim, **options)[2:5])


@needs_interpreter
@pytest.mark.parametrize(("head_dim", "kernels"), [(40, 1), (80, 2)])
def test_a_call_takes_as_few_kernels_as_its_head_dimension_allows(head_dim, kernels) -> None:
    """One kernel and a reduction give dQ, dK and dV where registers hold the sums."""
    case = call(77, head_dim, extras=False, dtype=torch.float16)
    dq, dk, dv, _ = case.buffers()
    found = plan_backward(case.inputs, case.grads, (dq, dk, dv, None), case.scale, False, DEVICE)
    assert len({launch.kernel for launch in found} - {_reduce_splits}) == kernels
    for launch in found:
        launch.run()
    true = wanted(77, head_dim, extras=False, dtype=torch.float16)
    assert_close([dq, dk, dv], true[2:], 2e-2)


@needs_interpreter
@pytest.mark.parametrize("wants", [(0, 1, 2, 3), (2, 3), (1,)], ids=["all", "dV, dK_r", "dK"])
def test_gradients_that_are_not_fused_come_from_the_kernel_of_the_keys(wants) -> None:
    """The reference key's gradient is never fused; without dK nothing is."""
    case = call(77, 40, dtype=torch.float16)
    buffers = case.buffers()
    totals = tuple(buffer if place in wants else None for place, buffer in enumerate(buffers))
    for launch in plan_backward(case.inputs, case.grads, totals, case.scale, 3 in wants, DEVICE):
        launch.run()
    for place, true in enumerate(wanted(77, 40, dtype=torch.float16)[2:]):
        if place in wants:
            assert_close([buffers[place]], [true], 2e-2)


@pytest.mark.parametrize(
    ("probs", "reference_grad", "masked", "pipelined"),
    [
        (False, False, False, (True, True, True)),
        (True, False, False, (False, False, False)),
        (False, True, False, (True, False, False)),
        (False, False, True, (True, True, False)),
    ],
    ids=["plain", "probabilities", "reference_grad", "mask"],
)
def test_calls_that_triton_does_not_pipeline_have_other_configurations(
    probs: bool, reference_grad: bool, masked: bool, pipelined: tuple[bool, ...]
) -> None:
    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def rows(length: int) -> Tensor:
        return empty(1, length, 8, 80, dtype=torch.bfloat16).transpose(1, 2)

    inputs = AttentionInputs(rows(4096), rows(77), rows(77), rows(77))
    attn_probs = empty(1, 8, 2, 4096) if probs else None
    if probs:
        inputs = inputs._replace(probs_positions=empty(1, 2, dtype=torch.int64))
    if masked:
        inputs = inputs._replace(key_mask=empty(1, 77, dtype=torch.uint8))
    grads = OutputGrads(rows(4096), empty(1), attn_probs)
    device, row_stats = Device(80, 108, False), empty_row_stats(inputs.query)
    dq, dk, dv, dk_ref = (nan_like(x) for x in inputs[:4] if x is not None)
    totals = (dk, dv, dk_ref if reference_grad else None)
    forward, _ = plan_forward(inputs, dq, attn_probs, 0.15, device)
    query = plan_backward_query(inputs, grads, dq, row_stats, 0.15, reference_grad, device)
    keys, *_ = plan_backward_key_value(inputs, grads, row_stats, totals, 0.15, device)
    launches = (forward, query, keys)
    assert tuple(launch.config.pipelined for launch in launches) == pipelined
    for launch in launches[1:]:
        assert launch.arguments["PIPELINED"] == launch.config.pipelined
        assert launch.arguments["KV_IN_LOOP"] or not launch.config.pipelined


def split(heads: int, rows: int, config: KernelConfig) -> SplitPlan:
    query = Layout((1, heads, rows, 40), (1, 1, 1, 1), torch.bfloat16)
    layouts = Layouts(query, query, query, None, None, None, None)
    return choose_num_splits(layouts, config, Device(90, 132, False))


@pytest.mark.parametrize(
    ("heads", "rows", "ctas_per_sm", "plan"),
    [
        # 4 programs a head would be 512 in waves of 396: two waves for a third more than one.
        (128, 4096, 3, (3, 22)),
        (128, 4096, 2, (2, 32)),
        (128, 1024, 3, (3, 6)),
        # Everything fits at once: as many programs as there are blocks.
        (8, 1024, 3, (16, 1)),
        # Two waves of few blocks take longer than one of more: the overhead of a program counts.
        (8, 4096, 3, (32, 2)),
        (1, 1, 3, (1, 1)),
    ],
)
def test_programs_fill_whole_waves(heads, rows, ctas_per_sm, plan) -> None:
    assert split(heads, rows, KernelConfig(64, 4, 1, ctas_per_sm=ctas_per_sm)) == plan


@given(
    st.integers(1, 3000), st.integers(1, 20_000), st.integers(1, 4),
    st.sampled_from([16, 32, 64, 128]),
)  # fmt: skip
def test_every_query_has_a_program_and_no_other_split_is_expected_to_be_faster(
    heads: int, rows: int, ctas_per_sm: int, block_m: int
) -> None:
    num_splits, each = split(heads, rows, KernelConfig(block_m, 4, 1, ctas_per_sm=ctas_per_sm))
    blocks = -(-rows // block_m)
    assert (num_splits - 1) * each < blocks <= num_splits * each

    def cost(num_splits: int) -> float:
        waves = -(-heads * num_splits // (132 * ctas_per_sm))
        return waves * (-(-blocks // num_splits) + CTA_OVERHEAD_BLOCKS)

    assert cost(num_splits) == min(map(cost, range(1, blocks + 1)))
