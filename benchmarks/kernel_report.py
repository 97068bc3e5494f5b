"""What the compilers made of every kernel, and the time a row that follows; needs no GPU.

python benchmarks/kernel_report.py --check
python benchmarks/kernel_report.py --backends triton --arch 80 90
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parent.parent
for _place in (str(_ROOT), str(_ROOT / "benchmarks")):
    if _place not in sys.path:
        sys.path.append(_place)

from _compiled import DEVICES_OF, Choice, Facts, compile_case  # noqa: E402
from _latency import PLAYED  # noqa: E402
from _report import table, write_json  # noqa: E402
from _roofline import KERNELS  # noqa: E402
from tqdm import tqdm  # noqa: E402

ARCHITECTURES = (80, 86, 89, 90, 100)
BACKENDS = ("triton", "cuda")
HEAD_DIMS = (40, 64, 80, 160)
ROWS = {"many": 4096, "few": 256}
# How much of a row's bytes may go by accesses under 16 bytes: a tail tile of 16 or 32 columns has
# fewer bytes than a block's lanes could take 16 of.
NARROW_ALLOWED = {40: 0.50, 64: 0.0, 80: 0.35, 160: 0.35}

# The C++ kernels read the 8 or 16 columns behind whole 32s by 4 or 8 bytes a lane.
NARROW_ALLOWED_CUDA = {40: 0.25, 64: 0.0, 80: 0.25, 160: 0.0}

# Defaults known to miss the line, each with why; --check holds all others to it.
EXCEPTIONS: dict[tuple[str, int, str, int], str] = {
    (
        "backward_key_value",
        90,
        "bfloat16",
        160,
    ): "a dozen spilled words, for two programs at once",
    **{
        ("forward", 90, "bfloat16", width): "up to six spilled words, for a fourth program at once"
        for width in (40, 64)
    },
    ("forward", 100, "bfloat16", 64): "the compiler moves a sixteenth by 8 bytes a lane",
    ("backward_key_value", 80, "bfloat16", 80): "sixteen spilled words, for a third less waiting",
    ("backward_key_value", 80, "bfloat16", 160): "four spilled words, for half the waiting",
    ("backward_query", 80, "bfloat16", 160): "forty spilled words, for a third of the waiting",
    **{
        ("forward", capability, "bfloat16", 64): "up to seven spilled words, for less waiting"
        for capability in (80, 86, 89)
    },
}

CUDA_EXCEPTIONS: dict[tuple[str, int, str, int], str] = {
    (kernel, capability, dtype, head_dim): why
    for kernel, capabilities, head_dim, why in (
        ("forward", (90, 100), 80, "up to nine spilled words, for a fourth block at once"),
        ("backward", (100,), 80, "five spilled words, for a second block at once"),
        ("backward", (80, 90, 100), 160, "two warps write a fifth of dQ, 8 bytes a lane each"),
    )
    for capability in capabilities
    for dtype in ("bfloat16", "float16")
}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line of the report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arch", nargs="+", type=int, default=list(ARCHITECTURES), metavar="SM")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"])
    parser.add_argument("--head-dims", nargs="+", type=int, default=list(HEAD_DIMS), metavar="D")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--png", type=Path, metavar="FILE")
    parser.add_argument("--check", action="store_true", help="fail on spills or lost instructions")
    return parser.parse_args(arguments)


def choices(options: argparse.Namespace) -> list[Choice]:
    """Every case asked for; a short layer is compiled only where its configuration differs."""
    import torch
    from sefi_fast.kernels.compile import example_launches

    found: list[Choice] = []
    for capability in options.arch:
        for dtype in options.dtype:
            for head_dim in options.head_dims:
                seen: dict[str, Any] = {}
                for bucket in options.rows:
                    launches = example_launches(
                        capability, getattr(torch, dtype), head_dim, ROWS[bucket]
                    )
                    for kernel in (name for name in KERNELS if name in launches):
                        config = launches[kernel].config
                        if seen.get(kernel) != config:
                            found.append(Choice(kernel, capability, dtype, head_dim, ROWS[bucket]))
                        seen.setdefault(kernel, config)
    return found


def compile_all(cases: list[Choice], jobs: int) -> list[Facts]:
    """All cases, in order, over some processes."""
    if jobs <= 1:
        return [compile_case(case) for case in tqdm(cases, unit="kernel")]
    found: dict[Choice, Facts] = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        futures = [pool.submit(compile_case, case) for case in cases]
        for future in tqdm(as_completed(futures), total=len(cases), unit="kernel"):
            facts = future.result()
            found[facts.choice] = facts
    return [found[case] for case in cases]


def compile_cuda(options: argparse.Namespace) -> list[Facts]:
    """The CUDA C++ kernels of the matrix units, where the tools to compile and read them are."""
    import _cuda_compiled

    reason = _cuda_compiled.why_not()
    if reason is not None:
        print(f"the CUDA C++ kernels are not in this report: {reason}")
        return []
    found: list[Facts] = []
    for capability in tqdm(options.arch, unit="architecture"):
        found += _cuda_compiled.compile_capability(
            capability, options.dtype, options.head_dims, options.jobs
        )
    return found


def failures(facts: Facts) -> list[str]:
    """What a default configuration has lost: registers to spills, matrix units, wide accesses."""
    choice, lost = facts.choice, []
    if facts.spill_bytes:
        lost.append(f"{facts.spill_bytes} bytes of spills")
    if not facts.blocks_resident:
        lost.append(f"{facts.shared_bytes} bytes of shared memory fit on no multiprocessor")
    if choice.dtype != "float32" and not facts.matrix_instructions:
        lost.append("no matrix instruction")
    table_ = NARROW_ALLOWED_CUDA if choice.backend == "cuda" else NARROW_ALLOWED
    allowed = table_.get(choice.head_dim, 0.5)
    if facts.narrow_share > allowed:
        lost.append(
            f"{facts.narrow_share:.0%} of the row bytes move by under 16 bytes, "
            f"allowed are {allowed:.0%}"
        )
    return lost


def exception_for(choice: Choice) -> str | None:
    """Why this default is known to miss the line, or None."""
    known = CUDA_EXCEPTIONS if choice.backend == "cuda" else EXCEPTIONS
    return known.get((choice.kernel, choice.capability, choice.dtype, choice.head_dim))


_HEAD = [
    "backend",
    "kernel",
    "dtype",
    "width",
    "rows",
    "tiles",
    "block",
    "warps",
    "stages",
    "regs",
    "spill",
    "shared",
]
_HEAD += ["blocks/SM", "warps/SM", "limit", "mma", "wgmma", "16B", "exp/row", "kFLOP/row"]
_HEAD += ["B/row", "instr/row"]


def _cells(facts: Facts, devices: tuple[str, ...]) -> list[str]:
    choice = facts.choice
    cells = [
        choice.backend,
        choice.kernel,
        choice.dtype,
        choice.head_dim,
        choice.rows,
        facts.key_tiles,
        facts.block,
        facts.warps,
    ]
    cells += [facts.stages, facts.registers, facts.spill_bytes, facts.shared_bytes]
    cells += [facts.blocks_resident, facts.warps_resident, facts.occupancy_limit]
    cells += [facts.matrix_instructions, facts.warp_group_instructions]
    cells += [f"{1 - facts.narrow_share:.0%}", f"{facts.exponentials_a_row:.0f}"]
    cells += [f"{facts.matrix_flops_a_row / 1e3:.1f}", f"{facts.bytes_a_row:.0f}"]
    cells += [f"{facts.instructions_a_row:.1f}"]
    for device in devices:
        bound = facts.bounds.get(device)
        cells.append(f"{bound['picoseconds']:.0f} {bound['unit']}" if bound else "-")
        if facts.choice.capability in PLAYED:
            played = (bound or {}).get("played")
            cells.append(f"{played:.0f}" if played else "-")
    return [str(cell) for cell in cells]


def report_table(facts: list[Facts], capability: int) -> str:
    """All cases of one architecture; last, picoseconds a row, the limiting unit, and played."""
    devices = DEVICES_OF.get(capability, ())
    head = [*_HEAD]
    for device in devices:
        head.append(f"{device} ps/row")
        if capability in PLAYED:
            head.append("played")
    rows = [_cells(one, devices) for one in facts if one.choice.capability == capability]
    return table(head, rows)


def plot(facts: list[Facts], path: Path) -> None:
    """A picture for each backend: what every unit takes a row, for each kernel and width."""
    from _plots import plot_units

    for backend in BACKENDS:
        shown = [one for one in facts if one.bounds and one.choice.backend == backend]
        if shown:
            plot_units(shown, path.with_stem(path.stem + ("" if backend == "triton" else "_cuda")))


def content(facts: list[Facts]) -> dict[str, Any]:
    """What goes into the JSON."""
    return {
        "benchmark": "kernel_report",
        "note": "compiled ahead of time; rates by datasheet; no GPU ran anything here",
        "kernels": [
            one.as_dict() | {"failures": failures(one), "exception": exception_for(one.choice)}
            for one in facts
        ],
    }


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 1 with --check when a default misses the line and no exception covers it."""
    options = parse(arguments)
    facts = []
    if "triton" in options.backends:
        # Interpreting would prevent compiling, in the workers too; Triton reads both late.
        os.environ.pop("TRITON_INTERPRET", None)
        os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
        facts += compile_all(choices(options), options.jobs)
    if "cuda" in options.backends:
        facts += compile_cuda(options)
    for capability in options.arch:
        print(f"\nsm_{capability}, 77 keys, with alignment\n{report_table(facts, capability)}")
    if options.json:
        write_json(options.json, content(facts))
    if options.png:
        plot(facts, options.png)
    red = 0
    for one in facts:
        lost, excuse = failures(one), exception_for(one.choice)
        if not lost:
            continue
        case = one.choice
        what = (
            f"sm_{case.capability} {case.backend} {case.kernel} {case.dtype} width {case.head_dim}"
        )
        print(f"{'known' if excuse else 'MISSES THE LINE'}: {what}: {'; '.join(lost)}")
        if excuse:
            print(f"  {excuse}")
        red += excuse is None
    return 1 if options.check and red else 0


if __name__ == "__main__":
    sys.exit(main())
