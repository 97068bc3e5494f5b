"""A kernel with its grid and numbers, found once and started again at little cost."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime import JITFunction, driver

from .configs import KernelConfig
from .ptxas import assembling


class Device(NamedTuple):
    """What a plan must know of the device: capability · 10, multiprocessors, interpreted or not.

    Compiled kernels belong to one device: its index tells two of a kind apart.
    """

    capability: int
    multiprocessors: int
    interpreted: bool
    index: int = 0


class Prepared:
    """One kernel of one device with its grid and all arguments but the tensors.

    Triton looks at each of some fifty arguments, every time, to find the kernel that it compiled
    for them. Here all but the tensors are settled, and of those only two things choose the kernel:
    which are there, and which start at a multiple of 16 bytes. What Triton found for these is kept.

    Args:
        kernel: takes its tensors first, then everything that `numbers` names.
        grid: programs along up to three axes.
        numbers: arguments by name, those that are compiled in among them.
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
        """Triton's compiled kernel of the first start; None before, and in the interpreter."""
        self._starts: dict[tuple[bool | None, ...], Callable[..., None]] = {}

    def _given(self, tensors: Mapping[str, Tensor | None]) -> list[Tensor | None]:
        return [*map(tensors.get, self.tensor_names)]

    def run(self, tensors: Mapping[str, Tensor | None]) -> None:
        """Start the kernel on the current device and stream; tensors not named are None.

        Each tensor has the dtype and layout that `numbers` were made for.
        """
        given = self._given(tensors)
        kind = tuple([None if x is None else x.data_ptr() % 16 == 0 for x in given])
        start = self._starts.get(kind)
        if start is not None:
            start(*given, *self._values)
            return
        with self._assembling() as options:
            compiled = self.kernel[self.grid](*given, *self._values, **options)
        # The interpreter compiles nothing, and Triton's asynchronous mode gives a promise only.
        if isinstance(compiled, CompiledKernel):
            self.compiled = self.compiled or compiled
            self._starts[kind] = compiled[(*self.grid, 1, 1)[:3]]

    def compile(self, tensors: Mapping[str, Tensor | None]) -> None:
        """Compile for these tensors and the current device into Triton's cache; nothing runs."""
        given = self._given(tensors)
        with self._assembling() as options:
            self.kernel.warmup(*given, *self._values, grid=self.grid, **options)

    @contextlib.contextmanager
    def _assembling(self) -> Iterator[dict[str, Any]]:
        """Inside, the current device's assembler is taken; yields what the compiler is told."""
        if not isinstance(self.kernel, JITFunction):
            yield self.config.options
            return
        with assembling(driver.active.get_current_target().arch) as more:
            yield {**self.config.options, **more}


class Launch(NamedTuple):
    """One start of a kernel: what is prepared, and the tensors by the kernel's names for them."""

    prepared: Prepared
    tensors: dict[str, Tensor | None]

    @property
    def kernel(self) -> Any:
        return self.prepared.kernel

    @property
    def config(self) -> KernelConfig:
        return self.prepared.config

    @property
    def arguments(self) -> dict[str, Any]:
        """All arguments by name; a tensor that is not given is None."""
        absent = dict.fromkeys(self.prepared.tensor_names)
        return {**absent, **self.tensors, **self.prepared.numbers}

    def run(self) -> None:
        """Start the kernel on the current device and stream."""
        self.prepared.run(self.tensors)

    def compile(self) -> None:
        """Compile for these arguments and the current device into Triton's cache; nothing runs."""
        self.prepared.compile(self.tensors)
