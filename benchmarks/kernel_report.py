"""Registers, spills, shared memory, occupancy and matrix instructions of every kernel; no GPU.

python benchmarks/kernel_report.py --check
python benchmarks/kernel_report.py --backends triton --arch 80 90
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

# Triton reads these when the kernels are imported; the interpreter compiles nothing.
if __name__ in ("__main__", "__mp_main__"):
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch
from common.aot_compile import HEAD_DIMS, compile_launch, example_launches
from common.occupancy import occupancy
from common.report import table, write_csv
from tqdm import tqdm

_CSRC = Path(__file__).resolve().parents[1] / "csrc"
ARCHITECTURES = (80, 86, 89, 90, 100)
BACKENDS = ("triton", "cuda")
DTYPES = ("bfloat16", "float16", "float32")
ROWS = 4096
# The CUDA C++ kernels of the matrix units. The others take what these do not, at no set rate.
CUDA_SOURCES = {
    "attn_fwd_mma": "forward",
    "attn_bwd_mma": "backward",
    "attn_bwd_dq_mma": "backward_query",
    "attn_bwd_dkdv_mma": "backward_key_value",
}

_Case = tuple[str, str, int, int]
# Spills that are accepted, by backend, kernel, architecture and head_dim; --check fails on others.
EXCEPTIONS: dict[_Case, str] = {
    ("triton", "forward", 90, 40): "up to six spilled words, for a fourth program at once",
    ("triton", "forward", 90, 64): "up to six spilled words, for a fourth program at once",
    ("triton", "backward_key_value", 90, 160): "a dozen spilled words, for two programs at once",
    ("triton", "backward_key_value", 80, 80): "sixteen spilled words, for fewer barriers",
    ("triton", "backward_key_value", 80, 160): "four spilled words, for fewer barriers",
    ("triton", "backward_query", 80, 160): "forty spilled words, for fewer barriers",
    ("triton", "forward", 80, 64): "up to seven spilled words, for fewer barriers",
    ("triton", "forward", 86, 64): "up to seven spilled words, for fewer barriers",
    ("triton", "forward", 89, 64): "up to seven spilled words, for fewer barriers",
    ("cuda", "forward", 90, 80): "up to nine spilled words, for a fourth block at once",
    ("cuda", "forward", 100, 80): "up to nine spilled words, for a fourth block at once",
    ("cuda", "backward", 100, 80): "five spilled words, for a second block at once",
}

_CUDA_NAME = re.compile(
    r"(attn_(?:fwd|bwd|bwd_dq|bwd_dkdv))_kernelILi(\d+)ENS\d?_\d+(BFloat16|Half)E(\w+?)EvNS"
)
_CUDA_USE = re.compile(
    r"Function properties for (\S+)\n.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
    r".*?Used (\d+) registers",
    re.S,
)


class Row(NamedTuple):
    """One compiled kernel; None where a CUDA C++ launch decides.

    variant: template arguments of CUDA C++ after head_dim and dtype, or a gradient of Triton's.
    spill_bytes: stored and loaded. matrix_instructions: in Triton's PTX or the machine code of CUDA
    C++, warp_group_instructions: those of Hopper among them. serialized: see aot_compile.Report.
    """

    backend: str
    kernel: str
    variant: str
    capability: int
    dtype: str
    head_dim: int
    registers: int
    spill_bytes: int
    matrix_instructions: int
    warp_group_instructions: int
    serialized: bool = False
    block: int | None = None
    warps: int | None = None
    stages: int | None = None
    shared_bytes: int | None = None
    blocks_resident: int | None = None
    warps_resident: int | None = None
    occupancy_limit: str | None = None

    @property
    def exception(self) -> str | None:
        """Return why the spills of this kernel are accepted, or None."""
        return EXCEPTIONS.get((self.backend, self.kernel, self.capability, self.head_dim))


def compile_triton(capability: int, head_dim: int, dtype: str) -> list[Row]:
    """Compile the Triton kernels of one training call with the loss, without a GPU."""
    rows = []
    launches = example_launches(capability, getattr(torch, dtype), head_dim, ROWS)
    for name, launch in launches.items():
        if name == "reduce_splits":
            continue
        found = compile_launch(launch, capability)
        resident = occupancy(capability, found.registers, found.warps, found.shared_bytes)
        kernel, _, variant = name.partition(" ")
        rows.append(
            Row(
                "triton", kernel, variant, capability, dtype, head_dim,
                found.registers, found.spill_bytes, found.matrix_instructions,
                found.warp_group_instructions, found.serialized, found.block, found.warps,
                found.stages, found.shared_bytes, resident.blocks, resident.warps, resident.limit,
            )
        )  # fmt: skip
    return rows


def _tool(name: str) -> str | None:
    """Find a program of the CUDA toolkit: CUDA_HOME, PATH, /usr/local/cuda, Triton's package."""
    if home := os.environ.get("CUDA_HOME"):
        places = [f"{home}/bin/{name}"]
    else:
        places = [name, f"/usr/local/cuda/bin/{name}"]
    spec = importlib.util.find_spec("triton")
    if name != "nvcc" and spec is not None and spec.origin:
        places.append(str(Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name))
    return next((found for place in places if (found := shutil.which(place))), None)


def cuda_not_supported_reason() -> str | None:
    """Return why the CUDA C++ kernels cannot be compiled and read here, or None."""
    missing = [name for name in ("nvcc", "cuobjdump") if _tool(name) is None]
    return f"no {' and no '.join(missing)} in CUDA_HOME or PATH" if missing else None


def _run(tool: str, *arguments: str) -> str:
    done = subprocess.run([str(_tool(tool)), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{tool} failed: {(done.stderr + done.stdout).strip()[:500]}")
    return done.stdout + done.stderr


def compile_cuda(source: Path, capability: int) -> list[Row]:
    """Compile one CUDA C++ source and return a row for every kernel in it.

    Raises:
        RuntimeError: the compiler failed; the message holds its output.
    """
    with tempfile.TemporaryDirectory() as folder:
        cubin = str(Path(folder) / "kernels.cubin")
        target = "sm_90a" if capability == 90 else f"sm_{capability}"
        log = _run(
            "nvcc", "-std=c++17", "-O3", "-DNDEBUG", "-I", str(_CSRC), f"-arch={target}",
            "-Xptxas=-v", "-cubin", str(source), "-o", cubin,
        )  # fmt: skip
        listing = _run("cuobjdump", "-sass", cubin)
    products = {
        text.split(maxsplit=1)[0]: re.findall(r"\b([A-Z]*)MMA\.\d", text)
        for text in listing.split("Function : ")[1:]
    }
    rows = []
    for mangled, stored, loaded, registers in _CUDA_USE.findall(log):
        form = _CUDA_NAME.search(mangled)
        if form is None:
            raise RuntimeError(f"a kernel of unknown name: {mangled}")
        kernel, head_dim, dtype, rest = form.groups()
        kernel = CUDA_SOURCES[f"{kernel}_mma"]
        variant = ", ".join(re.findall(r"L[bi](\d)", rest))
        dtype = "bfloat16" if dtype == "BFloat16" else "float16"
        spill_bytes, found = int(stored) + int(loaded), products[mangled]
        groups = sum(kind.endswith("G") for kind in found)
        rows.append(
            Row(
                "cuda", kernel, f"<{variant}>", capability, dtype, int(head_dim), int(registers),
                spill_bytes, len(found), groups,
            )
        )  # fmt: skip
    return rows


def failures(row: Row) -> list[str]:
    """Return the problems of a kernel, except spills that EXCEPTIONS lists."""
    lost = []
    if row.spill_bytes and row.exception is None:
        lost.append(f"{row.spill_bytes} bytes of spills")
    if row.blocks_resident == 0:
        lost.append(f"{row.shared_bytes} bytes of shared memory do not fit on a multiprocessor")
    if row.dtype != "float32" and not row.matrix_instructions:
        lost.append("no matrix instruction")
    elif row.dtype != "float32" and row.backend == "triton" and row.capability == 90:
        if not row.warp_group_instructions:
            lost.append("no warp-group matrix instruction")
        if row.serialized:
            lost.append("warp-group matrix instructions are serialized")
    return lost


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arch", nargs="+", type=int, default=list(ARCHITECTURES), metavar="SM")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bfloat16"])
    parser.add_argument("--head-dims", nargs="+", type=int, default=list(HEAD_DIMS), metavar="D")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--csv", type=Path, metavar="FILE")
    parser.add_argument("--check", action="store_true", help="fail on spills or lost instructions")
    return parser.parse_args(arguments)


def compile_all(options: argparse.Namespace) -> list[Row]:
    """Compile all chosen cases, in order, in some processes."""
    tasks: list[Callable[[], list[Row]]] = []
    if "triton" in options.backends:
        tasks += [
            partial(compile_triton, *case)
            for case in product(options.arch, options.head_dims, options.dtype)
        ]
    if "cuda" in options.backends:
        if reason := cuda_not_supported_reason():
            print(f"the CUDA C++ kernels are not in this report: {reason}")
        else:
            tasks += [
                partial(compile_cuda, _CSRC / "cuda" / f"{source}.cu", capability)
                for capability, source in product(options.arch, CUDA_SOURCES)
            ]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, mp_context=context) as pool:
        futures = [pool.submit(task) for task in tasks]
        found = [future.result() for future in tqdm(futures)]
    return [
        row
        for rows in found
        for row in rows
        if row.dtype in options.dtype and row.head_dim in options.head_dims
    ]


def main(arguments: list[str] | None = None) -> int:
    """Return 1 with --check when a kernel has a problem that EXCEPTIONS does not list, else 0."""
    options = parse(arguments)
    rows = compile_all(options)
    print(f"\n77 keys, {ROWS} rows, with the loss")
    cells = [["-" if cell is None else str(cell) for cell in row] for row in rows]
    print(table([name.replace("_instructions", "") for name in Row._fields], cells))
    if options.csv:
        write_csv(options.csv, [row._asdict() for row in rows])
    failed = False
    for row in rows:
        name = f"sm_{row.capability} {row.backend} {row.kernel}{row.variant} {row.dtype}"
        if row.spill_bytes and row.exception:
            print(f"accepted: {name} {row.head_dim}: {row.spill_bytes} bytes: {row.exception}")
        if lost := failures(row):
            failed = True
            print(f"FAILED: {name} {row.head_dim}: {'; '.join(lost)}")
    return 1 if options.check and failed else 0


if __name__ == "__main__":
    sys.exit(main())
