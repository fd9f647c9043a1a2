"""The kernels of the fused op: log-probs of response tokens and their weighted log-ratios, without all [N, V] logits.

`weighted_logratio_triton` (weighted_logratio.py launches all this) replaces (paper Eq. 5 with scale |y|):

    logits_NV = logit_scale * (hidden_ND @ head_VD.T + bias_V)
    logits_NV = softcap * tanh(logits_NV / softcap)
    logps_N = logits_NV.log_softmax(-1)[n, targets_N[n]]
    ratio_S[s] = scale_S[s] * sum over n in s of weights_N[n] * (logps_N[n] - ref_logps_N[n])

Forward, 2 N V D operations: each program makes one [BLOCK_N, BLOCK_V] tile of logits in registers and stores its
log-sum-exp as maximum and sum (one fp32 number would round away log p of a sure token); the program that owns a token's
target stores that logit. A second kernel reduces the tiles of each token and goes on to the weighted log-ratio, a third
sums each sequence. Nothing is locked, nothing added atomically.

Backward, 6 N V D: all coefficients dL/dlogps are known before it starts, so the vocabulary (and not the tokens) is cut
into waves that fit a fixed buffer. Per wave a kernel makes the logits again and stores their gradients dZ; one matrix
product over all tokens writes the wave's rows of the head's gradient, once; another adds to the hidden states' gradient
in fp32. So every result is bitwise the same from run to run.

With a cache, 8 - 2 c operations of N V D in all, c the share of the vocabulary that it holds: the forward keeps each
exp(logit - tile maximum) of the last tiles, and one elementwise kernel turns them in place into dZ when the
coefficients are known, instead of making their logits again:

    p_v = kept_v * exp(tile maximum - max z) / total; that of the target is made of its logit, as without a cache

Kept is fp16 times 2^15, which holds 11 bits down to 2^-29 of the tile's maximum and some down to 2^-39; bf16 would hold
8 bits, and the rounding of dZ to bf16 comes on top of it.

Entropy of the policy's distribution p at a token (nats), with c_v = z_v - max z and total = sum over v of exp(c_v):

    mean = sum over v of p_v * c_v
    entropy = log(total) - mean
    d entropy / d z_v = -p_v * (log p_v + entropy) = -p_v * (c_v - mean)

Neither of the entropy's two parts is below 0, so nothing cancels, and its gradient takes no logarithm: where p is 1, c
is 0 and what is left is mean, as exact as it was summed.

Legend: N response tokens, D hidden size, V vocabulary, S sequences (one after another along N), L tiles of a row of
logits, W columns of a wave, C columns of the cache, R blocks of rows. Needs triton only.
"""

import triton
import triton.language as tl

LEAST = tl.constexpr(-1e4)  # exp is 0 there in any dtype; 0 * LEAST is 0 as well, where 0 * -inf would be NaN
KEPT_SCALE = tl.constexpr(32768.0)  # of the exps in the cache, which are at most 1: fp16 ends at 65,504


@triton.jit
def _tile_place(num_row_blocks, num_col_blocks, GROUP_N: tl.constexpr):
    """(row block, column block) of this program: row blocks run fastest, GROUP_N at a time."""
    program = tl.program_id(0)
    programs_in_group = GROUP_N * num_col_blocks
    first_row = program // programs_in_group * GROUP_N
    rows_in_group = tl.minimum(num_row_blocks - first_row, GROUP_N)
    within = program % programs_in_group
    return first_row + within % rows_in_group, within // rows_in_group


@triton.jit
def _tanh(x, OPERAND: tl.constexpr):
    """tanh, for operands of 16 bits to their precision, else to a few units in the last place."""
    if OPERAND == tl.bfloat16 or OPERAND == tl.float16:
        return 1.0 - 2.0 / (1.0 + tl.exp(2.0 * x))
    # That would cancel near 0.
    square = x * x
    series = x * (1.0 + square * (-1.0 / 3 + square * (2.0 / 15 + square * (-17.0 / 315 + square * (62.0 / 2835)))))
    power = tl.exp(-2.0 * tl.abs(x))
    large = (1.0 - power) / (1.0 + power)
    return tl.where(square < 0.05, series, tl.where(x < 0, -large, large))


@triton.jit
def _logits_tile(
    hidden, head, bias, first_row, first_col, num_tokens, hidden_stride, head_stride,
    V: tl.constexpr, D: tl.constexpr, LOGIT_SCALE: tl.constexpr, SOFTCAP: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    ACCUMULATE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """The logits of one tile as the model means them, [BLOCK_N, BLOCK_V] in registers; forward and backward agree
    to the bit because both call this, with one BLOCK_D."""
    rows = first_row + tl.arange(0, BLOCK_N)
    cols = first_col + tl.arange(0, BLOCK_V)
    # 64-bit offsets to the tile, 32-bit within it: whole blocks of 64-bit addresses would not fit the registers.
    units = tl.arange(0, BLOCK_D)
    if not DESCRIPTORS:
        hidden += first_row.to(tl.int64) * hidden_stride
        head += first_col.to(tl.int64) * head_stride
        hidden_within = tl.arange(0, BLOCK_N)[:, None] * hidden_stride + units[None, :]
        head_within = tl.arange(0, BLOCK_V)[:, None] * head_stride + units[None, :]
    logits = tl.zeros((BLOCK_N, BLOCK_V), dtype=ACCUMULATE)
    for start in range(0, D, BLOCK_D):
        if DESCRIPTORS:  # out of bounds reads give zeros
            hidden_tile = hidden.load([first_row, start])
            head_tile = head.load([first_col, start])
        else:
            inside = (start + units < D)[None, :]
            hidden_tile = tl.load(hidden + start + hidden_within, mask=(rows < num_tokens)[:, None] & inside, other=0.0)
            head_tile = tl.load(head + start + head_within, mask=(cols < V)[:, None] & inside, other=0.0)
        logits = tl.dot(hidden_tile.to(OPERAND), tl.trans(head_tile).to(OPERAND), logits,
                        input_precision=PRECISION, out_dtype=ACCUMULATE)
    if bias is not None:
        logits += tl.load(bias + cols, mask=cols < V, other=0.0).to(ACCUMULATE)[None, :]
    if LOGIT_SCALE is not None:
        logits *= LOGIT_SCALE
    if SOFTCAP is not None:
        logits = SOFTCAP * _tanh(logits / SOFTCAP, OPERAND)
    return logits


# These change every batch: one compilation is enough.
@triton.jit(do_not_specialize=["num_tokens", "first_tile", "end_tile"])
def tile_statistics_kernel(
    hidden, head, bias, targets_N, top_LN, total_LN, expected_LN, target_logits_N, kept_NC, num_tokens, first_tile,
    end_tile, hidden_stride, head_stride,
    V: tl.constexpr, D: tl.constexpr, LOGIT_SCALE: tl.constexpr, SOFTCAP: tl.constexpr, KEPT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, GROUP_N: tl.constexpr,
    ACCUMULATE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Maximum and sum of exponentials of one tile of logits per token; with expected_LN also the sum of exp(c) * c.

    Tiles first_tile .. end_tile of the vocabulary, or all (None and None, which cost no register). With kept_NC, of
    these columns, it stores the exponentials too.
    """
    num_tiles = tl.cdiv(V, BLOCK_V) if end_tile is None else end_tile - first_tile
    row_block, wave_tile = _tile_place(tl.cdiv(num_tokens, BLOCK_N), num_tiles, GROUP_N)
    col_block = wave_tile if first_tile is None else first_tile + wave_tile
    first_row, first_col = row_block * BLOCK_N, col_block * BLOCK_V
    logits = _logits_tile(hidden, head, bias, first_row, first_col, num_tokens, hidden_stride, head_stride, V, D,
                          LOGIT_SCALE, SOFTCAP, BLOCK_N, BLOCK_V, BLOCK_D, ACCUMULATE, OPERAND, PRECISION, DESCRIPTORS)
    rows = first_row + tl.arange(0, BLOCK_N)
    cols = first_col + tl.arange(0, BLOCK_V)
    if V % BLOCK_V != 0:
        logits = tl.where((cols < V)[None, :], logits, float("-inf"))

    targets = tl.load(targets_N + rows, mask=rows < num_tokens, other=-1)
    target_logit = tl.sum(tl.where(cols[None, :] == targets[:, None], logits, 0.0), axis=1)
    owned = (rows < num_tokens) & (targets >= first_col) & (targets < tl.minimum(first_col + BLOCK_V, V))
    tl.store(target_logits_N + rows, target_logit, mask=owned)

    top = tl.max(logits, axis=1)
    shift = tl.where(top == float("-inf"), 0.0, top)  # a tile that a bias of -inf rules out has no probability at all
    centred = logits - shift[:, None]
    exps = tl.exp(centred)
    total = tl.sum(exps, axis=1)
    place = col_block.to(tl.int64) * num_tokens + rows
    tl.store(top_LN + place, top, mask=rows < num_tokens)
    tl.store(total_LN + place, total, mask=rows < num_tokens)
    if expected_LN is not None:
        expected = tl.sum(tl.where(exps == 0, 0.0, exps * centred), axis=1)  # LEAST would take more registers here
        tl.store(expected_LN + place, expected, mask=rows < num_tokens)
    if kept_NC is not None:
        kept = (exps * KEPT_SCALE).to(KEPT)
        if DESCRIPTORS:  # out of bounds writes are left out
            kept_NC.store([first_row, wave_tile * BLOCK_V], kept)
        else:
            stride = num_tiles * BLOCK_V
            kept_at = (kept_NC + first_row.to(tl.int64) * stride + wave_tile * BLOCK_V
                       + tl.arange(0, BLOCK_N)[:, None] * stride + tl.arange(0, BLOCK_V)[None, :])
            tl.store(kept_at, kept, mask=(rows < num_tokens)[:, None] & (cols < V)[None, :])


@triton.jit(do_not_specialize=["num_tokens"])
def finish_tokens_kernel(
    top_LN, total_LN, expected_LN, target_logits_N, ref_logps_N, weights_N, logps_N, top_N, inverse_total_N, mean_N,
    weighted_N, entropy_N, top1_N, num_tokens,
    L: tl.constexpr, TOKEN_BLOCK: tl.constexpr, TILE_BLOCK: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """Reduce the tiles of each token: what its softmax needs, log-prob of the target, weighted log-ratio."""
    tokens = tl.program_id(0) * TOKEN_BLOCK + tl.arange(0, TOKEN_BLOCK)
    real = tokens < num_tokens
    top = tl.full((TOKEN_BLOCK,), float("-inf"), dtype=ACCUMULATE)
    total = tl.zeros((TOKEN_BLOCK,), dtype=ACCUMULATE)
    for first in range(0, L, TILE_BLOCK):
        tiles = first + tl.arange(0, TILE_BLOCK)
        inside = (tiles < L)[:, None] & real[None, :]
        place = tiles.to(tl.int64)[:, None] * num_tokens + tokens[None, :]
        tile_top = tl.load(top_LN + place, mask=inside, other=float("-inf"))
        tile_total = tl.load(total_LN + place, mask=inside, other=0.0)
        new_top = tl.maximum(top, tl.max(tile_top, axis=0))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = total * tl.exp(top - shift) + tl.sum(tile_total * tl.exp(tile_top - shift[None, :]), axis=0)
        top = new_top
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
            tiles = first + tl.arange(0, TILE_BLOCK)
            inside = (tiles < L)[:, None] & real[None, :]
            place = tiles.to(tl.int64)[:, None] * num_tokens + tokens[None, :]
            # A tile counted from its own maximum.
            below = tl.maximum(tl.load(top_LN + place, mask=inside, other=float("-inf")) - top[None, :], LEAST)
            tile_total = tl.load(total_LN + place, mask=inside, other=0.0)
            tile_expected = tl.load(expected_LN + place, mask=inside, other=0.0)
            expected += tl.sum(tl.exp(below) * (tile_expected + tile_total * below), axis=0)
        mean = expected / total
        tl.store(mean_N + tokens, mean, mask=real)
        tl.store(entropy_N + tokens, tl.log(total) - mean, mask=real)


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


@triton.jit(do_not_specialize=["num_tokens", "first_wave_col", "end_wave_col"])
def logits_gradient_kernel(
    hidden, head, bias, targets_N, top_N, inverse_total_N, mean_N, coefficients_N, grad_entropy_N, gradient_NW,
    bias_gradient_RW, num_tokens, first_wave_col, end_wave_col, hidden_stride, head_stride, wave_stride,
    V: tl.constexpr, D: tl.constexpr, LOGIT_SCALE: tl.constexpr, SOFTCAP: tl.constexpr, BUFFER: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, GROUP_N: tl.constexpr,
    ACCUMULATE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """One tile of dL/d(hidden @ head.T), and its column sums when there is a bias."""
    num_cols = end_wave_col - first_wave_col
    row_block, col_block = _tile_place(tl.cdiv(num_tokens, BLOCK_N), tl.cdiv(num_cols, BLOCK_V), GROUP_N)
    first_row, first_col = row_block * BLOCK_N, first_wave_col + col_block * BLOCK_V
    rows = first_row + tl.arange(0, BLOCK_N)
    cols = first_col + tl.arange(0, BLOCK_V)
    wave_cols = col_block * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = (rows < num_tokens)[:, None] & (wave_cols < num_cols)[None, :]
    if not DESCRIPTORS:
        gradient_at = (gradient_NW + first_row.to(tl.int64) * wave_stride
                       + tl.arange(0, BLOCK_N)[:, None] * wave_stride + wave_cols[None, :])
    bias_at = bias_gradient_RW + row_block.to(tl.int64) * wave_stride + wave_cols if bias is not None else None

    coefficients = tl.load(coefficients_N + rows, mask=rows < num_tokens, other=0.0)
    used = coefficients != 0  # not max(abs()): that would take a NaN for a zero and hide it
    if grad_entropy_N is not None:
        grad_entropy = tl.load(grad_entropy_N + rows, mask=rows < num_tokens, other=0.0)
        used |= grad_entropy != 0
    if tl.sum(used.to(tl.int32), axis=0) == 0:
        nothing = tl.zeros((BLOCK_N, BLOCK_V), dtype=BUFFER)
        if DESCRIPTORS:
            gradient_NW.store([first_row, col_block * BLOCK_V], nothing)
        else:
            tl.store(gradient_at, nothing, mask=inside)
        if bias is not None:
            tl.store(bias_at, tl.zeros((BLOCK_V,), dtype=ACCUMULATE), mask=wave_cols < num_cols)
        return

    logits = _logits_tile(hidden, head, bias, first_row, first_col, num_tokens, hidden_stride, head_stride, V, D,
                          LOGIT_SCALE, SOFTCAP, BLOCK_N, BLOCK_V, BLOCK_D, ACCUMULATE, OPERAND, PRECISION, DESCRIPTORS)
    targets = tl.load(targets_N + rows, mask=rows < num_tokens, other=-1)
    top = tl.load(top_N + rows, mask=rows < num_tokens, other=0.0)
    inverse_total = tl.load(inverse_total_N + rows, mask=rows < num_tokens, other=0.0)
    # d logp / d logits = onehot - p. The onehot goes in before any rounding: 1 - p of a sure token is all its gradient.
    onehot = (cols[None, :] == targets[:, None]).to(ACCUMULATE)
    centred = logits - top[:, None]
    p = tl.exp(centred) * inverse_total[:, None]
    gradient = coefficients[:, None] * (onehot - p)
    if grad_entropy_N is not None:
        mean = tl.load(mean_N + rows, mask=rows < num_tokens, other=0.0)
        gradient -= grad_entropy[:, None] * (p * (tl.maximum(centred, LEAST) - mean[:, None]))
    if SOFTCAP is not None:
        gradient *= 1.0 - (logits / SOFTCAP) * (logits / SOFTCAP)
    if LOGIT_SCALE is not None:
        gradient *= LOGIT_SCALE
    if bias is not None:
        tl.store(bias_at, tl.sum(tl.where((rows < num_tokens)[:, None], gradient, 0.0), axis=0),
                 mask=wave_cols < num_cols)
    if DESCRIPTORS:  # out of bounds writes are left out
        gradient_NW.store([first_row, col_block * BLOCK_V], gradient.to(BUFFER))
    else:
        tl.store(gradient_at, gradient.to(BUFFER), mask=inside)


@triton.jit(do_not_specialize=["num_tokens"])
def kept_gradient_kernel(
    kept_NC, gradient_NC, targets_N, target_logits_N, top_LN, top_N, inverse_total_N, coefficients_N, bias_gradient_RC,
    num_tokens, stride,
    V: tl.constexpr, LOGIT_SCALE: tl.constexpr, BUFFER: tl.constexpr, ROWS: tl.constexpr, BLOCK_V: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """What logits_gradient_kernel makes, of exponentials that were kept: both tensors are the same memory.

    stride: columns of the cache, whole tiles, of which the last one may be ragged. top_LN: maxima of these tiles.
    """
    tiles = stride // BLOCK_V
    row_block, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    first_row = row_block * ROWS
    rows = first_row + tl.arange(0, ROWS)
    kept_cols = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    cols = (tl.cdiv(V, BLOCK_V) - tiles) * BLOCK_V + kept_cols
    inside = (rows < num_tokens)[:, None] & (cols < V)[None, :]
    at = first_row.to(tl.int64) * stride + tl.arange(0, ROWS)[:, None] * stride + kept_cols[None, :]

    coefficients = tl.load(coefficients_N + rows, mask=rows < num_tokens, other=0.0)
    gradient = tl.zeros((ROWS, BLOCK_V), dtype=ACCUMULATE)
    if tl.sum((coefficients != 0).to(tl.int32), axis=0) > 0:
        targets = tl.load(targets_N + rows, mask=rows < num_tokens, other=-1)
        tile_top = tl.load(top_LN + tile.to(tl.int64) * num_tokens + rows, mask=rows < num_tokens, other=0.0)
        top = tl.load(top_N + rows, mask=rows < num_tokens, other=0.0)
        inverse_total = tl.load(inverse_total_N + rows, mask=rows < num_tokens, other=0.0)
        target_logit = tl.load(target_logits_N + rows, mask=rows < num_tokens, other=0.0)
        share = tl.exp(tile_top - top) * inverse_total * (1.0 / KEPT_SCALE)
        p = tl.load(kept_NC + at, mask=inside, other=0.0).to(ACCUMULATE) * share[:, None]
        is_target = cols[None, :] == targets[:, None]
        p = tl.where(is_target, (tl.exp(target_logit - top) * inverse_total)[:, None], p)
        gradient = coefficients[:, None] * (is_target.to(ACCUMULATE) - p)
        if LOGIT_SCALE is not None:
            gradient *= LOGIT_SCALE
    if bias_gradient_RC is not None:
        column_sums = tl.sum(tl.where((rows < num_tokens)[:, None], gradient, 0.0), axis=0)
        tl.store(bias_gradient_RC + row_block.to(tl.int64) * stride + kept_cols, column_sums, mask=cols < V)
    tl.store(gradient_NC + at, gradient.to(BUFFER), mask=inside)
