"""Sum the partial gradients of keys and values."""

from __future__ import annotations

import triton
import triton.language as tl

from .memory import row_offsets, store_part
from .primitives import COUNTS, accumulate, scale_rows, zero_rows


@triton.jit
def zero_keys(
    KEYS: tl.constexpr, DIM_MAIN: tl.constexpr, DIM_TAIL: tl.constexpr, TURNED: tl.constexpr
):
    """A float32 accumulator [keys, head width], or turned around, as a tuple of its parts."""
    if not TURNED:
        return zero_rows(KEYS, DIM_MAIN, DIM_TAIL)
    elif DIM_TAIL > 0:
        return (tl.zeros([DIM_MAIN, KEYS], tl.float32), tl.zeros([DIM_TAIL, KEYS], tl.float32))
    else:
        return (tl.zeros([DIM_MAIN, KEYS], tl.float32),)


@triton.jit
def accumulate_keys(sums, weights, rows, DIM_TAIL: tl.constexpr, TURNED: tl.constexpr):
    """sums + weightsᵀ · rows for weights [rows, keys], part by part.

    Turned around, the sums are [head width, keys]: so a small tile of keys has the head width
    along the warps, where 16 rows would be repeated by every warp.
    """
    if TURNED:
        rounded = weights.to(rows[0].dtype)
        main = tl.dot(tl.trans(rows[0]), rounded, acc=sums[0], input_precision="ieee")
        if DIM_TAIL > 0:
            tail = tl.dot(tl.trans(rows[1]), rounded, acc=sums[1], input_precision="ieee")
            return (main, tail)
        else:
            return (main,)
    else:
        return accumulate(sums, tl.trans(weights), rows, DIM_TAIL)


@triton.jit
def store_keys(
    base, start, stride, first, keys, sums, factor, KEYS: tl.constexpr, DIM: tl.constexpr,
    DIM_MAIN: tl.constexpr, DIM_TAIL: tl.constexpr, ALIGNMENT: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """Store an accumulator of a tile of keys, times a factor."""
    columns = first + tl.arange(0, KEYS)
    offsets = row_offsets(columns, stride, ALIGNMENT)
    inside = columns < keys
    sums = scale_rows(sums, factor, DIM_TAIL)
    main = sums[0]
    if TURNED:
        main = tl.trans(main)
    store_part(base + start, offsets, inside, main, 0, DIM_MAIN, DIM)
    if DIM_TAIL > 0:
        tail = sums[1]
        if TURNED:
            tail = tl.trans(tail)
        store_part(base + start, offsets, inside, tail, DIM_MAIN, DIM_TAIL, DIM)


@triton.jit
def store_key_tiles(
    base, start, stride, keys, main, tail, factor, KEY_MAIN: tl.constexpr, KEY_TAIL: tl.constexpr,
    DIM: tl.constexpr, DIM_MAIN: tl.constexpr, DIM_TAIL: tl.constexpr, ALIGNMENT: tl.constexpr,
    TURNED: tl.constexpr,
):  # fmt: skip
    """Store the accumulators of the main tile of keys and, if there is one, of the tail tile."""
    store_keys(
        base, start, stride, 0, keys, main, factor,
        KEY_MAIN, DIM, DIM_MAIN, DIM_TAIL, ALIGNMENT, TURNED,
    )  # fmt: skip
    if KEY_TAIL > 0:
        store_keys(
            base, start, stride, KEY_MAIN, keys, tail, factor,
            KEY_TAIL, DIM, DIM_MAIN, DIM_TAIL, ALIGNMENT, True,
        )  # fmt: skip


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
