"""Backward kernels for keys, values and reference keys: partial sums over rows, then their total."""

from __future__ import annotations

import triton
import triton.language as tl

from .primitives import (
    accumulate,
    block_offset,
    head_offset,
    inner_products,
    load_keys,
    load_rows,
    load_weights,
    row_offsets,
    scale_rows,
    store_rows,
    valid_keys,
    zero_rows,
)


@triton.jit
def add_key_gradients(
    key, value, reference, weights, columns, valid, queries, grad_outputs,
    log_sum, mean, other_log_sum, other_mean, key_sum, value_sum, reference_sum,
    map_tokens, grad_maps, tokens, map_factor, alignment_factor, scale_log2, row, rows,
    DIM_TAIL: tl.constexpr, HAS_MASK: tl.constexpr, HAS_OUTPUT: tl.constexpr,
    HAS_ALIGNMENT: tl.constexpr, HAS_MAPS: tl.constexpr, NEEDS_KEY: tl.constexpr,
    NEEDS_VALUE: tl.constexpr, NEEDS_REFERENCE: tl.constexpr,
):  # fmt: skip
    """Add what one block of rows gives to dK_t, dV_t and dK_r of one tile of keys.

    Keys are the rows of the tile and queries its columns, so that the probabilities feed the matrix
    unit from registers and no sum runs across the keys.
    """
    scores = inner_products(queries, key, DIM_TAIL)
    if HAS_MASK:
        scores = tl.where(valid[None, :], scores, float("-inf"))
    probability = tl.exp2(scores * scale_log2 - log_sum[:, None])
    if NEEDS_VALUE:
        value_sum = accumulate(value_sum, tl.trans(probability), grad_outputs, DIM_TAIL)
    if NEEDS_KEY or NEEDS_REFERENCE:
        if HAS_ALIGNMENT:
            scores = inner_products(queries, reference, DIM_TAIL)
            if HAS_MASK:
                scores = tl.where(valid[None, :], scores, float("-inf"))
            other = tl.exp2(scores * scale_log2 - other_log_sum[:, None])
            pull = (probability - other) * (weights * alignment_factor)[None, :]
            if NEEDS_REFERENCE:
                gradient = -other * (pull + other_mean[:, None])
                reference_sum = accumulate(reference_sum, tl.trans(gradient), queries, DIM_TAIL)
    if NEEDS_KEY:
        gradient = tl.zeros_like(probability) - mean[:, None]
        if HAS_ALIGNMENT:
            gradient += pull
        if HAS_OUTPUT:
            gradient += inner_products(grad_outputs, value, DIM_TAIL)
        if HAS_MAPS:
            for token in range(tokens):
                picked = tl.load(grad_maps + token * rows + row, mask=row < rows, other=0.0)
                column = tl.load(map_tokens + token)
                picked = (picked * map_factor)[:, None]
                gradient += tl.where(columns[None, :] == column, picked, 0.0)
        key_sum = accumulate(key_sum, tl.trans(probability * gradient), queries, DIM_TAIL)
    return key_sum, value_sum, reference_sum


@triton.jit
def add_tail_gradients(
    key, value, reference, weights, columns, valid, queries, grad_outputs,
    log_sum, mean, other_log_sum, other_mean, key_sum, value_sum, reference_sum,
    map_tokens, grad_maps, tokens, map_factor, alignment_factor, scale_log2, row, rows,
    DIM_TAIL: tl.constexpr, HAS_MASK: tl.constexpr, HAS_OUTPUT: tl.constexpr,
    HAS_ALIGNMENT: tl.constexpr, HAS_MAPS: tl.constexpr, NEEDS_KEY: tl.constexpr,
    NEEDS_VALUE: tl.constexpr, NEEDS_REFERENCE: tl.constexpr,
):  # fmt: skip
    """Add what one block of rows gives to dK_t, dV_t and dK_r of one tile of keys.

    Keys are the rows of the tile and queries its columns, so that the probabilities feed the matrix
    unit from registers and no sum runs across the keys.
    """
    scores = inner_products(key, queries, DIM_TAIL)
    if HAS_MASK:
        scores = tl.where(valid[:, None], scores, float("-inf"))
    probability = tl.exp2(scores * scale_log2 - log_sum[None, :])
    if NEEDS_VALUE:
        value_sum = accumulate(value_sum, probability, grad_outputs, DIM_TAIL)
    if NEEDS_KEY or NEEDS_REFERENCE:
        if HAS_ALIGNMENT:
            scores = inner_products(reference, queries, DIM_TAIL)
            if HAS_MASK:
                scores = tl.where(valid[:, None], scores, float("-inf"))
            other = tl.exp2(scores * scale_log2 - other_log_sum[None, :])
            pull = (probability - other) * (weights * alignment_factor)[:, None]
            if NEEDS_REFERENCE:
                gradient = -other * (pull + other_mean[None, :])
                reference_sum = accumulate(reference_sum, gradient, queries, DIM_TAIL)
    if NEEDS_KEY:
        gradient = tl.zeros_like(probability) - mean[None, :]
        if HAS_ALIGNMENT:
            gradient += pull
        if HAS_OUTPUT:
            gradient += inner_products(value, grad_outputs, DIM_TAIL)
        if HAS_MAPS:
            for token in range(tokens):
                picked = tl.load(grad_maps + token * rows + row, mask=row < rows, other=0.0)
                column = tl.load(map_tokens + token)
                picked = (picked * map_factor)[None, :]
                gradient += tl.where(columns[:, None] == column, picked, 0.0)
        key_sum = accumulate(key_sum, probability * gradient, queries, DIM_TAIL)
    return key_sum, value_sum, reference_sum


@triton.jit
def cross_attention_backward_key_value(
    query, key, value, reference_key, token_weights, key_mask, map_tokens,
    grad_output, grad_alignment, grad_maps, statistics, grad_key, grad_value, grad_reference_key,
    query_stride_b, query_stride_h, query_stride_n,
    key_stride_b, key_stride_h, key_stride_m,
    value_stride_b, value_stride_h, value_stride_m,
    reference_stride_b, reference_stride_h, reference_stride_m,
    output_stride_b, output_stride_h, output_stride_n,
    weight_stride_b, mask_stride_b, token_stride_b, alignment_stride_b,
    map_stride_b, map_stride_h, map_factor,
    heads, rows, keys, tokens, blocks_a_program, scale_log2, scale,
    DIM: tl.constexpr, DIM_MAIN: tl.constexpr, DIM_TAIL: tl.constexpr,
    KEY_MAIN: tl.constexpr, KEY_TAIL: tl.constexpr, FULL_KEYS: tl.constexpr,
    BLOCK: tl.constexpr, ALIGNMENT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dK_t, dV_t and dK_r of equations 9 and 11, summed over blocks_a_program blocks of rows.

    Grid (B·H, splits of the rows). Reads the statistics of the query kernel; writes grad_key,
    grad_value and grad_reference_key, each [B, splits, M, H, D] or None when not wanted. Gradients
    that did not come (grad_output, grad_alignment, grad_maps) are None and cost nothing; value is
    None without grad_output, reference_key without grad_alignment.
    """
    HAS_MASK: tl.constexpr = key_mask is not None
    NEEDS_KEY: tl.constexpr = grad_key is not None
    NEEDS_VALUE: tl.constexpr = grad_value is not None
    NEEDS_REFERENCE: tl.constexpr = grad_reference_key is not None
    HAS_OUTPUT: tl.constexpr = grad_output is not None and NEEDS_KEY
    HAS_ALIGNMENT: tl.constexpr = grad_alignment is not None and (NEEDS_KEY or NEEDS_REFERENCE)
    HAS_MAPS: tl.constexpr = grad_maps is not None and NEEDS_KEY
    batch = tl.program_id(0) // heads
    head = tl.program_id(0) % heads

    valid_main, valid_tail = valid_keys(
        key_mask, batch, mask_stride_b, keys, KEY_MAIN, KEY_TAIL, HAS_MASK
    )
    key_main, key_tail = load_keys(
        key, batch, head, key_stride_b, key_stride_h, key_stride_m, keys,
        DIM, DIM_MAIN, DIM_TAIL, KEY_MAIN, KEY_TAIL, FULL_KEYS, ALIGNMENT, UPCAST,
    )  # fmt: skip
    value_main = key_main
    value_tail = key_tail
    reference_main = key_main
    reference_tail = key_tail
    weight_main = valid_main
    weight_tail = valid_tail
    alignment_factor = 0.0
    if HAS_OUTPUT:
        value_main, value_tail = load_keys(
            value, batch, head, value_stride_b, value_stride_h, value_stride_m, keys,
            DIM, DIM_MAIN, DIM_TAIL, KEY_MAIN, KEY_TAIL, FULL_KEYS, ALIGNMENT, UPCAST,
        )  # fmt: skip
    if HAS_ALIGNMENT:
        reference_main, reference_tail = load_keys(
            reference_key, batch, head,
            reference_stride_b, reference_stride_h, reference_stride_m, keys,
            DIM, DIM_MAIN, DIM_TAIL, KEY_MAIN, KEY_TAIL, FULL_KEYS, ALIGNMENT, UPCAST,
        )  # fmt: skip
        HAS_WEIGHTS: tl.constexpr = token_weights is not None
        weight_main, weight_tail = load_weights(
            token_weights, batch, weight_stride_b, keys, KEY_MAIN, KEY_TAIL, HAS_WEIGHTS
        )
        alignment_factor = tl.load(grad_alignment + batch * alignment_stride_b) * (2.0 / heads)
    if HAS_MAPS:
        map_tokens += batch.to(tl.int64) * token_stride_b
        grad_maps += head_offset(batch, head, map_stride_b, map_stride_h, 1)
    if grad_output is not None:
        grad_output += head_offset(batch, head, output_stride_b, output_stride_h, ALIGNMENT)

    query += head_offset(batch, head, query_stride_b, query_stride_h, ALIGNMENT)
    query_offsets = row_offsets(tl.arange(0, BLOCK), query_stride_n, ALIGNMENT)
    output_offsets = row_offsets(tl.arange(0, BLOCK), output_stride_n, ALIGNMENT)
    statistics += tl.program_id(0).to(tl.int64) * 4 * rows
    columns_main = tl.arange(0, KEY_MAIN)
    key_sum = zero_rows(KEY_MAIN, DIM_MAIN, DIM_TAIL)
    value_sum = zero_rows(KEY_MAIN, DIM_MAIN, DIM_TAIL)
    reference_sum = zero_rows(KEY_MAIN, DIM_MAIN, DIM_TAIL)
    if KEY_TAIL > 0:
        columns_tail = KEY_MAIN + tl.arange(0, KEY_TAIL)
        key_tail_sum = zero_rows(KEY_TAIL, DIM_MAIN, DIM_TAIL)
        value_tail_sum = zero_rows(KEY_TAIL, DIM_MAIN, DIM_TAIL)
        reference_tail_sum = zero_rows(KEY_TAIL, DIM_MAIN, DIM_TAIL)
    first = tl.program_id(1) * blocks_a_program
    last = tl.minimum(first + blocks_a_program, tl.cdiv(rows, BLOCK))
    # Without hoisting the loop keeps its shared-memory descriptors out of the registers.
    for step in tl.range(0, last - first, disable_licm=True):
        block = first + step
        row = block * BLOCK + tl.arange(0, BLOCK)
        row_valid = row < rows
        source = query + block_offset(block, BLOCK, query_stride_n, ALIGNMENT)
        queries = load_rows(source, query_offsets, row_valid, DIM, DIM_MAIN, DIM_TAIL, True, UPCAST)
        grad_outputs = queries
        if grad_output is not None:
            source = grad_output + block_offset(block, BLOCK, output_stride_n, ALIGNMENT)
            grad_outputs = load_rows(
                source, output_offsets, row_valid, DIM, DIM_MAIN, DIM_TAIL, True, UPCAST
            )
        # Rows past the end get probability 0 from an infinite sum.
        log_sum = tl.load(statistics + row, mask=row_valid, other=float("inf"))
        mean = log_sum
        other_log_sum = log_sum
        other_mean = log_sum
        if NEEDS_KEY:
            mean = tl.load(statistics + rows + row, mask=row_valid, other=0.0)
        if HAS_ALIGNMENT:
            place = statistics + 2 * rows + row
            other_log_sum = tl.load(place, mask=row_valid, other=float("inf"))
        if NEEDS_REFERENCE:
            other_mean = tl.load(statistics + 3 * rows + row, mask=row_valid, other=0.0)
        key_sum, value_sum, reference_sum = add_key_gradients(
            key_main, value_main, reference_main, weight_main, columns_main, valid_main,
            queries, grad_outputs, log_sum, mean, other_log_sum, other_mean,
            key_sum, value_sum, reference_sum, map_tokens, grad_maps, tokens, map_factor,
            alignment_factor, scale_log2, row, rows, DIM_TAIL, HAS_MASK, HAS_OUTPUT,
            HAS_ALIGNMENT, HAS_MAPS, NEEDS_KEY, NEEDS_VALUE, NEEDS_REFERENCE,
        )  # fmt: skip
        if KEY_TAIL > 0:
          if keys > KEY_MAIN:
            key_tail_sum, value_tail_sum, reference_tail_sum = add_tail_gradients(
                key_tail, value_tail, reference_tail, weight_tail, columns_tail, valid_tail,
                queries, grad_outputs, log_sum, mean, other_log_sum, other_mean,
                key_tail_sum, value_tail_sum, reference_tail_sum, map_tokens, grad_maps, tokens,
                map_factor, alignment_factor, scale_log2, row, rows, DIM_TAIL, HAS_MASK,
                HAS_OUTPUT, HAS_ALIGNMENT, HAS_MAPS, NEEDS_KEY, NEEDS_VALUE, NEEDS_REFERENCE,
            )  # fmt: skip

    place = batch * tl.num_programs(1) + tl.program_id(1)
    start = head_offset(place * keys, head, heads * DIM, DIM, ALIGNMENT)
    offsets = start + row_offsets(columns_main, heads * DIM, ALIGNMENT)
    inside = columns_main < keys
    if grad_value is not None:
        store_rows(grad_value, offsets, inside, value_sum, DIM, DIM_MAIN, DIM_TAIL)
    if grad_key is not None:
        key_sum = scale_rows(key_sum, scale, DIM_TAIL)
        store_rows(grad_key, offsets, inside, key_sum, DIM, DIM_MAIN, DIM_TAIL)
    if NEEDS_REFERENCE:
        reference_sum = scale_rows(reference_sum, scale, DIM_TAIL)
        store_rows(grad_reference_key, offsets, inside, reference_sum, DIM, DIM_MAIN, DIM_TAIL)
    if KEY_TAIL > 0:
        offsets = start + row_offsets(columns_tail, heads * DIM, ALIGNMENT)
        inside = columns_tail < keys
        if grad_value is not None:
            store_rows(grad_value, offsets, inside, value_tail_sum, DIM, DIM_MAIN, DIM_TAIL)
        if grad_key is not None:
            key_tail_sum = scale_rows(key_tail_sum, scale, DIM_TAIL)
            store_rows(grad_key, offsets, inside, key_tail_sum, DIM, DIM_MAIN, DIM_TAIL)
        if NEEDS_REFERENCE:
            reference_tail_sum = scale_rows(reference_tail_sum, scale, DIM_TAIL)
            store_rows(
                grad_reference_key, offsets, inside, reference_tail_sum, DIM, DIM_MAIN, DIM_TAIL
            )


@triton.jit
def write_total(partials, total, elements, count, BLOCK: tl.constexpr):
    """Sum partials [groups, count, elements] over count, in order, into total [groups, elements]."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < elements
    group = tl.program_id(1).to(tl.int64)
    source = partials + group * count * elements + place
    sums = tl.zeros([BLOCK], tl.float32)
    for _ in tl.range(0, count):
        sums += tl.load(source, mask=inside, other=0.0)
        source += elements
    tl.store(total + group * elements + place, sums.to(total.dtype.element_ty), mask=inside)


@triton.jit
def sum_partials(
    first_partials, second_partials, third_partials, first_total, second_total, third_total,
    elements, count, BLOCK: tl.constexpr,
):  # fmt: skip
    """Totals of up to three gradients; grid (blocks of elements, groups, gradients).

    Each program adds in order and no two write the same place, so the same bits come every time.
    """
    which = tl.program_id(2)
    if which == 0:
        write_total(first_partials, first_total, elements, count, BLOCK)
    if second_partials is not None:
        if which == 1:
            write_total(second_partials, second_total, elements, count, BLOCK)
    if third_partials is not None:
        if which == 2:
            write_total(third_partials, third_total, elements, count, BLOCK)
