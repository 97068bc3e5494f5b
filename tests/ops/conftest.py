"""Fixtures of the operator's tests: who was called with what."""

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
    """One for all of pytest's processes: what one has compiled there, the others load."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    folder /= "cuda_emulated"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def emulated_library(emulated_folder: Path) -> Path:
    """The CUDA sources compiled for the host, once for all tests that run them."""
    from cuda_emulation.library import build

    with FileLock(emulated_folder / "lock"):
        built = next(emulated_folder.glob("lib*.so"), None)
        return built or build(emulated_folder)


@pytest.fixture(scope="session")
def cuda_module(emulated_folder: Path, emulated_library: Path) -> types.ModuleType:
    """The binding of those sources, as sefi_fast._cuda."""
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
    """The backend "cuda" on CPU tensors; only the questions to a device are answered here."""
    from sefi_fast.ops import cuda

    monkeypatch.setattr(cuda, "_cuda", cuda_module)
    monkeypatch.setattr(cuda, "_why_not_device", lambda query: None)
    monkeypatch.setattr(cuda, "_place", lambda query: (2, 0))
    return cuda_module


@pytest.fixture
def calls_of(monkeypatch) -> Callable[..., list[types.SimpleNamespace]]:
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
    module: types.ModuleType, name: str, direction: str, calls: list[types.SimpleNamespace]
) -> Callable[..., Any]:
    original = getattr(module, direction)

    def record(*arguments: Any, **options: Any) -> Any:
        calls.append(
            types.SimpleNamespace(
                backend=name, direction=direction, arguments=arguments, options=options
            )
        )
        return original(*arguments, **options)

    return record
