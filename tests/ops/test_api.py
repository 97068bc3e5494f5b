"""The public function: what it accepts, what it refuses and in which words."""

from __future__ import annotations

import functools
import re

import pytest
import torch
from ops.oracle import has_layout, make_inputs

from sefi_fast.ops import CrossAttentionOutput, fused_cross_attention


def _call(inputs, **changes):
    arguments = inputs.keywords() | {
        "query": inputs.query,
        "key": inputs.key,
        "value": inputs.value,
    }
    return fused_cross_attention(**(arguments | changes))


def test_defaults():
    inputs = make_inputs(2, 3, 10, 7, 16, reference=False)
    result = fused_cross_attention(inputs.query, inputs.key, inputs.value)
    assert isinstance(result, CrossAttentionOutput)
    output, alignment, maps = result
    expected = torch.nn.functional.scaled_dot_product_attention(
        inputs.query, inputs.key, inputs.value
    )
    torch.testing.assert_close(output, expected)
    assert alignment.dtype == maps.dtype == torch.float32
    assert alignment.tolist() == [0.0, 0.0]
    assert maps.shape == (2, 0, 10)
    assert fused_cross_attention(
        inputs.query, inputs.key, inputs.value, map_heads="all"
    ).maps.shape == (2, 3, 0, 10)


def test_heads_join_without_a_copy():
    inputs = make_inputs(2, 3, 10, 7, 16)
    output = _call(inputs).output
    joined = output.transpose(1, 2).reshape(2, 10, 48)
    assert joined.data_ptr() == output.data_ptr()
    assert has_layout(output, heads_inside=True)


def _good():
    return make_inputs(2, 2, 5, 7, 16, weights=True, mask=True, tokens=2)


zeros = torch.zeros
on_meta = functools.partial(zeros, device="meta")

# What is wrong: (argument, its value, what the error says).
VALUE_ERRORS = {
    "flat query": ("query", zeros(2, 5, 16), "query has shape (2, 5, 16): give [B, H, N, D]"),
    "wide head": ("query", zeros(2, 2, 5, 257), "head width D is 257: it may be 1 to 256"),
    "no head width": ("query", zeros(2, 2, 5, 0), "head width D is 0"),
    "strided query": (
        "query",
        zeros(2, 2, 16, 5).transpose(2, 3),
        "query (2, 2, 5, 16) has stride 5 along its last axis: that axis must be dense",
    ),
    "batch of key": ("key", zeros(3, 2, 7, 16), "key has shape (3, 2, 7, 16)"),
    "heads of key": ("key", zeros(2, 1, 7, 16), "give [2 or 1, 2, M, 16]"),
    "width of key": ("key", zeros(2, 2, 7, 8), "give [2 or 1, 2, M, 16]"),
    "flat key": ("key", zeros(2, 7, 16), "key has shape (2, 7, 16)"),
    "strided key": ("key", zeros(2, 2, 7, 32)[..., ::2], "key (2, 2, 7, 16) has stride 2"),
    "device of key": ("key", on_meta(2, 2, 7, 16), "key is on meta but query is on cpu"),
    "length of value": ("value", zeros(2, 2, 8, 16), "and 7 keys give [2 or 1, 2, 7, 16]"),
    "length of reference": ("reference_key", zeros(2, 2, 6, 16), "reference_key has shape"),
    "flat weights": ("token_weights", zeros(7), "has shape (7,): give [2 or 1, 7]"),
    "trained weights": (
        "token_weights",
        torch.ones(2, 7, requires_grad=True),
        "token_weights requires a gradient",
    ),
    "length of mask": ("key_mask", zeros(2, 6, dtype=torch.bool), "give [2 or 1, 7]"),
    "device of mask": ("key_mask", on_meta(2, 7, dtype=torch.bool), "key_mask is on meta"),
    "batch of tokens": ("map_tokens", zeros(3, 1, dtype=torch.int64), "give [2 or 1, T]"),
    "column past the end": (
        "map_tokens",
        torch.tensor([[0, 7]]),
        "map_tokens names column 7, but there are 7 keys: give 0 to 6",
    ),
    "map_heads": ("map_heads", "sum", "map_heads is 'sum': give 'mean' or 'all'"),
    "scale": ("scale", float("nan"), "scale is nan: give a finite number"),
}
TYPE_ERRORS = {
    "list for query": ("query", [[1.0]], "query is a list: give a tensor [B, H, N, D]"),
    "no key": ("key", None, "key is None: give a tensor [B or 1, H, M, D]"),
    "integer query": (
        "query",
        zeros(2, 2, 5, 16, dtype=torch.int32),
        "query is torch.int32: give float32, float16 or bfloat16",
    ),
    "half key": (
        "key",
        zeros(2, 2, 7, 16, dtype=torch.float16),
        "key is torch.float16 but query is torch.float32",
    ),
    "half weights": (
        "token_weights",
        zeros(2, 7, dtype=torch.float16),
        "token_weights is torch.float16: give torch.float32",
    ),
    "float mask": ("key_mask", zeros(2, 7), "key_mask is torch.float32: give torch.bool"),
    "short tokens": (
        "map_tokens",
        zeros(2, 1, dtype=torch.int32),
        "map_tokens is torch.int32: give torch.int64",
    ),
    "list of tokens": ("map_tokens", [[1]], "map_tokens is a list: give a torch.int64 tensor"),
    "tensor for scale": ("scale", torch.ones(()), "scale is a Tensor: give a number"),
}


@pytest.mark.parametrize("case", VALUE_ERRORS)
def test_what_does_not_fit_is_a_value_error(case):
    name, given, message = VALUE_ERRORS[case]
    with pytest.raises(ValueError, match=re.escape(message)):
        _call(_good(), **{name: given})


@pytest.mark.parametrize("case", TYPE_ERRORS)
def test_what_is_of_another_kind_is_a_type_error(case):
    name, given, message = TYPE_ERRORS[case]
    with pytest.raises(TypeError, match=re.escape(message)):
        _call(_good(), **{name: given})


@pytest.mark.parametrize("keys", [0, 257])
def test_number_of_keys_is_bounded(keys):
    inputs = make_inputs(keys=7)
    key = torch.zeros(2, 2, keys, 40)
    with pytest.raises(ValueError, match=f"there are {keys} keys: the operator takes 1 to 256"):
        fused_cross_attention(inputs.query, key, key)
