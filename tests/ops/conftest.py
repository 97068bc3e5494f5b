"""Fixtures of the operator's tests: every backend, recorded calls, CUDA sources on the host."""

from __future__ import annotations

import importlib.util
import os
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from sefi_fast.ops import dispatch


@pytest.fixture(scope="session")
def emulated_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return one folder for all of pytest's processes: one compiles there, the others load."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    folder /= "cuda_emulated"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def emulated_library(emulated_folder: Path) -> Path:
    """Compile the CUDA sources for the host, once for all tests that run them."""
    from cuda_emulation.library import build

    with FileLock(emulated_folder / "lock"):
        built = next(emulated_folder.glob("lib*.so"), None)
        return built or build(emulated_folder)


@pytest.fixture(scope="session")
def cuda_module(emulated_folder: Path, emulated_library: Path) -> types.ModuleType:
    """Return the binding of those sources, as sefi_fast._cuda."""
    from cuda_emulation.module import build_module

    with FileLock(emulated_folder / "lock"):
        built = next(emulated_folder.glob("_cuda*.so"), None)
        if built is None:
            return build_module(emulated_library)
    spec = importlib.util.spec_from_file_location("_cuda", built)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def emulated_cuda(
    cuda_module: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> types.ModuleType:
    """Run the backend "cuda" on CPU tensors; only the device's properties are made up."""
    from sefi_fast.ops import cuda

    monkeypatch.setattr(cuda, "_cuda", cuda_module)
    monkeypatch.setattr(cuda, "_device_not_supported_reason", lambda query: None)
    monkeypatch.setattr(cuda, "_launch_target", lambda query: (2, 0))
    return cuda_module


@pytest.fixture
def calls_of(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[types.SimpleNamespace]]:
    """calls_of("cpu", "eager") → a list that grows by every call of those backends' functions."""

    def watch(*names: str) -> list[types.SimpleNamespace]:
        calls: list[types.SimpleNamespace] = []
        for name in names:
            module = dispatch.load(name)
            for direction in ("forward", "backward"):
                monkeypatch.setattr(module, direction, _recorder(module, name, direction, calls))
        return calls

    return watch


def _recorder(
    module: Any, name: str, direction: str, calls: list[types.SimpleNamespace]
) -> Callable[..., Any]:
    original = getattr(module, direction)

    def record(*arguments: Any) -> Any:
        *grads, inputs, options = arguments
        call = types.SimpleNamespace(backend=name, direction=direction, inputs=inputs)
        call.options, call.grads = options, grads[0] if grads else None
        calls.append(call)
        return original(*arguments)

    return record
