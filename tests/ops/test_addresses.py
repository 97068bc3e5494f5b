"""Triton kernels access no address outside the tensors of their launch, by the interpreter.

A device may not fault on a read outside, and results that do not depend on it look right.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from ops.oracle import backend_results, make_inputs
from triton.runtime import interpreter

from sefi_fast.ops import triton as backend

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="runs in Triton's interpreter"),
    pytest.mark.skipif(not backend.interpreted(), reason="needs TRITON_INTERPRET=1"),
    pytest.mark.skipif(
        not hasattr(interpreter, "_interpreter"), reason="this Triton's interpreter is another"
    ),
]


class _Watched:
    """The interpreter's memory, which notes what is touched outside the launch's tensors."""

    def __init__(self, memory: Any) -> None:
        self._memory = memory
        self.spans: list[tuple[int, int]] = []
        self.outside: list[str] = []
        self.touched = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._memory, name)

    def _inside(self, what: str, pointers: Any, mask: Any, size: int) -> Any:
        """The mask without the places outside, which are noted: they must not be touched here."""
        places = np.asarray(pointers).astype(np.int64)
        chosen = np.broadcast_to(np.asarray(mask).astype(bool), places.shape)
        inside = np.zeros(places.shape, bool)
        for first, end in self.spans:
            inside |= (places >= first) & (places + size <= end)
        self.touched += np.count_nonzero(chosen)
        if outside := np.count_nonzero(chosen & ~inside):
            self.outside.append(f"{what} of {size} bytes, {outside} times")
        return np.ascontiguousarray(chosen & inside)

    def load(self, pointers: Any, mask: Any, other: Any, dtype: Any) -> Any:
        mask = self._inside("load", pointers, mask, np.dtype(dtype).itemsize)
        return self._memory.load(pointers, mask, other, dtype)

    def store(self, pointers: Any, values: Any, mask: Any) -> Any:
        mask = self._inside("store", pointers, mask, np.asarray(values).dtype.itemsize)
        return self._memory.store(pointers, values, mask)


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    last = sum((size - 1) * stride for size, stride in steps) if tensor.numel() else -1
    first = tensor.data_ptr()
    return first, first + (last + 1) * tensor.element_size()


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Watched]:
    from sefi_fast.kernels import Launch

    memory = _Watched(interpreter._interpreter)
    run = Launch.run

    def run_watched(launch: Launch) -> None:
        tensors = [x for x in launch.arguments.values() if isinstance(x, torch.Tensor)]
        memory.spans = [_span(tensor) for tensor in tensors]
        run(launch)

    monkeypatch.setattr(interpreter, "_interpreter", memory)
    monkeypatch.setattr(Launch, "run", run_watched)
    yield memory


@pytest.mark.parametrize(
    "options",
    [
        {"queries": 36, "head_dim": 64, "dtype": torch.bfloat16},
        {"queries": 70, "keys": 80, "head_dim": 40, "dtype": torch.float16, "tokens": 2},
        {"batch": 1, "queries": 200, "head_dim": 80, "dtype": torch.float16, "mask": True},
        {"heads": 1, "queries": 130, "head_dim": 160, "dtype": torch.bfloat16},
        {"queries": 17, "keys": 5, "head_dim": 33, "mask": True, "weights": True},
        {
            "batch": 1,
            "queries": 17,
            "keys": 130,
            "head_dim": 80,
            "tokens": 1,
            "probs_all_heads": True,
        },
        {"heads": 1, "queries": 17, "head_dim": 160, "broadcast_kv": True, "strided": False},
        {"heads": 1, "queries": 1, "keys": 1, "head_dim": 1, "broadcast_reference": True},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_nothing_outside_the_tensors_is_touched(watched: _Watched, options: dict) -> None:
    backend_results("triton", make_inputs(**options, reference_grad=True))
    assert watched.touched > 0
    assert not watched.outside


def test_one_element_too_many_is_seen(
    watched: _Watched, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    from sefi_fast.kernels import plan

    common = plan._common_numbers

    def one_row_more(*arguments: Any) -> dict[str, Any]:
        found = common(*arguments)
        return found | {"seqlen_q": found["seqlen_q"] + 1}

    monkeypatch.setattr(plan, "_common_numbers", one_row_more)
    plan._compiled_forward.cache_clear()
    request.addfinalizer(plan._compiled_forward.cache_clear)
    inputs = make_inputs(1, 1, 20, 9, 16, strided=False)
    with torch.no_grad():
        backend.forward(inputs.tensors, inputs.options)
    for kind in ("load", "store"):
        assert any(access.startswith(kind) for access in watched.outside)
