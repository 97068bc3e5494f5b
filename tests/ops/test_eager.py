"""The eager backend: a worked example, finite differences, and an independent identity."""

from __future__ import annotations

import doctest
import math

import pytest
import torch
from ops.oracle import (
    autograd_results,
    backend_results,
    call_operator,
    check_backend,
    log_sum_exp_subject_loss,
    make_inputs,
)
from ops.test_accuracy import CASES

from sefi_fast.ops import cross_attention, eager, fused_cross_attention
from sefi_fast.ops.inputs import AttentionInputs, Options, OutputGrads


def test_the_example_of_the_docstring_runs():
    found = doctest.testmod(cross_attention)
    assert found.attempted and not found.failed


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


@pytest.mark.parametrize("case", ["plain", "masked", "shared everything", "shared reference"])
def test_closed_form_backward_equals_autograd_in_float64(case):
    check_backend("eager", make_inputs(**CASES[case] | {"dtype": torch.float64}))


@pytest.mark.parametrize("probs_all_heads", [False, True])
@pytest.mark.parametrize("reference_grad", [False, True])
def test_gradients_equal_finite_differences(reference_grad, probs_all_heads):
    inputs = make_inputs(
        queries=3, keys=4, head_dim=3, dtype=torch.float64, weights=True, mask=True, tokens=3,
        broadcast_reference=True, probs_all_heads=probs_all_heads, reference_grad=reference_grad,
    ).trainable()  # fmt: skip
    # Finite differences in the query also move the reference map, which may be a constant.
    names = ["query", "key", "value", "reference_key"] if reference_grad else ["key", "value"]
    arguments = {"query": inputs.query, "key": inputs.key, "value": inputs.value}
    arguments |= inputs.keywords() | {"backend": "eager"}

    def call(*variables):
        return tuple(fused_cross_attention(**arguments | dict(zip(names, variables, strict=True))))

    assert torch.autograd.gradcheck(call, tuple(arguments[name] for name in names))


def test_detached_reference_is_gradient_at_a_fixed_map():
    """The query's gradient equals finite differences of the subject loss to a fixed map."""
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
        rise = subject_loss(inputs.query + nudge) - subject_loss(inputs.query - nudge)
        assert found[place].item() == pytest.approx(rise.item() / (2 * step), rel=1e-6)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("mask", [False, True])
def test_subject_loss_is_the_log_sum_exp_identity(seed, mask):
    inputs = make_inputs(1, 2, 50, 77, 40, torch.float64, mask=mask, seed=seed)
    found = backend_results("eager", inputs).outputs["subject_loss"]
    torch.testing.assert_close(found, log_sum_exp_subject_loss(inputs), rtol=1e-12, atol=0)


def test_equal_keys_have_no_loss_and_no_gradient_of_it():
    query, key, value = make_inputs(dtype=torch.float16).tensors[:3]
    inputs = AttentionInputs(query, key, value, reference_key=key)
    options = Options(False, 0.2, True, needs=(True, True, True, True))
    _, subject_loss, _ = eager.forward(inputs, options)
    grads = eager.backward(OutputGrads(None, torch.ones(2), None), inputs, options)
    assert subject_loss.tolist() == [0.0, 0.0]
    assert all(grad is not None and not grad.any() for grad in grads)


def test_the_probabilities_of_all_keys_add_up_to_one():
    inputs = make_inputs(keys=6)
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, -1]])
    changes = {"probs_positions": positions, "probs_heads": "all"}
    attn_probs = call_operator(inputs, "eager", **changes).attn_probs
    torch.testing.assert_close(attn_probs.sum(2), torch.ones(2, 2, 33))
    assert not attn_probs[:, :, 6].any()


def test_repeated_positions_add_their_gradients():
    inputs = make_inputs(dtype=torch.float64, tokens=1, reference=False)
    twice = torch.cat([inputs.probs_positions, inputs.probs_positions], dim=1)
    grad = inputs.grad_attn_probs
    once, repeated = (
        eager.backward(
            OutputGrads(None, None, grads),
            inputs.tensors._replace(probs_positions=positions),
            inputs.options,
        )[:2]
        for grads, positions in (
            (3 * grad, inputs.probs_positions),
            (torch.cat([grad, 2 * grad], dim=1), twice),
        )
    )
    torch.testing.assert_close(repeated, once)
