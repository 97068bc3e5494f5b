"""Number of blocks of a kernel on one multiprocessor, by registers, shared memory and warps."""

from __future__ import annotations

from typing import NamedTuple


class Multiprocessor(NamedTuple):
    """Limits of one multiprocessor of an architecture."""

    warps: int
    blocks: int
    shared_bytes: int
    registers: int = 65536


LIMITS: dict[int, Multiprocessor] = {
    80: Multiprocessor(64, 32, 164 * 1024),
    86: Multiprocessor(48, 16, 100 * 1024),
    89: Multiprocessor(48, 24, 100 * 1024),
    90: Multiprocessor(64, 32, 228 * 1024),
    100: Multiprocessor(64, 32, 228 * 1024),
    120: Multiprocessor(48, 24, 100 * 1024),
}
_WARP_REGISTER_UNIT = 256
RESERVED_SHARED = 1024


class Occupancy(NamedTuple):
    """Resident blocks and warps of a multiprocessor, and the limit that sets them."""

    blocks: int
    warps: int
    limit: str


def occupancy(capability: int, registers: int, warps: int, shared_bytes: int) -> Occupancy:
    """Return the residency of a block of `warps` warps with `registers` a thread.

    Raises:
        ValueError: LIMITS has no row for the architecture.
    """
    if capability not in LIMITS:
        known = ", ".join(map(str, LIMITS))
        raise ValueError(f"architecture {capability} is unknown here: known are {known}")
    limits = LIMITS[capability]
    a_warp = -(-registers * 32 // _WARP_REGISTER_UNIT) * _WARP_REGISTER_UNIT
    fits = {
        "warps": limits.warps // warps,
        "blocks": limits.blocks,
        "registers": limits.registers // (a_warp * warps),
        "shared memory": limits.shared_bytes // (shared_bytes + RESERVED_SHARED),
    }
    limit = min(fits, key=lambda name: fits[name])
    blocks = fits[limit]
    return Occupancy(blocks, blocks * warps, limit)
