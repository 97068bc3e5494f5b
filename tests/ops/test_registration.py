"""The registered op: opcheck, autograd, autocast, layouts, edge shapes, determinism."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from ops.oracle import (
    GRADIENTS_OF,
    OUTPUTS,
    check_results,
    make_inputs,
    operator_results,
)
from torch.autograd import forward_ad

from sefi_fast.ops import available_backends, fused_cross_attention

FORWARD = torch.ops.sefi_fast.fused_cross_attention.default
BACKWARD = torch.ops.sefi_fast.fused_cross_attention_backward.default
AVAILABLE = [name for name, reason in available_backends().items() if reason is None]
# Triton's interpreter is slow, and the kernels have their own tests.
BACKENDS = [name for name in AVAILABLE if name != "triton" or torch.cuda.is_available()]
DEVICE = {"triton": "cuda", "cuda": "cuda"}

KINDS: dict[str, dict[str, Any]] = {
    "plain": {"reference": False},
    "reference": {"weights": True, "broadcast_reference": True},
    "reference with gradient": {"reference_grad": True, "mask": True},
    "mean maps": {"tokens": 3, "reference": False, "strided": False},
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

pytestmark = pytest.mark.parametrize("backend", BACKENDS)


def _inputs(backend: str, *sizes: int, **options: Any):
    return make_inputs(*sizes, **options, device=DEVICE.get(backend, "cpu"))


def _call(inputs, backend, **changes):
    arguments = inputs.keywords() | {"backend": backend} | changes
    return fused_cross_attention(inputs.query, inputs.key, inputs.value, **arguments)


def _loss(inputs, result):
    return sum((output * grad).sum() for output, grad in zip(result, inputs.grads, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck_forward(backend, kind):
    inputs = _inputs(backend, 2, 2, 5, 7, 8, **KINDS[kind]).trainable()
    options = (inputs.probs_all_heads, inputs.scale, inputs.reference_grad, backend)
    torch.library.opcheck(FORWARD, (*inputs.tensors, *options))


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck_backward(backend, kind):
    inputs = _inputs(backend, 2, 2, 5, 7, 8, **KINDS[kind])
    options = (inputs.probs_all_heads, inputs.scale, inputs.reference_grad, backend)
    for needs in (
        [True, True, True, inputs.reference_key is not None],
        [False, True, False, False],
    ):
        torch.library.opcheck(BACKWARD, (*inputs.grads, *inputs.tensors, *options, needs))
    torch.library.opcheck(
        BACKWARD,
        (None, inputs.grad_subject_loss, None, *inputs.tensors, *options, [True] * 2 + [False] * 2),
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_of_each_output_alone(backend, kind, dtype):
    inputs = _inputs(backend, 2, 2, 33, 77, 40, dtype=dtype, **KINDS[kind])
    check_results(operator_results(inputs, backend), inputs)


def test_only_wanted_gradients_are_computed(backend, calls_of):
    calls = calls_of(backend)
    inputs = _inputs(backend, 1, 1, 4, 5, 8, reference_grad=True)
    for place, name in enumerate(("query", "key", "value", "reference_key")):
        leaf = getattr(inputs, name).detach().requires_grad_()
        arguments = {"query": inputs.query, "key": inputs.key, "value": inputs.value}
        result = fused_cross_attention(
            **(arguments | inputs.keywords() | {name: leaf}), backend=backend
        )
        (result.output.sum() + result.subject_loss.sum()).backward()
        assert leaf.grad is not None
        assert calls[-1].options["needs"] == tuple(index == place for index in range(4))


def test_gradients_not_given_arrive_as_none(backend, calls_of):
    calls = calls_of(backend)
    inputs = _inputs(backend, 1, 1, 4, 5, 8, tokens=1).trainable()
    for place, name in enumerate(OUTPUTS):
        getattr(_call(inputs, backend), name).sum().backward()
        given = [grad is not None for grad in calls[-1].arguments[:3]]
        assert given == [index == place for index in range(3)]


def test_reference_key_is_a_constant_without_reference_grad(backend):
    inputs = _inputs(backend, 1, 1, 4, 5, 8).trainable()
    _call(inputs, backend).subject_loss.sum().backward()
    assert inputs.reference_key.grad is None
    assert inputs.query.grad.any() and inputs.key.grad.any()


def test_nothing_but_the_inputs_is_saved(backend):
    inputs = _inputs(backend, 2, 2, 33, 77, 40, weights=True, mask=True, tokens=2).trainable()
    saved: list[int] = []

    def pack(tensor):
        saved.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        _call(inputs, backend)
    assert sorted(saved) == sorted(tensor.data_ptr() for tensor in inputs.tensors)


def test_views_reach_the_backend_uncopied(backend, calls_of):
    """Also the transposed view of [B, N, H·D], and a gradient of the joined heads."""
    calls = calls_of(backend)
    inputs = _inputs(backend, 2, 2, 9, 7, 16, tokens=1).trainable()
    output = _call(inputs, backend).output
    grad = torch.randn(2, 9, 32, device=output.device)
    output.transpose(1, 2).reshape(2, 9, 32).backward(grad)
    forward, backward = calls
    for received in (forward.arguments[:4], backward.arguments[3:7]):
        for tensor, original in zip(received, inputs.tensors[:4], strict=True):
            assert tensor.data_ptr() == original.data_ptr()
            assert tensor.stride() == original.stride()
    assert backward.arguments[0].data_ptr() == grad.data_ptr()


def test_second_derivative_is_refused_in_words(backend):
    inputs = _inputs(backend, 1, 1, 4, 5, 8).trainable()
    (grad,) = torch.autograd.grad(
        _call(inputs, backend).output.sum(), inputs.query, create_graph=True
    )
    with pytest.raises(RuntimeError, match="fused_cross_attention has no second derivative"):
        grad.sum().backward()


def test_forward_mode_is_refused_not_dropped(backend):
    inputs = _inputs(backend, 1, 1, 4, 5, 8)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(inputs.query, torch.ones_like(inputs.query))
        with pytest.raises(RuntimeError, match="(?i)forward"):
            fused_cross_attention(dual, inputs.key, inputs.value, backend=backend)


def test_no_graph_without_need(backend):
    inputs = _inputs(backend, 1, 1, 4, 5, 8)
    assert not _call(inputs, backend).output.requires_grad
    with torch.no_grad():
        assert not _call(inputs.trainable(), backend).output.requires_grad
    with torch.inference_mode():
        inference = _call(inputs.trainable(), backend).output
    torch.testing.assert_close(inference.clone(), _call(inputs, backend).output, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_fifty_repeats_are_equal_bit_for_bit(backend, kind):
    inputs = _inputs(backend, 3, 2, 130, 77, 40, **KINDS[kind])
    first = operator_results(inputs, backend)
    for _ in range(49):
        again = operator_results(inputs, backend)
        for name in OUTPUTS:
            assert torch.equal(again.outputs[name], first.outputs[name])
        for which in GRADIENTS_OF:
            for name, grad in first.gradients[which].items():
                other = again.gradients[which][name]
                assert grad is other is None or torch.equal(grad, other)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "sizes",
    [(0, 2, 5, 7, 8), (2, 2, 0, 7, 8), (2, 0, 5, 7, 8), (1, 1, 1, 1, 1), (2, 2, 1, 77, 40)],
    ids=["no batch", "no queries", "no heads", "all ones", "one row"],
)
def test_empty_and_one_row_inputs(backend, sizes, kind):
    inputs = _inputs(backend, *sizes, **KINDS[kind])
    check_results(operator_results(inputs, backend), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rows_without_keys_give_zeros_and_zero_gradients(backend, dtype):
    inputs = _inputs(
        backend, 2, 2, 5, 7, 8, dtype=dtype, mask=True, tokens=2, reference_grad=True
    ).trainable()
    inputs.key_mask[0] = True
    inputs.key_mask[1] = False
    result = _call(inputs, backend)
    for output in result:
        assert output[0].any() and not output[1].any()
    _loss(inputs, result).backward()
    for leaf in (inputs.query, inputs.key, inputs.value, inputs.reference_key):
        assert leaf.grad[0].any() and not leaf.grad[1].any()


def test_masked_keys_have_no_say(backend):
    inputs = _inputs(backend, 1, 2, 9, 7, 8, mask=True, reference_grad=True).trainable()
    seen = inputs.key_mask[0]
    result = _call(inputs, backend)
    fewer = fused_cross_attention(
        inputs.query,
        inputs.key[:, :, seen],
        inputs.value[:, :, seen],
        reference_key=inputs.reference_key[:, :, seen],
        backend=backend,
    )
    torch.testing.assert_close(result.output, fewer.output)
    torch.testing.assert_close(result.subject_loss, fewer.subject_loss)
    _loss(inputs, result).backward()
    for leaf in (inputs.key, inputs.value, inputs.reference_key):
        assert not leaf.grad[:, :, ~seen].any()


def test_batch_of_one_equals_its_copies(backend):
    inputs = _inputs(
        backend, 3, 2, 9, 7, 8, weights=True, mask=True, tokens=2, reference_grad=True,
        broadcast_kv=True, broadcast_reference=True,
    ).trainable()  # fmt: skip
    result = _call(inputs, backend)
    _loss(inputs, result).backward()
    leaves = (inputs.key, inputs.value, inputs.reference_key)
    copies = [leaf.detach().repeat(3, 1, 1, 1).requires_grad_() for leaf in leaves]
    copied = dataclasses.replace(
        inputs,
        key=copies[0],
        value=copies[1],
        reference_key=copies[2],
        token_weights=inputs.token_weights.repeat(3, 1),
        key_mask=inputs.key_mask.repeat(3, 1),
        probs_positions=inputs.probs_positions.repeat(3, 1),
    )
    other = _call(copied, backend)
    for one, many in zip(result, other, strict=True):
        torch.testing.assert_close(one, many)
    _loss(inputs, other).backward()
    for leaf, copy in zip(leaves, copies, strict=True):
        torch.testing.assert_close(leaf.grad, copy.grad.sum(0, keepdim=True))


def test_autocast_casts_the_four_and_nothing_inside(backend):
    inputs = _inputs(backend, 2, 2, 9, 7, 16, tokens=2, reference_grad=True)
    low = _inputs(backend, 2, 2, 9, 7, 16, tokens=2, reference_grad=True, dtype=torch.bfloat16)
    inputs, low = inputs.trainable(), low.trainable()
    with torch.autocast(inputs.query.device.type, dtype=torch.bfloat16):
        cast = _call(inputs, backend)
        _loss(inputs, cast).backward()
    plain = _call(low, backend)
    _loss(inputs, plain).backward()
    assert cast.output.dtype == torch.bfloat16
    assert cast.subject_loss.dtype == cast.attn_probs.dtype == torch.float32
    for one, other in zip(cast, plain, strict=True):
        assert torch.equal(one, other)
    for name in ("query", "key", "value", "reference_key"):
        found, wanted = getattr(inputs, name).grad, getattr(low, name).grad
        assert found.dtype == torch.float32
        assert torch.equal(found, wanted.float())


def test_autocast_around_the_backward_alone_changes_nothing(backend):
    inputs = _inputs(backend, 2, 2, 9, 7, 16, tokens=2, reference_grad=True).trainable()
    result = _call(inputs, backend)
    leaves = (inputs.query, inputs.key, inputs.value, inputs.reference_key)
    wanted = torch.autograd.grad(result, leaves, inputs.grads, retain_graph=True)
    with torch.autocast(inputs.query.device.type, dtype=torch.bfloat16):
        found = torch.autograd.grad(result, leaves, inputs.grads)
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other)


def test_autocast_takes_tensors_of_several_dtypes(backend):
    inputs = _inputs(backend, 2, 2, 9, 7, 16)
    with torch.autocast(inputs.query.device.type, dtype=torch.bfloat16):
        output = _call(inputs, backend, reference_key=inputs.reference_key.half()).output
    assert output.dtype == torch.bfloat16


def test_the_output_may_be_changed_in_place(backend):
    inputs = _inputs(backend, 2, 2, 9, 7, 16).trainable()
    plain = _call(inputs, backend).output
    (wanted,) = torch.autograd.grad((plain * 2 + 1).sum(), inputs.query)
    changed = _call(inputs, backend).output.transpose(1, 2).flatten(2)
    changed *= 2
    changed += 1
    (found,) = torch.autograd.grad(changed.sum(), inputs.query)
    assert torch.equal(found, wanted)


def test_gradients_in_a_batch_are_refused_in_words(backend):
    inputs = _inputs(backend, 1, 1, 4, 5, 8).trainable()
    output = _call(inputs, backend).output
    several = torch.ones(3, *output.shape, device=output.device)
    with pytest.raises(RuntimeError, match="one gradient at a time"):
        torch.autograd.grad(output, inputs.query, several, is_grads_batched=True)
    output = _call(inputs, backend).output
    with pytest.raises(RuntimeError, match="one gradient at a time"):
        torch.vmap(lambda grad: torch.autograd.grad(output, inputs.query, grad)[0])(several)


def test_gradients_that_are_zero_without_memory_are_zero(backend):
    """As the derivative of sgn is."""
    inputs = _inputs(backend, 1, 2, 4, 5, 8, reference_grad=True).trainable()
    for name in ("output", "subject_loss"):
        torch.sgn(getattr(_call(inputs, backend), name)).sum().backward()
        for leaf in (inputs.query, inputs.key, inputs.value, inputs.reference_key):
            assert leaf.grad is None or not leaf.grad.any()


def test_the_function_takes_meta_tensors(backend):
    inputs = _inputs(backend, 2, 3, 9, 7, 16)
    query, key, value = (t.to("meta") for t in inputs.tensors[:3])
    output = fused_cross_attention(query, key, value, backend=backend).output
    assert output.is_meta and output.shape == query.shape


def test_meta_tensors_tell_shapes(backend):
    inputs = _inputs(backend, 2, 3, 9, 7, 16, tokens=2, probs_all_heads=True)
    real = _call(inputs, backend)
    meta = FORWARD(
        *(None if t is None else t.to("meta") for t in inputs.tensors), True, 0.1, False, backend
    )
    for one, other in zip(meta, real, strict=True):
        assert one.is_meta and one.shape == other.shape and one.dtype == other.dtype
        assert one.stride() == other.stride()
