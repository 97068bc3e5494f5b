"""The native core refuses addresses, sizes and strides that no tensor has."""

from __future__ import annotations

from typing import Any

import pytest
from ops.inputs import make_inputs

from sefi_fast.ops import native_call

_C = pytest.importorskip("sefi_fast._C")

FORWARD = ("sizes", "dtype", "scale", "inputs", "rows", "probs_all_heads")
BACKWARD = (
    *FORWARD,
    "grad_output",
    "grad_subject_loss",
    "grad_attn_probs",
    "reference_grad",
    "gradients",
)
FORWARD = (*FORWARD, "output", "subject_loss", "attn_probs")
INPUTS = make_inputs(
    2, 2, 5, 7, 8, weights=True, mask=True, tokens=2, strided=False, reference_grad=True
)

# (where in the call, its value, what the error says); the places of INPUTS are in the arguments.
BOTH: dict[str, tuple[tuple[Any, ...], Any, str]] = {
    "no query": (("inputs", 0, 0), 0, "query has no address"),
    "no key": (("inputs", 1, 0), 0, "key has no address"),
    "no value": (("inputs", 2, 0), 0, "value has no address"),
    "one query for all": (("inputs", 0, 1), 1, "query has a batch"),
    "batch of the key": (("inputs", 1, 1), 3, "key has a batch"),
    "stride back": (("inputs", 1, 3), -8, "key has a stride that is negative"),
    "stride beyond memory": (("inputs", 2, 2), 2**60, "value has a stride .* too large"),
    "no sizes": (("sizes", 2), 0, "all sizes must be positive"),
    "many keys": (("sizes", 3), 257, "end at 256"),
    "many samples": (("sizes", 0), 2**62, "query has too many elements"),
    "many heads": (("sizes", 1), 2**45, "has too many elements"),
    "length of the weights": (("rows", 0, 2), 6, "token_weights has a length"),
    "batch of the mask": (("rows", 1, 1), 3, "key_mask has a batch"),
    "negative columns": (("rows", 2, 2), -1, "probs_positions has a negative length"),
    "dtype": (("dtype",), 3, "dtype code"),
}
ONLY_FORWARD: dict[str, tuple[tuple[Any, ...], Any, str]] = {
    "no output": (("output", 0), 0, "output has no address"),
    "one output for all": (("output", 1), 1, "output has a batch"),
    "no loss": (("subject_loss",), 0, "subject_loss has no address"),
    "no probabilities": (("attn_probs",), 0, "attn_probs has no address"),
}
ONLY_BACKWARD: dict[str, tuple[tuple[Any, ...], Any, str]] = {
    "one gradient for all": (("gradients", 1, 1), 1, "grad_key has a batch"),
    "value without a gradient": (("grad_output", 0), 0, "no gradient reaches the value"),
}


def _changed(arguments: Any, place: tuple[Any, ...], value: Any) -> Any:
    """The nested arguments with another value at one place."""
    if not place:
        return value
    copy = list(arguments)
    copy[place[0]] = _changed(copy[place[0]], place[1:], value)
    return copy


def _refused(call: Any, names: tuple[str, ...], run: Any, case: tuple[Any, Any, str]) -> None:
    (name, *rest), value, message = case
    arguments = _changed(call.arguments, (names.index(name), *rest), value)
    with pytest.raises(ValueError, match=message):
        run(*arguments, 1)


@pytest.mark.parametrize("case", BOTH | ONLY_FORWARD)
def test_forward_refuses(case):
    call = native_call.forward_call(INPUTS.tensors, INPUTS.options)
    _refused(call, FORWARD, _C.forward, (BOTH | ONLY_FORWARD)[case])


@pytest.mark.parametrize("case", BOTH | ONLY_BACKWARD)
def test_backward_refuses(case):
    options = INPUTS.options._replace(reference_grad=True, needs=(True, True, True, True))
    call = native_call.backward_call(INPUTS.grads, INPUTS.tensors, options)
    _refused(call, BACKWARD, _C.backward, (BOTH | ONLY_BACKWARD)[case])
