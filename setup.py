"""Build of sefi_fast and its native modules _C and _cuda; torch is not needed."""

from __future__ import annotations

import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

# A build front end runs this file without its folder on the module search path.
sys.path.insert(0, str(Path(__file__).resolve().parent))
import native_build  # noqa: E402
from native_build import CPU, CUDA, SOURCES, FatalBuildError, Unwanted  # noqa: E402

WARNINGS = {
    CPU: (
        "the native core is not built: {}. CPU tensors will take the plain PyTorch path, which is "
        "slower and stores attention probabilities."
    ),
    CUDA: "the CUDA C++ kernels are not built: {}. CUDA tensors will take the Triton kernels.",
}


class BuildNative(build_ext):
    """Build the native modules with ninja; one that fails does not stop the installation."""

    def build_extensions(self) -> None:
        targets = {
            extension.name: Path(self.get_ext_fullpath(extension.name)).resolve()
            for extension in self.extensions
        }
        failed = native_build.build(Path(self.build_temp).resolve(), targets, self.verbose > 1)
        for module, error in failed.items():
            targets[module].unlink(missing_ok=True)
            if isinstance(error, FatalBuildError):
                raise CompileError(f"sefi_fast: {error}")
            # One error that concerns both modules is printed once.
            printed = module == CUDA and failed.get(CPU) is error
            if not printed and not isinstance(error, Unwanted):
                print(f"sefi_fast: {WARNINGS[module].format(error)}", file=sys.stderr)


setup(
    packages=[*find_packages(include=["sefi_fast", "sefi_fast.*"]), "sefi_fast.kernels"],
    package_dir={"sefi_fast.kernels": "kernels"},
    ext_modules=[
        Extension(module, [str(path) for path in SOURCES[module]], optional=True)
        for module in (CPU, CUDA)
    ],
    cmdclass={"build_ext": BuildNative},
)
