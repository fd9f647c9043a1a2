"""The fused op in Triton: its launchers, its autograd function and `weighted_logratio_triton`.

What is computed, and why so, stands at the top of tile_kernels.py; the kernels are there and in token_kernels.py.

Legend: N response tokens, D hidden size, E the reference's, V vocabulary, S sequences (one after another along N), L
tiles of a row of logits, W columns of a wave, C columns of the cache, R blocks of rows. Needs torch and triton only.
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

from twdpo.kernels.tile_kernels import kept_gradient_kernel, logits_gradient_kernel, tile_statistics_kernel
from twdpo.kernels.tiles import INTERPRETED_TILES, Softmax, Tile, Tiles, default_tiles
from twdpo.kernels.token_kernels import finish_tokens_kernel, sum_sequences_kernel

INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1: kernels run on the CPU, in numpy
WAVE_MIB = 160  # buffer for the gradients of one wave's logits
TOKEN_BLOCK = 32  # tokens of one program of the finishing kernel
TILE_BLOCK = 64  # tiles it reads at a time
KEPT_ROWS = 32  # tokens of one program of the kernel that reads the cache
SUM_BLOCK = 1024  # tokens that a sequence's sum reads at a time


@dataclass(frozen=True)
class Plan:
    """What one call needs to know besides its tensors."""

    logit_scale: float | None
    softcap: float | None
    tiles: Tiles
    wave_mib: float
    terms: tuple[str, ...] = ()
    head_cache_gib: float = 0.0


class TileSums(NamedTuple):
    """What tile_statistics_kernel finds of each tile, [L, N]; None for what no term asks for."""

    top_LN: torch.Tensor
    total_LN: torch.Tensor
    expected_LN: torch.Tensor | None
    squares_LN: torch.Tensor | None
    ref_top_LN: torch.Tensor | None
    ref_total_LN: torch.Tensor | None
    kl_LN: torch.Tensor | None
    reverse_kl_LN: torch.Tensor | None


class Reference(NamedTuple):
    """What the reference's logits are made of; nothing where no term compares with it."""

    hidden_NE: torch.Tensor | None = None
    head_VE: torch.Tensor | None = None
    bias_V: torch.Tensor | None = None


NO_REFERENCE = Reference()


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


def _has_aligned_rows(*matrices) -> bool:
    return all(matrix.data_ptr() % 16 == 0 and matrix.stride(0) * matrix.element_size() % 16 == 0
               for matrix in matrices)


def _with_dense_rows(matrix):
    return matrix if matrix.stride(1) == 1 and matrix.stride(0) >= matrix.shape[1] else matrix.contiguous()


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


def _tile_arguments(hidden_ND, head_VD, bias_V, reference: Reference, plan: Plan, tile: Tile
                    ) -> tuple[tuple, tuple[int, ...], dict]:
    """(both models' operands as a tile kernel takes them, strides of their matrices, its constants)."""
    compares = reference.head_VE is not None
    models = [(hidden_ND, head_VD, bias_V), reference]
    matrices = [matrix for model in models for matrix in model[:2] if matrix is not None]
    descriptors = tile.descriptors and _has_aligned_rows(*matrices)
    if descriptors:
        blocks = [tile.block_n, tile.block_d], [tile.block_v, tile.block_d]
        models = [(*map(TensorDescriptor.from_tensor, model[:2], blocks), model[2]) if model[0] is not None else model
                  for model in models]
    accumulate = _triton_dtype(_accumulation_dtype(hidden_ND.dtype))
    # The interpreter's bf16 products are wrong.
    operand = accumulate if INTERPRETED else _triton_dtype(hidden_ND.dtype)
    tf32 = hidden_ND.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    constants = dict(
        V=head_VD.shape[0], D=head_VD.shape[1], E=reference.head_VE.shape[1] if compares else 0,
        LOGIT_SCALE=plan.logit_scale, SOFTCAP=plan.softcap,
        BLOCK_N=tile.block_n, BLOCK_V=tile.block_v, BLOCK_D=tile.block_d, GROUP_N=tile.group_n,
        ACCUMULATE=accumulate, OPERAND=operand, PRECISION="tf32" if tf32 else "ieee", DESCRIPTORS=descriptors,
        num_warps=tile.num_warps, num_stages=tile.num_stages)
    strides = tuple(matrix.stride(0) for matrix in matrices) + (() if compares else (0, 0))
    return (*models[0], *models[1]), strides, constants


def forward(hidden_ND, head_VD, bias_V, targets_N, ref_logps_N, weights_N, offsets, scale_S, plan: Plan,
            reference: Reference = NO_REFERENCE):
    """(ratio_S, logps_N, Softmax, {name: [N]} of the terms that `plan` asks for, Kept or None).

    offsets: int64 [S + 1], first token of each sequence and N, on the device.
    """
    num_tokens, accumulate = len(hidden_ND), _accumulation_dtype(hidden_ND.dtype)
    compares, terms = reference.head_VE is not None, plan.terms
    tile = plan.tiles.reference if compares else plan.tiles.statistics

    def empty(*shape: int, wanted: bool = True, dtype: torch.dtype = accumulate) -> torch.Tensor | None:
        return torch.empty(shape, dtype=dtype, device=hidden_ND.device) if wanted else None

    logps_N, weighted_N, ratio_S = empty(num_tokens), empty(num_tokens), empty(len(scale_S))
    values = {name: empty(num_tokens, dtype=torch.bool if name == "top1" else accumulate) for name in terms}
    asked = ("entropy" in terms, "collision" in terms, compares, compares, "reverse_kl" in terms)
    softmax, kept = Softmax(*(empty(num_tokens, wanted=wanted) for wanted in (True, True, *asked))), None
    if num_tokens:
        num_tiles = triton.cdiv(len(head_VD), tile.block_v)
        sums = TileSums(*(empty(num_tiles, num_tokens, wanted=wanted)
                          for wanted in (True, True, *asked[:4], "kl" in terms, "reverse_kl" in terms)))
        # No tile owns a target that is not in the vocabulary: its log-prob is NaN, not what memory happened to hold.
        target_logits_N = torch.full_like(logps_N, float("nan"))
        kept = launch_statistics(hidden_ND, head_VD, bias_V, targets_N, sums, target_logits_N, plan, tile, reference)
        finish_tokens_kernel[(triton.cdiv(num_tokens, TOKEN_BLOCK),)](
            *sums, *softmax, target_logits_N, ref_logps_N, weights_N, logps_N, weighted_N,
            *map(values.get, ("entropy", "top1", "kl", "reverse_kl", "collision")), num_tokens, L=num_tiles,
            TOKEN_BLOCK=TOKEN_BLOCK, TILE_BLOCK=TILE_BLOCK, ACCUMULATE=_triton_dtype(accumulate))
    sum_sequences(weighted_N, offsets, scale_S, ratio_S)
    return ratio_S, logps_N, softmax, values, kept


def launch_statistics(hidden_ND, head_VD, bias_V, targets_N, sums: TileSums, target_logits_N, plan: Plan, tile: Tile,
                      reference: Reference) -> Kept | None:
    """Fill the tensors with what tile_statistics_kernel finds; what the plan's cache holds, if that is a tile."""
    (num_tiles, num_tokens), dtype = sums.top_LN.shape, _kept_dtype(hidden_ND.dtype)
    operands, strides, constants = _tile_arguments(hidden_ND, head_VD, bias_V, reference, plan, tile)
    sum_bytes = 0 if bias_V is None else triton.cdiv(num_tokens, KEPT_ROWS) * sums.top_LN.element_size()  # of turn_kept
    tile_bytes = tile.block_v * (num_tokens * dtype.itemsize + sum_bytes)
    kept_tiles = int(min(plan.head_cache_gib * 2**30 / tile_bytes, num_tiles))
    first_kept, kept = num_tiles - kept_tiles, None
    if kept_tiles:
        first_col = first_kept * tile.block_v
        exps_NC = torch.empty(num_tokens, kept_tiles * tile.block_v, dtype=dtype, device=hidden_ND.device)
        kept = Kept(exps_NC[:, :len(head_VD) - first_col], sums.top_LN[first_kept:], target_logits_N, first_col)
    for first, end, exps_NC in ((0, first_kept, None), (first_kept, num_tiles, kept.exps_NC if kept else None)):
        if exps_NC is not None and constants["DESCRIPTORS"]:
            exps_NC = TensorDescriptor.from_tensor(exps_NC, [tile.block_n, tile.block_v])
        if end > first:
            tile_statistics_kernel[(triton.cdiv(num_tokens, tile.block_n) * (end - first),)](
                *operands, targets_N, *sums, target_logits_N, exps_NC, num_tokens,
                *((first, end) if kept else (None, None)), *strides, KEPT=_triton_dtype(dtype), **constants)
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


def backward(hidden_ND, head_VD, bias_V, targets_N, softmax: Softmax, coefficients_N, upstream: dict[str, torch.Tensor],
             kept: Kept | None, plan: Plan, needs: tuple[bool, bool, bool], reference: Reference = NO_REFERENCE):
    """(dL/dhidden, dL/dhead, dL/dbias) for coefficients dL/dlogps and those of terms; None where `needs` says no."""
    accumulate, device = softmax.top_N.dtype, softmax.top_N.device
    needs_hidden, needs_head, needs_bias = needs
    grad_hidden_ND = torch.zeros(hidden_ND.shape, dtype=accumulate, device=device) if needs_hidden else None
    if not len(hidden_ND):
        return (grad_hidden_ND, *(torch.zeros_like(operand) if needed else None
                                  for operand, needed in ((head_VD, needs_head), (bias_V, needs_bias))))
    grad_head_VD = torch.empty_like(head_VD) if needs_head else None
    grad_bias_V = torch.empty_like(bias_V) if needs_bias else None
    if upstream:
        kept = None  # gradients of terms need the logits themselves: 11 bits of their exps are too few
    if upstream.keys().isdisjoint(("kl", "reverse_kl")):
        reference = NO_REFERENCE
    waves = waves_made_again(hidden_ND, head_VD, bias_V, targets_N, softmax, coefficients_N, upstream, plan,
                             kept.first_col if kept else len(head_VD), reference)
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


def waves_made_again(hidden_ND, head_VD, bias_V, targets_N, softmax: Softmax, coefficients_N, upstream, plan: Plan,
                     end_col: int, reference: Reference) -> Iterator[Wave]:
    """Gradients of columns 0 .. end_col, all waves in one buffer."""
    if not end_col:
        return
    tile = plan.tiles.gradient if reference.head_VE is None else plan.tiles.reference
    num_tokens, dtype = len(hidden_ND), _buffer_dtype(hidden_ND.dtype)
    width = wave_columns(num_tokens, end_col, dtype.itemsize, plan.wave_mib, tile.block_v)
    buffer_NW, row_blocks = hidden_ND.new_empty(num_tokens, width, dtype=dtype), triton.cdiv(num_tokens, tile.block_n)
    sums_RW = None if bias_V is None else softmax.top_N.new_empty(row_blocks, width)
    operands, strides, constants = _tile_arguments(hidden_ND, head_VD, bias_V, reference, plan, tile)
    for first in range(0, end_col, width):
        end = min(first + width, end_col)
        out = gradient_NW = buffer_NW[:, :end - first]
        if constants["DESCRIPTORS"]:
            out = TensorDescriptor.from_tensor(gradient_NW, [tile.block_n, tile.block_v])
        logits_gradient_kernel[(row_blocks * triton.cdiv(end - first, tile.block_v),)](
            *operands, targets_N, *softmax, coefficients_N,
            *map(upstream.get, ("entropy", "kl", "reverse_kl", "collision")), out, sums_RW, num_tokens, first, end,
            *strides, width, BUFFER=_triton_dtype(dtype), **constants)
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
    def forward(ctx, hidden_ND, head_VD, bias_V, targets_N, ref_logps_N, weights_N, scale_S, seq_lens_S, plan,
                *reference):
        # The kernels index these by stride 1.
        targets_N, ref_logps_N, weights_N, scale_S = (
            tensor.contiguous() for tensor in (targets_N, ref_logps_N, weights_N, scale_S))
        bias_V = None if bias_V is None else bias_V.contiguous()
        # Pageable memory is staged before the copy returns: the host does not wait for the device.
        offsets = torch.nn.functional.pad(seq_lens_S.cumsum(0), (1, 0)).to(hidden_ND.device, non_blocking=True)
        ratio_S, logps_N, softmax, terms, ctx.kept = forward(
            hidden_ND, head_VD, bias_V, targets_N, ref_logps_N, weights_N, offsets, scale_S, plan,
            Reference(*reference))
        ctx.save_for_backward(hidden_ND, head_VD, bias_V, targets_N, ref_logps_N, weights_N, scale_S, offsets, logps_N,
                              *reference, *softmax)
        ctx.plan = plan
        ctx.set_materialize_grads(False)  # a term that nothing is asked of costs the backward pass nothing
        if "top1" in terms:
            ctx.mark_non_differentiable(terms["top1"])
        return ratio_S, logps_N, *terms.values()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_ratio_S, grad_logps_N, *grad_terms):
        (hidden_ND, head_VD, bias_V, targets_N, ref_logps_N, weights_N, scale_S, offsets, logps_N,
         *more) = ctx.saved_tensors
        needs = ctx.needs_input_grad
        grad_ratio_S = logps_N.new_zeros(len(scale_S)) if grad_ratio_S is None else grad_ratio_S
        grad_logps_N = torch.zeros_like(logps_N) if grad_logps_N is None else grad_logps_N
        upstream = {name: grad_N.contiguous() for name, grad_N in zip(ctx.plan.terms, grad_terms)
                    if grad_N is not None}
        scaled_N = (grad_ratio_S * scale_S).repeat_interleave(offsets.diff(), output_size=len(logps_N))
        grad_operands = (None, None, None)
        if any(needs[:3]):
            coefficients_N = grad_logps_N + scaled_N * weights_N
            kept, ctx.kept = ctx.kept, None  # used up: a second pass over the graph makes all logits again
            grad_operands = backward(hidden_ND, head_VD, bias_V, targets_N, Softmax(*more[3:]), coefficients_N,
                                     upstream, kept, ctx.plan, needs[:3], Reference(*more[:3]))
        ratio_N = logps_N - ref_logps_N
        grad_scale_S = None
        if needs[6]:
            grad_scale_S = torch.empty_like(scale_S, dtype=grad_ratio_S.dtype)
            sum_sequences(weights_N * ratio_N, offsets, grad_ratio_S.contiguous(), grad_scale_S)
        return (*grad_operands, None, -scaled_N * weights_N if needs[4] else None,
                scaled_N * ratio_N if needs[5] else None, grad_scale_S, *[None] * 5)


def weighted_logratio_triton(hidden_ND, head_VD, targets_N, ref_logps_N, weights_N, seq_lens_S, scale_S, bias_V=None,
                             logit_scale: float | None = None, softcap: float | None = None,
                             terms: tuple[str, ...] = (), head_cache_gib: float = 0.0, ref_states=None,
                             tiles: Tiles | None = None, wave_mib: float = WAVE_MIB):
    """(ratio_S, logps_N, {name: [N]} of `terms`), all but top1 differentiable.

    hidden_ND [N, D], head_VD [V, D], bias_V [V] or None: bf16, fp16 or fp32 of one dtype on one CUDA device (fp64 too
    under TRITON_INTERPRET=1). targets_N: int64 in [0, V); an entry outside gives NaN. ref_logps_N, weights_N: [N].
    seq_lens_S: int64 [S] on the CPU, sums to N. scale_S: [S]. Outputs fp32 (fp64 for fp64). terms: as
    twdpo.logratio.TERMS; kl and reverse_kl need ref_states, (hidden_NE, head_VE, bias_V or None), E any hidden size.
    head_cache_gib: most that the forward pass keeps for the backward pass, GiB; nothing under no_grad, beside a term of
    the reference, or under a softcap, whose slope it does not hold. tiles: None picks them by dtype and device.
    wave_mib: size of the backward pass's buffer, MiB. The host never waits for the device.
    `twdpo.logratio.weighted_logratio` checks the operands and terms and refuses a DTensor: call that.
    """
    hidden_ND, head_VD = _with_dense_rows(hidden_ND), _with_dense_rows(head_VD)
    reference, matrices = NO_REFERENCE, [hidden_ND, head_VD]
    if "kl" in terms or "reverse_kl" in terms:
        ref_bias_V = None if ref_states[2] is None else ref_states[2].contiguous()
        reference = Reference(*map(_with_dense_rows, ref_states[:2]), ref_bias_V)
        matrices += reference[:2]
    if tiles is None:
        tiles = INTERPRETED_TILES
        if not INTERPRETED:
            tiles = default_tiles(hidden_ND.dtype, torch.cuda.get_device_capability(hidden_ND.device),
                                  _has_aligned_rows(*matrices))
    needs_gradient = any(operand is not None and operand.requires_grad for operand in (hidden_ND, head_VD, bias_V))
    keeps = softcap is None and needs_gradient and torch.is_grad_enabled() and reference.head_VE is None
    plan = Plan(logit_scale, softcap, tiles, wave_mib, terms, head_cache_gib if keeps else 0.0)
    with torch.cuda.device_of(hidden_ND):  # Triton launches on the current device; autograd sets it for the backward
        ratio_S, logps_N, *values = WeightedLogratio.apply(hidden_ND, head_VD, bias_V, targets_N, ref_logps_N,
                                                           weights_N, scale_S, seq_lens_S, plan, *reference)
    return ratio_S, logps_N, dict(zip(terms, values))
