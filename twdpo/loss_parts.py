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


def pair_lengths(batch, length_by: LengthBy) -> tuple[torch.Tensor, torch.Tensor]:
    """n of both sides [P], fp32; 1 where the weights make ratios means already (--length-normalize, selected_mean)."""
    if batch.averaged:
        refuse_unread(length_by == "mass", "length_by=mass", "the weights make means of the ratios already")
        return torch.ones_like(batch.scale_S[0::2]), torch.ones_like(batch.scale_S[1::2])
    return answer_lengths(batch, length_by)


def refuse_unread(is_set: bool, option: str, why: str) -> None:
    """Raise ValueError for an option that is set where nothing reads it."""
    if is_set:
        raise ValueError(f"{option} is not read: {why}")


def answer_lengths(batch, length_by: LengthBy) -> tuple[torch.Tensor, torch.Tensor]:
    """n of both sides [P], fp32, whatever the weights make of ratios."""
    if length_by == "mass":
        length_S = batch.scale_S * segment_sum(batch.weights_N, batch.seq_lens_S)
    else:
        length_S = batch.seq_lens_S.to(batch.scale_S, non_blocking=True)
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


def loss_needs(loss) -> tuple[str, ...]:
    """What a loss needs beside the policy's log-probs."""
    return stated(loss, "needs", ("ref",))
