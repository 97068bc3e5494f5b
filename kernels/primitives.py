"""Device functions of the kernels: addresses, loads and stores; scores, softmax and products."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

ROW_STATS = tl.constexpr(8)
"""Number of float32 values a query that `_attn_bwd_dq` writes for `_attn_bwd_dkdv`."""


@triton.jit
def head_offset(batch, head, stride_batch, stride_head, ALIGNMENT: tl.constexpr):
    """Return the 64-bit offset of one head in elements, a multiple of ALIGNMENT."""
    offset = batch.to(tl.int64) * stride_batch + head.to(tl.int64) * stride_head
    if ALIGNMENT > 1:
        offset = tl.multiple_of(offset, ALIGNMENT)
    return offset


@triton.jit
def block_offset(block, BLOCK: tl.constexpr, stride, ALIGNMENT: tl.constexpr):
    """Return the 64-bit offset of a block's first row in elements."""
    offset = (block * BLOCK).to(tl.int64) * stride
    if ALIGNMENT > 1:
        offset = tl.multiple_of(offset, ALIGNMENT)
    return offset


@triton.jit
def row_offsets(rows, stride, ALIGNMENT: tl.constexpr):
    """Return the offsets of a tile's rows in elements, multiples of ALIGNMENT.

    They are 32 bits wide; plan.MAX_ROW_STRIDE keeps them in range.
    """
    offsets = rows * stride
    if ALIGNMENT > 1:
        offsets = tl.multiple_of(offsets, ALIGNMENT)
    return offsets


@triton.jit
def load_part(
    base, offsets, valid, FIRST: tl.constexpr, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr,
    MASK_ROWS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Load columns FIRST .. FIRST + WIDTH of rows: [rows, WIDTH], zeros past HEAD_DIM.

    With MASK_ROWS, rows that are not valid are zeros too.
    """
    columns = FIRST + tl.arange(0, WIDTH)
    pointers = base + offsets[:, None] + columns[None, :]
    if FIRST + WIDTH > HEAD_DIM:
        inside = (columns < HEAD_DIM)[None, :]
        if MASK_ROWS:
            inside = inside & valid[:, None]
        part = tl.load(pointers, mask=inside, other=0.0)
    elif MASK_ROWS:
        part = tl.load(pointers, mask=valid[:, None], other=0.0)
    else:
        part = tl.load(pointers)
    # Triton's interpreter multiplies and rounds bfloat16 wrongly; it computes in float32 instead.
    if UPCAST:
        part = part.to(tl.float32)
    return part


@triton.jit
def load_rows(
    base, offsets, valid, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_D_TAIL: tl.constexpr,
    MASK_ROWS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Load rows of one head as a tuple of the main part and, if there is one, the tail part."""
    main = load_part(base, offsets, valid, 0, BLOCK_D, HEAD_DIM, MASK_ROWS, UPCAST)
    if BLOCK_D_TAIL > 0:
        tail = load_part(base, offsets, valid, BLOCK_D, BLOCK_D_TAIL, HEAD_DIM, MASK_ROWS, UPCAST)
        return (main, tail)
    else:
        return (main,)


@triton.jit
def load_block(
    base, block, stride, end, BLOCK_M: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_D_TAIL: tl.constexpr, ALIGNMENT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Load the rows of one block, zeros from row `end` on: [BLOCK_M, HEAD_DIM] in parts.

    The offsets are computed in each iteration of a loop. Held over it they would take four
    registers a thread and tensor, and fewer programs would fit on a multiprocessor.
    """
    rows = tl.arange(0, BLOCK_M)
    source = base + block_offset(block, BLOCK_M, stride, ALIGNMENT)
    offsets = row_offsets(rows, stride, ALIGNMENT)
    valid = block * BLOCK_M + rows < end
    return load_rows(source, offsets, valid, HEAD_DIM, BLOCK_D, BLOCK_D_TAIL, True, UPCAST)


@triton.jit
def load_pair(
    query, grad_output, block, query_stride, do_stride, end, HAS_DO: tl.constexpr,
    BLOCK_M: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_D_TAIL: tl.constexpr, ALIGNMENT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Load a block's queries and output gradients together: one wait.

    Without output gradients the second result repeats the first, unused.
    """
    q = load_block(
        query, block, query_stride, end, BLOCK_M, HEAD_DIM, BLOCK_D, BLOCK_D_TAIL, ALIGNMENT, UPCAST
    )
    if HAS_DO:
        do = load_block(
            grad_output, block, do_stride, end,
            BLOCK_M, HEAD_DIM, BLOCK_D, BLOCK_D_TAIL, ALIGNMENT, UPCAST,
        )  # fmt: skip
        return q, do
    else:
        return q, q


@triton.jit
def load_tiles(
    base, stride_m, seqlen_k, mask_n, mask_n_tail, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_D_TAIL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_N_TAIL: tl.constexpr,
    EVEN_N: tl.constexpr, HAS_MASK: tl.constexpr, ALIGNMENT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Load all keys (or values) of one head: [BLOCK_N, HEAD_DIM] and [BLOCK_N_TAIL, HEAD_DIM].

    Masked rows are zeros, because memory may hold NaN there. Without a tail the second result
    repeats the first and must not be used.
    """
    columns = tl.arange(0, BLOCK_N)
    offsets = row_offsets(columns, stride_m, ALIGNMENT)
    MASK_ROWS: tl.constexpr = HAS_MASK or (BLOCK_N_TAIL == 0 and not EVEN_N)
    inside = columns < seqlen_k
    if HAS_MASK:
        inside = mask_n
    main = load_rows(base, offsets, inside, HEAD_DIM, BLOCK_D, BLOCK_D_TAIL, MASK_ROWS, UPCAST)
    if BLOCK_N_TAIL > 0:
        columns = BLOCK_N + tl.arange(0, BLOCK_N_TAIL)
        offsets = row_offsets(columns, stride_m, ALIGNMENT)
        inside = columns < seqlen_k
        if HAS_MASK:
            inside = mask_n_tail
        tail = load_rows(base, offsets, inside, HEAD_DIM, BLOCK_D, BLOCK_D_TAIL, True, UPCAST)
        return main, tail
    else:
        return main, main


@triton.jit
def load_operands(
    key, value, reference_key, key_stride_m, value_stride_m, ref_stride_m, seqlen_k,
    mask_n, mask_n_tail, HAS_VALUE: tl.constexpr, HAS_REFERENCE: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_D_TAIL: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_N_TAIL: tl.constexpr, EVEN_N: tl.constexpr, HAS_MASK: tl.constexpr,
    ALIGNMENT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Load key, value and reference key tiles of one head; an absent one repeats the keys."""
    k, k_tail = load_tiles(
        key, key_stride_m, seqlen_k, mask_n, mask_n_tail,
        HEAD_DIM, BLOCK_D, BLOCK_D_TAIL, BLOCK_N, BLOCK_N_TAIL, EVEN_N, HAS_MASK, ALIGNMENT, UPCAST,
    )  # fmt: skip
    v = k
    v_tail = k_tail
    k_ref = k
    k_ref_tail = k_tail
    if HAS_VALUE:
        v, v_tail = load_tiles(
            value, value_stride_m, seqlen_k, mask_n, mask_n_tail,
            HEAD_DIM, BLOCK_D, BLOCK_D_TAIL, BLOCK_N, BLOCK_N_TAIL, EVEN_N, HAS_MASK,
            ALIGNMENT, UPCAST,
        )  # fmt: skip
    if HAS_REFERENCE:
        k_ref, k_ref_tail = load_tiles(
            reference_key, ref_stride_m, seqlen_k, mask_n, mask_n_tail,
            HEAD_DIM, BLOCK_D, BLOCK_D_TAIL, BLOCK_N, BLOCK_N_TAIL, EVEN_N, HAS_MASK,
            ALIGNMENT, UPCAST,
        )  # fmt: skip
    return k, k_tail, v, v_tail, k_ref, k_ref_tail


@triton.jit
def store_part(
    base, offsets, valid, part, FIRST: tl.constexpr, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr
):
    """Store one part of the valid rows, nothing past HEAD_DIM."""
    columns = FIRST + tl.arange(0, WIDTH)
    inside = valid[:, None]
    if FIRST + WIDTH > HEAD_DIM:
        inside = inside & (columns < HEAD_DIM)[None, :]
    pointers = base + offsets[:, None] + columns[None, :]
    tl.store(pointers, part.to(base.dtype.element_ty), mask=inside)


@triton.jit
def store_rows(
    base, offsets, valid, rows, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_D_TAIL: tl.constexpr,
):  # fmt: skip
    """Store the valid rows of one head from a tuple of parts."""
    store_part(base, offsets, valid, rows[0], 0, BLOCK_D, HEAD_DIM)
    if BLOCK_D_TAIL > 0:
        store_part(base, offsets, valid, rows[1], BLOCK_D, BLOCK_D_TAIL, HEAD_DIM)


@triton.jit
def valid_keys(
    key_mask, batch, stride_b, seqlen_k, BLOCK_N: tl.constexpr, BLOCK_N_TAIL: tl.constexpr,
    HAS_MASK: tl.constexpr,
):  # fmt: skip
    """Return True for keys that exist and are not masked: [BLOCK_N] and [BLOCK_N_TAIL]."""
    columns = tl.arange(0, BLOCK_N)
    main = columns < seqlen_k
    if HAS_MASK:
        key_mask += batch.to(tl.int64) * stride_b
        main = main & (tl.load(key_mask + columns, mask=main, other=0) != 0)
    if BLOCK_N_TAIL > 0:
        columns = BLOCK_N + tl.arange(0, BLOCK_N_TAIL)
        tail = columns < seqlen_k
        if HAS_MASK:
            tail = tail & (tl.load(key_mask + columns, mask=tail, other=0) != 0)
        return main, tail
    else:
        return main, main


@triton.jit
def load_weights(
    token_weights, batch, stride_b, seqlen_k, BLOCK_N: tl.constexpr, BLOCK_N_TAIL: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
):  # fmt: skip
    """Load the keys' weights in the subject loss, ones by default: [BLOCK_N] and [BLOCK_N_TAIL]."""
    if HAS_WEIGHTS:
        token_weights += batch.to(tl.int64) * stride_b
        columns = tl.arange(0, BLOCK_N)
        main = tl.load(token_weights + columns, mask=columns < seqlen_k, other=0.0)
    else:
        main = tl.full([BLOCK_N], 1.0, tl.float32)
    if BLOCK_N_TAIL == 0:
        return main, main
    elif HAS_WEIGHTS:
        columns = BLOCK_N + tl.arange(0, BLOCK_N_TAIL)
        return main, tl.load(token_weights + columns, mask=columns < seqlen_k, other=0.0)
    else:
        return main, tl.full([BLOCK_N_TAIL], 1.0, tl.float32)


COUNTS = ("heads", "num_positions", "blocks_per_cta", "num_splits")
"""Arguments that only count. Triton would compile a kernel more for a 1 or a multiple of 16 among
them, which depends on batch and resolution."""

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def zero_rows(ROWS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_D_TAIL: tl.constexpr):
    """Return a float32 accumulator [ROWS, HEAD_DIM] as a tuple of its parts."""
    main = tl.zeros([ROWS, BLOCK_D], tl.float32)
    if BLOCK_D_TAIL > 0:
        return (main, tl.zeros([ROWS, BLOCK_D_TAIL], tl.float32))
    else:
        return (main,)


@triton.jit
def dot_t(left, right, BLOCK_D_TAIL: tl.constexpr):
    """Return left · rightᵀ over the head dimension: [rows of left, rows of right], float32."""
    products = tl.dot(left[0], tl.trans(right[0]), input_precision="ieee")
    if BLOCK_D_TAIL > 0:
        products = tl.dot(left[1], tl.trans(right[1]), acc=products, input_precision="ieee")
    return products


@triton.jit
def add_dot_t(acc, left, right, BLOCK_D_TAIL: tl.constexpr):
    """Return acc + left · rightᵀ; the matrix unit adds, so no more registers are needed."""
    acc = tl.dot(left[0], tl.trans(right[0]), acc=acc, input_precision="ieee")
    if BLOCK_D_TAIL > 0:
        acc = tl.dot(left[1], tl.trans(right[1]), acc=acc, input_precision="ieee")
    return acc


@triton.jit
def accumulate(acc, weights, rows, BLOCK_D_TAIL: tl.constexpr):
    """Return acc + weights · rows in parts; the weights are rounded to the rows' dtype."""
    rounded = weights.to(rows[0].dtype)
    main = tl.dot(rounded, rows[0], acc=acc[0], input_precision="ieee")
    if BLOCK_D_TAIL > 0:
        return (main, tl.dot(rounded, rows[1], acc=acc[1], input_precision="ieee"))
    else:
        return (main,)


@triton.jit
def scale_rows(rows, factor, BLOCK_D_TAIL: tl.constexpr):
    """Return every part times one factor."""
    if BLOCK_D_TAIL > 0:
        return (rows[0] * factor, rows[1] * factor)
    else:
        return (rows[0] * factor,)


@triton.jit
def exp_scores(scores, row_max, sm_scale_log2, EXACT: tl.constexpr):
    """Return exp2((scores - row_max) · sm_scale_log2), [BLOCK_M, keys].

    EXACT, for float32, subtracts first: the difference is then exact where it matters. Else one
    fused multiply-add an element does both, with a rounding far below that of half precision.
    """
    if EXACT:
        return tl.exp2((scores - row_max[:, None]) * sm_scale_log2)
    else:
        return tl.exp2(scores * sm_scale_log2 - (row_max * sm_scale_log2)[:, None])


@triton.jit
def normalized(powers, inv_sum):
    """Return powers times the inv_sum of their row, each product rounded on its own.

    Fused with the difference of two maps, one of them would be exact and the other rounded: equal
    scores would give a loss, and a gradient, of about 1e-9 instead of 0.
    """
    if INTERPRETED:
        return powers * inv_sum[:, None]
    else:
        return libdevice.mul_rn(powers, inv_sum[:, None])


@triton.jit
def scores(q, k, k_tail, BLOCK_D_TAIL: tl.constexpr, BLOCK_N_TAIL: tl.constexpr):
    """Return unscaled scores [BLOCK_M, BLOCK_N] and [BLOCK_M, BLOCK_N_TAIL].

    Without a tail the second result repeats the first and must not be used, here and below.
    """
    main = dot_t(q, k, BLOCK_D_TAIL)
    if BLOCK_N_TAIL > 0:
        return main, dot_t(q, k_tail, BLOCK_D_TAIL)
    else:
        return main, main


@triton.jit
def softmax(
    p, p_tail, mask_n, mask_n_tail, sm_scale_log2, BLOCK_N_TAIL: tl.constexpr,
    MASK_N: tl.constexpr, HAS_MASK: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Compute the softmax over all keys (equation 4) in float32; return it, row_max and inv_sum.

    A probability is exp2((score - row_max) · sm_scale_log2) · inv_sum; sm_scale_log2 is the scale
    times log2(e) and positive. A row without any key has inv_sum 0. EXACT is that of `exp_scores`.
    """
    if MASK_N:
        p = tl.where(mask_n[None, :], p, float("-inf"))
    row_max = tl.max(p, axis=1)
    if BLOCK_N_TAIL > 0:
        p_tail = tl.where(mask_n_tail[None, :], p_tail, float("-inf"))
        row_max = tl.maximum(row_max, tl.max(p_tail, axis=1))
    if HAS_MASK:
        row_max = tl.where(row_max == float("-inf"), 0.0, row_max)
    p = exp_scores(p, row_max, sm_scale_log2, EXACT)
    row_sum = tl.sum(p, axis=1)
    if BLOCK_N_TAIL > 0:
        p_tail = exp_scores(p_tail, row_max, sm_scale_log2, EXACT)
        row_sum += tl.sum(p_tail, axis=1)
    inv_sum = 1.0 / row_sum
    if HAS_MASK:
        inv_sum = tl.where(row_sum == 0.0, 0.0, inv_sum)
    p = normalized(p, inv_sum)
    if BLOCK_N_TAIL > 0:
        return p, normalized(p_tail, inv_sum), row_max, inv_sum
    else:
        return p, p, row_max, inv_sum


@triton.jit
def d_probs_loss(p, p_tail, p_ref, p_ref_tail, w, w_tail, factor, BLOCK_N_TAIL: tl.constexpr):
    """Return the subject loss's part of the gradient of the probabilities (equation 10)."""
    dp_loss = (p - p_ref) * (w * factor)[None, :]
    if BLOCK_N_TAIL > 0:
        return dp_loss, (p_tail - p_ref_tail) * (w_tail * factor)[None, :]
    else:
        return dp_loss, dp_loss


@triton.jit
def ref_softmax_and_d_probs(
    p, p_tail, p_ref, p_ref_tail, mask_n, mask_n_tail, w, w_tail, factor,
    sm_scale_log2, BLOCK_N_TAIL: tl.constexpr, MASK_N: tl.constexpr, HAS_MASK: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """Compute `softmax` of the reference's scores, and `d_probs_loss` of it."""
    p_ref, p_ref_tail, row_max, inv_sum = softmax(
        p_ref, p_ref_tail, mask_n, mask_n_tail, sm_scale_log2,
        BLOCK_N_TAIL, MASK_N, HAS_MASK, EXACT,
    )  # fmt: skip
    dp_loss, dp_loss_tail = d_probs_loss(
        p, p_tail, p_ref, p_ref_tail, w, w_tail, factor, BLOCK_N_TAIL
    )
    return p_ref, p_ref_tail, row_max, inv_sum, dp_loss, dp_loss_tail


@triton.jit
def softmax_bwd(p, p_tail, dp, dp_tail, BLOCK_N_TAIL: tl.constexpr):
    """Return the gradient of the scores from that of the probabilities (equation 8), and delta."""
    delta = tl.sum(p * dp, axis=1)
    if BLOCK_N_TAIL > 0:
        delta += tl.sum(p_tail * dp_tail, axis=1)
    ds = p * (dp - delta[:, None])
    if BLOCK_N_TAIL > 0:
        return ds, p_tail * (dp_tail - delta[:, None]), delta
    else:
        return ds, ds, delta


@triton.jit
def pick_column(p, p_tail, position, BLOCK_N: tl.constexpr, BLOCK_N_TAIL: tl.constexpr):
    """Return one column [BLOCK_M] of the probabilities, zeros for a key that does not exist."""
    column = tl.sum(tl.where(tl.arange(0, BLOCK_N)[None, :] == position, p, 0.0), axis=1)
    if BLOCK_N_TAIL > 0:
        offs_n = BLOCK_N + tl.arange(0, BLOCK_N_TAIL)
        column += tl.sum(tl.where(offs_n[None, :] == position, p_tail, 0.0), axis=1)
    return column


@triton.jit
def add_to_column(dp, dp_tail, position, column, BLOCK_N: tl.constexpr, BLOCK_N_TAIL: tl.constexpr):
    """Add the gradient [BLOCK_M] of one column, nothing for a key that does not exist."""
    added = column[:, None]
    dp = dp + tl.where(tl.arange(0, BLOCK_N)[None, :] == position, added, 0.0)
    if BLOCK_N_TAIL > 0:
        offs_n = BLOCK_N + tl.arange(0, BLOCK_N_TAIL)
        return dp, dp_tail + tl.where(offs_n[None, :] == position, added, 0.0)
    else:
        return dp, dp
