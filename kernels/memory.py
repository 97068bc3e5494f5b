"""What the kernels read and write: offsets, tiles of rows and of keys in two parts, weights, masks.

A tile of keys or of head columns is a main part, a power of two, and an optional tail part, so that
77 keys cost 64 + 16 and a head of 80 columns 64 + 16. Tuples carry the parts along the head width.
"""

from __future__ import annotations

import triton
import triton.language as tl

STATISTICS = tl.constexpr(8)
"""float32 numbers a row that the kernel of the queries leaves for the kernel of the keys."""


@triton.jit
def head_offset(batch, head, stride_batch, stride_head, ALIGNMENT: tl.constexpr):
    """Offset of one head in elements, in 64 bits; ALIGNMENT promises what it is a multiple of."""
    offset = batch.to(tl.int64) * stride_batch + head.to(tl.int64) * stride_head
    if ALIGNMENT > 1:
        offset = tl.multiple_of(offset, ALIGNMENT)
    return offset


@triton.jit
def block_offset(block, BLOCK: tl.constexpr, stride, ALIGNMENT: tl.constexpr):
    """Offset of a block's first row in elements, in 64 bits."""
    offset = (block * BLOCK).to(tl.int64) * stride
    if ALIGNMENT > 1:
        offset = tl.multiple_of(offset, ALIGNMENT)
    return offset


@triton.jit
def row_offsets(rows, stride, ALIGNMENT: tl.constexpr):
    """Offsets of a tile's rows in elements, in 32 bits: launch.MAX_ROW_STRIDE keeps them inside.

    ALIGNMENT promises what they are multiples of.
    """
    offsets = rows * stride
    if ALIGNMENT > 1:
        offsets = tl.multiple_of(offsets, ALIGNMENT)
    return offsets


@triton.jit
def load_part(
    base, offsets, valid, FIRST: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr,
    MASK_ROWS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Columns FIRST .. FIRST + WIDTH of some rows, zeros past the width and in invalid rows."""
    columns = FIRST + tl.arange(0, WIDTH)
    pointers = base + offsets[:, None] + columns[None, :]
    if FIRST + WIDTH > DIM:
        inside = (columns < DIM)[None, :]
        if MASK_ROWS:
            inside = inside & valid[:, None]
        part = tl.load(pointers, mask=inside, other=0.0)
    elif MASK_ROWS:
        part = tl.load(pointers, mask=valid[:, None], other=0.0)
    else:
        part = tl.load(pointers)
    # The interpreter multiplies and rounds bfloat16 wrongly; there everything runs in float32.
    if UPCAST:
        part = part.to(tl.float32)
    return part


@triton.jit
def load_rows(
    base, offsets, valid, DIM: tl.constexpr, DIM_MAIN: tl.constexpr, DIM_TAIL: tl.constexpr,
    MASK_ROWS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Some rows of one head, as a tuple of the main and, if there is one, the tail part."""
    main = load_part(base, offsets, valid, 0, DIM_MAIN, DIM, MASK_ROWS, UPCAST)
    if DIM_TAIL > 0:
        tail = load_part(base, offsets, valid, DIM_MAIN, DIM_TAIL, DIM, MASK_ROWS, UPCAST)
        return (main, tail)
    else:
        return (main,)


@triton.jit
def load_block(
    base, block, stride, end, BLOCK: tl.constexpr, DIM: tl.constexpr, DIM_MAIN: tl.constexpr,
    DIM_TAIL: tl.constexpr, ALIGNMENT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The rows of one block, zeros from row `end` on.

    Their offsets are found here, in each turn of a loop: held over it they would take four
    registers a thread and tensor, and with them a program its place on a multiprocessor.
    """
    rows = tl.arange(0, BLOCK)
    source = base + block_offset(block, BLOCK, stride, ALIGNMENT)
    offsets = row_offsets(rows, stride, ALIGNMENT)
    valid = block * BLOCK + rows < end
    return load_rows(source, offsets, valid, DIM, DIM_MAIN, DIM_TAIL, True, UPCAST)


@triton.jit
def load_pair(
    query, grad_output, block, query_stride, output_stride, end, HAS_OUTPUT: tl.constexpr,
    BLOCK: tl.constexpr, DIM: tl.constexpr, DIM_MAIN: tl.constexpr, DIM_TAIL: tl.constexpr,
    ALIGNMENT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """A block's queries and output gradients, asked for at once: one wait.

    What is absent repeats the queries, unused.
    """
    queries = load_block(
        query, block, query_stride, end, BLOCK, DIM, DIM_MAIN, DIM_TAIL, ALIGNMENT, UPCAST
    )
    if HAS_OUTPUT:
        grad_outputs = load_block(
            grad_output, block, output_stride, end,
            BLOCK, DIM, DIM_MAIN, DIM_TAIL, ALIGNMENT, UPCAST,
        )  # fmt: skip
        return queries, grad_outputs
    else:
        return queries, queries


@triton.jit
def load_tiles(
    base, stride_m, keys, valid_main, valid_tail, DIM: tl.constexpr, DIM_MAIN: tl.constexpr,
    DIM_TAIL: tl.constexpr, KEY_MAIN: tl.constexpr, KEY_TAIL: tl.constexpr,
    FULL_KEYS: tl.constexpr, HAS_MASK: tl.constexpr, ALIGNMENT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """All keys (or values) of one head: the main tile's parts and the tail tile's.

    Rows that are masked out are zeros, since what stands there may be no number. Without a tail
    the second result repeats the first and must not be used.
    """
    columns = tl.arange(0, KEY_MAIN)
    offsets = row_offsets(columns, stride_m, ALIGNMENT)
    MASK_ROWS: tl.constexpr = HAS_MASK or (KEY_TAIL == 0 and not FULL_KEYS)
    inside = columns < keys
    if HAS_MASK:
        inside = valid_main
    main = load_rows(base, offsets, inside, DIM, DIM_MAIN, DIM_TAIL, MASK_ROWS, UPCAST)
    if KEY_TAIL > 0:
        columns = KEY_MAIN + tl.arange(0, KEY_TAIL)
        offsets = row_offsets(columns, stride_m, ALIGNMENT)
        inside = columns < keys
        if HAS_MASK:
            inside = valid_tail
        tail = load_rows(base, offsets, inside, DIM, DIM_MAIN, DIM_TAIL, True, UPCAST)
        return main, tail
    else:
        return main, main


@triton.jit
def load_operands(
    key, value, reference_key, key_stride_m, value_stride_m, reference_stride_m, keys,
    valid_main, valid_tail, HAS_VALUE: tl.constexpr, HAS_REFERENCE: tl.constexpr,
    DIM: tl.constexpr, DIM_MAIN: tl.constexpr, DIM_TAIL: tl.constexpr, KEY_MAIN: tl.constexpr,
    KEY_TAIL: tl.constexpr, FULL_KEYS: tl.constexpr, HAS_MASK: tl.constexpr,
    ALIGNMENT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Key, value and reference key tiles of one head; what is absent repeats the keys, unused."""
    key_main, key_tail = load_tiles(
        key, key_stride_m, keys, valid_main, valid_tail,
        DIM, DIM_MAIN, DIM_TAIL, KEY_MAIN, KEY_TAIL, FULL_KEYS, HAS_MASK, ALIGNMENT, UPCAST,
    )  # fmt: skip
    value_main = key_main
    value_tail = key_tail
    reference_main = key_main
    reference_tail = key_tail
    if HAS_VALUE:
        value_main, value_tail = load_tiles(
            value, value_stride_m, keys, valid_main, valid_tail,
            DIM, DIM_MAIN, DIM_TAIL, KEY_MAIN, KEY_TAIL, FULL_KEYS, HAS_MASK, ALIGNMENT, UPCAST,
        )  # fmt: skip
    if HAS_REFERENCE:
        reference_main, reference_tail = load_tiles(
            reference_key, reference_stride_m, keys, valid_main, valid_tail,
            DIM, DIM_MAIN, DIM_TAIL, KEY_MAIN, KEY_TAIL, FULL_KEYS, HAS_MASK, ALIGNMENT, UPCAST,
        )  # fmt: skip
    return key_main, key_tail, value_main, value_tail, reference_main, reference_tail


@triton.jit
def store_part(
    base, offsets, valid, part, FIRST: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr
):
    """Store one part of some rows, nothing past the head width or in invalid rows."""
    columns = FIRST + tl.arange(0, WIDTH)
    inside = valid[:, None]
    if FIRST + WIDTH > DIM:
        inside = inside & (columns < DIM)[None, :]
    pointers = base + offsets[:, None] + columns[None, :]
    tl.store(pointers, part.to(base.dtype.element_ty), mask=inside)


@triton.jit
def store_rows(
    base, offsets, valid, rows, DIM: tl.constexpr, DIM_MAIN: tl.constexpr, DIM_TAIL: tl.constexpr
):
    """Store some rows of one head from a tuple of its parts."""
    store_part(base, offsets, valid, rows[0], 0, DIM_MAIN, DIM)
    if DIM_TAIL > 0:
        store_part(base, offsets, valid, rows[1], DIM_MAIN, DIM_TAIL, DIM)


@triton.jit
def valid_keys(
    key_mask, batch, stride_b, keys, KEY_MAIN: tl.constexpr, KEY_TAIL: tl.constexpr,
    HAS_MASK: tl.constexpr,
):  # fmt: skip
    """True for the columns that are keys at all and are not masked out, main and tail."""
    columns = tl.arange(0, KEY_MAIN)
    main = columns < keys
    if HAS_MASK:
        key_mask += batch.to(tl.int64) * stride_b
        main = main & (tl.load(key_mask + columns, mask=main, other=0) != 0)
    if KEY_TAIL > 0:
        columns = KEY_MAIN + tl.arange(0, KEY_TAIL)
        tail = columns < keys
        if HAS_MASK:
            tail = tail & (tl.load(key_mask + columns, mask=tail, other=0) != 0)
        return main, tail
    else:
        return main, main


@triton.jit
def load_weights(
    token_weights, batch, stride_b, keys, KEY_MAIN: tl.constexpr, KEY_TAIL: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
):  # fmt: skip
    """The keys' weights in the subject loss, main and tail; ones when none are given."""
    if HAS_WEIGHTS:
        token_weights += batch.to(tl.int64) * stride_b
        columns = tl.arange(0, KEY_MAIN)
        main = tl.load(token_weights + columns, mask=columns < keys, other=0.0)
    else:
        main = tl.full([KEY_MAIN], 1.0, tl.float32)
    if KEY_TAIL == 0:
        return main, main
    elif HAS_WEIGHTS:
        columns = KEY_MAIN + tl.arange(0, KEY_TAIL)
        return main, tl.load(token_weights + columns, mask=columns < keys, other=0.0)
    else:
        return main, tl.full([KEY_TAIL], 1.0, tl.float32)
