"""Launches: a kernel with its grid and numbers, prepared once and launched at little cost."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from triton.compiler import CompiledKernel
from triton.runtime import JITFunction, driver

from .configs import KernelConfig
from .ptxas import fixed_ptxas

if TYPE_CHECKING:
    from torch import Tensor

ALIGNED_BYTES = 16
"""Widest load of a thread. Triton compiles another kernel for addresses that it divides."""


class Device(NamedTuple):
    """The device of a plan. A compiled kernel belongs to one, so the ordinal is part of it."""

    capability: int
    """major * 10 + minor."""
    multiprocessors: int
    interpreted: bool
    ordinal: int = 0


class CompiledLaunch:
    """A kernel of one device with its grid and all arguments but the tensors.

    Triton inspects each of about fifty arguments at every call to find the kernel that it compiled
    for them. Here all but the tensors are fixed, and two properties of those choose the kernel:
    which are present, and which start at a multiple of 16 bytes. The kernel found is kept.

    Args:
        kernel: takes its tensors first, then everything that `numbers` names.
        grid: programs along up to three axes.
        numbers: arguments by name, compile-time constants included.
        config: warps and stages to compile for.
    """

    def __init__(
        self, kernel: Any, grid: tuple[int, ...], numbers: Mapping[str, Any], config: KernelConfig
    ) -> None:
        self.kernel = kernel
        self.grid = grid
        self.numbers = numbers
        self.config = config
        count = len(kernel.arg_names) - len(numbers)
        self.tensor_names = tuple(kernel.arg_names[:count])
        self._values = tuple(numbers[name] for name in kernel.arg_names[count:])
        self.compiled: Any = None
        """Triton's compiled kernel of the first launch; None before, and in the interpreter."""
        self._launchers: dict[tuple[bool | None, ...], Callable[..., None]] = {}

    def run(self, tensors: Mapping[str, Tensor | None]) -> None:
        """Launch on the current device and stream; tensors not named are None.

        Each tensor has the dtype and layout that `numbers` were made for.
        """
        given = [*map(tensors.get, self.tensor_names)]
        kind = tuple([None if x is None else x.data_ptr() % ALIGNED_BYTES == 0 for x in given])
        launcher = self._launchers.get(kind)
        if launcher is not None:
            launcher(*given, *self._values)
            return
        with self._compiler_options() as options:
            compiled = self.kernel[self.grid](*given, *self._values, **options)
        # The interpreter compiles nothing, and Triton's asynchronous mode gives a promise only.
        if isinstance(compiled, CompiledKernel):
            self.compiled = self.compiled or compiled
            self._launchers[kind] = compiled[(*self.grid, 1, 1)[:3]]

    def compile(self, tensors: Mapping[str, Tensor | None]) -> None:
        """Compile for these tensors and the current device into Triton's cache; nothing runs."""
        given = map(tensors.get, self.tensor_names)
        with self._compiler_options() as options:
            self.kernel.warmup(*given, *self._values, grid=self.grid, **options)

    @contextlib.contextmanager
    def _compiler_options(self) -> Iterator[dict[str, Any]]:
        """Use the current device's ptxas inside; yield the options of Triton's compiler."""
        if not isinstance(self.kernel, JITFunction):
            yield self.config.options
            return
        with fixed_ptxas(driver.active.get_current_target().arch) as more:
            yield {**self.config.options, **more}


class Launch(NamedTuple):
    """One launch of a kernel: the prepared launch, and the tensors by the kernel's names."""

    prepared: CompiledLaunch
    tensors: Mapping[str, Tensor | None]

    @property
    def kernel(self) -> Any:
        return self.prepared.kernel

    @property
    def config(self) -> KernelConfig:
        return self.prepared.config

    @property
    def arguments(self) -> dict[str, Any]:
        """All arguments by name; an absent tensor is None."""
        absent = dict.fromkeys(self.prepared.tensor_names)
        return {**absent, **self.tensors, **self.prepared.numbers}

    def run(self) -> None:
        """Launch the kernel on the current device and stream."""
        self.prepared.run(self.tensors)

    def compile(self) -> None:
        """Compile for these arguments and the current device into Triton's cache; nothing runs."""
        self.prepared.compile(self.tensors)
