"""Losses on whole distributions and on what the policy writes, by hand."""

import math

import pytest
import torch
from test_losses import LOGPS, B, Batch, log_sigmoid

from twdpo.batch import Anchor
from twdpo.config import TrainConfig
from twdpo.flags import InputError
from twdpo.loss_parts import loss_needs
from twdpo.losses import LOSSES
from twdpo.objective import list_objectives
from twdpo.plugins import bind_options, stated
from twdpo.vocabulary_losses import VOCABULARY_LOSSES

KL = [0.1, 0.2, 0.4, 0.3, 0.5, 0.6]  # of each token; of the answers 0.3, 0.4, 0.3, 1.1
SUMS = [1.0, -0.5, 0.0, -0.5]  # of log-ratios, in Batch


def batch_with(**terms) -> Batch:
    batch = Batch().double()
    batch.terms = {name: torch.tensor(values, dtype=torch.float64, requires_grad=True)
                   for name, values in terms.items()}
    return batch


def run(spelled: str, batch) -> tuple[torch.Tensor, dict, torch.Tensor]:
    name, _, options = spelled.partition(" ")
    logps_N = LOGPS.double().requires_grad_()
    loss = bind_options(LOSSES[name], options, "--loss-options")
    loss_P, metrics = loss(batch.ratio(logps_N), logps_N, batch, TrainConfig(beta=B))
    return loss_P, metrics, logps_N


@pytest.mark.parametrize("spelled, alpha", [("tdpo1", 1.0), ("tdpo2", 0.5), ("tdpo2 alpha=0.2", 0.2)])
def test_tdpo_by_hand(spelled, alpha):
    loss_P, metrics, _ = run(spelled, batch_with(kl=KL))
    assert loss_P.tolist() == pytest.approx([-log_sigmoid(B * (1.5 - alpha * 0.1)),
                                             -log_sigmoid(B * (0.5 - alpha * 0.8))], rel=1e-6)
    assert metrics["kl_chosen"].tolist() == pytest.approx([0.3, 0.3])
    assert metrics["kl_rejected"].tolist() == pytest.approx([0.4, 1.1])
    assert not metrics["kl_chosen"].requires_grad


@pytest.mark.parametrize("spelled, chosen, rejected", [("tdpo1", -1.0, 1.0), ("tdpo2", 0.0, 0.5)])
def test_which_divergences_have_a_gradient(spelled, chosen, rejected):
    """beta s of the rejected answer's tokens times alpha; of the chosen one's -beta s in TDPO1, in TDPO2 exactly 0."""
    batch = batch_with(kl=KL)
    loss_P, _, _ = run(spelled, batch)
    (grad_N,) = torch.autograd.grad(loss_P.sum(), batch.terms["kl"])
    slope = [B * (1 - math.exp(-float(loss))) for loss in loss_P.detach()]
    expected = [chosen * slope[0]] * 2 + [rejected * slope[0], chosen * slope[1]] + [rejected * slope[1]] * 2
    assert grad_N.tolist() == pytest.approx(expected)
    assert (grad_N[[0, 1, 3]] == 0).all() == (spelled == "tdpo2")


@pytest.mark.parametrize("name", ["tdpo1", "tdpo2"])
def test_tdpo_on_means_has_means_of_both(name):
    """Weights that make means of the ratios (--length-normalize): the divergences are means a token beside them."""
    batch = batch_with(kl=KL)
    lens_S = batch.seq_lens_S.double()
    batch.weights_N, batch.averaged = batch.weights_N / lens_S.repeat_interleave(batch.seq_lens_S), True
    loss_P, metrics, _ = run(f"{name} alpha=1" if name == "tdpo2" else name, batch)
    assert metrics["kl_rejected"].tolist() == pytest.approx([0.4, 0.55])
    assert loss_P.tolist() == pytest.approx([-log_sigmoid(B * (0.5 + 0.5 - (0.4 - 0.15))),
                                             -log_sigmoid(B * (0.25 - (0.55 - 0.3)))])


def test_tisdpo_by_hand():
    """The divergence is weighted as the ratios are, and the chosen answer's is taken off."""
    batch = batch_with(reverse_kl=KL)
    batch.weights_N = torch.tensor([1.0, 0.5, 1.0, 1.0, 0.5, 2.0], dtype=torch.float64)
    batch.scale_S = torch.tensor([2.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    loss_P, _, _ = run("tisdpo", batch)
    first = 2 * (0.5 + 0.25) + 0.5 - 0.5 * (2 * (0.1 + 0.1) - 0.4)
    second = 0.25 - 0.5 * (0.3 - (0.25 + 1.2))
    assert loss_P.tolist() == pytest.approx([-log_sigmoid(B * first), -log_sigmoid(B * second)])
    plain, _, _ = run("tisdpo alpha=0", batch)
    assert plain.tolist() == pytest.approx(run("dpo", batch)[0].tolist())


def test_wpo_by_hand():
    """Pair 1: means of log p - log sum p^2 are -1 and -0.5; pair 2: more likely than expected, so 1."""
    batch = batch_with(collision=[-0.5, 0.5, -1.0, -4.0, -2.0, -2.0])
    loss_P, metrics, logps_N = run("wpo", batch)
    assert metrics["omega"].tolist() == pytest.approx([math.exp(-1.5), 1.0])
    expected = [math.exp(-1.5) * -log_sigmoid(B * 1.5), -log_sigmoid(B * 0.5)]
    assert loss_P.tolist() == pytest.approx(expected)
    grads = torch.autograd.grad(loss_P.sum(), [logps_N, batch.terms["collision"]], allow_unused=True)
    assert grads[1] is None  # omega is a constant
    assert grads[0][0].item() == pytest.approx(-math.exp(-1.5) * B * (1 - math.exp(log_sigmoid(B * 1.5))))


def anchored(**terms) -> Batch:
    """Anchors of three and one tokens, with log-ratios 1, 0, 9 and -1."""
    batch = batch_with(**terms)
    logps_M = torch.tensor([0.0, -1.0, 8.0, -3.0], dtype=torch.float64, requires_grad=True)
    batch.anchor = Anchor(logps_M, torch.tensor([-1.0, -1.0, -1.0, -2.0], dtype=torch.float64), torch.tensor([3, 1]))
    return batch


def test_the_triplet_by_hand():
    """Log-ratios 0.5, 0.5 | -0.5 and 0 | -0.5, 0. Pair 1: 0.25 + 0.25 - 2.25 is less than nothing. Pair 2: 1 - 0.25."""
    batch = anchored()
    loss_P, metrics, logps_N = run("triplet margin=0.25", batch)
    assert loss_P.tolist() == pytest.approx([0.0, 1.0]) == metrics["triplet"].tolist()
    grads = torch.autograd.grad(loss_P.sum(), [logps_N, batch.anchor.logps_M])
    assert grads[0].tolist() == pytest.approx([0, 0, 0, 2.0, -1.0, 0])  # 2 (w - a), -2 (l - a)
    assert grads[1].tolist() == pytest.approx([0, 0, 0, -1.0])  # 2 (a - w) - 2 (a - l)


def test_tidpo_is_the_sum_of_its_parts():
    batch = anchored(kl=KL)
    triplet_P, _, _ = run("triplet margin=0.3", batch)
    for spelled, base in (("tidpo margin=0.3", "dpo"), ("tidpo base=tdpo2,margin=0.3,alpha=0.7", "tdpo2 alpha=0.7")):
        loss_P, metrics, _ = run(spelled, batch)
        assert loss_P.tolist() == pytest.approx((run(base, batch)[0] + 0.1 * triplet_P).tolist())
        assert "triplet" in metrics
    assert run("tidpo gamma=0", batch)[0].tolist() == pytest.approx(run("dpo", batch)[0].tolist())


@pytest.mark.parametrize("options, needs, terms", [
    ("", ("ref", "anchor"), ()), ("base=tdpo2", ("ref", "ref_states", "anchor"), ("kl",)),
    ("base=tdpo2,gamma=0", ("ref", "ref_states"), ("kl",)), ("gamma=0", ("ref",), ()),
])
def test_what_tidpo_needs_follows_its_options(options, needs, terms):
    loss = bind_options(LOSSES["tidpo"], options, "--loss-options")
    assert loss_needs(loss) == needs and stated(loss, "terms", ()) == terms


@pytest.mark.parametrize("name", VOCABULARY_LOSSES)
@pytest.mark.parametrize("size", [0.0, 50.0, 1e4])
def test_they_are_finite_at_their_limits(name, size):
    batch = anchored(kl=[0.0] * 6, reverse_kl=[size] * 6, collision=[-size] * 6)
    logps_N = LOGPS.double().requires_grad_()
    ratio_S = size * torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64)
    loss_P, _ = LOSSES[name](ratio_S + 0 * logps_N.sum(), logps_N, batch, TrainConfig(beta=B))
    (grad_N,) = torch.autograd.grad(loss_P.sum(), logps_N)
    assert loss_P.isfinite().all() and grad_N.isfinite().all()


def test_needs_that_do_not_take_the_options_are_one_message(monkeypatch):
    """And what follows from an option without a default stops no --help-losses."""
    def strong(ratio_S, logps_N, batch, config, *, strength: float, other: int = 1):
        """A loss."""
    strong.needs = lambda strength, **_: ("ref", "ref_states") if strength > 0 else ("ref",)
    monkeypatch.setitem(LOSSES, "strong", strong)
    assert "A loss; strength=VALUE, other=1; by its options" in list_objectives()
    assert loss_needs(bind_options(strong, "strength=0", "--loss-options")) == ("ref",)
    strong.needs = lambda strength: ("ref",)
    with pytest.raises(InputError, match="strong.needs can't be called with the options of strong by name, strength, "
                                         "other: .*'other'"):
        loss_needs(bind_options(strong, "strength=0", "--loss-options"))


@pytest.mark.parametrize("options, message", [
    ("gamma=-1", "the factor of the triplet term must be at least 0"),
    ("gamma=0,margin=0.5", "margin=0.5 is not read: gamma=0 leaves the triplet term out"),
    ("alpha=0.7", "alpha=0.7 is not read: it is of base=tdpo2"),
])
def test_options_that_tidpo_would_not_read_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        run(f"tidpo {options}", batch_with(kl=KL))
