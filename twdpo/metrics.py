"""Metrics of a training step and of an evaluation. Rewards are beta times summed log-ratios.

reward_* are unweighted sums (as TRL's rewards/accuracies and rewards/margins of DPO; losses on averages report those
as average_*); weighted_reward_* use the token weights. A tie counts one half in an accuracy; a margin within fp32
rounding of the log-probs it comes from is one, so that an untrained policy scores 0.5 and not the sign of rounding
errors.
"""

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist

from twdpo.batch import PairBatch
from twdpo.logratio import combine, segment_sum
from twdpo.losses import LOSSES

# A line for each name that a run logs, beside `step`: what it is. Pages show it; a fork's own metric may have none.
MEANINGS = {
    "loss": "what is optimised, a mean over pairs (times the weights of the data, where there are any)",
    "reward_accuracy": "share of pairs whose chosen answer has the larger reward; a tie counts one half",
    "reward_margin": "reward of the chosen answer less that of the rejected one",
    "reward_chosen": "beta times the sum of the chosen answer's log-ratios to the reference, all tokens alike (of its "
                     "log-probs where the loss has no reference)",
    "reward_rejected": "the same of the rejected answer",
    "weighted_reward_accuracy": "as reward_accuracy, with the token weights: the order that the loss sees",
    "weighted_reward_margin": "as reward_margin, with the token weights",
    "weighted_reward_chosen": "as reward_chosen, with the token weights",
    "weighted_reward_rejected": "as reward_rejected, with the token weights",
    "kl": "estimate of KL(reference || policy), nats a response token: how far the policy has moved on these answers",
    "grad_norm": "length of the gradient before it is clipped",
    "lr": "learning rate of the step",
    "pairs": "held-out pairs that the figures are means of",
    # With --token-stats.
    "token_entropy": "entropy of the policy's next-token distribution, nats, mean over response tokens",
    "token_top1": "share of response tokens that are the policy's likeliest there",
    # Of some losses.
    "average_margin": "mean log-ratio a token of the chosen answer less that of the rejected one",
    "average_accuracy": "share of pairs in which the chosen answer has the larger mean log-ratio a token",
    "kl_chosen": "sum over the chosen answer's tokens of the KL divergence that the loss takes, nats",
    "kl_rejected": "the same of the rejected answer",
    "omega": "weight of a pair in the loss: how likely the policy is to write its answers itself, 1 at most",
    "triplet": "the triplet term: the policy's own answer nearer to the chosen answer than to the rejected one",
    # Of the toy, where it is known which words decide.
    "reward_accuracy_tone": "reward_accuracy of the pairs that a polite or rude word decides",
    "reward_accuracy_topic": "reward_accuracy of the pairs that naming the prompt's topic decides",
    "filler_drift": "how far the words that decide nothing have moved, mean |log-ratio|, nats a token",
    "planted_lift": "weight on the words that decide, over what uniform weights give them",
    # What a step costs.
    "tokens_per_s": "tokens a second, prompts too, all processes together",
    "pairs_per_s": "pairs a second, all processes together",
    "peak_memory_gib": "most memory of one process so far, GiB (of its GPU, where it has one)",
    "peak_reserved_gib": "most memory that one process has taken from its GPU so far, gaps included, GiB",
    "data_share": "share of the step's time spent on making batches",
    "forward_share": "share of the step's time spent in forward passes",
    "backward_share": "share of the step's time spent in backward passes",
    "optimizer_share": "share of the step's time spent in the optimiser",
    "tflops": "10^12 operations a second that the model needs, a process",
    "mfu": "tflops over the device's peak",
}

ROUNDING = 1e-6  # relative: some eight times fp32's

Totals = dict[str, torch.Tensor]  # name -> fp64 [4]: sum, sum of squares, count, largest absolute value
Figures = dict[str, list[float]]  # the same on the host


def meaning(name: str) -> str:
    """The line of MEANINGS, of a held-out figure (eval/NAME) too; "" of a name that has none. In a sum of losses
    loss_LOSS is one of them, and NAME_LOSS what two of them call NAME."""
    name = name.removeprefix("eval/")
    if name in MEANINGS:
        return MEANINGS[name]
    for known, what in MEANINGS.items():
        loss = name.removeprefix(f"{known}_")
        if loss != name and loss in LOSSES:
            return f"the loss {loss} alone, a term of the sum" if known == "loss" else f"{what} (of {loss})"
    return ""


def pair_metrics(loss_P, extra: dict[str, torch.Tensor], ratio_S, logps_N, batch: PairBatch, beta: float,
                 has_reference: bool = True) -> dict[str, torch.Tensor]:
    """One value a pair of every metric, without gradient. P pairs, S sequences, N response tokens."""
    logps_N, ratio_S = logps_N.detach(), ratio_S.detach()
    weighted = batch.weights_N, batch.seq_lens_S, batch.scale_S
    unweighted = torch.ones_like(batch.weights_N), batch.seq_lens_S, torch.ones_like(batch.scale_S)
    metrics = {"loss": loss_P.detach()}
    for name, ratio, weights in (("reward", combine(logps_N, batch.ref_logps_N, *unweighted), unweighted),
                                 ("weighted_reward", ratio_S, weighted)):
        size_S = combine(logps_N.abs(), torch.zeros_like(logps_N), *weights)
        difference_P = ratio[0::2] - ratio[1::2]
        tie_P = difference_P.abs() <= ROUNDING * (size_S[0::2] + size_S[1::2])
        metrics[f"{name}_accuracy"] = torch.where(tie_P, 0.0, difference_P.sign()).add(1).div(2)
        metrics[f"{name}_margin"] = beta * difference_P
        metrics |= {f"{name}_chosen": beta * ratio[0::2], f"{name}_rejected": beta * ratio[1::2]}
    if has_reference:
        metrics["kl"] = kl_estimate(logps_N, batch)
    return metrics | {name: value.detach() for name, value in extra.items()}


def kl_estimate(logps_N: torch.Tensor, batch: PairBatch) -> torch.Tensor:
    """KL(reference || policy) in nats a response token, [P]: the mean of exp(d) - 1 - d, d the log-ratio (Schulman's
    k3). Unbiased where the reference wrote the responses, and never negative; a measure of drift elsewhere."""
    ratio_N = logps_N - batch.ref_logps_N
    tokens_P = batch.seq_lens_S.to(logps_N.device, non_blocking=True).view(-1, 2).sum(dim=1)
    return segment_sum(ratio_N.expm1() - ratio_N, batch.seq_lens_S).view(-1, 2).sum(dim=1) / tokens_P


def token_metrics(batch: PairBatch, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """Means of these terms of the op over the response tokens of each pair: `token_entropy` (nats), `token_top1` (how
    often the token is the policy's likeliest)."""
    metrics = {}
    for name in names:
        value_N = batch.terms[name].detach().to(batch.weights_N.dtype)
        tokens_P = batch.seq_lens_S.to(value_N.device, non_blocking=True).view(-1, 2).sum(dim=1)
        metrics[f"token_{name}"] = segment_sum(value_N, batch.seq_lens_S).view(-1, 2).sum(dim=1) / tokens_P
    return metrics


def add_totals(totals: Totals, metrics: dict[str, torch.Tensor], coefficient_P: torch.Tensor) -> None:
    """Add a micro-batch to running totals; pairs of coefficient 0 don't count."""
    real = coefficient_P > 0
    for name, value_P in metrics.items():
        value_P = torch.where(real, value_P.double(), 0.0)
        total = torch.stack([value_P.sum(), (value_P ** 2).sum(), real.sum().double(), value_P.abs().max()])
        if name in totals:
            total = torch.cat([(totals[name] + total)[:3], torch.maximum(totals[name], total)[3:]])
        totals[name] = total


def sum_over_processes(totals: Totals, device: torch.device) -> Totals:
    """Totals over all processes. All ranks."""
    names = sorted(totals)
    stacked = torch.stack([totals[name] for name in names]).to(device)
    sums, peaks = stacked[:, :3].contiguous(), stacked[:, 3:].contiguous()
    dist.all_reduce(sums)
    dist.all_reduce(peaks, dist.ReduceOp.MAX)
    return dict(zip(names, torch.cat([sums, peaks], dim=1)))


def to_host(totals: Totals) -> Figures:
    """All totals in one host-device sync."""
    return dict(zip(totals, torch.stack(list(totals.values())).tolist()))


def means(figures: Figures) -> dict[str, float]:
    """Mean of each metric over the counted pairs, without those that no pair has."""
    return {name: total / count for name, (total, _, count, _) in figures.items() if count > 0}


def standard_errors(figures: Figures) -> dict[str, float]:
    """Standard error of each mean; left out for fewer than two pairs."""
    errors = {}
    for name, (value_sum, square_sum, count, _) in figures.items():
        if count > 1:
            variance = max(square_sum - value_sum ** 2 / count, 0.0) / (count - 1)
            errors[name] = math.sqrt(variance / count)
    return errors


def largest(figures: Figures) -> dict[str, float]:
    """Largest absolute value of each metric."""
    return {name: peak for name, (*_, peak) in figures.items()}


def describe_first_margin(figures: Figures, dtype: str) -> str:
    """Before the first update policy and reference are one model: their largest margin, a warning if it is not 0."""
    margin = max(largest(figures)[name] for name in ("reward_margin", "weighted_reward_margin"))
    text = f"max |margin| at step 0: {margin:.3g}"
    limit = 1e-4 if dtype == "float32" else 1e-2
    if margin <= limit:
        return text
    return (f"warning: {text}, above {limit}: the reference log-probs are not those of the policy that starts; delete "
            "the reference cache")
