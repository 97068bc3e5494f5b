"""The played scheduler: loops small enough to count by hand."""

from __future__ import annotations

import pytest
from _latency import HOPPER, LAUNCH_SECONDS, START_CLOCKS, launch_seconds, loop_clocks, turn_clocks
from _sass import Instruction, parse

ADD = Instruction("FADD", "R0, R0, R1")


def load(barrier: int) -> Instruction:
    return Instruction("LDG.E.128", "R4, desc[UR4][R2.64]", write_barrier=barrier)


def test_the_listing_s_rules_are_read() -> None:
    listing = """
LBB1:
--:-:2:-:1\t@!P3 LDG.E.128 R24, desc[UR24][R36.64];
04:0:-:Y:4\tSTS.128 [R20+UR20+0x3000], R24;
33:-:-:-:f\t@P0 BRA LBB1;
"""
    instructions, labels = parse(listing)
    assert labels == {"LBB1": 0}
    read, stored, branch = instructions
    assert (read.wait, read.read_barrier, read.write_barrier, read.stall) == (0, None, 2, 1)
    assert (stored.wait, stored.read_barrier, stored.write_barrier, stored.stall) == (4, 0, None, 4)
    assert (branch.wait, branch.stall) == (33, 15)


def test_a_result_is_waited_for() -> None:
    """A load of 512 bytes by each of four warps is 32 clocks under way, then its latency."""
    waits = ADD._replace(wait=1 << 3)
    assert turn_clocks([load(3), waits], 1, 4) == pytest.approx(32 + HOPPER.global_memory + 1)
    assert turn_clocks([load(2), waits], 1, 4) == pytest.approx(32)


def test_stalls_stand_between_instructions_and_other_warps_fill_them() -> None:
    body = [ADD._replace(stall=5)] * 400
    assert turn_clocks(body, 1, 4) == 2000
    assert turn_clocks(body, 4, 4) == pytest.approx(2000, rel=0.01)
    # Eight warps want 3,200 clocks of the scheduler, which issues one a clock.
    assert turn_clocks(body, 8, 4) == pytest.approx(3200, rel=0.05)


def test_waiting_for_memory_overlaps_and_exponentials_queue() -> None:
    waits = [load(0), ADD._replace(wait=1)]
    assert turn_clocks(waits, 4, 4) < 1.2 * turn_clocks(waits, 1, 4)
    special = [Instruction("MUFU.EX2", "R0, R0")] * 200
    assert turn_clocks(special, 1, 4) == 1600
    assert turn_clocks(special, 3, 4) == pytest.approx(4800, rel=0.05)


def product(columns: int, first: str = "gdesc[UR8]") -> Instruction:
    return Instruction(f"HGMMA.64x{columns}x16.F32.BF16", f"R24, {first}, R24, gsb0")


def test_a_warp_group_s_product_is_waited_for_where_the_code_says_so() -> None:
    wait = Instruction("WARPGROUP.DEPBAR.LE", "gsb0, 0x0")
    # 64 columns keep the matrix unit for 32 clocks, 16 for the 20 that shared memory takes.
    assert turn_clocks([product(64), wait], 1, 4) == 32 + HOPPER.group_product + 1
    assert turn_clocks([product(16), wait], 1, 4) == 20 + HOPPER.group_product + 1
    assert turn_clocks([product(16, "R8"), wait], 1, 4) == 8 + HOPPER.group_product + 1
    assert turn_clocks([product(64), product(64), wait], 1, 4) == 64 + HOPPER.group_product + 1


def test_products_of_single_warps_queue_and_the_last_is_waited_for() -> None:
    """Four clocks each of the matrix unit; what uses a result stands off its latency."""
    one = Instruction("HMMA.16816.F32.BF16", "R4, R8, R12, R4")
    assert turn_clocks([one] * 100, 1, 4) == 400
    half = one._replace(opcode="HMMA.1688.F32.BF16")
    assert turn_clocks([half] * 100, 1, 4) == 200
    waits = ADD._replace(wait=1 << 2)
    last = one._replace(write_barrier=2)
    assert turn_clocks([last, waits], 1, 4) == 4 + HOPPER.warp_product + 1


def test_copies_are_waited_for_by_group() -> None:
    copy = Instruction("LDGSTS.E.BYPASS.128", "[R1], desc[UR4][R2.64]")
    close = Instruction("LDGDEPBAR", "")
    all_there = Instruction("DEPBAR.LE", "SB0, 0x0")
    one_pending = Instruction("DEPBAR.LE", "SB0, 0x1")
    at_once = turn_clocks([copy, close, all_there], 1, 4)
    assert at_once > HOPPER.global_memory
    assert turn_clocks([copy, close, one_pending], 1, 4) < 0.6 * at_once


def test_a_barrier_holds_all_warps_of_a_program() -> None:
    body = [load(0), ADD._replace(wait=1), Instruction("BAR.SYNC.DEFER_BLOCKING", "0x0")]
    alone, two = turn_clocks(body, 1, 4), turn_clocks(body, 1, 8)
    assert alone == pytest.approx(32 + HOPPER.global_memory + 2 + HOPPER.program_barrier)
    assert two == pytest.approx(alone + 32, abs=4)


def test_a_listing_without_a_loop_has_no_turn() -> None:
    assert loop_clocks("--:-:-:-:1\tFADD R0, R0, R1;\n", 2, 4) == []


def test_a_launch_takes_full_turns_and_what_is_left() -> None:
    clocks, hertz = [1000.0, 1400.0], 1e9
    full = START_CLOCKS + 10 * 1400.0
    assert launch_seconds(20, 10, clocks, 10, hertz) == LAUNCH_SECONDS + full / hertz
    left = START_CLOCKS + 10 * 1000.0
    assert launch_seconds(30, 10, clocks, 10, hertz) == LAUNCH_SECONDS + (full + left) / hertz
    assert launch_seconds(5, 10, clocks, 10, hertz) == LAUNCH_SECONDS + left / hertz
