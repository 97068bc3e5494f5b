"""The accuracy harness notices the mistakes that it is made for."""

from __future__ import annotations

import types

import pytest
import torch
from ops.oracle import check_backend, make_inputs, poisoned_empty

from sefi_fast.ops import eager


def _without_gradient_of_probs(grads, inputs, options):
    return eager.backward(grads._replace(attn_probs=None), inputs, options)


def _small_error(inputs, options):
    output, subject_loss, attn_probs = eager.forward(inputs, options)
    return output, subject_loss * (1 + 1e-4), attn_probs


def _unwritten_row(inputs, options):
    output, subject_loss, attn_probs = eager.forward(inputs, options)
    unwritten = torch.empty_like(output)
    unwritten[:, :, :-1] = output[:, :, :-1]
    return unwritten, subject_loss, attn_probs


def _read_outside_the_views(inputs, options):
    query = inputs.query
    shifted = query.as_strided(query.shape, query.stride(), query.storage_offset() + 8)
    return eager.forward(inputs._replace(query=shifted), options)


def _wrong_layout(inputs, options):
    output, subject_loss, attn_probs = eager.forward(inputs, options)
    return output.contiguous(), subject_loss, attn_probs


FAULTS = {
    "grad_query of attn_probs": {"backward": _without_gradient_of_probs},
    "subject_loss: error": {"forward": _small_error},
    "output: error nan": {"forward": _unwritten_row},
    "(?s)output: error nan.*": {"forward": _read_outside_the_views},
    "output .* has strides": {"forward": _wrong_layout},
}


@pytest.mark.parametrize("message", FAULTS)
def test_a_faulty_backend_is_noticed(message):
    working = {"forward": eager.forward, "backward": eager.backward}
    inputs = make_inputs(tokens=2)
    check_backend(types.SimpleNamespace(**working), inputs)
    with pytest.raises(AssertionError, match=message):
        check_backend(types.SimpleNamespace(**working | FAULTS[message]), inputs)


def test_poison_reaches_every_way_to_allocate_and_ends():
    like = torch.zeros(3)
    with poisoned_empty():
        made = [
            torch.empty(3),
            torch.empty_like(like),
            torch.empty_strided((3,), (1,)),
            like.new_empty(3),
            like.new_empty_strided((3,), (1,)),
        ]
        assert all(tensor.isnan().all() for tensor in made)
        assert torch.empty(2, dtype=torch.int32).tolist() == [2**31 - 1] * 2
    assert torch.empty is not None and "new_empty" not in vars(torch.Tensor)
