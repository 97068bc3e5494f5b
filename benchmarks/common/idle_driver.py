"""A device for Triton that runs no kernel: for host costs of launches, and for their arguments."""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.backends.compiler import GPUTarget
from triton.runtime import driver


class Start(NamedTuple):
    """One start of a kernel as Triton gives it to the device."""

    kernel: int
    """Handle of the compiled kernel."""
    grid: tuple[int, int, int]
    arguments: tuple[Any, ...]


class _Binaries:
    """Return a new handle for each load; load nothing."""

    def __init__(self) -> None:
        self.loaded = 0

    def load_binary(self, *_: Any) -> tuple[int, int, int, int, int]:
        self.loaded += 1
        return self.loaded, self.loaded, 0, 0, 1024

    def unload_module(self, _: int) -> None:
        pass

    def get_device_properties(self, _: int) -> dict[str, int]:
        return {"max_shared_mem": 227 * 1024, "multiprocessor_count": 132, "warpSize": 32}


class IdleDriver:
    """Triton's driver with a device of one compute capability on which no kernel runs.

    Args:
        capability: major · 10 + minor of the device to compile for.
        keep: append every start to `starts`.
    """

    def __init__(self, capability: int = 90, keep: bool = False) -> None:
        self.capability = capability
        self.utils = _Binaries()
        self.starts: list[Start] = []

        class Launcher:
            def __init__(self, *_: Any) -> None:
                pass

            def __call__(launcher, x: int, y: int, z: int, _: int, kernel: int, *rest: Any) -> None:  # noqa: N805
                if keep:
                    # After the kernel: two packs of facts and two hooks.
                    self.starts.append(Start(kernel, (x, y, z), rest[4:]))

        self.launcher_cls = Launcher

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def install(self) -> None:
        """Become Triton's driver, for the rest of the process."""
        driver.set_active(self)
