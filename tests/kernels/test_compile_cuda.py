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

CSRC = Path(__file__).resolve().parents[2] / "csrc"
OTHERS = sorted(path for path in CSRC.glob("cuda/*.cu") if path.stem not in CUDA_SOURCES)
pytestmark = pytest.mark.skipif(
    cuda_not_supported_reason() is not None, reason=str(cuda_not_supported_reason())
)


# On sm_80 the forward kernel is enough for a short run.
CASES = [
    pytest.param(*case, marks=pytest.mark.long if case[0] == 80 and "bwd" in case[1] else ())
    for case in product((80, 90), CUDA_SOURCES)
]


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "source"), CASES)
def test_kernels_keep_their_registers_and_the_tensor_cores(capability: int, source: str) -> None:
    rows = compile_cuda(CSRC / "cuda" / f"{source}.cu", capability)
    found = {(row.kernel, row.head_dim, row.dtype) for row in rows}
    assert found == set(product([CUDA_SOURCES[source]], HEAD_DIMS, ("bfloat16", "float16")))
    assert not {row[:6]: failures(row) for row in rows if failures(row)}


@pytest.mark.parametrize("source", OTHERS, ids=lambda path: path.name)
def test_other_sources_compile(tmp_path: Path, source: Path) -> None:
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    done = subprocess.run(
        [
            *(nvcc, "-std=c++17", "-O3", "-I", str(CSRC), "-arch=sm_90a", "-cubin", str(source)),
            *("-o", str(tmp_path / "cubin")),
        ],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
