"""How the native modules are compiled: sources, compilers, flags and one ninja file for all."""

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


SOURCES = {
    CPU: _sources("*.cpp", "cpu/**/*.cpp"),
    CUDA: _sources("cuda/**/*.cu", "cuda/**/*.cpp"),
}
X86 = platform.machine().lower() in ("x86_64", "amd64")
# One source, compiled once for each instruction set; the choice falls at run time.
AVX512_FLAGS = [
    *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"),
    "-mprefer-vector-width=512",
]
ISA_FLAGS = {
    "avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
    "avx512.cpp": AVX512_FLAGS,
    "avx512_bf16.cpp": [*AVX512_FLAGS, "-mavx512bf16"],
    "amx.cpp": [*AVX512_FLAGS, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
}
# Left out, together, where the compiler is too old for them.
DOT_SOURCES = ("avx512_bf16.cpp", "amx.cpp")
FLAGS = [
    *("-std=c++17", "-O3", "-DNDEBUG", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"),
    # Nothing of -ffast-math: NaN, infinity and exact zeros of the subject loss must stay.
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
    # Vectors never cross a library boundary; and GCC 12 warns about its own AVX-512 headers.
    *("-Wno-psabi", "-Wno-uninitialized", "-Wno-maybe-uninitialized"),
]
LINK_FLAGS = (
    ["-bundle", "-undefined", "dynamic_lookup"]
    if sys.platform == "darwin"
    else ["-shared", "-pthread", "-Wl,-s"]
)
NVCC_FLAGS = ["-std=c++17", "-O3", "-DNDEBUG", "-Xcompiler=-fPIC,-fvisibility=hidden"]
# With a runtime inside, the module imports where no driver is; its names stay hidden, so that the
# runtime of another library never answers its calls.
NVCC_LINK_FLAGS = ["-shared", "-cudart=static", "-Xlinker=-s", "-Xlinker=--exclude-libs=ALL"]

LOWEST_CAPABILITY = 80
# Warp-group instructions exist in 90a alone; PTX of 80 is what any newer device can compile.
DEFAULT_ARCHS = "80+PTX;90a"


class BuildError(Exception):
    """Why a native module cannot be built here, in a few words."""


class Unwanted(BuildError):
    """The user asked not to build it."""


class Misuse(BuildError):
    """An environment variable asks for what there is not: the build must end."""


class Nvcc(NamedTuple):
    """The CUDA compiler and what it is to make."""

    command: list[str]
    version: int
    """major * 1000 + minor * 10, as CUDA counts."""
    targets: list[str]
    """sm_90a is machine code, compute_80 is PTX."""

    def definitions(self) -> list[str]:
        """What the module tells of itself."""
        names = ",".join(self.targets)
        return [f'-DSEFI_CUDA_TARGETS="{names}"', f"-DSEFI_CUDA_VERSION={self.version}"]

    def gencode(self) -> list[str]:
        """An option for each architecture: its machine code, its PTX, or both from one pass."""
        names = dict.fromkeys(target.partition("_")[2] for target in self.targets)
        made = {
            name: [target for target in self.targets if target.partition("_")[2] == name]
            for name in names
        }
        return [
            f"-gencode=arch=compute_{name},code=[{','.join(codes)}]" for name, codes in made.items()
        ]


def compiler() -> list[str]:
    """The C++ compiler's command: $CXX, or the first of the usual ones that knows C++17."""
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


def _isa_flags(host: list[str]) -> dict[str, list[str]]:
    """Flags of the sources of one instruction set that this compiler can compile."""
    if not X86:
        return {}
    newest = ISA_FLAGS["amx.cpp"]
    command = [*host, *newest, "-fsyntax-only", "-x", "c++", "-"]
    probe = subprocess.run(command, input="", capture_output=True, text=True, check=False)
    if probe.returncode:
        return {name: flags for name, flags in ISA_FLAGS.items() if name not in DOT_SOURCES}
    return {**ISA_FLAGS, "dispatch.cpp": ["-DSEFI_HAVE_DOT"]}


def tools() -> tuple[str, str]:
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


def _output(command: list[str]) -> str:
    """What a program prints; nothing where it fails, hangs or is not there."""
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return run.stdout if run.returncode == 0 else ""


def _archs_of_this_machine() -> list[str]:
    """Architectures of the GPUs that nvidia-smi names: none where it names none."""
    said = _output(["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"])
    found = {major + minor for major, minor in re.findall(r"^\s*(\d+)\.(\d)\s*$", said, re.M)}
    return sorted("90a" if name == "90" else name for name in found)


def _targets(archs: str, known: Iterable[str]) -> list[str]:
    """The targets that words as 80, 8.0, 90a and 80+PTX name, for an nvcc that knows `known`."""
    targets: list[str] = []
    for word in re.split(r"[;,\s]+", archs.strip("; ,")):
        form = re.fullmatch(r"(?:sm_)?(\d+)\.?(\d)([af]?)(\+PTX)?", word)
        number = form[1] + form[2] if form else ""
        if form is None or number not in known or int(number) < LOWEST_CAPABILITY:
            usable = [name for name in known if int(name) >= LOWEST_CAPABILITY]
            raise Misuse(
                f"SEFI_CUDA_ARCHS names {word!r}: name architectures of this nvcc from 80 on "
                f"({', '.join(usable)}; 90a has the warp-group kernels), as in '80;90a' or '80+PTX'"
            )
        targets.append(f"sm_{number}{form[3]}")
        if form[4]:
            targets.append(f"compute_{number}{form[3]}")
    return list(dict.fromkeys(targets))


def cuda_is_demanded() -> bool:
    """Whether the installation must end where the CUDA module cannot be built."""
    return os.environ.get("SEFI_CUDA") == "1"


def nvcc(host: list[str]) -> Nvcc:
    """The CUDA compiler of CUDA_HOME, PATH or /usr/local/cuda; BuildError where it is not to be."""
    setting = os.environ.get("SEFI_CUDA", "")
    if setting not in ("", "0", "1"):
        raise Misuse(f"SEFI_CUDA is {setting!r}: set 1 to build it, 0 not to, or leave it out")
    if setting == "0":
        raise Unwanted("SEFI_CUDA is 0")
    home = os.environ.get("CUDA_HOME")
    places = [f"{home}/bin/nvcc"] if home else ["nvcc", "/usr/local/cuda/bin/nvcc"]
    program = next((found for place in places if (found := shutil.which(place))), None)
    if program is None:
        raise BuildError(f"the CUDA compiler is not there ({' or '.join(places)})")
    version = re.search(r"release (\d+)\.(\d+)", _output([program, "--version"]))
    known = re.findall(r"sm_(\d+)\b", _output([program, "--list-gpu-code"]))
    if version is None or not known:
        raise BuildError(f"{program} does not work: it tells no version or no architecture")
    here = [arch for arch in _archs_of_this_machine() if arch.rstrip("a") in known]
    if here and not any(int(arch.rstrip("a")) >= LOWEST_CAPABILITY for arch in here):
        raise BuildError("the GPUs of this machine are older than compute capability 8.0")
    chosen = [arch for arch in here if int(arch.rstrip("a")) >= LOWEST_CAPABILITY]
    archs = os.environ.get("SEFI_CUDA_ARCHS") or ";".join(chosen) or DEFAULT_ARCHS
    # A command of several words, as "ccache g++", is none that nvcc could call.
    ccbin = ["-ccbin", host[0]] if os.environ.get("CXX") and len(host) == 1 else []
    number = int(version[1]) * 1000 + int(version[2]) * 10
    return Nvcc([program, *ccbin], number, _targets(archs, known))


def _escape(path: Path | str) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _join(words: Iterable[str]) -> str:
    return shlex.join(words).replace("$", "$$")


def _rule(name: str, before: list[str], after: list[str], depends: bool = False) -> list[str]:
    """A ninja rule: words, the files of a build, words; with depends it compiles a source."""
    files = "$more -MMD -MF $out.d -c $in -o $out" if depends else "$in -o $out"
    lines = [f"rule {name}", f"  command = {_join(before)} {files} {_join(after)}"]
    return [*lines, "  depfile = $out.d", "  deps = gcc"] if depends else lines


def ninja_file(
    host: list[str], cuda: Nvcc | None, include: str, folder: Path, targets: dict[str, Path]
) -> str:
    """The rules and builds of the modules in `targets`; the CUDA module's need `cuda`."""
    own = ["-I", str(ROOT / "csrc")]
    flags = [*FLAGS, *shlex.split(os.environ.get("CXXFLAGS", "")), *own]
    flags += ["-isystem", include, "-isystem", sysconfig.get_path("include")]
    link = [*LINK_FLAGS, *shlex.split(os.environ.get("LDFLAGS", ""))]
    lines = _rule("compile", [*host, *flags], [], depends=True) + _rule("link", host, link)
    if cuda is not None:
        command = [*cuda.command, *NVCC_FLAGS, *own, *cuda.gencode()]
        lines += _rule("compile_cuda", command, [], depends=True)
        lines += _rule("link_cuda", cuda.command, NVCC_LINK_FLAGS)
    isa_flags = _isa_flags(host)
    for module, target in targets.items():
        objects = []
        for source in SOURCES[module]:
            if source.name in ISA_FLAGS and source.name not in isa_flags:
                continue
            objects.append(_escape(folder / f"{source}.o"))
            rule = "compile_cuda" if source.suffix == ".cu" else "compile"
            lines.append(f"build {objects[-1]}: {rule} {_escape(ROOT / source)}")
            if cuda is not None and module == CUDA and rule == "compile":
                lines.append(f"  more = {_join(cuda.definitions())}")
            else:
                lines.append(f"  more = {_join(isa_flags.get(source.name, []))}")
        rule = "link_cuda" if module == CUDA else "link"
        lines.append(f"build {_escape(target)}: {rule} {' '.join(objects)}")
    return "\n".join(lines) + "\n"


def _first_error(text: str) -> str:
    lines = [line.strip() for line in text.replace(f"{ROOT}{os.sep}", "").splitlines()]
    said = [line for line in lines if re.search(r"\b(error|fatal)\b", line, re.I)]
    return (said or lines or ["no word of why"])[0]


def build(folder: Path, targets: dict[str, Path], verbose: bool) -> dict[str, BuildError]:
    """Compile every module to its target, what is possible of it; module → why it is not there."""
    failed: dict[str, BuildError] = {}
    try:
        if os.name != "posix":
            raise BuildError(f"{sys.platform} is not supported by it in this version")
        program, include = tools()
        host = compiler()
    except BuildError as error:
        return dict.fromkeys(targets, error)
    cuda = None
    if CUDA in targets:
        try:
            cuda = nvcc(host)
        except BuildError as error:
            failed[CUDA] = error
            # What ends the installation should not wait for the other module.
            if isinstance(error, Misuse) or cuda_is_demanded():
                return failed
    folder.mkdir(parents=True, exist_ok=True)
    wanted = {module: target for module, target in targets.items() if module not in failed}
    for target in wanted.values():
        target.parent.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text(ninja_file(host, cuda, include, folder, wanted))
    command = [program, "-C", str(folder), *(["-v"] if verbose else [])]

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)

    # One failure must not keep the other module from being built.
    if run("-k", "0").returncode:
        for module, target in wanted.items():
            alone = run(str(target))
            if alone.returncode:
                failed[module] = BuildError(_first_error(alone.stdout + alone.stderr))
    return failed
