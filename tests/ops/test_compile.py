"""The operator under torch.compile: one graph, the same numbers, layouts and errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ops.oracle import OUTPUTS, has_layout, make_inputs

from sefi_fast.errors import BackendError
from sefi_fast.ops import available_backends, fused_cross_attention

AVAILABLE = [name for name, reason in available_backends().items() if reason is None]
BACKENDS = [name for name in AVAILABLE if name != "triton" or torch.cuda.is_available()]
DEVICE = {"triton": "cuda", "cuda": "cuda"}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"reference": False},
    "reference": {"weights": True, "broadcast_reference": True, "mask": True},
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


def _inputs(backend, **options):
    return make_inputs(2, 2, 9, 7, 16, **options, device=DEVICE.get(backend, "cpu"))


def _call(inputs, backend):
    return fused_cross_attention(
        inputs.query, inputs.key, inputs.value, **inputs.keywords(), backend=backend
    )


def _under_autocast(inputs, backend):
    with torch.autocast(inputs.query.device.type, dtype=torch.bfloat16):
        return _call(inputs, backend)


def _among_others(inputs, backend):
    """A layer's worth of operations that a compiler fuses and lays out as it likes."""
    output, subject_loss, attn_probs = fused_cross_attention(
        (inputs.query * 2).sin(),
        inputs.key + 1,
        inputs.value.exp(),
        **inputs.keywords(),
        backend=backend,
    )
    return output.transpose(1, 2).flatten(2) * 2, subject_loss.sqrt(), attn_probs


def _compile(function, **options):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, **options)


def _backward(inputs, outputs):
    pairs = zip(outputs, inputs.grads, strict=True)
    sum((output.flatten() * grad.flatten()).sum() for output, grad in pairs).backward()
    leaves = (inputs.query, inputs.key, inputs.value, inputs.reference_key)
    return [None if leaf is None else leaf.grad for leaf in leaves]


@pytest.mark.parametrize(
    ("kind", "dynamic"), [*((kind, False) for kind in KINDS), ("everything", True)]
)
def test_one_graph_forward_and_backward(backend, kind, dynamic):
    inputs = _inputs(backend, **KINDS[kind])
    ours, theirs = inputs.trainable(), inputs.trainable()
    compiled = _compile(_call, backend="aot_eager", dynamic=dynamic)
    found, wanted = compiled(ours, backend), _call(theirs, backend)
    for name, one, other in zip(OUTPUTS, found, wanted, strict=True):
        assert torch.equal(one, other)
        assert has_layout(one, name == "output")
    for one, other in zip(_backward(ours, found), _backward(theirs, wanted), strict=True):
        assert one is other is None or torch.equal(one, other)


def test_autocast_in_the_graph(backend):
    inputs = _inputs(backend, tokens=1)
    ours, theirs = inputs.trainable(), inputs.trainable()
    compiled = _compile(_under_autocast, backend="aot_eager")
    found, wanted = compiled(ours, backend), _under_autocast(theirs, backend)
    assert found.output.dtype == torch.bfloat16
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other)
    for one, other in zip(_backward(ours, found), _backward(theirs, wanted), strict=True):
        assert one is other is None or torch.equal(one, other)


@pytest.mark.slow
def test_inductor_keeps_the_last_axis_dense(backend):
    inputs = _inputs(backend, tokens=1, reference_grad=True)
    ours, theirs = inputs.trainable(), inputs.trainable()
    found, wanted = _compile(_among_others)(ours, backend), _among_others(theirs, backend)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)
    for one, other in zip(_backward(ours, found), _backward(theirs, wanted), strict=True):
        torch.testing.assert_close(one, other)


def test_backend_that_cannot_take_the_input_says_so_in_the_graph_too(backend):
    inputs = _inputs(backend, dtype=torch.float64)
    compiled = _compile(_call, backend="aot_eager")
    if backend == "eager":
        assert torch.equal(compiled(inputs, backend).output, _call(inputs, backend).output)
    else:
        with pytest.raises(BackendError, match=f"backend '{backend}' cannot take this input"):
            compiled(inputs, backend)


def test_column_past_the_end_says_so_in_the_graph_too(backend):
    if DEVICE.get(backend, "cpu") != "cpu":
        pytest.skip("values on a CUDA device are not read")
    inputs = _inputs(backend, tokens=1)
    inputs.probs_positions.fill_(7)
    with pytest.raises(ValueError, match="probs_positions names column 7, but there are 7 keys"):
        _compile(_call, backend="aot_eager")(inputs, backend)
