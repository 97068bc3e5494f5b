"""Fixtures of the operator's tests: who was called with what."""

from __future__ import annotations

import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sefi_fast.ops import backends


@pytest.fixture(scope="session")
def emulated_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The CUDA sources compiled for the host, once for all tests that run them."""
    from cuda_emulation.library import build

    return build(tmp_path_factory.mktemp("cuda_emulated"))


@pytest.fixture
def calls_of(monkeypatch) -> Callable[..., list[types.SimpleNamespace]]:
    """calls_of("cpu", "eager") → a list that grows by every call of those backends' functions."""

    def watch(*names: str) -> list[types.SimpleNamespace]:
        calls: list[types.SimpleNamespace] = []
        for name in names:
            module = backends.load(name)
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
