"""Unbalanced transport: against a dense fixed point, against POT, in corner cases; batching changes nothing."""

import warnings

import numpy as np
import pytest
import torch

from twdpo import transport
from twdpo.flags import InputError
from twdpo.transport import count_iterations, transport_shares

SETTINGS = [(1.0, 0.2), (0.1, 0.2)]  # the paper's, and that of its 3B configs


def random_pairs(number: int, longest: int, size: int = 24, seed: int = 0) -> tuple[torch.Tensor, list[int]]:
    """(hidden states fp64, lengths). Pairs' spreads differ, so that some costs are divided and some are not; states of
    every other pair are farther from 0 than from each other."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (2 * number,), generator=generator).tolist()
    spreads = torch.rand(number, generator=generator, dtype=torch.float64) * 0.5 + 0.02
    states = [torch.randn(length, size, generator=generator, dtype=torch.float64) * spreads[place // 2] + place // 2 % 2
              for place, length in enumerate(lengths)]
    return torch.cat(states), lengths


def dense_costs(chosen: torch.Tensor, rejected: torch.Tensor, cost_scale: str) -> torch.Tensor:
    """M of one pair, difference by difference."""
    costs = (chosen[:, None] - rejected[None]).square().sum(dim=-1).sqrt() + 1e-6
    largest = costs.max()
    if cost_scale == "padded_max":
        largest = max(largest, torch.cat([chosen, rejected]).square().sum(dim=-1).max().sqrt() + 1e-6)
    return costs / max(largest, 1)


def dense_shares(costs: torch.Tensor, reg: float, reg_m: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Shares of rows and columns of the plan, by the scaling iteration until it stands still."""
    kernel, factor = torch.exp(-costs / reg), reg_m / (reg_m + reg)
    v, last = torch.ones(costs.shape[1], dtype=costs.dtype), None
    while last is None or (v / last - 1).abs().max() > 1e-14:
        last = v
        u = (kernel @ v) ** -factor
        v = (kernel.T @ u) ** -factor
    plan = u[:, None] * kernel * v
    return plan.sum(dim=1) / plan.sum(), plan.sum(dim=0) / plan.sum()


def largest_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Of the largest."""
    return ((found.double() - expected).abs().max() / expected.max()).item()


@pytest.mark.parametrize("cost_scale", ["block_max", "padded_max"])
@pytest.mark.parametrize("reg, reg_m", SETTINGS)
def test_shares_are_those_of_the_fixed_point(reg, reg_m, cost_scale):
    hidden_ND, lengths = random_pairs(30, 40)
    states = hidden_ND.split(lengths)
    found = transport_shares(hidden_ND, lengths, reg=reg, reg_m=reg_m, cost_scale=cost_scale).split(lengths)
    single = transport_shares(hidden_ND.float(), lengths, reg=reg, reg_m=reg_m, cost_scale=cost_scale).split(lengths)
    divided = 0
    for place in range(0, len(lengths), 2):
        costs = dense_costs(*states[place:place + 2], cost_scale)
        divided += (dense_costs(*states[place:place + 2], "block_max").max() > 0.999).item()
        for side, expected in enumerate(dense_shares(costs, reg, reg_m)):
            assert largest_error(found[place + side], expected) < 1e-12
            assert single[place + side].dtype == torch.float32 and largest_error(single[place + side], expected) < 1e-6
    assert 5 < divided < 28  # of 30 pairs


@pytest.mark.slow
@pytest.mark.parametrize("reg, reg_m, cost_scale", [(1.0, 0.2, "block_max"), (0.1, 0.2, "padded_max")])
def test_200_pairs_of_up_to_400_tokens_are_pots(reg, reg_m, cost_scale):
    """To 1e-6 of the largest weight, from bf16 states. `padded_max` as the authors call it: padded rows are 0, and
    marginals are masks (with the entropy that was POT's default then: see docs/methods.md)."""
    ot = pytest.importorskip("ot")
    hidden_ND, lengths = random_pairs(200, 400)
    hidden_ND = hidden_ND.bfloat16()
    states = hidden_ND.double().split(lengths)
    found = transport_shares(hidden_ND, lengths, reg=reg, reg_m=reg_m, cost_scale=cost_scale).split(lengths)
    for place in range(0, len(lengths), 2):
        pair, masks = states[place:place + 2], [np.ones(length) for length in lengths[place:place + 2]]
        if cost_scale == "padded_max":  # two rows of the prompt before, and the shorter answer filled up
            longest = max(map(len, pair))
            masks = [np.concatenate([[0, 0], mask, np.zeros(longest - len(mask))]) for mask in masks]
            pair = [torch.nn.functional.pad(side, (0, 0, 2, longest - len(side))) for side in pair]
        costs = torch.cdist(*pair, compute_mode="donot_use_mm_for_euclid_dist") + 1e-6
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the entropy replaces c, and logarithms of 0 in it
            plan = ot.unbalanced.sinkhorn_unbalanced(
                *masks, (costs / costs.max().clamp(min=1)).numpy(), reg, reg_m, reg_type="entropy",
                method="sinkhorn" if place % 4 else "sinkhorn_stabilized", stopThr=1e-10, numItermax=10_000)
        for side, mask in enumerate(masks):
            expected = torch.from_numpy(plan.sum(axis=1 - side)[mask > 0] / plan.sum())
            assert largest_error(found[place + side], expected) < 1e-6


def test_a_pairs_weights_are_its_own(monkeypatch):
    """Other pairs, their order, and how many go through at once change them by rounding alone."""
    hidden_ND, lengths = random_pairs(9, 60)
    alone = [transport_shares(torch.cat(hidden_ND.split(lengths)[place:place + 2]), lengths[place:place + 2], reg=0.1,
                              reg_m=0.2) for place in range(0, 18, 2)]
    order = [place + side for place in torch.randperm(9).mul(2).tolist() for side in (0, 1)]
    mixed_ND = torch.cat([hidden_ND.split(lengths)[place] for place in order])
    mixed = [lengths[place] for place in order]
    for group_bytes, least, most in ((2**28, 1, 1), (2**19, 2, 8), (1, 9, 9)):
        monkeypatch.setattr(transport, "GROUP_BYTES", group_bytes)
        assert least <= len(transport.group_pairs(mixed, 24)) <= most
        shares = dict(zip(order, transport_shares(mixed_ND, mixed, reg=0.1, reg_m=0.2).split(mixed)))
        for place, expected in enumerate(alone):
            torch.testing.assert_close(torch.cat([shares[2 * place], shares[2 * place + 1]]), expected, rtol=1e-12,
                                       atol=0)


def test_groups_hold_every_pair_once_and_no_more_than_they_may():
    lengths = torch.randint(1, 900, (120,)).tolist()
    groups = transport.group_pairs(lengths, 64)
    assert sorted(pair for group in groups for pair in group) == list(range(60)) and 1 < len(groups) < 30
    for group in groups:
        longest = [max(lengths[2 * pair + side] for pair in group) for side in (0, 1)]
        assert len(group) == 1 or 8 * len(group) * (4 * longest[0] * longest[1] + 128 * sum(longest)) <= 2**28


def test_two_against_one_by_hand():
    """Costs (0, 1) + 1e-6 to one rejected token, reg = reg_m, so that f = 1/2: u_i = (K_i v)^-1/2, a row is u_i K_i v =
    (K_i v)^1/2, and the shares are as 1 : e^-1/2."""
    hidden_ND = torch.tensor([[0.0], [1.0], [0.0]])
    shares = transport_shares(hidden_ND, [2, 1], reg=1.0, reg_m=1.0)
    expected = torch.tensor([1, np.exp(-0.5)]) / (1 + np.exp(-0.5))
    torch.testing.assert_close(shares, torch.tensor([*expected, 1.0], dtype=torch.float32), rtol=1e-5, atol=0)


def test_what_is_alike_weighs_alike():
    """Identical answers, hidden states of 0, one token against many; a token that both answers have weighs most."""
    same = torch.randn(7, 16)
    twice = transport_shares(torch.cat([same, same]), [7, 7], reg=0.1, reg_m=0.2).split([7, 7])
    torch.testing.assert_close(*twice, rtol=1e-6, atol=0)
    zeros = transport_shares(torch.zeros(8, 16), [5, 3], reg=0.1, reg_m=0.2)
    torch.testing.assert_close(zeros, torch.tensor([0.2] * 5 + [1 / 3] * 3), rtol=1e-6, atol=0)
    alone = transport_shares(torch.randn(6, 16), [1, 5], reg=0.1, reg_m=0.2, cost="cosine")
    assert alone[0] == 1 and alone[1:].sum() == pytest.approx(1)
    shared = transport_shares(torch.cat([same, same[:1], torch.randn(3, 16)]), [7, 4], reg=0.1, reg_m=0.2)
    assert shared.argmax() == 7 and shared[:7].argmax() == 0


def test_equal_tokens_are_no_distance_apart():
    """Long states that hardly differ: |a|^2 + |b|^2 - 2ab in fp32 is nothing but rounding here."""
    base = 300 * torch.randn(1, 64, dtype=torch.float64)
    chosen, rejected = base + 1e-3 * torch.randn(30, 64), base + 1e-3 * torch.randn(40, 64)
    valid = torch.ones(1, 30, 40, dtype=torch.bool)
    costs = transport.pair_costs(chosen[None], rejected[None], valid, "euclidean", "block_max")[0]
    exact = torch.cdist(chosen, rejected, compute_mode="donot_use_mm_for_euclid_dist") + 1e-6
    assert (costs - exact).abs().max() < 1e-7 * base.norm()
    single = torch.cdist(chosen.float(), rejected.float(), compute_mode="use_mm_for_euclid_dist")
    assert (single - exact).abs().max() > 1e-5 * base.norm()


def test_cosine_costs():
    states = torch.tensor([[3.0, 0.0], [0.0, 2.0], [-1.0, 0.0]], dtype=torch.float64)
    valid = torch.ones(1, 1, 3, dtype=torch.bool)
    costs = transport.pair_costs(states[None, :1], states[None], valid, "cosine", "block_max")
    torch.testing.assert_close(costs, torch.tensor([[[0.0, 0.5, 1.0]]], dtype=torch.float64), atol=1e-6, rtol=0)


def test_iterations_are_enough_and_half_of_them_are_not(monkeypatch):
    """Of two clusters that hardly know of each other, whose balance differs: nearly as slow as the bound has it."""
    cluster_2D, lengths = torch.tensor([[0.0, 0.0], [1.0, 0.0]]), [2, 10]
    hidden_ND = torch.cat([cluster_2D.repeat_interleave(torch.tensor(counts), dim=0) for counts in ([1, 1], [9, 1])])

    def shares(reg: float, reg_m: float, steps: int) -> torch.Tensor:
        monkeypatch.setattr(transport, "count_iterations", lambda *_: steps)
        return transport_shares(hidden_ND.double(), lengths, reg=reg, reg_m=reg_m)
    for reg, reg_m, most in ((1.0, 0.2, 5), (0.1, 0.2, 24), (0.05, 1.0, 210), (3.0, 0.01, 2)):
        count = count_iterations(reg, reg_m)
        expected = shares(reg, reg_m, 4 * count)
        assert (shares(reg, reg_m, count) / expected - 1).abs().max() < torch.finfo(torch.float32).eps, (reg, reg_m)
        if (reg, reg_m) == (0.1, 0.2):  # the others' kernels bring potentials closer by themselves
            assert (shares(reg, reg_m, count // 2) / expected - 1).abs().max() > 1e-6, (reg, reg_m)
        assert count <= most


@pytest.mark.parametrize("reg, reg_m, message", [
    (0.001, 0.2, "reg must be at least 0.02"), (1.0, 0.0, "reg_m more than 0"), (-1.0, 0.2, "reg must be"),
    (0.02, 50.0, "iterations, more than 500"), (1.0, -0.2, "reg_m more than 0"),
])
def test_settings_out_of_reach_are_one_message(reg, reg_m, message):
    with pytest.raises(InputError, match=message):
        count_iterations(reg, reg_m)


@pytest.mark.gpu
def test_a_gpu_gives_the_same_and_nobody_waits_for_it():
    hidden_ND, lengths = random_pairs(20, 300)
    expected = transport_shares(hidden_ND.bfloat16(), lengths, reg=0.1, reg_m=0.2, cost_scale="padded_max")
    on_gpu = hidden_ND.bfloat16().cuda()
    transport_shares(on_gpu, lengths, reg=0.1, reg_m=0.2)  # what is made once
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = transport_shares(on_gpu, lengths, reg=0.1, reg_m=0.2, cost_scale="padded_max")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-6, atol=0)
