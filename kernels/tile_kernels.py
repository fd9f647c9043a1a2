"""The kernels of the fused op: log-probs of response tokens and their weighted log-ratios, without all [N, V] logits.

`weighted_logratio_triton` (weighted_logratio.py launches all this) replaces (paper Eq. 5 with scale |y|):

    logits_NV = logit_scale * (hidden_ND @ head_VD.T + bias_V)
    logits_NV = softcap * tanh(logits_NV / softcap)
    logps_N = logits_NV.log_softmax(-1)[n, targets_N[n]]
    ratio_S[s] = scale_S[s] * sum over n in s of weights_N[n] * (logps_N[n] - ref_logps_N[n])

Forward, 2 N V D operations: each program makes one [BLOCK_N, BLOCK_V] tile of logits in registers and stores its
log-sum-exp as maximum and sum (one fp32 number would round away log p of a sure token); the program that owns a token's
target stores that logit. A second kernel (token_kernels.py) reduces the tiles of each token and goes on to the weighted
log-ratio, a third sums each sequence. Nothing is locked, nothing added atomically.

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

Collision, the logarithm of the sum of p^2:

    collision = log(sum over v of exp(2 c_v)) - 2 log(total)
    d collision / d z_v = 2 (p_v^2 / sum of p^2 - p_v) = 2 p_v (exp(c_v) * total / sum of exp(2 c) - 1)

Divergences from a reference of the distribution q, with logits zr of its own hidden states and head (E hidden units):

    kl, of q from p:           lse(z) - lse(zr) - sum over v of q_v (z_v - zr_v)
    reverse_kl, of p from q:   lead - (lse(z) - lse(zr)), lead = sum over v of p_v (z_v - zr_v)
    d kl / d z_v = p_v - q_v
    d reverse_kl / d z_v = p_v (log p_v - log q_v - reverse_kl) = p_v (z_v - zr_v - lead)

One sum of differences for each direction: two sums, of z and of zr, would cancel where the models agree. The difference
of the log-sum-exps is that of the maxima and the logarithm of the totals' ratio, for the same reason. Where both models
are the same tensors every difference is 0 to the bit. No gradient goes to the reference. Both tiles of logits are in
registers at once, so these tiles are smaller. Forward 4 N V D operations, backward 8: the reference's logits are made
again too. Beside these terms nothing is cached.

Legend: N response tokens, D hidden size, E that of the reference, V vocabulary, L tiles of a row of logits, W columns
of a wave, C columns of the cache, R blocks of rows. Needs triton only.
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


@triton.jit
def _of_rows(values_N, rows, num_tokens):
    """[BLOCK_N]; 0 past the last token."""
    return tl.load(values_N + rows, mask=rows < num_tokens, other=0.0)


@triton.jit
def _softmax_of_tile(logits, top_LN, total_LN, place, mask):
    """(exps, centred) of a tile of logits from its maximum, which it stores with the sum of exps."""
    top = tl.max(logits, axis=1)
    shift = tl.where(top == float("-inf"), 0.0, top)  # a tile that a bias of -inf rules out has no probability at all
    centred = logits - shift[:, None]
    exps = tl.exp(centred)
    tl.store(top_LN + place, top, mask=mask)
    tl.store(total_LN + place, tl.sum(exps, axis=1), mask=mask)
    return exps, centred


# These change every batch: one compilation is enough.
@triton.jit(do_not_specialize=["num_tokens", "first_tile", "end_tile"])
def tile_statistics_kernel(
    hidden, head, bias, ref_hidden, ref_head, ref_bias, targets_N,
    top_LN, total_LN, expected_LN, squares_LN, ref_top_LN, ref_total_LN, kl_LN, reverse_kl_LN, target_logits_N, kept_NC,
    num_tokens, first_tile, end_tile, hidden_stride, head_stride, ref_hidden_stride, ref_head_stride,
    V: tl.constexpr, D: tl.constexpr, E: tl.constexpr, LOGIT_SCALE: tl.constexpr, SOFTCAP: tl.constexpr,
    KEPT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, GROUP_N: tl.constexpr,
    ACCUMULATE: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Maximum and sum of exponentials of one tile of logits per token; what the terms sum of it, where there is a
    tensor for that: exp(c) * c, exp(c)^2, and with the reference's logits the differences.

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

    place = col_block.to(tl.int64) * num_tokens + rows
    if ref_head is not None:
        ref_logits = _logits_tile(
            ref_hidden, ref_head, ref_bias, first_row, first_col, num_tokens, ref_hidden_stride, ref_head_stride, V, E,
            LOGIT_SCALE, SOFTCAP, BLOCK_N, BLOCK_V, BLOCK_D, ACCUMULATE, OPERAND, PRECISION, DESCRIPTORS)
        if V % BLOCK_V != 0:
            ref_logits = tl.where((cols < V)[None, :], ref_logits, float("-inf"))
        ref_exps, _ = _softmax_of_tile(ref_logits, ref_top_LN, ref_total_LN, place, rows < num_tokens)
        if kl_LN is not None:  # what has no probability adds nothing, where a difference may be infinite
            lead = tl.sum(tl.where(ref_exps == 0, 0.0, ref_exps * (logits - ref_logits)), axis=1)
            tl.store(kl_LN + place, lead, mask=rows < num_tokens)
    exps, centred = _softmax_of_tile(logits, top_LN, total_LN, place, rows < num_tokens)
    if reverse_kl_LN is not None:
        lead = tl.sum(tl.where(exps == 0, 0.0, exps * (logits - ref_logits)), axis=1)
        tl.store(reverse_kl_LN + place, lead, mask=rows < num_tokens)
    if squares_LN is not None:
        tl.store(squares_LN + place, tl.sum(exps * exps, axis=1), mask=rows < num_tokens)
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


@triton.jit(do_not_specialize=["num_tokens", "first_wave_col", "end_wave_col"])
def logits_gradient_kernel(
    hidden, head, bias, ref_hidden, ref_head, ref_bias, targets_N,
    top_N, inverse_total_N, mean_N, over_squares_N, ref_top_N, ref_inverse_total_N, lead_N,
    coefficients_N, grad_entropy_N, grad_kl_N, grad_reverse_kl_N, grad_collision_N, gradient_NW, bias_gradient_RW,
    num_tokens, first_wave_col, end_wave_col, hidden_stride, head_stride, ref_hidden_stride, ref_head_stride,
    wave_stride,
    V: tl.constexpr, D: tl.constexpr, E: tl.constexpr, LOGIT_SCALE: tl.constexpr, SOFTCAP: tl.constexpr,
    BUFFER: tl.constexpr,
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

    coefficients = _of_rows(coefficients_N, rows, num_tokens)
    used = coefficients != 0  # not max(abs()): that would take a NaN for a zero and hide it
    if grad_entropy_N is not None:
        grad_entropy = _of_rows(grad_entropy_N, rows, num_tokens)
        used |= grad_entropy != 0
    if grad_kl_N is not None:
        grad_kl = _of_rows(grad_kl_N, rows, num_tokens)
        used |= grad_kl != 0
    if grad_reverse_kl_N is not None:
        grad_reverse_kl = _of_rows(grad_reverse_kl_N, rows, num_tokens)
        used |= grad_reverse_kl != 0
    if grad_collision_N is not None:
        grad_collision = _of_rows(grad_collision_N, rows, num_tokens)
        used |= grad_collision != 0
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
    if ref_head is not None:
        ref_logits = _logits_tile(
            ref_hidden, ref_head, ref_bias, first_row, first_col, num_tokens, ref_hidden_stride, ref_head_stride, V, E,
            LOGIT_SCALE, SOFTCAP, BLOCK_N, BLOCK_V, BLOCK_D, ACCUMULATE, OPERAND, PRECISION, DESCRIPTORS)
    targets = tl.load(targets_N + rows, mask=rows < num_tokens, other=-1)
    top = _of_rows(top_N, rows, num_tokens)
    inverse_total = _of_rows(inverse_total_N, rows, num_tokens)
    # d logp / d logits = onehot - p. The onehot goes in before any rounding: 1 - p of a sure token is all its gradient.
    onehot = (cols[None, :] == targets[:, None]).to(ACCUMULATE)
    centred = logits - top[:, None]
    p = tl.exp(centred) * inverse_total[:, None]
    gradient = coefficients[:, None] * (onehot - p)
    if grad_entropy_N is not None:
        mean = _of_rows(mean_N, rows, num_tokens)
        gradient -= grad_entropy[:, None] * (p * (tl.maximum(centred, LEAST) - mean[:, None]))
    if grad_collision_N is not None:
        over_squares = _of_rows(over_squares_N, rows, num_tokens)
        gradient += 2.0 * grad_collision[:, None] * (p * (tl.exp(centred) * over_squares[:, None] - 1.0))
    if grad_reverse_kl_N is not None:
        lead = _of_rows(lead_N, rows, num_tokens)
        # What has no probability, or no upstream gradient, gets 0 even where a logit is infinite.
        nothing = (p == 0) | (grad_reverse_kl == 0)[:, None]
        slope = p * ((logits - ref_logits) - lead[:, None])
        gradient += tl.where(nothing, 0.0, grad_reverse_kl[:, None] * slope)
    if grad_kl_N is not None:
        ref_top = _of_rows(ref_top_N, rows, num_tokens)
        q = tl.exp(ref_logits - ref_top[:, None]) * _of_rows(ref_inverse_total_N, rows, num_tokens)[:, None]
        gradient += grad_kl[:, None] * (p - q)
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
