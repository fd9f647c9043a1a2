"""Log-probs of response tokens from hidden states, and their weighted, scaled log-ratio per sequence (paper Eq. 5).

`weighted_logratio_spec` is the specification: it makes all [N, V] logits. `weighted_logratio` gives the same
without them: the Triton kernel of kernels/weighted_logratio.py on CUDA, elsewhere `ChunkedLogps`, which goes through
the vocabulary in chunks. Both write each row of the head's gradient once.

Legend: N response tokens, D hidden size, V vocabulary, W vocabulary entries of a chunk, S sequences.
"""

import math
from dataclasses import dataclass

import torch
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

# One chunk's logits [N, W] take at most this, but W >= CHUNK_COLUMNS. Logits that fit KEEP_BYTES whole are one chunk,
# kept for the backward pass. Times: benchmarks/loss_kernel.py.
CHUNK_BYTES = 16 * 2**20
CHUNK_COLUMNS = 256
KEEP_BYTES = 32 * 2**20

# What the op gives beside log-probs where it is asked to, of the policy's distribution p and the reference's q at a
# response token, in nats: the entropy of p; whether no token is likelier than the target (bool, without gradient);
# KL(q || p); KL(p || q); log of the sum of p^2. What is of q needs `ref_states`, and has no gradient there.
TERMS = ("entropy", "top1", "kl", "reverse_kl", "collision")
OF_REFERENCE = ("kl", "reverse_kl")

OPERAND_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

LOGPS_VERSION = 2  # raise it when log-probs change by more than rounding: cached reference log-probs are then redone


@dataclass(frozen=True)
class HeadOptions:
    """What the model does between `hidden @ head.T` and its logits; None: nothing."""

    logit_scale: float | None = None  # logits are multiplied by it (Cohere; Granite by the inverse of its scaling)
    softcap: float | None = None  # softcap * tanh(logits / softcap) (Gemma-2)


def logits_of(hidden_ND, head_VD, bias_V, options: HeadOptions) -> torch.Tensor:
    """Logits in fp32 (fp64 for fp64 operands), [N, V]."""
    logits_NV = (hidden_ND @ head_VD.T).to(accumulation_dtype(hidden_ND))
    if bias_V is not None:
        logits_NV = logits_NV + bias_V.to(logits_NV.dtype)
    if options.logit_scale is not None:
        logits_NV = logits_NV * options.logit_scale
    if options.softcap is not None:
        logits_NV = options.softcap * torch.tanh(logits_NV / options.softcap)
    return logits_NV


def accumulation_dtype(tensor: torch.Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def segment_sum(values_N: torch.Tensor, seq_lens_S: torch.Tensor) -> torch.Tensor:
    """Sum over the tokens of each sequence, [S]; 0 for an empty one. seq_lens_S lives on the CPU: no device sync."""
    if not len(seq_lens_S):
        return values_N.new_zeros(0)
    if values_N.device.type != "cpu":  # a launch a sequence would take the host longer than all of them the device
        return segment_sum_at_once(values_N, seq_lens_S)
    return torch.stack([part.sum() for part in values_N.split(seq_lens_S.tolist())])


def segment_sum_at_once(values_N: torch.Tensor, seq_lens_S: torch.Tensor) -> torch.Tensor:
    """`segment_sum` as one operation of the device."""
    lens_S = seq_lens_S.to(values_N.device, non_blocking=True)
    # `unsafe` leaves out a check that would wait for the device; `collate` and `check_operands` know the lengths.
    return torch.segment_reduce(values_N, "sum", lengths=lens_S, unsafe=True, initial=0)


def log_one_minus_exp(values: torch.Tensor) -> torch.Tensor:
    """log(1 - exp(x)) of x < 0, exact near both ends."""
    near = values > -math.log(2)
    # Each branch sees only values that it is made for, so that the other one's gradient is never NaN.
    close = torch.log(-torch.expm1(values.where(near, torch.full_like(values, -0.5))))
    return torch.where(near, close, torch.log1p(-torch.exp(values.where(~near, torch.full_like(values, -1.0)))))


def combine(logps_N, ref_logps_N, weights_N, seq_lens_S, scale_S) -> torch.Tensor:
    """ratio_S[s] = scale_S[s] * sum over n in s of weights_N[n] * (logps_N[n] - ref_logps_N[n]) (Eq. 5, scale |y|)."""
    weighted_N = weights_N.to(logps_N.dtype) * (logps_N - ref_logps_N.to(logps_N.dtype))
    return scale_S.to(logps_N.dtype) * segment_sum(weighted_N, seq_lens_S)


def weighted_logratio_spec(hidden_ND, head_VD, targets_N, ref_logps_N, weights_N, seq_lens_S, scale_S,
                           bias_V=None, options: HeadOptions | None = None, terms: tuple[str, ...] = (),
                           head_cache_gib: float = 0.0, ref_states=None):
    """The specification, in plain autograd: see `weighted_logratio`. head_cache_gib has no effect."""
    terms = check_terms(terms, ref_states)
    logits_NV = logits_of(hidden_ND, head_VD, bias_V, options or HeadOptions())
    logps_NV = logits_NV.log_softmax(dim=-1)
    logps_N = logps_NV.gather(-1, targets_N[:, None])[:, 0]
    values = {}
    for name in terms:
        if name == "entropy":
            finite_NV = logps_NV.masked_fill(logps_NV == float("-inf"), 0)  # 0 log 0 is 0, and so is its gradient
            values[name] = -(logps_NV.exp() * finite_NV).sum(dim=-1)
        elif name == "top1":
            values[name] = logits_NV.gather(-1, targets_N[:, None])[:, 0] >= logits_NV.amax(dim=-1)
        elif name == "collision":
            values[name] = (2 * logps_NV).logsumexp(dim=-1)
        elif name in OF_REFERENCE:
            ref_hidden_ND, ref_head_VD, ref_bias_V = (None if each is None else each.detach() for each in ref_states)
            ref_logits_NV = logits_of(ref_hidden_ND, ref_head_VD, ref_bias_V, options or HeadOptions())
            pair = logps_NV, ref_logits_NV.log_softmax(dim=-1)
            values[name] = divergence(*(pair if name == "reverse_kl" else pair[::-1]))
    return combine(logps_N, ref_logps_N, weights_N, seq_lens_S, scale_S), logps_N, values


def divergence(logps_NV: torch.Tensor, other_NV: torch.Tensor) -> torch.Tensor:
    """KL of two distributions, the first from the second, [N]; what the first rules out counts 0."""
    possible_NV = logps_NV > float("-inf")
    difference_NV = torch.where(possible_NV, logps_NV, 0) - torch.where(possible_NV, other_NV, 0)
    return (logps_NV.exp() * difference_NV).sum(dim=-1)


def weighted_logratio(hidden_ND, head_VD, targets_N, ref_logps_N, weights_N, seq_lens_S, scale_S,
                      bias_V=None, options: HeadOptions | None = None, terms: tuple[str, ...] = (),
                      head_cache_gib: float = 0.0, ref_states=None
                      ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """(ratio_S, logps_N, {name: [N]} of `terms`), differentiable together with any upstream gradients.

    hidden_ND, head_VD, bias_V: bf16, fp16, fp32 or fp64, of one dtype. targets_N: int64 in [0, V). ref_logps_N,
    weights_N: [N] fp32. seq_lens_S: int64 on the CPU, sums to N. scale_S: [S] fp32. terms: of TERMS. head_cache_gib:
    most that the forward pass keeps for the backward pass on CUDA, GiB, so that it makes fewer logits again.
    ref_states: for `kl` and `reverse_kl` (hidden_NE, head_VE, bias_V or None) of the reference, which does to its
    logits what the policy does; E, its hidden size, may be another; no gradient goes there. Outputs
    fp32 (fp64 for fp64 operands), top1 bool and without gradient. Raises ValueError for shapes and dtypes that don't
    fit, for a DTensor, for an unknown term, and for a cache below 0 or of capped logits.
    """
    check_operands(hidden_ND, head_VD, bias_V, targets_N, ref_logps_N, weights_N, seq_lens_S, scale_S)
    options, terms = options or HeadOptions(), check_terms(terms, ref_states)
    check_head_cache(head_cache_gib, options)
    if set(terms) & {"collision", *OF_REFERENCE}:
        return weighted_logratio_spec(hidden_ND, head_VD, targets_N, ref_logps_N, weights_N, seq_lens_S, scale_S,
                                      bias_V, options, terms, head_cache_gib, ref_states)
    if hidden_ND.is_cuda and hidden_ND.dtype != torch.float64:
        from twdpo.kernels.weighted_logratio import weighted_logratio_triton  # Triton exists where CUDA does
        return weighted_logratio_triton(hidden_ND, head_VD, targets_N, ref_logps_N, weights_N, seq_lens_S, scale_S,
                                        bias_V, options.logit_scale, options.softcap, terms, head_cache_gib)
    return weighted_logratio_chunked(hidden_ND, head_VD, targets_N, ref_logps_N, weights_N, seq_lens_S, scale_S,
                                     bias_V, options, terms)


def check_terms(terms: tuple[str, ...], ref_states=None) -> tuple[str, ...]:
    """The terms, each once. Raises ValueError for an unknown one, and for one of a reference that is not there."""
    for name in terms:
        if name not in TERMS:
            raise ValueError(f"unknown term {name!r}: it must be of {', '.join(TERMS)}")
        if name in OF_REFERENCE and ref_states is None:
            raise ValueError(f"the term {name!r} compares with the reference: give ref_states")
    return tuple(dict.fromkeys(terms))


def check_head_cache(head_cache_gib: float, options: HeadOptions) -> None:
    """Raise ValueError for a cache below 0, or of logits that are capped."""
    if not 0 <= head_cache_gib < math.inf:
        raise ValueError(f"the head's cache is {head_cache_gib} GiB: it must be a finite number >= 0")
    if head_cache_gib and options.softcap is not None:
        raise ValueError(f"the head's cache is {head_cache_gib} GiB: it must be 0 for a model that caps its logits (at "
                         f"{options.softcap:g}), as their gradient needs more than it holds")


def check_operands(hidden_ND, head_VD, bias_V, targets_N, ref_logps_N, weights_N, seq_lens_S, scale_S) -> None:
    """Raise ValueError for operands that don't fit together. No host-device sync."""
    operands = [operand for operand in (hidden_ND, head_VD, bias_V) if operand is not None]
    if any(isinstance(operand, DTensor) for operand in operands):
        raise ValueError("weighted_logratio got a DTensor: call it inside the forward of the module that owns the "
                         "head, where FSDP2 has gathered it (full_tensor() would give a wrong gradient)")
    if hidden_ND.dtype not in OPERAND_DTYPES:
        raise ValueError(f"hidden states are {hidden_ND.dtype}: they must be one of "
                         f"{', '.join(map(str, OPERAND_DTYPES))}")
    if len({operand.dtype for operand in operands}) > 1:
        raise ValueError(f"hidden states, head and bias are {', '.join(str(operand.dtype) for operand in operands)}: "
                         "cast them to one dtype")
    for name, tensor in (("targets", targets_N), ("seq_lens", seq_lens_S)):
        if tensor.dtype != torch.int64 or tensor.ndim != 1:
            raise ValueError(f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}: it must be a vector of int64")
    if head_VD.ndim != 2:
        raise ValueError(f"head is of shape {tuple(head_VD.shape)}: it must be [V, D]")
    num_tokens = len(targets_N)
    shapes = {"hidden": (hidden_ND, (num_tokens, head_VD.shape[1])), "ref_logps": (ref_logps_N, (num_tokens,)),
              "weights": (weights_N, (num_tokens,)), "scale": (scale_S, (len(seq_lens_S),))}
    if bias_V is not None:
        shapes["bias"] = bias_V, head_VD.shape[:1]
    for name, (tensor, expected) in shapes.items():
        if tensor.shape != expected:
            raise ValueError(f"{name} is {tuple(tensor.shape)}, which doesn't fit a head of {tuple(head_VD.shape)}, "
                             f"{num_tokens} targets and {len(seq_lens_S)} sequences: {tuple(expected)} would")
    if seq_lens_S.is_cuda:
        raise ValueError("seq_lens is on the GPU: keep it on the CPU, where reading it does not wait for the device")
    if int(seq_lens_S.sum()) != num_tokens or (seq_lens_S < 0).any():
        raise ValueError(f"sequences of {seq_lens_S.tolist()} tokens don't fit {num_tokens} targets")


def weighted_logratio_chunked(hidden_ND, head_VD, targets_N, ref_logps_N, weights_N, seq_lens_S, scale_S,
                              bias_V=None, options: HeadOptions | None = None, terms: tuple[str, ...] = (),
                              head_cache_gib: float = 0.0):
    """`weighted_logratio` in torch alone, on any device. head_cache_gib has no effect: what it keeps is KEEP_BYTES."""
    terms = check_terms(terms)
    logps_N, *values = ChunkedLogps.apply(hidden_ND, head_VD, bias_V, targets_N, options or HeadOptions(), terms)
    ratio_S = combine(logps_N, ref_logps_N, weights_N, seq_lens_S, scale_S)
    return ratio_S, logps_N, dict(zip(terms, values))


class ChunkedLogps(torch.autograd.Function):
    """(log_softmax(logits)[n, targets[n]], then the terms) by chunks of the vocabulary; backward makes each chunk's
    logits again. The entropy's formula stands in kernels/tile_kernels.py.

    Chunks of tokens would read and write the head's whole gradient once a chunk.
    """

    @staticmethod
    def forward(ctx, hidden_ND, head_VD, bias_V, targets_N, options, terms):
        num_tokens, vocabulary = len(targets_N), len(head_VD)
        logps_dtype = accumulation_dtype(hidden_ND)
        width, fits = chunk_columns(num_tokens, vocabulary, logps_dtype)
        buffer = hidden_ND.new_empty(num_tokens * width, dtype=logps_dtype)
        # Stays NaN for a target outside the vocabulary.
        target_logits_N = hidden_ND.new_full((num_tokens,), float("nan"), dtype=logps_dtype)
        # The log-sum-exp is kept as maximum and sum: one fp32 number would round away log p of a sure token.
        top_parts, total_parts, expected_parts = [], [], []
        for first in range(0, vocabulary, width):
            logits_NW = logits_of_chunk(buffer, hidden_ND, head_VD, bias_V, options, first, width)
            inside_N, places_N = targets_in_chunk(targets_N, first, logits_NW.shape[1])
            target_logits_N = torch.where(inside_N, logits_NW.gather(-1, places_N[:, None])[:, 0], target_logits_N)
            # Finite, as -inf - -inf would be NaN.
            top_parts.append(logits_NW.amax(dim=-1).clamp_min(torch.finfo(logps_dtype).min))
            exps_NW = logits_NW.sub_(top_parts[-1][:, None]).exp_()
            total_parts.append(exps_NW.sum(dim=-1))
            if "entropy" in terms:
                expected_parts.append(torch.xlogy(exps_NW, exps_NW).sum(dim=-1))
        top_CN = torch.stack(top_parts)
        top_N = top_CN.amax(dim=0)
        below_CN = top_CN - top_N
        totals_CN = torch.stack(total_parts) * below_CN.exp()
        total_N = totals_CN.sum(dim=0)
        mean_N, values = None, {}
        if "entropy" in terms:
            # A chunk counted from its own maximum.
            expected_CN = torch.stack(expected_parts) * below_CN.exp() + totals_CN * below_CN
            mean_N = expected_CN.sum(dim=0) / total_N
            values["entropy"] = total_N.log() - mean_N
        if "top1" in terms:
            values["top1"] = target_logits_N >= top_N
            ctx.mark_non_differentiable(values["top1"])
        kept = fits and options.softcap is None and any(ctx.needs_input_grad)
        ctx.save_for_backward(hidden_ND, head_VD, bias_V, targets_N, top_N, 1 / total_N, mean_N,
                              exps_NW if kept else None)
        ctx.options, ctx.terms, ctx.width = options, terms, width
        ctx.set_materialize_grads(False)  # an entropy that nothing is asked of costs the backward pass nothing
        return (target_logits_N - top_N) - total_N.log(), *(values[name] for name in terms)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_N, *grad_terms):
        hidden_ND, head_VD, bias_V, targets_N, top_N, inverse_total_N, mean_N, kept_exps_NV = ctx.saved_tensors
        options, width = ctx.options, ctx.width
        needs_hidden, needs_head, needs_bias = ctx.needs_input_grad[:3]
        grad_hidden_ND = torch.zeros_like(hidden_ND, dtype=top_N.dtype) if needs_hidden else None
        grad_head_VD = torch.empty_like(head_VD) if needs_head else None
        grad_bias_V = torch.empty_like(bias_V) if needs_bias else None
        buffer = top_N.new_empty(len(top_N) * width)
        grad_N = torch.zeros_like(top_N) if grad_N is None else grad_N
        grad_entropy_N = dict(zip(ctx.terms, grad_terms)).get("entropy")
        scale_N = -grad_N * inverse_total_N
        for first in range(0, len(head_VD), width):
            slope_NW = None
            if kept_exps_NV is not None:
                exps_NW, gradient_NW = kept_exps_NV, buffer.view_as(kept_exps_NV)
            else:
                logits_NW = logits_of_chunk(buffer, hidden_ND, head_VD, bias_V, options, first, width)
                if options.softcap is not None:
                    slope_NW = 1 - (logits_NW / options.softcap) ** 2
                exps_NW = gradient_NW = logits_NW.sub_(top_N[:, None]).exp_()
            entropy_NW = None
            if grad_entropy_N is not None:
                entropy_NW = entropy_gradient(exps_NW, mean_N, grad_entropy_N * inverse_total_N)
            # d logp / d logits = onehot - p, times the upstream gradient; the target's term before any rounding.
            torch.mul(exps_NW, scale_N[:, None], out=gradient_NW)
            inside_N, places_N = targets_in_chunk(targets_N, first, gradient_NW.shape[1])
            gradient_NW.scatter_add_(-1, places_N[:, None], torch.where(inside_N, grad_N, 0)[:, None])
            if entropy_NW is not None:
                gradient_NW += entropy_NW
            if slope_NW is not None:
                gradient_NW *= slope_NW
            if options.logit_scale is not None:
                gradient_NW *= options.logit_scale
            rows = slice(first, first + width)
            if needs_bias:
                grad_bias_V[rows] = gradient_NW.sum(dim=0)
            gradient_NW = gradient_NW.to(hidden_ND.dtype)
            if needs_head:
                torch.mm(gradient_NW.T, hidden_ND, out=grad_head_VD[rows])
            if needs_hidden:
                add_product(grad_hidden_ND, gradient_NW, head_VD[rows])
        return (None if grad_hidden_ND is None else grad_hidden_ND.to(hidden_ND.dtype), grad_head_VD, grad_bias_V,
                None, None, None)


def entropy_gradient(exps_NW, mean_N, scale_N) -> torch.Tensor:
    """scale * d entropy / d logits, times each token's sum of exps: -exps * (log exps - mean), 0 where exps is."""
    return (exps_NW * mean_N[:, None]).sub_(torch.xlogy(exps_NW, exps_NW)).mul_(scale_N[:, None])


def chunk_columns(num_tokens: int, vocabulary: int, dtype: torch.dtype) -> tuple[int, bool]:
    """(vocabulary entries of a chunk, evened out over the chunks; whether all logits are small enough to be kept)."""
    column_bytes = max(1, num_tokens * dtype.itemsize)
    if vocabulary * column_bytes <= KEEP_BYTES:
        return vocabulary, True
    num_chunks = -(-vocabulary // max(CHUNK_BYTES // column_bytes, CHUNK_COLUMNS))
    return -(-vocabulary // num_chunks), False


def logits_of_chunk(buffer, hidden_ND, head_VD, bias_V, options: HeadOptions, first: int, width: int) -> torch.Tensor:
    """Logits of vocabulary entries first .. first + width, [N, W], in `buffer`."""
    head_WD = head_VD[first:first + width]
    logits_NW = buffer[:len(hidden_ND) * len(head_WD)].view(len(hidden_ND), len(head_WD))
    if hidden_ND.dtype == logits_NW.dtype:
        torch.mm(hidden_ND, head_WD.T, out=logits_NW)
    elif hidden_ND.is_cuda:
        torch.mm(hidden_ND, head_WD.T, out_dtype=logits_NW.dtype, out=logits_NW)
    else:
        logits_NW.copy_(hidden_ND @ head_WD.T)
    if bias_V is not None:
        logits_NW += bias_V[first:first + width]
    if options.logit_scale is not None:
        logits_NW *= options.logit_scale
    if options.softcap is not None:
        logits_NW.div_(options.softcap).tanh_().mul_(options.softcap)
    return logits_NW


def targets_in_chunk(targets_N, first: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(whether each target is in the chunk, its place there; any place if it is not)."""
    places_N = targets_N - first
    return (places_N >= 0) & (places_N < width), places_N.clamp(0, width - 1)


def add_product(total, left, right) -> None:
    """total += left @ right, where `total` may be fp32 and the factors bf16 or fp16."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif left.is_cuda:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total += left @ right
