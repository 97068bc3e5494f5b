"""The C++ backend against float64: every instruction set, odd shapes, masks, strides, dtypes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
from ops.oracle import backend_results, check_backend, make_inputs
from torch import Tensor

from sefi_fast.errors import BackendError
from sefi_fast.ops import fused_cross_attention

_C = pytest.importorskip("sefi_fast._C", reason="the native core is not built")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ALL: dict[str, Any] = {"weights": True, "tokens": 4, "reference_grad": True}


@pytest.fixture(params=_C.instruction_sets())
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Force each instruction set of this processor."""
    before = _C.instruction_set()
    _C.set_instruction_set(request.param)
    yield request.param
    _C.set_instruction_set(before)


def _cases() -> Iterator[dict[str, Any]]:
    """Arguments of make_inputs."""
    for head_dim in (8, 33, 40, 64, 80, 96, 160, 256):
        yield {"batch": 1, "queries": 70, "head_dim": head_dim, "seed": head_dim, **ALL}
    for queries, keys in product((1, 37), (1, 5, 64, 65, 77, 128, 256)):
        # The largest error of a single query needs more heads to be representative.
        sizes = {"heads": 12 if queries == 1 else 2, "queries": queries, "keys": keys}
        yield {"batch": 3, **sizes, "mask": keys > 5, "seed": keys, **ALL}
    for kind in (
        {"reference": False},
        {"strided": False},
        {"mask": True, "tokens": 3, "probs_all_heads": True, "reference_grad": True},
        {"broadcast_kv": True, "broadcast_reference": True, "mask": True, **ALL},
        {"broadcast_reference": True, "reference_grad": True},
        {"broadcast_kv": True, "tokens": 2},
        {"scale": -0.3, **ALL},
        {"scale": 0.0},
    ):
        yield {"batch": 3, "queries": 90, "seed": 7, **kind}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", list(_cases()), ids=lambda case: ",".join(map(str, case.values())))
def test_accuracy(instruction_set: str, case: dict[str, Any], dtype: torch.dtype) -> None:
    # The plain x86 code has no fused multiply-add: each step of a dot product rounds twice.
    factor = 3.0 if instruction_set == "generic" and "heads" in case else 2.0
    check_backend("cpu", make_inputs(dtype=dtype, **case), factor=factor)


def test_accuracy_of_very_unequal_scores(instruction_set: str) -> None:
    check_backend("cpu", make_inputs(1, 2, 65, scale=300.0, reference_grad=True))


@pytest.mark.parametrize(
    "options",
    [
        # Several units of work per head, forward and backward.
        {"heads": 1, "queries": 1100, "broadcast_kv": True, "mask": True, **ALL},
        *({"batch": b, "heads": h, "queries": n} for b, h, n in ((0, 2, 5), (2, 0, 5), (2, 2, 0))),
    ],
)
def test_accuracy_of_long_and_of_empty_inputs(options: dict[str, Any]) -> None:
    check_backend("cpu", make_inputs(**{"tokens": 2, "reference_grad": True, **options}))


def test_key_expanded_over_the_batch_has_a_gradient_per_sample() -> None:
    inputs = make_inputs(2, 2, 20, 7, 8)
    key = inputs.key[:1].expand(2, -1, -1, -1).detach().requires_grad_()
    result = fused_cross_attention(inputs.query, key, inputs.value, backend="cpu")
    (grad,) = torch.autograd.grad(result.output, key, inputs.grad_output)
    assert grad.shape == key.shape
    assert not torch.equal(grad[0], grad[1])


def test_equal_reference_gives_exactly_zero_loss(instruction_set: str) -> None:
    inputs = make_inputs(2, 2, 100)
    result = fused_cross_attention(
        inputs.query, inputs.key, inputs.value, reference_key=inputs.key, backend="cpu"
    )
    assert result.subject_loss.tolist() == [0.0, 0.0]


def test_single_key_gives_exactly_its_value(instruction_set: str) -> None:
    inputs = make_inputs(1, 1, 50, 1, 16, strided=False)
    result = fused_cross_attention(inputs.query, inputs.key, inputs.value, backend="cpu")
    assert torch.equal(result.output, inputs.value.expand(1, 1, 50, 16))


# Bits of a NaN, of the NaN of CUDA devices, of memory full of ones, and of both infinities.
NOT_FINITE = {
    torch.float32: (0x7FC00000, 0x7FFFFFFF, -1, 0x7F800000, -0x800000),
    torch.float16: (0x7E00, 0x7FFF, -1, 0x7C00, -0x400),
    torch.bfloat16: (0x7FC0, 0x7FFF, -1, 0x7F80, -0x80),
}


def _write(bits: int, tensor: Tensor, *place: int) -> None:
    tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)[place] = bits


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("name", "place"),
    [
        *((name, (0, 1, 3, 5)) for name in ("query", "grad_output")),
        *((name, (0, 1, 4, 5)) for name in ("key", "value", "reference_key")),
        ("token_weights", (0, 4)),
        ("grad_subject_loss", (0,)),
        ("grad_attn_probs", (0, 0, 3)),
    ],
)
def test_results_are_not_finite_where_those_of_eager_are_not(
    instruction_set: str, name: str, place: tuple[int, ...], dtype: torch.dtype
) -> None:
    """NaN and infinities in one place of one tensor; the last rows do not fill a tile."""
    options = {"weights": True, "tokens": 2, "strided": False, "reference_grad": True}
    inputs = make_inputs(2, 2, 41, dtype=dtype, **options)
    # With positive queries minus infinity in a key hides it, and everything else is finite.
    inputs.query.abs_()
    tensor = getattr(inputs, name)
    before = tensor.clone()
    for bits in NOT_FINITE[tensor.dtype]:
        _write(bits, tensor, *place)
        found, wanted = backend_results("cpu", inputs), backend_results("eager", inputs.double())
        tensor.copy_(before)
        for output, want in wanted.outputs.items():
            got = found.outputs[output]
            assert torch.equal(got.isnan(), want.isnan()), (output, hex(bits))
            assert torch.equal(got.isinf(), want.isinf()), (output, hex(bits))
        # Whether a gradient is NaN or infinite depends on the rounding of a vanishing probability.
        for which, gradients in wanted.gradients.items():
            for gradient, want in gradients.items():
                got = found.gradients[which][gradient]
                assert torch.equal(got.isfinite(), want.isfinite()), (gradient, which, hex(bits))


def test_unsupported_dtype_and_unknown_instruction_set_are_refused() -> None:
    inputs = make_inputs(1, 1, 4, 5, 8).double()
    with pytest.raises(BackendError, match="float64"):
        fused_cross_attention(inputs.query, inputs.key, inputs.value, backend="cpu")
    with pytest.raises(ValueError, match="choose from"):
        _C.set_instruction_set("sse9")
