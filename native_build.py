"""Build of the native modules: sources, compilers, flags, and one ninja file for both."""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent
CPU, CUDA = "sefi_fast._C", "sefi_fast._cuda"


def _sources(*patterns: str) -> list[Path]:
    found = (path for pattern in patterns for path in ROOT.glob(f"csrc/{pattern}"))
    return sorted(path.relative_to(ROOT) for path in found)


SOURCES = {CPU: _sources("*.cpp", "cpu/*.cpp"), CUDA: _sources("cuda/*.cu", "cuda/*.cpp")}
# The same kernels, compiled once per instruction set and chosen at run time.
AVX512_FLAGS = [
    *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"),
    "-mprefer-vector-width=512",
]
ISA_FLAGS = {
    "isa_avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
    "isa_avx512.cpp": AVX512_FLAGS,
    "isa_avx512_bf16.cpp": [*AVX512_FLAGS, "-mavx512bf16"],
    "isa_amx.cpp": [*AVX512_FLAGS, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
}
# Left out together if the compiler does not know these instruction sets.
BF16_SOURCES = ("isa_avx512_bf16.cpp", "isa_amx.cpp")
FLAGS = [
    *("-std=c++17", "-O3", "-DNDEBUG", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"),
    # No -ffast-math, because NaN, infinity and exact zeros of the subject loss must stay.
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
    # Vectors never cross a library boundary, and GCC 12 warns about its own AVX-512 headers.
    *("-Wno-psabi", "-Wno-uninitialized", "-Wno-maybe-uninitialized"),
]
LINK_FLAGS = (
    ["-bundle", "-undefined", "dynamic_lookup"]
    if sys.platform == "darwin"
    else ["-shared", "-pthread", "-Wl,-s"]
)
NVCC_FLAGS = ["-std=c++17", "-O3", "-DNDEBUG", "-Xcompiler=-fPIC,-fvisibility=hidden"]
# With a static runtime the module imports without a driver. Its names stay hidden, so that the
# runtime of another library does not answer its calls.
NVCC_LINK_FLAGS = ["-shared", "-cudart=static", "-Xlinker=-s", "-Xlinker=--exclude-libs=ALL"]

MIN_CAPABILITY = 80
# Only 90a has warp-group instructions; PTX of 80 runs on any newer device.
DEFAULT_ARCHS = "80+PTX;90a"


class BuildError(Exception):
    """A native module cannot be built here."""


class Unwanted(BuildError):
    """The user asked not to build the module."""


class FatalBuildError(BuildError):
    """The whole installation must fail."""


class Nvcc(NamedTuple):
    """The CUDA compiler, its options for the targets, and macros that describe them."""

    command: list[str]
    gencode: list[str]
    macros: list[str]


def _output(command: list[str], text: str | None = None) -> str | None:
    """Return the standard output of a program, or None if it fails, hangs or does not exist."""
    try:
        run = subprocess.run(
            command, input=text, capture_output=True, text=True, check=False, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout if run.returncode == 0 else None


def _accepts(compiler: list[str], flags: list[str], source: str) -> bool:
    return _output([*compiler, *flags, "-fsyntax-only", "-x", "c++", "-"], source) is not None


def cxx_compiler() -> list[str]:
    """Return the command of the C++ compiler: $CXX, or the first usual one that knows C++17."""
    named = os.environ.get("CXX")
    usual = [sysconfig.get_config_var("CXX"), "c++", "g++", "clang++"]
    for candidate in [named] if named else usual:
        command = shlex.split(candidate or "")
        if command and _accepts(command, ["-std=c++17"], "#include <atomic>\n"):
            return command
    raise BuildError(f"no C++17 compiler was found ({named or 'c++, g++ or clang++'})")


def _isa_flags(host: list[str]) -> dict[str, list[str]]:
    """Return the flags of the instruction sets that the compiler and the processor family have."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return {}
    if _accepts(host, ISA_FLAGS["isa_amx.cpp"], ""):
        return {**ISA_FLAGS, "dispatch.cpp": ["-DSEFI_HAVE_BF16"]}
    return {name: flags for name, flags in ISA_FLAGS.items() if name not in BF16_SOURCES}


def tools() -> tuple[str, str]:
    """Return the ninja program and the include folder of pybind11."""
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


def _targets(archs: str, known: list[str]) -> list[str]:
    """Parse architectures like 80, 8.0, 90a and 80+PTX for an nvcc that knows `known`."""
    targets: list[str] = []
    for word in re.split(r"[;,\s]+", archs.strip("; ,")):
        form = re.fullmatch(r"(?:sm_)?(\d+)\.?(\d)([af]?)(\+PTX)?", word)
        number = form[1] + form[2] if form else ""
        if form is None or number not in known or int(number) < MIN_CAPABILITY:
            usable = [name for name in known if int(name) >= MIN_CAPABILITY]
            raise FatalBuildError(
                f"SEFI_CUDA_ARCHS names {word!r}. This nvcc builds for {', '.join(usable)}; 90a "
                "has the warp-group kernels. Separate them by semicolons, as in '80+PTX;90a'."
            )
        targets.append(f"sm_{number}{form[3]}")
        if form[4]:
            targets.append(f"compute_{number}{form[3]}")
    return list(dict.fromkeys(targets))


def nvcc(host: list[str]) -> Nvcc:
    """Return the CUDA compiler of CUDA_HOME, PATH or /usr/local/cuda.

    Raises:
        BuildError: there is none, it is unwanted, or the GPUs of this machine are too old.
    """
    setting = os.environ.get("SEFI_CUDA", "")
    if setting not in ("", "0", "1"):
        raise FatalBuildError(
            f"SEFI_CUDA is {setting!r}. Set it to 1 to require the CUDA kernels, to 0 to leave "
            "them out, or unset it."
        )
    if setting == "0":
        raise Unwanted("SEFI_CUDA is 0")
    home = os.environ.get("CUDA_HOME")
    candidates = [f"{home}/bin/nvcc"] if home else ["nvcc", "/usr/local/cuda/bin/nvcc"]
    program = next(filter(None, map(shutil.which, candidates)), None)
    if program is None:
        raise BuildError(f"the CUDA compiler was not found ({' or '.join(candidates)})")
    version = re.search(r"release (\d+)\.(\d+)", _output([program, "--version"]) or "")
    known = re.findall(r"sm_(\d+)\b", _output([program, "--list-gpu-code"]) or "")
    if version is None or not known:
        raise BuildError(f"{program} does not print its version or its architectures")
    gpus = _output(["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]) or ""
    capabilities = {
        major + minor for major, minor in re.findall(r"^\s*(\d+)\.(\d)\s*$", gpus, re.M)
    }
    here = sorted(capabilities.intersection(known), key=int)
    supported = ["90a" if name == "90" else name for name in here if int(name) >= MIN_CAPABILITY]
    if here and not supported:
        raise BuildError("the GPUs of this machine are older than compute capability 8.0")
    targets = _targets(
        os.environ.get("SEFI_CUDA_ARCHS") or ";".join(supported) or DEFAULT_ARCHS, known
    )
    codes: dict[str, list[str]] = {}
    for target in targets:
        codes.setdefault(target.partition("_")[2], []).append(target)
    gencode = [
        f"-gencode=arch=compute_{name},code=[{','.join(code)}]" for name, code in codes.items()
    ]
    # nvcc cannot call a command of several words like "ccache g++".
    ccbin = ["-ccbin", host[0]] if os.environ.get("CXX") and len(host) == 1 else []
    number = int(version[1]) * 1000 + int(version[2]) * 10
    macros = [f'-DSEFI_CUDA_TARGETS="{",".join(targets)}"', f"-DSEFI_CUDA_VERSION={number}"]
    return Nvcc([program, *ccbin], gencode, macros)


def _escape(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _join(words: Iterable[str]) -> str:
    return shlex.join(words).replace("$", "$$")


def _compile_rule(name: str, command: list[str]) -> list[str]:
    line = f"  command = {_join(command)} $more -MMD -MF $out.d -c $in -o $out"
    return [f"rule {name}", line, "  depfile = $out.d", "  deps = gcc"]


def _link_rule(name: str, command: list[str], flags: list[str]) -> list[str]:
    return [f"rule {name}", f"  command = {_join(command)} $in -o $out {_join(flags)}"]


def ninja_file(
    host: list[str], cuda: Nvcc | None, include: str, folder: Path, targets: dict[str, Path]
) -> str:
    """Return the build file of the modules in `targets`; that of the CUDA module needs `cuda`."""
    own = ["-I", str(ROOT / "csrc")]
    flags = [*FLAGS, *shlex.split(os.environ.get("CXXFLAGS", "")), *own]
    flags += ["-isystem", include, "-isystem", sysconfig.get_path("include")]
    link = [*LINK_FLAGS, *shlex.split(os.environ.get("LDFLAGS", ""))]
    lines = _compile_rule("compile", [*host, *flags]) + _link_rule("link", host, link)
    isa_flags = _isa_flags(host)
    more = {ROOT / "csrc/cpu" / name: own_flags for name, own_flags in isa_flags.items()}
    if cuda is not None:
        lines += _compile_rule("compile_cuda", [*cuda.command, *NVCC_FLAGS, *own, *cuda.gencode])
        lines += _link_rule("link_cuda", cuda.command, NVCC_LINK_FLAGS)
        more[ROOT / "csrc/cuda/bindings.cpp"] = cuda.macros
    for module, target in targets.items():
        objects = []
        for source in SOURCES[module]:
            if source.name in ISA_FLAGS and source.name not in isa_flags:
                continue
            objects.append(_escape(folder / f"{source}.o"))
            rule = "compile_cuda" if source.suffix == ".cu" else "compile"
            lines.append(f"build {objects[-1]}: {rule} {_escape(ROOT / source)}")
            lines.append(f"  more = {_join(more.get(ROOT / source, []))}")
        rule = "link_cuda" if module == CUDA else "link"
        lines.append(f"build {_escape(target)}: {rule} {' '.join(objects)}")
    return "\n".join(lines) + "\n"


def _first_error(text: str) -> str:
    lines = [line.strip() for line in text.replace(f"{ROOT}{os.sep}", "").splitlines()]
    errors = [line for line in lines if re.search(r"\b(error|fatal)\b", line, re.I)]
    return (errors or lines or ["the compiler printed no message"])[0]


def build(folder: Path, targets: dict[str, Path], verbose: bool) -> dict[str, BuildError]:
    """Compile each module to its target and return the errors of the modules that failed."""
    failed: dict[str, BuildError] = {}

    def fail(module: str, error: BuildError) -> None:
        required = module == CUDA and os.environ.get("SEFI_CUDA") == "1"
        if required and not isinstance(error, FatalBuildError):
            error = FatalBuildError(
                f"SEFI_CUDA is 1, but the CUDA kernels cannot be built: {error}"
            )
        failed[module] = error

    try:
        if os.name != "posix":
            raise BuildError(f"{sys.platform} is not supported in this version")
        program, include = tools()
        host = cxx_compiler()
    except BuildError as error:
        for module in targets:
            fail(module, error)
        return failed
    cuda = None
    if CUDA in targets:
        try:
            cuda = nvcc(host)
        except BuildError as error:
            fail(CUDA, error)
            # If the installation must fail, the other module is not built first.
            if isinstance(failed[CUDA], FatalBuildError):
                return failed
    folder.mkdir(parents=True, exist_ok=True)
    wanted = {module: target for module, target in targets.items() if module not in failed}
    for target in wanted.values():
        target.parent.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text(ninja_file(host, cuda, include, folder, wanted))
    command = [program, "-C", str(folder), *(["-v"] if verbose else [])]

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)

    # -k 0: a failure of one module does not stop the other.
    if run("-k", "0").returncode:
        for module, target in wanted.items():
            alone = run(str(target))
            if alone.returncode:
                fail(module, BuildError(_first_error(alone.stdout + alone.stderr)))
    return failed
