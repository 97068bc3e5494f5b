"""The machine-code reader on a small listing, the line defaults are held to, and one kernel."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from _compiled import Choice, Facts
from _sass import access_bits, read_turn

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"

LISTING = """Function:small
--:-:-:-:8	LDC R1, c[0x0][0x28];
--:-:3:-:-:1	LDG.E.128 R4, desc[UR48][R16.64];
LBB1:
--:-:3:-:1	LDGSTS.E.BYPASS.128 [R129], desc[UR48][R10.64], P1;
--:-:5:-:4	@!P5 LDG.E.64 R36, desc[UR48][R20.64];
--:-:-:-:4	HGMMA.64x80x16.F32.BF16 R24, gdesc[UR12], RZ, !UPT;
02:-:-:-:1	HMMA.16816.F32.BF16 R144, R28.reuse, R24, R144;
--:-:-:-:8	MUFU.EX2 R56, R56;
--:-:-:-:1	MUFU.RCP R40, R43;
--:-:1:-:1	LDL R171, [R1+0x84];
04:1:-:-:4	@!P1 STG.E.128 desc[UR60][R4.64], R56;
--:-:-:-:5	@P4 BRA LBB1;
LBB2:
--:-:-:Y:0	BRA LBB2;
--:-:-:-:5	EXIT;
"""


def test_one_turn_of_the_hot_loop_is_counted() -> None:
    turn = read_turn(LISTING)
    assert turn.is_loop
    assert turn.instructions == 9
    assert (turn.exponentials, turn.special) == (1, 2)
    assert turn.matrix_instructions == 2
    # A warp does a quarter of its group's 64 x 80 x 16, and all of 16 x 8 x 16.
    assert turn.matrix_flops == 2 * 64 * 80 * 16 / 4 + 2 * 16 * 8 * 16
    assert turn.load_bytes == {64: 8 * 32, 128: 16 * 32}
    assert turn.store_bytes == {128: 16 * 32}
    assert turn.local_accesses == 1


def test_a_text_without_instructions_is_refused() -> None:
    with pytest.raises(ValueError, match="no machine instruction"):
        read_turn("nothing here")


@pytest.mark.parametrize(
    ("opcode", "bits"), [("LDG.E", 32), ("LDG.E.U16", 16), ("STG.E.64", 64), ("LDG.E.128", 128)]
)
def test_access_widths(opcode: str, bits: int) -> None:
    assert access_bits(opcode) == bits


def _facts(spill_bytes: int = 0, mma: int = 4, wide: float = 160.0, narrow: float = 0.0) -> Facts:
    return Facts(
        choice=Choice("forward", 90, "bfloat16", 64, 4096),
        block=64,
        warps=4,
        stages=2,
        registers=128,
        spill_bytes=spill_bytes,
        shared_bytes=1024,
        blocks_resident=4,
        warps_resident=16,
        occupancy_limit="registers",
        matrix_instructions=mma,
        warp_group_instructions=mma,
        local_accesses_a_turn=0,
        load_widths={128: 4},
        row_access_bytes={64: narrow, 128: wide},
        bytes_a_row=160.0,
        exponentials_a_row=160.0,
        special_a_row=162.0,
        matrix_flops_a_row=23_040.0,
        instructions_a_row=50.0,
    )


def test_the_line_that_defaults_are_held_to() -> None:
    import kernel_report

    assert kernel_report.failures(_facts()) == []
    assert "spills" in kernel_report.failures(_facts(spill_bytes=8))[0]
    assert "no matrix" in kernel_report.failures(_facts(mma=0))[0]
    assert "under 16 bytes" in kernel_report.failures(_facts(wide=80.0, narrow=80.0))[0]


def test_the_forward_kernel_compiles_and_its_counts_are_the_roofline_s(tmp_path: Path) -> None:
    triton = pytest.importorskip("triton")
    if not Path(triton.__file__).with_name("backends").joinpath("nvidia", "bin", "ptxas").exists():
        pytest.skip("this Triton carries no ptxas")
    code = (
        "import json, sys; sys.path[:0] = sys.argv[1:]\n"
        "from _compiled import Choice, compile_case\n"
        "print(json.dumps(compile_case(Choice('forward', 90, 'bfloat16', 64, 4096)).as_dict()))"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", code, str(BENCHMARKS), str(BENCHMARKS.parent)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["exponentials_a_row"] == 160
    assert facts["matrix_flops_a_row"] == 3 * 2 * 80 * 64
    assert facts["bytes_a_row"] == 256
    assert facts["bounds"]["H200"]["picoseconds"] >= 53.3  # 256 bytes at 4.8 TB/s
    assert facts["row_access_bytes"]["128"] >= 256
