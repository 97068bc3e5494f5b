"""The C++ backend against float64: every instruction set, odd shapes, masks, strides, dtypes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from ops.oracle import Inputs, Results, backend_results, check_backend, make_inputs
from torch import Tensor

from sefi_fast.errors import BackendError
from sefi_fast.ops import cpu, fused_cross_attention
from sefi_fast.ops.types import OutputGrads

_C = pytest.importorskip("sefi_fast._C", reason="the native core is not built")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ALL: dict[str, Any] = {"weights": True, "tokens": 4, "reference_grad": True}


@pytest.fixture(params=_C.instruction_sets())
def instruction_set(request) -> Iterator[str]:
    """Each instruction set that this processor has, forced."""
    before = _C.instruction_set()
    _C.set_instruction_set(request.param)
    yield request.param
    _C.set_instruction_set(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", (8, 33, 40, 64, 80, 96, 160, 256))
def test_head_widths(instruction_set, head_dim, dtype):
    check_backend("cpu", make_inputs(1, 2, 70, 77, head_dim, dtype, **ALL, seed=head_dim))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("keys", (1, 5, 64, 65, 77, 128, 256))
@pytest.mark.parametrize("queries", (1, 37))
def test_numbers_of_keys_and_queries(instruction_set, queries, keys, dtype):
    # One query is few numbers to take a largest error of, so there are more heads of it.
    heads = 12 if queries == 1 else 2
    inputs = make_inputs(3, heads, queries, keys, 40, dtype, **ALL, mask=keys > 5, seed=keys)
    # On x86 the plain code has no fused multiply-add: each step of a dot product rounds twice.
    check_backend("cpu", inputs, factor=3.0 if instruction_set == "generic" else 2.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "kind",
    (
        {"reference": False},
        {"strided": False},
        {"mask": True, "tokens": 3, "probs_all_heads": True, "reference_grad": True},
        {"broadcast_kv": True, "broadcast_reference": True, "mask": True, **ALL},
        {"broadcast_reference": True, "reference_grad": True},
        {"broadcast_kv": True, "tokens": 2},
        {"scale": -0.3, **ALL},
        {"scale": 0.0},
    ),
    ids=lambda kind: ",".join(kind),
)
def test_kinds(instruction_set, kind, dtype):
    check_backend("cpu", make_inputs(3, 2, 90, 77, 40, dtype, **kind, seed=7))


def test_several_pieces_of_rows_are_summed():
    """Longer than one unit of work, forward and backward."""
    check_backend("cpu", make_inputs(2, 1, 1100, 77, 40, **ALL, broadcast_kv=True, mask=True))


@pytest.mark.parametrize("shape", ((0, 2, 5), (2, 0, 5), (2, 2, 0)), ids=str)
def test_empty_inputs(shape):
    check_backend("cpu", make_inputs(*shape, 77, 40, tokens=2, reference_grad=True))


def test_expanded_batch_is_not_a_shared_key():
    """A key expanded over the batch has stride 0, but a gradient for each sample."""
    inputs = make_inputs(2, 2, 20, 7, 8)
    key = inputs.key[:1].expand(2, -1, -1, -1).detach().requires_grad_()
    result = fused_cross_attention(inputs.query, key, inputs.value, backend="cpu")
    (grad,) = torch.autograd.grad(result.output, key, inputs.grad_output)
    assert grad.shape == key.shape
    assert not torch.equal(grad[0], grad[1])


def test_equal_reference_gives_exactly_zero():
    inputs = make_inputs(2, 2, 100, 77, 40)
    result = fused_cross_attention(
        inputs.query, inputs.key, inputs.value, reference_key=inputs.key, backend="cpu"
    )
    assert result.subject_loss.tolist() == [0.0, 0.0]


def test_one_key_is_attended_fully(instruction_set):
    inputs = make_inputs(1, 1, 50, 1, 16, strided=False)
    result = fused_cross_attention(inputs.query, inputs.key, inputs.value, backend="cpu")
    assert torch.equal(result.output, inputs.value.expand(1, 1, 50, 16))


def test_very_unequal_scores_stay_finite(instruction_set):
    inputs = make_inputs(1, 2, 65, 77, 40, reference_grad=True, scale=300.0)
    check_backend("cpu", inputs)


# As bits: a NaN, that of CUDA devices, the one that memory full of ones is, and the two infinities.
NOT_FINITE = {
    torch.float32: (0x7FC00000, 0x7FFFFFFF, -1, 0x7F800000, -0x800000),
    torch.float16: (0x7E00, 0x7FFF, -1, 0x7C00, -0x400),
    torch.bfloat16: (0x7FC0, 0x7FFF, -1, 0x7F80, -0x80),
}


def _write(bits: int, tensor: Tensor, *place: int) -> None:
    tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)[place] = bits


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_in_one_row_stays_in_that_row(instruction_set, dtype):
    for bits in NOT_FINITE[dtype][:3]:
        inputs = make_inputs(1, 1, 40, 77, 40, dtype, strided=False)
        _write(bits, inputs.query, 0, 0, 3, 5)
        result = fused_cross_attention(inputs.query, inputs.key, inputs.value, backend="cpu")
        hit = result.output.isnan()[0, 0]
        assert hit[3].all() and hit.sum() == 40, hex(bits)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("name", "place"),
    (
        ("query", (0, 1, 3, 5)),
        ("key", (0, 1, 4, 5)),
        ("value", (0, 1, 4, 5)),
        ("reference_key", (0, 1, 4, 5)),
        ("grad_output", (0, 1, 3, 5)),
        ("token_weights", (0, 4)),
        ("grad_subject_loss", (0,)),
        ("grad_attn_probs", (0, 0, 3)),
    ),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_finite_is_so_where_the_eager_path_has_it(instruction_set, name, place, dtype):
    """NaN and infinities in one place of one tensor; rows that fill no tile are behind."""
    inputs = make_inputs(
        2, 2, 41, 77, 40, dtype, weights=True, tokens=2, strided=False, reference_grad=True
    )
    # Then minus infinity in a key hides it, and all else is finite.
    inputs.query.abs_()
    tensor = getattr(inputs, name)
    before = tensor.clone()
    for bits in NOT_FINITE[tensor.dtype]:
        _write(bits, tensor, *place)
        found, wanted = backend_results("cpu", inputs), _eager_in_float32(inputs)
        tensor.copy_(before)
        for output, want in wanted.outputs.items():
            got = found.outputs[output]
            assert torch.equal(got.isnan(), want.isnan()), (output, hex(bits))
            assert torch.equal(got.isinf(), want.isinf()), (output, hex(bits))
        # Which of both a gradient is depends on what became of a probability of nothing.
        for which, gradients in wanted.gradients.items():
            for gradient, want in gradients.items():
                got = found.gradients[which][gradient]
                assert torch.equal(got.isfinite(), want.isfinite()), (gradient, which, hex(bits))


def _eager_in_float32(inputs: Inputs) -> Results:
    """PyTorch's own products of bfloat16 spread a NaN to the row before."""
    wide = {
        field.name: value.float()
        for field in dataclasses.fields(inputs)
        if isinstance(value := getattr(inputs, field.name), Tensor) and value.is_floating_point()
    }
    return backend_results("eager", dataclasses.replace(inputs, **wide))


def test_query_gradient_alone_leaves_the_others_out():
    inputs = make_inputs(1, 2, 20, 77, 40)
    options = inputs.options._replace(needs=(True, False, False, False))
    grads = cpu.backward(OutputGrads(inputs.grad_output, None, None), inputs.tensors, options)
    assert grads[0] is not None and grads[1:] == (None, None, None)


def test_refusals_are_in_words():
    inputs = make_inputs(1, 1, 4, 5, 8)
    with pytest.raises(BackendError, match="float64"):
        fused_cross_attention(
            inputs.query.double(), inputs.key.double(), inputs.value.double(), backend="cpu"
        )
    with pytest.raises(ValueError, match="choose from"):
        _C.set_instruction_set("sse9")
