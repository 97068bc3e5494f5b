"""Backward kernel of dQ: recomputes the probabilities of its queries and writes dQ once.

If the registers hold them, it sums dK and dV as well, and no other kernel reads the queries again.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .primitives import (
    COUNTS,
    ROW_STATS,
    accumulate,
    add_dot_t,
    add_to_column,
    block_offset,
    head_offset,
    load_block,
    load_operands,
    load_pair,
    load_tiles,
    load_weights,
    ref_softmax_and_d_probs,
    row_offsets,
    scale_rows,
    scores,
    softmax,
    softmax_bwd,
    store_rows,
    valid_keys,
    zero_rows,
)
from .reduce import accumulate_kv, store_kv, zeros_kv


@triton.jit(do_not_specialize=COUNTS)
def _attn_bwd_dq(
    query, key, value, reference_key, token_weights, key_mask, probs_positions,
    grad_output, grad_subject_loss, grad_attn_probs, grad_query, grad_key, grad_value, row_stats,
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
    BLOCK_M: tl.constexpr, ALIGNMENT: tl.constexpr, UPCAST: tl.constexpr,
    KV_IN_LOOP: tl.constexpr, PIPELINED: tl.constexpr, PREFETCH: tl.constexpr,
    LOAD_DO_LATE: tl.constexpr, REFERENCE_GRAD: tl.constexpr,
):  # fmt: skip
    """Compute dQ of equations 9 and 11 for blocks_per_cta blocks of queries; dK_t and dV_t too.

    Grid (B·H, splits). Each of these outputs may be None: grad_query [B, N, H, D]; grad_key and
    grad_value, sums over this program's queries, [B, splits, M, H, D], not with KV_IN_LOOP; and for
    `_attn_bwd_dkdv` row_stats [B, H, N, 8]: row_max, inv_sum and delta = rowsum(A_t ∘ dA_t) of
    A_t, the same of A_r, and two unused. The gradients of outputs may be None; value is None
    without grad_output, and reference_key without grad_subject_loss.

    KV_IN_LOOP: load keys and values in every iteration, each where it is used or, PIPELINED, all an
    iteration ahead. PREFETCH: load the next block's queries into registers before this block is
    done. LOAD_DO_LATE: load the output gradients after the scores, so that their tile can reuse the
    queries' shared memory.
    """
    HAS_MASK: tl.constexpr = key_mask is not None
    HAS_WEIGHTS: tl.constexpr = token_weights is not None
    MASK_N: tl.constexpr = HAS_MASK or (BLOCK_N_TAIL == 0 and not EVEN_N)
    HAS_DO: tl.constexpr = grad_output is not None
    HAS_LOSS: tl.constexpr = grad_subject_loss is not None
    HAS_PROBS: tl.constexpr = grad_attn_probs is not None
    EXACT: tl.constexpr = query.dtype.element_ty == tl.float32
    FUSE_DK: tl.constexpr = grad_key is not None
    FUSE_DV: tl.constexpr = grad_value is not None
    # Load each operand where it is used, else all at the start of an iteration.
    LOAD_AT_USE: tl.constexpr = KV_IN_LOOP and not PIPELINED
    # So few keys cannot be split over the warps.
    TRANSPOSED: tl.constexpr = BLOCK_N < 64
    batch = tl.program_id(0) // heads
    head = tl.program_id(0) % heads

    mask_n, mask_n_tail = valid_keys(
        key_mask, batch, mask_stride_b, seqlen_k, BLOCK_N, BLOCK_N_TAIL, HAS_MASK
    )
    key += head_offset(batch, head, key_stride_b, key_stride_h, ALIGNMENT)
    if HAS_DO:
        value += head_offset(batch, head, value_stride_b, value_stride_h, ALIGNMENT)
        grad_output += head_offset(batch, head, do_stride_b, do_stride_h, ALIGNMENT)
    w = mask_n
    w_tail = mask_n_tail
    loss_factor = 0.0
    if HAS_LOSS:
        reference_key += head_offset(batch, head, ref_stride_b, ref_stride_h, ALIGNMENT)
        w, w_tail = load_weights(
            token_weights, batch, weight_stride_b, seqlen_k, BLOCK_N, BLOCK_N_TAIL, HAS_WEIGHTS
        )
        loss_factor = tl.load(grad_subject_loss + batch * loss_stride_b) * (2.0 / heads)
    if HAS_PROBS:
        probs_positions += batch.to(tl.int64) * positions_stride_b
        grad_attn_probs += head_offset(batch, head, probs_stride_b, probs_stride_h, 1)

    query += head_offset(batch, head, query_stride_b, query_stride_h, ALIGNMENT)
    if grad_query is not None:
        grad_query += head_offset(batch * seqlen_q, head, heads * HEAD_DIM, HEAD_DIM, ALIGNMENT)
    if row_stats is not None:
        row_stats += tl.program_id(0).to(tl.int64) * ROW_STATS * seqlen_q
    first_block = tl.program_id(1) * blocks_per_cta
    last_block = tl.minimum(first_block + blocks_per_cta, tl.cdiv(seqlen_q, BLOCK_M))
    last_row = tl.minimum(last_block * BLOCK_M, seqlen_q)
    if PREFETCH:
        # Together with the keys: one wait.
        next_q, next_do = load_pair(
            query, grad_output, first_block, query_stride_n, do_stride_n, last_row, HAS_DO,
            BLOCK_M, HEAD_DIM, BLOCK_D, BLOCK_D_TAIL, ALIGNMENT, UPCAST,
        )  # fmt: skip
    if not KV_IN_LOOP:
        # k, v, k_ref: [BLOCK_N, HEAD_DIM] in parts; *_tail: [BLOCK_N_TAIL, HEAD_DIM]
        (k, k_tail, v, v_tail, k_ref, k_ref_tail) = load_operands(
            key, value, reference_key, key_stride_m, value_stride_m, ref_stride_m, seqlen_k,
            mask_n, mask_n_tail, HAS_DO, HAS_LOSS, HEAD_DIM, BLOCK_D, BLOCK_D_TAIL,
            BLOCK_N, BLOCK_N_TAIL, EVEN_N, HAS_MASK, ALIGNMENT, UPCAST,
        )  # fmt: skip
    # dk, dv: [BLOCK_N, HEAD_DIM] in parts, transposed with TRANSPOSED
    if FUSE_DK:
        dk = zeros_kv(BLOCK_N, BLOCK_D, BLOCK_D_TAIL, TRANSPOSED)
        dk_tail = dk
        if BLOCK_N_TAIL > 0:
            dk_tail = zeros_kv(BLOCK_N_TAIL, BLOCK_D, BLOCK_D_TAIL, True)
    if FUSE_DV:
        dv = zeros_kv(BLOCK_N, BLOCK_D, BLOCK_D_TAIL, TRANSPOSED)
        dv_tail = dv
        if BLOCK_N_TAIL > 0:
            dv_tail = zeros_kv(BLOCK_N_TAIL, BLOCK_D, BLOCK_D_TAIL, True)
    # LICM would hold the shared-memory descriptors in registers.
    for step in tl.range(0, last_block - first_block, disable_licm=True):
        block = first_block + step
        offs_m = block * BLOCK_M + tl.arange(0, BLOCK_M)
        mask_m = offs_m < seqlen_q
        # q, do: [BLOCK_M, HEAD_DIM] in parts
        if PREFETCH:
            q = next_q
            do = next_do
        elif LOAD_DO_LATE:
            q = load_block(
                query, block, query_stride_n, last_row,
                BLOCK_M, HEAD_DIM, BLOCK_D, BLOCK_D_TAIL, ALIGNMENT, UPCAST,
            )  # fmt: skip
        else:
            q, do = load_pair(
                query, grad_output, block, query_stride_n, do_stride_n, last_row, HAS_DO,
                BLOCK_M, HEAD_DIM, BLOCK_D, BLOCK_D_TAIL, ALIGNMENT, UPCAST,
            )  # fmt: skip
        if PIPELINED:
            (k, k_tail, v, v_tail, k_ref, k_ref_tail) = load_operands(
                key, value, reference_key, key_stride_m, value_stride_m, ref_stride_m, seqlen_k,
                mask_n, mask_n_tail, HAS_DO, HAS_LOSS, HEAD_DIM, BLOCK_D, BLOCK_D_TAIL,
                BLOCK_N, BLOCK_N_TAIL, EVEN_N, HAS_MASK, ALIGNMENT, UPCAST,
            )  # fmt: skip
        if LOAD_AT_USE:
            k, k_tail = load_tiles(
                key, key_stride_m, seqlen_k, mask_n, mask_n_tail,
                HEAD_DIM, BLOCK_D, BLOCK_D_TAIL, BLOCK_N, BLOCK_N_TAIL, EVEN_N, HAS_MASK,
                ALIGNMENT, UPCAST,
            )  # fmt: skip
        # p: [BLOCK_M, BLOCK_N], p_tail: [BLOCK_M, BLOCK_N_TAIL]
        p, p_tail = scores(q, k, k_tail, BLOCK_D_TAIL, BLOCK_N_TAIL)
        p, p_tail, row_max, inv_sum = softmax(
            p, p_tail, mask_n, mask_n_tail, sm_scale_log2, BLOCK_N_TAIL, MASK_N, HAS_MASK, EXACT
        )
        if HAS_LOSS and not LOAD_AT_USE:
            # The last use of the queries' tile before dK.
            p_ref, p_ref_tail = scores(q, k_ref, k_ref_tail, BLOCK_D_TAIL, BLOCK_N_TAIL)
            (p_ref, p_ref_tail, ref_row_max, ref_inv_sum,
             dp_loss, dp_loss_tail) = ref_softmax_and_d_probs(
                p, p_tail, p_ref, p_ref_tail, mask_n, mask_n_tail,
                w, w_tail, loss_factor, sm_scale_log2,
                BLOCK_N_TAIL, MASK_N, HAS_MASK, EXACT,
            )  # fmt: skip
            dp = dp_loss
            dp_tail = dp_loss_tail
        else:
            dp = tl.zeros_like(p)
            dp_tail = tl.zeros_like(p_tail)
        if LOAD_DO_LATE and HAS_DO:
            do = load_block(
                grad_output, block, do_stride_n, last_row,
                BLOCK_M, HEAD_DIM, BLOCK_D, BLOCK_D_TAIL, ALIGNMENT, UPCAST,
            )  # fmt: skip
        if FUSE_DV:
            dv = accumulate_kv(dv, p, do, BLOCK_D_TAIL, TRANSPOSED)
            if BLOCK_N_TAIL > 0:
                dv_tail = accumulate_kv(dv_tail, p_tail, do, BLOCK_D_TAIL, True)
        if HAS_DO:
            if LOAD_AT_USE:
                v, v_tail = load_tiles(
                    value, value_stride_m, seqlen_k, mask_n, mask_n_tail,
                    HEAD_DIM, BLOCK_D, BLOCK_D_TAIL, BLOCK_N, BLOCK_N_TAIL, EVEN_N, HAS_MASK,
                    ALIGNMENT, UPCAST,
                )  # fmt: skip
            dp = add_dot_t(dp, do, v, BLOCK_D_TAIL)
            if BLOCK_N_TAIL > 0:
                dp_tail = add_dot_t(dp_tail, do, v_tail, BLOCK_D_TAIL)
        if HAS_PROBS:
            for i in range(num_positions):
                # [BLOCK_M]
                column = tl.load(grad_attn_probs + i * seqlen_q + offs_m, mask=mask_m, other=0.0)
                dp, dp_tail = add_to_column(
                    dp, dp_tail, tl.load(probs_positions + i), column * probs_factor,
                    BLOCK_N, BLOCK_N_TAIL,
                )  # fmt: skip
        if HAS_LOSS and LOAD_AT_USE:
            k_ref, k_ref_tail = load_tiles(
                reference_key, ref_stride_m, seqlen_k, mask_n, mask_n_tail,
                HEAD_DIM, BLOCK_D, BLOCK_D_TAIL, BLOCK_N, BLOCK_N_TAIL, EVEN_N, HAS_MASK,
                ALIGNMENT, UPCAST,
            )  # fmt: skip
            p_ref, p_ref_tail = scores(q, k_ref, k_ref_tail, BLOCK_D_TAIL, BLOCK_N_TAIL)
            (p_ref, p_ref_tail, ref_row_max, ref_inv_sum,
             dp_loss, dp_loss_tail) = ref_softmax_and_d_probs(
                p, p_tail, p_ref, p_ref_tail, mask_n, mask_n_tail,
                w, w_tail, loss_factor, sm_scale_log2,
                BLOCK_N_TAIL, MASK_N, HAS_MASK, EXACT,
            )  # fmt: skip
            dp += dp_loss
            if BLOCK_N_TAIL > 0:
                dp_tail += dp_loss_tail
        ds, ds_tail, delta = softmax_bwd(p, p_tail, dp, dp_tail, BLOCK_N_TAIL)
        if PREFETCH:
            # Late enough to find free registers, early enough to hide the loads.
            next_q, next_do = load_pair(
                query, grad_output, block + 1, query_stride_n, do_stride_n, last_row, HAS_DO,
                BLOCK_M, HEAD_DIM, BLOCK_D, BLOCK_D_TAIL, ALIGNMENT, UPCAST,
            )  # fmt: skip
        if FUSE_DK:
            dk = accumulate_kv(dk, ds, q, BLOCK_D_TAIL, TRANSPOSED)
            if BLOCK_N_TAIL > 0:
                dk_tail = accumulate_kv(dk_tail, ds_tail, q, BLOCK_D_TAIL, True)
        if LOAD_AT_USE:
            # The tiles from above would occupy registers until here.
            tl.debug_barrier()
            k, k_tail = load_tiles(
                key, key_stride_m, seqlen_k, mask_n, mask_n_tail,
                HEAD_DIM, BLOCK_D, BLOCK_D_TAIL, BLOCK_N, BLOCK_N_TAIL, EVEN_N, HAS_MASK,
                ALIGNMENT, UPCAST,
            )  # fmt: skip
        # acc: dQ [BLOCK_M, HEAD_DIM] in parts
        acc = accumulate(zero_rows(BLOCK_M, BLOCK_D, BLOCK_D_TAIL), ds, k, BLOCK_D_TAIL)
        if BLOCK_N_TAIL > 0:
            acc = accumulate(acc, ds_tail, k_tail, BLOCK_D_TAIL)
        if REFERENCE_GRAD:
            ds_ref, ds_ref_tail, ref_delta = softmax_bwd(
                p_ref, p_ref_tail, -dp_loss, -dp_loss_tail, BLOCK_N_TAIL
            )
            if LOAD_AT_USE:
                k_ref, k_ref_tail = load_tiles(
                    reference_key, ref_stride_m, seqlen_k, mask_n, mask_n_tail,
                    HEAD_DIM, BLOCK_D, BLOCK_D_TAIL, BLOCK_N, BLOCK_N_TAIL, EVEN_N, HAS_MASK,
                    ALIGNMENT, UPCAST,
                )  # fmt: skip
            acc = accumulate(acc, ds_ref, k_ref, BLOCK_D_TAIL)
            if BLOCK_N_TAIL > 0:
                acc = accumulate(acc, ds_ref_tail, k_ref_tail, BLOCK_D_TAIL)
        if grad_query is not None:
            acc = scale_rows(acc, scale, BLOCK_D_TAIL)
            dq = grad_query + block_offset(block, BLOCK_M, heads * HEAD_DIM, ALIGNMENT)
            dq_offsets = row_offsets(tl.arange(0, BLOCK_M), heads * HEAD_DIM, ALIGNMENT)
            store_rows(dq, dq_offsets, mask_m, acc, HEAD_DIM, BLOCK_D, BLOCK_D_TAIL)
        if row_stats is not None:
            # Stored as one tile [BLOCK_M, ROW_STATS]: each single store would take two barriers.
            column = tl.arange(0, ROW_STATS)[None, :]
            stats = tl.where(column == 0, row_max[:, None], inv_sum[:, None])
            stats = tl.where(column == 2, delta[:, None], stats)
            if HAS_LOSS:
                stats = tl.where(column == 3, ref_row_max[:, None], stats)
                stats = tl.where(column == 4, ref_inv_sum[:, None], stats)
            if REFERENCE_GRAD:
                stats = tl.where(column == 5, ref_delta[:, None], stats)
            places = row_stats + (offs_m * ROW_STATS)[:, None] + column
            tl.store(places, stats, mask=mask_m[:, None])

    split = batch * tl.num_programs(1) + tl.program_id(1)
    start = head_offset(split * seqlen_k, head, heads * HEAD_DIM, HEAD_DIM, ALIGNMENT)
    if FUSE_DK:
        store_kv(
            grad_key, start, heads * HEAD_DIM, seqlen_k, dk, dk_tail, scale,
            BLOCK_N, BLOCK_N_TAIL, HEAD_DIM, BLOCK_D, BLOCK_D_TAIL, ALIGNMENT, TRANSPOSED,
        )  # fmt: skip
    if FUSE_DV:
        store_kv(
            grad_value, start, heads * HEAD_DIM, seqlen_k, dv, dv_tail, 1.0,
            BLOCK_N, BLOCK_N_TAIL, HEAD_DIM, BLOCK_D, BLOCK_D_TAIL, ALIGNMENT, TRANSPOSED,
        )  # fmt: skip
