"""Forward kernel: output, subject loss and chosen probabilities in one pass over the queries."""

from __future__ import annotations

import triton
import triton.language as tl

from .primitives import (
    COUNTS,
    accumulate,
    block_offset,
    head_offset,
    load_block,
    load_operands,
    load_rows,
    load_tiles,
    load_weights,
    pick_column,
    row_offsets,
    scores,
    softmax,
    store_rows,
    valid_keys,
    zero_rows,
)


@triton.jit(do_not_specialize=COUNTS)
def _attn_fwd(
    query, key, value, reference_key, token_weights, key_mask, probs_positions,
    output, subject_loss, attn_probs,
    query_stride_b, query_stride_h, query_stride_n,
    key_stride_b, key_stride_h, key_stride_m,
    value_stride_b, value_stride_h, value_stride_m,
    ref_stride_b, ref_stride_h, ref_stride_m,
    weight_stride_b, mask_stride_b, positions_stride_b,
    heads, seqlen_q, seqlen_k, num_positions, blocks_per_cta, sm_scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_D_TAIL: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_N_TAIL: tl.constexpr, EVEN_N: tl.constexpr,
    BLOCK_M: tl.constexpr, ALIGNMENT: tl.constexpr, UPCAST: tl.constexpr, KV_IN_LOOP: tl.constexpr,
):  # fmt: skip
    """Compute equations 4 and 5 for blocks_per_cta blocks of queries of one head.

    Grid (B·H, splits). Writes output [B, N, H, D], subject_loss [B, H, splits], whose sum is that
    of equation 5, and attn_probs [B, H, T, N]. reference_key, token_weights, key_mask and
    attn_probs may be None. EVEN_N: the tiles of keys hold M keys exactly.
    """
    HAS_MASK: tl.constexpr = key_mask is not None
    HAS_WEIGHTS: tl.constexpr = token_weights is not None
    HAS_REFERENCE: tl.constexpr = reference_key is not None
    MASK_N: tl.constexpr = HAS_MASK or (BLOCK_N_TAIL == 0 and not EVEN_N)
    EXACT: tl.constexpr = query.dtype.element_ty == tl.float32
    batch = tl.program_id(0) // heads
    head = tl.program_id(0) % heads

    mask_n, mask_n_tail = valid_keys(
        key_mask, batch, mask_stride_b, seqlen_k, BLOCK_N, BLOCK_N_TAIL, HAS_MASK
    )
    key += head_offset(batch, head, key_stride_b, key_stride_h, ALIGNMENT)
    value += head_offset(batch, head, value_stride_b, value_stride_h, ALIGNMENT)
    if HAS_REFERENCE:
        reference_key += head_offset(batch, head, ref_stride_b, ref_stride_h, ALIGNMENT)
        w, w_tail = load_weights(
            token_weights, batch, weight_stride_b, seqlen_k, BLOCK_N, BLOCK_N_TAIL, HAS_WEIGHTS
        )
    if not KV_IN_LOOP:
        # k, v, k_ref: [BLOCK_N, HEAD_DIM] in parts; *_tail: [BLOCK_N_TAIL, HEAD_DIM]
        (k, k_tail, v, v_tail, k_ref, k_ref_tail) = load_operands(
            key, value, reference_key, key_stride_m, value_stride_m, ref_stride_m, seqlen_k,
            mask_n, mask_n_tail, True, HAS_REFERENCE, HEAD_DIM, BLOCK_D, BLOCK_D_TAIL,
            BLOCK_N, BLOCK_N_TAIL, EVEN_N, HAS_MASK, ALIGNMENT, UPCAST,
        )  # fmt: skip
    if attn_probs is not None:
        probs_positions += batch.to(tl.int64) * positions_stride_b
        attn_probs += tl.program_id(0).to(tl.int64) * num_positions * seqlen_q

    query += head_offset(batch, head, query_stride_b, query_stride_h, ALIGNMENT)
    output += head_offset(batch * seqlen_q, head, heads * HEAD_DIM, HEAD_DIM, ALIGNMENT)
    if KV_IN_LOOP:
        query_offsets = row_offsets(tl.arange(0, BLOCK_M), query_stride_n, ALIGNMENT)
    loss = tl.zeros([BLOCK_M], tl.float32)  # [BLOCK_M]
    first_block = tl.program_id(1) * blocks_per_cta
    last_block = tl.minimum(first_block + blocks_per_cta, tl.cdiv(seqlen_q, BLOCK_M))
    # LICM would hold the shared-memory descriptors in registers.
    for step in tl.range(0, last_block - first_block, disable_licm=True):
        block = first_block + step
        offs_m = block * BLOCK_M + tl.arange(0, BLOCK_M)
        mask_m = offs_m < seqlen_q
        # q: [BLOCK_M, HEAD_DIM] in parts
        if KV_IN_LOOP:
            # The offsets are held over the loop: here they cost less than computing them again.
            source = query + block_offset(block, BLOCK_M, query_stride_n, ALIGNMENT)
            q = load_rows(
                source, query_offsets, mask_m, HEAD_DIM, BLOCK_D, BLOCK_D_TAIL, True, UPCAST
            )
        else:
            q = load_block(
                query, block, query_stride_n, seqlen_q,
                BLOCK_M, HEAD_DIM, BLOCK_D, BLOCK_D_TAIL, ALIGNMENT, UPCAST,
            )  # fmt: skip
        if KV_IN_LOOP:
            k, k_tail = load_tiles(
                key, key_stride_m, seqlen_k, mask_n, mask_n_tail,
                HEAD_DIM, BLOCK_D, BLOCK_D_TAIL, BLOCK_N, BLOCK_N_TAIL, EVEN_N, HAS_MASK,
                ALIGNMENT, UPCAST,
            )  # fmt: skip
        # p: [BLOCK_M, BLOCK_N], p_tail: [BLOCK_M, BLOCK_N_TAIL]
        p, p_tail = scores(q, k, k_tail, BLOCK_D_TAIL, BLOCK_N_TAIL)
        p, p_tail, _, _ = softmax(
            p, p_tail, mask_n, mask_n_tail, sm_scale_log2, BLOCK_N_TAIL, MASK_N, HAS_MASK, EXACT
        )
        if attn_probs is not None:
            for i in range(num_positions):
                position = tl.load(probs_positions + i)
                column = pick_column(p, p_tail, position, BLOCK_N, BLOCK_N_TAIL)  # [BLOCK_M]
                tl.store(attn_probs + i * seqlen_q + offs_m, column, mask=mask_m)
        if HAS_REFERENCE:
            if KV_IN_LOOP:
                k_ref, k_ref_tail = load_tiles(
                    reference_key, ref_stride_m, seqlen_k, mask_n, mask_n_tail,
                    HEAD_DIM, BLOCK_D, BLOCK_D_TAIL, BLOCK_N, BLOCK_N_TAIL, EVEN_N, HAS_MASK,
                    ALIGNMENT, UPCAST,
                )  # fmt: skip
            p_ref, p_ref_tail = scores(q, k_ref, k_ref_tail, BLOCK_D_TAIL, BLOCK_N_TAIL)
            p_ref, p_ref_tail, _, _ = softmax(
                p_ref, p_ref_tail, mask_n, mask_n_tail, sm_scale_log2,
                BLOCK_N_TAIL, MASK_N, HAS_MASK, EXACT,
            )  # fmt: skip
            difference = p - p_ref  # [BLOCK_M, BLOCK_N]
            row_loss = tl.sum(difference * difference * w[None, :], axis=1)
            if BLOCK_N_TAIL > 0:
                difference = p_tail - p_ref_tail
                row_loss += tl.sum(difference * difference * w_tail[None, :], axis=1)
            loss += tl.where(mask_m, row_loss, 0.0)
        if KV_IN_LOOP:
            v, v_tail = load_tiles(
                value, value_stride_m, seqlen_k, mask_n, mask_n_tail,
                HEAD_DIM, BLOCK_D, BLOCK_D_TAIL, BLOCK_N, BLOCK_N_TAIL, EVEN_N, HAS_MASK,
                ALIGNMENT, UPCAST,
            )  # fmt: skip
        # acc: [BLOCK_M, HEAD_DIM] in parts
        acc = accumulate(zero_rows(BLOCK_M, BLOCK_D, BLOCK_D_TAIL), p, v, BLOCK_D_TAIL)
        if BLOCK_N_TAIL > 0:
            acc = accumulate(acc, p_tail, v_tail, BLOCK_D_TAIL)
        out = output + block_offset(block, BLOCK_M, heads * HEAD_DIM, ALIGNMENT)
        out_offsets = row_offsets(tl.arange(0, BLOCK_M), heads * HEAD_DIM, ALIGNMENT)
        store_rows(out, out_offsets, mask_m, acc, HEAD_DIM, BLOCK_D, BLOCK_D_TAIL)
    if HAS_REFERENCE:
        split = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
        tl.store(subject_loss + split, tl.sum(loss) / heads)
