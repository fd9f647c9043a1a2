"""Kernels of the fused op that reduce what tile_kernels.py found: the tiles of a token, the tokens of a sequence.

Legend: N response tokens, S sequences (one after another along N), L tiles of a row of logits. Needs triton only.
"""

import triton
import triton.language as tl

from twdpo.kernels.tile_kernels import LEAST


@triton.jit
def _of_tiles(values_LN, first, tokens, num_tokens, L: tl.constexpr, TILE_BLOCK: tl.constexpr, other: tl.constexpr):
    """Values of tiles first .. first + TILE_BLOCK, [TILE_BLOCK, TOKEN_BLOCK]."""
    tiles = first + tl.arange(0, TILE_BLOCK)
    inside = (tiles < L)[:, None] & (tokens < num_tokens)[None, :]
    return tl.load(values_LN + tiles.to(tl.int64)[:, None] * num_tokens + tokens[None, :], mask=inside, other=other)


@triton.jit
def _merge_tiles(
    top_LN, total_LN, tokens, num_tokens, L: tl.constexpr, TOKEN_BLOCK: tl.constexpr, TILE_BLOCK: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """(top, total): a token's largest logit, and its sum of exponentials counted from there."""
    top = tl.full((TOKEN_BLOCK,), float("-inf"), dtype=ACCUMULATE)
    total = tl.zeros((TOKEN_BLOCK,), dtype=ACCUMULATE)
    for first in range(0, L, TILE_BLOCK):
        tile_top = _of_tiles(top_LN, first, tokens, num_tokens, L, TILE_BLOCK, float("-inf"))
        tile_total = _of_tiles(total_LN, first, tokens, num_tokens, L, TILE_BLOCK, 0.0)
        new_top = tl.maximum(top, tl.max(tile_top, axis=0))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = total * tl.exp(top - shift) + tl.sum(tile_total * tl.exp(tile_top - shift[None, :]), axis=0)
        top = new_top
    return top, total


@triton.jit
def _sum_tiles(
    sums_LN, top_LN, top, tokens, num_tokens, SQUARES: tl.constexpr, L: tl.constexpr, TOKEN_BLOCK: tl.constexpr,
    TILE_BLOCK: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """What tiles summed of exponentials (SQUARES: of their squares) from their own maxima, counted from the token's."""
    sums = tl.zeros((TOKEN_BLOCK,), dtype=ACCUMULATE)
    for first in range(0, L, TILE_BLOCK):
        share = tl.exp(_of_tiles(top_LN, first, tokens, num_tokens, L, TILE_BLOCK, float("-inf")) - top[None, :])
        if SQUARES:
            share *= share
        tile_sums = _of_tiles(sums_LN, first, tokens, num_tokens, L, TILE_BLOCK, 0.0)
        sums += tl.sum(tl.where(share == 0, 0.0, share * tile_sums), axis=0)  # a sum may be infinite there
    return sums


@triton.jit(do_not_specialize=["num_tokens"])
def finish_tokens_kernel(
    top_LN, total_LN, expected_LN, squares_LN, ref_top_LN, ref_total_LN, kl_LN, reverse_kl_LN,
    top_N, inverse_total_N, mean_N, over_squares_N, ref_top_N, ref_inverse_total_N, lead_N,
    target_logits_N, ref_logps_N, weights_N, logps_N, weighted_N,
    entropy_N, top1_N, kl_N, reverse_kl_N, collision_N, num_tokens,
    L: tl.constexpr, TOKEN_BLOCK: tl.constexpr, TILE_BLOCK: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """Reduce the tiles of each token: what its softmax needs, log-prob of the target, weighted log-ratio, the terms."""
    tokens = tl.program_id(0) * TOKEN_BLOCK + tl.arange(0, TOKEN_BLOCK)
    real = tokens < num_tokens
    top, total = _merge_tiles(top_LN, total_LN, tokens, num_tokens, L, TOKEN_BLOCK, TILE_BLOCK, ACCUMULATE)
    target_logit = tl.load(target_logits_N + tokens, mask=real, other=0.0)
    logps = (target_logit - top) - tl.log(total)
    tl.store(top_N + tokens, top, mask=real)
    tl.store(inverse_total_N + tokens, 1.0 / total, mask=real)
    tl.store(logps_N + tokens, logps, mask=real)
    ref_logps = tl.load(ref_logps_N + tokens, mask=real, other=0.0).to(ACCUMULATE)
    weights = tl.load(weights_N + tokens, mask=real, other=0.0).to(ACCUMULATE)
    tl.store(weighted_N + tokens, weights * (logps - ref_logps), mask=real)  # a^t r^t, the summand of Eq. 5

    if top1_N is not None:
        tl.store(top1_N + tokens, target_logit >= top, mask=real)
    if entropy_N is not None:
        expected = tl.zeros((TOKEN_BLOCK,), dtype=ACCUMULATE)
        for first in range(0, L, TILE_BLOCK):
            # A tile counted from its own maximum.
            tile_top = _of_tiles(top_LN, first, tokens, num_tokens, L, TILE_BLOCK, float("-inf"))
            below = tl.maximum(tile_top - top[None, :], LEAST)
            tile_total = _of_tiles(total_LN, first, tokens, num_tokens, L, TILE_BLOCK, 0.0)
            tile_expected = _of_tiles(expected_LN, first, tokens, num_tokens, L, TILE_BLOCK, 0.0)
            expected += tl.sum(tl.exp(below) * (tile_expected + tile_total * below), axis=0)
        mean = expected / total
        tl.store(mean_N + tokens, mean, mask=real)
        tl.store(entropy_N + tokens, tl.log(total) - mean, mask=real)
    if collision_N is not None:
        squares = _sum_tiles(squares_LN, top_LN, top, tokens, num_tokens, True, L, TOKEN_BLOCK, TILE_BLOCK, ACCUMULATE)
        tl.store(over_squares_N + tokens, total / squares, mask=real)
        tl.store(collision_N + tokens, tl.log(squares) - 2.0 * tl.log(total), mask=real)
    if ref_top_LN is not None:
        ref_top, ref_total = _merge_tiles(ref_top_LN, ref_total_LN, tokens, num_tokens, L, TOKEN_BLOCK, TILE_BLOCK,
                                          ACCUMULATE)
        tl.store(ref_top_N + tokens, ref_top, mask=real)
        tl.store(ref_inverse_total_N + tokens, 1.0 / ref_total, mask=real)
        between = (top - ref_top) + tl.log(total / ref_total)  # the two log-sum-exps
        if kl_N is not None:
            lead = _sum_tiles(kl_LN, ref_top_LN, ref_top, tokens, num_tokens, False, L, TOKEN_BLOCK, TILE_BLOCK,
                              ACCUMULATE) / ref_total
            tl.store(kl_N + tokens, between - lead, mask=real)
        if reverse_kl_N is not None:
            lead = _sum_tiles(reverse_kl_LN, top_LN, top, tokens, num_tokens, False, L, TOKEN_BLOCK, TILE_BLOCK,
                              ACCUMULATE) / total
            tl.store(lead_N + tokens, lead, mask=real)
            tl.store(reverse_kl_N + tokens, lead - between, mask=real)


@triton.jit
def sum_sequences_kernel(weighted_N, offsets, scale_S, ratio_S, SUM_BLOCK: tl.constexpr, ACCUMULATE: tl.constexpr):
    """scale times the sum of one sequence's weighted log-ratios; always in the same order."""
    sequence = tl.program_id(0)
    start = tl.load(offsets + sequence)
    end = tl.load(offsets + sequence + 1)
    sums = tl.zeros((SUM_BLOCK,), dtype=ACCUMULATE)
    while start < end:
        tokens = start + tl.arange(0, SUM_BLOCK)
        sums += tl.load(weighted_N + tokens, mask=tokens < end, other=0.0)
        start += SUM_BLOCK
    scale = tl.load(scale_S + sequence).to(ACCUMULATE)
    tl.store(ratio_S + sequence, scale * tl.sum(sums, axis=0))
