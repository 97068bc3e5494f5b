"""The CUDA C++ kernels against float64, compiled for the host with their threads as fibers.

`pytest -m long tests/ops/test_cuda_kernels_emulated.py` tries many more sizes and options.
"""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_emulation.library import Emulated
from ops.cases import lay_out
from ops.oracle import (
    GRADIENTS,
    Inputs,
    Results,
    backend_results,
    check_backend,
    make_inputs,
    poisoned_empty,
)

from sefi_fast.ops import cpu

FLOAT32, FLOAT16, BFLOAT16 = torch.float32, torch.float16, torch.bfloat16
EVERYTHING = {"weights": True, "mask": True, "tokens": 3, "reference_grad": True}
# Without the reference's gradient one kernel has all of dQ, dK and dV.
ONE_PASS = {**EVERYTHING, "reference_grad": False}
# Shared memory a block may have on GeForce cards, on 8.0 and on 9.0.
SMALL_SHARED, MIDDLE_SHARED, LARGE_SHARED = 99 * 1024, 163 * 1024, 227 * 1024


@pytest.fixture(scope="session")
def library(emulated_library: Path) -> Emulated:
    return Emulated(emulated_library)


@pytest.fixture
def emulated(library: Emulated, monkeypatch: pytest.MonkeyPatch) -> Emulated:
    """The kernels in the place of the native core, whose contract they share."""
    monkeypatch.setattr(cpu, "_C", library)
    monkeypatch.setattr(library, "multiprocessors", 2)
    library.schedule(0, late_copies=True)
    library.shared_limit(LARGE_SHARED)
    return library


def assert_same_bits(one: Results, other: Results) -> None:
    for name, tensor in one.outputs.items():
        assert torch.equal(tensor, other.outputs[name]), name
    for which, gradients in one.gradients.items():
        for name, gradient in gradients.items():
            if gradient is not None:
                assert torch.equal(gradient, other.gradients[which][name]), (which, name)


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16, BFLOAT16], ids=str)
@pytest.mark.parametrize("head_dim", [40, 64, 80, 160])
def test_usual_widths_in_every_dtype(emulated: Emulated, head_dim: int, dtype: torch.dtype) -> None:
    check_backend("cpu", make_inputs(head_dim=head_dim, dtype=dtype, tokens=2, seed=head_dim))


@pytest.mark.parametrize("head_dim", [40, 64, 80, 160])
def test_everything_at_once(emulated: Emulated, head_dim: int) -> None:
    dtype, all_heads = (FLOAT16, True) if head_dim in (40, 160) else (BFLOAT16, False)
    options = {"head_dim": head_dim, "dtype": dtype, "probs_all_heads": all_heads, "queries": 70}
    check_backend("cpu", make_inputs(**options, **EVERYTHING))


@pytest.mark.parametrize("queries", [1, 64, 65, 200])
@pytest.mark.parametrize("head_dim", [40, 64, 80, 160])
def test_backward_in_one_pass(emulated: Emulated, head_dim: int, queries: int) -> None:
    dtype, all_heads = (FLOAT16, True) if queries % 2 else (BFLOAT16, False)
    emulated.multiprocessors = 1
    options = {"head_dim": head_dim, "dtype": dtype, "probs_all_heads": all_heads}
    check_backend("cpu", make_inputs(1, 3, queries, **options, **ONE_PASS, seed=queries))


@pytest.mark.parametrize("keys", [1, 15, 64, 65, 80])
@pytest.mark.parametrize("limit", [MIDDLE_SHARED, LARGE_SHARED])
def test_one_pass_with_one_tile_of_rows_and_with_two(
    emulated: Emulated, limit: int, keys: int
) -> None:
    """At 80 columns two blocks fit on a multiprocessor of 8.0 with one tile of queries each."""
    emulated.multiprocessors = 1
    emulated.shared_limit(limit)
    check_backend("cpu", make_inputs(1, 3, 150, keys, 80, BFLOAT16, **ONE_PASS))


@pytest.mark.parametrize("hidden", [range(40), range(40, 80), range(80), range(3, 77)], ids=str)
def test_warps_whose_half_of_the_keys_is_hidden(emulated: Emulated, hidden: range) -> None:
    """At 160 columns two warps have the same rows, and the first and the last 40 keys."""
    inputs = make_inputs(1, 2, 70, 80, 160, FLOAT16, **ONE_PASS)
    assert inputs.key_mask is not None
    inputs.key_mask[:] = True
    inputs.key_mask[:, list(hidden)] = False
    check_backend("cpu", inputs)


@pytest.mark.parametrize("head_dim", [40, 160])
def test_a_single_visible_key_leaves_no_alignment(emulated: Emulated, head_dim: int) -> None:
    inputs = make_inputs(2, 2, 70, 77, head_dim, BFLOAT16, **ONE_PASS)
    assert inputs.key_mask is not None
    inputs.key_mask[:] = False
    inputs.key_mask[0, 5] = inputs.key_mask[-1, 76] = True
    check_backend("cpu", inputs)


def test_not_a_number_shows_in_the_alignment_of_a_single_key(emulated: Emulated) -> None:
    inputs = make_inputs(1, 1, 70, 77, 40, BFLOAT16, mask=True)
    assert inputs.key_mask is not None
    inputs.key_mask[:] = False
    inputs.key_mask[:, 5] = True
    query = inputs.query.clone()
    query[0, 0, 3] = float("nan")
    _, subject_loss, _ = cpu.forward(inputs.tensors._replace(query=query), inputs.options)
    assert subject_loss.isnan().all()


@pytest.mark.parametrize("size", [6000.0, 7500.0, 12000.0])
def test_half_precision_holds_the_weights_of_scores_of_any_size(
    emulated: Emulated, size: float
) -> None:
    """Where a score's own rounding is large a row's powers are not, but for their sum."""
    generator = torch.Generator().manual_seed(int(size))
    inputs = make_inputs(1, 2, 64, 16, 64, FLOAT16, scale=0.125)
    query, key = (
        (size + 300.0 * torch.randn(tensor.shape, generator=generator)).half()
        for tensor in (inputs.query, inputs.key)
    )
    output, _, _ = cpu.forward(inputs.tensors._replace(query=query, key=key), inputs.options)
    scores = query.double() @ key.double().transpose(-1, -2) * 0.125
    true = torch.softmax(scores, -1) @ inputs.value.double()
    torch.testing.assert_close(output.double(), true, rtol=1e-2, atol=1e-2)


def test_many_partial_sums_are_added_up_by_one_thread_each(emulated: Emulated) -> None:
    """Two splits of 128 heads: more blocks than it takes to keep a device busy."""
    emulated.multiprocessors = 200
    check_backend("cpu", make_inputs(4, 32, 70, 77, 40, FLOAT16, reference_grad=False))


@pytest.mark.parametrize("keys", [1, 39, 40, 41, 77])
def test_one_pass_of_wide_heads_at_the_ends_of_halves(emulated: Emulated, keys: int) -> None:
    emulated.shared_limit(MIDDLE_SHARED)
    inputs = make_inputs(1, 2, 80, keys, 160, BFLOAT16, **ONE_PASS)
    sharper = {name: getattr(inputs, name) * 8 for name in ("query", "key", "reference_key")}
    check_backend("cpu", inputs)
    check_backend("cpu", dataclasses.replace(inputs, **sharper))


@pytest.mark.parametrize("head_dim", [40, 80, 160])
def test_one_pass_without_a_reference(emulated: Emulated, head_dim: int) -> None:
    inputs = make_inputs(2, 2, 90, head_dim=head_dim, dtype=FLOAT16, reference=False, tokens=2)
    check_backend("cpu", inputs)


@pytest.mark.parametrize("limit", [MIDDLE_SHARED, LARGE_SHARED])
@pytest.mark.parametrize("head_dim", [40, 64, 80, 160])
def test_one_pass_in_any_order_of_threads_or_copies(
    emulated: Emulated, head_dim: int, limit: int
) -> None:
    inputs = make_inputs(1, 2, 200, 77, head_dim, BFLOAT16, **ONE_PASS)
    emulated.multiprocessors = 1
    emulated.shared_limit(limit)
    first = backend_results("cpu", inputs)
    for seed, late in ((1, True), (2, False)):
        emulated.schedule(seed, late_copies=late)
        assert_same_bits(backend_results("cpu", inputs), first)


@pytest.mark.parametrize("queries", [1, 16, 63, 64, 65, 130])
def test_any_number_of_queries(emulated: Emulated, queries: int) -> None:
    check_backend(
        "cpu", make_inputs(1, 2, queries, 77, 40, BFLOAT16, tokens=1, reference_grad=True)
    )


@pytest.mark.parametrize("keys", [1, 8, 16, 17, 79, 80, 81])
def test_keys_at_the_ends_of_tiles(emulated: Emulated, keys: int) -> None:
    check_backend("cpu", make_inputs(1, 2, 20, keys, 64, FLOAT16, tokens=2, reference_grad=True))


@pytest.mark.parametrize(
    ("head_dim", "keys", "dtype"),
    [(17, 5, FLOAT32), (1, 77, BFLOAT16), (256, 256, FLOAT16), (24, 100, FLOAT32)],
)
def test_other_sizes_take_the_simple_kernels(
    emulated: Emulated, head_dim: int, keys: int, dtype: torch.dtype
) -> None:
    inputs = make_inputs(1, 2, 19, keys, head_dim, dtype, **EVERYTHING)
    emulated.shared_limit(SMALL_SHARED)
    check_backend("cpu", inputs)


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
@pytest.mark.parametrize("kv, reference", [(True, True), (True, False), (False, True)])
def test_broadcast_keys(emulated: Emulated, kv: bool, reference: bool, dtype: torch.dtype) -> None:
    inputs = make_inputs(
        3, 2, 33, dtype=dtype, broadcast_kv=kv, broadcast_reference=reference, **EVERYTHING
    )
    check_backend("cpu", inputs)


@pytest.mark.parametrize("scale", [0.0, 1.0, -0.25])
def test_scales(emulated: Emulated, scale: float) -> None:
    check_backend("cpu", make_inputs(1, dtype=FLOAT16, scale=scale, **EVERYTHING))


@pytest.mark.parametrize("layout", ["offset", "padded", "one row", "one head", "one sample"])
def test_layouts(emulated: Emulated, layout: str) -> None:
    inputs = make_inputs(2, 2, 21, dtype=BFLOAT16, strided=False, reference_grad=True)
    names = ["query", "grad_output"]
    if layout != "one row":
        # Equal keys have no gradient but rounding, and nothing to measure that by.
        names += ["key", "value", "reference_key"]
    laid = {name: lay_out(getattr(inputs, name), layout) for name in names}
    check_backend("cpu", dataclasses.replace(inputs, **laid))


def test_plain_attention_without_a_reference(emulated: Emulated) -> None:
    check_backend("cpu", make_inputs(dtype=BFLOAT16, reference=False, tokens=1))


@pytest.mark.parametrize("multiprocessors", [1, 16, 200])
def test_any_number_of_multiprocessors(emulated: Emulated, multiprocessors: int) -> None:
    emulated.multiprocessors = multiprocessors
    check_backend("cpu", make_inputs(1, 1, 300, dtype=BFLOAT16, tokens=1, reference_grad=True))


@pytest.mark.parametrize("reference_grad", [True, False])
@pytest.mark.parametrize("queries", [16, 70])
def test_wide_heads_with_little_shared_memory(
    emulated: Emulated, queries: int, reference_grad: bool
) -> None:
    emulated.shared_limit(SMALL_SHARED)
    options = {**EVERYTHING, "reference_grad": reference_grad}
    check_backend("cpu", make_inputs(1, 2, queries, 77, 160, BFLOAT16, **options))


@pytest.mark.parametrize("head_dim, dtype", [(40, FLOAT16), (160, BFLOAT16), (20, FLOAT32)])
def test_no_order_of_threads_or_copies_changes_a_bit(
    emulated: Emulated, head_dim: int, dtype: torch.dtype
) -> None:
    inputs = make_inputs(1, 1, 150, 77, head_dim, dtype, **EVERYTHING)
    for limit in (LARGE_SHARED, SMALL_SHARED) if head_dim == 160 else (LARGE_SHARED,):
        emulated.shared_limit(limit)
        first = backend_results("cpu", inputs)
        for seed, late in ((1, True), (2, False)):
            emulated.schedule(seed, late_copies=late)
            assert_same_bits(backend_results("cpu", inputs), first)


@pytest.mark.parametrize("reference_grad", [True, False])
@pytest.mark.parametrize("head_dim, dtype", [(64, FLOAT16), (160, BFLOAT16), (64, FLOAT32)])
def test_identical_streams_have_no_alignment_and_no_gradient(
    emulated: Emulated, head_dim: int, dtype: torch.dtype, reference_grad: bool
) -> None:
    options = {"head_dim": head_dim, "dtype": dtype, "reference_grad": reference_grad}
    inputs = make_inputs(**options, weights=True)
    found = backend_results("cpu", dataclasses.replace(inputs, reference_key=inputs.key.clone()))
    assert not found.outputs["subject_loss"].any()
    gradients = (found.gradients["subject_loss"][name] for name in GRADIENTS)
    assert not any(gradient.any() for gradient in gradients if gradient is not None)


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
def test_nothing_in_a_hidden_key_reaches_a_result(emulated: Emulated, dtype: torch.dtype) -> None:
    inputs = make_inputs(1, dtype=dtype, **EVERYTHING)
    assert inputs.key_mask is not None
    wanted = backend_results("cpu", inputs)
    hidden = ~inputs.key_mask[0]
    assert hidden.any()
    for name in ("key", "value", "reference_key"):
        getattr(inputs, name)[:, :, hidden] = torch.nan
    assert_same_bits(backend_results("cpu", inputs), wanted)


@pytest.mark.parametrize("head_dim", [40, 64, 160])
def test_one_pass_leaves_what_nobody_asks_for(emulated: Emulated, head_dim: int) -> None:
    inputs = make_inputs(1, 2, 100, head_dim=head_dim, dtype=BFLOAT16, **ONE_PASS)

    def gradients(needs: tuple[bool, ...]) -> Any:
        with poisoned_empty():
            return cpu.backward(inputs.grads, inputs.tensors, inputs.options._replace(needs=needs))

    together = gradients((True, True, True, False))
    for needs in ((False, True, True), (True, True, False), (False, True, False)):
        some = gradients((*needs, False))
        for wanted, one, other in zip(needs, some, together, strict=False):
            assert (one is not None) == wanted
            assert one is None or torch.equal(one, other)


@pytest.mark.parametrize("head_dim", [40, 17])
def test_each_gradient_asked_for_alone(emulated: Emulated, head_dim: int) -> None:
    inputs = make_inputs(1, head_dim=head_dim, dtype=BFLOAT16, **EVERYTHING)
    needed = [tuple(i == j for j in range(4)) for i in range(4)]

    def gradients(needs: tuple[bool, ...]) -> Any:
        with poisoned_empty():
            options = inputs.options._replace(reference_grad=True, needs=needs)
            return cpu.backward(inputs.grads, inputs.tensors, options)

    together = gradients((True, True, True, True))
    for place, needs in enumerate(needed):
        alone = gradients(needs)
        assert [gradient is not None for gradient in alone] == list(needs)
        assert torch.equal(alone[place], together[place])


def test_queries_of_many_scores(emulated: Emulated) -> None:
    inputs = make_inputs(1, dtype=FLOAT16, reference_grad=True)
    sharper = {name: getattr(inputs, name) * 12 for name in ("query", "key", "reference_key")}
    check_backend("cpu", dataclasses.replace(inputs, **sharper))


@pytest.mark.long
@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16, BFLOAT16], ids=str)
@pytest.mark.parametrize("head_dim", [1, 8, 33, 40, 48, 64, 80, 96, 120, 160, 200, 256])
def test_every_width_with_every_count_of_keys(
    emulated: Emulated, head_dim: int, dtype: torch.dtype
) -> None:
    for seed, keys in enumerate((1, 2, 15, 16, 33, 64, 76, 77, 80, 81, 129, 256)):
        inputs = make_inputs(2, 2, 35, keys, head_dim, dtype, **EVERYTHING, seed=seed)
        check_backend("cpu", inputs)


@pytest.mark.long
@pytest.mark.parametrize("head_dim", [40, 64, 80, 160])
def test_every_combination_of_options(emulated: Emulated, head_dim: int) -> None:
    names = ("weights", "mask", "reference", "reference_grad", "broadcast_kv", "probs_all_heads")
    for seed, flags in enumerate(itertools.product((False, True), repeat=len(names))):
        chosen: dict[str, Any] = dict(zip(names, flags, strict=True))
        dtype = BFLOAT16 if seed % 2 else FLOAT16
        emulated.schedule(seed, late_copies=seed % 3 > 0)
        emulated.multiprocessors = 1 + seed % 5
        inputs: Inputs = make_inputs(
            2, 2, 66 + seed, 77, head_dim, dtype, tokens=seed % 4, seed=seed, **chosen
        )
        check_backend("cpu", inputs)
