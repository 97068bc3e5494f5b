"""The backend "cuda" end to end on CPU tensors: its binding and kernels, compiled for the host.

Only the questions to a device are answered by the tests: there is none here.
"""

from __future__ import annotations

import types
from types import ModuleType

import pytest
import torch
from cuda_emulation.module import TARGETS, VERSION
from ops.oracle import check_backend, check_results, make_inputs, operator_results

from sefi_fast.errors import BackendError
from sefi_fast.ops import choose_backend, cuda, dispatch, fused_cross_attention
from sefi_fast.ops.dispatch import CudaDevice

FLOAT16, BFLOAT16 = torch.float16, torch.bfloat16
ALL = {"weights": True, "mask": True, "tokens": 3, "reference_grad": True}


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
def test_every_option_keeps_the_accuracy_rule(emulated_cuda: ModuleType, options: dict) -> None:
    check_backend("cuda", make_inputs(**options))


def test_the_operator_and_autograd_reach_the_kernels(emulated_cuda: ModuleType, calls_of) -> None:
    calls = calls_of("cuda", "cpu", "eager")
    inputs = make_inputs(dtype=BFLOAT16, **ALL)
    results = operator_results(inputs, "cuda")
    assert {call.backend for call in calls} == {"cuda"}
    assert {call.direction for call in calls} == {"forward", "backward"}
    check_results(results, inputs)


def test_only_the_wanted_gradients_are_made(emulated_cuda: ModuleType) -> None:
    inputs = make_inputs(head_dim=40, dtype=BFLOAT16)
    grads = cuda.backward(
        None, inputs.grad_subject_loss, None, *inputs.tensors, **inputs.options,
        reference_grad=False, needs=(False, True, True, True),
    )  # fmt: skip
    assert grads[0] is None and grads[1] is not None and grads[1].any()
    # Nothing reaches the value through the subject loss, nor the reference key without asking.
    assert not grads[2].any() and not grads[3].any()


def test_a_call_takes_the_scratch_it_asks_for(
    emulated_cuda: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    make = cuda._scratch

    def scratch(query: torch.Tensor, size: int) -> torch.Tensor:
        sizes.append(size)
        return make(query, size)

    monkeypatch.setattr(cuda, "_scratch", scratch)
    inputs = make_inputs(2, 2, 33, 77, 40)
    cuda.forward(*inputs.tensors, **inputs.options)
    cuda.backward(
        *inputs.grads, *inputs.tensors, **inputs.options, reference_grad=False,
        needs=(True, True, True, False),
    )  # fmt: skip
    forward, backward = sizes
    assert 0 < forward < backward
    # dK and dV in float32 of two heads of two samples, at least once each.
    assert backward > 2 * 4 * (2 * 2 * 77 * 40)


def test_failures_of_the_kernels_are_one_sentence(cuda_module: ModuleType) -> None:
    absent, there = (0, 0, 0, 0, 0), (8, 1, 8, 8, 8)
    inputs = [there] * 3 + [absent]
    problem = ((1, 1, 1, 1, 8), 0, 1.0, inputs, [(0, 0, 0)] * 3, False)
    with pytest.raises(RuntimeError, match="scratch memory"):
        cuda_module.backward(*problem, absent, 0, 0, False, [absent] * 4, 0, 2, 0)
    with pytest.raises(ValueError, match="no gradient reaches the reference key"):
        cuda_module.backward(*problem, absent, 0, 0, False, [absent] * 3 + [there], 8, 2, 0)
    with pytest.raises(ValueError, match="dtype code"):
        cuda_module.forward((1, 1, 1, 1, 8), 7, *problem[2:], absent, 0, 0, 0, 2, 0)


def test_the_binding_tells_what_was_built(cuda_module: ModuleType) -> None:
    assert cuda_module.architectures() == TARGETS.split(",")
    assert cuda_module.runtime_version() == VERSION


def test_the_driver_is_asked_through_the_binding(cuda_module: ModuleType, monkeypatch) -> None:
    monkeypatch.setattr(cuda, "_cuda", cuda_module)
    cuda._driver_version.cache_clear()
    assert cuda._driver_version() == cuda_module.driver_version() == VERSION
    cuda._driver_version.cache_clear()


def test_without_the_module_the_reason_says_how_to_have_it(monkeypatch) -> None:
    monkeypatch.setattr(cuda, "_cuda", None)
    monkeypatch.setattr(cuda, "_missing", "not built", raising=False)
    inputs = make_inputs()
    with pytest.raises(BackendError, match="sefi_fast._cuda is not there.*SEFI_CUDA=1"):
        choose_backend(*inputs.tensors[:4], backend="cuda")
    assert cuda.architectures() is None


def test_cpu_tensors_are_refused_by_name(cuda_module: ModuleType, monkeypatch) -> None:
    monkeypatch.setattr(cuda, "_cuda", cuda_module)
    inputs = make_inputs()
    with pytest.raises(BackendError, match="on cpu, and the kernels run on CUDA devices"):
        fused_cross_attention(inputs.query, inputs.key, inputs.value, backend="cuda")


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
def test_what_code_for_a_target_runs_on(target: str, runs: tuple, does_not: tuple) -> None:
    assert all(cuda.covers(target, capability) for capability in runs)
    assert not any(cuda.covers(target, capability) for capability in does_not)


@pytest.mark.parametrize(
    ("capability", "driver", "said"),
    [
        (90, 13000, None),
        (86, 13000, None),
        (120, 13010, None),
        (75, 13000, "capability 7.5.*need 8.0"),
        (90, 12080, "built with CUDA 13.0 and the driver is of CUDA 12.8: update the driver"),
    ],
)
def test_devices_are_refused_in_words(
    cuda_module: ModuleType, monkeypatch, capability: int, driver: int, said: str | None
) -> None:
    monkeypatch.setattr(cuda, "_cuda", cuda_module)
    _pretend(monkeypatch, capability, driver)
    reason = cuda._why_not_device(_OnCuda())
    if said is None:
        assert reason is None
    else:
        assert reason is not None
        with pytest.raises(ValueError, match=said):
            raise ValueError(reason)


def test_a_device_without_code_of_its_own_is_told_what_to_build(monkeypatch) -> None:
    built = types.SimpleNamespace(architectures=lambda: ["sm_80"], runtime_version=lambda: 13000)
    monkeypatch.setattr(cuda, "_cuda", built)
    _pretend(monkeypatch, 90, 13000)
    assert "SEFI_CUDA_ARCHS=90a" in cuda._why_not_device(_OnCuda())


class _OnCuda:
    device = torch.device("cuda", 0)

    def __init__(self, head_dim: int = 64, rows: int = 77, dtype: torch.dtype = BFLOAT16) -> None:
        self.shape = (1, 8, rows, head_dim)
        self.dtype = dtype
        self.address = 4096

    def stride(self) -> tuple[int, ...]:
        _, heads, _, head_dim = self.shape
        return (heads * 100 * head_dim, head_dim, heads * head_dim, 1)

    def data_ptr(self) -> int:
        return self.address

    def get_device(self) -> int:
        return 0


def _pretend(monkeypatch: pytest.MonkeyPatch, capability: int, driver: int) -> None:
    monkeypatch.setattr(cuda, "cuda_device", lambda index: CudaDevice(capability, 108))
    monkeypatch.setattr(cuda, "_driver_version", lambda: driver)


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
    _pretend(monkeypatch, capability, 13000)
    monkeypatch.setattr(
        dispatch, "_why_not", lambda name, tensors: "not here" if name in refusing else None
    )
    query = _OnCuda(80)
    assert choose_backend(query, query, query) == chosen


def test_rows_that_begin_between_16_bytes_go_to_triton(monkeypatch) -> None:
    _pretend(monkeypatch, 90, 13000)
    monkeypatch.setattr(dispatch, "_why_not", lambda name, tensors: None)
    query, value = _OnCuda(80), _OnCuda(80)
    value.address += 8
    assert choose_backend(query, query, query) == "cuda"
    assert choose_backend(query, query, value) == "triton"


@pytest.mark.parametrize(
    ("query", "key"),
    [
        (_OnCuda(64), _OnCuda(64)),
        (_OnCuda(80), _OnCuda(80, rows=81)),
        (_OnCuda(80, dtype=torch.float32), _OnCuda(80, dtype=torch.float32)),
    ],
    ids=["width", "keys", "dtype"],
)
def test_calls_not_measured_faster_go_to_triton(monkeypatch, query: _OnCuda, key: _OnCuda) -> None:
    _pretend(monkeypatch, 90, 13000)
    monkeypatch.setattr(dispatch, "_why_not", lambda name, tensors: None)
    assert choose_backend(query, key, key) == "triton"


def test_a_gpu_without_kernels_is_told_of_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _pretend(monkeypatch, 80, 13000)
    monkeypatch.setattr(dispatch, "_why_not", lambda name, tensors: f"{name} is not here")
    dispatch._warn_of_eager.cache_clear()
    for _ in range(2):
        assert choose_backend(_OnCuda(), _OnCuda(), None) == "eager"
    (record,) = caplog.records
    assert "plain PyTorch path" in record.message
    assert "triton: triton is not here; cuda: cuda is not here" in record.message
    dispatch._warn_of_eager.cache_clear()
