"""The fused op in Triton: its launchers, its autograd function and `weighted_logratio_triton`.

What is computed, and why so, stands at the top of tile_kernels.py, which holds the kernels.

Legend: N response tokens, D hidden size, V vocabulary, S sequences (one after another along N), L tiles of a row of
logits, W columns of a wave, C columns of the cache, R blocks of rows. Needs torch and triton only.
"""

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable
from triton.tools.tensor_descriptor import TensorDescriptor

from twdpo.kernels.tile_kernels import (
    finish_tokens_kernel,
    kept_gradient_kernel,
    logits_gradient_kernel,
    sum_sequences_kernel,
    tile_statistics_kernel,
)

INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1: kernels run on the CPU, in numpy
WAVE_MIB = 160  # buffer for the gradients of one wave's logits
TOKEN_BLOCK = 32  # tokens of one program of the finishing kernel
TILE_BLOCK = 64  # tiles it reads at a time
KEPT_ROWS = 32  # tokens of one program of the kernel that reads the cache
SUM_BLOCK = 1024  # tokens that a sequence's sum reads at a time


@dataclass(frozen=True)
class Tile:
    """How a logits tile is computed. Results do not depend on it beyond the rounding of fp32 sums."""

    block_n: int  # tokens
    block_v: int  # vocabulary entries
    block_d: int  # hidden units a step of the inner loop
    num_warps: int
    num_stages: int
    group_n: int = 16  # row blocks that share a tile of the head while it is in the L2 cache
    descriptors: bool = False  # load through the tensor memory accelerator (compute capability 9.0 and up)


class Tiles(NamedTuple):
    """Of the two kernels that make logits. One block_d, so that both make the same bits."""

    statistics: Tile
    gradient: Tile


# By element size in bytes, then the smallest compute capability. 12.x has less than half the shared memory of 9.0.
SMALL = Tile(128, 128, 32, 8, 4)
TILES = {
    2: {(12, 0): Tiles(SMALL, SMALL), (0, 0): Tiles(SMALL, SMALL),
        (9, 0): Tiles(Tile(128, 256, 64, 8, 3, descriptors=True), Tile(128, 256, 64, 8, 4, descriptors=True))},
    4: {(0, 0): Tiles(Tile(64, 64, 32, 4, 3), Tile(64, 64, 32, 4, 3))},
}
INTERPRETED_TILES = Tiles(Tile(64, 128, 64, 1, 1), Tile(64, 128, 64, 1, 1))


@dataclass(frozen=True)
class Plan:
    """What one call needs to know besides its tensors."""

    logit_scale: float | None
    softcap: float | None
    tiles: Tiles
    wave_mib: float
    terms: tuple[str, ...] = ()
    head_cache_gib: float = 0.0


class Softmax(NamedTuple):
    """What a token's softmax is made from again, [N] each; see tile_kernels.py."""

    top_N: torch.Tensor  # the largest logit
    inverse_total_N: torch.Tensor  # 1 / sum of exp(logit - top)
    mean_N: torch.Tensor | None  # of logit - top; for the entropy alone


class Kept(NamedTuple):
    """The cache of the last columns, which the backward pass turns into their gradients; see tile_kernels.py."""

    exps_NC: torch.Tensor  # exp(logit - tile maximum) times KEPT_SCALE; rows are whole tiles apart
    top_LN: torch.Tensor  # maxima of these tiles
    target_logits_N: torch.Tensor
    first_col: int


class Wave(NamedTuple):
    """dL/d(hidden @ head.T) of some columns, and its sums over blocks of rows when there is a bias."""

    first_col: int
    gradient_NW: torch.Tensor
    sums_RW: torch.Tensor | None


def default_tiles(dtype: torch.dtype, capability: tuple[int, int], aligned: bool = True) -> Tiles:
    """The tiles for operands of this dtype on a GPU of this compute capability.

    aligned: whether rows of both operands start at multiples of 16 bytes, as the tensor memory accelerator asks.
    """
    choices = TILES[dtype.itemsize]
    tiles = choices[max(least for least in choices if least <= capability)]
    # Without the accelerator the addresses of a large tile would not fit the registers.
    return choices[0, 0] if tiles.statistics.descriptors and not aligned else tiles


def _has_aligned_rows(*matrices) -> bool:
    return all(matrix.data_ptr() % 16 == 0 and matrix.stride(0) * matrix.element_size() % 16 == 0
               for matrix in matrices)


def _accumulation_dtype(operand_dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if operand_dtype == torch.float64 else torch.float32


def _buffer_dtype(operand_dtype: torch.dtype) -> torch.dtype:
    """Of gradients of logits: the interpreter's casts truncate, it keeps them unrounded."""
    return _accumulation_dtype(operand_dtype) if INTERPRETED else operand_dtype


def _kept_dtype(operand_dtype: torch.dtype) -> torch.dtype:
    """Of the cache, as wide as the gradients that take its place."""
    dtype = _buffer_dtype(operand_dtype)
    return torch.float16 if dtype.itemsize == 2 else dtype


def _triton_dtype(dtype: torch.dtype) -> tl.dtype:
    return getattr(tl, str(dtype).removeprefix("torch."))


def _tile_arguments(hidden_ND, head_VD, plan: Plan, tile: Tile) -> tuple[tuple, dict]:
    """(the two operands as a tile kernel takes them, its constants)."""
    descriptors = tile.descriptors and _has_aligned_rows(hidden_ND, head_VD)
    operands = (hidden_ND, head_VD)
    if descriptors:
        operands = (TensorDescriptor.from_tensor(hidden_ND, [tile.block_n, tile.block_d]),
                    TensorDescriptor.from_tensor(head_VD, [tile.block_v, tile.block_d]))
    accumulate = _triton_dtype(_accumulation_dtype(hidden_ND.dtype))
    # The interpreter's bf16 products are wrong.
    operand = accumulate if INTERPRETED else _triton_dtype(hidden_ND.dtype)
    tf32 = hidden_ND.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    constants = dict(
        V=head_VD.shape[0], D=head_VD.shape[1], LOGIT_SCALE=plan.logit_scale, SOFTCAP=plan.softcap,
        BLOCK_N=tile.block_n, BLOCK_V=tile.block_v, BLOCK_D=tile.block_d, GROUP_N=tile.group_n,
        ACCUMULATE=accumulate, OPERAND=operand, PRECISION="tf32" if tf32 else "ieee", DESCRIPTORS=descriptors,
        num_warps=tile.num_warps, num_stages=tile.num_stages)
    return operands, constants


def forward(hidden_ND, head_VD, bias_V, targets_N, ref_logps_N, weights_N, offsets, scale_S, plan: Plan):
    """(ratio_S, logps_N, Softmax, {name: [N]} of the terms that `plan` asks for, Kept or None).

    offsets: int64 [S + 1], first token of each sequence and N, on the device.
    """
    num_tokens, num_tiles = len(hidden_ND), triton.cdiv(len(head_VD), plan.tiles.statistics.block_v)
    accumulate = _accumulation_dtype(hidden_ND.dtype)

    def empty(*shape: int, dtype: torch.dtype = accumulate) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=hidden_ND.device)

    logps_N, top_N, inverse_total_N, weighted_N = (empty(num_tokens) for _ in range(4))
    ratio_S = empty(len(scale_S))
    terms = {name: empty(num_tokens, dtype=torch.bool if name == "top1" else accumulate) for name in plan.terms}
    with_entropy = "entropy" in terms
    mean_N, kept = empty(num_tokens) if with_entropy else None, None
    if num_tokens:
        top_LN, total_LN = empty(num_tiles, num_tokens), empty(num_tiles, num_tokens)
        expected_LN = empty(num_tiles, num_tokens) if with_entropy else None
        # No tile owns a target that is not in the vocabulary: its log-prob is NaN, not what memory happened to hold.
        target_logits_N = torch.full_like(logps_N, float("nan"))
        kept = launch_statistics(hidden_ND, head_VD, bias_V, targets_N, top_LN, total_LN, expected_LN, target_logits_N,
                                 plan)
        finish_tokens_kernel[(triton.cdiv(num_tokens, TOKEN_BLOCK),)](
            top_LN, total_LN, expected_LN, target_logits_N, ref_logps_N, weights_N, logps_N, top_N, inverse_total_N,
            mean_N, weighted_N, terms.get("entropy"), terms.get("top1"), num_tokens, L=num_tiles,
            TOKEN_BLOCK=TOKEN_BLOCK, TILE_BLOCK=TILE_BLOCK, ACCUMULATE=_triton_dtype(accumulate))
    sum_sequences(weighted_N, offsets, scale_S, ratio_S)
    return ratio_S, logps_N, Softmax(top_N, inverse_total_N, mean_N), terms, kept


def launch_statistics(hidden_ND, head_VD, bias_V, targets_N, top_LN, total_LN, expected_LN, target_logits_N,
                      plan: Plan) -> Kept | None:
    """Fill the tensors with what tile_statistics_kernel finds; what the plan's cache holds, if that is a tile."""
    (num_tiles, num_tokens), tile, dtype = top_LN.shape, plan.tiles.statistics, _kept_dtype(hidden_ND.dtype)
    operands, constants = _tile_arguments(hidden_ND, head_VD, plan, tile)
    sums = 0 if bias_V is None else triton.cdiv(num_tokens, KEPT_ROWS) * top_LN.element_size()  # of turn_kept
    tile_bytes = tile.block_v * (num_tokens * dtype.itemsize + sums)
    kept_tiles = int(min(plan.head_cache_gib * 2**30 / tile_bytes, num_tiles))
    first_kept, kept = num_tiles - kept_tiles, None
    if kept_tiles:
        first_col = first_kept * tile.block_v
        exps_NC = torch.empty(num_tokens, kept_tiles * tile.block_v, dtype=dtype, device=hidden_ND.device)
        kept = Kept(exps_NC[:, :len(head_VD) - first_col], top_LN[first_kept:], target_logits_N, first_col)
    for first, end, exps_NC in ((0, first_kept, None), (first_kept, num_tiles, kept.exps_NC if kept else None)):
        if exps_NC is not None and constants["DESCRIPTORS"]:
            exps_NC = TensorDescriptor.from_tensor(exps_NC, [tile.block_n, tile.block_v])
        if end > first:
            tile_statistics_kernel[(triton.cdiv(num_tokens, tile.block_n) * (end - first),)](
                *operands, bias_V, targets_N, top_LN, total_LN, expected_LN, target_logits_N, exps_NC, num_tokens,
                *((first, end) if kept else (None, None)), hidden_ND.stride(0), head_VD.stride(0),
                KEPT=_triton_dtype(dtype), **constants)
    return kept


def sum_sequences(weighted_N, offsets, scale_S, ratio_S) -> None:
    """ratio_S[s] = scale_S[s] * sum of weighted_N over sequence s."""
    if len(ratio_S):
        sum_sequences_kernel[(len(ratio_S),)](weighted_N, offsets, scale_S, ratio_S, SUM_BLOCK=SUM_BLOCK,
                                               ACCUMULATE=_triton_dtype(weighted_N.dtype))


def wave_columns(num_tokens: int, vocabulary: int, element_size: int, wave_mib: float, block_v: int) -> int:
    """Columns of a wave: as many as the buffer holds, evened out over the waves, in whole tiles."""
    most = max(int(wave_mib * 2**20) // (num_tokens * element_size) // block_v, 1) * block_v
    waves = triton.cdiv(vocabulary, most)
    return triton.cdiv(triton.cdiv(vocabulary, waves), block_v) * block_v


def backward(hidden_ND, head_VD, bias_V, targets_N, softmax: Softmax, coefficients_N, grad_entropy_N,
             kept: Kept | None, plan: Plan, needs: tuple[bool, bool, bool]):
    """(dL/dhidden, dL/dhead, dL/dbias) for coefficients dL/dlogps and dL/dentropy; None where `needs` says no."""
    accumulate, device = softmax.top_N.dtype, softmax.top_N.device
    needs_hidden, needs_head, needs_bias = needs
    grad_hidden_ND = torch.zeros(hidden_ND.shape, dtype=accumulate, device=device) if needs_hidden else None
    if not len(hidden_ND):
        return (grad_hidden_ND, *(torch.zeros_like(operand) if needed else None
                                  for operand, needed in ((head_VD, needs_head), (bias_V, needs_bias))))
    grad_head_VD = torch.empty_like(head_VD) if needs_head else None
    grad_bias_V = torch.empty_like(bias_V) if needs_bias else None
    if grad_entropy_N is not None:
        kept = None  # the entropy's gradient needs the logits themselves: 11 bits of their exps are too few
    waves = waves_made_again(hidden_ND, head_VD, bias_V, targets_N, softmax, coefficients_N, grad_entropy_N, plan,
                             kept.first_col if kept else len(head_VD))
    if kept:
        waves = itertools.chain(
            waves, [turn_kept(kept, bias_V, targets_N, softmax, coefficients_N, hidden_ND.dtype, plan)])
    with _full_precision_reductions():
        for first, gradient_NW, sums_RW in waves:
            end = first + gradient_NW.shape[1]
            if needs_head:
                _set_product(grad_head_VD[first:end], gradient_NW.T, hidden_ND.to(gradient_NW.dtype))
            if needs_hidden:
                _add_product(grad_hidden_ND, gradient_NW, head_VD[first:end].to(gradient_NW.dtype))
            if needs_bias:
                grad_bias_V[first:end] = sums_RW[:, :end - first].sum(dim=0)
    return None if grad_hidden_ND is None else grad_hidden_ND.to(hidden_ND.dtype), grad_head_VD, grad_bias_V


def waves_made_again(hidden_ND, head_VD, bias_V, targets_N, softmax: Softmax, coefficients_N, grad_entropy_N,
                     plan: Plan, end_col: int) -> Iterator[Wave]:
    """Gradients of columns 0 .. end_col, all waves in one buffer."""
    num_tokens, tile, dtype = len(hidden_ND), plan.tiles.gradient, _buffer_dtype(hidden_ND.dtype)
    if not end_col:
        return
    width = wave_columns(num_tokens, end_col, dtype.itemsize, plan.wave_mib, tile.block_v)
    buffer_NW, row_blocks = hidden_ND.new_empty(num_tokens, width, dtype=dtype), triton.cdiv(num_tokens, tile.block_n)
    sums_RW = None if bias_V is None else softmax.top_N.new_empty(row_blocks, width)
    operands, constants = _tile_arguments(hidden_ND, head_VD, plan, tile)
    for first in range(0, end_col, width):
        end = min(first + width, end_col)
        out = gradient_NW = buffer_NW[:, :end - first]
        if constants["DESCRIPTORS"]:
            out = TensorDescriptor.from_tensor(gradient_NW, [tile.block_n, tile.block_v])
        logits_gradient_kernel[(row_blocks * triton.cdiv(end - first, tile.block_v),)](
            *operands, bias_V, targets_N, *softmax, coefficients_N, grad_entropy_N, out, sums_RW, num_tokens, first,
            end, hidden_ND.stride(0), head_VD.stride(0), width, BUFFER=_triton_dtype(dtype), **constants)
        yield Wave(first, gradient_NW, sums_RW)


def turn_kept(kept: Kept, bias_V, targets_N, softmax: Softmax, coefficients_N, operand_dtype, plan: Plan) -> Wave:
    """Gradients of the columns that are kept, written over them."""
    (num_tokens, columns), stride, block_v = kept.exps_NC.shape, kept.exps_NC.stride(0), plan.tiles.statistics.block_v
    dtype = _buffer_dtype(operand_dtype)
    gradient_NC, row_blocks = kept.exps_NC.view(dtype), triton.cdiv(num_tokens, KEPT_ROWS)
    sums_RC = None if bias_V is None else softmax.top_N.new_empty(row_blocks, stride)
    kept_gradient_kernel[(row_blocks * (stride // block_v),)](
        kept.exps_NC, gradient_NC, targets_N, kept.target_logits_N, kept.top_LN, softmax.top_N, softmax.inverse_total_N,
        coefficients_N, sums_RC, num_tokens, stride, V=kept.first_col + columns, LOGIT_SCALE=plan.logit_scale,
        BUFFER=_triton_dtype(dtype), ROWS=KEPT_ROWS, BLOCK_V=block_v, ACCUMULATE=_triton_dtype(softmax.top_N.dtype),
        num_warps=8)
    return Wave(kept.first_col, gradient_NC, sums_RC)


def _set_product(out, left, right) -> None:
    """out = left @ right, summed in fp32 and rounded once."""
    if left.dtype == out.dtype:
        torch.mm(left, right, out=out)
    else:
        out.copy_(left @ right)


def _add_product(total, left, right) -> None:
    """total += left @ right, in the dtype of `total`."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)


@contextlib.contextmanager
def _full_precision_reductions():
    """cuBLAS may otherwise add the parts of a split sum in bf16 or fp16."""
    settings = torch.backends.cuda.matmul
    names = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")
    # Each is two settings, read apart and written together: reduced precision, and whether sums may be split at all.
    before = [(getattr(settings, name), getattr(settings, f"{name}_split_k")) for name in names]
    try:
        for name, (_, may_split) in zip(names, before):
            setattr(settings, name, (False, may_split))
        yield
    finally:
        for name, values in zip(names, before):
            setattr(settings, name, values)


class WeightedLogratio(torch.autograd.Function):
    """(ratio_S, logps_N, then the terms of the plan): all but top1 with gradients for any upstream."""

    @staticmethod
    def forward(ctx, hidden_ND, head_VD, bias_V, targets_N, ref_logps_N, weights_N, scale_S, seq_lens_S, plan):
        # The kernels index these by stride 1.
        targets_N, ref_logps_N, weights_N, scale_S = (
            tensor.contiguous() for tensor in (targets_N, ref_logps_N, weights_N, scale_S))
        bias_V = None if bias_V is None else bias_V.contiguous()
        # Pageable memory is staged before the copy returns: the host does not wait for the device.
        offsets = torch.nn.functional.pad(seq_lens_S.cumsum(0), (1, 0)).to(hidden_ND.device, non_blocking=True)
        ratio_S, logps_N, softmax, terms, ctx.kept = forward(
            hidden_ND, head_VD, bias_V, targets_N, ref_logps_N, weights_N, offsets, scale_S, plan)
        ctx.save_for_backward(hidden_ND, head_VD, bias_V, targets_N, ref_logps_N, weights_N, scale_S, offsets, logps_N,
                              *softmax)
        ctx.plan = plan
        ctx.set_materialize_grads(False)  # an entropy that nothing is asked of costs the backward pass nothing
        if "top1" in terms:
            ctx.mark_non_differentiable(terms["top1"])
        return ratio_S, logps_N, *terms.values()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_ratio_S, grad_logps_N, *grad_terms):
        (hidden_ND, head_VD, bias_V, targets_N, ref_logps_N, weights_N, scale_S, offsets, logps_N,
         *softmax) = ctx.saved_tensors
        needs = ctx.needs_input_grad
        grad_ratio_S = logps_N.new_zeros(len(scale_S)) if grad_ratio_S is None else grad_ratio_S
        grad_logps_N = torch.zeros_like(logps_N) if grad_logps_N is None else grad_logps_N
        grad_entropy_N = dict(zip(ctx.plan.terms, grad_terms)).get("entropy")
        scaled_N = (grad_ratio_S * scale_S).repeat_interleave(offsets.diff(), output_size=len(logps_N))
        grad_operands = (None, None, None)
        if any(needs[:3]):
            coefficients_N = grad_logps_N + scaled_N * weights_N
            kept, ctx.kept = ctx.kept, None  # used up: a second pass over the graph makes all logits again
            grad_entropy_N = None if grad_entropy_N is None else grad_entropy_N.contiguous()
            grad_operands = backward(hidden_ND, head_VD, bias_V, targets_N, Softmax(*softmax), coefficients_N,
                                     grad_entropy_N, kept, ctx.plan, needs[:3])
        ratio_N = logps_N - ref_logps_N
        grad_scale_S = None
        if needs[6]:
            grad_scale_S = torch.empty_like(scale_S, dtype=grad_ratio_S.dtype)
            sum_sequences(weights_N * ratio_N, offsets, grad_ratio_S.contiguous(), grad_scale_S)
        return (*grad_operands, None, -scaled_N * weights_N if needs[4] else None,
                scaled_N * ratio_N if needs[5] else None, grad_scale_S, None, None)


def weighted_logratio_triton(hidden_ND, head_VD, targets_N, ref_logps_N, weights_N, seq_lens_S, scale_S, bias_V=None,
                             logit_scale: float | None = None, softcap: float | None = None,
                             terms: tuple[str, ...] = (), head_cache_gib: float = 0.0, tiles: Tiles | None = None,
                             wave_mib: float = WAVE_MIB):
    """(ratio_S, logps_N, {name: [N]} of `terms`), all but top1 differentiable.

    hidden_ND [N, D], head_VD [V, D], bias_V [V] or None: bf16, fp16 or fp32 of one dtype on one CUDA device (fp64 too
    under TRITON_INTERPRET=1). targets_N: int64 in [0, V); an entry outside gives NaN. ref_logps_N, weights_N: [N].
    seq_lens_S: int64 [S] on the CPU, sums to N. scale_S: [S]. Outputs fp32 (fp64 for fp64). terms: "entropy" in nats,
    "top1" (bool): whether no token is likelier than the target. head_cache_gib: most that the forward pass keeps for
    the backward pass, GiB; nothing under no_grad or a softcap, whose slope it does not hold. tiles: None picks them by
    dtype and device. wave_mib: size of the backward pass's buffer, MiB. The host never waits for the device.
    `twdpo.logratio.weighted_logratio` checks the operands and terms and refuses a DTensor: call that.
    """
    hidden_ND, head_VD = (matrix if matrix.stride(1) == 1 and matrix.stride(0) >= matrix.shape[1]
                          else matrix.contiguous() for matrix in (hidden_ND, head_VD))
    if tiles is None:
        tiles = INTERPRETED_TILES
        if not INTERPRETED:
            tiles = default_tiles(hidden_ND.dtype, torch.cuda.get_device_capability(hidden_ND.device),
                                  _has_aligned_rows(hidden_ND, head_VD))
    needs_gradient = any(operand is not None and operand.requires_grad for operand in (hidden_ND, head_VD, bias_V))
    keeps = softcap is None and needs_gradient and torch.is_grad_enabled()
    plan = Plan(logit_scale, softcap, tiles, wave_mib, terms, head_cache_gib if keeps else 0.0)
    with torch.cuda.device_of(hidden_ND):  # Triton launches on the current device; autograd sets it for the backward
        ratio_S, logps_N, *values = WeightedLogratio.apply(hidden_ND, head_VD, bias_V, targets_N, ref_logps_N,
                                                           weights_N, scale_S, seq_lens_S, plan)
    return ratio_S, logps_N, dict(zip(terms, values))
