"""Unbalanced optimal transport between the tokens of two answers: which share of the plan's mass each token has.

The plan is the G >= 0 that makes <G, M> + reg sum G (log G - 1) + reg_m (KL(G 1 | 1) + KL(G^T 1 | 1)) least, M being
what it costs to move one token to another. It is u K v with K = exp(-M / reg), and of its potentials

    log u = -f log(K v),    log v = -f log(K^T u),    f = reg_m / (reg_m + reg).

A number added to all of log u or log v changes no share, so sums are taken as means. But for such a number each line is
a contraction by f: the number of iterations is known beforehand, and nothing waits for the device. M is at most 1, so
that K needs no logarithm. All of it is in fp64: beside a decoder it is little, and sums in fp32 would be off by 1e-6.

Legend: P pairs of a group, A tokens of its longest chosen and B of its longest rejected answer, N response tokens, D
hidden size.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from twdpo.dist import send
from twdpo.flags import InputError

Cost = Literal["euclidean", "cosine"]
CostScale = Literal["block_max", "padded_max"]
LEAST_REG = 0.02  # K is at least exp(-1 / reg)
MOST_ITERATIONS = 500
GROUP_BYTES = 2**28  # that the pairs of a group may take at once; a pair that takes more is a group of its own
OFFSET = 1e-6  # on every cost, as in the authors' code: weights don't change by it, but the scale is theirs


def count_iterations(reg: float, reg_m: float, dtype: torch.dtype = torch.float32) -> int:
    """Steps (u, v) after which no weight is off by more than dtype's rounding, relatively.

    The largest less the smallest error of log v is at first at most f / reg, as M is at most 1; a step multiplies it by
    f^2, and a weight's is at most 2 / f times the last one. Raises InputError for settings out of reach.
    """
    given = f"--weights-options reg={reg:g},reg_m={reg_m:g}"
    if reg < LEAST_REG or reg_m <= 0:
        raise InputError(f"{given}: reg must be at least {LEAST_REG}, reg_m more than 0")
    count = math.log(2 / reg / torch.finfo(dtype).eps) / (2 * math.log1p(reg / reg_m))
    if count > MOST_ITERATIONS:
        raise InputError(f"{given}: {count:,.4g} iterations, more than {MOST_ITERATIONS}; reg_m / reg must be less")
    return max(1, math.ceil(count))


def transport_shares(hidden_ND: torch.Tensor, lengths: list[int], *, reg: float, reg_m: float, cost: Cost = "euclidean",
                     cost_scale: CostScale = "block_max") -> torch.Tensor:
    """Each token's share of the mass of its pair's plan: 1 an answer, [N], fp32 (fp64 for fp64), without gradient.

    hidden_ND: of chosen and rejected answers in turn, `lengths` tokens each. cost_scale: costs are divided by their
    largest where that is more than 1: the largest between two tokens of the pair (`block_max`), or that and the longest
    hidden state (`padded_max`: the authors' code, where padded rows are 0 and count).
    """
    states = hidden_ND.detach().split(lengths)
    dtype = torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32
    steps = count_iterations(reg, reg_m, dtype)
    shares = {}
    for pairs in group_pairs(lengths, hidden_ND.shape[1]):
        sides = [[2 * pair + side for pair in pairs] for side in (0, 1)]
        chosen_PAD, rejected_PBD = (pad_sequence([states[place] for place in side], batch_first=True).double()
                                    for side in sides)
        valid_PA, valid_PB = (valid_tokens([lengths[place] for place in side], hidden_ND.device) for side in sides)
        costs_PAB = pair_costs(chosen_PAD, rejected_PBD, valid_PA[:, :, None] & valid_PB[:, None, :], cost, cost_scale)
        masses = plan_masses(costs_PAB, valid_PA, valid_PB, reg, reg_m, steps)
        for side, mass in zip(sides, masses):
            for place, share in zip(side, mass.softmax(dim=1)):
                shares[place] = share[:lengths[place]]
    return torch.cat([shares[place] for place in range(len(lengths))]).to(dtype)


def group_pairs(lengths: list[int], size: int) -> list[list[int]]:
    """Pairs that go through the transport together, the largest first, by GROUP_BYTES."""
    sizes = [(max(pair), min(pair), place) for place, pair in enumerate(zip(lengths[0::2], lengths[1::2]))]
    groups: list[list[int]] = []
    for *_, place in sorted(sizes, reverse=True):
        for group in groups[-1:]:
            longest = [max(lengths[2 * pair + side] for pair in (*group, place)) for side in (0, 1)]
            if 8 * (len(group) + 1) * (4 * math.prod(longest) + 2 * size * sum(longest)) <= GROUP_BYTES:
                group.append(place)
                break
        else:
            groups.append([place])
    return groups


def valid_tokens(lengths: list[int], device: torch.device) -> torch.Tensor:
    """Which places of the padded answers are tokens, bool [P, A]."""
    return torch.arange(max(lengths), device=device) < send(torch.tensor(lengths), device)[:, None]


def pair_costs(chosen_PAD: torch.Tensor, rejected_PBD: torch.Tensor, valid_PAB: torch.Tensor, cost: Cost,
               cost_scale: CostScale) -> torch.Tensor:
    """M [P, A, B], at most 1 where both are tokens. Padded states are 0.

    The distance of equal tokens is 0 to 1e-8 of their length in products of fp64 (in fp32 it would be to 1e-3).
    """
    if cost == "cosine":
        chosen_PAD, rejected_PBD = (F.normalize(states, dim=-1) for states in (chosen_PAD, rejected_PBD))
    norms_PA, norms_PB = (torch.linalg.vector_norm(states, dim=-1) for states in (chosen_PAD, rejected_PBD))
    products_PAB = chosen_PAD @ rejected_PBD.mT
    if cost == "cosine":
        costs_PAB = (1 - products_PAB).clamp(min=0) + OFFSET
    else:
        squares_PAB = norms_PA.square()[:, :, None] + norms_PB.square()[:, None, :] - 2 * products_PAB
        costs_PAB = squares_PAB.clamp(min=0).sqrt() + OFFSET
    largest_P = costs_PAB.masked_fill(~valid_PAB, 0).amax(dim=(1, 2))
    if cost_scale == "padded_max":
        longest_P = torch.maximum(norms_PA.amax(dim=1), norms_PB.amax(dim=1)) + OFFSET
        largest_P = torch.maximum(largest_P, longest_P)
    return costs_PAB / largest_P.clamp(min=1)[:, None, None]


def plan_masses(costs_PAB: torch.Tensor, valid_PA: torch.Tensor, valid_PB: torch.Tensor, reg: float, reg_m: float,
                steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logarithms of the plan's row sums [P, A] and column sums [P, B] but for a number a side; -inf for no token."""
    kernel_PAB, factor = torch.exp(costs_PAB / -reg), reg_m / (reg_m + reg)
    absent_PA, absent_PB = (torch.zeros_like(valid, dtype=torch.float64).masked_fill(~valid, -torch.inf)
                            for valid in (valid_PA, valid_PB))
    log_v_PB = absent_PB
    for _ in range(steps):
        log_u_PA = absent_PA - factor * log_means(kernel_PAB, log_v_PB)
        log_v_PB = absent_PB - factor * log_means(kernel_PAB.mT, log_u_PA)
    return log_u_PA + log_means(kernel_PAB, log_v_PB), log_v_PB + log_means(kernel_PAB.mT, log_u_PA)


def log_means(kernel_PAB: torch.Tensor, log_v_PB: torch.Tensor) -> torch.Tensor:
    """log(K v / sum v) [P, A] of log v."""
    return (kernel_PAB @ log_v_PB.softmax(dim=1)[:, :, None]).squeeze(2).log()


def otpo(batch, context, *, reg: float = 1.0, reg_m: float = 0.2, cost: Cost = "euclidean",
         cost_scale: CostScale = "block_max") -> torch.Tensor:
    """Optimal transport between the hidden states of the two answers (OTPO, Li et al. 2025, arXiv 2505.18720).

    What a token weighs is its row's or column's sum of the unbalanced plan (above), reg and reg_m being the paper's
    epsilon_1 and epsilon_2; an answer's weights sum to the shorter answer's length. cost: `cosine` is an ablation of
    the paper (`uniform` is another). cost_scale: what divides the costs where it is more than 1, their largest
    (`block_max`), or that or the longest hidden state (`padded_max`: their code, where padding counts). Reads the
    policy's hidden states, with no further forward. Theirs: --loss dpo, beta 0.01 (8B; 3B: 0.1, and reg=0.1).
    """
    return transport_shares(batch.hidden_ND, batch.seq_lens_S.tolist(), reg=reg, reg_m=reg_m, cost=cost,
                            cost_scale=cost_scale)


def otpo_needs(*, reg: float, reg_m: float, **_) -> tuple[str, ...]:
    count_iterations(reg, reg_m)  # settings out of reach are refused before any weights are loaded
    return ("hidden",)


otpo.norm = "pair_min"
otpo.needs = otpo_needs
