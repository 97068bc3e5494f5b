"""Scratch memory that the native core takes beside PyTorch's allocator, as the core reports it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class _Counted:
    """Stands in for the native core and notes the bytes of scratch that each call returns."""

    def __init__(self, core: Any, taken: list[int]) -> None:
        self._core = core
        self._taken = taken

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._core, name)
        return self._noting(found) if name in ("forward", "backward") else found

    def _noting(self, call: Callable[..., int]) -> Callable[..., int]:
        def run(*arguments: Any) -> int:
            scratch = call(*arguments)
            self._taken.append(scratch)
            return scratch

        return run


@contextmanager
def scratch_of_native_core() -> Iterator[list[int]]:
    """Bytes of scratch of every native call made inside; none where the core is not built."""
    from sefi_fast.ops import cpu

    taken: list[int] = []
    core = cpu._C
    if core is not None:
        cpu._C = _Counted(core, taken)  # type: ignore[assignment]
    try:
        yield taken
    finally:
        cpu._C = core
