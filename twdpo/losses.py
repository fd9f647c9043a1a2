"""Pair losses: pure functions of the weighted log-ratios.

A loss is `LOSSES[name](ratio_S, logps_N, batch, config) -> (loss_P, metrics)`: one number a pair and a dict of [P]
tensors to log beside the usual ones. To add one, write the function and its line in LOSSES (or do both in a file given
to --import). Attributes of a loss, all optional:
    default_source  the weight source it uses when --weights is empty ("uniform")
    norm            overrides the source's normalisation (twdpo.weights.normalize)
    needs           ("ref",) by default; () skips the reference pass, and batch.ref_logps_N is 0

Legend: S sequences (2i chosen, 2i+1 rejected), P pairs, N response tokens. ratio_S is the fused op's output: the sum of
weighted policy-to-reference log-ratios, times the scale.
"""

import torch
import torch.nn.functional as F


def dpo(ratio_S: torch.Tensor, logps_N: torch.Tensor, batch, config) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """-log sigmoid(beta * (ratio_w - ratio_l)) (DPO Eq. 7; with token weights paper Eq. 5), labels flipped with
    probability `label_smoothing`. Needs reference log-probs; no forward beyond the policy's."""
    margin_P = config.beta * (ratio_S[0::2] - ratio_S[1::2])
    smoothing = config.label_smoothing
    return -(1 - smoothing) * F.logsigmoid(margin_P) - smoothing * F.logsigmoid(-margin_P), {}


def twdpo(ratio_S: torch.Tensor, logps_N: torch.Tensor, batch, config) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Token-weighted DPO (paper Eq. 5): the DPO formula on weights of mean 1, |y| a_t; Eq. 15 with --length-normalize.
    Needs reference log-probs; no forward beyond the policy's."""
    return dpo(ratio_S, logps_N, batch, config)


twdpo.default_source = "attention"
twdpo.norm = "mean1"

LOSSES = {
    "dpo": dpo,
    "twdpo": twdpo,
}


def needs_reference(loss) -> bool:
    """Whether a loss reads reference log-probs."""
    return "ref" in getattr(loss, "needs", ("ref",))
