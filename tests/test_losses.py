"""Losses and metrics by hand; every registered loss at its limits."""

import math

import numpy as np
import pytest
import torch

from twdpo.config import TrainConfig
from twdpo.losses import LOSSES, dpo
from twdpo.metrics import add_totals, largest, means, pair_metrics, standard_errors
from twdpo.weights import normalize


class Batch:
    """What losses and metrics read of a batch: two pairs of two and one tokens."""

    def __init__(self, norm: str = "none", coefficient=(1.0, 1.0)):
        self.seq_lens_S = torch.tensor([2, 1, 1, 2])
        self.ref_logps_N = torch.tensor([-1.0, -2.0, -1.0, -3.0, -0.5, -0.5])
        self.weights_N, self.scale_S = normalize(torch.ones(6), self.seq_lens_S, norm)
        self.coefficient_P = torch.tensor(coefficient)
        self.pair_count = 2

    def ratio(self, logps_N: torch.Tensor) -> torch.Tensor:
        weighted_N = self.weights_N * (logps_N - self.ref_logps_N)
        return self.scale_S * torch.stack([part.sum() for part in weighted_N.split(self.seq_lens_S.tolist())])


LOGPS = torch.tensor([-0.5, -1.5, -1.5, -3.0, -1.0, -0.5])


def test_dpo_by_hand():
    """Pair 1: chosen gains 0.5 + 0.5, rejected loses 0.5: margin 0.1 * 1.5. Pair 2: chosen 0, rejected loses 0.5:
    margin 0.1 * 0.5. Loss log(1 + exp(-margin)); its gradient in a chosen log-prob is -0.1 * sigmoid(-margin)."""
    logps_N, batch = LOGPS.clone().requires_grad_(), Batch()
    loss_P, _ = dpo(batch.ratio(logps_N), logps_N, batch, TrainConfig(beta=0.1))
    expected = [math.log(1 + math.exp(-0.15)), math.log(1 + math.exp(-0.05))]
    np.testing.assert_allclose(loss_P.tolist(), expected, rtol=1e-6)
    (grad_N,) = torch.autograd.grad(loss_P.sum(), logps_N)
    first, second = 0.1 / (1 + math.exp(0.15)), 0.1 / (1 + math.exp(0.05))
    np.testing.assert_allclose(grad_N.tolist(), [-first, -first, first, -second, second, second], rtol=1e-5)


def test_label_smoothing_by_hand():
    batch = Batch()
    loss_P, _ = dpo(batch.ratio(LOGPS), LOGPS, batch, TrainConfig(beta=0.1, label_smoothing=0.25))
    expected = 0.75 * math.log(1 + math.exp(-0.15)) + 0.25 * math.log(1 + math.exp(0.15))
    assert loss_P[0].item() == pytest.approx(expected, rel=1e-6)


def test_uniform_twdpo_is_dpo_in_values_and_gradients():
    results = []
    for name, norm in (("twdpo", LOSSES["twdpo"].norm), ("dpo", "none")):
        logps_N, batch = LOGPS.clone().requires_grad_(), Batch(norm)
        loss_P, _ = LOSSES[name](batch.ratio(logps_N), logps_N, batch, TrainConfig(beta=0.1))
        results.append((loss_P.detach(), torch.autograd.grad(loss_P.sum(), logps_N)[0]))
    for ours, expected in zip(*results):
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_every_loss_is_finite_at_saturation_and_falls_as_the_chosen_answer_gains(name):
    batch, config = Batch(), TrainConfig(beta=1.0)
    for size in (0.0, 1.0, 1e4):
        ratio_S = torch.tensor([size, -size, -size, size], requires_grad=True)
        loss_P, _ = LOSSES[name](ratio_S, LOGPS, batch, config)
        (grad_S,) = torch.autograd.grad(loss_P.sum(), ratio_S)
        assert loss_P.isfinite().all() and grad_S.isfinite().all()
        assert grad_S[2] < 0 < grad_S[3]  # the pair that is wrong: raise chosen, lower rejected
        assert loss_P[0] <= loss_P[1]


def test_metrics_by_hand_with_a_tie_and_a_copy():
    batch = Batch(coefficient=(1.0, 0.0))
    loss_P = torch.tensor([0.5, float("nan")])
    metrics = pair_metrics(loss_P, {}, batch.ratio(LOGPS), LOGPS, batch, beta=0.1)
    assert metrics["reward_margin"].tolist() == pytest.approx([0.15, 0.05])
    totals = {}
    add_totals(totals, metrics, batch.coefficient_P)
    assert means(totals)["loss"] == 0.5 and means(totals)["reward_accuracy"] == 1.0
    assert "loss" not in standard_errors(totals)  # one pair has no standard error
    tied = pair_metrics(loss_P, {}, batch.ratio(batch.ref_logps_N), batch.ref_logps_N, batch, beta=0.1)
    assert tied["reward_accuracy"].tolist() == [0.5, 0.5] == tied["weighted_reward_accuracy"].tolist()
    rounded = batch.ref_logps_N + torch.tensor([1e-7, 0, 0, 0, 0, -1e-7])
    assert pair_metrics(loss_P, {}, batch.ratio(rounded), rounded, batch, 0.1)["reward_accuracy"].tolist() == [0.5, 0.5]
    clear = batch.ref_logps_N + torch.tensor([1e-4, 0, 0, 0, 1e-4, 0])
    assert pair_metrics(loss_P, {}, batch.ratio(clear), clear, batch, 0.1)["reward_accuracy"].tolist() == [1, 0]


def test_rewards_and_kl_by_hand():
    """Pair 1: log-ratios 0.5, 0.5 and -0.5; pair 2: 0 and -0.5, 0. KL: the mean over a pair's tokens of e^d - 1 - d."""
    metrics = pair_metrics(torch.zeros(2), {}, Batch().ratio(LOGPS), LOGPS, Batch(), beta=0.1)
    assert metrics["reward_chosen"].tolist() == pytest.approx([0.1, 0.0])
    assert metrics["reward_rejected"].tolist() == pytest.approx([-0.05, -0.05])
    up, down = math.exp(0.5) - 1.5, math.exp(-0.5) - 0.5
    assert metrics["kl"].tolist() == pytest.approx([(2 * up + down) / 3, down / 3], rel=1e-6)
    without = pair_metrics(torch.zeros(2), {}, Batch().ratio(LOGPS), LOGPS, Batch(), 0.1, has_reference=False)
    assert "kl" not in without


def test_means_and_standard_errors_are_those_of_all_pairs():
    values = np.random.default_rng(0).normal(size=30)
    totals = {}
    for part in np.split(values, [7, 18]):
        add_totals(totals, {"x": torch.from_numpy(part)}, torch.ones(len(part)))
    assert means(totals)["x"] == pytest.approx(values.mean())
    assert standard_errors(totals)["x"] == pytest.approx(values.std(ddof=1) / math.sqrt(30))
    assert largest(totals)["x"] == np.abs(values).max()
