"""The choice of a backend, and the reasons that each gives for what it cannot take."""

from __future__ import annotations

import re
from types import ModuleType, SimpleNamespace

import pytest
import torch
from cuda_emulation.module import TARGETS, VERSION
from ops.oracle import BACKENDS, call_operator, device_of, make_inputs

from sefi_fast.errors import BackendError
from sefi_fast.ops import AttentionInputs, available_backends, choose_backend, cuda, dispatch
from sefi_fast.ops.dispatch import CudaDevice

BFLOAT16 = torch.bfloat16


def test_every_backend_is_available_or_says_why_not():
    found = available_backends()
    assert list(found) == ["triton", "cuda", "cpu", "eager"]
    assert found["eager"] is None
    assert all(reason is None or len(reason) > 20 for reason in found.values())


@pytest.mark.parametrize("name", BACKENDS)
def test_a_named_backend_runs_forward_and_backward(name, calls_of):
    calls = calls_of(*BACKENDS)
    inputs = make_inputs(1, 1, 5, 7, 16, device=device_of(name)).trainable()
    call_operator(inputs, name).output.sum().backward()
    assert [(call.backend, call.direction) for call in calls] == [
        (name, "forward"),
        (name, "backward"),
    ]


@pytest.mark.parametrize(
    ("dtype", "chosen"),
    [
        pytest.param(torch.float32, "cpu", marks=pytest.mark.skipif("'cpu' not in BACKENDS")),
        (torch.float64, "eager"),
    ],
)
def test_cpu_tensors_go_to_the_native_core_and_float64_to_eager(dtype, chosen, calls_of):
    calls = calls_of(*BACKENDS)
    inputs = make_inputs(dtype=dtype)
    assert choose_backend(inputs.tensors) == chosen
    call_operator(inputs)
    assert [call.backend for call in calls] == [chosen]


def test_without_the_fastest_eager_runs(monkeypatch):
    def fail(name):
        raise ImportError("libsomething.so is missing")

    reason = "its module cannot be imported (libsomething.so is missing)"
    monkeypatch.setattr(dispatch.importlib, "import_module", fail)
    dispatch._import.cache_clear()
    try:
        assert choose_backend(make_inputs().tensors) == "eager"
        assert available_backends()["triton"] == available_backends()["cpu"] == reason
        with pytest.raises(BackendError, match=re.escape(reason)):
            choose_backend(make_inputs().tensors, backend="cpu")
        with pytest.raises(BackendError, match="'cpu' is not there: its module"):
            dispatch.load("cpu")
    finally:
        dispatch._import.cache_clear()


def test_a_named_backend_never_falls_back(calls_of):
    calls = calls_of(*BACKENDS)
    inputs = make_inputs(dtype=torch.float64)
    for name in ("cpu", "cuda", "triton"):
        with pytest.raises(BackendError, match=f"backend '{name}' cannot take this input: .+"):
            call_operator(inputs, name)
    with pytest.raises(BackendError, match="unknown backend 'cutlass'.*triton, cuda, cpu, eager"):
        call_operator(inputs, "cutlass")
    assert not calls


def _on_cuda(
    head_dim: int = 64, rows: int = 77, dtype: torch.dtype = BFLOAT16, address: int = 4096
) -> SimpleNamespace:
    """Return a tensor [1, 8, rows, head_dim] on a device that is not there."""
    return SimpleNamespace(
        device=torch.device("cuda", 0),
        is_cuda=True,
        dtype=dtype,
        shape=(1, 8, rows, head_dim),
        stride=lambda: (800 * head_dim, head_dim, 8 * head_dim, 1),
        data_ptr=lambda: address,
        get_device=lambda: 0,
    )


def _pretend(monkeypatch: pytest.MonkeyPatch, capability: int, driver: int = 13000) -> None:
    for module in (dispatch, cuda):
        monkeypatch.setattr(module, "cuda_device", lambda index: CudaDevice(capability, 108))
    monkeypatch.setattr(cuda, "_driver_version", lambda: driver)


def _refuse(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    def reason(name: str, inputs: AttentionInputs) -> str | None:
        return f"{name} is not here" if name in names else None

    monkeypatch.setattr(dispatch, "_not_supported_reason", reason)


@pytest.mark.parametrize(
    ("capability", "refusing", "chosen"),
    [
        (80, (), "triton"),
        (80, ("triton",), "cuda"),
        (90, (), "cuda"),
        (90, ("cuda",), "triton"),
        (90, ("triton", "cuda"), "eager"),
    ],
)
def test_cuda_tensors_go_to_the_kernels_measured_faster_then_to_the_others(
    monkeypatch, capability: int, refusing: tuple[str, ...], chosen: str
) -> None:
    _pretend(monkeypatch, capability)
    _refuse(monkeypatch, *refusing)
    assert choose_backend(AttentionInputs(*[_on_cuda(80)] * 3)) == chosen


@pytest.mark.parametrize(
    ("query", "key", "value"),
    [
        (_on_cuda(64), _on_cuda(64), _on_cuda(64)),
        (_on_cuda(80), _on_cuda(80, rows=81), _on_cuda(80, rows=81)),
        (_on_cuda(80, dtype=torch.float32),) * 3,
        (_on_cuda(80), _on_cuda(80), _on_cuda(80, address=4104)),
    ],
    ids=["head dimension", "keys", "dtype", "unaligned value"],
)
def test_calls_not_measured_faster_go_to_triton(monkeypatch, query, key, value) -> None:
    _pretend(monkeypatch, 90)
    _refuse(monkeypatch)
    assert choose_backend(AttentionInputs(query, key, value)) == "triton"


def test_a_gpu_without_kernels_is_warned_of_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _pretend(monkeypatch, 80)
    _refuse(monkeypatch, "triton", "cuda")
    dispatch._warn_of_eager.cache_clear()
    for _ in range(2):
        assert choose_backend(AttentionInputs(*[_on_cuda()] * 3)) == "eager"
    (record,) = caplog.records
    assert "plain PyTorch path" in record.message
    assert "triton: triton is not here; cuda: cuda is not here" in record.message
    dispatch._warn_of_eager.cache_clear()


# The backend "cuda"


@pytest.mark.parametrize(
    ("target", "runs", "does_not"),
    [
        ("sm_80", (80, 86, 89), (75, 90, 100)),
        ("sm_90a", (90,), (80, 100)),
        ("compute_80", (80, 89, 90, 120), (75,)),
        ("compute_90a", (90,), (89, 100)),
        ("sm_100f", (100, 103), (90, 110, 120)),
    ],
)
def test_the_devices_of_a_target(target: str, runs: tuple, does_not: tuple) -> None:
    assert all(cuda.covers(target, capability) for capability in runs)
    assert not any(cuda.covers(target, capability) for capability in does_not)


@pytest.mark.parametrize(
    ("capability", "driver", "built", "message"),
    [
        (90, 13000, None, None),
        (86, 13000, None, None),
        (120, 13010, None, None),
        (75, 13000, None, "capability 7.5, and the kernels need 8.0 (A100) or newer"),
        (90, 12080, None, "built with CUDA 13.0 and the driver is of CUDA 12.8: update the driver"),
        (90, 13000, "sm_80", "built for sm_80: install again with SEFI_CUDA_ARCHS=90a"),
    ],
)
def test_cuda_refuses_devices_without_code(
    cuda_module: ModuleType, monkeypatch, capability, driver, built, message
) -> None:
    if built is not None:
        cuda_module = SimpleNamespace(architectures=lambda: [built], runtime_version=lambda: 13000)
    monkeypatch.setattr(cuda, "_cuda", cuda_module)
    _pretend(monkeypatch, capability, driver)
    reason = cuda._device_not_supported_reason(_on_cuda())
    assert reason is message is None or message in reason


def test_cuda_refuses_cpu_tensors_and_says_how_to_build(cuda_module, monkeypatch) -> None:
    inputs = make_inputs().tensors
    monkeypatch.setattr(cuda, "_cuda", cuda_module)
    with pytest.raises(BackendError, match="on cpu, and the kernels run on CUDA devices"):
        choose_backend(inputs, "cuda")
    monkeypatch.setattr(cuda, "_cuda", None)
    monkeypatch.setattr(cuda, "_missing", "not built", raising=False)
    with pytest.raises(BackendError, match="sefi_fast._cuda is not there.*SEFI_CUDA=1"):
        choose_backend(inputs, "cuda")
    assert cuda.architectures() is None


def test_the_cuda_binding_reports_its_build_and_driver(cuda_module, monkeypatch) -> None:
    monkeypatch.setattr(cuda, "_cuda", cuda_module)
    assert cuda.architectures() == TARGETS.split(",")
    assert cuda_module.runtime_version() == VERSION
    cuda._driver_version.cache_clear()
    assert cuda._driver_version() == cuda_module.driver_version() == VERSION
    cuda._driver_version.cache_clear()


def test_a_cuda_call_takes_the_scratch_that_it_asks_for(emulated_cuda, monkeypatch) -> None:
    sizes: list[int] = []
    make = cuda._scratch

    def scratch(query: torch.Tensor, size: int) -> torch.Tensor:
        sizes.append(size)
        return make(query, size)

    monkeypatch.setattr(cuda, "_scratch", scratch)
    inputs = make_inputs(2, 2, 33, 77, 40)
    cuda.forward(inputs.tensors, inputs.options)
    cuda.backward(inputs.grads, inputs.tensors, inputs.options)
    forward, backward = sizes
    assert 0 < forward < backward
    # dK and dV in float32 of two heads of two samples, at least once each.
    assert backward > 2 * 4 * (2 * 2 * 77 * 40)


def test_failures_of_the_cuda_kernels_are_one_sentence(cuda_module: ModuleType) -> None:
    absent, there = (0, 0, 0, 0, 0), (8, 1, 8, 8, 8)
    inputs = [there] * 3 + [absent]
    problem = ((1, 1, 1, 1, 8), 0, 1.0, inputs, [(0, 0, 0)] * 3, False)
    with pytest.raises(RuntimeError, match="scratch memory"):
        cuda_module.backward(*problem, absent, 0, 0, False, [absent] * 4, 0, 2, 0)
    with pytest.raises(ValueError, match="no gradient reaches the reference key"):
        cuda_module.backward(*problem, absent, 0, 0, False, [absent] * 3 + [there], 8, 2, 0)
    with pytest.raises(ValueError, match="dtype code"):
        cuda_module.forward((1, 1, 1, 1, 8), 7, *problem[2:], absent, 0, 0, 0, 2, 0)


# The backend "triton"


def test_triton_says_what_it_cannot_take(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from sefi_fast.ops import triton

    def reason(tensor: torch.Tensor) -> str:
        return str(triton.not_supported_reason(AttentionInputs(tensor, tensor, tensor)))

    query = torch.zeros(1, 1, 2, 8)
    assert "dtype is torch.float64" in reason(query.double())
    assert "on meta" in reason(query.to("meta"))
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "TRITON_INTERPRET=1" in reason(query)
    monkeypatch.setattr(triton, "_installed", lambda: False)
    assert "not installed" in reason(query)


@pytest.mark.parametrize(
    ("capability", "head_dim", "keys", "message"),
    [(75, 64, 77, "need 8.0"), (80, 64, 77, "None"), (89, 256, 256, "shared memory")],
)
def test_triton_refuses_devices_that_are_too_small(
    monkeypatch, capability: int, head_dim: int, keys: int, message: str
) -> None:
    pytest.importorskip("triton")
    from sefi_fast.ops import triton

    _pretend(monkeypatch, capability)
    monkeypatch.setattr(triton, "cuda_device", dispatch.cuda_device)
    query, key = _on_cuda(head_dim), _on_cuda(head_dim, rows=keys)
    assert message in str(triton.not_supported_reason(AttentionInputs(query, key, key)))
