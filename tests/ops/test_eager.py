"""The eager backend: the operator's meaning, by hand, by numbers and by an independent identity."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from ops.oracle import (
    autograd_results,
    backend_results,
    check_backend,
    log_sum_exp_subject_loss,
    make_inputs,
)

from sefi_fast.ops import eager, fused_cross_attention

KINDS: dict[str, dict[str, Any]] = {
    "plain": {"reference": False},
    "reference": {},
    "reference with gradient": {"reference_grad": True},
    "weights": {"weights": True, "reference_grad": True},
    "mask": {"mask": True, "tokens": 2, "reference_grad": True},
    "mean maps": {"tokens": 5, "reference": False},
    "all maps": {"tokens": 5, "probs_all_heads": True},
    "broadcast": {"broadcast_kv": True, "broadcast_reference": True, "reference_grad": True},
    "everything": {
        "weights": True,
        "mask": True,
        "tokens": 4,
        "broadcast_reference": True,
        "reference_grad": True,
        "scale": -0.3,
    },
    "contiguous": {"strided": False, "tokens": 1},
}


def test_worked_example():
    """Scores ln 3 and 0 give 3/4 and 1/4; the reference gives 1/2 and 1/2."""
    query = torch.tensor([[[[math.log(3.0)]]]], dtype=torch.float64)
    key = torch.tensor([[[[1.0], [0.0]]]], dtype=torch.float64)
    value = torch.tensor([[[[4.0], [8.0]]]], dtype=torch.float64, requires_grad=True)
    result = fused_cross_attention(
        query,
        key,
        value,
        reference_key=torch.zeros_like(key),
        token_weights=torch.tensor([[3.0, 1.0]]),
        probs_positions=torch.tensor([[1, -1, 0]]),
        scale=1.0,
        backend="eager",
    )
    assert result.output.item() == pytest.approx(0.75 * 4 + 0.25 * 8)
    assert result.subject_loss.item() == pytest.approx(3 * 0.25**2 + 1 * 0.25**2)
    assert result.attn_probs.flatten().tolist() == pytest.approx([0.25, 0.0, 0.75])
    result.output.sum().backward()
    assert value.grad is not None
    assert value.grad.flatten().tolist() == pytest.approx([0.75, 0.25])


@pytest.mark.parametrize("kind", KINDS)
def test_closed_form_backward_is_what_autograd_says(kind):
    check_backend(
        "eager", make_inputs(queries=9, keys=7, head_dim=5, dtype=torch.float64, **KINDS[kind])
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_closed_form_backward_keeps_the_accuracy_rule(kind, dtype):
    check_backend("eager", make_inputs(dtype=dtype, **KINDS[kind]))


@pytest.mark.parametrize("probs_all_heads", [False, True])
@pytest.mark.parametrize("reference_grad", [False, True])
def test_gradcheck(reference_grad, probs_all_heads):
    inputs = make_inputs(
        queries=3, keys=4, head_dim=3, dtype=torch.float64, weights=True, mask=True, tokens=3,
        broadcast_reference=True, probs_all_heads=probs_all_heads, reference_grad=reference_grad,
    ).trainable()  # fmt: skip
    options = inputs.keywords()
    if reference_grad:

        def call(query, key, value, reference_key):
            options["reference_key"] = reference_key
            return tuple(fused_cross_attention(query, key, value, **options, backend="eager"))

        variables = (inputs.query, inputs.key, inputs.value, inputs.reference_key)
    else:
        # Finite differences in the query also move the reference map, a constant to autograd.
        def call(key, value):
            return tuple(
                fused_cross_attention(inputs.query, key, value, **options, backend="eager")
            )

        variables = (inputs.key, inputs.value)
    assert torch.autograd.gradcheck(call, variables)


def test_detached_reference_is_gradient_at_a_fixed_map():
    """The query's gradient equals finite differences of the subject loss to a map held fixed."""
    inputs = make_inputs(1, 2, 3, 4, 3, torch.float64)
    found = autograd_results(inputs).gradients["subject_loss"]["grad_query"]
    fixed = (inputs.query @ inputs.reference_key.transpose(2, 3) * inputs.scale).softmax(-1)

    def subject_loss(query):
        target = (query @ inputs.key.transpose(2, 3) * inputs.scale).softmax(-1)
        return ((target - fixed) ** 2).sum((1, 2, 3)) / 2 @ inputs.grad_subject_loss.double()

    step = 1e-6
    for place in [(0, 0, 0, 0), (0, 1, 2, 1), (0, 1, 1, 2)]:
        nudge = torch.zeros_like(inputs.query)
        nudge[place] = step
        slope = (subject_loss(inputs.query + nudge) - subject_loss(inputs.query - nudge)) / (
            2 * step
        )
        assert found[place].item() == pytest.approx(slope.item(), rel=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_alignment_is_the_log_sum_exp_identity(seed):
    inputs = make_inputs(3, 2, 50, 77, 40, torch.float64, seed=seed)
    found = backend_results("eager", inputs).outputs["subject_loss"]
    torch.testing.assert_close(found, log_sum_exp_subject_loss(inputs), rtol=1e-12, atol=0)


def test_alignment_is_the_log_sum_exp_identity_under_a_mask():
    inputs = make_inputs(1, 2, 50, 77, 40, torch.float64, mask=True)
    found = backend_results("eager", inputs).outputs["subject_loss"]
    torch.testing.assert_close(found, log_sum_exp_subject_loss(inputs), rtol=1e-12, atol=0)


def test_equal_keys_have_no_distance_and_no_pull():
    inputs = make_inputs(dtype=torch.float16)
    call = (inputs.query, inputs.key, inputs.value, inputs.key, None, None, None)
    _, subject_loss, _ = eager.forward(*call, probs_all_heads=False, scale=0.2)
    grads = eager.backward(
        None, torch.ones(2), None, *call, probs_all_heads=False, scale=0.2, reference_grad=True,
        needs=(True, True, True, True),
    )  # fmt: skip
    assert subject_loss.tolist() == [0.0, 0.0]
    assert all(grad is not None and not grad.any() for grad in grads)


def test_map_of_every_token_is_the_whole_row():
    """All columns add up to one for each query, and a negative token's map is zero."""
    inputs = make_inputs(keys=6)
    tokens = torch.tensor([[0, 1, 2, 3, 4, 5, -1]])
    attn_probs = fused_cross_attention(
        inputs.query,
        inputs.key,
        inputs.value,
        probs_positions=tokens,
        probs_heads="all",
        backend="eager",
    ).attn_probs
    torch.testing.assert_close(attn_probs.sum(2), torch.ones(2, 2, 33))
    assert not attn_probs[:, :, 6].any()


def test_repeated_probs_positions_add_their_gradients():
    inputs = make_inputs(dtype=torch.float64, tokens=1, reference=False)
    twice = torch.cat([inputs.probs_positions, inputs.probs_positions], dim=1)
    both = torch.cat([inputs.grad_attn_probs, 2 * inputs.grad_attn_probs], dim=1)
    options = {"probs_all_heads": False, "scale": 0.2, "reference_grad": False}
    needs = (True, True, False, False)
    once = eager.backward(
        None, None, 3 * inputs.grad_attn_probs, *inputs.tensors, **options, needs=needs
    )
    tensors = (*inputs.tensors[:6], twice)
    repeated = eager.backward(None, None, both, *tensors, **options, needs=needs)
    torch.testing.assert_close(repeated[0], once[0])
    torch.testing.assert_close(repeated[1], once[1])
