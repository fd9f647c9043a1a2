"""Pair losses: pure functions of the weighted log-ratios.

A loss is `LOSSES[name](ratio_S, logps_N, batch, config) -> (loss_P, metrics)`: one number a pair and a dict of [P]
tensors to log beside the usual ones. To add one, write the function and its line in LOSSES (or do both in a file given
to --import). Keyword-only parameters are its options (--loss-options NAME=VALUE). Attributes, all optional:
    default_source  the weight source it uses when --weights is empty ("uniform")
    norm            overrides the source's normalisation (twdpo.weights.normalize)
    needs           ("ref",) by default; () skips the reference pass, and batch.ref_logps_N is 0; "hidden" gives
                    batch.hidden_ND, which predict the response tokens, with gradient
    terms           of the fused op (twdpo.logratio.TERMS), given as batch.terms[name], [N] each
    statistics      function(ratio_S, logps_N, batch) -> dict of [P] tensors: the loop runs the global batch once more,
                    without gradient, before the step, and batch.means holds their means over all of its pairs
    settings        {preset: {field of TrainConfig: value}}, "" for every preset: defaults of its paper

Legend: S sequences (2i chosen, 2i+1 rejected), P pairs, N response tokens. ratio_S is the fused op's output: the sum of
weighted policy-to-reference log-ratios, times the scale; R_w and R_l in the formulas. Without a reference it is the sum
of weighted log-probs, S_w and S_l. Uniform weights are 1, so that these are plain sums. n is a response's length:
tokens, end of turn included, or with length_by=mass the sum of its weights. batch.margins_P are the pairs' own.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F

from twdpo.logratio import log_one_minus_exp
from twdpo.loss_parts import (
    LengthBy,
    Loss,
    answer_lengths,
    answer_nll,
    average_metrics,
    f_reward,
    pair_averages,
    pair_lengths,
    position_margins,
    refuse_unread,
    smoothed,
)
from twdpo.vocabulary_losses import VOCABULARY_LOSSES

MOST_AVERAGE = -1e-6  # log-probs a token are kept below it where log(1 - p) is taken: p = 1 would give infinity


def dpo(ratio_S: torch.Tensor, logps_N: torch.Tensor, batch, config, *,
        over: Literal["sums", "positions"] = "sums", label_smoothing: float = 0.0, margin: bool = False,
        nll: float = 0.0, f: Literal["reverse_kl", "forward_kl", "alpha", "js"] = "reverse_kl", alpha: float = 0.5
        ) -> Loss:
    """Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290 Eq. 7; with weights paper Eq. 5).

    -log sigmoid(beta (f(R_w) - f(R_l))), labels flipped with probability label_smoothing; margin=on: less the pair's
    margin (ODPO, Amini et al. 2024, arXiv 2402.10571). `positions`: of each position's two tokens in the place of the
    sums, mean over the longer answer's, as in cDPO's code (whose mean counts prompt and padding too). nll: times the
    chosen answer's negative log-likelihood a token, without weights, is added (RPO, Pang et al. 2024, arXiv 2404.19733;
    TRL's rpo_alpha). f: of f-DPO (Wang et al. 2023, arXiv 2309.16240), up to constants, for the divergence that keeps
    the policy near: R itself (reverse KL), -exp(-R), -exp(-alpha R) / alpha, R - log(1 + exp(R)). One reference pass.
    """
    refuse_unread(margin and over == "positions", "margin=on", "a pair's margin is one of sums, not of positions")
    refuse_unread(f != "reverse_kl" and over == "positions", f"f={f}", "it is of sums, not of positions")
    refuse_unread(alpha != 0.5 and f != "alpha", f"alpha={alpha:g}", "it is of f=alpha")
    if over == "sums":
        margin_P = config.beta * (f_reward(ratio_S[0::2], f, alpha) - f_reward(ratio_S[1::2], f, alpha))
        loss_P = smoothed(margin_P - batch.margins_P if margin else margin_P, label_smoothing)
    else:
        loss_P = torch.stack([smoothed(config.beta * margin_T, label_smoothing).mean()
                              for margin_T in position_margins(logps_N, batch)])
    return loss_P + nll * answer_nll(logps_N, batch) if nll else loss_P, {}


# What SimPO's authors found for DPO, by model (their README): Llama-3-8B-Instruct, Llama-3-Base-8B-SFT, the first on a
# second set of pairs.
dpo.settings = {"tuned": {"beta": 0.01, "lr": 7e-7, "batch_size": 128},
                "tuned-base": {"beta": 0.01, "lr": 5e-7, "batch_size": 128},
                "tuned-v0.2": {"beta": 0.01, "lr": 3e-7, "batch_size": 128}}


def twdpo(ratio_S: torch.Tensor, logps_N: torch.Tensor, batch, config, *, label_smoothing: float = 0.0,
          margin: bool = False, nll: float = 0.0) -> Loss:
    """Token-weighted DPO (arXiv 2605.21883 Eq. 5; Eq. 15 with --length-normalize).

    The DPO formula on weights of mean 1, |y| a_t; options as there. One reference pass.
    """
    return dpo(ratio_S, logps_N, batch, config, label_smoothing=label_smoothing, margin=margin, nll=nll)


twdpo.default_source = "attention"
twdpo.norm = "mean1"


def ipo(ratio_S: torch.Tensor, logps_N: torch.Tensor, batch, config, *,
        normalize: Literal["mean", "sum"] = "mean", length_by: LengthBy = "tokens") -> Loss:
    """Identity preference optimisation (Azar et al. 2023, arXiv 2310.12036 Eq. 17).

    (h - 1 / (2 beta))^2, beta being the paper's tau; h = R_w - R_l (`sum`: the paper's notation and the DPO authors'
    code) or R_w / n_w - R_l / n_l (`mean`: TRL and HALOs, which the authors confirmed). One reference pass.
    """
    refuse_unread(normalize == "sum" and length_by == "mass", "length_by=mass", "normalize=sum divides by no length")
    chosen_P, rejected_P = ratio_S[0::2], ratio_S[1::2]
    if normalize == "mean":
        chosen_P, rejected_P = pair_averages(ratio_S, batch, length_by)
    return (chosen_P - rejected_P - 1 / (2 * config.beta)) ** 2, {}


ipo.settings = {"": {"beta": 0.1}}


def kto_pair(ratio_S: torch.Tensor, logps_N: torch.Tensor, batch, config, *,
             kl: Literal["batch", "micro", "zero"] = "batch", desirable: float = 1.0, undesirable: float = 1.0) -> Loss:
    """Kahneman-Tversky optimisation on pairs (Ethayarajh et al. 2024, arXiv 2402.01306; TRL 0.8's kto_pair).

    desirable (1 - sigmoid(beta (R_w - z_l))) + undesirable (1 - sigmoid(beta (z_w - R_l))), z the mean of the other
    side's R, at least 0: over the global batch and without gradient (`batch`), over the micro-batch with gradient and
    the whole halved, as TRL does (`micro`: depends on how the batch is split), or 0. SimPO's table prints the second
    term with the wrong sign. One reference pass; each batch runs forward twice.
    """
    chosen_P, rejected_P = ratio_S[0::2], ratio_S[1::2]
    if kl == "batch":
        reference_w, reference_l = batch.means["chosen"].clamp(min=0), batch.means["rejected"].clamp(min=0)
    elif kl == "micro":
        reference_w, reference_l = chosen_P.mean().clamp(min=0), rejected_P.mean().clamp(min=0)
    else:
        reference_w = reference_l = torch.zeros_like(chosen_P[:1])
    loss_P = (desirable * torch.sigmoid(-config.beta * (chosen_P - reference_l))
              + undesirable * torch.sigmoid(-config.beta * (reference_w - rejected_P)))
    return loss_P / 2 if kl == "micro" else loss_P, {}


kto_pair.statistics = lambda ratio_S, logps_N, batch: {"chosen": ratio_S[0::2], "rejected": ratio_S[1::2]}
kto_pair.settings = {"": {"beta": 0.1}}


def simpo(ratio_S: torch.Tensor, logps_N: torch.Tensor, batch, config, *, gamma_ratio: float = 0.25,
          form: Literal["sigmoid", "hinge"] = "sigmoid", nll: float = 0.0, label_smoothing: float = 0.0,
          length_by: LengthBy = "tokens") -> Loss:
    """Simple preference optimisation (Meng et al. 2024, arXiv 2405.14734).

    -log sigmoid(beta (S_w / n_w - S_l / n_l - gamma_ratio)), gamma_ratio being the paper's gamma / beta, with
    label_smoothing; `hinge`: relu(1 - the same), without. Plus nll times -S_w / n_w. No reference.
    """
    refuse_unread(form == "hinge" and label_smoothing != 0, "label_smoothing", "form=hinge takes labels as they are")
    chosen_P, rejected_P = pair_averages(ratio_S, batch, length_by)
    margin_P = config.beta * (chosen_P - rejected_P - gamma_ratio)
    loss_P = torch.relu(1 - margin_P) if form == "hinge" else smoothed(margin_P, label_smoothing)
    return loss_P - nll * chosen_P, average_metrics(chosen_P, rejected_P)


simpo.needs = ()
simpo.settings = {  # the same README
    "": {"beta": 2.0},
    "tuned": {"beta": 2.5, "lr": 1e-6, "batch_size": 128, "loss_options": "gamma_ratio=0.55"},
    "tuned-base": {"beta": 2.0, "lr": 6e-7, "batch_size": 128, "loss_options": "gamma_ratio=0.5"},
    "tuned-v0.2": {"beta": 10.0, "lr": 1e-6, "batch_size": 128, "loss_options": "gamma_ratio=0.3"},
}


def rdpo(ratio_S: torch.Tensor, logps_N: torch.Tensor, batch, config, *, alpha: float = 0.1,
         length_by: LengthBy = "tokens") -> Loss:
    """Length-regularised DPO (Park et al. 2024, arXiv 2403.19159).

    -log sigmoid(beta (R_w - R_l) + alpha (n_w - n_l)): longer chosen answers need less margin. One reference pass.
    """
    chosen_P, rejected_P = answer_lengths(batch, length_by)
    margin_P = config.beta * (ratio_S[0::2] - ratio_S[1::2]) + alpha * (chosen_P - rejected_P)
    return -F.logsigmoid(margin_P), {}


rdpo.settings = {"": {"beta": 0.1}}


def cpo(ratio_S: torch.Tensor, logps_N: torch.Tensor, batch, config, *, nll: float = 1.0,
        nll_over: Literal["sequence", "token", "batch"] = "sequence", label_smoothing: float = 0.0,
        length_by: LengthBy = "tokens") -> Loss:
    """Contrastive preference optimisation (Xu et al. 2024, arXiv 2401.08417).

    -log sigmoid(beta (S_w - S_l)) + nll times the negative log-likelihood of the chosen answer: its sum (`sequence`:
    the paper), its mean over the answer's tokens (`token`), or over all chosen tokens of the global batch (`batch`:
    TRL, there of a micro-batch). No reference.
    """
    refuse_unread(nll_over != "token" and length_by == "mass", "length_by=mass", "nll_over=token alone divides")
    likelihood_P = chosen_P = ratio_S[0::2]
    if nll_over == "token":
        likelihood_P = chosen_P / pair_lengths(batch, length_by)[0]
    elif nll_over == "batch":
        sum_P = chosen_P * batch.seq_lens_S[0::2].to(chosen_P, non_blocking=True) if batch.averaged else chosen_P
        likelihood_P = sum_P * batch.pair_count / batch.chosen_tokens
    margin_P = config.beta * (chosen_P - ratio_S[1::2])
    return smoothed(margin_P, label_smoothing) - nll * likelihood_P, {}


cpo.needs = ()
cpo.settings = {"": {"beta": 0.1}}


def orpo(ratio_S: torch.Tensor, logps_N: torch.Tensor, batch, config, *, length_by: LengthBy = "tokens") -> Loss:
    """Odds-ratio preference optimisation (Hong et al. 2024, arXiv 2403.07691).

    -log p_w - beta log sigmoid(log odds_w - log odds_l), log p = S / n, odds = p / (1 - p), beta being the paper's
    lambda. The likelihood is of the answer alone (the official code adds the prompt's by default). No reference.
    """
    chosen_P, rejected_P = (average_P.clamp(max=MOST_AVERAGE) for average_P in pair_averages(ratio_S, batch, length_by))
    log_odds_P = (chosen_P - log_one_minus_exp(chosen_P)) - (rejected_P - log_one_minus_exp(rejected_P))
    return -chosen_P - config.beta * F.logsigmoid(log_odds_P), average_metrics(chosen_P, rejected_P)


orpo.needs = ()
orpo.settings = {"": {"beta": 0.1}}


def slic_hf(ratio_S: torch.Tensor, logps_N: torch.Tensor, batch, config, *, delta: float = 1.0,
            nll: float = 0.1) -> Loss:
    """Sequence likelihood calibration (Zhao et al. 2023, arXiv 2305.10425).

    max(0, delta - S_w + S_l) - nll S_w; beta scales the logged rewards alone. No reference (with one, and without the
    last term, it is `hinge`).
    """
    chosen_P, rejected_P = ratio_S[0::2], ratio_S[1::2]
    return torch.relu(delta - chosen_P + rejected_P) - nll * chosen_P, {}


slic_hf.needs = ()
slic_hf.settings = {"": {"beta": 0.1}}


def rrhf(ratio_S: torch.Tensor, logps_N: torch.Tensor, batch, config, *, nll: float = 1.0,
         length_by: LengthBy = "tokens") -> Loss:
    """Rank responses to align human feedback (Yuan et al. 2023, arXiv 2304.05302).

    max(0, S_l / n_l - S_w / n_w) - nll S_w; beta scales the logged rewards alone. (The authors' code divides by the
    padded length.) No reference.
    """
    chosen_P, rejected_P = pair_averages(ratio_S, batch, length_by)
    return torch.relu(rejected_P - chosen_P) - nll * ratio_S[0::2], average_metrics(chosen_P, rejected_P)


rrhf.needs = ()
rrhf.settings = {"": {"beta": 0.1}}


def sigmoid_norm(ratio_S: torch.Tensor, logps_N: torch.Tensor, batch, config, *, label_smoothing: float = 0.0,
                 length_by: LengthBy = "tokens") -> Loss:
    """DPO on log-ratios a token (TRL's sigmoid_norm; paper Eq. 15 with uniform weights).

    -log sigmoid(beta (R_w / n_w - R_l / n_l)). One reference pass.
    """
    chosen_P, rejected_P = pair_averages(ratio_S, batch, length_by)
    return smoothed(config.beta * (chosen_P - rejected_P), label_smoothing), {}


sigmoid_norm.settings = {"": {"beta": 2.0}}


def hinge(ratio_S: torch.Tensor, logps_N: torch.Tensor, batch, config) -> Loss:
    """Hinge loss with a reference (RSO's hinge-norm, Liu et al. 2023, arXiv 2309.06657).

    relu(1 - beta (R_w - R_l)). One reference pass.
    """
    return torch.relu(1 - config.beta * (ratio_S[0::2] - ratio_S[1::2])), {}


hinge.settings = {"": {"beta": 0.1}}


def robust(ratio_S: torch.Tensor, logps_N: torch.Tensor, batch, config, *, label_smoothing: float = 0.0) -> Loss:
    """DPO that is unbiased under flipped labels (Ray Chowdhury et al. 2024, arXiv 2403.00409).

    (-(1 - e) log sigmoid(m) + e log sigmoid(-m)) / (1 - 2 e), m = beta (R_w - R_l), e = label_smoothing, here
    0.1 by default. One reference pass.
    """
    return smoothed(config.beta * (ratio_S[0::2] - ratio_S[1::2]), label_smoothing, unbiased=True), {}


robust.settings = {"": {"beta": 0.1, "loss_options": "label_smoothing=0.1"}}


def exo_pair(ratio_S: torch.Tensor, logps_N: torch.Tensor, batch, config, *, epsilon: float = 1e-3) -> Loss:
    """Efficient exact optimisation on pairs (Ji et al. 2024, arXiv 2402.00856 Eq. 16).

    The reverse KL of (sigmoid(m), sigmoid(-m)) from the labels (1 - epsilon, epsilon), m = beta (R_w - R_l). One
    reference pass.
    """
    margin_P = config.beta * (ratio_S[0::2] - ratio_S[1::2])
    return (torch.sigmoid(margin_P) * (F.logsigmoid(margin_P) - math.log1p(-epsilon))
            + torch.sigmoid(-margin_P) * (F.logsigmoid(-margin_P) - math.log(epsilon))), {}


exo_pair.settings = {"": {"beta": 0.1}}


def nca_pair(ratio_S: torch.Tensor, logps_N: torch.Tensor, batch, config) -> Loss:
    """Noise contrastive alignment on pairs (Chen et al. 2024, arXiv 2402.05369).

    -log sigmoid(beta R_w) - log sigmoid(-beta R_w) / 2 - log sigmoid(-beta R_l) / 2. One reference pass.
    """
    chosen_P, rejected_P = config.beta * ratio_S[0::2], config.beta * ratio_S[1::2]
    return -F.logsigmoid(chosen_P) - 0.5 * F.logsigmoid(-chosen_P) - 0.5 * F.logsigmoid(-rejected_P), {}


nca_pair.settings = {"": {"beta": 0.1}}


def bco_pair(ratio_S: torch.Tensor, logps_N: torch.Tensor, batch, config) -> Loss:
    """Binary classifier optimisation on pairs (Jung et al. 2024, arXiv 2404.04656; without its running mean, as TRL).

    -log sigmoid(beta R_w) - log sigmoid(-beta R_l). One reference pass.
    """
    return -F.logsigmoid(config.beta * ratio_S[0::2]) - F.logsigmoid(-config.beta * ratio_S[1::2]), {}


bco_pair.settings = {"": {"beta": 0.1}}


def sppo_hard(ratio_S: torch.Tensor, logps_N: torch.Tensor, batch, config) -> Loss:
    """Self-play preference optimisation with hard labels (Wu et al. 2024, arXiv 2405.00675).

    (R_w - 1 / (2 beta))^2 + (R_l + 1 / (2 beta))^2. One reference pass.
    """
    target = 1 / (2 * config.beta)
    return (ratio_S[0::2] - target) ** 2 + (ratio_S[1::2] + target) ** 2, {}


sppo_hard.settings = {"": {"beta": 0.1}}


def apo_zero(ratio_S: torch.Tensor, logps_N: torch.Tensor, batch, config) -> Loss:
    """Anchored preference optimisation, chosen up, rejected down (D'Oosterlinck et al. 2024, arXiv 2408.06266 Eq. 7).

    1 - sigmoid(beta R_w) + sigmoid(beta R_l). One reference pass.
    """
    return torch.sigmoid(-config.beta * ratio_S[0::2]) + torch.sigmoid(config.beta * ratio_S[1::2]), {}


apo_zero.settings = {"": {"beta": 0.1}}


def apo_down(ratio_S: torch.Tensor, logps_N: torch.Tensor, batch, config) -> Loss:
    """Anchored preference optimisation, both down, rejected more (D'Oosterlinck et al. 2024, arXiv 2408.06266 Eq. 8).

    sigmoid(beta R_w) + 1 - sigmoid(beta (R_w - R_l)). One reference pass.
    """
    chosen_P, rejected_P = ratio_S[0::2], ratio_S[1::2]
    return torch.sigmoid(config.beta * chosen_P) + torch.sigmoid(config.beta * (rejected_P - chosen_P)), {}


apo_down.settings = {"": {"beta": 0.1}}


def discopop(ratio_S: torch.Tensor, logps_N: torch.Tensor, batch, config, *, tau: float = 0.05) -> Loss:
    """The loss that a language model found (Lu et al. 2024, arXiv 2406.08414 Eq. 5).

    (1 - g) times the logistic loss of m plus g exp(-m), m = beta (R_w - R_l), g = sigmoid(m / tau). It rises with m
    around 0, so that training first lowers the margin there. One reference pass.
    """
    margin_P = config.beta * (ratio_S[0::2] - ratio_S[1::2])
    # g exp(-m) as one exponential: apart, they are 0 times infinity at large negative margins.
    return (-F.logsigmoid(margin_P) * torch.sigmoid(-margin_P / tau)
            + torch.exp(F.logsigmoid(margin_P / tau) - margin_P)), {}


discopop.settings = {"": {"beta": 0.05}}


def sft(ratio_S: torch.Tensor, logps_N: torch.Tensor, batch, config, *,
        over: Literal["token", "sequence"] = "token", length_by: LengthBy = "tokens") -> Loss:
    """Next-token training on chosen answers, a term for sums of losses (dpo+0.2*sft).

    -S_w / n_w, or -S_w; beta scales the logged rewards alone. No reference.
    """
    refuse_unread(over == "sequence" and length_by == "mass", "length_by=mass", "over=sequence divides by no length")
    refuse_unread(over == "sequence" and batch.averaged, "over=sequence", "the weights make means already")
    chosen_P = ratio_S[0::2]
    return -(chosen_P / pair_lengths(batch, length_by)[0] if over == "token" else chosen_P), {}


sft.needs = ()

LOSSES = {
    "twdpo": twdpo, "dpo": dpo, "ipo": ipo, "kto_pair": kto_pair, "simpo": simpo, "rdpo": rdpo, "cpo": cpo,
    "orpo": orpo, "slic_hf": slic_hf, "rrhf": rrhf, "sigmoid_norm": sigmoid_norm, "hinge": hinge, "robust": robust,
    "exo_pair": exo_pair, "nca_pair": nca_pair, "bco_pair": bco_pair, "sppo_hard": sppo_hard, "apo_zero": apo_zero,
    "apo_down": apo_down, "discopop": discopop, "sft": sft, **VOCABULARY_LOSSES,
}
