"""Builds the native core sefi_fast._C with pybind11 and ninja, in parallel and without torch."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
SOURCES = sorted(path.relative_to(ROOT) for path in ROOT.glob("csrc/**/*.cpp"))
X86 = platform.machine().lower() in ("x86_64", "amd64")
# One source, compiled once for each instruction set; the choice falls at run time.
ISA_FLAGS = {
    "avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
    "avx512.cpp": [
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"),
        "-mprefer-vector-width=512",
    ],
}
FLAGS = [
    *("-std=c++17", "-O3", "-DNDEBUG", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"),
    # Nothing of -ffast-math: NaN, infinity and exact zeros of the alignment must stay.
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
    # Vectors never cross a library boundary; and GCC 12 warns about its own AVX-512 headers.
    *("-Wno-psabi", "-Wno-uninitialized", "-Wno-maybe-uninitialized"),
]
LINK_FLAGS = (
    ["-bundle", "-undefined", "dynamic_lookup"]
    if sys.platform == "darwin"
    else ["-shared", "-pthread", "-Wl,-s"]
)


class BuildError(Exception):
    """Why the native core cannot be built here, in a few words."""


def _compiler() -> list[str]:
    named = os.environ.get("CXX")
    usual = [sysconfig.get_config_var("CXX"), "c++", "g++", "clang++"]
    for candidate in [named] if named else usual:
        command = shlex.split(candidate or "")
        if not command or shutil.which(command[0]) is None:
            continue
        probe = subprocess.run(
            [*command, "-std=c++17", "-fsyntax-only", "-x", "c++", "-"],
            input="#include <atomic>\n", capture_output=True, text=True, check=False,
        )  # fmt: skip
        if probe.returncode == 0:
            return command
    raise BuildError(f"no C++17 compiler ({named or 'c++, g++ or clang++'})")


def _tools() -> tuple[str, str]:
    """The ninja program and pybind11's include folder."""
    try:
        import pybind11
    except ImportError:
        raise BuildError("the Python package pybind11 is missing") from None
    try:
        import ninja

        program = shutil.which("ninja", path=ninja.BIN_DIR)
    except ImportError:
        program = None
    program = program or shutil.which("ninja")
    if program is None:
        raise BuildError("the build tool ninja is missing")
    return program, pybind11.get_include()


def _escape(path: Path | str) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _ninja_file(compiler: list[str], include: str, build: Path, target: Path) -> str:
    flags = [*FLAGS, *shlex.split(os.environ.get("CXXFLAGS", "")), "-I", str(ROOT / "csrc")]
    flags += ["-isystem", include, "-isystem", sysconfig.get_path("include")]
    link = [*LINK_FLAGS, *shlex.split(os.environ.get("LDFLAGS", ""))]
    lines = [
        "cxx = " + shlex.join(compiler).replace("$", "$$"),
        "flags = " + shlex.join(flags).replace("$", "$$"),
        "link = " + shlex.join(link).replace("$", "$$"),
        "rule compile",
        "  command = $cxx $flags $isa -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        "  command = $cxx $in -o $out $link",
    ]
    objects = []
    for source in SOURCES:
        if source.name in ISA_FLAGS and not X86:
            continue
        objects.append(_escape(build / source.with_suffix(".o")))
        lines.append(f"build {objects[-1]}: compile {_escape(ROOT / source)}")
        lines.append("  isa = " + " ".join(ISA_FLAGS.get(source.name, [])))
    lines.append(f"build {_escape(target)}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


class BuildNative(build_ext):
    """Writes a build.ninja and runs it; where that fails the rest of the package is installed."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve()
        try:
            self._build(build, target)
        except BuildError as error:
            target.unlink(missing_ok=True)
            print(
                f"sefi_fast: the native core is not built: {error}. Tensors on the CPU will take "
                "the plain PyTorch path, slower and with attention maps in memory.",
                file=sys.stderr,
            )

    def _build(self, build: Path, target: Path) -> None:
        if os.name != "posix":
            raise BuildError(f"{sys.platform} is not supported by it in this version")
        program, include = _tools()
        compiler = _compiler()
        build.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        (build / "build.ninja").write_text(_ninja_file(compiler, include, build, target))
        command = [program, "-C", str(build), *(["-v"] if self.verbose > 1 else [])]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode:
            errors = [line for line in (run.stdout + run.stderr).splitlines() if "error" in line]
            raise BuildError(f"{shlex.join(compiler)} failed: {' '.join(errors[:1])}")


setup(
    packages=[*find_packages(include=["sefi_fast", "sefi_fast.*"]), "sefi_fast.kernels"],
    package_dir={"sefi_fast.kernels": "kernels"},
    ext_modules=[Extension("sefi_fast._C", [str(path) for path in SOURCES], optional=True)],
    cmdclass={"build_ext": BuildNative},
)
