"""Other ways to the same token-weighted DPO loss, each behind one signature, for loss_kernel.py.

A method's `op(hidden_ND, head_VD, batch)` returns (ratio_S, logps_N) as `twdpo.logratio.weighted_logratio` begins. A
reference row returns a scalar instead: it computes gradients in its forward pass, for one loss of its own, and takes no
gradient per token; its time tells what 6 N V D operations cost, not what this loss costs. A method with KL adds to each
token's log-prob the KL of the reference's distribution from the policy's, as TDPO does.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from twdpo.logratio import (
    HeadOptions,
    combine,
    logits_of,
    weighted_logratio,
    weighted_logratio_chunked,
    weighted_logratio_spec,
)


@dataclass(frozen=True)
class Method:
    """One row's way of computing the loss."""

    name: str
    op: Callable | None = None
    operations: int = 8  # N V D of forward and backward: 8 makes the logits twice, 6 keeps them
    reference_row: bool = False
    missing: str = ""  # why it can't run on this machine
    takes_softcap: bool = True
    compiles: bool = False  # by torch.compile, for as long as it takes
    with_kl: bool = False  # of another loss: compared with methods of it alone


def find_methods(device: torch.device, softcap: float | None) -> list[Method]:
    """All methods for a head with this softcap, the most worthwhile first: ours, those with KL, those that take any
    gradient per token, full logits, those of a loss of their own, and last what compiles for long. Some can't run here,
    and say why; some take no softcap."""
    options = HeadOptions(softcap=softcap)
    chunks = Method("twdpo, torch chunks", partial(call_plain, weighted_logratio_chunked, options))
    ours = [chunks]
    if device.type == "cuda":
        ours = [Method("twdpo, Triton", partial(call_plain, weighted_logratio, options)),
                Method("twdpo, Triton, half of the tiles kept", partial(_call_cached, options), operations=7,
                       takes_softcap=False), chunks]
    methods = [*ours, *_with_kl(device, options), *_trl(softcap), *_cut_cross_entropy(device, softcap),
               *_liger(device, softcap), *_torch_core(), *_full_logits(options)]
    return sorted(methods, key=lambda method: (method.compiles, method.reference_row))


def call_plain(op, options: HeadOptions, hidden_ND, head_VD, batch):
    return op(hidden_ND, head_VD, **batch, options=options)[:2]


def _call_cached(options: HeadOptions, hidden_ND, head_VD, batch):
    """With memory for half of the N V exponentials, two bytes each."""
    cache_gib = len(hidden_ND) * len(head_VD) / 2**30
    return weighted_logratio(hidden_ND, head_VD, **batch, options=options, head_cache_gib=cache_gib)[:2]


def _with_kl(device: torch.device, options: HeadOptions) -> list[Method]:
    name, op = ("Triton", weighted_logratio) if device.type == "cuda" else ("torch chunks", weighted_logratio_chunked)
    return [Method(f"twdpo, {name}, with KL", partial(call_kl, op, options), operations=12, with_kl=True),
            Method("full logits, with KL", partial(_two_softmaxes, options), with_kl=True)]


def call_kl(op, options: HeadOptions, hidden_ND, head_VD, batch):
    _, logps_N, values = op(hidden_ND, head_VD, **batch, options=options, terms=("kl",))
    return _combine(logps_N + values["kl"], batch), logps_N


def _two_softmaxes(options: HeadOptions, hidden_ND, head_VD, batch):
    """What one writes who has the memory; the specification also looks after probabilities of 0."""
    models = (hidden_ND, head_VD, None), batch["ref_states"]
    logps_NV, ref_logps_NV = (logits_of(*model, options).log_softmax(dim=-1) for model in models)
    logps_N = logps_NV.gather(-1, batch["targets_N"][:, None])[:, 0]
    kl_N = F.kl_div(logps_NV, ref_logps_NV, reduction="none", log_target=True).sum(dim=-1)
    return _combine(logps_N + kl_N, batch), logps_N


def _combine(logps_N, batch):
    return combine(logps_N, *(batch[name] for name in ("ref_logps_N", "weights_N", "seq_lens_S", "scale_S")))


def _from_logps(logps_of, hidden_ND, head_VD, batch):
    """The op from any function that gives log-probs per token."""
    logps_N = logps_of(hidden_ND, head_VD, batch["targets_N"])
    return _combine(logps_N.float(), batch), logps_N


def _full_logits(options: HeadOptions) -> list[Method]:
    full = partial(call_plain, weighted_logratio_spec, options)
    logps = torch.compile(lambda hidden_ND, head_VD, targets_N: weighted_logratio_spec(
        hidden_ND, head_VD, targets_N, torch.zeros_like(hidden_ND[:, 0]), torch.ones_like(hidden_ND[:, 0]),
        torch.tensor([len(targets_N)]), torch.ones_like(hidden_ND[:1, 0]), options=options)[1])
    return [Method("full logits", full, operations=6),
            Method("full logits, compiled", partial(_from_logps, logps), operations=6, compiles=True)]


def _torch_core() -> list[Method]:
    name = "F.linear_cross_entropy"
    if not hasattr(F, "linear_cross_entropy"):
        return [Method(name, missing=f"torch {torch.__version__} has none; 2.13 has")]
    Options = torch.nn.LinearCrossEntropyOptions
    choices = {"default": None}
    choices |= {f"chunks {size}": Options(batch_chunk_size=size, chunking_method=None) for size in (256, 1024, 4096)}

    def logps(options, hidden_ND, head_VD, targets_N):
        return -F.linear_cross_entropy(hidden_ND, head_VD, targets_N, reduction="none", options=options)
    return [Method(f"{name}, {choice}", partial(_from_logps, partial(logps, options)), operations=6,
                   takes_softcap=False)
            for choice, options in choices.items()]


def _trl(softcap: float | None) -> list[Method]:
    try:
        from trl.kernels import ChunkedLogProbFunction
    except ImportError as error:
        return [Method("TRL ChunkedLogProbFunction", missing=_why(error, "trl>=1.16"))]

    def logps(width, hidden_ND, head_VD, targets_N):
        return ChunkedLogProbFunction.apply(hidden_ND, head_VD, None, targets_N, 1.0, width, softcap, 1.0, ())[0]
    return [Method(f"TRL ChunkedLogProbFunction, {width}", partial(_from_logps, partial(logps, width)))
            for width in (8192, 32768)]


def _liger(device: torch.device, softcap: float | None) -> list[Method]:
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss
        from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction, LigerFusedLinearScaledCrossEntropyFunction
    except ImportError as error:
        return [Method("Liger", missing=_why(error, "liger-kernel"))]

    def scaled(hidden_ND, head_VD, targets_N):
        return -LigerFusedLinearScaledCrossEntropyFunction.apply(hidden_ND, head_VD, targets_N)

    def fused(hidden_ND, head_VD, batch):
        outputs = LigerFusedLinearCrossEntropyFunction.apply(hidden_ND, head_VD, batch["targets_N"], None, None, -100,
                                                             0.0, 0.0, "mean", softcap)
        return outputs[0] if isinstance(outputs, tuple) else outputs

    def dpo(hidden_ND, head_VD, batch):
        # Padded [2P, T], chosen first; the reference's hidden states are the policy's own.
        order = torch.cat([torch.arange(0, len(batch["seq_lens_S"]), 2), torch.arange(1, len(batch["seq_lens_S"]), 2)])
        lens = batch["seq_lens_S"].tolist()
        rows, targets = (
            torch.nn.utils.rnn.pad_sequence([values.split(lens)[place] for place in order.tolist()], batch_first=True,
                                            padding_value=padding)
            for values, padding in ((hidden_ND, 0.0), (batch["targets_N"], -100)))
        loss = LigerFusedLinearDPOLoss(beta=0.1, use_ref_model=False)
        return loss(head_VD, rows, targets)[0]
    on_cpu = "Triton kernels: needs a GPU" if device.type != "cuda" else ""
    return [
        Method("Liger scaled CE", partial(_from_logps, scaled), takes_softcap=False),
        Method("Liger fused linear CE", fused, operations=6, reference_row=True, missing=on_cpu),
        Method("Liger DPO loss", dpo, operations=6, reference_row=True, missing=on_cpu, takes_softcap=False),
    ]


def _cut_cross_entropy(device: torch.device, softcap: float | None) -> list[Method]:
    name = "cut-cross-entropy"
    try:
        from cut_cross_entropy import linear_cross_entropy
    except ImportError as error:
        return [Method(name, missing=_why(error, "cut-cross-entropy"))]
    if device.type != "cuda":
        return [Method(name, missing="Triton kernels: needs a GPU")]

    def logps(filter_eps, hidden_ND, head_VD, targets_N):
        return -linear_cross_entropy(hidden_ND, head_VD, targets_N, softcap=softcap, reduction="none",
                                     filter_eps=filter_eps)
    return [Method(f"{name}, {label}", partial(_from_logps, partial(logps, eps)))
            for label, eps in (("no filter", None), ("filter auto", "auto"))]


def _why(error: ImportError, package: str) -> str:
    return f"{package} can't be imported ({error})"
