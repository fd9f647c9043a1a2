"""Log-probs of response tokens from hidden states, and their weighted, scaled log-ratio per sequence (paper Eq. 5).

`weighted_logratio_reference` is the specification: it makes all [N, V] logits. `weighted_logratio` gives the same
from chunks of tokens, so that full-vocabulary logits never exist.

Legend: N response tokens, D hidden size, V vocabulary, S sequences.
"""

from dataclasses import dataclass

import torch
from torch.distributed.tensor import DTensor

# Logits of one chunk, in fp32 elements. When all tokens fit, they are kept for the backward pass.
CHUNK_ELEMENTS = 32 * 1024 * 1024 // 4

LOGPS_VERSION = 1  # raise it when log-probs change by more than rounding: cached reference log-probs are then redone


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
    return torch.stack([part.sum() for part in values_N.split(seq_lens_S.tolist())])


def combine(logps_N, ref_logps_N, weights_N, seq_lens_S, scale_S) -> torch.Tensor:
    """ratio_S[s] = scale_S[s] * sum over n in s of weights_N[n] * (logps_N[n] - ref_logps_N[n]) (Eq. 5, scale |y|)."""
    weighted_N = weights_N.to(logps_N.dtype) * (logps_N - ref_logps_N.to(logps_N.dtype))
    return scale_S.to(logps_N.dtype) * segment_sum(weighted_N, seq_lens_S)


def weighted_logratio_reference(hidden_ND, head_VD, targets_N, ref_logps_N, weights_N, seq_lens_S, scale_S,
                                bias_V=None, options: HeadOptions | None = None):
    """The specification, in plain autograd: see `weighted_logratio`."""
    logits_NV = logits_of(hidden_ND, head_VD, bias_V, options or HeadOptions())
    logps_N = logits_NV.log_softmax(dim=-1).gather(-1, targets_N[:, None])[:, 0]
    return combine(logps_N, ref_logps_N, weights_N, seq_lens_S, scale_S), logps_N


def weighted_logratio(hidden_ND, head_VD, targets_N, ref_logps_N, weights_N, seq_lens_S, scale_S,
                      bias_V=None, options: HeadOptions | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """(ratio_S, logps_N), both differentiable with any upstream gradient.

    hidden_ND, head_VD: bf16, fp16, fp32 or fp64, of one dtype. targets_N: int64. ref_logps_N, weights_N: [N] fp32.
    seq_lens_S: int64 on the CPU, sums to N. scale_S: [S] fp32. Outputs fp32 (fp64 for fp64 operands).
    Raises ValueError for shapes that don't fit and for a DTensor.
    """
    num_tokens = len(targets_N)
    if isinstance(head_VD, DTensor) or isinstance(hidden_ND, DTensor):
        raise ValueError("weighted_logratio got a DTensor: call it inside the forward of the module that owns the "
                         "head, where FSDP2 has gathered it (full_tensor() would give a wrong gradient)")
    if hidden_ND.shape != (num_tokens, head_VD.shape[1]) or int(seq_lens_S.sum()) != num_tokens:
        raise ValueError(f"hidden {tuple(hidden_ND.shape)}, head {tuple(head_VD.shape)}, {num_tokens} targets and "
                         f"sequences of {int(seq_lens_S.sum())} tokens don't fit together")
    logps_N = ChunkedLogps.apply(hidden_ND, head_VD, bias_V, targets_N, options or HeadOptions())
    return combine(logps_N, ref_logps_N, weights_N, seq_lens_S, scale_S), logps_N


class ChunkedLogps(torch.autograd.Function):
    """log_softmax(hidden @ head.T)[n, targets[n]] by chunks of tokens; backward makes each chunk's logits again."""

    @staticmethod
    def forward(ctx, hidden_ND, head_VD, bias_V, targets_N, options):
        chunk = max(1, CHUNK_ELEMENTS // head_VD.shape[0])
        logps_N = torch.empty(len(targets_N), dtype=accumulation_dtype(hidden_ND), device=hidden_ND.device)
        lse_N = torch.empty_like(logps_N)
        kept_NV = None
        for start in range(0, len(targets_N), chunk):
            part = slice(start, start + chunk)
            logits_NV = logits_of(hidden_ND[part], head_VD, bias_V, options)
            lse_N[part] = logits_NV.logsumexp(dim=-1)
            logps_N[part] = logits_NV.gather(-1, targets_N[part, None])[:, 0] - lse_N[part]
            if len(targets_N) <= chunk and any(ctx.needs_input_grad):
                kept_NV = logits_NV
        ctx.save_for_backward(hidden_ND, head_VD, bias_V, targets_N, lse_N, kept_NV)
        ctx.options, ctx.chunk = options, chunk
        return logps_N

    @staticmethod
    def backward(ctx, grad_N):
        hidden_ND, head_VD, bias_V, targets_N, lse_N, kept_NV = ctx.saved_tensors
        grad_hidden_ND = torch.zeros_like(hidden_ND) if ctx.needs_input_grad[0] else None
        grad_head_VD = (torch.zeros(head_VD.shape, dtype=lse_N.dtype, device=head_VD.device)
                        if ctx.needs_input_grad[1] else None)
        grad_bias_V = torch.zeros_like(lse_N[:1]).expand(len(head_VD)).clone() if ctx.needs_input_grad[2] else None
        for start in range(0, len(targets_N), ctx.chunk):
            part = slice(start, start + ctx.chunk)
            logits_NV = (logits_of(hidden_ND[part], head_VD, bias_V, ctx.options) if kept_NV is None else kept_NV)
            # d logp / d logits = onehot - p, times the upstream gradient; the target's term before any rounding.
            dz_NV = (logits_NV - lse_N[part, None]).exp_().mul_(-grad_N[part, None])
            dz_NV.scatter_add_(-1, targets_N[part, None], grad_N[part, None])
            if ctx.options.softcap is not None:
                dz_NV *= 1 - (logits_NV / ctx.options.softcap) ** 2
            if ctx.options.logit_scale is not None:
                dz_NV *= ctx.options.logit_scale
            if grad_bias_V is not None:
                grad_bias_V += dz_NV.sum(dim=0)
            dz_NV = dz_NV.to(hidden_ND.dtype)
            if grad_hidden_ND is not None:
                grad_hidden_ND[part] = dz_NV @ head_VD
            if grad_head_VD is not None:
                grad_head_VD += dz_NV.T @ hidden_ND[part]
        return (grad_hidden_ND, grad_head_VD if grad_head_VD is None else grad_head_VD.to(head_VD.dtype),
                grad_bias_V if grad_bias_V is None else grad_bias_V.to(bias_V.dtype), None, None)
