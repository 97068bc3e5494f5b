"""Totals of the partial sums that programs of other rows leave of dK, dV and dK_r."""

from __future__ import annotations

import triton
import triton.language as tl

from .primitives import COUNTS


@triton.jit
def write_total(partials, total, elements, count, BLOCK: tl.constexpr, AHEAD: tl.constexpr):
    """Sum partials [groups, count, elements] into total [groups, elements].

    AHEAD of the count are asked for at once: one after the other, each would be waited for.
    """
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    part = tl.arange(0, AHEAD)
    inside = place < elements
    group = tl.program_id(1).to(tl.int64)
    source = partials + (group * count + part[:, None]) * elements + place[None, :]
    sums = tl.zeros([AHEAD, BLOCK], tl.float32)
    for first in tl.range(0, count, AHEAD):
        there = (first + part < count)[:, None] & inside[None, :]
        sums += tl.load(source, mask=there, other=0.0)
        source += AHEAD * elements
    written = tl.sum(sums, axis=0).to(total.dtype.element_ty)
    tl.store(total + group * elements + place, written, mask=inside)


@triton.jit(do_not_specialize=COUNTS)
def sum_partials(
    first_partials, second_partials, third_partials, first_total, second_total, third_total,
    elements, count, BLOCK: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Totals of up to three gradients; grid (blocks of elements, groups, gradients).

    Each program adds in one order and no two write the same place, so the same bits come every
    time.
    """
    which = tl.program_id(2)
    if which == 0:
        write_total(first_partials, first_total, elements, count, BLOCK, AHEAD)
    if second_partials is not None:  # noqa: SIM102 (compile-time outside, run-time inside)
        if which == 1:
            write_total(second_partials, second_total, elements, count, BLOCK, AHEAD)
    if third_partials is not None:  # noqa: SIM102 (compile-time outside, run-time inside)
        if which == 2:
            write_total(third_partials, third_total, elements, count, BLOCK, AHEAD)
