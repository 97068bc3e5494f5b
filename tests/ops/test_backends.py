"""Which backend runs, what each says it cannot take, and that all give the same numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ops.oracle import check_results, make_inputs, operator_results

from sefi_fast.errors import BackendError
from sefi_fast.ops import available_backends, choose_backend, dispatch, fused_cross_attention

AVAILABLE = [name for name, reason in available_backends().items() if reason is None]
DEVICE = {"triton": "cuda" if torch.cuda.is_available() else "cpu", "cuda": "cuda"}


def _call(inputs, **options):
    return fused_cross_attention(
        inputs.query, inputs.key, inputs.value, **inputs.keywords(), **options
    )


def test_every_backend_is_available_or_says_why_not():
    found = available_backends()
    assert list(found) == ["triton", "cuda", "cpu", "eager"]
    assert found["eager"] is None
    assert all(reason is None or len(reason) > 20 for reason in found.values())


@pytest.mark.parametrize("name", AVAILABLE)
def test_backend_asked_for_runs_forward_and_backward(name, calls_of):
    calls = calls_of(*AVAILABLE)
    inputs = make_inputs(1, 1, 5, 7, 16, device=DEVICE.get(name, "cpu")).trainable()
    _call(inputs, backend=name).output.sum().backward()
    assert [(call.backend, call.direction) for call in calls] == [
        (name, "forward"),
        (name, "backward"),
    ]


@pytest.mark.skipif("cpu" not in AVAILABLE, reason="the native core is not built")
def test_cpu_tensors_go_to_the_native_core(calls_of):
    calls = calls_of(*AVAILABLE)
    inputs = make_inputs()
    assert choose_backend(*inputs.tensors[:4]) == "cpu"
    _call(inputs)
    assert [call.backend for call in calls] == ["cpu"]


def test_float64_goes_to_eager(calls_of):
    calls = calls_of(*AVAILABLE)
    inputs = make_inputs(dtype=torch.float64)
    assert choose_backend(*inputs.tensors[:4]) == "eager"
    _call(inputs)
    assert [call.backend for call in calls] == ["eager"]


def test_without_the_fastest_eager_runs(monkeypatch, calls_of):
    calls = calls_of("eager")
    whole = dispatch._import
    monkeypatch.setattr(
        dispatch, "_import", lambda name: "gone" if name != "eager" else whole(name)
    )
    inputs = make_inputs()
    assert choose_backend(*inputs.tensors[:4]) == "eager"
    _call(inputs)
    assert [call.backend for call in calls] == ["eager"]
    assert available_backends() == dict.fromkeys(("triton", "cuda", "cpu"), "gone") | {
        "eager": None
    }
    with pytest.raises(BackendError, match="gone"):
        dispatch.load("cpu")


def test_module_that_cannot_be_imported_is_a_reason(monkeypatch):
    def fail(name):
        raise ImportError("libsomething.so is missing")

    monkeypatch.setattr(dispatch.importlib, "import_module", fail)
    dispatch._import.cache_clear()
    try:
        assert choose_backend(*make_inputs().tensors[:4]) == "eager"
        with pytest.raises(BackendError, match="libsomething.so is missing"):
            choose_backend(*make_inputs().tensors[:4], backend="cpu")
    finally:
        dispatch._import.cache_clear()


def test_backend_asked_for_never_falls_back(calls_of):
    calls = calls_of(*AVAILABLE)
    inputs = make_inputs(dtype=torch.float64)
    for name in ("cpu", "cuda", "triton"):
        with pytest.raises(BackendError, match=f"backend '{name}' cannot take this input: .+"):
            _call(inputs, backend=name)
    assert not calls


def test_unknown_backend_is_told_the_known_ones():
    with pytest.raises(BackendError, match="unknown backend 'cutlass'.*triton, cuda, cpu, eager"):
        _call(make_inputs(), backend="cutlass")


SHAPES = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 3),
        "heads": st.integers(1, 3),
        "queries": st.one_of(st.integers(1, 70), st.sampled_from([1, 16, 31, 64])),
        "keys": st.one_of(st.integers(1, 256), st.sampled_from([1, 64, 77, 80, 256])),
        "head_dim": st.one_of(st.integers(1, 256), st.sampled_from([1, 40, 64, 80, 160, 256])),
        "dtype": st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
        "reference": st.booleans(),
        "weights": st.booleans(),
        "mask": st.booleans(),
        "tokens": st.integers(0, 4),
        "probs_all_heads": st.booleans(),
        "broadcast_kv": st.booleans(),
        "broadcast_reference": st.booleans(),
        "strided": st.booleans(),
        "reference_grad": st.booleans(),
        "seed": st.integers(0, 2**31),
    }
)


# Triton's interpreter takes a second a call; ops/test_fuzz.py has some random ones for it.
COMPILED = [name for name in AVAILABLE if name != "triton" or torch.cuda.is_available()]


@pytest.mark.parametrize("name", COMPILED)
def test_random_shapes_keep_the_accuracy_rule(name, calls_of):
    calls = calls_of(*AVAILABLE)

    @settings(
        max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    @given(SHAPES)
    def check(shape):
        # A handful of rows or numbers has no scale to speak of: all may be near zero by chance.
        # The rule of ops/test_fuzz.py allows for that.
        shape |= {"queries": max(shape["queries"], 16 // shape["heads"])}
        elements = shape["heads"] * shape["queries"] * shape["head_dim"]
        shape |= {"batch": max(shape["batch"], 64 // elements)}
        inputs = make_inputs(**shape, device=DEVICE.get(name, "cpu"))
        calls.clear()
        results = operator_results(inputs, name)
        assert {call.backend for call in calls} == {name}
        check_results(results, inputs, factor=4.0)

    check()
