"""TI-DPO's token weights: input gradients of the policy, mixed with a Gaussian prior over positions.

Legend: N response tokens, T tokens that importance is shared over.
"""

from typing import Literal

import torch

from twdpo.flags import InputError


def tidpo(batch, context, *, lam: float = 0.7, sigma_div: float = 4.0, prior: Literal["peak", "sum1"] = "peak",
          scope: Literal["response", "all"] = "response") -> torch.Tensor:
    """Token importance (TI-DPO, Yang et al. 2025, arXiv 2505.19653): input gradients and a Gaussian prior, mixed.

    W = lam I / sum I + (1 - lam) P: I_t is the L1 norm of d target / d embedding of token t, P(t) = exp(-z^2 / 2) with
    z = (t - (T - 1) / 2) / sigma, sigma = T / sigma_div. Needs a forward and a backward pass of the policy before each
    of its forwards: two thirds more operations a step, and the anchors of its loss come on top. Where the paper and its
    released code (of which `lam=0.2,sigma_div=8,prior=sum1,scope=all` gives these weights) differ:
    1. lam is 0.7 and sigma T / 4 in the paper, 0.2 and T / 8 in the code: `lam`, `sigma_div`. (beta, gamma: the loss.)
    2. The paper's prior, of peak 1 beside gradients of sum 1, outweighs them by O(T): prior=peak. The code gives it sum
       1 and a sigma of at least 1, and the mix mean 1: prior=sum1.
    3. The loss is weighted DPO in the paper, TDPO2 in the code: an option of the loss.
    4. The code spreads importance over prompt and response (T = |x| + |y|) and uses the response's part, whose mean
       depends on the prompt's length: scope=all. scope=response: T = |y|, and t counts from its first token.
    5. The target is the largest logit after the sequence's last token, end of the turn included, of the policy as it
       is in each step; nothing has a gradient through the weights: in both.
    6. What the anchor is an answer to, and how long it is: the loss's.
    7. An answer of one token has weight 1 (the paper's formula); the code gives it 0. Where attribution fails the code
       takes ones, here it is an error. Gradients that are all 0 are shared out evenly.
    8. A token's weight is the importance of its own embedding, and multiplies its own log-ratio: in both.
    """
    if not 0 <= lam <= 1:
        raise InputError(f"--weights-options lam={lam}: the share of the gradients must be in [0, 1]")
    if not sigma_div > 0:
        raise InputError(f"--weights-options sigma_div={sigma_div}: it must be above 0")
    weights = []
    for gradient_X, num in zip(batch.input_gradients, batch.seq_lens_S.tolist()):
        gradient_T = gradient_X if scope == "all" else gradient_X[-num:]
        weights.append(hybrid_importance(gradient_T, lam, sigma_div, prior == "sum1")[-num:])
    return torch.cat(weights)


tidpo.norm = "none"
tidpo.needs = ("input_gradient",)


def hybrid_importance(gradient_T: torch.Tensor, lam: float, sigma_div: float, has_mean_1: bool) -> torch.Tensor:
    """lam times gradients of sum 1 plus 1 - lam times the prior, [T]. has_mean_1: the prior has sum 1 too, and the mix
    mean 1."""
    num = len(gradient_T)
    sigma = max(1.0, num / sigma_div) if has_mean_1 else num / sigma_div
    place_T = torch.arange(num, device=gradient_T.device, dtype=torch.float32) - (num - 1) / 2
    prior_T = torch.exp(-0.5 * (place_T / sigma).square())
    total = gradient_T.sum()
    share_T = torch.where(total == 0, 1 / num, gradient_T / total)  # not finite: the weights say so
    if not has_mean_1:
        return lam * share_T + (1 - lam) * prior_T
    return num * (lam * share_T + (1 - lam) * prior_T / prior_T.sum())
