"""Losses and metrics by hand; every registered loss at its limits."""

import math

import numpy as np
import pytest
import torch

from twdpo.config import TrainConfig
from twdpo.flags import InputError
from twdpo.loss_parts import loss_needs
from twdpo.losses import LOSSES, dpo
from twdpo.metrics import add_totals, largest, means, pair_metrics, standard_errors, to_host, token_metrics
from twdpo.plugins import bind_options, describe, options_of
from twdpo.vocabulary_losses import VOCABULARY_LOSSES
from twdpo.weights import WEIGHTS, normalize, source_needs


class Batch:
    """What losses and metrics read of a batch: two pairs of two and one tokens."""

    def __init__(self, norm: str = "none", coefficient=(1.0, 1.0)):
        self.seq_lens_S = torch.tensor([2, 1, 1, 2])
        self.ref_logps_N = torch.tensor([-1.0, -2.0, -1.0, -3.0, -0.5, -0.5])
        self.weights_N, self.scale_S = normalize(torch.ones(6), self.seq_lens_S, norm)
        self.coefficient_P = torch.tensor(coefficient)
        self.pair_count, self.chosen_tokens, self.averaged = 2, 3, False
        self.terms = {"collision": torch.zeros(6)}

    def double(self) -> "Batch":
        for name in ("ref_logps_N", "weights_N", "scale_S"):
            setattr(self, name, getattr(self, name).double())
        return self

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


@pytest.mark.parametrize("name", ["dpo", "twdpo"])
def test_nll_is_a_plain_mean_of_the_chosen_tokens(name):
    """Log-probs -0.5, -1.5 and -3.0 of the chosen answers, whatever reference and weights say."""
    loss, batch = bind_options(LOSSES[name], "nll=0.5", "--loss-options"), Batch()
    batch.weights_N = torch.tensor([0.5, 0.25, 1.0, 1.0, 1.0, 1.0])
    plain_P, _ = LOSSES[name](batch.ratio(LOGPS), LOGPS, batch, TrainConfig(beta=0.1))
    logps_N = LOGPS.clone().requires_grad_()
    loss_P, _ = loss(batch.ratio(LOGPS), logps_N, batch, TrainConfig(beta=0.1))
    assert (loss_P - plain_P).tolist() == pytest.approx([0.5, 1.5])
    (grad_N,) = torch.autograd.grad(loss_P.sum(), logps_N)
    assert grad_N.tolist() == pytest.approx([-0.25, -0.25, 0, -0.5, 0, 0])


def test_label_smoothing_by_hand():
    batch = Batch()
    loss_P, _ = dpo(batch.ratio(LOGPS), LOGPS, batch, TrainConfig(beta=0.1), label_smoothing=0.25)
    expected = 0.75 * math.log(1 + math.exp(-0.15)) + 0.25 * math.log(1 + math.exp(0.15))
    assert loss_P[0].item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", [name for name in LOSSES if "label_smoothing" in options_of(LOSSES[name])])
@pytest.mark.parametrize("smoothing", [-0.1, 0.5])
def test_half_of_the_labels_or_more_can_t_be_flipped(name, smoothing):
    batch = Batch()
    with pytest.raises(ValueError, match=rf"label_smoothing is {smoothing}: it must be in \[0, 0.5\)"):
        LOSSES[name](batch.ratio(LOGPS), LOGPS, batch, TrainConfig(beta=0.1), label_smoothing=smoothing)


def test_dpo_over_positions_by_hand():
    """Pair 1: log-ratios 0.5, 0.5 against -0.5 and nothing: margins 0.1 * 1.0 and 0.1 * 0.5. Pair 2: 0 and nothing
    against -0.5 and 0. Weights count; gradients are those of finite differences."""
    loss, batch, config = bind_options(dpo, "over=positions", "--loss-options"), Batch().double(), TrainConfig(beta=0.1)
    logps_N = LOGPS.double().requires_grad_()
    loss_P, _ = loss(batch.ratio(logps_N), logps_N, batch, config)
    expected = [-(log_sigmoid(0.1) + log_sigmoid(0.05)) / 2, -(log_sigmoid(0.05) + log_sigmoid(0.0)) / 2]
    np.testing.assert_allclose(loss_P.tolist(), expected, rtol=1e-9)
    assert torch.autograd.gradcheck(lambda logps_N: loss(None, logps_N, batch, config)[0], (logps_N,))
    batch.weights_N = torch.tensor([1.0, 0.0, 0.5, 1.0, 1.0, 1.0], dtype=torch.float64)
    batch.scale_S = torch.tensor([2.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    first = loss(None, logps_N, batch, config)[0][0].item()
    assert first == pytest.approx(-(log_sigmoid(0.1 * (2 * 0.5 + 0.5 * 0.5)) + log_sigmoid(0.0)) / 2)


def test_uniform_twdpo_is_dpo_in_values_and_gradients():
    results = []
    for name, norm in (("twdpo", LOSSES["twdpo"].norm), ("dpo", "none")):
        logps_N, batch = LOGPS.clone().requires_grad_(), Batch(norm)
        loss_P, _ = LOSSES[name](batch.ratio(logps_N), logps_N, batch, TrainConfig(beta=0.1))
        results.append((loss_P.detach(), torch.autograd.grad(loss_P.sum(), logps_N)[0]))
    for ours, expected in zip(*results):
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-7)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def log_sigmoid(x: float) -> float:
    return -math.log(1 + math.exp(-x))


def log_odds(average: float) -> float:
    return average - math.log(1 - math.exp(average))


B = 0.3  # beta
# By the papers' formulas, of one pair: c, r sums of log-ratios (log-probs without a reference), n, m lengths of both,
# zc, zr the means of c and r over the batch.
FORMULAS = {
    "dpo": lambda c, r, n, m, zc, zr: -log_sigmoid(B * (c - r)),
    "dpo f=forward_kl": lambda c, r, n, m, zc, zr: -log_sigmoid(B * (math.exp(-r) - math.exp(-c))),
    "dpo f=alpha,alpha=0.25": lambda c, r, n, m, zc, zr:
        -log_sigmoid(B * (math.exp(-0.25 * r) - math.exp(-0.25 * c)) / 0.25),
    "dpo f=js": lambda c, r, n, m, zc, zr:
        -log_sigmoid(B * (c - math.log(1 + math.exp(c)) - r + math.log(1 + math.exp(r)))),
    "twdpo": lambda c, r, n, m, zc, zr: -log_sigmoid(B * (c - r)),
    "ipo": lambda c, r, n, m, zc, zr: (c / n - r / m - 1 / (2 * B)) ** 2,
    "ipo normalize=sum": lambda c, r, n, m, zc, zr: (c - r - 1 / (2 * B)) ** 2,
    "kto_pair": lambda c, r, n, m, zc, zr: 2 - sigmoid(B * (c - max(zr, 0))) - sigmoid(B * (max(zc, 0) - r)),
    "kto_pair kl=zero,desirable=2": lambda c, r, n, m, zc, zr: 2 * (1 - sigmoid(B * c)) + 1 - sigmoid(-B * r),
    "kto_pair kl=micro": lambda c, r, n, m, zc, zr:
        1 - (sigmoid(B * (c - max(zr, 0))) + sigmoid(B * (max(zc, 0) - r))) / 2,
    "simpo": lambda c, r, n, m, zc, zr: -log_sigmoid(B * (c / n - r / m - 0.25)),
    "simpo gamma_ratio=0.5,form=hinge,nll=0.1": lambda c, r, n, m, zc, zr:
        max(0, 1 - B * (c / n - r / m - 0.5)) - 0.1 * c / n,
    "rdpo alpha=0.05": lambda c, r, n, m, zc, zr: -log_sigmoid(B * (c - r) + 0.05 * n - 0.05 * m),
    "cpo": lambda c, r, n, m, zc, zr: -log_sigmoid(B * (c - r)) - c,
    "cpo nll_over=token": lambda c, r, n, m, zc, zr: -log_sigmoid(B * (c - r)) - c / n,
    "cpo nll=0.5,nll_over=batch": lambda c, r, n, m, zc, zr: -log_sigmoid(B * (c - r)) - 0.5 * c * 2 / 3,
    "orpo": lambda c, r, n, m, zc, zr: -c / n - B * log_sigmoid(log_odds(c / n) - log_odds(r / m)),
    "slic_hf": lambda c, r, n, m, zc, zr: max(0, 1 - c + r) - 0.1 * c,
    "rrhf nll=0.5": lambda c, r, n, m, zc, zr: max(0, r / m - c / n) - 0.5 * c,
    "sigmoid_norm": lambda c, r, n, m, zc, zr: -log_sigmoid(B * (c / n - r / m)),
    "hinge": lambda c, r, n, m, zc, zr: max(0, 1 - B * (c - r)),
    "robust label_smoothing=0.1": lambda c, r, n, m, zc, zr:
        (-0.9 * log_sigmoid(B * (c - r)) + 0.1 * log_sigmoid(B * (r - c))) / 0.8,
    "exo_pair": lambda c, r, n, m, zc, zr: (sigmoid(B * (c - r)) * (log_sigmoid(B * (c - r)) - math.log(0.999))
                                            + sigmoid(B * (r - c)) * (log_sigmoid(B * (r - c)) - math.log(0.001))),
    "nca_pair": lambda c, r, n, m, zc, zr: -log_sigmoid(B * c) - 0.5 * log_sigmoid(-B * c) - 0.5 * log_sigmoid(-B * r),
    "bco_pair": lambda c, r, n, m, zc, zr: -log_sigmoid(B * c) - log_sigmoid(-B * r),
    "sppo_hard": lambda c, r, n, m, zc, zr: (c - 0.5 / B) ** 2 + (r + 0.5 / B) ** 2,
    "apo_zero": lambda c, r, n, m, zc, zr: 1 - sigmoid(B * c) + sigmoid(B * r),
    "apo_down": lambda c, r, n, m, zc, zr: sigmoid(B * c) + 1 - sigmoid(B * (c - r)),
    "discopop": lambda c, r, n, m, zc, zr: (-log_sigmoid(B * (c - r)) * (1 - sigmoid(B * (c - r) / 0.05))
                                            + math.exp(-B * (c - r)) * sigmoid(B * (c - r) / 0.05)),
    "sft": lambda c, r, n, m, zc, zr: -c / n,
    "sft over=sequence": lambda c, r, n, m, zc, zr: -c,
}


def bind(spelled: str):
    name, _, options = spelled.partition(" ")
    return bind_options(LOSSES[name], options, "--loss-options")


def batch_for(loss, norm: str = "none") -> Batch:
    batch = Batch(norm).double()
    if "ref" not in loss_needs(loss):
        batch.ref_logps_N = torch.zeros_like(batch.ref_logps_N)
    return batch


def value(loss, logps_N: torch.Tensor, batch) -> torch.Tensor:
    ratio_S = batch.ratio(logps_N)
    if hasattr(loss, "statistics"):
        values = loss.statistics(ratio_S, logps_N, batch)
        batch.means = {name: value_P.mean().detach() for name, value_P in values.items()}
    return loss(ratio_S, logps_N, batch, TrainConfig(beta=B))[0]


def test_every_loss_has_its_formula_here():
    assert {spelled.split(" ")[0] for spelled in FORMULAS} == LOSSES.keys() - VOCABULARY_LOSSES.keys()


@pytest.mark.parametrize("spelled", FORMULAS)
def test_losses_by_hand(spelled):
    """Two pairs of two and one, one and two tokens."""
    loss = bind(spelled)
    batch, logps_N = batch_for(loss), LOGPS.double()
    sums = [float(part.sum()) for part in (logps_N - batch.ref_logps_N).split([2, 1, 1, 2])]
    zw, zl = (sums[0] + sums[2]) / 2, (sums[1] + sums[3]) / 2
    expected = [FORMULAS[spelled](sums[0], sums[1], 2, 1, zw, zl), FORMULAS[spelled](sums[2], sums[3], 1, 2, zw, zl)]
    np.testing.assert_allclose(value(loss, logps_N, batch).tolist(), expected, rtol=1e-9)


@pytest.mark.parametrize("spelled", FORMULAS)
def test_gradients_are_those_of_finite_differences(spelled):
    loss, logps_N = bind(spelled), LOGPS.double().requires_grad_()
    batch = batch_for(loss)
    value(loss, logps_N, batch)
    fixed = dict(getattr(batch, "means", {}))  # statistics carry no gradient

    def of(logps_N):
        batch.means = fixed
        return loss(batch.ratio(logps_N), logps_N, batch, TrainConfig(beta=B))[0]
    assert torch.autograd.gradcheck(of, (logps_N,), eps=1e-6, atol=1e-7)


@pytest.mark.parametrize("spelled", FORMULAS)
def test_a_wrong_pair_is_put_right(spelled):
    """Where the rejected answer is far likelier, the chosen one is raised and the other lowered."""
    loss, batch = bind(spelled), batch_for(bind(spelled))
    ratio_S = torch.tensor([-6.0, -1.0, -7.0, -1.5], dtype=torch.float64, requires_grad=True)
    batch.means = {"chosen": torch.tensor(0.0), "rejected": torch.tensor(0.0)}
    loss_P, _ = loss(ratio_S, LOGPS.double(), batch, TrainConfig(beta=B))
    (grad_S,) = torch.autograd.grad(loss_P.sum(), ratio_S)
    assert (grad_S[1::2] > 0).all() or spelled.startswith("sft")
    if spelled != "apo_down":  # which lowers both
        assert (grad_S[0::2] < 0).all()


@pytest.mark.parametrize("spelled", FORMULAS)
@pytest.mark.parametrize("size", [0.0, 1e-7, 50.0, 1e4])
def test_losses_are_finite_at_their_limits(spelled, size):
    """Equal answers, saturated margins, log-probs of 0 (p = 1)."""
    loss = bind(spelled)
    batch = batch_for(loss)
    signs = [-1.0, -1.0, -2.0, -1.0] if "ref" not in loss_needs(loss) else [1.0, -1.0, -1.0, 1.0]
    ratio_S = (size * torch.tensor(signs, dtype=torch.float32)).requires_grad_()
    batch.means = {"chosen": torch.tensor(size), "rejected": torch.tensor(-size)}
    loss_P, _ = loss(ratio_S, LOGPS, batch, TrainConfig(beta=B))
    (grad_S,) = torch.autograd.grad(loss_P.sum(), ratio_S)
    assert loss_P.isfinite().all() and grad_S.isfinite().all()


@pytest.mark.parametrize("name", ["dpo", "twdpo", "sigmoid_norm", "simpo", "cpo"])
def test_smoothing_mixes_in_the_flipped_pair(name):
    """(1 - e) of the loss at margin m and e of it at -m; cpo's and simpo's other terms stay."""
    loss, batch = bind_options(LOSSES[name], "gamma_ratio=0" if name == "simpo" else "nll=0" if name == "cpo" else "",
                               "--loss-options"), batch_for(LOSSES[name])
    ratio_S = torch.tensor([-3.0, -1.0, -2.0, -4.0], dtype=torch.float64)
    flipped_S = ratio_S.view(-1, 2).flip(1).reshape(-1)
    batch.seq_lens_S = torch.tensor([2, 2, 1, 1])  # so that flipping a pair flips its margin alone

    def of(ratio_S, smoothing):
        return loss(ratio_S, None, batch, TrainConfig(beta=B), label_smoothing=smoothing)[0]
    expected = 0.8 * of(ratio_S, 0.0) + 0.2 * of(flipped_S, 0.0)
    np.testing.assert_allclose(of(ratio_S, 0.2).numpy(), expected.numpy(), rtol=1e-12)


def test_mass_is_that_of_scaled_weights():
    """Weights of mean 1, as sum 1 and scale n: their mass is n, so both ways of counting agree."""
    loss, batch = LOSSES["sigmoid_norm"], Batch("mean1").double()
    by = [loss(batch.ratio(LOGPS.double()), LOGPS, batch, TrainConfig(beta=B), length_by=what)[0].tolist()
          for what in ("tokens", "mass")]
    assert by[0] == pytest.approx(by[1])


def test_averages_keep_what_counts_tokens():
    """Weights that make means (averaged): rdpo's lengths stay those of the answers, cpo's batch mean is the same."""
    rdpo, cpo = (bind_options(LOSSES[name], text, "--loss-options") for name, text in
                 (("rdpo", "alpha=0.5"), ("cpo", "nll_over=batch")))
    plain, averaged = batch_for(cpo), batch_for(cpo, "mean1")
    averaged.scale_S, averaged.averaged = torch.ones(4, dtype=torch.float64), True
    zero_S = torch.zeros(4, dtype=torch.float64)
    assert rdpo(zero_S, None, averaged, TrainConfig(beta=B))[0].tolist() == pytest.approx(
        [-log_sigmoid(0.5), -log_sigmoid(-0.5)])
    nll = []
    for batch in (plain, averaged):
        ratio_S = batch.ratio(LOGPS.double())
        margin_P = B * (ratio_S[0::2] - ratio_S[1::2])
        loss_P = cpo(ratio_S, None, batch, TrainConfig(beta=B))[0]
        nll.append((loss_P + torch.nn.functional.logsigmoid(margin_P)).tolist())
    assert nll[0] == pytest.approx(nll[1])


def test_exo_reads_its_epsilon():
    loss = bind_options(LOSSES["exo_pair"], "epsilon=0.2", "--loss-options")
    expected = 0.5 * math.log(0.5 / 0.8) + 0.5 * math.log(0.5 / 0.2)
    assert loss(torch.zeros(2), None, None, TrainConfig(beta=B))[0].tolist() == pytest.approx([expected])


def test_length_by_mass_divides_by_the_weights():
    """Weights 0.5 and 0.25 of two tokens: an average over 0.75 of them."""
    loss, batch = LOSSES["sigmoid_norm"], Batch().double()
    batch.weights_N = torch.tensor([0.5, 0.25, 1.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    ratio_S = batch.ratio(LOGPS.double())
    by_tokens, by_mass = (loss(ratio_S, LOGPS, batch, TrainConfig(beta=B), length_by=by)[0][0].item()
                          for by in ("tokens", "mass"))
    gain = 0.5 * 0.5 + 0.25 * 0.5
    assert by_tokens == pytest.approx(-log_sigmoid(B * (gain / 2 + 0.5)))
    assert by_mass == pytest.approx(-log_sigmoid(B * (gain / 0.75 + 0.5)))


@pytest.mark.parametrize("text, message", [
    ("beta=1", "the options of simpo are gamma_ratio=0.25, form=sigmoid.hinge, nll=0.0, label_smoothing=0.0"),
    ("gamma_ratio=x", "must be a float"), ("gamma_ratio", "must be a float"),
    ("form=cube", "must be one of sigmoid, hinge"),
])
def test_options_that_make_no_sense_are_refused(text, message):
    with pytest.raises(InputError, match=message):
        bind_options(LOSSES["simpo"], text, "--loss-options")


def test_bound_options_keep_the_attributes():
    bound = bind_options(LOSSES["simpo"], " gamma_ratio=0.5, form=hinge ", "--loss-options")
    assert bound.needs == () and bound.settings == LOSSES["simpo"].settings and bound.__name__ == "simpo"
    assert bind_options(LOSSES["simpo"], "", "--loss-options") is LOSSES["simpo"]


@pytest.mark.parametrize("table", [LOSSES, WEIGHTS])
def test_every_docstring_opens_with_what_it_is(table):
    for row in describe(table, loss_needs if table is LOSSES else source_needs):
        assert 20 < len(row[1]) < 120 and all(row), row


def test_metrics_by_hand_with_a_tie_and_a_copy():
    batch = Batch(coefficient=(1.0, 0.0))
    loss_P = torch.tensor([0.5, float("nan")])
    metrics = pair_metrics(loss_P, {}, batch.ratio(LOGPS), LOGPS, batch, beta=0.1)
    assert metrics["reward_margin"].tolist() == pytest.approx([0.15, 0.05])
    totals = {}
    add_totals(totals, metrics, batch.coefficient_P)
    assert means(to_host(totals))["loss"] == 0.5 and means(to_host(totals))["reward_accuracy"] == 1.0
    assert "loss" not in standard_errors(to_host(totals))  # one pair has no standard error
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


def test_token_metrics_by_hand():
    """Without gradient: totals of a step would keep every micro-batch's graph."""
    batch = Batch()
    batch.terms = {"entropy": torch.arange(6.0, requires_grad=True),
                   "top1": torch.tensor([True, False, True, True, False, False])}
    metrics = token_metrics(batch, ("entropy", "top1"))
    assert metrics["token_entropy"].tolist() == [1.0, 4.0] and not metrics["token_entropy"].requires_grad
    assert metrics["token_top1"].tolist() == pytest.approx([2 / 3, 1 / 3])


def test_means_and_standard_errors_are_those_of_all_pairs():
    values = np.random.default_rng(0).normal(size=30)
    totals = {}
    for part in np.split(values, [7, 18]):
        add_totals(totals, {"x": torch.from_numpy(part)}, torch.ones(len(part)))
    assert means(to_host(totals))["x"] == pytest.approx(values.mean())
    assert standard_errors(to_host(totals))["x"] == pytest.approx(values.std(ddof=1) / math.sqrt(30))
    assert largest(to_host(totals))["x"] == np.abs(values).max()
