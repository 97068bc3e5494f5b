"""Forward kernel: output, subject loss and selected probabilities in one pass over the rows."""

from __future__ import annotations

import triton
import triton.language as tl

from .memory import (
    block_offset,
    head_offset,
    load_block,
    load_operands,
    load_rows,
    load_tiles,
    load_weights,
    row_offsets,
    store_rows,
    valid_keys,
)
from .primitives import COUNTS, accumulate, pick_column, scores, softmax, zero_rows


@triton.jit(do_not_specialize=COUNTS)
def cross_attention_forward(
    query, key, value, reference_key, token_weights, key_mask, probs_positions,
    output, subject_loss, attn_probs,
    query_stride_b, query_stride_h, query_stride_n,
    key_stride_b, key_stride_h, key_stride_m,
    value_stride_b, value_stride_h, value_stride_m,
    reference_stride_b, reference_stride_h, reference_stride_m,
    weight_stride_b, mask_stride_b, token_stride_b,
    heads, rows, keys, tokens, blocks_a_program, scale_log2,
    DIM: tl.constexpr, DIM_MAIN: tl.constexpr, DIM_TAIL: tl.constexpr,
    KEY_MAIN: tl.constexpr, KEY_TAIL: tl.constexpr, FULL_KEYS: tl.constexpr,
    BLOCK: tl.constexpr, ALIGNMENT: tl.constexpr, UPCAST: tl.constexpr, RELOAD: tl.constexpr,
):  # fmt: skip
    """Equations 4 and 5 for blocks_a_program blocks of rows of one head.

    Grid (B·H, programs along the rows). Writes output [B, N, H, D], subject loss [B, H, programs]
    (this program's rows' part of the sum in equation 5) and maps [B, H, T, N]; reference_key,
    token_weights, key_mask and maps may be None. FULL_KEYS says that the key tiles hold M keys
    exactly.
    """
    HAS_MASK: tl.constexpr = key_mask is not None
    HAS_WEIGHTS: tl.constexpr = token_weights is not None
    HAS_REFERENCE: tl.constexpr = reference_key is not None
    MASK_MAIN: tl.constexpr = HAS_MASK or (KEY_TAIL == 0 and not FULL_KEYS)
    EXACT: tl.constexpr = query.dtype.element_ty == tl.float32
    batch = tl.program_id(0) // heads
    head = tl.program_id(0) % heads

    valid_main, valid_tail = valid_keys(
        key_mask, batch, mask_stride_b, keys, KEY_MAIN, KEY_TAIL, HAS_MASK
    )
    key += head_offset(batch, head, key_stride_b, key_stride_h, ALIGNMENT)
    value += head_offset(batch, head, value_stride_b, value_stride_h, ALIGNMENT)
    if HAS_REFERENCE:
        reference_key += head_offset(batch, head, reference_stride_b, reference_stride_h, ALIGNMENT)
        weight_main, weight_tail = load_weights(
            token_weights, batch, weight_stride_b, keys, KEY_MAIN, KEY_TAIL, HAS_WEIGHTS
        )
    if not RELOAD:
        (key_main, key_tail, value_main, value_tail,
         reference_main, reference_tail) = load_operands(
            key, value, reference_key, key_stride_m, value_stride_m, reference_stride_m, keys,
            valid_main, valid_tail, True, HAS_REFERENCE, DIM, DIM_MAIN, DIM_TAIL,
            KEY_MAIN, KEY_TAIL, FULL_KEYS, HAS_MASK, ALIGNMENT, UPCAST,
        )  # fmt: skip
    if attn_probs is not None:
        probs_positions += batch.to(tl.int64) * token_stride_b
        attn_probs += tl.program_id(0).to(tl.int64) * tokens * rows

    query += head_offset(batch, head, query_stride_b, query_stride_h, ALIGNMENT)
    output += head_offset(batch * rows, head, heads * DIM, DIM, ALIGNMENT)
    if RELOAD:
        query_offsets = row_offsets(tl.arange(0, BLOCK), query_stride_n, ALIGNMENT)
    distance = tl.zeros([BLOCK], tl.float32)
    first = tl.program_id(1) * blocks_a_program
    last = tl.minimum(first + blocks_a_program, tl.cdiv(rows, BLOCK))
    for step in tl.range(0, last - first, disable_licm=True):
        block = first + step
        row = block * BLOCK + tl.arange(0, BLOCK)
        row_valid = row < rows
        if RELOAD:
            # With offsets held over the loop: there they cost less than finding them again.
            source = query + block_offset(block, BLOCK, query_stride_n, ALIGNMENT)
            queries = load_rows(
                source, query_offsets, row_valid, DIM, DIM_MAIN, DIM_TAIL, True, UPCAST
            )
        else:
            queries = load_block(
                query, block, query_stride_n, rows,
                BLOCK, DIM, DIM_MAIN, DIM_TAIL, ALIGNMENT, UPCAST,
            )  # fmt: skip
        if RELOAD:
            key_main, key_tail = load_tiles(
                key, key_stride_m, keys, valid_main, valid_tail,
                DIM, DIM_MAIN, DIM_TAIL, KEY_MAIN, KEY_TAIL, FULL_KEYS, HAS_MASK, ALIGNMENT, UPCAST,
            )  # fmt: skip
        main, tail = scores(queries, key_main, key_tail, DIM_TAIL, KEY_TAIL)
        main, tail, _, _ = softmax(
            main, tail, valid_main, valid_tail, scale_log2, KEY_TAIL, MASK_MAIN, HAS_MASK, EXACT
        )
        if attn_probs is not None:
            for token in range(tokens):
                column = tl.load(probs_positions + token)
                picked = pick_column(main, tail, column, KEY_MAIN, KEY_TAIL)
                tl.store(attn_probs + token * rows + row, picked, mask=row_valid)
        if HAS_REFERENCE:
            if RELOAD:
                reference_main, reference_tail = load_tiles(
                    reference_key, reference_stride_m, keys, valid_main, valid_tail,
                    DIM, DIM_MAIN, DIM_TAIL, KEY_MAIN, KEY_TAIL, FULL_KEYS, HAS_MASK, ALIGNMENT,
                    UPCAST,
                )  # fmt: skip
            other_main, other_tail = scores(
                queries, reference_main, reference_tail, DIM_TAIL, KEY_TAIL
            )
            other_main, other_tail, _, _ = softmax(
                other_main, other_tail, valid_main, valid_tail, scale_log2,
                KEY_TAIL, MASK_MAIN, HAS_MASK, EXACT,
            )  # fmt: skip
            difference = main - other_main
            squared = tl.sum(difference * difference * weight_main[None, :], axis=1)
            if KEY_TAIL > 0:
                difference = tail - other_tail
                squared += tl.sum(difference * difference * weight_tail[None, :], axis=1)
            distance += tl.where(row_valid, squared, 0.0)
        if RELOAD:
            value_main, value_tail = load_tiles(
                value, value_stride_m, keys, valid_main, valid_tail,
                DIM, DIM_MAIN, DIM_TAIL, KEY_MAIN, KEY_TAIL, FULL_KEYS, HAS_MASK, ALIGNMENT, UPCAST,
            )  # fmt: skip
        sums = accumulate(zero_rows(BLOCK, DIM_MAIN, DIM_TAIL), main, value_main, DIM_TAIL)
        if KEY_TAIL > 0:
            sums = accumulate(sums, tail, value_tail, DIM_TAIL)
        target = output + block_offset(block, BLOCK, heads * DIM, ALIGNMENT)
        output_offsets = row_offsets(tl.arange(0, BLOCK), heads * DIM, ALIGNMENT)
        store_rows(target, output_offsets, row_valid, sums, DIM, DIM_MAIN, DIM_TAIL)
    if HAS_REFERENCE:
        place = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
        tl.store(subject_loss + place, tl.sum(distance) / heads)
