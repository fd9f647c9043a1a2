"""The fused op in Triton: its launchers, its autograd function and `weighted_logratio_triton`.

What is computed, and why so, stands at the top of tile_kernels.py, which holds the kernels.

Legend: N response tokens, D hidden size, V vocabulary, S sequences (one after another along N), L tiles of a row of
logits, W columns of a wave, R blocks of rows. Needs torch and triton only.
"""

import contextlib
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable
from triton.tools.tensor_descriptor import TensorDescriptor

from twdpo.kernels.tile_kernels import (
    finish_tokens_kernel,
    logits_gradient_kernel,
    sum_sequences_kernel,
    tile_statistics_kernel,
)

INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1: kernels run on the CPU, in numpy
WAVE_MIB = 160  # buffer for the gradients of one wave's logits
TOKEN_BLOCK = 32  # tokens of one program of the finishing kernel
TILE_BLOCK = 64  # tiles it reads at a time
SUM_BLOCK = 1024  # tokens that a sequence's sum reads at a time


@dataclass(frozen=True)
class Tiles:
    """How a logits tile is computed. Results do not depend on it beyond the rounding of fp32 sums."""

    block_n: int  # tokens
    block_v: int  # vocabulary entries
    block_d: int  # hidden units a step of the inner loop
    num_warps: int
    num_stages: int
    group_n: int = 16  # row blocks that share a tile of the head while it is in the L2 cache
    descriptors: bool = False  # load through the tensor memory accelerator (compute capability 9.0 and up)


# By element size in bytes, then the smallest compute capability. 12.x has less than half the shared memory of 9.0.
TILES = {
    2: {(12, 0): Tiles(128, 128, 32, 8, 4), (9, 0): Tiles(128, 256, 64, 8, 3, descriptors=True),
        (0, 0): Tiles(128, 128, 32, 8, 4)},
    4: {(0, 0): Tiles(64, 64, 32, 4, 3)},
}
INTERPRETED_TILES = Tiles(64, 128, 64, 1, 1)


@dataclass(frozen=True)
class Plan:
    """What one call needs to know besides its tensors."""

    logit_scale: float | None
    softcap: float | None
    tiles: Tiles
    wave_mib: float
    terms: tuple[str, ...] = ()


class Softmax(NamedTuple):
    """What a token's softmax is made from again, [N] each; see tile_kernels.py."""

    top_N: torch.Tensor  # the largest logit
    inverse_total_N: torch.Tensor  # 1 / sum of exp(logit - top)
    mean_N: torch.Tensor | None  # of logit - top; for the entropy alone


def default_tiles(dtype: torch.dtype, capability: tuple[int, int], aligned: bool = True) -> Tiles:
    """The tiles for operands of this dtype on a GPU of this compute capability.

    aligned: whether rows of both operands start at multiples of 16 bytes, as the tensor memory accelerator asks.
    """
    choices = TILES[dtype.itemsize]
    tiles = choices[max(least for least in choices if least <= capability)]
    # Without the accelerator the addresses of a large tile would not fit the registers.
    return choices[0, 0] if tiles.descriptors and not aligned else tiles


def _has_aligned_rows(*matrices) -> bool:
    return all(matrix.data_ptr() % 16 == 0 and matrix.stride(0) * matrix.element_size() % 16 == 0
               for matrix in matrices)


def _accumulation_dtype(operand_dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if operand_dtype == torch.float64 else torch.float32


def _triton_dtype(dtype: torch.dtype) -> tl.dtype:
    return getattr(tl, str(dtype).removeprefix("torch."))


def _tile_arguments(hidden_ND, head_VD, plan: Plan) -> tuple[tuple, dict]:
    """(the two operands as a tile kernel takes them, its constants)."""
    tiles = plan.tiles
    descriptors = tiles.descriptors and _has_aligned_rows(hidden_ND, head_VD)
    operands = (hidden_ND, head_VD)
    if descriptors:
        operands = (TensorDescriptor.from_tensor(hidden_ND, [tiles.block_n, tiles.block_d]),
                    TensorDescriptor.from_tensor(head_VD, [tiles.block_v, tiles.block_d]))
    accumulate = _triton_dtype(_accumulation_dtype(hidden_ND.dtype))
    # The interpreter's bf16 products are wrong.
    operand = accumulate if INTERPRETED else _triton_dtype(hidden_ND.dtype)
    tf32 = hidden_ND.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    constants = dict(
        V=head_VD.shape[0], D=head_VD.shape[1], LOGIT_SCALE=plan.logit_scale, SOFTCAP=plan.softcap,
        BLOCK_N=tiles.block_n, BLOCK_V=tiles.block_v, BLOCK_D=tiles.block_d, GROUP_N=tiles.group_n,
        ACCUMULATE=accumulate, OPERAND=operand, PRECISION="tf32" if tf32 else "ieee", DESCRIPTORS=descriptors,
        num_warps=tiles.num_warps, num_stages=tiles.num_stages)
    return operands, constants


def forward(hidden_ND, head_VD, bias_V, targets_N, ref_logps_N, weights_N, offsets, scale_S, plan: Plan):
    """(ratio_S, logps_N, Softmax, {name: [N]} of the terms that `plan` asks for).

    offsets: int64 [S + 1], first token of each sequence and N, on the device.
    """
    (num_tokens, _), vocabulary = hidden_ND.shape, head_VD.shape[0]
    num_tiles = triton.cdiv(vocabulary, plan.tiles.block_v)
    accumulate = _accumulation_dtype(hidden_ND.dtype)

    def empty(*shape: int, dtype: torch.dtype = accumulate) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=hidden_ND.device)

    logps_N, top_N, inverse_total_N, weighted_N = (empty(num_tokens) for _ in range(4))
    ratio_S = empty(len(scale_S))
    terms = {name: empty(num_tokens, dtype=torch.bool if name == "top1" else accumulate) for name in plan.terms}
    with_entropy = "entropy" in terms
    mean_N = empty(num_tokens) if with_entropy else None
    if num_tokens:
        top_LN, total_LN = empty(num_tiles, num_tokens), empty(num_tiles, num_tokens)
        expected_LN = empty(num_tiles, num_tokens) if with_entropy else None
        # No tile owns a target that is not in the vocabulary: its log-prob is NaN, not what memory happened to hold.
        target_logits_N = torch.full_like(logps_N, float("nan"))
        operands, constants = _tile_arguments(hidden_ND, head_VD, plan)
        tile_statistics_kernel[(triton.cdiv(num_tokens, plan.tiles.block_n) * num_tiles,)](
            *operands, bias_V, targets_N, top_LN, total_LN, expected_LN, target_logits_N, num_tokens,
            hidden_ND.stride(0), head_VD.stride(0), **constants)
        finish_tokens_kernel[(triton.cdiv(num_tokens, TOKEN_BLOCK),)](
            top_LN, total_LN, expected_LN, target_logits_N, ref_logps_N, weights_N, logps_N, top_N, inverse_total_N,
            mean_N, weighted_N, terms.get("entropy"), terms.get("top1"), num_tokens, L=num_tiles,
            TOKEN_BLOCK=TOKEN_BLOCK, TILE_BLOCK=TILE_BLOCK, ACCUMULATE=constants["ACCUMULATE"])
    sum_sequences(weighted_N, offsets, scale_S, ratio_S)
    return ratio_S, logps_N, Softmax(top_N, inverse_total_N, mean_N), terms


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


def backward(hidden_ND, head_VD, bias_V, targets_N, softmax: Softmax, coefficients_N, grad_entropy_N, plan: Plan,
             needs: tuple[bool, bool, bool]):
    """(dL/dhidden, dL/dhead, dL/dbias) for coefficients dL/dlogps and dL/dentropy; None where `needs` says no."""
    (num_tokens, _), vocabulary, tiles = hidden_ND.shape, head_VD.shape[0], plan.tiles
    accumulate, device = softmax.top_N.dtype, softmax.top_N.device
    needs_hidden, needs_head, needs_bias = needs
    grad_hidden_ND = torch.zeros(hidden_ND.shape, dtype=accumulate, device=device) if needs_hidden else None
    if not num_tokens:
        return (grad_hidden_ND, *(torch.zeros_like(operand) if needed else None
                                  for operand, needed in ((head_VD, needs_head), (bias_V, needs_bias))))
    grad_head_VD = torch.empty_like(head_VD) if needs_head else None
    grad_bias_V = torch.empty_like(bias_V) if needs_bias else None

    # Casts of the interpreter truncate: it keeps the buffer unrounded.
    buffer_dtype = accumulate if INTERPRETED else hidden_ND.dtype
    width = wave_columns(num_tokens, vocabulary, buffer_dtype.itemsize, plan.wave_mib, tiles.block_v)
    buffer_NW = torch.empty(num_tokens, width, dtype=buffer_dtype, device=device)
    row_blocks = triton.cdiv(num_tokens, tiles.block_n)
    sums_RW = torch.empty(row_blocks, width, dtype=accumulate, device=device) if bias_V is not None else None
    operands, constants = _tile_arguments(hidden_ND, head_VD, plan)
    with _full_precision_reductions():
        for first in range(0, vocabulary, width):
            end = min(first + width, vocabulary)
            gradient_NW = buffer_NW[:, :end - first]
            out = gradient_NW
            if constants["DESCRIPTORS"]:
                out = TensorDescriptor.from_tensor(gradient_NW, [tiles.block_n, tiles.block_v])
            logits_gradient_kernel[(row_blocks * triton.cdiv(end - first, tiles.block_v),)](
                *operands, bias_V, targets_N, *softmax, coefficients_N, grad_entropy_N, out, sums_RW, num_tokens,
                first, end, hidden_ND.stride(0), head_VD.stride(0), width, BUFFER=_triton_dtype(buffer_dtype),
                **constants)
            if needs_head:
                _set_product(grad_head_VD[first:end], gradient_NW.T, hidden_ND.to(buffer_dtype))
            if needs_hidden:
                _add_product(grad_hidden_ND, gradient_NW, head_VD[first:end].to(buffer_dtype))
            if needs_bias:
                grad_bias_V[first:end] = sums_RW[:, :end - first].sum(dim=0)
    return None if grad_hidden_ND is None else grad_hidden_ND.to(hidden_ND.dtype), grad_head_VD, grad_bias_V


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
        ratio_S, logps_N, softmax, terms = forward(
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
            grad_entropy_N = None if grad_entropy_N is None else grad_entropy_N.contiguous()
            grad_operands = backward(hidden_ND, head_VD, bias_V, targets_N, Softmax(*softmax), coefficients_N,
                                     grad_entropy_N, ctx.plan, needs[:3])
        ratio_N = logps_N - ref_logps_N
        grad_scale_S = None
        if needs[6]:
            grad_scale_S = torch.empty_like(scale_S, dtype=grad_ratio_S.dtype)
            sum_sequences(weights_N * ratio_N, offsets, grad_ratio_S.contiguous(), grad_scale_S)
        return (*grad_operands, None, -scaled_N * weights_N if needs[4] else None,
                scaled_N * ratio_N if needs[5] else None, grad_scale_S, None, None)


def weighted_logratio_triton(hidden_ND, head_VD, targets_N, ref_logps_N, weights_N, seq_lens_S, scale_S, bias_V=None,
                             logit_scale: float | None = None, softcap: float | None = None,
                             terms: tuple[str, ...] = (), tiles: Tiles | None = None, wave_mib: float = WAVE_MIB):
    """(ratio_S, logps_N, {name: [N]} of `terms`), all but top1 differentiable.

    hidden_ND [N, D], head_VD [V, D], bias_V [V] or None: bf16, fp16 or fp32 of one dtype on one CUDA device (fp64 too
    under TRITON_INTERPRET=1). targets_N: int64 in [0, V); an entry outside gives NaN. ref_logps_N, weights_N: [N].
    seq_lens_S: int64 [S] on the CPU, sums to N. scale_S: [S]. Outputs fp32 (fp64 for fp64). terms: "entropy" in nats,
    "top1" (bool): whether no token is likelier than the target. tiles: None picks them by dtype and device. wave_mib:
    size of the backward pass's buffer, MiB. The host never waits for the device.
    `twdpo.logratio.weighted_logratio` checks the operands and terms and refuses a DTensor: call that.
    """
    hidden_ND, head_VD = (matrix if matrix.stride(1) == 1 and matrix.stride(0) >= matrix.shape[1]
                          else matrix.contiguous() for matrix in (hidden_ND, head_VD))
    if tiles is None:
        tiles = INTERPRETED_TILES
        if not INTERPRETED:
            tiles = default_tiles(hidden_ND.dtype, torch.cuda.get_device_capability(hidden_ND.device),
                                  _has_aligned_rows(hidden_ND, head_VD))
    plan = Plan(logit_scale, softcap, tiles, wave_mib, terms)
    with torch.cuda.device_of(hidden_ND):  # Triton launches on the current device; autograd sets it for the backward
        ratio_S, logps_N, *values = WeightedLogratio.apply(hidden_ND, head_VD, bias_V, targets_N, ref_logps_N,
                                                           weights_N, scale_S, seq_lens_S, plan)
    return ratio_S, logps_N, dict(zip(terms, values))
