"""Accumulators of dK and dV, and the kernel that sums their splits."""

from __future__ import annotations

import triton
import triton.language as tl

from .primitives import COUNTS, accumulate, row_offsets, scale_rows, store_part, zero_rows


@triton.jit
def zeros_kv(
    KEYS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_D_TAIL: tl.constexpr, TRANSPOSED: tl.constexpr
):
    """Return a float32 accumulator [KEYS, HEAD_DIM], or its transpose, as a tuple of its parts."""
    if not TRANSPOSED:
        return zero_rows(KEYS, BLOCK_D, BLOCK_D_TAIL)
    elif BLOCK_D_TAIL > 0:
        return (tl.zeros([BLOCK_D, KEYS], tl.float32), tl.zeros([BLOCK_D_TAIL, KEYS], tl.float32))
    else:
        return (tl.zeros([BLOCK_D, KEYS], tl.float32),)


@triton.jit
def accumulate_kv(acc, weights, rows, BLOCK_D_TAIL: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Return acc + weightsᵀ · rows for weights [BLOCK_M, KEYS] and rows [BLOCK_M, HEAD_DIM].

    TRANSPOSED accumulators are [HEAD_DIM, KEYS]: a small tile of keys then has the head dimension
    along the warps, where every warp would repeat 16 rows.
    """
    if TRANSPOSED:
        rounded = weights.to(rows[0].dtype)
        main = tl.dot(tl.trans(rows[0]), rounded, acc=acc[0], input_precision="ieee")
        if BLOCK_D_TAIL > 0:
            tail = tl.dot(tl.trans(rows[1]), rounded, acc=acc[1], input_precision="ieee")
            return (main, tail)
        else:
            return (main,)
    else:
        return accumulate(acc, tl.trans(weights), rows, BLOCK_D_TAIL)


@triton.jit
def store_kv_tile(
    base, start, stride, first, seqlen_k, acc, factor, KEYS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_D_TAIL: tl.constexpr, ALIGNMENT: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Store an accumulator of one tile of keys, times a factor."""
    offs_n = first + tl.arange(0, KEYS)
    offsets = row_offsets(offs_n, stride, ALIGNMENT)
    inside = offs_n < seqlen_k
    acc = scale_rows(acc, factor, BLOCK_D_TAIL)
    main = acc[0]
    if TRANSPOSED:
        main = tl.trans(main)
    store_part(base + start, offsets, inside, main, 0, BLOCK_D, HEAD_DIM)
    if BLOCK_D_TAIL > 0:
        tail = acc[1]
        if TRANSPOSED:
            tail = tl.trans(tail)
        store_part(base + start, offsets, inside, tail, BLOCK_D, BLOCK_D_TAIL, HEAD_DIM)


@triton.jit
def store_kv(
    base, start, stride, seqlen_k, acc, acc_tail, factor, BLOCK_N: tl.constexpr,
    BLOCK_N_TAIL: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_D_TAIL: tl.constexpr, ALIGNMENT: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Store the accumulators of the main tile of keys and, if there is one, of the tail tile."""
    store_kv_tile(
        base, start, stride, 0, seqlen_k, acc, factor,
        BLOCK_N, HEAD_DIM, BLOCK_D, BLOCK_D_TAIL, ALIGNMENT, TRANSPOSED,
    )  # fmt: skip
    if BLOCK_N_TAIL > 0:
        store_kv_tile(
            base, start, stride, BLOCK_N, seqlen_k, acc_tail, factor,
            BLOCK_N_TAIL, HEAD_DIM, BLOCK_D, BLOCK_D_TAIL, ALIGNMENT, True,
        )  # fmt: skip


@triton.jit
def reduce_one(partials, total, numel, num_splits, BLOCK: tl.constexpr, AHEAD: tl.constexpr):
    """Sum partials [groups, num_splits, numel] into total [groups, numel].

    AHEAD splits are loaded at once: one after the other, each load would be waited for.
    """
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    part = tl.arange(0, AHEAD)
    inside = offs < numel
    group = tl.program_id(1).to(tl.int64)
    source = partials + (group * num_splits + part[:, None]) * numel + offs[None, :]
    acc = tl.zeros([AHEAD, BLOCK], tl.float32)
    for first in tl.range(0, num_splits, AHEAD):
        there = (first + part < num_splits)[:, None] & inside[None, :]
        acc += tl.load(source, mask=there, other=0.0)
        source += AHEAD * numel
    written = tl.sum(acc, axis=0).to(total.dtype.element_ty)
    tl.store(total + group * numel + offs, written, mask=inside)


@triton.jit(do_not_specialize=COUNTS)
def _reduce_splits(
    first_partials, second_partials, third_partials, first_total, second_total, third_total,
    numel, num_splits, BLOCK: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Sum the splits of up to three gradients; grid (blocks of elements, groups, gradients).

    Each program adds in one order, and no two write the same element: the result is deterministic.
    """
    which = tl.program_id(2)
    if which == 0:
        reduce_one(first_partials, first_total, numel, num_splits, BLOCK, AHEAD)
    if second_partials is not None:  # noqa: SIM102 (compile-time outside, run-time inside)
        if which == 1:
            reduce_one(second_partials, second_total, numel, num_splits, BLOCK, AHEAD)
    if third_partials is not None:  # noqa: SIM102 (compile-time outside, run-time inside)
        if which == 2:
            reduce_one(third_partials, third_total, numel, num_splits, BLOCK, AHEAD)
