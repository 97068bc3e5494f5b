"""The CUDA C++ sources compile for sm_90a and sm_80: spills and matrix instructions."""

from __future__ import annotations

import shutil
import subprocess
from itertools import product
from pathlib import Path

import pytest
from kernel_report import (
    CUDA_SOURCES,
    HEAD_DIMS,
    compile_cuda,
    cuda_not_supported_reason,
    failures,
)

ROOT = Path(__file__).resolve().parents[2]

OTHERS = sorted(
    path.name for path in (ROOT / "csrc" / "cuda").glob("*.cu") if path.stem not in CUDA_SOURCES
)
pytestmark = pytest.mark.skipif(
    cuda_not_supported_reason() is not None, reason=str(cuda_not_supported_reason())
)

KERNELS = {
    "tensor_forward": "forward",
    "tensor_backward": "backward",
    "tensor_query": "backward_query",
    "tensor_key_value": "backward_key_value",
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "source"),
    [
        pytest.param(
            *case, marks=pytest.mark.long if case[0] == 80 and case[1] != "tensor_forward" else ()
        )
        for case in product((80, 90), CUDA_SOURCES)
    ],
)
def test_every_kernel_keeps_its_registers_and_the_matrix_units(
    capability: int, source: str
) -> None:
    rows = compile_cuda(ROOT / "csrc" / "cuda" / f"{source}.cu", capability)
    found = {(row.kernel, row.head_dim, row.dtype) for row in rows}
    assert found == set(product([KERNELS[source]], HEAD_DIMS, ("bfloat16", "float16")))
    assert not {row[:6]: failures(row) for row in rows if failures(row)}


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
