"""What pair losses are made of: lengths and averages of answers, the logistic loss with flipped labels; needs.

Legend: S sequences (2i chosen, 2i+1 rejected), P pairs, N response tokens.
"""

from typing import Literal

import torch
import torch.nn.functional as F

from twdpo.logratio import segment_sum
from twdpo.plugins import stated

LengthBy = Literal["tokens", "mass"]
Loss = tuple[torch.Tensor, dict[str, torch.Tensor]]
MOST_EXPONENT = 80.0  # exp of more is not finite in fp32


def pair_lengths(batch, length_by: LengthBy) -> tuple[torch.Tensor, torch.Tensor]:
    """What makes means of ratios of both sides [P], fp32: n, or n / |y| where they are means over |y| tokens already
    (--length-normalize, selected_mean)."""
    chosen_P, rejected_P = answer_lengths(batch, length_by)
    if not batch.averaged:
        return chosen_P, rejected_P
    lens_S = batch.seq_lens_S.to(chosen_P, non_blocking=True)
    return chosen_P / lens_S[0::2], rejected_P / lens_S[1::2]


def refuse_unread(is_set: bool, option: str, why: str) -> None:
    """Raise ValueError for an option that is set where nothing reads it."""
    if is_set:
        raise ValueError(f"{option} is not read: {why}")


def answer_lengths(batch, length_by: LengthBy) -> tuple[torch.Tensor, torch.Tensor]:
    """n of both sides [P], fp32, whatever the weights make of ratios."""
    length_S = batch.seq_lens_S.to(batch.scale_S, non_blocking=True)
    if length_by == "mass":
        mass_S = batch.scale_S * segment_sum(batch.weights_N, batch.seq_lens_S)
        length_S = mass_S * length_S if batch.averaged else mass_S
    return length_S[0::2].clamp(min=1e-6), length_S[1::2].clamp(min=1e-6)


def pair_averages(ratio_S: torch.Tensor, batch, length_by: LengthBy) -> tuple[torch.Tensor, torch.Tensor]:
    """R / n of both sides [P]; without a reference the mean log-prob of a token."""
    chosen_P, rejected_P = pair_lengths(batch, length_by)
    return ratio_S[0::2] / chosen_P, ratio_S[1::2] / rejected_P


def average_metrics(chosen_P: torch.Tensor, rejected_P: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a loss on averages is right about; rewards are sums."""
    return {"average_margin": (chosen_P - rejected_P).detach(),
            "average_accuracy": (chosen_P - rejected_P).detach().sign().add(1).div(2)}


def smoothed(margin_P: torch.Tensor, label_smoothing: float, unbiased: bool = False) -> torch.Tensor:
    """-log sigmoid of a margin whose label is flipped with probability `label_smoothing`; unbiased: of one that was,
    such that the mean over flips is the loss without them. Raises ValueError outside [0, 0.5)."""
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing is {label_smoothing}: it must be in [0, 0.5)")
    kept, flipped = (1 - label_smoothing) * F.logsigmoid(margin_P), label_smoothing * F.logsigmoid(-margin_P)
    return (flipped - kept) / (1 - 2 * label_smoothing) if unbiased else -kept - flipped


def answer_nll(logps_N: torch.Tensor, batch) -> torch.Tensor:
    """Negative log-likelihood of the chosen answers under the policy, nats a token, [P]; no weights, no reference."""
    lens_S = batch.seq_lens_S.to(logps_N, non_blocking=True)
    return -(segment_sum(logps_N, batch.seq_lens_S) / lens_S.clamp(min=1))[0::2]


def f_reward(ratio_X: torch.Tensor, f: str, alpha: float) -> torch.Tensor:
    """f'(u) of an f-divergence at u = exp(log-ratio), up to a constant (f-DPO, arXiv 2309.16240 Table 1)."""
    if f == "reverse_kl":
        return ratio_X
    if f == "js":
        return ratio_X - F.softplus(ratio_X)
    alpha = 1.0 if f == "forward_kl" else alpha
    if not alpha > 0:
        raise ValueError(f"alpha is {alpha}: it must be > 0 (f=reverse_kl is the limit at 0)")
    return -torch.exp((-alpha * ratio_X).clamp(max=MOST_EXPONENT)) / alpha


def position_margins(logps_N: torch.Tensor, batch) -> list[torch.Tensor]:
    """Of each pair, the weighted log-ratio of the chosen answer's token less that of the rejected one's at the same
    position, [T] of the longer answer; what the shorter one lacks counts 0."""
    lens = batch.seq_lens_S.tolist()
    lens_S = batch.seq_lens_S.to(batch.scale_S.device, non_blocking=True)
    scale_N = torch.repeat_interleave(batch.scale_S, lens_S, output_size=sum(lens))
    parts = (scale_N * batch.weights_N * (logps_N - batch.ref_logps_N)).split(lens)
    sides = (torch.nn.utils.rnn.pad_sequence(pair, batch_first=True) for pair in zip(parts[0::2], parts[1::2]))
    return [chosen_T - rejected_T for chosen_T, rejected_T in sides]


def loss_needs(loss) -> tuple[str, ...]:
    """What a loss needs beside the policy's log-probs."""
    return stated(loss, "needs", ("ref",))
