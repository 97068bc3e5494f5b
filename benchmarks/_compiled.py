"""Compiles one planned launch ahead of time and reads from its machine code what a row costs."""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _latency import PLAYED, loop_clocks
from _occupancy import occupancy
from _roofline import DATASHEET, KERNELS, Bound, kernel_work
from _sass import Turn, read_turn
from _shapes import Problem

if TYPE_CHECKING:
    from sefi_fast.kernels import KernelConfig, Launch

_LANES = 32
_SCHEDULERS = 4
DEVICES_OF = {80: ("A100",), 90: ("H100", "H200")}
# Clocks a second of all multiprocessors at the highest boost, for the instruction slots.
_SLOTS = {"A100": 108 * 1.41e9, "H100": 132 * 1.98e9, "H200": 132 * 1.98e9}
# Bytes a second from the L2 cache: NVIDIA gives 5,120 a clock for the A100 and nothing for the
# others, which are taken to give as many.
_L2_BYTES = {"A100": 5120 * 1.41e9, "H100": 5120 * 1.98e9, "H200": 5120 * 1.98e9}


@dataclass(frozen=True)
class Choice:
    """One compiled case: the kernel, the architecture, the element type and the layer's shape."""

    kernel: str
    capability: int
    dtype: str
    head_dim: int
    rows: int
    backend: str = "triton"


@dataclass
class Facts:
    """What the compiler and the machine code tell of one case; rates are for one row of a head."""

    choice: Choice
    block: int
    warps: int
    stages: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    blocks_resident: int
    warps_resident: int
    occupancy_limit: str
    matrix_instructions: int
    warp_group_instructions: int
    local_accesses_a_turn: int
    load_widths: dict[int, int]
    """Global loads in the PTX by width in bits, the keys' included."""
    row_access_bytes: dict[int, float]
    """Bytes a row that the hot loop moves, padding included, by the width of a lane's access."""
    bytes_a_row: float
    exponentials_a_row: float
    special_a_row: float
    matrix_flops_a_row: float
    instructions_a_row: float
    """Warp instructions: what the four schedulers of a multiprocessor must issue."""
    turn_clocks: list[float] = field(default_factory=list)
    """What a turn of the hot loop takes by _latency.py with 1, 2, ... programs resident, where
    latencies are known."""
    key_tiles: int = 1
    """Programs that share the keys of a row: each reads it, all but the first from the L2 cache."""
    bounds: dict[str, dict[str, Any]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        found = asdict(self)
        return found.pop("choice") | found

    @property
    def narrow_share(self) -> float:
        """The part of the hot loop's row bytes moved by accesses under 16 bytes a lane.

        The 4-byte accesses of a backward kernel are its statistics, one number a row, and do not
        count.
        """
        skipped = 32 if KERNELS[self.choice.kernel].statistics else None
        accesses = {bits: size for bits, size in self.row_access_bytes.items() if bits != skipped}
        total = sum(accesses.values())
        wide = sum(size for bits, size in accesses.items() if bits >= 128)
        return 1.0 - wide / total if total else 0.0


def _row_bound(facts: Facts, device: str) -> Bound:
    """The least seconds a row by the unit that takes longest, at datasheet rates."""
    rates, slots = DATASHEET[device], _SLOTS[device]
    parts = {
        "bytes": facts.bytes_a_row / rates.bytes,
        "L2": facts.key_tiles * facts.bytes_a_row / _L2_BYTES[device],
        "special function": facts.special_a_row / rates.exponentials,
        "matrix": facts.matrix_flops_a_row / rates.flops,
        "issue": facts.instructions_a_row / (slots * _SCHEDULERS),
    }
    unit = max(parts, key=lambda name: parts[name])
    return Bound(parts[unit], unit, parts)


def played_seconds(facts: Facts, device: str) -> float | None:
    """What a row takes with the waiting played, the device full; None where nobody knows."""
    if not facts.turn_clocks:
        return None
    rows = len(facts.turn_clocks) * facts.block
    return facts.key_tiles * facts.turn_clocks[-1] / rows / _SLOTS[device]


def add_bounds(facts: Facts, devices: tuple[str, ...]) -> None:
    """Put in the least time a row on each device; float32 has no rate to hold it to."""
    for device in devices if facts.choice.dtype != "float32" else ():
        bound = _row_bound(facts, device)
        facts.bounds[device] = {
            "picoseconds": bound.seconds * 1e12,
            "unit": bound.unit,
            "parts": {name: seconds * 1e12 for name, seconds in bound.parts.items()},
        }
        played = played_seconds(facts, device)
        if played is not None:
            facts.bounds[device]["played"] = played * 1e12


def per_row(turn: Turn, warps: int, block: int, key_tiles: int = 1) -> dict[str, Any]:
    """What a turn of `warps` warps on `block` rows comes to for one row, by field of Facts.

    A row takes the turns of `key_tiles` programs.
    """
    factor = warps * key_tiles / block
    accesses: dict[int, float] = {}
    for table in (turn.load_bytes, turn.store_bytes):
        for bits, size in table.items():
            accesses[bits] = accesses.get(bits, 0.0) + size * factor
    return {
        "row_access_bytes": dict(sorted(accesses.items())),
        "exponentials_a_row": turn.exponentials * _LANES * factor,
        "special_a_row": turn.special * _LANES * factor,
        "matrix_flops_a_row": turn.matrix_flops * factor,
        "instructions_a_row": turn.instructions * factor,
    }


def compile_case(choice: Choice, config: KernelConfig | None = None) -> Facts:
    """Compile without a GPU and read the result. Needs Triton, not in its interpreter's mode.

    config stands in for the table's.
    """
    import torch
    from sefi_fast.kernels.compile import example_launches

    dtype = getattr(torch, choice.dtype)
    configs = {} if config is None else {choice.kernel.split(" ")[0]: config}
    launches = example_launches(
        choice.capability, dtype, choice.head_dim, choice.rows, configs=configs
    )
    launch = launches[choice.kernel]
    return compile_facts(launch, choice)


def compile_facts(launch: Launch, choice: Choice) -> Facts:
    """Compile one planned launch without a GPU and read the result."""
    import torch
    import triton
    from sefi_fast.kernels.compile import compile_launch

    dtype = getattr(torch, choice.dtype)
    key_tiles = launch.arguments.get("KEY_TILES", 1)
    knobs = triton.knobs
    with (
        tempfile.TemporaryDirectory() as folder,
        knobs.cache.scope(),
        knobs.compilation.scope(),
    ):
        knobs.cache.dump_dir = folder
        knobs.compilation.dump_ir = True
        report = compile_launch(launch, choice.capability)
        listings = list(Path(folder).rglob("*.sass"))
        if len(listings) != 1:
            raise RuntimeError(f"Triton left {len(listings)} machine-code listings, wanted one")
        sass = listings[0].read_text()
    a_row = Problem("custom", 1, choice.head_dim, 1)
    resident = occupancy(choice.capability, report.registers, report.warps, report.shared_bytes)
    turn = read_turn(sass)
    clocks = None if choice.dtype == "float32" else PLAYED.get(choice.capability)
    turns = [] if clocks is None else loop_clocks(sass, resident.blocks, report.warps, clocks)
    facts = Facts(
        choice=choice,
        block=report.block,
        warps=report.warps,
        stages=report.stages,
        registers=report.registers,
        spill_bytes=report.spill_bytes,
        shared_bytes=report.shared_bytes,
        blocks_resident=resident.blocks,
        warps_resident=resident.warps,
        occupancy_limit=resident.limit,
        matrix_instructions=report.matrix_instructions,
        warp_group_instructions=report.warp_group_instructions,
        local_accesses_a_turn=turn.local_accesses,
        load_widths=dict(report.loads),
        bytes_a_row=kernel_work(a_row, dtype.itemsize, choice.kernel).row_bytes,
        turn_clocks=turns,
        key_tiles=key_tiles,
        **per_row(turn, report.warps, report.block, key_tiles),
    )
    add_bounds(facts, DEVICES_OF.get(choice.capability, ()))
    return facts
