"""Backward kernel of dK, dV and the reference key's gradient: partial sums over the queries."""

from __future__ import annotations

import triton
import triton.language as tl

from .primitives import (
    COUNTS,
    ROW_STATS,
    add_dot_t,
    block_offset,
    dot_t,
    exp_scores,
    head_offset,
    load_operands,
    load_pair,
    load_weights,
    normalized,
    valid_keys,
)
from .reduce import accumulate_kv, store_kv, zeros_kv


@triton.jit
def accumulate_dkdv(
    k, v, k_ref, w, offs_n, mask_n, q, do,
    row_max, inv_sum, delta, ref_row_max, ref_inv_sum, ref_delta, dk, dv, dk_ref,
    probs_positions, grad_attn_probs, num_positions, probs_factor, loss_factor, sm_scale_log2,
    offs_m, seqlen_q,
    BLOCK_D_TAIL: tl.constexpr, HAS_MASK: tl.constexpr, HAS_DO: tl.constexpr,
    HAS_LOSS: tl.constexpr, HAS_PROBS: tl.constexpr, NEEDS_KEY: tl.constexpr,
    NEEDS_VALUE: tl.constexpr, NEEDS_REFERENCE: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Add what one block of queries contributes to dK_t, dV_t and dK_r of one tile of keys.

    q and do are [BLOCK_M, HEAD_DIM] in parts; k, v and k_ref are [BLOCK_N, HEAD_DIM] in parts.
    """
    scores = dot_t(q, k, BLOCK_D_TAIL)  # [BLOCK_M, BLOCK_N]
    if HAS_MASK:
        scores = tl.where(mask_n[None, :], scores, float("-inf"))
    EXACT: tl.constexpr = q[0].dtype == tl.float32
    p = normalized(exp_scores(scores, row_max, sm_scale_log2, EXACT), inv_sum)
    if NEEDS_VALUE:
        dv = accumulate_kv(dv, p, do, BLOCK_D_TAIL, TRANSPOSED)
    if HAS_LOSS:
        scores = dot_t(q, k_ref, BLOCK_D_TAIL)
        if HAS_MASK:
            scores = tl.where(mask_n[None, :], scores, float("-inf"))
        p_ref = normalized(exp_scores(scores, ref_row_max, sm_scale_log2, EXACT), ref_inv_sum)
        dp_loss = (p - p_ref) * (w * loss_factor)[None, :]  # [BLOCK_M, BLOCK_N]
        if NEEDS_REFERENCE:
            ds_ref = -p_ref * (dp_loss + ref_delta[:, None])
            dk_ref = accumulate_kv(dk_ref, ds_ref, q, BLOCK_D_TAIL, TRANSPOSED)
    if NEEDS_KEY:
        dp = tl.zeros_like(p)
        if HAS_LOSS:
            dp = dp_loss
        if HAS_DO:
            dp = add_dot_t(dp, do, v, BLOCK_D_TAIL)
        if HAS_PROBS:
            for i in range(num_positions):
                column = tl.load(
                    grad_attn_probs + i * seqlen_q + offs_m, mask=offs_m < seqlen_q, other=0.0
                )
                position = tl.load(probs_positions + i)
                column = (column * probs_factor)[:, None]
                dp += tl.where(offs_n[None, :] == position, column, 0.0)
        ds = p * (dp - delta[:, None])
        dk = accumulate_kv(dk, ds, q, BLOCK_D_TAIL, TRANSPOSED)
    return dk, dv, dk_ref


@triton.jit(do_not_specialize=COUNTS)
def _attn_bwd_dkdv(
    query, key, value, reference_key, token_weights, key_mask, probs_positions,
    grad_output, grad_subject_loss, grad_attn_probs, row_stats, grad_key, grad_value,
    grad_reference_key,
    query_stride_b, query_stride_h, query_stride_n,
    key_stride_b, key_stride_h, key_stride_m,
    value_stride_b, value_stride_h, value_stride_m,
    ref_stride_b, ref_stride_h, ref_stride_m,
    do_stride_b, do_stride_h, do_stride_n,
    weight_stride_b, mask_stride_b, positions_stride_b, loss_stride_b,
    probs_stride_b, probs_stride_h, probs_factor,
    heads, seqlen_q, seqlen_k, num_positions, blocks_per_cta, sm_scale_log2, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_D_TAIL: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_N_TAIL: tl.constexpr, EVEN_N: tl.constexpr,
    TILES_N: tl.constexpr, BLOCK_M: tl.constexpr, ALIGNMENT: tl.constexpr, UPCAST: tl.constexpr,
    KV_IN_LOOP: tl.constexpr, PIPELINED: tl.constexpr,
):  # fmt: skip
    """Sum dK_t, dV_t and dK_r of equations 9 and 11 over blocks_per_cta blocks of queries.

    Grid (B·H·TILES_N, splits). With TILES_N > 1 a program has one tile of BLOCK_N keys, and
    neighboring programs share their queries in the L2 cache. Reads row_stats of `_attn_bwd_dq`.
    Writes grad_key, grad_value and grad_reference_key, each [B, splits, M, H, D] or None where not
    wanted. The gradients of outputs may be None; value is None without grad_output, and
    reference_key without grad_subject_loss.
    """
    HAS_MASK: tl.constexpr = key_mask is not None
    HAS_WEIGHTS: tl.constexpr = token_weights is not None
    NEEDS_KEY: tl.constexpr = grad_key is not None
    NEEDS_VALUE: tl.constexpr = grad_value is not None
    NEEDS_REFERENCE: tl.constexpr = grad_reference_key is not None
    HAS_DO: tl.constexpr = grad_output is not None and NEEDS_KEY
    HAS_LOSS: tl.constexpr = grad_subject_loss is not None and (NEEDS_KEY or NEEDS_REFERENCE)
    HAS_PROBS: tl.constexpr = grad_attn_probs is not None and NEEDS_KEY
    # So few keys cannot be split over the warps.
    TRANSPOSED: tl.constexpr = BLOCK_N < 64
    batch_head = tl.program_id(0) // TILES_N
    batch = batch_head // heads
    head = batch_head % heads
    # Keys are counted from the program's first one from here on, except in offs_n.
    first_key = 0
    own_seqlen_k = seqlen_k
    if TILES_N > 1:
        tile = tl.program_id(0) % TILES_N
        first_key = tile * BLOCK_N
        own_seqlen_k = seqlen_k - first_key
        key += block_offset(tile, BLOCK_N, key_stride_m, ALIGNMENT)
        if HAS_DO:
            value += block_offset(tile, BLOCK_N, value_stride_m, ALIGNMENT)
        if HAS_LOSS:
            reference_key += block_offset(tile, BLOCK_N, ref_stride_m, ALIGNMENT)
        if HAS_WEIGHTS:
            token_weights += first_key
        if HAS_MASK:
            key_mask += first_key

    mask_n, mask_n_tail = valid_keys(
        key_mask, batch, mask_stride_b, own_seqlen_k, BLOCK_N, BLOCK_N_TAIL, HAS_MASK
    )
    key += head_offset(batch, head, key_stride_b, key_stride_h, ALIGNMENT)
    if HAS_DO:
        value += head_offset(batch, head, value_stride_b, value_stride_h, ALIGNMENT)
    w = mask_n
    w_tail = mask_n_tail
    loss_factor = 0.0
    if HAS_LOSS:
        reference_key += head_offset(batch, head, ref_stride_b, ref_stride_h, ALIGNMENT)
        w, w_tail = load_weights(
            token_weights, batch, weight_stride_b, own_seqlen_k, BLOCK_N, BLOCK_N_TAIL, HAS_WEIGHTS
        )
        loss_factor = tl.load(grad_subject_loss + batch * loss_stride_b) * (2.0 / heads)
    if not KV_IN_LOOP:
        (k, k_tail, v, v_tail, k_ref, k_ref_tail) = load_operands(
            key, value, reference_key, key_stride_m, value_stride_m, ref_stride_m, own_seqlen_k,
            mask_n, mask_n_tail, HAS_DO, HAS_LOSS, HEAD_DIM, BLOCK_D, BLOCK_D_TAIL,
            BLOCK_N, BLOCK_N_TAIL, EVEN_N, HAS_MASK, ALIGNMENT, UPCAST,
        )  # fmt: skip
    if HAS_PROBS:
        probs_positions += batch.to(tl.int64) * positions_stride_b
        grad_attn_probs += head_offset(batch, head, probs_stride_b, probs_stride_h, 1)
    if grad_output is not None:
        grad_output += head_offset(batch, head, do_stride_b, do_stride_h, ALIGNMENT)

    query += head_offset(batch, head, query_stride_b, query_stride_h, ALIGNMENT)
    row_stats += batch_head.to(tl.int64) * ROW_STATS * seqlen_q
    offs_n = first_key + tl.arange(0, BLOCK_N)
    # [BLOCK_N, HEAD_DIM] in parts, transposed with TRANSPOSED
    dk = zeros_kv(BLOCK_N, BLOCK_D, BLOCK_D_TAIL, TRANSPOSED)
    dv = zeros_kv(BLOCK_N, BLOCK_D, BLOCK_D_TAIL, TRANSPOSED)
    dk_ref = zeros_kv(BLOCK_N, BLOCK_D, BLOCK_D_TAIL, TRANSPOSED)
    dk_tail = dk
    dv_tail = dv
    dk_ref_tail = dk_ref
    if BLOCK_N_TAIL > 0:
        offs_n_tail = BLOCK_N + tl.arange(0, BLOCK_N_TAIL)
        dk_tail = zeros_kv(BLOCK_N_TAIL, BLOCK_D, BLOCK_D_TAIL, True)
        dv_tail = zeros_kv(BLOCK_N_TAIL, BLOCK_D, BLOCK_D_TAIL, True)
        dk_ref_tail = zeros_kv(BLOCK_N_TAIL, BLOCK_D, BLOCK_D_TAIL, True)
    first_block = tl.program_id(1) * blocks_per_cta
    last_block = tl.minimum(first_block + blocks_per_cta, tl.cdiv(seqlen_q, BLOCK_M))
    # LICM would hold the shared-memory descriptors in registers.
    for step in tl.range(0, last_block - first_block, disable_licm=True):
        block = first_block + step
        offs_m = block * BLOCK_M + tl.arange(0, BLOCK_M)
        mask_m = offs_m < seqlen_q
        # All loads of a block are issued at once: one wait. Rows past the end get probability 0.
        stats = row_stats + offs_m * ROW_STATS  # [BLOCK_M]
        row_max = tl.load(stats, mask=mask_m, other=0.0)
        inv_sum = tl.load(stats + 1, mask=mask_m, other=0.0)
        delta = row_max
        ref_row_max = row_max
        ref_inv_sum = row_max
        ref_delta = row_max
        if NEEDS_KEY:
            delta = tl.load(stats + 2, mask=mask_m, other=0.0)
        if HAS_LOSS:
            ref_row_max = tl.load(stats + 3, mask=mask_m, other=0.0)
            ref_inv_sum = tl.load(stats + 4, mask=mask_m, other=0.0)
        if NEEDS_REFERENCE:
            ref_delta = tl.load(stats + 5, mask=mask_m, other=0.0)
        q, do = load_pair(
            query, grad_output, block, query_stride_n, do_stride_n, seqlen_q,
            grad_output is not None, BLOCK_M, HEAD_DIM, BLOCK_D, BLOCK_D_TAIL, ALIGNMENT, UPCAST,
        )  # fmt: skip
        if KV_IN_LOOP:
            if not PIPELINED:
                # Keeps the compiler from hoisting the loads out of the loop into registers.
                tl.debug_barrier()
            (k, k_tail, v, v_tail, k_ref, k_ref_tail) = load_operands(
                key, value, reference_key, key_stride_m, value_stride_m, ref_stride_m,
                own_seqlen_k, mask_n, mask_n_tail, HAS_DO, HAS_LOSS, HEAD_DIM, BLOCK_D,
                BLOCK_D_TAIL, BLOCK_N, BLOCK_N_TAIL, EVEN_N, HAS_MASK, ALIGNMENT, UPCAST,
            )  # fmt: skip
        dk, dv, dk_ref = accumulate_dkdv(
            k, v, k_ref, w, offs_n, mask_n,
            q, do, row_max, inv_sum, delta, ref_row_max, ref_inv_sum, ref_delta,
            dk, dv, dk_ref, probs_positions, grad_attn_probs, num_positions, probs_factor,
            loss_factor, sm_scale_log2, offs_m, seqlen_q, BLOCK_D_TAIL, HAS_MASK, HAS_DO,
            HAS_LOSS, HAS_PROBS, NEEDS_KEY, NEEDS_VALUE, NEEDS_REFERENCE, TRANSPOSED,
        )  # fmt: skip
        if BLOCK_N_TAIL > 0:
            dk_tail, dv_tail, dk_ref_tail = accumulate_dkdv(
                k_tail, v_tail, k_ref_tail, w_tail, offs_n_tail, mask_n_tail,
                q, do, row_max, inv_sum, delta, ref_row_max, ref_inv_sum, ref_delta,
                dk_tail, dv_tail, dk_ref_tail, probs_positions, grad_attn_probs, num_positions,
                probs_factor, loss_factor, sm_scale_log2, offs_m, seqlen_q, BLOCK_D_TAIL, HAS_MASK,
                HAS_DO, HAS_LOSS, HAS_PROBS, NEEDS_KEY, NEEDS_VALUE, NEEDS_REFERENCE, True,
            )  # fmt: skip

    split = batch * tl.num_programs(1) + tl.program_id(1)
    start = head_offset(split * seqlen_k, head, heads * HEAD_DIM, HEAD_DIM, ALIGNMENT)
    stride = heads * HEAD_DIM
    if TILES_N > 1:
        start += block_offset(tile, BLOCK_N, stride, ALIGNMENT)
    if NEEDS_VALUE:
        store_kv(
            grad_value, start, stride, own_seqlen_k, dv, dv_tail, 1.0,
            BLOCK_N, BLOCK_N_TAIL, HEAD_DIM, BLOCK_D, BLOCK_D_TAIL, ALIGNMENT, TRANSPOSED,
        )  # fmt: skip
    if NEEDS_KEY:
        store_kv(
            grad_key, start, stride, own_seqlen_k, dk, dk_tail, scale,
            BLOCK_N, BLOCK_N_TAIL, HEAD_DIM, BLOCK_D, BLOCK_D_TAIL, ALIGNMENT, TRANSPOSED,
        )  # fmt: skip
    if NEEDS_REFERENCE:
        store_kv(
            grad_reference_key, start, stride, own_seqlen_k, dk_ref, dk_ref_tail, scale,
            BLOCK_N, BLOCK_N_TAIL, HEAD_DIM, BLOCK_D, BLOCK_D_TAIL, ALIGNMENT, TRANSPOSED,
        )  # fmt: skip
