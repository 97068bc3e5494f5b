"""The machine-code reader on a small listing, the line defaults are held to, and one kernel."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from _compiled import Choice, Facts
from _listing import kernels, load_widths, read_row_loop, row_loop, row_loop_body
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


RAW = """
		Function : kernel_of_rows
	.headerflags	@"EF_CUDA_SM80"
        /*0000*/                   LDG.E.128 R4, [R16.64] ;          /* 0x0000000000000000 */
                                                                      /* 0x0000000000000000 */
        /*0010*/                   LDG.E.64 R4, [R16.64] ;           /* 0x0000000000000000 */
        /*0020*/                   LDGSTS.E.BYPASS.128 [R129], [R10.64] ;  /* 0x0000000000000000 */
        /*0030*/               @P1 BRA 0x20 ;                        /* 0x0000000000000000 */
        /*0040*/                   LDG.E.64 R36, [R20.64] ;          /* 0x0000000000000000 */
        /*0050*/               @P2 BRA 0x40 ;                        /* 0x0000000000000000 */
        /*0060*/                   HMMA.16816.F32.BF16 R4, R28, R24, R4 ; /* 0x0000000000000000 */
        /*0070*/                   MUFU.EX2 R56, R56 ;               /* 0x0000000000000000 */
        /*0080*/              @!P0 BRA 0x60 ;                        /* 0x0000000000000000 */
        /*0090*/                   STG.E.128 [R4.64], R56 ;          /* 0x0000000000000000 */
        /*00a0*/               @P3 BRA.DIV ~URZ, 0xd0 ;              /* 0x0000000000000000 */
        /*00b0*/                   BRA 0x10 ;                        /* 0x0000000000000000 */
        /*00c0*/                   EXIT ;                            /* 0x0000000000000000 */
        /*00d0*/                   MUFU.EX2 R56, R56 ;               /* 0x0000000000000000 */
        /*00e0*/                   BRA 0x60 ;                        /* 0x0000000000000000 */
"""


def test_the_row_loop_of_a_raw_listing_is_counted_with_its_inner_loops() -> None:
    (kernel,) = kernels(RAW).values()
    # What lies behind the loop and jumps back into it was moved out of the way, and is no loop.
    assert row_loop(kernel) == (1, 11)
    turn = read_row_loop(kernel, lambda exponentials: 4 if exponentials else 1)
    assert (turn.matrix_instructions, turn.exponentials) == (4, 4)
    assert turn.matrix_flops == 4 * 2 * 16 * 8 * 16
    # The copies count once, the loop over the columns of maps not at all.
    assert turn.load_bytes == {64: 8 * 32, 128: 16 * 32}
    assert turn.store_bytes == {128: 16 * 32}
    assert turn.instructions == 1 + 2 + 4 * 3 + 3
    assert load_widths(kernel) == {64: 2, 128: 2}


def test_the_rules_of_a_raw_listing_are_in_the_second_line_of_the_encoding() -> None:
    """From bit 41: stall 4, yield 1, barriers written and read 3 each, those waited for 6."""
    rules = 0x12 << 11 | 7 << 8 | 3 << 5 | 9
    line = "/* 0x0000000000000000 */"
    (kernel,) = kernels(RAW.replace(line, f"/* 0x{rules << 41:016x} */", 2)).values()
    first, second = kernel.instructions[:2]
    assert (first.wait, first.read_barrier, first.write_barrier, first.stall) == (0x12, None, 3, 9)
    assert (second.wait, second.read_barrier, second.write_barrier) == (0, None, None)
    # In the order of issue, inner loops as often as they run.
    body = row_loop_body(kernel, lambda exponentials: 2 if exponentials else 1)
    products = [i for i, one in enumerate(body) if one.opcode.startswith("HMMA")]
    assert len(products) == 2
    assert products[1] - products[0] == 3


def test_a_raw_listing_without_kernels_or_loops_is_refused() -> None:
    with pytest.raises(ValueError, match="no machine instruction"):
        kernels("nothing here")
    (kernel,) = kernels(RAW.replace("BRA", "NOP")).values()
    with pytest.raises(ValueError, match="no loop"):
        read_row_loop(kernel, lambda exponentials: 1)


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


def test_the_cuda_kernels_have_a_line_of_their_own() -> None:
    import dataclasses

    import kernel_report

    facts = _facts(wide=160.0, narrow=16.0)
    facts.choice = dataclasses.replace(facts.choice, backend="cuda")
    assert "allowed are 0%" in kernel_report.failures(facts)[0]
    facts.choice = dataclasses.replace(facts.choice, head_dim=40)
    assert kernel_report.failures(facts) == []
    table = kernel_report.report_table([facts], 90)
    assert table.splitlines()[1].startswith("cuda")


def test_without_nvcc_the_report_says_what_is_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import kernel_report

    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert kernel_report.main(["--backends", "cuda", "--arch", "80"]) == 0
    assert "not in this report: no nvcc" in capsys.readouterr().out


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
