"""The accuracy harness notices what it is there to notice."""

from __future__ import annotations

import types

import pytest
import torch
from ops.oracle import check_backend, make_inputs, poisoned_empty

from sefi_fast.ops import eager


def _faulty(forward=None, backward=None) -> types.SimpleNamespace:
    return types.SimpleNamespace(
        forward=forward or eager.forward, backward=backward or eager.backward
    )


def test_right_backend_passes():
    check_backend(_faulty(), make_inputs(tokens=2))


def test_dropped_gradient_of_one_output_is_noticed():
    def backward(grad_output, grad_subject_loss, grad_attn_probs, *tensors, **options):
        return eager.backward(grad_output, grad_subject_loss, None, *tensors, **options)

    with pytest.raises(AssertionError, match="grad_query of attn_probs"):
        check_backend(_faulty(backward=backward), make_inputs(tokens=2))


def test_small_error_is_noticed():
    def forward(*tensors, **options):
        output, subject_loss, attn_probs = eager.forward(*tensors, **options)
        return output, subject_loss * (1 + 1e-4), attn_probs

    with pytest.raises(AssertionError, match="subject_loss: error"):
        check_backend(_faulty(forward), make_inputs())


def test_unwritten_results_are_noticed():
    def forward(query, *tensors, **options):
        output, subject_loss, attn_probs = eager.forward(query, *tensors, **options)
        unwritten = torch.empty_like(output)
        unwritten[:, :, :-1] = output[:, :, :-1]
        return unwritten, subject_loss, attn_probs

    with pytest.raises(AssertionError, match="output: error nan"):
        check_backend(_faulty(forward), make_inputs())


def test_read_outside_the_views_is_noticed():
    def forward(query, *tensors, **options):
        batch, heads, queries, head_dim = query.shape
        shifted = query.as_strided(query.shape, query.stride(), query.storage_offset() + 8)
        return eager.forward(shifted, *tensors, **options)

    with pytest.raises(AssertionError, match="output: error nan"):
        check_backend(_faulty(forward), make_inputs())


def test_wrong_layout_is_noticed():
    def forward(*tensors, **options):
        output, subject_loss, attn_probs = eager.forward(*tensors, **options)
        return output.contiguous(), subject_loss, attn_probs

    with pytest.raises(AssertionError, match="output .* has strides"):
        check_backend(_faulty(forward), make_inputs())


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
