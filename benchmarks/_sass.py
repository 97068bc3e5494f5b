"""Reads the machine code of a compiled kernel: its hot loop and what one turn of it does."""

from __future__ import annotations

import re
from collections import Counter
from typing import NamedTuple

_LINE = re.compile(
    r"[0-9a-f-]+:[\d-]:[\d-]:[Y-]:\S+\s+(?:@!?U?P\w+ )?(?P<op>[A-Z][\w.]*)\s*(?P<rest>.*?);"
)
_LABEL = re.compile(r"^\s*\.?(?P<label>L\w+):")
_TARGET = re.compile(r"\b(L\w+)")
_GROUP_MMA = re.compile(r"[A-Z]GMMA\.(\d+)x(\d+)x(\d+)")
_WARP_MMA = {"16816": 2 * 16 * 8 * 16, "1688": 2 * 16 * 8 * 8, "1684": 2 * 16 * 8 * 4}
_WARPS_OF_GROUP = 4
_LANES = 32


class Turn(NamedTuple):
    """What one warp does in one turn of the hot loop, or in the whole kernel if it has none."""

    instructions: int
    special: int
    """Instructions of the special-function unit: exponentials and reciprocals."""
    exponentials: int
    matrix_instructions: int
    matrix_flops: float
    load_bytes: dict[int, int]
    """Bytes that a warp's global loads bring, by the width in bits of each lane's access."""
    store_bytes: dict[int, int]
    local_accesses: int
    """Loads and stores of local memory: what a spill costs every turn."""
    is_loop: bool


class Instruction(NamedTuple):
    opcode: str
    operands: str


def parse(sass: str) -> tuple[list[Instruction], dict[str, int]]:
    """Instructions in order, and for each label the place it points to.

    Raises ValueError for text that holds no instruction of the known listing format.
    """
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        label = _LABEL.match(line)
        if label:
            labels[label["label"]] = len(instructions)
            continue
        found = _LINE.match(line)
        if found:
            instructions.append(Instruction(found["op"], found["rest"]))
    if not instructions:
        raise ValueError("no machine instruction was found in the listing")
    return instructions, labels


def is_matrix(instruction: Instruction) -> bool:
    return "MMA" in instruction.opcode


def hot_loop(instructions: list[Instruction], labels: dict[str, int]) -> tuple[int, int] | None:
    """First and last place of the backward-branch loop with the most exponentials and products."""
    best: tuple[int, int] | None = None
    most = 0
    for place, instruction in enumerate(instructions):
        if not instruction.opcode.startswith("BRA"):
            continue
        target = _TARGET.search(instruction.operands)
        first = labels.get(target.group(1)) if target else None
        if first is None or first >= place:
            continue
        weight = sum(
            is_matrix(inside) or inside.opcode == "MUFU.EX2"
            for inside in instructions[first : place + 1]
        )
        if weight > most:
            best, most = (first, place), weight
    return best


def matrix_flops(instruction: Instruction) -> float:
    group = _GROUP_MMA.match(instruction.opcode)
    if group:
        rows, columns, depth = (int(number) for number in group.groups())
        return 2.0 * rows * columns * depth / _WARPS_OF_GROUP
    shape = instruction.opcode.split(".")[1] if "." in instruction.opcode else ""
    return float(_WARP_MMA.get(shape, 0))


def access_bits(opcode: str) -> int:
    """Bits a lane that a global load or store moves: 32 unless the opcode says otherwise."""
    parts = opcode.split(".")
    for part in parts:
        if part in ("64", "128", "256"):
            return int(part)
        if part in ("U16", "S16"):
            return 16
        if part in ("U8", "S8"):
            return 8
    return 32


def read_turn(sass: str) -> Turn:
    """Count one turn of the hot loop of a listing."""
    instructions, labels = parse(sass)
    loop = hot_loop(instructions, labels)
    body = instructions[loop[0] : loop[1] + 1] if loop else instructions
    loads: Counter[int] = Counter()
    stores: Counter[int] = Counter()
    for instruction in body:
        kind = instruction.opcode.split(".")[0]
        bits = access_bits(instruction.opcode)
        if kind in ("LDG", "LDGSTS"):
            loads[bits] += bits // 8 * _LANES
        elif kind == "STG":
            stores[bits] += bits // 8 * _LANES
    matrix = [instruction for instruction in body if is_matrix(instruction)]
    return Turn(
        instructions=len(body),
        special=sum(i.opcode.startswith("MUFU") for i in body),
        exponentials=sum(i.opcode.startswith("MUFU.EX2") for i in body),
        matrix_instructions=len(matrix),
        matrix_flops=sum(map(matrix_flops, matrix)),
        load_bytes=dict(sorted(loads.items())),
        store_bytes=dict(sorted(stores.items())),
        local_accesses=sum(i.opcode.split(".")[0] in ("LDL", "STL") for i in body),
        is_loop=loop is not None,
    )
