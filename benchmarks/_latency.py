"""Plays one scheduler of a multiprocessor: the clocks that a turn of a hot loop takes.

Counting bytes, exponentials and instructions says what a turn takes at least. Waiting comes on
top: for memory, for a warp group's product, for a barrier. The assembler writes into each
instruction how long it must stand apart from the next one and which results it waits for; here
they are issued by these rules, one a clock, with some programs on the multiprocessor at once.

Latencies are those of compute capability 9.0. Pipes and their rates are NVIDIA's and what is
publicly measured; how long memory, products, fences and barriers take was fitted to 41 times that
an H200 took (docs/performance-gpu.md, section 6).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from _sass import Instruction, access_bits, hot_loop, matrix_flops, parse

_TURNS = 8
_WARMED_UP = 2
_APART = 300
"""Clocks between the starts of two programs, so that they do not march in step."""
_QUEUE = {"memory": 16.0, "matrix": 32.0}
"""Clocks of work that may wait before a pipe while its warp goes on."""
_ALL_BARRIERS = range(6)


class Latencies(NamedTuple):
    """Clocks from a pipe's taking an instruction until its result is there."""

    global_memory: float = 850.0
    group_product: float = 150.0
    """A warp group's product, beyond the time that the matrix unit works on it."""
    warp_product: float = 28.0
    """The same of a single warp's."""
    memory_barrier: float = 45.0
    fence: float = 20.0
    program_barrier: float = 25.0
    group_arrive: float = 6.0
    shuffle: float = 23.0
    special: float = 36.0
    shared_load: float = 25.0
    shared_store: float = 20.0
    constant: float = 40.0
    register_move: float = 25.0
    """From special or to uniform registers."""
    arithmetic: float = 5.0


HOPPER = Latencies()
START_CLOCKS = 8600.0
"""A program from its launch to its first turn, and from its last to its end; fitted too."""
LAUNCH_SECONDS = 3e-6


class _Work(NamedTuple):
    """What one instruction asks of its pipe: busy clocks, then clocks to its result.

    Its operands may be overwritten after `operands` clocks, if that is before the result is there.
    """

    pipe: str | None
    busy: float
    latency: float
    operands: float = math.inf


class _Group:
    """Asynchronous copies of one warp: the groups closed and when each is there."""

    def __init__(self) -> None:
        self.open = 0.0
        self.closed: list[float] = []

    def there(self, pending: int) -> float:
        """When all but the last `pending` groups are there."""
        done = self.closed[: len(self.closed) - pending]
        return max(done, default=0.0)


def _matrix_work(instruction: Instruction, clocks: Latencies) -> _Work:
    """A product of a warp group: N / 2 clocks, or as long as its operands take from shared memory.

    A of 64 x 16 numbers takes 16 clocks and B of N x 16 numbers N / 4, at 128 bytes a clock.
    """
    columns = int(re.split(r"[.x]", instruction.opcode)[2])
    from_registers = instruction.operands.split(",")[1].strip().startswith("R")
    operands = columns / 4 + (0 if from_registers else 16)
    return _Work("matrix", max(columns / 2, operands), clocks.group_product)


def _warp_matrix_work(instruction: Instruction, clocks: Latencies) -> _Work:
    """A product of one warp, 16 x 8 x 16 in four clocks: half of what a warp group comes to."""
    return _Work("matrix", matrix_flops(instruction) / 1024, clocks.warp_product)


def _memory_work(kind: str, opcode: str, clocks: Latencies) -> _Work | None:
    """Shared and global memory, shuffles, barriers: one pipe, shared by the four schedulers."""
    bytes_a_warp = 512 if kind in ("LDSM", "STSM") else access_bits(opcode) * 4
    # 128 bytes a clock from shared memory, 64 beyond it, for four schedulers.
    shared, beyond = bytes_a_warp / 32, bytes_a_warp / 16
    table = {
        "SHFL": (4.0, clocks.shuffle, 10.0),
        "LDS": (shared, clocks.shared_load, 10.0),
        "LDSM": (shared, clocks.shared_load, 10.0),
        "STS": (shared, clocks.shared_store),
        "STSM": (shared, clocks.shared_store),
        "LDG": (beyond, clocks.global_memory, 20.0),
        "LDGSTS": (beyond, clocks.global_memory, 20.0),
        "STG": (beyond, 40.0),
        "LDL": (shared, clocks.shared_load + 10.0),
        "STL": (shared, clocks.shared_store),
        "LDC": (2.0, clocks.constant),
        "MEMBAR": (1.0, clocks.memory_barrier),
        "FENCE": (1.0, clocks.fence),
        "S2R": (2.0, clocks.register_move),
        "S2UR": (2.0, clocks.register_move),
        "R2UR": (2.0, clocks.register_move),
    }
    found = table.get(kind)
    return found and _Work("memory", *found)


_NO_PIPE = ("BRA", "BAR", "NOP", "WARPGROUP", "WARPSYNC", "DEPBAR", "LDGDEPBAR", "CS2R", "MOV")


def _work(instruction: Instruction, clocks: Latencies) -> _Work:
    kind = instruction.opcode.split(".")[0]
    if kind.endswith("GMMA"):
        return _matrix_work(instruction, clocks)
    if kind == "HMMA":
        return _warp_matrix_work(instruction, clocks)
    if kind == "MUFU":
        return _Work("special", 8.0, clocks.special)
    if memory := _memory_work(kind, instruction.opcode, clocks):
        return memory
    if kind in ("FFMA", "FMUL", "FADD"):
        return _Work("multiply", 1.0, clocks.arithmetic)
    if kind == "IMAD":
        return _Work("multiply, wide", 2.0, clocks.arithmetic)
    if kind in _NO_PIPE or kind.startswith("U"):
        return _Work(None, 0.0, clocks.register_move)
    return _Work("logic", 2.0, clocks.arithmetic)


class _Warp:
    """Where one warp stands in its loop, and what it waits for."""

    def __init__(self, program: int, ready: float) -> None:
        self.program = program
        self.ready = ready
        self.place = 0
        self.starts: list[float] = []
        self.barriers = [0.0] * len(_ALL_BARRIERS)
        self.products = 0.0
        self.copies = _Group()

    def waits_until(self, instruction: Instruction) -> float:
        """The first clock at which this instruction's rules let it go."""
        found = self.ready
        for barrier in _ALL_BARRIERS:
            if instruction.wait >> barrier & 1:
                found = max(found, self.barriers[barrier])
        if instruction.opcode.startswith("WARPGROUP.DEPBAR"):
            found = max(found, self.products)
        elif instruction.opcode.startswith("DEPBAR"):
            pending = int(instruction.operands.rsplit("0x", 1)[1], 16)
            found = max(found, self.copies.there(pending))
        return found

    def issue(
        self, instruction: Instruction, clock: float, ended: float, asked: _Work, clocks: Latencies
    ) -> None:
        """Take note of what the instruction, issued now and off its pipe at `ended`, leaves."""
        done = ended + asked.latency
        read = ended + min(asked.operands, asked.latency)
        for barrier, clear in (
            (instruction.read_barrier, read),
            (instruction.write_barrier, done),
        ):
            if barrier is not None:
                self.barriers[barrier] = max(self.barriers[barrier], clear)
        kind = instruction.opcode
        held = 0.0
        if "GMMA" in kind:
            self.products = max(self.products, done)
        elif kind.startswith("LDGSTS"):
            self.copies.open = max(self.copies.open, done)
        elif kind.startswith("LDGDEPBAR"):
            self.copies.closed.append(self.copies.open)
            self.copies.open = 0.0
        elif kind.startswith("BAR"):
            held = clocks.program_barrier
        elif kind.startswith("WARPGROUP.ARRIVE"):
            held = clocks.group_arrive
        self.ready = clock + max(instruction.stall, 1) + held


def turn_clocks(
    body: Sequence[Instruction], programs: int, warps: int, clocks: Latencies = HOPPER
) -> float:
    """Clocks between two turns of one program, with `programs` of `warps` each on a multiprocessor.

    body is the hot loop of one warp. The four schedulers are taken to be alike: one is played, with
    a fourth of each program's warps, rounded up.
    """
    each = -(-warps // 4)
    work = [_work(instruction, clocks) for instruction in body]
    running = [_Warp(i // each, i // each * _APART) for i in range(programs * each)]
    free: dict[str, float] = {}
    arrived: dict[tuple[int, int, int], dict[int, float]] = {}
    clock, last = 0.0, -1
    while True:
        best: tuple[float, int, int] | None = None
        for index, warp in enumerate(running):
            if len(warp.starts) > _TURNS:
                continue
            instruction, asked = body[warp.place], work[warp.place]
            ready = warp.waits_until(instruction)
            if each > 1 and instruction.opcode.startswith("BAR"):
                meeting = arrived.setdefault((warp.program, warp.place, len(warp.starts)), {})
                meeting[index] = ready
                if len(meeting) < each:
                    continue
                ready = max(meeting.values())
            if asked.pipe:
                slack = _QUEUE.get(asked.pipe, 0.0)
                ready = max(ready, free.get(asked.pipe, 0.0) - slack)
            # The scheduler takes turns among those that are ready.
            found = (math.ceil(max(ready, clock)), (index - last - 1) % len(running), index)
            best = found if best is None else min(best, found)
        if best is None:
            break
        now, _, index = best
        warp = running[index]
        instruction, asked = body[warp.place], work[warp.place]
        if warp.place == 0:
            warp.starts.append(now)
        begun = float(now)
        if asked.pipe:
            begun = max(begun, free.get(asked.pipe, 0.0))
            free[asked.pipe] = begun + asked.busy
        warp.issue(instruction, now, begun + asked.busy, asked, clocks)
        warp.place = (warp.place + 1) % len(body)
        clock, last = now + 1.0, index
    spans = [(warp.starts[-1] - warp.starts[_WARMED_UP]) for warp in running]
    return sum(spans) / len(spans) / (_TURNS - _WARMED_UP)


def launch_seconds(
    programs: int, blocks: float, clocks: Sequence[float], multiprocessors: int, hertz: float
) -> float:
    """What a launch takes whose programs have `blocks` blocks of rows each.

    clocks[i] is what a turn takes with i + 1 programs on a multiprocessor, as many as fit. Programs
    run in turns that fill the device, and in the last with what is left.
    """
    full, left = divmod(programs, multiprocessors * len(clocks))
    taken = full * (START_CLOCKS + blocks * clocks[-1])
    if left:
        taken += START_CLOCKS + blocks * clocks[-(-left // multiprocessors) - 1]
    return LAUNCH_SECONDS + taken / hertz


def loop_clocks(sass: str, programs: int, warps: int) -> list[float]:
    """`turn_clocks` of a listing's hot loop with 1, 2, ... `programs`; empty without a loop."""
    instructions, labels = parse(sass)
    loop = hot_loop(instructions, labels)
    if loop is None:
        return []
    body = instructions[loop[0] : loop[1] + 1]
    return [turn_clocks(body, count, warps) for count in range(1, programs + 1)]
