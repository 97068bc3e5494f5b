"""The registered op: opcheck, autograd, autocast, layouts, torch.compile."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from ops.oracle import (
    FAST_BACKENDS,
    OUTPUTS,
    call_operator,
    check_results,
    device_of,
    has_layout,
    make_inputs,
    operator_results,
    weighted_sum,
)
from torch.autograd import forward_ad

from sefi_fast.errors import BackendError
from sefi_fast.ops import fused_cross_attention

FORWARD = torch.ops.sefi_fast.fused_cross_attention.default
BACKWARD = torch.ops.sefi_fast.fused_cross_attention_backward.default
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"reference": False},
    "reference": {"weights": True, "broadcast_reference": True},
    "reference with gradient": {"reference_grad": True, "mask": True},
    "mean probabilities": {"tokens": 3, "reference": False, "strided": False},
    "everything": {
        "weights": True,
        "mask": True,
        "tokens": 2,
        "probs_all_heads": True,
        "broadcast_kv": True,
        "broadcast_reference": True,
        "reference_grad": True,
    },
}

pytestmark = pytest.mark.parametrize("backend", FAST_BACKENDS)


def _inputs(backend: str, *sizes: int, **options: Any):
    return make_inputs(*sizes, **options, device=device_of(backend))


def _leaves(inputs):
    return [x for x in inputs.tensors[:4] if x is not None]


def _assert_equal(found, wanted):
    for one, other in zip(found, wanted, strict=True):
        assert one is other is None or torch.equal(one, other)


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(backend, kind):
    inputs = _inputs(backend, 2, 2, 5, 7, 8, **KINDS[kind])
    options = (inputs.probs_all_heads, inputs.scale, inputs.reference_grad, backend)
    torch.library.opcheck(FORWARD, (*inputs.trainable().tensors, *options))
    every = [True, True, True, inputs.reference_key is not None]
    some = (None, inputs.grad_subject_loss, None)
    for grads, needs in (
        (inputs.grads, every),
        (inputs.grads, [False, True, False, False]),
        (some, [True, True, False, False]),
    ):
        torch.library.opcheck(BACKWARD, (*grads, *inputs.tensors, *options, needs))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "sizes",
    [(2, 2, 33, 77, 40), (0, 2, 5, 7, 8), (2, 2, 0, 7, 8), (2, 0, 5, 7, 8), (1, 1, 1, 1, 1)],
    ids=["usual", "no batch", "no queries", "no heads", "all ones"],
)
def test_autograd_gives_the_gradient_of_each_output(backend, sizes, kind):
    inputs = _inputs(backend, *sizes, **KINDS[kind])
    check_results(operator_results(inputs, backend), inputs)


def test_only_wanted_gradients_are_computed(backend, calls_of):
    calls = calls_of(backend)
    inputs = _inputs(backend, 1, 1, 4, 5, 8, reference_grad=True)
    for place, name in enumerate(("query", "key", "value", "reference_key")):
        leaf = getattr(inputs, name).detach().requires_grad_()
        result = call_operator(dataclasses.replace(inputs, **{name: leaf}), backend)
        (result.output.sum() + result.subject_loss.sum()).backward()
        assert leaf.grad is not None
        assert calls[-1].options.needs == tuple(index == place for index in range(4))


def test_gradients_not_given_arrive_as_none(backend, calls_of):
    calls = calls_of(backend)
    inputs = _inputs(backend, 1, 1, 4, 5, 8, tokens=1).trainable()
    for place, name in enumerate(OUTPUTS):
        getattr(call_operator(inputs, backend), name).sum().backward()
        given = [grad is not None for grad in calls[-1].grads]
        assert given == [index == place for index in range(3)]


def test_reference_key_is_a_constant_without_reference_grad(backend):
    inputs = _inputs(backend, 1, 1, 4, 5, 8).trainable()
    call_operator(inputs, backend).subject_loss.sum().backward()
    assert inputs.reference_key.grad is None
    assert inputs.query.grad.any() and inputs.key.grad.any()


def test_only_the_inputs_are_saved(backend):
    inputs = _inputs(backend, 2, 2, 33, 77, 40, weights=True, mask=True, tokens=2).trainable()
    saved: list[int] = []

    def pack(tensor):
        saved.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call_operator(inputs, backend)
    assert sorted(saved) == sorted(tensor.data_ptr() for tensor in inputs.tensors)


def test_views_reach_the_backend_uncopied(backend, calls_of):
    """Also the transposed view of [B, N, H·D], and a gradient of the joined heads."""
    calls = calls_of(backend)
    inputs = _inputs(backend, 2, 2, 9, 7, 16, tokens=1).trainable()
    output = call_operator(inputs, backend).output
    grad = torch.randn(2, 9, 32, device=output.device)
    output.transpose(1, 2).reshape(2, 9, 32).backward(grad)
    forward, backward = calls
    for received in (forward.inputs, backward.inputs):
        for tensor, original in zip(received[:4], inputs.tensors[:4], strict=True):
            assert tensor.data_ptr() == original.data_ptr()
            assert tensor.stride() == original.stride()
    assert backward.grads.output.data_ptr() == grad.data_ptr()


def test_what_cannot_be_differentiated_is_refused(backend):
    inputs = _inputs(backend, 1, 1, 4, 5, 8).trainable()

    def output():
        return call_operator(inputs, backend).output

    (grad,) = torch.autograd.grad(output().sum(), inputs.query, create_graph=True)
    with pytest.raises(RuntimeError, match="fused_cross_attention has no second derivative"):
        grad.sum().backward()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(inputs.query.detach(), torch.ones_like(inputs.query))
        with pytest.raises(RuntimeError, match=r"fused_cross_attention.*Call torch\.func\.jvp"):
            fused_cross_attention(dual, inputs.key, inputs.value, backend=backend)
    several = torch.ones(3, *inputs.query.shape, device=inputs.query.device)
    with pytest.raises(RuntimeError, match="one gradient at a time"):
        torch.autograd.grad(output(), inputs.query, several, is_grads_batched=True)
    kept = output()
    with pytest.raises(RuntimeError, match="one gradient at a time"):
        torch.vmap(lambda grad: torch.autograd.grad(kept, inputs.query, grad)[0])(several)


def test_no_graph_without_need(backend):
    inputs = _inputs(backend, 1, 1, 4, 5, 8)
    assert not call_operator(inputs, backend).output.requires_grad
    with torch.no_grad():
        assert not call_operator(inputs.trainable(), backend).output.requires_grad
    with torch.inference_mode():
        inference = call_operator(inputs.trainable(), backend).output
    assert torch.equal(inference.clone(), call_operator(inputs, backend).output)


def test_a_batch_of_one_equals_its_copies(backend):
    inputs = _inputs(backend, 3, 2, 9, 7, 8, **KINDS["everything"]).trainable()
    names = ("key", "value", "reference_key", "token_weights", "key_mask", "probs_positions")
    repeated = {name: getattr(inputs, name).detach() for name in names}
    repeated = {name: x.repeat(3, *(1,) * (x.dim() - 1)) for name, x in repeated.items()}
    copied = dataclasses.replace(inputs, **repeated).trainable()
    found, wanted = call_operator(inputs, backend), call_operator(copied, backend)
    torch.testing.assert_close(tuple(found), tuple(wanted))
    weighted_sum(inputs, found).backward()
    weighted_sum(copied, wanted).backward()
    for leaf, copy in zip(_leaves(inputs)[1:], _leaves(copied)[1:], strict=True):
        torch.testing.assert_close(leaf.grad, copy.grad.sum(0, keepdim=True))


def test_autocast_casts_the_four_and_nothing_inside(backend):
    inputs = _inputs(backend, 2, 2, 9, 7, 16, tokens=2, reference_grad=True)
    low = _inputs(backend, 2, 2, 9, 7, 16, tokens=2, reference_grad=True, dtype=torch.bfloat16)
    inputs, low = inputs.trainable(), low.trainable()
    with torch.autocast(inputs.query.device.type, dtype=torch.bfloat16):
        cast = call_operator(inputs, backend)
        weighted_sum(inputs, cast).backward()
        mixed = call_operator(inputs, backend, reference_key=inputs.reference_key.half())
    plain = call_operator(low, backend)
    weighted_sum(inputs, plain).backward()
    assert cast.output.dtype == mixed.output.dtype == torch.bfloat16
    assert cast.subject_loss.dtype == cast.attn_probs.dtype == torch.float32
    _assert_equal(cast, plain)
    for leaf, wanted in zip(_leaves(inputs), _leaves(low), strict=True):
        assert leaf.grad.dtype == torch.float32
        assert torch.equal(leaf.grad, wanted.grad.float())


def test_autocast_around_the_backward_alone_changes_nothing(backend):
    inputs = _inputs(backend, 2, 2, 9, 7, 16, tokens=2, reference_grad=True).trainable()
    result = call_operator(inputs, backend)
    wanted = torch.autograd.grad(result, _leaves(inputs), inputs.grads, retain_graph=True)
    with torch.autocast(inputs.query.device.type, dtype=torch.bfloat16):
        found = torch.autograd.grad(result, _leaves(inputs), inputs.grads)
    _assert_equal(found, wanted)


def test_the_output_may_be_changed_in_place(backend):
    inputs = _inputs(backend, 2, 2, 9, 7, 16).trainable()
    plain = call_operator(inputs, backend).output
    (wanted,) = torch.autograd.grad((plain * 2 + 1).sum(), inputs.query)
    changed = call_operator(inputs, backend).output.transpose(1, 2).flatten(2)
    changed *= 2
    changed += 1
    (found,) = torch.autograd.grad(changed.sum(), inputs.query)
    assert torch.equal(found, wanted)


def test_gradients_that_are_zero_without_memory_are_zero(backend):
    """As the derivative of sgn is."""
    inputs = _inputs(backend, 1, 2, 4, 5, 8, reference_grad=True).trainable()
    for name in ("output", "subject_loss"):
        torch.sgn(getattr(call_operator(inputs, backend), name)).sum().backward()
        assert all(leaf.grad is None or not leaf.grad.any() for leaf in _leaves(inputs))


def test_meta_tensors_give_meta_tensors(backend):
    query, key, value = (t.to("meta") for t in _inputs(backend, 2, 3, 9, 7, 16).tensors[:3])
    output = fused_cross_attention(query, key, value, backend=backend).output
    assert output.is_meta and output.shape == query.shape


# torch.compile


def _compile(function, **options):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, **options)


def _under_autocast(inputs, backend):
    with torch.autocast(inputs.query.device.type, dtype=torch.bfloat16):
        return call_operator(inputs, backend)


def _among_others(inputs, backend):
    """Call the operator among operations that a compiler fuses and lays out as it likes."""
    changed = {"query": (inputs.query * 2).sin(), "key": inputs.key + 1}
    changed = dataclasses.replace(inputs, **changed, value=inputs.value.exp())
    output, subject_loss, attn_probs = call_operator(changed, backend)
    return output.transpose(1, 2).flatten(2) * 2, subject_loss.sqrt(), attn_probs


def _backward(inputs, outputs):
    pairs = zip(outputs, inputs.grads, strict=True)
    sum((output.flatten() * grad.flatten()).sum() for output, grad in pairs).backward()
    return [leaf.grad for leaf in _leaves(inputs)]


@pytest.mark.parametrize(
    ("kind", "dynamic", "function"),
    [
        ("plain", False, call_operator),
        ("reference", False, call_operator),
        ("everything", False, call_operator),
        ("everything", True, call_operator),
        ("everything", False, _under_autocast),
    ],
)
def test_a_compiled_call_is_one_graph_with_the_same_results(backend, kind, dynamic, function):
    inputs = _inputs(backend, 2, 2, 9, 7, 16, **KINDS[kind])
    ours, theirs = inputs.trainable(), inputs.trainable()
    compiled = _compile(function, backend="aot_eager", dynamic=dynamic)
    found, wanted = compiled(ours, backend), function(theirs, backend)
    _assert_equal(found, wanted)
    assert all(has_layout(x, name == "output") for name, x in zip(OUTPUTS, found, strict=True))
    _assert_equal(_backward(ours, found), _backward(theirs, wanted))


@pytest.mark.slow
def test_inductor_keeps_the_last_axis_dense(backend):
    inputs = _inputs(backend, 2, 2, 9, 7, 16, tokens=1, reference_grad=True)
    ours, theirs = inputs.trainable(), inputs.trainable()
    found, wanted = _compile(_among_others)(ours, backend), _among_others(theirs, backend)
    torch.testing.assert_close(tuple(found), tuple(wanted))
    torch.testing.assert_close(_backward(ours, found), _backward(theirs, wanted))


def test_errors_are_the_same_in_a_compiled_call(backend):
    inputs = _inputs(backend, 2, 2, 9, 7, 16, dtype=torch.float64, tokens=1)
    compiled = _compile(call_operator, backend="aot_eager")
    if backend == "eager":
        assert torch.equal(compiled(inputs, backend).output, call_operator(inputs, backend).output)
    else:
        with pytest.raises(BackendError, match=f"backend '{backend}' cannot take this input"):
            compiled(inputs, backend)
    if device_of(backend) == "cpu":
        inputs.probs_positions.fill_(7)
        with pytest.raises(ValueError, match="probs_positions names key 7, but there are 7 keys"):
            _compile(call_operator, backend="aot_eager")(inputs, backend)
