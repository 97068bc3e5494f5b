"""Reads cuobjdump's listings: the row loop of each kernel, and what one turn of it does."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from _sass import Instruction, Turn, access_bits, is_matrix, matrix_flops

_FUNCTION = re.compile(r"^\s*Function : (\S+)", re.M)
_LINE = re.compile(
    r"^\s*/\*(?P<at>[0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?\s*"
    r"(?P<op>[A-Z][\w.]*)\s*(?P<rest>[^;]*);"
    # The upper half of the encoding stands in the next line and has the rules of issue.
    r"[^\n]*(?:\n\s*/\*\s*0x(?P<upper>[0-9a-f]{16})\s*\*/)?",
    re.M,
)
_TARGET = re.compile(r"\b0x([0-9a-f]+)\s*$")
_LANES = 32


class Loop(NamedTuple):
    """Places of the first and the last instruction of a loop."""

    first: int
    last: int

    def holds(self, other: Loop) -> bool:
        return self != other and self.first <= other.first and other.last <= self.last


class Kernel(NamedTuple):
    """The instructions of one kernel and its loops."""

    instructions: list[Instruction]
    loops: list[Loop]


Trips = Callable[[bool], int]
"""How often an inner loop with products runs in a turn of the row loop: (has exponentials)."""


def kernels(listing: str) -> dict[str, Kernel]:
    """Mangled name → kernel, of everything that `cuobjdump -sass` printed.

    Raises ValueError for text that holds no kernel of the known format.
    """
    parts = _FUNCTION.split(listing)[1:]
    found = {name: _kernel(text) for name, text in zip(parts[::2], parts[1::2], strict=True)}
    if not found or not all(kernel.instructions for kernel in found.values()):
        raise ValueError("no machine instruction was found in the listing")
    return found


def _instruction(line: re.Match[str]) -> Instruction:
    """With its rules of issue, where the encoding is printed."""
    rules = int(line["upper"] or "0", 16) >> 41

    def barrier(first: int) -> int | None:
        number = rules >> first & 7
        return None if number == 7 or not line["upper"] else number

    return Instruction(
        line["op"], line["rest"], rules >> 11 & 0x3F, barrier(8), barrier(5), rules & 0xF
    )


def _kernel(text: str) -> Kernel:
    lines = list(_LINE.finditer(text))
    place_of = {int(line["at"], 16): place for place, line in enumerate(lines)}
    loops: list[Loop] = []
    for place, line in enumerate(lines):
        target = _TARGET.search(line["rest"]) if line["op"].startswith("BRA") else None
        first = place_of.get(int(target[1], 16)) if target else None
        if first is None or first >= place:
            continue
        # A jump from behind a loop into it returns from code that was moved out of the way.
        if not any(loop.first < first <= loop.last for loop in loops):
            loops.append(Loop(first, place))
    return Kernel([_instruction(line) for line in lines], loops)


def _turns(body: list[Instruction], trips: Trips) -> int:
    """How often an inner loop runs in a turn of the row loop, for a call without maps."""
    if any(map(is_matrix, body)):
        return trips(any(i.opcode == "MUFU.EX2" for i in body))
    # A loop that copies rows ahead is counted once, the loop over the columns of maps never runs.
    return int(any(i.opcode.startswith("LDGSTS") for i in body))


def row_loop(kernel: Kernel) -> Loop | None:
    """The outermost of the loops with the most matrix instructions and exponentials."""

    def weight(loop: Loop) -> tuple[int, int]:
        body = kernel.instructions[loop.first : loop.last + 1]
        return sum(is_matrix(i) or i.opcode == "MUFU.EX2" for i in body), len(body)

    best = max(kernel.loops, key=weight, default=None)
    return best if best is not None and weight(best)[0] else None


def row_loop_body(kernel: Kernel, trips: Trips) -> list[Instruction]:
    """What one turn of the row loop issues for a call without maps, its other branches as taken.

    Raises ValueError where the kernel has no loop with products in it.
    """
    loop = row_loop(kernel)
    if loop is None:
        raise ValueError("the kernel has no loop with products or exponentials in it")
    return _unrolled(kernel, loop, trips)


def _unrolled(kernel: Kernel, loop: Loop, trips: Trips) -> list[Instruction]:
    """The instructions of one turn, those of the loops inside as often as these run."""
    inner = [other for other in kernel.loops if loop.holds(other)]
    body: list[Instruction] = []
    place = loop.first
    while place <= loop.last:
        # The outermost of those that begin here.
        here = max((x for x in inner if x.first == place), key=lambda x: x.last, default=None)
        if here is None:
            body.append(kernel.instructions[place])
            place += 1
        else:
            turns = _turns(kernel.instructions[here.first : here.last + 1], trips)
            body += _unrolled(kernel, here, trips) * turns
            place = here.last + 1
    return body


def read_row_loop(kernel: Kernel, trips: Trips) -> Turn:
    """Count one turn of the row loop, as `row_loop_body` has it."""
    counts: Counter[str] = Counter()
    flops = 0.0
    loads: Counter[int] = Counter()
    stores: Counter[int] = Counter()
    for instruction in row_loop_body(kernel, trips):
        kind = instruction.opcode.split(".")[0]
        size = access_bits(instruction.opcode)
        counts["all"] += 1
        counts["special"] += kind == "MUFU"
        counts["exponentials"] += instruction.opcode == "MUFU.EX2"
        counts["matrix"] += is_matrix(instruction)
        counts["local"] += kind in ("LDL", "STL")
        flops += matrix_flops(instruction) if is_matrix(instruction) else 0.0
        if kind in ("LDG", "LDGSTS"):
            loads[size] += size // 8 * _LANES
        elif kind == "STG":
            stores[size] += size // 8 * _LANES
    return Turn(
        instructions=counts["all"],
        special=counts["special"],
        exponentials=counts["exponentials"],
        matrix_instructions=counts["matrix"],
        matrix_flops=flops,
        load_bytes=dict(sorted(loads.items())),
        store_bytes=dict(sorted(stores.items())),
        local_accesses=counts["local"],
        is_loop=True,
    )


def load_widths(kernel: Kernel) -> dict[int, int]:
    """Global loads of the whole kernel by width in bits, asynchronous copies included."""
    widths = Counter(
        access_bits(instruction.opcode)
        for instruction in kernel.instructions
        if instruction.opcode.split(".")[0] in ("LDG", "LDGSTS")
    )
    return dict(sorted(widths.items()))
