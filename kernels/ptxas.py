"""The ptxas of the kernels: Triton's own, or a newer one where that miscompiles them."""

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

FIXED_VERSION = (13, 3)
"""Older versions miscompile for Hopper (sm_90): they reuse the registers of a warp group's operands
before its product has read them, and the kernels read wrong numbers or addresses. Seen on an H200
with 12.8, gone with 13.4, and mentioned in NVIDIA's release notes of 13.3."""

OPTIONS = "--regAllocOptLevel=2"
"""Avoids another defect of ptxas 13.x. Triton passes it from 3.7 on; twice does no harm."""

_VARIABLES = ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH")


def is_fixed(version: str, capability: int) -> bool:
    """Return whether a ptxas may assemble the kernels for a capability of major * 10 + minor."""
    return capability // 10 != 9 or tuple(map(int, version.split(".")[:2])) >= FIXED_VERSION


def triton_ptxas_version(capability: int) -> str:
    """Return the version of the ptxas that Triton uses by default."""
    from triton.backends.nvidia.compiler import get_ptxas

    return str(get_ptxas(capability).version)


def _candidates() -> Iterator[Path]:
    """Yield where else a ptxas may be: the package nvidia-cuda-nvcc, then a CUDA toolkit."""
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        yield from sorted(Path(folder).glob("*/bin/ptxas"), reverse=True)
    if home := os.environ.get("CUDA_HOME"):
        yield Path(home) / "bin" / "ptxas"
    if found := shutil.which("ptxas"):
        yield Path(found)
    yield Path("/usr/local/cuda/bin/ptxas")


def _version_of(ptxas: Path) -> str | None:
    """Return the version that a ptxas reports, None where it does not run."""
    try:
        done = subprocess.run([ptxas, "--version"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    release = re.search(r"release (\d+\.\d+)", done.stdout)
    return release.group(1) if release else None


@functools.cache
def replacement(capability: int) -> tuple[str, str] | None:
    """Return path and version of the ptxas to use in place of Triton's own.

    None where Triton's own is fixed, where no fixed one was found, and where a variable of Triton's
    names one: that one is used, fixed or not.
    """
    named = any(map(os.environ.get, _VARIABLES))
    if named or is_fixed(triton_ptxas_version(capability), capability):
        return None
    for ptxas in _candidates():
        version = _version_of(ptxas)
        if version is not None and is_fixed(version, capability):
            return str(ptxas), version
    return None


def ptxas_version(capability: int) -> str:
    """Return the version of the ptxas that assembles the kernels for a compute capability."""
    found = replacement(capability)
    return found[1] if found else triton_ptxas_version(capability)


def not_supported_reason(capability: int) -> str | None:
    """Say why no ptxas here can assemble the kernels for a device; None where one can."""
    if capability // 10 != 9:
        return None
    import triton

    version = ptxas_version(capability)
    if is_fixed(version, capability):
        return None
    fixed = ".".join(map(str, FIXED_VERSION))
    return (
        f"Triton {triton.__version__} uses the assembler ptxas {version}, which miscompiles "
        f"warp-group products on compute capability 9.0: pip install 'nvidia-cuda-nvcc>={fixed}' "
        f"(the extra sefi_fast[hopper]), let TRITON_PTXAS_PATH name a ptxas of CUDA {fixed} or "
        "newer, or use triton 3.9 or newer where PyTorch allows it"
    )


@contextlib.contextmanager
def fixed_ptxas(capability: int) -> Iterator[dict[str, str]]:
    """Make Triton use the ptxas of these kernels inside; yield options for its compiler.

    Other kernels of the process keep Triton's own.
    """
    found = replacement(capability)
    if found is None:
        yield {}
        return
    from triton import knobs

    with knobs.nvidia.scope():
        # Versions of Triton differ in which of the two they use for 9.0.
        knobs.nvidia.ptxas = knobs.nvidia.ptxas_blackwell = found[0]
        own = knobs.nvidia.ptxas_options
        yield {"ptx_options": f"{own} {OPTIONS}" if own else OPTIONS}
