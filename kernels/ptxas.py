"""Which ptxas assembles the kernels: Triton's own, or a newer one where that miscompiles them."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

SOUND = (13, 3)
"""Older ones reuse the registers of a warp group's operands before its product has read them, and
the kernels then read wrong numbers or addresses: seen on an H200 with 12.8, gone with 13.4;
NVIDIA's release notes of 13.3 tell of it."""

OPTIONS = "--regAllocOptLevel=2"
"""Against another mistake of ptxas 13.x. Triton passes it from 3.7 on; twice does no harm."""

_VARIABLES = ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH")


def is_sound(version: str, capability: int) -> bool:
    """Whether a ptxas may assemble the kernels for a compute capability of major * 10 + minor."""
    return capability // 10 != 9 or tuple(map(int, version.split(".")[:2])) >= SOUND


def tritons_version(capability: int) -> str:
    """Version of the ptxas that Triton takes by itself."""
    from triton.backends.nvidia.compiler import get_ptxas

    return get_ptxas(capability).version


def _candidates() -> Iterator[Path]:
    """Where else a ptxas may be: the package nvidia-cuda-nvcc, then a CUDA toolkit."""
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        yield from sorted(Path(folder).glob("*/bin/ptxas"), reverse=True)
    if home := os.environ.get("CUDA_HOME"):
        yield Path(home) / "bin" / "ptxas"
    if found := shutil.which("ptxas"):
        yield Path(found)
    yield Path("/usr/local/cuda/bin/ptxas")


def _version_of(ptxas: Path) -> str | None:
    """What a ptxas says of itself, None where it does not run."""
    try:
        said = subprocess.run([ptxas, "--version"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    release = re.search(r"release (\d+\.\d+)", said.stdout)
    return release.group(1) if release else None


@functools.cache
def replacement(capability: int) -> tuple[str, str] | None:
    """Path and version of the ptxas to take in place of Triton's own.

    None where Triton's own is sound, where nothing sound was found, and where a variable of
    Triton's names one: then that is taken, sound or not.
    """
    named = any(map(os.environ.get, _VARIABLES))
    if named or is_sound(tritons_version(capability), capability):
        return None
    for ptxas in _candidates():
        version = _version_of(ptxas)
        if version is not None and is_sound(version, capability):
            return str(ptxas), version
    return None


def assembler_version(capability: int) -> str:
    """Version of the ptxas that assembles the kernels for a compute capability."""
    found = replacement(capability)
    return found[1] if found else tritons_version(capability)


@contextlib.contextmanager
def assembling(capability: int) -> Iterator[dict[str, str]]:
    """Inside, Triton takes the ptxas of these kernels; yields options for its compiler.

    Other kernels of the process keep Triton's own: before and after all is as it was.
    """
    found = replacement(capability)
    if found is None:
        yield {}
        return
    from triton import knobs

    with knobs.nvidia.scope():
        # Which of the two is taken for 9.0 has changed between versions of Triton.
        knobs.nvidia.ptxas = knobs.nvidia.ptxas_blackwell = found[0]
        own = knobs.nvidia.ptxas_options
        yield {"ptx_options": f"{own} {OPTIONS}" if own else OPTIONS}
