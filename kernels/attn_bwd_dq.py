"""Backward kernel for the queries: recomputes the probabilities of its rows and writes dQ once.

Where the registers hold them, it sums up dK and dV on the way, and no other kernel need read the
rows again.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .memory import (
    STATISTICS,
    block_offset,
    head_offset,
    load_block,
    load_operands,
    load_pair,
    load_tiles,
    load_weights,
    row_offsets,
    store_rows,
    valid_keys,
)
from .primitives import (
    COUNTS,
    accumulate,
    add_products,
    add_to_column,
    pull_to_reference,
    scale_rows,
    scores,
    softmax,
    softmax_gradient,
    zero_rows,
)
from .reduce import accumulate_keys, store_key_tiles, zero_keys


@triton.jit(do_not_specialize=COUNTS)
def cross_attention_backward_query(
    query, key, value, reference_key, token_weights, key_mask, probs_positions,
    grad_output, grad_subject_loss, grad_attn_probs, grad_query, grad_key, grad_value, statistics,
    query_stride_b, query_stride_h, query_stride_n,
    key_stride_b, key_stride_h, key_stride_m,
    value_stride_b, value_stride_h, value_stride_m,
    reference_stride_b, reference_stride_h, reference_stride_m,
    output_stride_b, output_stride_h, output_stride_n,
    weight_stride_b, mask_stride_b, token_stride_b, subject_loss_stride_b,
    probs_stride_b, probs_stride_h, map_factor,
    heads, rows, keys, tokens, blocks_a_program, scale_log2, scale,
    DIM: tl.constexpr, DIM_MAIN: tl.constexpr, DIM_TAIL: tl.constexpr,
    KEY_MAIN: tl.constexpr, KEY_TAIL: tl.constexpr, FULL_KEYS: tl.constexpr,
    BLOCK: tl.constexpr, ALIGNMENT: tl.constexpr, UPCAST: tl.constexpr,
    RELOAD: tl.constexpr, PIPELINED: tl.constexpr, PREFETCH: tl.constexpr,
    LATE: tl.constexpr, REFERENCE_GRAD: tl.constexpr,
):  # fmt: skip
    """dQ of equations 9 and 11 for blocks_a_program blocks of rows of one head; dK_t and dV_t too.

    Grid (B·H, programs along the rows). Writes grad_query [B, N, H, D]; grad_key and grad_value,
    the sums over this program's rows, [B, programs, M, H, D], not with RELOAD; and, for the kernel
    of the keys, statistics [B, H, N, 8]: peak, inverse and rowsum(A_t ∘ dA_t) of A_t's rows, those
    of A_r's, and two that say nothing. Each of these may be None. Gradients that did not come
    (grad_output, grad_subject_loss, grad_attn_probs) are None, and so are value without the
    first and reference_key without the second. RELOAD loads the keys anew for each block: each set
    where it is used or, PIPELINED, all when the block begins, in truth a block before. PREFETCH
    asks for the rows of the next block before this one is done, and holds them in registers until
    then; LATE asks for the gradients of a block's outputs when its queries' scores are there, and
    their tile may take the queries' memory.
    """
    HAS_MASK: tl.constexpr = key_mask is not None
    HAS_WEIGHTS: tl.constexpr = token_weights is not None
    MASK_MAIN: tl.constexpr = HAS_MASK or (KEY_TAIL == 0 and not FULL_KEYS)
    HAS_OUTPUT: tl.constexpr = grad_output is not None
    HAS_ALIGNMENT: tl.constexpr = grad_subject_loss is not None
    HAS_MAPS: tl.constexpr = grad_attn_probs is not None
    EXACT: tl.constexpr = query.dtype.element_ty == tl.float32
    SUMS_KEY: tl.constexpr = grad_key is not None
    SUMS_VALUE: tl.constexpr = grad_value is not None
    # Each set of keys where it is used; else all of them when the turn begins.
    AT_USE: tl.constexpr = RELOAD and not PIPELINED
    # Whether the keys of the main tile are too few to be shared by the warps.
    TURNED: tl.constexpr = KEY_MAIN < 64
    batch = tl.program_id(0) // heads
    head = tl.program_id(0) % heads

    valid_main, valid_tail = valid_keys(
        key_mask, batch, mask_stride_b, keys, KEY_MAIN, KEY_TAIL, HAS_MASK
    )
    key += head_offset(batch, head, key_stride_b, key_stride_h, ALIGNMENT)
    if HAS_OUTPUT:
        value += head_offset(batch, head, value_stride_b, value_stride_h, ALIGNMENT)
        grad_output += head_offset(batch, head, output_stride_b, output_stride_h, ALIGNMENT)
    weight_main = valid_main
    weight_tail = valid_tail
    subject_loss_factor = 0.0
    if HAS_ALIGNMENT:
        reference_key += head_offset(batch, head, reference_stride_b, reference_stride_h, ALIGNMENT)
        weight_main, weight_tail = load_weights(
            token_weights, batch, weight_stride_b, keys, KEY_MAIN, KEY_TAIL, HAS_WEIGHTS
        )
        subject_loss_factor = tl.load(grad_subject_loss + batch * subject_loss_stride_b) * (
            2.0 / heads
        )
    if HAS_MAPS:
        probs_positions += batch.to(tl.int64) * token_stride_b
        grad_attn_probs += head_offset(batch, head, probs_stride_b, probs_stride_h, 1)

    query += head_offset(batch, head, query_stride_b, query_stride_h, ALIGNMENT)
    if grad_query is not None:
        grad_query += head_offset(batch * rows, head, heads * DIM, DIM, ALIGNMENT)
    if statistics is not None:
        statistics += tl.program_id(0).to(tl.int64) * STATISTICS * rows
    first = tl.program_id(1) * blocks_a_program
    last = tl.minimum(first + blocks_a_program, tl.cdiv(rows, BLOCK))
    end = tl.minimum(last * BLOCK, rows)
    if PREFETCH:
        # Together with the keys: one wait.
        next_queries, next_grad_outputs = load_pair(
            query, grad_output, first, query_stride_n, output_stride_n, end, HAS_OUTPUT,
            BLOCK, DIM, DIM_MAIN, DIM_TAIL, ALIGNMENT, UPCAST,
        )  # fmt: skip
    if not RELOAD:
        (key_main, key_tail, value_main, value_tail,
         reference_main, reference_tail) = load_operands(
            key, value, reference_key, key_stride_m, value_stride_m, reference_stride_m, keys,
            valid_main, valid_tail, HAS_OUTPUT, HAS_ALIGNMENT, DIM, DIM_MAIN, DIM_TAIL,
            KEY_MAIN, KEY_TAIL, FULL_KEYS, HAS_MASK, ALIGNMENT, UPCAST,
        )  # fmt: skip
    if SUMS_KEY:
        key_sum = zero_keys(KEY_MAIN, DIM_MAIN, DIM_TAIL, TURNED)
        key_tail_sum = key_sum
        if KEY_TAIL > 0:
            key_tail_sum = zero_keys(KEY_TAIL, DIM_MAIN, DIM_TAIL, True)
    if SUMS_VALUE:
        value_sum = zero_keys(KEY_MAIN, DIM_MAIN, DIM_TAIL, TURNED)
        value_tail_sum = value_sum
        if KEY_TAIL > 0:
            value_tail_sum = zero_keys(KEY_TAIL, DIM_MAIN, DIM_TAIL, True)
    # Without hoisting the loop keeps its shared-memory descriptors out of the registers.
    for step in tl.range(0, last - first, disable_licm=True):
        block = first + step
        row = block * BLOCK + tl.arange(0, BLOCK)
        row_valid = row < rows
        if PREFETCH:
            queries = next_queries
            grad_outputs = next_grad_outputs
        elif LATE:
            queries = load_block(
                query, block, query_stride_n, end,
                BLOCK, DIM, DIM_MAIN, DIM_TAIL, ALIGNMENT, UPCAST,
            )  # fmt: skip
        else:
            queries, grad_outputs = load_pair(
                query, grad_output, block, query_stride_n, output_stride_n, end, HAS_OUTPUT,
                BLOCK, DIM, DIM_MAIN, DIM_TAIL, ALIGNMENT, UPCAST,
            )  # fmt: skip
        if PIPELINED:
            (key_main, key_tail, value_main, value_tail,
             reference_main, reference_tail) = load_operands(
                key, value, reference_key, key_stride_m, value_stride_m, reference_stride_m, keys,
                valid_main, valid_tail, HAS_OUTPUT, HAS_ALIGNMENT, DIM, DIM_MAIN, DIM_TAIL,
                KEY_MAIN, KEY_TAIL, FULL_KEYS, HAS_MASK, ALIGNMENT, UPCAST,
            )  # fmt: skip
        if AT_USE:
            key_main, key_tail = load_tiles(
                key, key_stride_m, keys, valid_main, valid_tail,
                DIM, DIM_MAIN, DIM_TAIL, KEY_MAIN, KEY_TAIL, FULL_KEYS, HAS_MASK, ALIGNMENT, UPCAST,
            )  # fmt: skip
        main, tail = scores(queries, key_main, key_tail, DIM_TAIL, KEY_TAIL)
        main, tail, peak, inverse = softmax(
            main, tail, valid_main, valid_tail, scale_log2, KEY_TAIL, MASK_MAIN, HAS_MASK, EXACT
        )
        if HAS_ALIGNMENT and not AT_USE:
            # The last use of the queries' tile before the sums.
            other_main, other_tail = scores(
                queries, reference_main, reference_tail, DIM_TAIL, KEY_TAIL
            )
            (other_main, other_tail, other_peak, other_inverse,
             pull_main, pull_tail) = pull_to_reference(
                main, tail, other_main, other_tail, valid_main, valid_tail,
                weight_main, weight_tail, subject_loss_factor, scale_log2,
                KEY_TAIL, MASK_MAIN, HAS_MASK, EXACT,
            )  # fmt: skip
            grad_main = pull_main
            grad_tail = pull_tail
        else:
            grad_main = tl.zeros_like(main)
            grad_tail = tl.zeros_like(tail)
        if LATE and HAS_OUTPUT:
            grad_outputs = load_block(
                grad_output, block, output_stride_n, end,
                BLOCK, DIM, DIM_MAIN, DIM_TAIL, ALIGNMENT, UPCAST,
            )  # fmt: skip
        if SUMS_VALUE:
            value_sum = accumulate_keys(value_sum, main, grad_outputs, DIM_TAIL, TURNED)
            if KEY_TAIL > 0:
                value_tail_sum = accumulate_keys(value_tail_sum, tail, grad_outputs, DIM_TAIL, True)
        if HAS_OUTPUT:
            if AT_USE:
                value_main, value_tail = load_tiles(
                    value, value_stride_m, keys, valid_main, valid_tail,
                    DIM, DIM_MAIN, DIM_TAIL, KEY_MAIN, KEY_TAIL, FULL_KEYS, HAS_MASK, ALIGNMENT,
                    UPCAST,
                )  # fmt: skip
            grad_main = add_products(grad_main, grad_outputs, value_main, DIM_TAIL)
            if KEY_TAIL > 0:
                grad_tail = add_products(grad_tail, grad_outputs, value_tail, DIM_TAIL)
        if HAS_MAPS:
            for token in range(tokens):
                gradient = tl.load(grad_attn_probs + token * rows + row, mask=row_valid, other=0.0)
                grad_main, grad_tail = add_to_column(
                    grad_main, grad_tail, tl.load(probs_positions + token), gradient * map_factor,
                    KEY_MAIN, KEY_TAIL,
                )  # fmt: skip
        if HAS_ALIGNMENT and AT_USE:
            reference_main, reference_tail = load_tiles(
                reference_key, reference_stride_m, keys, valid_main, valid_tail,
                DIM, DIM_MAIN, DIM_TAIL, KEY_MAIN, KEY_TAIL, FULL_KEYS, HAS_MASK, ALIGNMENT, UPCAST,
            )  # fmt: skip
            other_main, other_tail = scores(
                queries, reference_main, reference_tail, DIM_TAIL, KEY_TAIL
            )
            (other_main, other_tail, other_peak, other_inverse,
             pull_main, pull_tail) = pull_to_reference(
                main, tail, other_main, other_tail, valid_main, valid_tail,
                weight_main, weight_tail, subject_loss_factor, scale_log2,
                KEY_TAIL, MASK_MAIN, HAS_MASK, EXACT,
            )  # fmt: skip
            grad_main += pull_main
            if KEY_TAIL > 0:
                grad_tail += pull_tail
        grad_main, grad_tail, mean = softmax_gradient(main, tail, grad_main, grad_tail, KEY_TAIL)
        if PREFETCH:
            # Late enough to find registers, early enough to arrive behind what is left to do.
            next_queries, next_grad_outputs = load_pair(
                query, grad_output, block + 1, query_stride_n, output_stride_n, end, HAS_OUTPUT,
                BLOCK, DIM, DIM_MAIN, DIM_TAIL, ALIGNMENT, UPCAST,
            )  # fmt: skip
        if SUMS_KEY:
            key_sum = accumulate_keys(key_sum, grad_main, queries, DIM_TAIL, TURNED)
            if KEY_TAIL > 0:
                key_tail_sum = accumulate_keys(key_tail_sum, grad_tail, queries, DIM_TAIL, True)
        if AT_USE:
            # Not the tiles from above, which would fill the registers until here.
            tl.debug_barrier()
            key_main, key_tail = load_tiles(
                key, key_stride_m, keys, valid_main, valid_tail,
                DIM, DIM_MAIN, DIM_TAIL, KEY_MAIN, KEY_TAIL, FULL_KEYS, HAS_MASK, ALIGNMENT, UPCAST,
            )  # fmt: skip
        sums = accumulate(zero_rows(BLOCK, DIM_MAIN, DIM_TAIL), grad_main, key_main, DIM_TAIL)
        if KEY_TAIL > 0:
            sums = accumulate(sums, grad_tail, key_tail, DIM_TAIL)
        if REFERENCE_GRAD:
            pull_main, pull_tail, other_mean = softmax_gradient(
                other_main, other_tail, -pull_main, -pull_tail, KEY_TAIL
            )
            if AT_USE:
                reference_main, reference_tail = load_tiles(
                    reference_key, reference_stride_m, keys, valid_main, valid_tail,
                    DIM, DIM_MAIN, DIM_TAIL, KEY_MAIN, KEY_TAIL, FULL_KEYS, HAS_MASK, ALIGNMENT,
                    UPCAST,
                )  # fmt: skip
            sums = accumulate(sums, pull_main, reference_main, DIM_TAIL)
            if KEY_TAIL > 0:
                sums = accumulate(sums, pull_tail, reference_tail, DIM_TAIL)
        if grad_query is not None:
            sums = scale_rows(sums, scale, DIM_TAIL)
            target = grad_query + block_offset(block, BLOCK, heads * DIM, ALIGNMENT)
            target_offsets = row_offsets(tl.arange(0, BLOCK), heads * DIM, ALIGNMENT)
            store_rows(target, target_offsets, row_valid, sums, DIM, DIM_MAIN, DIM_TAIL)
        if statistics is not None:
            # One tile: each store of its own would take two barriers to lay out.
            column = tl.arange(0, STATISTICS)[None, :]
            kept = tl.where(column == 0, peak[:, None], inverse[:, None])
            kept = tl.where(column == 2, mean[:, None], kept)
            if HAS_ALIGNMENT:
                kept = tl.where(column == 3, other_peak[:, None], kept)
                kept = tl.where(column == 4, other_inverse[:, None], kept)
            if REFERENCE_GRAD:
                kept = tl.where(column == 5, other_mean[:, None], kept)
            places = statistics + (row * STATISTICS)[:, None] + column
            tl.store(places, kept, mask=row_valid[:, None])

    place = batch * tl.num_programs(1) + tl.program_id(1)
    start = head_offset(place * keys, head, heads * DIM, DIM, ALIGNMENT)
    if SUMS_KEY:
        store_key_tiles(
            grad_key, start, heads * DIM, keys, key_sum, key_tail_sum, scale,
            KEY_MAIN, KEY_TAIL, DIM, DIM_MAIN, DIM_TAIL, ALIGNMENT, TURNED,
        )  # fmt: skip
    if SUMS_VALUE:
        store_key_tiles(
            grad_value, start, heads * DIM, keys, value_sum, value_tail_sum, 1.0,
            KEY_MAIN, KEY_TAIL, DIM, DIM_MAIN, DIM_TAIL, ALIGNMENT, TURNED,
        )  # fmt: skip
