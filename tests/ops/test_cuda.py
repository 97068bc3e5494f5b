"""The operator on a CUDA device: nothing waits for the device, and a graph captures it."""

from __future__ import annotations

import pytest
import torch
from ops.oracle import BACKENDS as AVAILABLE
from ops.oracle import call_operator, check_backend, make_inputs

from sefi_fast.ops import choose_backend

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

BACKENDS = [name for name in AVAILABLE if name != "cpu"]


def _step(inputs, backend):
    outputs = call_operator(inputs, backend)
    leaves = (inputs.query, inputs.key, inputs.value, inputs.reference_key)
    return (*outputs, *torch.autograd.grad(outputs, leaves, inputs.grads))


def _inputs():
    return make_inputs(
        2, 2, 70, 77, 40, tokens=2, mask=True, weights=True, reference_grad=True, device="cuda"
    ).trainable()


def test_cuda_tensors_go_to_triton_or_else_to_the_cuda_kernels():
    assert choose_backend(_inputs().tensors) == BACKENDS[0]


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [33, 40, 64, 80, 160])
def test_every_option_keeps_the_accuracy_rule(backend, head_dim, dtype):
    check_backend(
        backend,
        make_inputs(
            2, 2, 130, 77, head_dim, dtype, tokens=2, mask=True, weights=True,
            reference_grad=True, device="cuda",
        ),
    )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_waits_for_the_device(backend):
    inputs = _inputs()
    _step(inputs, backend)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        _step(inputs, backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("backend", BACKENDS)
def test_graph_replays_on_changed_inputs(backend):
    inputs = _inputs()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        _step(inputs, backend)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = _step(inputs, backend)
    with torch.no_grad():
        inputs.query.mul_(-0.5)
        inputs.reference_key.add_(0.1)
    graph.replay()
    for one, other in zip(captured, _step(inputs, backend), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_position_past_the_end_gives_zeros(backend):
    inputs = _inputs()
    inputs.probs_positions.fill_(77)
    assert not call_operator(inputs, backend).attn_probs.any()
