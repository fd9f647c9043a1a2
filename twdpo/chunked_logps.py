"""Log-probs by chunks of the vocabulary in plain torch: the fused op where Triton is not.

The formulas of the terms beside log-probs, and of their gradients, stand at the top of kernels/tile_kernels.py.

Legend: N response tokens, D hidden size, E the reference's, V vocabulary, W vocabulary entries of a chunk, C chunks.
"""

from dataclasses import dataclass

import torch
from torch.autograd.function import once_differentiable

from twdpo.kernels.tiles import Softmax

# One chunk's logits [N, W] take at most this, but W >= CHUNK_COLUMNS. Logits that fit KEEP_BYTES whole are one chunk,
# kept for the backward pass. Times: benchmarks/loss_kernel.py.
CHUNK_BYTES = 16 * 2**20
REFERENCE_CHUNK_BYTES = 2 * 2**20  # of three tensors: both models' logits, and their difference
CHUNK_COLUMNS = 256
KEEP_BYTES = 32 * 2**20

OF_REFERENCE = ("kl", "reverse_kl")  # terms that compare with the reference's distribution


@dataclass(frozen=True)
class HeadOptions:
    """What the model does between `hidden @ head.T` and its logits; None: nothing."""

    logit_scale: float | None = None  # logits are multiplied by it (Cohere; Granite by the inverse of its scaling)
    softcap: float | None = None  # softcap * tanh(logits / softcap) (Gemma-2)


def accumulation_dtype(tensor: torch.Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


class ChunkedLogps(torch.autograd.Function):
    """(log_softmax(logits)[n, targets[n]], then the terms) by chunks of the vocabulary; backward makes each chunk's
    logits again. `reference`: its hidden states, head and bias, or three times None where no term asks for them.

    Chunks of tokens would read and write the head's whole gradient once a chunk.
    """

    @staticmethod
    def forward(ctx, hidden_ND, head_VD, bias_V, targets_N, options, terms, *reference):
        num_tokens, vocabulary = len(targets_N), len(head_VD)
        dtype, compares = accumulation_dtype(hidden_ND), reference[0] is not None
        num_buffers = 3 if compares else 1  # the policy's logits, the reference's, their difference
        width, fits = chunk_columns(num_tokens, vocabulary, dtype, num_buffers)
        buffers = hidden_ND.new_empty(num_buffers, num_tokens * width, dtype=dtype)
        # Stays NaN for a target outside the vocabulary.
        target_logits_N = hidden_ND.new_full((num_tokens,), float("nan"), dtype=dtype)
        ruled_out = bias_V is not None or (compares and reference[2] is not None)
        chunks = []
        for first in range(0, vocabulary, width):
            logits_NW = logits_of_chunk(buffers[0], hidden_ND, head_VD, bias_V, options, first, width)
            inside_N, places_N = targets_in_chunk(targets_N, first, logits_NW.shape[1])
            target_logits_N = torch.where(inside_N, logits_NW.gather(-1, places_N[:, None])[:, 0], target_logits_N)
            ref_logits_NW = lead_NW = None
            if compares:
                ref_logits_NW = logits_of_chunk(buffers[1], *reference, options, first, width)
                lead_NW = torch.sub(logits_NW, ref_logits_NW, out=part(buffers[2], logits_NW))
            chunks.append(sums_of_chunk(logits_NW, ref_logits_NW, lead_NW, terms, ruled_out))
        softmax, log_total_N, values = finish_tokens(
            {name: torch.stack([sums[name] for sums in chunks]) for name in chunks[0]})
        if "top1" in terms:
            values["top1"] = target_logits_N >= softmax.top_N
            ctx.mark_non_differentiable(values["top1"])
        kept = fits and not compares and options.softcap is None and any(ctx.needs_input_grad)
        ctx.save_for_backward(hidden_ND, head_VD, bias_V, targets_N, *reference, logits_NW if kept else None, *softmax)
        ctx.options, ctx.terms, ctx.width = options, terms, width
        ctx.set_materialize_grads(False)  # a term that nothing is asked of costs the backward pass nothing
        return (target_logits_N - softmax.top_N) - log_total_N, *(values[name] for name in terms)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_N, *grad_terms):
        hidden_ND, head_VD, bias_V, targets_N, *reference, kept_exps_NV = ctx.saved_tensors[:8]
        options, width, softmax = ctx.options, ctx.width, Softmax(*ctx.saved_tensors[8:])
        needs_hidden, needs_head, needs_bias = ctx.needs_input_grad[:3]
        grad_hidden_ND = torch.zeros_like(hidden_ND, dtype=softmax.top_N.dtype) if needs_hidden else None
        grad_head_VD = torch.empty_like(head_VD) if needs_head else None
        grad_bias_V = torch.empty_like(bias_V) if needs_bias else None
        upstream = {name: grad for name, grad in zip(ctx.terms, grad_terms) if grad is not None}
        upstream["logps"] = torch.zeros_like(softmax.top_N) if grad_N is None else grad_N
        compares = not upstream.keys().isdisjoint(OF_REFERENCE)
        buffers = softmax.top_N.new_empty(3 if compares else 1, len(targets_N) * width)
        for first in range(0, len(head_VD), width):
            slope_NW = ref_exps_NW = lead_NW = None
            if kept_exps_NV is not None:
                exps_NW, gradient_NW = kept_exps_NV, buffers[0].view_as(kept_exps_NV)
            else:
                logits_NW = logits_of_chunk(buffers[0], hidden_ND, head_VD, bias_V, options, first, width)
                if options.softcap is not None:
                    slope_NW = 1 - (logits_NW / options.softcap) ** 2
                if compares:
                    ref_logits_NW = logits_of_chunk(buffers[1], *reference, options, first, width)
                    if "reverse_kl" in upstream:
                        lead_NW = torch.sub(logits_NW, ref_logits_NW, out=part(buffers[2], logits_NW))
                    ref_exps_NW = ref_logits_NW.sub_(softmax.ref_top_N[:, None]).exp_()
                exps_NW = gradient_NW = logits_NW.sub_(softmax.top_N[:, None]).exp_()
            set_logits_gradient(gradient_NW, exps_NW, ref_exps_NW, lead_NW, softmax, upstream,
                                *targets_in_chunk(targets_N, first, gradient_NW.shape[1]))
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
                *[None] * 6)


def sums_of_chunk(logits_NW, ref_logits_NW, lead_NW, terms, ruled_out: bool) -> dict[str, torch.Tensor]:
    """{name: [N]} of what a chunk adds to each token; the logits become exponentials, counted from the chunk's top.

    lead_NW: logits minus the reference's. ruled_out: whether a logit may be -inf.
    """
    def exps_of(logits_NW):
        # Finite, as -inf - -inf would be NaN.
        top_N = logits_NW.amax(dim=-1).clamp_min(torch.finfo(logits_NW.dtype).min)
        return top_N, logits_NW.sub_(top_N[:, None]).exp_()
    top_N, exps_NW = exps_of(logits_NW)
    sums = {"top": top_N, "total": exps_NW.sum(dim=-1)}
    if "entropy" in terms:
        sums["expected"] = torch.xlogy(exps_NW, exps_NW).sum(dim=-1)
    if "collision" in terms:
        sums["squares"] = exps_NW.square().sum(dim=-1)
    if ref_logits_NW is not None:
        sums["ref_top"], ref_exps_NW = exps_of(ref_logits_NW)
        sums["ref_total"] = ref_exps_NW.sum(dim=-1)
        for name, each_NW in (("reverse_kl", exps_NW), ("kl", ref_exps_NW)):
            if name in terms:
                # 0 times what may be infinite is 0 here.
                possible_NW = lead_NW.masked_fill(each_NW == 0, 0) if ruled_out else lead_NW
                sums[name] = torch.bmm(each_NW[:, None], possible_NW[:, :, None])[:, 0, 0]  # no tensor of products
    return sums


def finish_tokens(sums: dict[str, torch.Tensor]) -> tuple[Softmax, torch.Tensor, dict[str, torch.Tensor]]:
    """(Softmax, log of its total, {name: [N]} of the terms) of the [C, N] sums of all chunks."""
    top_N, below_CN, share_CN, total_N = merge_chunks(sums["top"], sums["total"])
    # The log-sum-exp is kept as maximum and sum: one fp32 number would round away log p of a sure token.
    softmax, log_total_N, values = Softmax(top_N, 1 / total_N), total_N.log(), {}
    if "expected" in sums:
        # A chunk counted from its own maximum.
        expected_CN = sums["expected"] * share_CN + (sums["total"] * share_CN) * below_CN
        softmax = softmax._replace(mean_N=expected_CN.sum(dim=0) / total_N)
        values["entropy"] = log_total_N - softmax.mean_N
    if "squares" in sums:
        squares_N = (sums["squares"] * share_CN.square()).sum(dim=0)
        softmax = softmax._replace(over_squares_N=total_N / squares_N)
        values["collision"] = squares_N.log() - 2 * log_total_N
    if "ref_top" in sums:
        ref_top_N, _, ref_share_CN, ref_total_N = merge_chunks(sums["ref_top"], sums["ref_total"])
        softmax = softmax._replace(ref_top_N=ref_top_N, ref_inverse_total_N=1 / ref_total_N)
        lead_N = (top_N - ref_top_N) + (total_N / ref_total_N).log()  # of the log-sum-exps
        if "kl" in sums:
            values["kl"] = lead_N - weighted_sum(sums["kl"], ref_share_CN) / ref_total_N
        if "reverse_kl" in sums:
            softmax = softmax._replace(lead_N=weighted_sum(sums["reverse_kl"], share_CN) / total_N)
            values["reverse_kl"] = softmax.lead_N - lead_N
    return softmax, log_total_N, values


def merge_chunks(top_CN, total_CN):
    """(top_N of all chunks, each one's top minus that, the exponential of it, total_N of all)."""
    top_N = top_CN.amax(dim=0)
    below_CN = top_CN - top_N
    share_CN = below_CN.exp()
    return top_N, below_CN, share_CN, (total_CN * share_CN).sum(dim=0)


def weighted_sum(sums_CN, share_CN) -> torch.Tensor:
    """[N]; a chunk without a share counts nothing, even where its sum is infinite."""
    return torch.where(share_CN == 0, 0, sums_CN * share_CN).sum(dim=0)


def set_logits_gradient(gradient_NW, exps_NW, ref_exps_NW, lead_NW, softmax: Softmax, upstream, inside_N, places_N
                        ) -> None:
    """Fill gradient_NW, which may be exps_NW, with dL/dlogits of a chunk. ref_exps_NW and lead_NW are used up."""
    terms, grad_N, scale_N = [], upstream["logps"], -upstream["logps"] * softmax.inverse_total_N
    if "entropy" in upstream:
        terms.append(entropy_gradient(exps_NW, softmax.mean_N, upstream["entropy"] * softmax.inverse_total_N))
    if "collision" in upstream:
        twice_N = 2 * upstream["collision"] * softmax.inverse_total_N
        terms.append((exps_NW * softmax.over_squares_N[:, None]).sub_(1).mul_(exps_NW).mul_(twice_N[:, None]))
    if "reverse_kl" in upstream:
        reverse_N = upstream["reverse_kl"] * softmax.inverse_total_N
        # What has no probability, or no upstream gradient, gets 0 even where a logit is infinite.
        nothing_NW = (exps_NW == 0) | (reverse_N == 0)[:, None]
        lead_NW.sub_(softmax.lead_N[:, None]).mul_(exps_NW).mul_(reverse_N[:, None])
        terms.append(lead_NW.masked_fill_(nothing_NW, 0))
    if "kl" in upstream:
        scale_N = scale_N + upstream["kl"] * softmax.inverse_total_N
    # d logp / d logits = onehot - p, times the upstream gradient; the target's term before any rounding.
    torch.mul(exps_NW, scale_N[:, None], out=gradient_NW)
    gradient_NW.scatter_add_(-1, places_N[:, None], torch.where(inside_N, grad_N, 0)[:, None])
    for term_NW in terms:
        gradient_NW += term_NW
    if "kl" in upstream:
        gradient_NW.addcmul_(ref_exps_NW, -(upstream["kl"] * softmax.ref_inverse_total_N)[:, None])


def entropy_gradient(exps_NW, mean_N, scale_N) -> torch.Tensor:
    """scale * d entropy / d logits, times each token's sum of exps: -exps * (log exps - mean), 0 where exps is."""
    return (exps_NW * mean_N[:, None]).sub_(torch.xlogy(exps_NW, exps_NW)).mul_(scale_N[:, None])


def chunk_columns(num_tokens: int, vocabulary: int, dtype: torch.dtype, num_buffers: int) -> tuple[int, bool]:
    """(vocabulary entries of a chunk, evened out over the chunks; whether all logits are small enough to be kept)."""
    column_bytes = max(1, num_tokens * dtype.itemsize * num_buffers)
    if vocabulary * column_bytes <= KEEP_BYTES:
        return vocabulary, True
    most = CHUNK_BYTES if num_buffers == 1 else REFERENCE_CHUNK_BYTES
    num_chunks = -(-vocabulary // max(most // column_bytes, CHUNK_COLUMNS))
    return -(-vocabulary // num_chunks), False


def part(buffer, like_NW) -> torch.Tensor:
    """The buffer's beginning, in the shape of another tensor."""
    return buffer[:like_NW.numel()].view_as(like_NW)


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
