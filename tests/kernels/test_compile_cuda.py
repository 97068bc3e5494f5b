"""The CUDA C++ sources compile for sm_80 and sm_90a: spills, matrix units, exponentials, loads.

Of sm_80 80 columns only; all of its widths: pytest -m long tests/kernels/test_compile_cuda.py
"""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

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


ALL = (40, 64, 80, 160)
ARCHITECTURES = pytest.mark.parametrize(
    ("capability", "widths"),
    [
        pytest.param(80, (80,), id="80, one width"),
        pytest.param(80, ALL, id="80", marks=pytest.mark.long),
        pytest.param(90, ALL, id="90"),
    ],
)


# Where a block has shared memory for dQ, dK and dV of 160 columns in one pass.
ONE_PASS_OF_WIDE_HEADS = (80, 90, 100)


@functools.cache
def facts(capability: int, widths: tuple[int, ...]) -> dict[tuple[str, int], Any]:
    whole = _cuda_compiled._compile

    def compile_one_width(source: Path, capability: int, output: Path) -> str:
        """The dispatch by head width with the one wanted in every branch."""
        text = source.read_text(encoding="utf-8")
        if source.stem in _cuda_compiled.SOURCES.values():
            chosen = f"run<{widths[0]}>"
            text, places = re.subn(r"\brun<decltype\(width\)::value>", chosen, text)
            assert places == 1
        narrowed = output.with_suffix(".cu")
        narrowed.write_text(text, encoding="utf-8")
        return whole(narrowed, capability, output)

    compiler = compile_one_width if len(widths) == 1 else whole
    with mock.patch.object(_cuda_compiled, "_compile", compiler):
        found = _cuda_compiled.compile_capability(capability, ["bfloat16"], list(widths), 2)
        return {(one.choice.kernel, one.choice.head_dim): one for one in found}


@pytest.mark.slow
@ARCHITECTURES
def test_every_kernel_of_every_width_meets_the_line(
    capability: int, widths: tuple[int, ...]
) -> None:
    wanted = {(kernel, width) for kernel in _cuda_compiled.SOURCES for width in widths}
    if capability not in ONE_PASS_OF_WIDE_HEADS:
        wanted.discard(("backward", 160))
    assert facts(capability, widths).keys() == wanted
    lost = {
        key: failures(one)
        for key, one in facts(capability, widths).items()
        if failures(one) and exception_for(one.choice) is None
    }
    assert not lost


@ARCHITECTURES
def test_a_row_costs_what_the_design_says(capability: int, widths: tuple[int, ...]) -> None:
    """Exponentials of two softmaxes over 80 keys, and no more products than tiles of 16 need."""
    products = {"forward": 3, "backward": 6, "backward_query": 5, "backward_key_value": 6}
    for (kernel, width), one in facts(capability, widths).items():
        # Two warps with half of the keys each join their sums, in four lanes a row.
        joined = 2 * 2 * 2 * 4 if (kernel, width) == ("backward", 160) else 0
        assert one.exponentials_a_row == 160 + joined, (kernel, width)
        wanted = products[kernel] * 2 * 80 * width
        if kernel == "backward":
            # Sums of four tiles of keys by groups of columns, of the fifth by halves of groups: of
            # whole eights.
            groups = 4 if width > 80 else 2
            eights = -(-width // (8 * groups))
            columns, halves = 8 * eights * groups, 2 * 8 * -(-eights // 2) * groups
            wanted += 2 * 2 * (64 * columns + 16 * halves - 80 * width)
        assert one.matrix_flops_a_row == wanted, (kernel, width)
        assert one.load_widths.get(128, 0) > 0, (kernel, width)
        assert one.blocks_resident >= 1, (kernel, width)


def test_the_other_sources_compile(tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    for source in OTHERS:
        done = subprocess.run(
            [
                *(nvcc, "-std=c++17", "-O3", "-I", str(ROOT / "csrc"), "-arch=sm_90a"),
                *("-cubin", str(ROOT / "csrc" / "cuda" / source), "-o", str(tmp_path / "cubin")),
            ],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
