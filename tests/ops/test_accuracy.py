"""Every backend against float64, by the accuracy rule of `check_backend`, for every option."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from ops.oracle import (
    BACKENDS,
    GRADIENTS,
    GRADIENTS_OF,
    OUTPUTS,
    backend_results,
    check_backend,
    check_results,
    device_of,
    make_inputs,
    operator_results,
)

from sefi_fast.ops import available_backends
from sefi_fast.ops.dispatch import load
from sefi_fast.ops.inputs import OutputGrads

FLOAT16, BFLOAT16 = torch.float16, torch.bfloat16
ALL = {"weights": True, "mask": True, "tokens": 3, "reference_grad": True}
SMALL = {"batch": 1, "queries": 19}

# Dtypes, options and sizes; 64 + 16 keys and 32, 64 or 128 columns are tiles of the kernels.
CASES: dict[str, dict[str, Any]] = {
    **{
        f"{head_dim} {str(dtype).removeprefix('torch.')}": {
            "queries": 37, "head_dim": head_dim, "dtype": dtype, "tokens": 2, "seed": head_dim,
        }
        for head_dim, dtype in (
            (40, torch.float32), (160, torch.float32), (64, FLOAT16), (160, FLOAT16),
            (40, BFLOAT16), (80, BFLOAT16),
        )
    },
    **{
        f"{keys} keys": {**SMALL, "keys": keys, "tokens": 1, "reference_grad": True}
        for keys in (1, 16, 65, 129, 256)
    },
    **{
        f"head dimension {head_dim}": {**SMALL, "head_dim": head_dim, "reference_grad": True}
        for head_dim in (1, 17, 33, 96, 256)
    },
    **{
        f"{queries} queries": {
            "batch": 1, "queries": queries, "keys": 20, "head_dim": 16, "tokens": 1,
        }
        for queries in (1, 2, 63, 64, 65, 130)
    },
    **{
        f"scale {scale}": {"batch": 1, "keys": 21, "scale": scale, "reference_grad": True}
        for scale in (-0.3, 0.0, 1.7)
    },
    "plain": {"reference": False, "dtype": BFLOAT16},
    "mean probabilities": {"tokens": 5, "reference": False, "strided": False, "dtype": FLOAT16},
    "all probabilities": {"queries": 21, "keys": 70, "head_dim": 24, **ALL,
                          "mask": False, "probs_all_heads": True},
    "masked": {"queries": 21, "keys": 70, "head_dim": 24, **ALL, "dtype": BFLOAT16},
    "without reference_grad": {"queries": 21, "keys": 70, "head_dim": 24, "weights": True},
    "contiguous odd rows": {"head_dim": 33, "strided": False, "dtype": FLOAT16},
    "shared keys": {"batch": 3, "queries": 37, "keys": 21, "head_dim": 16, **ALL,
                    "broadcast_kv": True},
    "shared reference": {"batch": 3, "queries": 37, "keys": 21, "head_dim": 16, **ALL,
                         "broadcast_reference": True, "scale": -0.2},
    "shared everything": {"batch": 3, "queries": 37, "keys": 21, "head_dim": 16, **ALL,
                          "broadcast_kv": True, "broadcast_reference": True,
                          "probs_all_heads": True},
    "no batch": {"batch": 0, "queries": 5, "keys": 7, "head_dim": 8, **ALL},
    "no heads": {"heads": 0, "queries": 5, "keys": 7, "head_dim": 8, **ALL},
    "no queries": {"queries": 0, "keys": 7, "head_dim": 8, **ALL},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_option_keeps_the_accuracy_rule(backend: str, case: str) -> None:
    check_backend(backend, make_inputs(**CASES[case], device=device_of(backend)))


@pytest.mark.parametrize(
    "options",
    [
        {"head_dim": 40, "dtype": BFLOAT16, **ALL},
        {"head_dim": 64, "dtype": FLOAT16, **ALL, "probs_all_heads": True},
        {"head_dim": 80, "dtype": BFLOAT16, "reference": False, "tokens": 2},
        {"head_dim": 17, **ALL, "strided": False, "probs_all_heads": True},
        {"head_dim": 40, **ALL, "broadcast_kv": True, "broadcast_reference": True},
        {"head_dim": 40, "dtype": FLOAT16, "broadcast_reference": True, "scale": -0.2},
        {"head_dim": 24, "keys": 100, "queries": 19, "scale": 0.0, **ALL},
        {"head_dim": 40, "keys": 1, "dtype": BFLOAT16, **ALL},
        {"head_dim": 40, "queries": 0, "tokens": 1},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_the_emulated_cuda_kernels_keep_the_accuracy_rule(
    emulated_cuda: ModuleType, options: dict
) -> None:
    check_backend("cuda", make_inputs(**options))


def test_the_operator_reaches_the_emulated_cuda_kernels(emulated_cuda, calls_of) -> None:
    calls = calls_of("cuda", "cpu", "eager")
    inputs = make_inputs(dtype=BFLOAT16, **ALL)
    results = operator_results(inputs, "cuda")
    made = {(call.backend, call.direction) for call in calls}
    assert made == {("cuda", "forward"), ("cuda", "backward")}
    check_results(results, inputs)


@pytest.mark.skipif("triton" not in BACKENDS, reason="Triton does not run here")
@pytest.mark.skipif(torch.cuda.is_available(), reason="a device has its own configurations only")
@pytest.mark.parametrize(
    ("capability", "head_dim", "keys"), [(80, 40, 77), (80, 80, 154), (80, 160, 21), (100, 64, 77)]
)
def test_triton_configurations_of_other_architectures_keep_the_accuracy_rule(
    monkeypatch: pytest.MonkeyPatch, capability: int, head_dim: int, keys: int
) -> None:
    from sefi_fast.kernels import Device

    from sefi_fast.ops import triton

    monkeypatch.setattr(triton, "_device", lambda _: Device(capability, 2, True))
    sizes = {"batch": 1, "queries": 70, "keys": keys, "head_dim": head_dim}
    check_backend("triton", make_inputs(**sizes, dtype=FLOAT16, **ALL, seed=capability + head_dim))
    if keys <= 80:
        # The call of a training step, which is pipelined on 8.0.
        check_backend("triton", make_inputs(**sizes, dtype=BFLOAT16))


@pytest.mark.parametrize("dtype", [torch.float32, FLOAT16, BFLOAT16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_queries_without_keys_give_zeros_and_zero_gradients(backend, dtype) -> None:
    inputs = make_inputs(queries=9, keys=70, dtype=dtype, **ALL, device=device_of(backend))
    inputs.key_mask[0], inputs.key_mask[1] = True, False
    found = backend_results(backend, inputs)
    for name in OUTPUTS:
        assert found.outputs[name][0].any() and not found.outputs[name][1].any()
    for name in GRADIENTS:
        gradient = found.gradients["all"][name]
        assert gradient[0].any() and not gradient[1].any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("keys", [7, 77])
@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_keys_do_not_affect_the_results_whatever_they_hold(backend, keys, bad) -> None:
    inputs = make_inputs(1, 2, 9, keys, 16, **ALL, device=device_of(backend))
    hidden = ~inputs.key_mask[0]
    assert hidden.any() and not hidden.all()
    wanted = backend_results(backend, inputs)
    for name in ("key", "value", "reference_key"):
        assert not wanted.gradients["all"][f"grad_{name}"][:, :, hidden].any()
        held = getattr(inputs, name)[:, :, hidden].clone()
        getattr(inputs, name)[:, :, hidden] = bad
        assert_same_bits(backend_results(backend, inputs), wanted)
        getattr(inputs, name)[:, :, hidden] = held


def assert_same_bits(found: Any, wanted: Any) -> None:
    for name in OUTPUTS:
        assert torch.equal(found.outputs[name], wanted.outputs[name]), name
    for which in GRADIENTS_OF:
        for name, grad in found.gradients[which].items():
            other = wanted.gradients[which][name]
            assert grad is other is None or torch.equal(grad, other), (which, name)


@pytest.mark.parametrize("case", ["plain", "masked", "shared everything"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_repeats_are_equal_bit_for_bit(backend: str, case: str) -> None:
    """Fifty, but a few in the interpreter, which runs one program after the other."""
    interpreted = backend == "triton" and device_of(backend) == "cpu"
    sizes = {"queries": 70 if interpreted else 130}
    inputs = make_inputs(**CASES[case] | sizes, device=device_of(backend))
    first = backend_results(backend, inputs)
    for _ in range(2 if interpreted else 49):
        assert_same_bits(backend_results(backend, inputs), first)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_needed_gradients_come_back(backend: str) -> None:
    inputs = make_inputs(
        queries=70, keys=21, head_dim=16, tokens=1, reference_grad=True, device=device_of(backend)
    )
    module = load(backend)
    every = module.backward(inputs.grads, inputs.tensors, inputs.options)
    for place, name in enumerate(GRADIENTS):
        needs = tuple(index == place for index in range(4))
        options = inputs.options._replace(needs=needs)
        one = module.backward(inputs.grads, inputs.tensors, options)
        assert [gradient is not None for gradient in one] == list(needs), name
        assert torch.equal(one[place], every[place]), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_that_nothing_reaches_are_zero(backend: str) -> None:
    """Nothing reaches the value through the subject loss, nor the reference key unasked."""
    inputs = make_inputs(queries=9, head_dim=16, device=device_of(backend))
    grads = OutputGrads(None, inputs.grad_subject_loss, None)
    options = inputs.options._replace(needs=(False, True, True, True))
    query, key, value, reference_key = load(backend).backward(grads, inputs.tensors, options)
    assert query is None and key.any() and not value.any() and not reference_key.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gradient_of_the_output_may_have_any_strides(backend: str) -> None:
    inputs = make_inputs(batch=1, queries=19, keys=21, device=device_of(backend))
    backward = load(backend).backward
    transposed = inputs.grad_output.transpose(2, 3).contiguous().transpose(2, 3)
    constant = torch.ones((), device=inputs.query.device).expand_as(inputs.grad_output)
    for grad in (transposed, constant):
        found, wanted = (
            backward(OutputGrads(x, None, None), inputs.tensors, inputs.options)[:3]
            for x in (grad, grad.contiguous())
        )
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a device may be too old for it")
def test_triton_runs_in_its_interpreter() -> None:
    pytest.importorskip("triton")
    assert available_backends()["triton"] is None
