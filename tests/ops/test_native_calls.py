"""The native core refuses addresses, sizes and strides that no tensor has."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from ops.inputs import make_inputs

from sefi_fast.ops import cpu, fused_cross_attention

_C = pytest.importorskip("sefi_fast._C")

COMMON = ("sizes", "dtype", "scale", "inputs", "rows", "probs_all_heads")
NAMES = {
    "forward": (*COMMON, "output", "subject_loss", "attn_probs"),
    "backward": (
        *(*COMMON, "grad_output", "grad_subject_loss", "grad_attn_probs"),
        *("reference_grad", "gradients"),
    ),
}
# (place in the arguments, invalid value there, part of the error message)
BOTH: list[tuple[tuple[Any, ...], int, str]] = [
    (("inputs", 0, 0), 0, "query has no address"),
    (("inputs", 1, 0), 0, "key has no address"),
    (("inputs", 2, 0), 0, "value has no address"),
    (("inputs", 0, 1), 1, "query has a batch"),
    (("inputs", 1, 1), 3, "key has a batch"),
    (("inputs", 1, 3), -8, "key has a stride that is negative"),
    (("inputs", 2, 2), 2**60, "value has a stride .* too large"),
    (("sizes", 2), 0, "all sizes must be positive"),
    (("sizes", 3), 257, "end at 256"),
    (("sizes", 0), 2**62, "query has too many elements"),
    (("sizes", 1), 2**45, "has too many elements"),
    (("rows", 0, 2), 6, "token_weights has a length"),
    (("rows", 1, 1), 3, "key_mask has a batch"),
    (("rows", 2, 2), -1, "probs_positions has a negative length"),
    (("dtype",), 3, "dtype code"),
]
CASES = [
    *(("forward", *case) for case in BOTH),
    ("forward", ("output", 0), 0, "output has no address"),
    ("forward", ("output", 1), 1, "output has a batch"),
    ("forward", ("subject_loss",), 0, "subject_loss has no address"),
    ("forward", ("attn_probs",), 0, "attn_probs has no address"),
    *(("backward", *case) for case in BOTH),
    ("backward", ("gradients", 1, 1), 1, "grad_key has a batch"),
    ("backward", ("grad_output", 0), 0, "no gradient reaches the value"),
]


@pytest.fixture(scope="module")
def arguments() -> dict[str, tuple[Any, ...]]:
    """Arguments of a valid call of the native core in each direction."""
    options = {"weights": True, "mask": True, "tokens": 2, "reference_grad": True}
    inputs = make_inputs(2, 2, 5, 7, 8, strided=False, **options).trainable()
    leaves = [inputs.query, inputs.key, inputs.value]
    with mock.patch.object(cpu, "_C") as core:
        results = fused_cross_attention(*leaves, **inputs.keywords(), backend="cpu")
        torch.autograd.grad(tuple(results), [*leaves, inputs.reference_key], inputs.grads)
    return {name: getattr(core, name).call_args.args for name in NAMES}


def _replaced(arguments: Any, place: tuple[int, ...], value: int) -> Any:
    """Return the nested arguments with another value at one place."""
    if not place:
        return value
    copy = list(arguments)
    copy[place[0]] = _replaced(copy[place[0]], place[1:], value)
    return copy


@pytest.mark.parametrize(("direction", "place", "value", "message"), CASES)
def test_invalid_argument_is_refused(
    arguments: dict[str, Any], direction: str, place: tuple[Any, ...], value: int, message: str
) -> None:
    index = NAMES[direction].index(place[0])
    changed = _replaced(arguments[direction], (index, *place[1:]), value)
    with pytest.raises(ValueError, match=message):
        getattr(_C, direction)(*changed)
