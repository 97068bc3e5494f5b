"""The mathematics shared by the kernels: products of tiles, masked softmax, its gradient, columns.

Tuples carry the main and the tail part of a tile along the head width (memory.py).
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

COUNTS = ("heads", "tokens", "blocks_a_program", "count")
"""Arguments of the kernels that only count: a 1 or a multiple of 16 among them, which a batch or a
resolution decides, is not worth a kernel of its own."""

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def zero_rows(ROWS: tl.constexpr, DIM_MAIN: tl.constexpr, DIM_TAIL: tl.constexpr):
    """A float32 accumulator of rows, as a tuple of its parts."""
    main = tl.zeros([ROWS, DIM_MAIN], tl.float32)
    if DIM_TAIL > 0:
        return (main, tl.zeros([ROWS, DIM_TAIL], tl.float32))
    else:
        return (main,)


@triton.jit
def inner_products(left, right, DIM_TAIL: tl.constexpr):
    """left · rightᵀ over the head width: [rows of left, rows of right], float32."""
    products = tl.dot(left[0], tl.trans(right[0]), input_precision="ieee")
    if DIM_TAIL > 0:
        products = tl.dot(left[1], tl.trans(right[1]), acc=products, input_precision="ieee")
    return products


@triton.jit
def add_products(sums, left, right, DIM_TAIL: tl.constexpr):
    """sums + left · rightᵀ: the matrix unit adds, and the sums need no registers besides."""
    sums = tl.dot(left[0], tl.trans(right[0]), acc=sums, input_precision="ieee")
    if DIM_TAIL > 0:
        sums = tl.dot(left[1], tl.trans(right[1]), acc=sums, input_precision="ieee")
    return sums


@triton.jit
def accumulate(sums, weights, rows, DIM_TAIL: tl.constexpr):
    """sums + weights · rows, part by part; the weights are rounded to the rows' dtype."""
    rounded = weights.to(rows[0].dtype)
    main = tl.dot(rounded, rows[0], acc=sums[0], input_precision="ieee")
    if DIM_TAIL > 0:
        return (main, tl.dot(rounded, rows[1], acc=sums[1], input_precision="ieee"))
    else:
        return (main,)


@triton.jit
def scale_rows(rows, factor, DIM_TAIL: tl.constexpr):
    """Every part times one factor."""
    if DIM_TAIL > 0:
        return (rows[0] * factor, rows[1] * factor)
    else:
        return (rows[0] * factor,)


@triton.jit
def exponentials(scores, peak, scale_log2, EXACT: tl.constexpr):
    """exp2((scores - peak) · scale_log2) for the rows' peaks.

    EXACT, for float32, subtracts first: the difference is then exact where it matters. Else one
    fused multiply-add an element does both, and its rounding is far below that of half precision.
    """
    if EXACT:
        return tl.exp2((scores - peak[:, None]) * scale_log2)
    else:
        return tl.exp2(scores * scale_log2 - (peak * scale_log2)[:, None])


@triton.jit
def normalised(powers, inverse):
    """Powers times their row's inverse sum, each rounded by itself.

    Fused with the difference of two maps, the one half would be exact and the other rounded: equal
    scores would leave a loss, and a gradient of it, of some 1e-9 instead of 0.
    """
    if INTERPRETED:
        return powers * inverse[:, None]
    else:
        return libdevice.mul_rn(powers, inverse[:, None])


@triton.jit
def scores(queries, key_main, key_tail, DIM_TAIL: tl.constexpr, KEY_TAIL: tl.constexpr):
    """Scores of all keys, not scaled: main tile and tail tile, which repeats the first if none."""
    main = inner_products(queries, key_main, DIM_TAIL)
    if KEY_TAIL > 0:
        return main, inner_products(queries, key_tail, DIM_TAIL)
    else:
        return main, main


@triton.jit
def softmax(
    main, tail, valid_main, valid_tail, scale_log2, KEY_TAIL: tl.constexpr,
    MASK_MAIN: tl.constexpr, HAS_MASK: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Softmax over all keys (equation 4), float32: main tile, tail tile, rows' peak and inverse.

    A probability is exp2((score - peak) · scale_log2) · inverse; scale_log2 is the scale times
    log2(e) and positive. A row without any key has inverse 0. Without a tail tile the second
    result repeats the first and must not be used. EXACT is that of `exponentials`.
    """
    if MASK_MAIN:
        main = tl.where(valid_main[None, :], main, float("-inf"))
    peak = tl.max(main, axis=1)
    if KEY_TAIL > 0:
        tail = tl.where(valid_tail[None, :], tail, float("-inf"))
        peak = tl.maximum(peak, tl.max(tail, axis=1))
    if HAS_MASK:
        peak = tl.where(peak == float("-inf"), 0.0, peak)
    main = exponentials(main, peak, scale_log2, EXACT)
    total = tl.sum(main, axis=1)
    if KEY_TAIL > 0:
        tail = exponentials(tail, peak, scale_log2, EXACT)
        total += tl.sum(tail, axis=1)
    inverse = 1.0 / total
    if HAS_MASK:
        inverse = tl.where(total == 0.0, 0.0, inverse)
    main = normalised(main, inverse)
    if KEY_TAIL > 0:
        return main, normalised(tail, inverse), peak, inverse
    else:
        return main, main, peak, inverse


@triton.jit
def pull(
    main, tail, other_main, other_tail, weight_main, weight_tail, factor, KEY_TAIL: tl.constexpr
):
    """Return the subject loss's part of the gradient of the probabilities (equation 10)."""
    pull_main = (main - other_main) * (weight_main * factor)[None, :]
    if KEY_TAIL > 0:
        return pull_main, (tail - other_tail) * (weight_tail * factor)[None, :]
    else:
        return pull_main, pull_main


@triton.jit
def pull_to_reference(
    main, tail, other_main, other_tail, valid_main, valid_tail, weight_main, weight_tail, factor,
    scale_log2, KEY_TAIL: tl.constexpr, MASK_MAIN: tl.constexpr, HAS_MASK: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """`softmax` of the reference's scores, and the pull to it on main and tail."""
    other_main, other_tail, peak, inverse = softmax(
        other_main, other_tail, valid_main, valid_tail, scale_log2,
        KEY_TAIL, MASK_MAIN, HAS_MASK, EXACT,
    )  # fmt: skip
    pull_main, pull_tail = pull(
        main, tail, other_main, other_tail, weight_main, weight_tail, factor, KEY_TAIL
    )
    return other_main, other_tail, peak, inverse, pull_main, pull_tail


@triton.jit
def softmax_gradient(probability_main, probability_tail, main, tail, KEY_TAIL: tl.constexpr):
    """Gradient of the scores from that of the probabilities (equation 8), and the rows' mean."""
    mean = tl.sum(probability_main * main, axis=1)
    if KEY_TAIL > 0:
        mean += tl.sum(probability_tail * tail, axis=1)
    main = probability_main * (main - mean[:, None])
    if KEY_TAIL > 0:
        return main, probability_tail * (tail - mean[:, None]), mean
    else:
        return main, main, mean


@triton.jit
def pick_column(main, tail, column, KEY_MAIN: tl.constexpr, KEY_TAIL: tl.constexpr):
    """One column of the probabilities; zeros for a column that does not exist."""
    picked = tl.sum(tl.where(tl.arange(0, KEY_MAIN)[None, :] == column, main, 0.0), axis=1)
    if KEY_TAIL > 0:
        columns = KEY_MAIN + tl.arange(0, KEY_TAIL)
        picked += tl.sum(tl.where(columns[None, :] == column, tail, 0.0), axis=1)
    return picked


@triton.jit
def add_to_column(main, tail, column, gradient, KEY_MAIN: tl.constexpr, KEY_TAIL: tl.constexpr):
    """Add one column's gradient; nothing for a column that does not exist."""
    added = gradient[:, None]
    main = main + tl.where(tl.arange(0, KEY_MAIN)[None, :] == column, added, 0.0)
    if KEY_TAIL > 0:
        columns = KEY_MAIN + tl.arange(0, KEY_TAIL)
        return main, tail + tl.where(columns[None, :] == column, added, 0.0)
    else:
        return main, main
