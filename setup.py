"""Builds the native modules sefi_fast._C and, with nvcc, sefi_fast._cuda; torch is not needed."""

from __future__ import annotations

import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

# A build front end runs this file without its folder among the places of modules.
sys.path.insert(0, str(Path(__file__).resolve().parent))
import native_build  # noqa: E402
from native_build import CPU, CUDA, SOURCES, Misuse, Unwanted  # noqa: E402

LOST = {
    CPU: (
        "the native core is not built: {}. Tensors on the CPU will take the plain PyTorch path, "
        "slower and with attention maps in memory."
    ),
    CUDA: "the CUDA C++ kernels are left out: {}. CUDA tensors will take Triton's.",
}


class BuildNative(build_ext):
    """Builds what it can with ninja; where a module fails the rest of the package is installed."""

    def build_extensions(self) -> None:
        targets = {
            extension.name: Path(self.get_ext_fullpath(extension.name)).resolve()
            for extension in self.extensions
        }
        failed = native_build.build(Path(self.build_temp).resolve(), targets, self.verbose > 1)
        for module, error in failed.items():
            targets[module].unlink(missing_ok=True)
            if isinstance(error, Misuse):
                raise CompileError(f"sefi_fast: {error}")
            if module == CUDA and native_build.cuda_is_demanded():
                raise CompileError(
                    f"sefi_fast: SEFI_CUDA is 1, but the CUDA kernels cannot be built: {error}"
                )
            # Where nothing at all could be built the first line has said so.
            silent = module == CUDA and failed.get(CPU) is error
            if not silent and not isinstance(error, Unwanted):
                print(f"sefi_fast: {LOST[module].format(error)}", file=sys.stderr)


setup(
    packages=[*find_packages(include=["sefi_fast", "sefi_fast.*"]), "sefi_fast.kernels"],
    package_dir={"sefi_fast.kernels": "kernels"},
    ext_modules=[
        Extension(module, [str(path) for path in SOURCES[module]], optional=True)
        for module in (CPU, CUDA)
    ],
    cmdclass={"build_ext": BuildNative},
)
