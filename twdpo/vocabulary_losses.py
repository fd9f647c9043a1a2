"""Pair losses that read more than log-probs of the answers: whole distributions, or answers that the policy writes.

As those of twdpo/losses.py, which holds the table. Legend: S sequences (2i chosen, 2i+1 rejected), P pairs, N response
tokens, T positions of an answer. In the formulas K is a sum of KL divergences over an answer's tokens, without weights;
u = R_w - R_l, weighted.
"""

from typing import Literal

import torch

from twdpo.logratio import segment_sum
from twdpo.loss_parts import Loss, refuse_unread, smoothed

ALPHA = 0.5  # of TDPO2 and of what is built on it
MARGIN = 1e-3  # of the triplet term


def tdpo1(ratio_S: torch.Tensor, logps_N: torch.Tensor, batch, config) -> Loss:
    """Token-level DPO, first form (TDPO1, Zeng et al. 2024, arXiv 2404.11999).

    -log sigmoid(beta (u - (K_l - K_w))), K of KL(ref || policy), with gradient through both (its code runs this form
    unless told `if_tdpo2`, whatever its README calls it). One reference pass, and the reference in memory or on disk.
    """
    kl_S = summed_kl(batch)
    excess_P = kl_S[1::2] - kl_S[0::2]
    return smoothed(config.beta * (ratio_S[0::2] - ratio_S[1::2] - excess_P), 0.0), kl_metrics(kl_S)


tdpo1.needs = ("ref", "ref_states")
tdpo1.terms = ("kl",)
tdpo1.settings = {"": {"beta": 0.1}}


def tdpo2(ratio_S: torch.Tensor, logps_N: torch.Tensor, batch, config, *, alpha: float = ALPHA) -> Loss:
    """Token-level DPO, second form (TDPO2, Zeng et al. 2024, arXiv 2404.11999).

    -log sigmoid(beta (u - alpha (K_l - K_w))), K of KL(ref || policy), that of the chosen answer without gradient. One
    reference pass, and the reference in memory or on disk.
    """
    kl_S = summed_kl(batch)
    excess_P = kl_S[1::2] - kl_S[0::2].detach()
    return smoothed(config.beta * (ratio_S[0::2] - ratio_S[1::2] - alpha * excess_P), 0.0), kl_metrics(kl_S)


tdpo2.needs = ("ref", "ref_states")
tdpo2.terms = ("kl",)
tdpo2.settings = {"": {"beta": 0.1}}


def summed_kl(batch) -> torch.Tensor:
    """K of every answer, [S]: its mean a token where the weights make means of the ratios too."""
    kl_S = segment_sum(batch.terms["kl"], batch.seq_lens_S)
    return kl_S / batch.seq_lens_S.to(kl_S, non_blocking=True).clamp(min=1) if batch.averaged else kl_S


def kl_metrics(kl_S: torch.Tensor) -> dict[str, torch.Tensor]:
    """K (nats an answer) for the log."""
    return {"kl_chosen": kl_S.detach()[0::2], "kl_rejected": kl_S.detach()[1::2]}


def tisdpo(ratio_S: torch.Tensor, logps_N: torch.Tensor, batch, config, *, alpha: float = 0.5) -> Loss:
    """Token-level importance sampling DPO with its KL term (TIS-DPO, Liu et al. 2024, arXiv 2410.04350).

    -log sigmoid(beta u - alpha eta), eta = beta (K_w - K_l), here weighted as u is, of KL(policy || ref). (Without eta
    it is --loss dpo --weights tis; its code has it only with token_level=true.) One reference pass, two auxiliary
    models, and the reference in memory or on disk.
    """
    weighted_N = batch.weights_N * batch.terms["reverse_kl"]
    kl_S = batch.scale_S * segment_sum(weighted_N, batch.seq_lens_S)
    margin_P = ratio_S[0::2] - ratio_S[1::2] - alpha * (kl_S[0::2] - kl_S[1::2])
    return smoothed(config.beta * margin_P, 0.0), kl_metrics(kl_S)


tisdpo.default_source = "tis"
tisdpo.needs = ("ref", "ref_states")
tisdpo.terms = ("reverse_kl",)
tisdpo.settings = {"": {"beta": 0.1}}


def wpo(ratio_S: torch.Tensor, logps_N: torch.Tensor, batch, config, *, label_smoothing: float = 0.0) -> Loss:
    """Weighted preference optimisation (WPO, Zhou et al. 2024, arXiv 2406.11827; TRL's use_weighting).

    omega times the DPO loss. omega, without gradient, is how likely the policy is to write the pair itself: the exp of
    the mean over each answer's tokens of log p - log(sum over the vocabulary of p^2), both answers' added, 1 at most.
    One reference pass.
    """
    likely_N = logps_N.detach() - batch.terms["collision"].detach()
    lens_S = batch.seq_lens_S.to(likely_N, non_blocking=True)
    mean_S = segment_sum(likely_N, batch.seq_lens_S) / lens_S.clamp(min=1)
    omega_P = mean_S.view(-1, 2).sum(dim=1).exp().clamp(max=1)
    return omega_P * smoothed(config.beta * (ratio_S[0::2] - ratio_S[1::2]), label_smoothing), {"omega": omega_P}


wpo.terms = ("collision",)
wpo.settings = {"": {"beta": 0.01}}


def triplet(ratio_S: torch.Tensor, logps_N: torch.Tensor, batch, config, *, margin: float = MARGIN) -> Loss:
    """The triplet term of TI-DPO alone (Yang et al. 2025, arXiv 2505.19653), for sums of losses (tdpo2+0.001*triplet).

    relu(sum of (a_t - w_t)^2 - sum of (a_t - l_t)^2 + margin): a_t, w_t, l_t are the log-ratios at position t of an
    answer that the policy writes from the prompt, of the chosen and of the rejected one, without weights, each sum over
    the positions that both answers have; gradient through all three. (The paper gives no margin; this is the code's.)
    Alone it never starts, as all log-ratios are 0 then and so is its gradient. Generates 64 tokens a pair in every
    step; the reference in memory.
    """
    gaps = (logps_N - batch.ref_logps_N).split(batch.seq_lens_S.tolist())
    anchors = (batch.anchor.logps_M - batch.anchor.ref_logps_M).split(batch.anchor.seq_lens_P.tolist())
    distances = [square_distance(anchor_T, chosen_T) - square_distance(anchor_T, rejected_T)
                 for anchor_T, chosen_T, rejected_T in zip(anchors, gaps[0::2], gaps[1::2])]
    loss_P = torch.relu(torch.stack(distances) + margin)
    return loss_P, {"triplet": loss_P.detach()}


triplet.needs = ("ref", "anchor")


def square_distance(first_T: torch.Tensor, second_T: torch.Tensor) -> torch.Tensor:
    """Of two answers' log-ratios, over the positions that both have."""
    both = min(len(first_T), len(second_T))
    return (first_T[:both] - second_T[:both]).square().sum()


def tidpo(ratio_S: torch.Tensor, logps_N: torch.Tensor, batch, config, *, base: Literal["dpo", "tdpo2"] = "dpo",
          gamma: float = 0.1, margin: float = MARGIN, alpha: float = ALPHA) -> Loss:
    """Token-importance guided DPO (TI-DPO, Yang et al. 2025, arXiv 2505.19653).

    -log sigmoid(beta u), u with the weights of the source `tidpo`, plus gamma times `triplet` with this margin. Its
    code differs: base=tdpo2 (on weighted log-ratios, with unweighted K), gamma=0.001, --beta 0.2; and see the source.
    gamma=0: no anchors. One reference pass; the reference in memory.
    """
    if gamma < 0:
        raise ValueError(f"gamma is {gamma:g}: the factor of the triplet term must be at least 0")
    refuse_unread(margin != MARGIN and not gamma, f"margin={margin:g}", "gamma=0 leaves the triplet term out")
    refuse_unread(alpha != ALPHA and base != "tdpo2", f"alpha={alpha:g}", "it is of base=tdpo2")
    loss_P, metrics = (tdpo2(ratio_S, logps_N, batch, config, alpha=alpha) if base == "tdpo2" else
                       (smoothed(config.beta * (ratio_S[0::2] - ratio_S[1::2]), 0.0), {}))
    if not gamma:
        return loss_P, metrics
    triplet_P, more = triplet(ratio_S, logps_N, batch, config, margin=margin)
    return loss_P + gamma * triplet_P, metrics | more


tidpo.default_source = "tidpo"
tidpo.needs = lambda base, gamma, **_: ("ref", *(["ref_states"] if base == "tdpo2" else []),
                                        *(["anchor"] if gamma else []))
tidpo.terms = lambda base, **_: ("kl",) if base == "tdpo2" else ()
tidpo.settings = {"": {"beta": 0.1}}

VOCABULARY_LOSSES = {"tdpo1": tdpo1, "tdpo2": tdpo2, "tisdpo": tisdpo, "wpo": wpo, "triplet": triplet, "tidpo": tidpo}
