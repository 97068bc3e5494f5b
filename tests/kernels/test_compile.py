"""Every default configuration compiles: spills, matrix units, wide loads, shared memory.

All head dimensions for sm_80, sm_86 and sm_90; for sm_100 the narrowest and the widest; one for
sm_89, which has those of sm_86. All of them: python benchmarks/kernel_report.py --check.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from common.occupancy import occupancy
from sefi_fast.kernels import shared_bytes
from sefi_fast.kernels.configs import TABLE

ROOT = Path(__file__).resolve().parents[2]

# Spilled bytes (stores and loads together) reached with Triton 3.9. A change may lower them, not
# raise them; what is not listed spills nothing.
SPILLS: dict[tuple[int, int, str], int] = {
    (80, 160, "float32"): 2604,
    (80, 80, "backward_key_value"): 128,
    (80, 160, "backward_key_value"): 32,
    (80, 160, "backward_query"): 336,
    (80, 64, "forward"): 40,
    (86, 64, "forward"): 56,
    (90, 40, "forward"): 24,
    (90, 64, "forward"): 16,
    (90, 160, "backward_key_value"): 96,
}

KERNELS = {"forward", "backward_query", "backward_key_value"}
# The fused kernel of dQ on 9.0, by head dimension.
FUSED = {40: "backward", 64: "backward", 80: "backward (grad_key)"}
# The other architectures: head dimensions, and shared memory in KiB that a program may have.
OTHERS = {86: ((40, 64, 80, 160), 99), 89: ((40,), 99), 100: ((40, 160), 227)}

# The tests around this one run in Triton's interpreter, which is chosen when it is imported: the
# compiler needs a process of its own.
SCRIPT = """
import json, sys, torch
from common.aot_compile import HEAD_DIMS, compile_launch, example_launches
capability, head_dims = int(sys.argv[1]), list(map(int, sys.argv[2:]))
for head_dim in head_dims or HEAD_DIMS:
    for name, launch in example_launches(capability, torch.bfloat16, head_dim, 4096).items():
        if head_dims and name == "reduce_splits":
            continue
        report = compile_launch(launch, capability)._asdict()
        print(json.dumps([head_dim, name, report | {"ctas_per_sm": launch.config.ctas_per_sm}]))
for head_dim in (40, 160) if not head_dims and capability == 80 else ():
    launch = example_launches(capability, torch.float32, head_dim, 64)["forward"]
    print(json.dumps([head_dim, "float32", compile_launch(launch, capability)._asdict()]))
"""


@functools.cache
def reports(capability: int, *head_dims: int) -> dict[tuple[int, str], dict[str, Any]]:
    """Return reports by head dimension and kernel; by default all, on 8.0 float32's forward too."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'benchmarks'}"}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(capability), *map(str, head_dims)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    return {(head_dim, name): report for head_dim, name, report in lines}


@functools.cache
def other_reports() -> dict[int, dict[tuple[int, str], dict[str, Any]]]:
    with ThreadPoolExecutor(2) as pool:
        found = pool.map(lambda capability: reports(capability, *OTHERS[capability][0]), OTHERS)
    return dict(zip(OTHERS, found, strict=True))


@pytest.mark.parametrize("capability", [80, 90])
def test_no_configuration_spills_more_than_listed(capability: int) -> None:
    worse = [
        f"{name} at head dimension {head_dim}: {report['spill_bytes']} bytes"
        for (head_dim, name), report in reports(capability).items()
        if report["spill_bytes"] > SPILLS.get((capability, head_dim, name), 0)
    ]
    assert not worse, "\n".join(worse)


@pytest.mark.parametrize("capability", [80, 90])
def test_as_many_programs_fit_on_a_multiprocessor_as_the_table_says(capability: int) -> None:
    for (head_dim, name), report in reports(capability).items():
        if name in KERNELS or name.startswith("backward"):
            measures = (report[key] for key in ("registers", "warps", "shared_bytes"))
            found = occupancy(capability, *measures).blocks
            assert found == report["ctas_per_sm"], (head_dim, name)


def test_shared_memory_is_no_more_than_shared_bytes_says() -> None:
    for (head_dim, name), report in reports(90).items():
        if name != "reduce_splits":
            assert report["shared_bytes"] <= shared_bytes("half", 90, head_dim, 64, 16), name


@pytest.mark.parametrize("capability", [80, 90])
def test_all_kernels_were_compiled(capability: int) -> None:
    for head_dim in (40, 64, 80, 160):
        found = {name for width, name in reports(capability) if width == head_dim}
        assert found >= KERNELS | {"reduce_splits"}
        fused = {FUSED[head_dim]} if capability == 90 and head_dim in FUSED else set()
        assert found - KERNELS - {"reduce_splits", "float32"} == fused


@pytest.mark.parametrize("capability", [80, 90])
def test_half_precision_uses_the_matrix_units_and_wide_loads(capability: int) -> None:
    for (head_dim, name), report in reports(capability).items():
        if name in ("float32", "reduce_splits"):
            continue
        assert report["matrix_instructions"] > 0, (head_dim, name)
        assert report["loads"].get("128", 0) > 0, (head_dim, name, report["loads"])
        if capability == 90:
            assert report["warp_group_instructions"] > 0, (head_dim, name)


@pytest.mark.slow
@pytest.mark.parametrize("capability", OTHERS)
def test_the_other_architectures_compile_too(capability: int) -> None:
    found = other_reports()[capability]
    head_dims, shared_kib = OTHERS[capability]
    for head_dim in head_dims:
        assert {name for width, name in found if width == head_dim} >= KERNELS
    for (head_dim, name), report in found.items():
        case = f"{name} at head dimension {head_dim}"
        measures = (report[key] for key in ("registers", "warps", "shared_bytes"))
        assert occupancy(capability, *measures).blocks == report["ctas_per_sm"], case
        assert report["spill_bytes"] <= SPILLS.get((capability, head_dim, name), 0), case
        assert report["shared_bytes"] <= shared_kib * 1024, case
        assert report["matrix_instructions"] > 0, case
        assert report["loads"].get("128", 0) > 0, (case, report["loads"])


def test_the_architecture_that_is_compiled_once_has_no_lines_of_its_own() -> None:
    assert 89 not in {capability for _, capability, _ in TABLE}


def test_float32_keeps_its_precision_off_the_matrix_units_and_fits_every_device() -> None:
    for head_dim, width in ((40, 48), (160, 160)):
        report = reports(80)[head_dim, "float32"]
        assert report["matrix_instructions"] == 0
        assert report["shared_bytes"] <= shared_bytes("single", 80, width, 64, 16) <= 99 * 1024


def test_compiling_in_the_interpreter_is_refused() -> None:
    from triton import knobs

    if not knobs.runtime.interpret:
        pytest.skip("the kernels are compiled in this process")
    import torch
    from common.aot_compile import compile_launch, example_launches

    launch = example_launches(90, torch.bfloat16, 40, 64)["forward"]
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        compile_launch(launch, 90)
