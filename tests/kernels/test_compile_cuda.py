"""The CUDA C++ sources compile for sm_80 and sm_90a: spills, matrix units, exponentials, loads."""

from __future__ import annotations

import functools
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "benchmarks"))

import _cuda_compiled  # noqa: E402
from kernel_report import exception_for, failures  # noqa: E402

OTHERS = sorted(
    path.name
    for path in (ROOT / "csrc" / "cuda").glob("*.cu")
    if path.stem not in _cuda_compiled.SOURCES.values()
)
pytestmark = pytest.mark.skipif(
    _cuda_compiled.why_not() is not None, reason=str(_cuda_compiled.why_not())
)


@functools.cache
def facts(capability: int) -> dict[tuple[str, int], Any]:
    found = _cuda_compiled.compile_capability(
        capability, ["bfloat16"], list(_cuda_compiled.HEAD_DIMS), 2
    )
    return {(one.choice.kernel, one.choice.head_dim): one for one in found}


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_every_kernel_of_every_width_meets_the_line(capability: int) -> None:
    wanted = {(kernel, width) for kernel in _cuda_compiled.SOURCES for width in (40, 64, 80, 160)}
    assert facts(capability).keys() == wanted
    lost = {
        key: failures(one)
        for key, one in facts(capability).items()
        if failures(one) and exception_for(one.choice) is None
    }
    assert not lost


@pytest.mark.parametrize("capability", [80, 90])
def test_a_row_costs_what_the_design_says(capability: int) -> None:
    """Exponentials of two softmaxes over 80 keys, and no more products than tiles of 16 need."""
    products = {"forward": 3, "backward_query": 5, "backward_key_value": 6}
    for (kernel, width), one in facts(capability).items():
        assert one.exponentials_a_row == 160, (kernel, width)
        assert one.matrix_flops_a_row == products[kernel] * 2 * 80 * width, (kernel, width)
        assert one.load_widths.get(128, 0) > 0, (kernel, width)
        assert one.blocks_resident >= 1, (kernel, width)


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
def test_the_other_sources_compile(architecture: str, tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    for source in OTHERS:
        done = subprocess.run(
            [
                *(nvcc, "-std=c++17", "-O3", "-I", str(ROOT / "csrc"), f"-arch={architecture}"),
                *("-cubin", str(ROOT / "csrc" / "cuda" / source), "-o", str(tmp_path / "cubin")),
            ],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
