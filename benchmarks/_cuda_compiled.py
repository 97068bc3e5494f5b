"""Compiles the CUDA C++ kernels without a GPU, and reads what a row costs from machine code."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from _compiled import DEVICES_OF, Choice, Facts, add_bounds, per_row
from _latency import PLAYED, turn_clocks
from _listing import Kernel, kernels, load_widths, read_row_loop, row_loop_body
from _occupancy import LIMITS, RESERVED_SHARED, occupancy
from _roofline import kernel_work
from _shapes import Problem

_ROOT = Path(__file__).resolve().parent.parent
_PROBE = Path(__file__).resolve().parent / "cuda_probe"
BACKEND = "cuda"
# The kernels of the matrix units by source; the others take what these do not, at no set rate.
SOURCES = {
    "forward": "tensor_forward",
    "backward": "tensor_backward",
    "backward_query": "tensor_query",
    "backward_key_value": "tensor_key_value",
}
HEAD_DIMS = (40, 64, 80, 160)
_DTYPES = {"BFloat16": "bfloat16", "Half": "float16"}
_ROWS = 4096
_ROWS_A_WARP = 16
_NAME = re.compile(
    r"(?P<kernel>forward|query|key_value|backward)_kernelILi(\d+)ENS\d?_\d+(BFloat16|Half)E"
    r"Lb(?P<reference>[01])E(?:Lb(?P<small>[01])E|Li(?P<slots>[12])E)?"
)
_USE = re.compile(
    r"Function properties for (\S+)\n.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
    r".*?Used (\d+) registers",
    re.S,
)


class Start(NamedTuple):
    """How a kernel is started."""

    threads: int
    shared_bytes: int


class _Use(NamedTuple):
    registers: int
    spill_bytes: int


def why_not() -> str | None:
    """What is missing to compile and read the kernels, in words, or None."""
    if _nvcc() is None:
        return "no nvcc in CUDA_HOME, PATH or /usr/local/cuda"
    if _cuobjdump() is None:
        return "no cuobjdump beside nvcc, in PATH or in the package triton"
    return None


def _nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    places = [f"{home}/bin/nvcc"] if home else ["nvcc", "/usr/local/cuda/bin/nvcc"]
    return next((found for place in places if (found := shutil.which(place))), None)


def _cuobjdump() -> str | None:
    places = ["cuobjdump", "/usr/local/cuda/bin/cuobjdump"]
    spec = importlib.util.find_spec("triton")
    if spec is not None and spec.origin:
        folder = Path(spec.origin).parent / "backends" / "nvidia" / "bin"
        places.append(str(folder / "cuobjdump"))
    return next((found for place in places if (found := shutil.which(place))), None)


def target(capability: int) -> str:
    """The architecture that an installation builds for a compute capability."""
    return "sm_90a" if capability == 90 else f"sm_{capability}"


def _run(
    command: list[str], environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        words = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        raise RuntimeError(f"{Path(command[0]).name} failed: {' / '.join(words[:3])}")
    return done


def _compile(source: Path, capability: int, output: Path) -> str:
    """Compile one source to an object; what the assembler says of registers and spills."""
    nvcc = _nvcc()
    assert nvcc is not None
    # The probe's cuda/start.h is found first: the object can be asked how it starts its kernels.
    command = [nvcc, "-std=c++17", "-O3", "-DNDEBUG", "-I", str(_PROBE), "-I", str(_ROOT / "csrc")]
    command += [f"-arch={target(capability)}", "-Xptxas=-v", "-c", str(source), "-o", str(output)]
    return _run(command).stderr


def _probe(objects: list[Path], capability: int, folder: Path) -> Path:
    """A program that says how the launching code would start the kernels of some objects."""
    main, program = folder / "main.o", folder / "probe"
    _compile(_PROBE / "main.cu", capability, main)
    nvcc = _nvcc()
    assert nvcc is not None
    _run([nvcc, f"-arch={target(capability)}", str(main), *map(str, objects), "-o", str(program)])
    return program


def _starts(program: Path, shared_bytes: int) -> dict[tuple[str, int], Start]:
    """(kernel, head width) → how the first of its kernels starts where a block may have so much."""
    found = {}
    limit = {**os.environ, "SEFI_PROBE_SHARED_BYTES": str(shared_bytes)}
    for line in _run([str(program)], limit).stdout.splitlines():
        kernel, head_dim, threads, size, *_ = line.split()
        found[kernel, int(head_dim)] = Start(int(threads), int(size))
    return found


def _head_dim(mangled: str) -> int:
    form = _NAME.search(mangled)
    return int(form[2]) if form else 0


def _rows_a_turn(kernel: str, head_dim: int, warps: int, small: bool) -> int:
    """Query rows that a block takes in one turn of its row loop."""
    if kernel == "backward_key_value":
        if small:
            return _ROWS_A_WARP
        return 32 if head_dim > 64 else 64
    if kernel == "backward" and head_dim > 80:
        return _ROWS_A_WARP * warps // 2  # two warps have half of the keys each
    return _ROWS_A_WARP * warps


def _trips(head_dim: int, rows: int, exponentials: bool) -> int:
    """Turns of a loop over chunks of 16 rows inside the row loop of the kernel of the keys.

    Wide heads have two warps a tile of keys: each computes the maps of half of the chunks.
    """
    chunks = rows // _ROWS_A_WARP
    return max(chunks // 2, 1) if head_dim > 80 and exponentials else chunks


def _facts(choice: Choice, kernel: Kernel, use: _Use, start: Start, small: bool) -> Facts:
    import torch

    warps = start.threads // 32
    rows = _rows_a_turn(choice.kernel, choice.head_dim, warps, small)
    trips = functools.partial(_trips, choice.head_dim, rows)
    turn = read_row_loop(kernel, trips)
    resident = occupancy(choice.capability, use.registers, warps, start.shared_bytes)
    played = []
    if choice.capability in PLAYED:
        body, clocks = row_loop_body(kernel, trips), PLAYED[choice.capability]
        played = [turn_clocks(body, n, warps, clocks) for n in range(1, resident.blocks + 1)]
    a_row = Problem("custom", 1, choice.head_dim, 1)
    itemsize = getattr(torch, choice.dtype).itemsize
    facts = Facts(
        choice=choice,
        block=rows,
        warps=warps,
        stages=2 if choice.kernel in ("backward", "backward_key_value") and not small else 1,
        registers=use.registers,
        spill_bytes=use.spill_bytes,
        shared_bytes=start.shared_bytes,
        blocks_resident=resident.blocks,
        warps_resident=resident.warps,
        occupancy_limit=resident.limit,
        matrix_instructions=turn.matrix_instructions,
        warp_group_instructions=0,
        local_accesses_a_turn=turn.local_accesses,
        load_widths=load_widths(kernel),
        bytes_a_row=kernel_work(a_row, itemsize, choice.kernel).row_bytes,
        turn_clocks=played,
        **per_row(turn, warps, rows),
    )
    add_bounds(facts, DEVICES_OF.get(choice.capability, ()))
    return facts


def _is_taken(form: re.Match[str], small: bool) -> bool:
    """Whether a call with the loss and without the reference key's gradient takes a kernel."""
    if form["kernel"] == "key_value":
        return form["reference"] == "0" and form["small"] == str(int(small))
    return form["reference"] == "1" and form["slots"] in (None, "1" if small else "2")


def compile_capability(
    capability: int, dtypes: list[str], head_dims: list[int], jobs: int
) -> Iterator[Facts]:
    """Every kernel of the matrix units for one architecture, those of the reference key left out.

    Raises RuntimeError with the compiler's words where it fails.
    """
    cuobjdump = _cuobjdump()
    assert cuobjdump is not None
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(max(jobs, 1)) as pool:
        folder = Path(name)
        objects = {kernel: folder / f"{source}.o" for kernel, source in SOURCES.items()}
        logs = {
            kernel: pool.submit(
                _compile, _ROOT / "csrc" / "cuda" / f"{SOURCES[kernel]}.cu", capability, output
            )
            for kernel, output in objects.items()
        }
        said = {kernel: log.result() for kernel, log in logs.items()}
        program = _probe(list(objects.values()), capability, folder)
        room = LIMITS[capability].shared_bytes - RESERVED_SHARED
        starts = _starts(program, room)
        roomy = _starts(program, 2**30)
        for kernel, output in objects.items():
            uses = {
                name: _Use(int(registers), int(stored) + int(loaded))
                for name, stored, loaded, registers in _USE.findall(said[kernel])
            }
            listed = kernels(_run([cuobjdump, "-sass", str(output)]).stdout)
            in_order = sorted(listed.items(), key=lambda item: _head_dim(item[0]))
            for mangled, instructions in in_order:
                form = _NAME.search(mangled)
                if form is None:
                    raise RuntimeError(
                        f"{SOURCES[kernel]}.cu has a kernel of unknown name: {mangled}"
                    )
                head_dim, dtype = int(form[2]), _DTYPES[form[3]]
                if head_dim not in head_dims or dtype not in dtypes:
                    continue
                # Where the shared memory is too small for one kernel another takes its place.
                small = starts[kernel, head_dim] != roomy[kernel, head_dim]
                if not _is_taken(form, small):
                    continue
                choice = Choice(kernel, capability, dtype, head_dim, _ROWS, BACKEND)
                start = starts[kernel, head_dim]
                if start.shared_bytes > room:
                    continue
                yield _facts(choice, instructions, uses[mangled], start, small)
