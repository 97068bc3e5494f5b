"""Backward kernel for keys, values and reference keys: partial sums over rows."""

from __future__ import annotations

import triton
import triton.language as tl

from .memory import (
    STATISTICS,
    block_offset,
    head_offset,
    load_operands,
    load_pair,
    load_weights,
    valid_keys,
)
from .primitives import (
    COUNTS,
    add_products,
    exponentials,
    inner_products,
    normalised,
)
from .reduce import accumulate_keys, store_key_tiles, zero_keys


@triton.jit
def add_key_gradients(
    key, value, reference, weights, columns, valid, queries, grad_outputs,
    peak, inverse, mean, other_peak, other_inverse, other_mean, key_sum, value_sum, reference_sum,
    probs_positions, grad_attn_probs, tokens, map_factor, subject_loss_factor, scale_log2, row,
    rows,
    DIM_TAIL: tl.constexpr, HAS_MASK: tl.constexpr, HAS_OUTPUT: tl.constexpr,
    HAS_ALIGNMENT: tl.constexpr, HAS_MAPS: tl.constexpr, NEEDS_KEY: tl.constexpr,
    NEEDS_VALUE: tl.constexpr, NEEDS_REFERENCE: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """Add what one block of rows gives to dK_t, dV_t and dK_r of one tile of keys."""
    scores = inner_products(queries, key, DIM_TAIL)
    if HAS_MASK:
        scores = tl.where(valid[None, :], scores, float("-inf"))
    EXACT: tl.constexpr = queries[0].dtype == tl.float32
    probability = normalised(exponentials(scores, peak, scale_log2, EXACT), inverse)
    if NEEDS_VALUE:
        value_sum = accumulate_keys(value_sum, probability, grad_outputs, DIM_TAIL, TURNED)
    if HAS_ALIGNMENT:
        scores = inner_products(queries, reference, DIM_TAIL)
        if HAS_MASK:
            scores = tl.where(valid[None, :], scores, float("-inf"))
        other = normalised(exponentials(scores, other_peak, scale_log2, EXACT), other_inverse)
        pull = (probability - other) * (weights * subject_loss_factor)[None, :]
        if NEEDS_REFERENCE:
            gradient = -other * (pull + other_mean[:, None])
            reference_sum = accumulate_keys(reference_sum, gradient, queries, DIM_TAIL, TURNED)
    if NEEDS_KEY:
        gradient = tl.zeros_like(probability)
        if HAS_ALIGNMENT:
            gradient = pull
        if HAS_OUTPUT:
            gradient = add_products(gradient, grad_outputs, value, DIM_TAIL)
        if HAS_MAPS:
            for token in range(tokens):
                picked = tl.load(grad_attn_probs + token * rows + row, mask=row < rows, other=0.0)
                column = tl.load(probs_positions + token)
                picked = (picked * map_factor)[:, None]
                gradient += tl.where(columns[None, :] == column, picked, 0.0)
        gradient = probability * (gradient - mean[:, None])
        key_sum = accumulate_keys(key_sum, gradient, queries, DIM_TAIL, TURNED)
    return key_sum, value_sum, reference_sum


@triton.jit(do_not_specialize=COUNTS)
def cross_attention_backward_key_value(
    query, key, value, reference_key, token_weights, key_mask, probs_positions,
    grad_output, grad_subject_loss, grad_attn_probs, statistics, grad_key, grad_value,
    grad_reference_key,
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
    KEY_TILES: tl.constexpr, BLOCK: tl.constexpr, ALIGNMENT: tl.constexpr, UPCAST: tl.constexpr,
    RELOAD: tl.constexpr, PIPELINED: tl.constexpr,
):  # fmt: skip
    """dK_t, dV_t and dK_r of equations 9 and 11, summed over blocks_a_program blocks of rows.

    Grid (B·H·KEY_TILES, splits of the rows). With more than one tile of keys, of KEY_MAIN each, a
    program has one; programs of the same rows are neighbours and share them in the L2 cache. Reads
    the statistics of the query kernel; writes grad_key, grad_value and grad_reference_key, each
    [B, splits, M, H, D] or None when not wanted. Gradients that did not come (grad_output,
    grad_subject_loss, grad_attn_probs) are None; value is None without grad_output,
    reference_key without grad_subject_loss.
    """
    HAS_MASK: tl.constexpr = key_mask is not None
    HAS_WEIGHTS: tl.constexpr = token_weights is not None
    NEEDS_KEY: tl.constexpr = grad_key is not None
    NEEDS_VALUE: tl.constexpr = grad_value is not None
    NEEDS_REFERENCE: tl.constexpr = grad_reference_key is not None
    HAS_OUTPUT: tl.constexpr = grad_output is not None and NEEDS_KEY
    HAS_ALIGNMENT: tl.constexpr = grad_subject_loss is not None and (NEEDS_KEY or NEEDS_REFERENCE)
    HAS_MAPS: tl.constexpr = grad_attn_probs is not None and NEEDS_KEY
    # Whether the keys of the main tile are too few to be shared by the warps.
    TURNED: tl.constexpr = KEY_MAIN < 64
    plane = tl.program_id(0) // KEY_TILES
    batch = plane // heads
    head = plane % heads
    # From here on keys are counted from the program's first one, but for the columns of maps.
    first_key = 0
    own_keys = keys
    if KEY_TILES > 1:
        tile = tl.program_id(0) % KEY_TILES
        first_key = tile * KEY_MAIN
        own_keys = keys - first_key
        key += block_offset(tile, KEY_MAIN, key_stride_m, ALIGNMENT)
        if HAS_OUTPUT:
            value += block_offset(tile, KEY_MAIN, value_stride_m, ALIGNMENT)
        if HAS_ALIGNMENT:
            reference_key += block_offset(tile, KEY_MAIN, reference_stride_m, ALIGNMENT)
        if HAS_WEIGHTS:
            token_weights += first_key
        if HAS_MASK:
            key_mask += first_key

    valid_main, valid_tail = valid_keys(
        key_mask, batch, mask_stride_b, own_keys, KEY_MAIN, KEY_TAIL, HAS_MASK
    )
    key += head_offset(batch, head, key_stride_b, key_stride_h, ALIGNMENT)
    if HAS_OUTPUT:
        value += head_offset(batch, head, value_stride_b, value_stride_h, ALIGNMENT)
    weight_main = valid_main
    weight_tail = valid_tail
    subject_loss_factor = 0.0
    if HAS_ALIGNMENT:
        reference_key += head_offset(batch, head, reference_stride_b, reference_stride_h, ALIGNMENT)
        weight_main, weight_tail = load_weights(
            token_weights, batch, weight_stride_b, own_keys, KEY_MAIN, KEY_TAIL, HAS_WEIGHTS
        )
        subject_loss_factor = tl.load(grad_subject_loss + batch * subject_loss_stride_b) * (
            2.0 / heads
        )
    if not RELOAD:
        (key_main, key_tail, value_main, value_tail,
         reference_main, reference_tail) = load_operands(
            key, value, reference_key, key_stride_m, value_stride_m, reference_stride_m, own_keys,
            valid_main, valid_tail, HAS_OUTPUT, HAS_ALIGNMENT, DIM, DIM_MAIN, DIM_TAIL,
            KEY_MAIN, KEY_TAIL, FULL_KEYS, HAS_MASK, ALIGNMENT, UPCAST,
        )  # fmt: skip
    if HAS_MAPS:
        probs_positions += batch.to(tl.int64) * token_stride_b
        grad_attn_probs += head_offset(batch, head, probs_stride_b, probs_stride_h, 1)
    if grad_output is not None:
        grad_output += head_offset(batch, head, output_stride_b, output_stride_h, ALIGNMENT)

    query += head_offset(batch, head, query_stride_b, query_stride_h, ALIGNMENT)
    statistics += plane.to(tl.int64) * STATISTICS * rows
    columns_main = first_key + tl.arange(0, KEY_MAIN)
    key_sum = zero_keys(KEY_MAIN, DIM_MAIN, DIM_TAIL, TURNED)
    value_sum = zero_keys(KEY_MAIN, DIM_MAIN, DIM_TAIL, TURNED)
    reference_sum = zero_keys(KEY_MAIN, DIM_MAIN, DIM_TAIL, TURNED)
    key_tail_sum = key_sum
    value_tail_sum = value_sum
    reference_tail_sum = reference_sum
    if KEY_TAIL > 0:
        columns_tail = KEY_MAIN + tl.arange(0, KEY_TAIL)
        key_tail_sum = zero_keys(KEY_TAIL, DIM_MAIN, DIM_TAIL, True)
        value_tail_sum = zero_keys(KEY_TAIL, DIM_MAIN, DIM_TAIL, True)
        reference_tail_sum = zero_keys(KEY_TAIL, DIM_MAIN, DIM_TAIL, True)
    first = tl.program_id(1) * blocks_a_program
    last = tl.minimum(first + blocks_a_program, tl.cdiv(rows, BLOCK))
    # Without hoisting the loop keeps its shared-memory descriptors out of the registers.
    for step in tl.range(0, last - first, disable_licm=True):
        block = first + step
        row = block * BLOCK + tl.arange(0, BLOCK)
        row_valid = row < rows
        # All that a block needs is asked for at once: one wait. Rows past the end get
        # probability 0.
        kept = statistics + row * STATISTICS
        peak = tl.load(kept, mask=row_valid, other=0.0)
        inverse = tl.load(kept + 1, mask=row_valid, other=0.0)
        mean = peak
        other_peak = peak
        other_inverse = peak
        other_mean = peak
        if NEEDS_KEY:
            mean = tl.load(kept + 2, mask=row_valid, other=0.0)
        if HAS_ALIGNMENT:
            other_peak = tl.load(kept + 3, mask=row_valid, other=0.0)
            other_inverse = tl.load(kept + 4, mask=row_valid, other=0.0)
        if NEEDS_REFERENCE:
            other_mean = tl.load(kept + 5, mask=row_valid, other=0.0)
        queries, grad_outputs = load_pair(
            query, grad_output, block, query_stride_n, output_stride_n, rows,
            grad_output is not None, BLOCK, DIM, DIM_MAIN, DIM_TAIL, ALIGNMENT, UPCAST,
        )  # fmt: skip
        if RELOAD:
            if not PIPELINED:
                # Keeps the loads, and so the keys' registers, from being hoisted out of the loop.
                tl.debug_barrier()
            (key_main, key_tail, value_main, value_tail,
             reference_main, reference_tail) = load_operands(
                key, value, reference_key, key_stride_m, value_stride_m, reference_stride_m,
                own_keys, valid_main, valid_tail, HAS_OUTPUT, HAS_ALIGNMENT, DIM, DIM_MAIN,
                DIM_TAIL, KEY_MAIN, KEY_TAIL, FULL_KEYS, HAS_MASK, ALIGNMENT, UPCAST,
            )  # fmt: skip
        key_sum, value_sum, reference_sum = add_key_gradients(
            key_main, value_main, reference_main, weight_main, columns_main, valid_main,
            queries, grad_outputs, peak, inverse, mean, other_peak, other_inverse, other_mean,
            key_sum, value_sum, reference_sum, probs_positions, grad_attn_probs, tokens, map_factor,
            subject_loss_factor, scale_log2, row, rows, DIM_TAIL, HAS_MASK, HAS_OUTPUT,
            HAS_ALIGNMENT, HAS_MAPS, NEEDS_KEY, NEEDS_VALUE, NEEDS_REFERENCE, TURNED,
        )  # fmt: skip
        if KEY_TAIL > 0:
            key_tail_sum, value_tail_sum, reference_tail_sum = add_key_gradients(
                key_tail, value_tail, reference_tail, weight_tail, columns_tail, valid_tail,
                queries, grad_outputs, peak, inverse, mean, other_peak, other_inverse, other_mean,
                key_tail_sum, value_tail_sum, reference_tail_sum, probs_positions,
                grad_attn_probs, tokens,
                map_factor, subject_loss_factor, scale_log2, row, rows, DIM_TAIL, HAS_MASK,
                HAS_OUTPUT, HAS_ALIGNMENT, HAS_MAPS, NEEDS_KEY, NEEDS_VALUE, NEEDS_REFERENCE, True,
            )  # fmt: skip

    place = batch * tl.num_programs(1) + tl.program_id(1)
    start = head_offset(place * keys, head, heads * DIM, DIM, ALIGNMENT)
    stride = heads * DIM
    if KEY_TILES > 1:
        start += block_offset(tile, KEY_MAIN, stride, ALIGNMENT)
    if NEEDS_VALUE:
        store_key_tiles(
            grad_value, start, stride, own_keys, value_sum, value_tail_sum, 1.0,
            KEY_MAIN, KEY_TAIL, DIM, DIM_MAIN, DIM_TAIL, ALIGNMENT, TURNED,
        )  # fmt: skip
    if NEEDS_KEY:
        store_key_tiles(
            grad_key, start, stride, own_keys, key_sum, key_tail_sum, scale,
            KEY_MAIN, KEY_TAIL, DIM, DIM_MAIN, DIM_TAIL, ALIGNMENT, TURNED,
        )  # fmt: skip
    if NEEDS_REFERENCE:
        store_key_tiles(
            grad_reference_key, start, stride, own_keys, reference_sum, reference_tail_sum, scale,
            KEY_MAIN, KEY_TAIL, DIM, DIM_MAIN, DIM_TAIL, ALIGNMENT, TURNED,
        )  # fmt: skip
