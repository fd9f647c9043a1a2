"""Log-probs of response tokens from hidden states, and their weighted, scaled log-ratio per sequence (paper Eq. 5).

`weighted_logratio_spec` is the specification: it makes all [N, V] logits. `weighted_logratio` gives the same
without them: the Triton kernel of kernels/weighted_logratio.py on CUDA, elsewhere `ChunkedLogps`, which goes through
the vocabulary in chunks. Both write each row of the head's gradient once.

Legend: N response tokens, D hidden size, E the reference's, V vocabulary, S sequences.
"""

import math

import torch
from torch.distributed.tensor import DTensor

from twdpo.chunked_logps import OF_REFERENCE, ChunkedLogps, HeadOptions, accumulation_dtype

# What the op gives beside log-probs where it is asked to, of the policy's distribution p and the reference's q at a
# response token, in nats: the entropy of p; whether no token is likelier than the target (bool, without gradient);
# KL(q || p); KL(p || q); log of the sum of p^2. What is of q needs `ref_states`, and has no gradient there.
TERMS = ("entropy", "top1", "kl", "reverse_kl", "collision")

OPERAND_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

LOGPS_VERSION = 2  # raise it when log-probs change by more than rounding: cached reference log-probs are then redone


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
    logits what the policy does; E, its hidden size, may be another; no gradient goes there. Beside these two terms
    log-probs are summed in other parts of the vocabulary: their last bit may differ from what they are alone. Outputs
    fp32 (fp64 for fp64 operands), top1 bool and without gradient. Raises ValueError for shapes and dtypes that don't
    fit, for a DTensor, for an unknown term, and for a cache below 0 or of capped logits.
    """
    options, terms = options or HeadOptions(), check_terms(terms, ref_states)
    ref_states = reference_of(terms, ref_states)
    check_operands(hidden_ND, head_VD, bias_V, targets_N, ref_logps_N, weights_N, seq_lens_S, scale_S, *ref_states)
    check_head_cache(head_cache_gib, options)
    if hidden_ND.is_cuda and hidden_ND.dtype != torch.float64:
        from twdpo.kernels.weighted_logratio import weighted_logratio_triton  # Triton exists where CUDA does
        return weighted_logratio_triton(hidden_ND, head_VD, targets_N, ref_logps_N, weights_N, seq_lens_S, scale_S,
                                        bias_V, options.logit_scale, options.softcap, terms, head_cache_gib,
                                        ref_states)
    return weighted_logratio_chunked(hidden_ND, head_VD, targets_N, ref_logps_N, weights_N, seq_lens_S, scale_S,
                                     bias_V, options, terms, 0.0, ref_states)


def check_terms(terms: tuple[str, ...], ref_states=None) -> tuple[str, ...]:
    """The terms, each once. Raises ValueError for an unknown one, and for one of a reference that is not there."""
    for name in terms:
        if name not in TERMS:
            raise ValueError(f"unknown term {name!r}: it must be of {', '.join(TERMS)}")
        if name in OF_REFERENCE and ref_states is None:
            raise ValueError(f"the term {name!r} compares with the reference: give ref_states")
    return tuple(dict.fromkeys(terms))


def reference_of(terms: tuple[str, ...], ref_states) -> tuple[torch.Tensor | None, ...]:
    """The reference's (hidden_NE, head_VE, bias_V), or three times None if no term compares with it."""
    return (None, None, None) if set(terms).isdisjoint(OF_REFERENCE) else tuple(ref_states)


def check_head_cache(head_cache_gib: float, options: HeadOptions) -> None:
    """Raise ValueError for a cache below 0, or of logits that are capped."""
    if not 0 <= head_cache_gib < math.inf:
        raise ValueError(f"the head's cache is {head_cache_gib} GiB: it must be a finite number >= 0")
    if head_cache_gib and options.softcap is not None:
        raise ValueError(f"the head's cache is {head_cache_gib} GiB: it must be 0 for a model that caps its logits (at "
                         f"{options.softcap:g}), as their gradient needs more than it holds")


def check_operands(hidden_ND, head_VD, bias_V, targets_N, ref_logps_N, weights_N, seq_lens_S, scale_S,
                   ref_hidden_NE=None, ref_head_VE=None, ref_bias_V=None) -> None:
    """Raise ValueError for operands that don't fit together. No host-device sync."""
    operands = [operand for operand in (hidden_ND, head_VD, bias_V, ref_hidden_NE, ref_head_VE, ref_bias_V)
                if operand is not None]
    if any(isinstance(operand, DTensor) for operand in operands):
        raise ValueError("weighted_logratio got a DTensor: call it inside the forward of the module that owns the "
                         "head, where FSDP2 has gathered it (full_tensor() would give a wrong gradient); give it the "
                         "reference's head as its own module gathered it")
    if hidden_ND.dtype not in OPERAND_DTYPES:
        raise ValueError(f"hidden states are {hidden_ND.dtype}: they must be one of "
                         f"{', '.join(map(str, OPERAND_DTYPES))}")
    if len({operand.dtype for operand in operands}) > 1:
        raise ValueError(f"hidden states, head and bias{'' if ref_head_VE is None else ', and those of the reference,'}"
                         f" are {', '.join(str(operand.dtype) for operand in operands)}: cast them to one dtype")
    for name, tensor in (("targets", targets_N), ("seq_lens", seq_lens_S)):
        if tensor.dtype != torch.int64 or tensor.ndim != 1:
            raise ValueError(f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}: it must be a vector of int64")
    for name, head in (("head", head_VD), ("the reference's head", ref_head_VE)):
        if head is not None and head.ndim != 2:
            raise ValueError(f"{name} is of shape {tuple(head.shape)}: it must be [V, D]")
    num_tokens = len(targets_N)
    shapes = {"hidden": (hidden_ND, (num_tokens, head_VD.shape[1])), "ref_logps": (ref_logps_N, (num_tokens,)),
              "weights": (weights_N, (num_tokens,)), "scale": (scale_S, (len(seq_lens_S),))}
    if bias_V is not None:
        shapes["bias"] = bias_V, head_VD.shape[:1]
    if ref_head_VE is not None:
        units = ref_head_VE.shape[1]
        shapes |= {"the reference's head": (ref_head_VE, (len(head_VD), units)),
                   "the reference's hidden": (ref_hidden_NE, (num_tokens, units))}
    if ref_bias_V is not None:
        shapes["the reference's bias"] = ref_bias_V, head_VD.shape[:1]
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
                              head_cache_gib: float = 0.0, ref_states=None):
    """`weighted_logratio` in torch alone, on any device. head_cache_gib has no effect: what it keeps is KEEP_BYTES."""
    terms = check_terms(terms, ref_states)
    logps_N, *values = ChunkedLogps.apply(hidden_ND, head_VD, bias_V, targets_N, options or HeadOptions(), terms,
                                          *reference_of(terms, ref_states))
    ratio_S = combine(logps_N, ref_logps_N, weights_N, seq_lens_S, scale_S)
    return ratio_S, logps_N, dict(zip(terms, values))
