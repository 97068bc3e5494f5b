"""Loads and stores of the kernels: offsets, tiles of queries and of keys, weights, masks.

A tile of keys, or of the head dimension, is a main part, a power of two, and an optional tail part:
77 keys take 64 + 16, and a head dimension of 80 takes 64 + 16. Tuples hold the parts along the head
dimension.
"""

from __future__ import annotations

import triton
import triton.language as tl

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
