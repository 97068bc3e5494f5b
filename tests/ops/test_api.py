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
    output, subject_loss, attn_probs = result
    expected = torch.nn.functional.scaled_dot_product_attention(
        inputs.query, inputs.key, inputs.value
    )
    torch.testing.assert_close(output, expected)
    assert subject_loss.dtype == attn_probs.dtype == torch.float32
    assert subject_loss.tolist() == [0.0, 0.0]
    assert attn_probs.shape == (2, 0, 10)
    assert fused_cross_attention(
        inputs.query, inputs.key, inputs.value, probs_heads="all"
    ).attn_probs.shape == (2, 3, 0, 10)


def test_heads_join_without_a_copy():
    inputs = make_inputs(2, 3, 10, 7, 16)
    output = _call(inputs).output
    joined = output.transpose(1, 2).reshape(2, 10, 48)
    assert joined.data_ptr() == output.data_ptr()
    assert has_layout(output, heads_inside=True)


def _good():
    return make_inputs(2, 2, 5, 7, 16, weights=True, mask=True, tokens=2)


NAMES = (
    *("query", "key", "value", "reference_key"),
    *("token_weights", "key_mask", "probs_positions"),
)
zeros = torch.zeros
on_meta = functools.partial(zeros, device="meta")

# What is wrong: (argument, its value, what the error says).
VALUE_ERRORS = {
    "flat query": ("query", zeros(2, 5, 16), "query has shape (2, 5, 16): give [B, H, N, D]"),
    "wide head": ("query", zeros(2, 2, 5, 257), "head dimension D is 257: it may be 1 to 256"),
    "no head width": ("query", zeros(2, 2, 5, 0), "head dimension D is 0"),
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
    "batch of tokens": ("probs_positions", zeros(3, 1, dtype=torch.int64), "give [2 or 1, T]"),
    "column past the end": (
        "probs_positions",
        torch.tensor([[0, 7]]),
        "probs_positions names key 7, but there are 7 keys: give 0 to 6",
    ),
    "probs_heads": ("probs_heads", "sum", "probs_heads is 'sum': give 'mean' or 'all'"),
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
        "probs_positions",
        zeros(2, 1, dtype=torch.int32),
        "probs_positions is torch.int32: give torch.int64",
    ),
    "list of tokens": (
        "probs_positions",
        [[1]],
        "probs_positions is a list: give a torch.int64 tensor",
    ),
    "tensor for scale": ("scale", torch.ones(()), "scale is a Tensor: give a number"),
}


@pytest.mark.parametrize("case", VALUE_ERRORS)
def test_what_does_not_fit_is_a_value_error(case):
    name, given, message = VALUE_ERRORS[case]
    with pytest.raises(ValueError, match=re.escape(message)):
        _call(_good(), **{name: given})


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    "case",
    [
        case
        for case, (name, given, _) in (VALUE_ERRORS | TYPE_ERRORS).items()
        if name != "probs_heads" and (isinstance(given, torch.Tensor) or given is None)
        if name != "scale" and "device" not in case
    ],
)
def test_the_registered_ops_refuse_the_same(case, device):
    name, given, message = (VALUE_ERRORS | TYPE_ERRORS)[case]
    if case == "column past the end" or (device == "meta" and "strided" in case):
        pytest.skip("the backward reads no column, and a move to meta makes tensors dense")
    inputs = _good()
    tensors = dict(zip(NAMES, inputs.tensors, strict=True)) | {name: given}
    placed = [x if x is None else x.to(device) for x in tensors.values()]
    options = (False, None, False, None)
    errors = ValueError if case in VALUE_ERRORS else TypeError
    with pytest.raises(errors, match=re.escape(message)):
        torch.ops.sefi_fast.fused_cross_attention(*placed, *options)
    grads = [x.to(device) for x in inputs.grads]
    with pytest.raises(errors, match=re.escape(message)):
        torch.ops.sefi_fast.fused_cross_attention_backward(
            *grads, *placed, *options, [True, True, True, False]
        )


MISFITS = {
    "rows of the gradient": ("grad_output", zeros(2, 2, 4, 16), "give [2, 2, 5, 16]"),
    "dtype of the gradient": ("grad_output", zeros(2, 2, 5, 16).half(), "give torch.float32"),
    "device of the gradient": ("grad_output", on_meta(2, 2, 5, 16), "grad_output is on meta"),
    "batch of the loss": (
        "grad_subject_loss",
        zeros(3),
        "grad_subject_loss has shape (3,): give [2]",
    ),
    "heads of the maps": ("grad_attn_probs", zeros(2, 2, 2, 5), "give [2, 2, 5]"),
    "too few needs": ("needs", [True] * 3, "needs has 3 entries: give 4"),
    "no reference": ("reference_key", None, "the gradient of a reference_key that is None"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_the_backward_op_refuses_gradients_that_do_not_fit(case):
    name, given, message = MISFITS[case]
    inputs = _good()
    call = dict(
        zip(("grad_output", "grad_subject_loss", "grad_attn_probs"), inputs.grads, strict=True)
    )
    call |= dict(zip(NAMES, inputs.tensors, strict=True))
    call |= {"probs_all_heads": False, "scale": None, "reference_grad": True, "backend": None}
    call |= {"needs": [True] * 4, name: given}
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        torch.ops.sefi_fast.fused_cross_attention_backward(*call.values())


def test_a_head_width_shorter_than_the_query_reads_nothing_beyond_it():
    one = zeros(1, 1, 4, 64)
    with pytest.raises(ValueError, match="key has shape"):
        torch.ops.sefi_fast.fused_cross_attention(
            zeros(1, 1, 64, 64), one[..., :2], one, None, None, None, None, False, 1.0, False, None
        )


@pytest.mark.parametrize("left", ["nothing", "half"])
@pytest.mark.parametrize("offset", [0, 64])
@pytest.mark.parametrize("backend", [None, "eager"])
@pytest.mark.parametrize("name", NAMES)
def test_a_tensor_without_its_storage_is_refused(name, backend, offset, left):
    tensor = getattr(_good() if name != "reference_key" else make_inputs(2, 2, 5, 7, 16), name)
    buffer = tensor.new_zeros(offset + tensor.numel())
    view = buffer[offset:].view(tensor.shape)
    storage = buffer.untyped_storage()
    whole = storage.nbytes()
    storage.resize_(0 if left == "nothing" else whole // 2)
    with pytest.raises(ValueError, match=rf"storage of {name} has \d+ bytes.*need {whole}\."):
        _call(_good(), **{name: view}, backend=backend)


@pytest.mark.parametrize("name", NAMES[:4])
def test_storage_lost_before_the_backward_is_told(name):
    inputs = make_inputs(2, 2, 5, 7, 16, strided=False, reference_grad=True).trainable()
    result = _call(inputs)
    getattr(inputs, name).untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=f"The storage of {name} has 0 bytes"):
        result.output.sum().backward()


@pytest.mark.parametrize("name", NAMES[:4])
def test_data_of_another_shape_before_the_backward_is_told(name):
    inputs = make_inputs(2, 2, 5, 7, 16, reference_grad=True).trainable()
    result = _call(inputs)
    leaf = getattr(inputs, name)
    leaf.data = leaf.data[:, :, :2].clone()
    with pytest.raises(ValueError, match="has shape"):
        result.output.sum().backward()


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
