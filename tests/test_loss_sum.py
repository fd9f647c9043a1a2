"""Sums of losses: --loss dpo+0.2*sft."""

from functools import partial

import pytest
import torch
from runs_of_tests import assert_close_rows, read_rows
from test_losses import LOGPS, B, Batch

import train
from twdpo.config import TrainConfig, parse_config
from twdpo.flags import InputError
from twdpo.loss_parts import loss_needs
from twdpo.loss_sum import find_loss, options_bound
from twdpo.losses import LOSSES
from twdpo.objective import bind_objective, settings_of_loss
from twdpo.plugins import inherit_attributes
from twdpo.weights import WEIGHTS


def value(loss, batch, statistics=None) -> torch.Tensor:
    batch.means = statistics or {}
    return loss(batch.ratio(LOGPS), LOGPS, batch, TrainConfig(beta=B))[0]


def test_a_sum_is_the_sum():
    loss_P = value(find_loss("dpo + 0.5*hinge", "", LOSSES), Batch())
    expected_P = value(LOSSES["dpo"], Batch()) + 0.5 * value(LOSSES["hinge"], Batch())
    torch.testing.assert_close(loss_P, expected_P)
    assert find_loss("dpo", "", LOSSES) is LOSSES["dpo"]
    torch.testing.assert_close(value(find_loss("2*dpo", "", LOSSES), Batch()), 2 * value(LOSSES["dpo"], Batch()))


def test_a_loss_without_a_reference_gets_none():
    """sft and simpo see log-probs, weighted, where the others see log-ratios."""
    batch = Batch()
    batch.weights_N = torch.tensor([0.5, 1.0, 2.0, 1.0, 0.5, 0.25])
    plain = Batch()
    plain.weights_N, plain.ref_logps_N = batch.weights_N, torch.zeros(6)
    loss = find_loss("dpo+0.2*sft+simpo", "", LOSSES)
    expected_P = value(LOSSES["dpo"], batch) + 0.2 * value(LOSSES["sft"], plain) + value(LOSSES["simpo"], plain)
    torch.testing.assert_close(value(loss, batch), expected_P)
    assert loss_needs(loss) == ("ref",) and loss_needs(find_loss("simpo+sft", "", LOSSES)) == ()


def test_gradients_are_those_of_finite_differences():
    loss, batch = find_loss("tdpo2+0.3*cpo+wpo", "", LOSSES), Batch().double()
    batch.terms = {"kl": torch.rand(6).double(), "collision": -5 - torch.rand(6).double()}  # omega is 1 and stays so
    batch.means = {}

    def of(logps_N):
        return loss(batch.ratio(logps_N), logps_N, batch, TrainConfig(beta=B))[0]
    assert torch.autograd.gradcheck(of, (LOGPS.double().requires_grad_(),))


def test_needs_and_terms_are_united_and_the_rest_is_the_first_ones():
    loss = find_loss("twdpo+0.5*tdpo2+triplet", "", LOSSES)
    assert set(loss_needs(loss)) == {"ref", "ref_states", "anchor"} and loss.terms == ("kl",)
    assert loss.norm == "mean1" and loss.default_source == "attention"
    assert not hasattr(find_loss("dpo+twdpo", "", LOSSES), "default_source")
    objective = bind_objective(find_loss("dpo+wpo", "", LOSSES), WEIGHTS["uniform"], "uniform")
    assert objective.norm == "none" and objective.terms == ("collision",)


def test_statistics_of_each():
    """Means of two losses don't meet, though they have one name."""
    loss = find_loss("dpo+kto_pair", "", LOSSES)
    found = loss.statistics(Batch().ratio(LOGPS), LOGPS, Batch())
    assert set(found) == {(1, "chosen"), (1, "rejected")}
    means = {name: value.mean() for name, value in found.items()}
    alone = {name: value for (_, name), value in means.items()}
    torch.testing.assert_close(value(loss, Batch(), means),
                               value(LOSSES["dpo"], Batch()) + value(LOSSES["kto_pair"], Batch(), alone))


def test_statistics_that_are_none(monkeypatch):
    """Alone such a loss runs, and so it does in a sum."""
    def plain(ratio_S, logps_N, batch, config):
        return LOSSES["dpo"](ratio_S, logps_N, batch, config)
    plain.statistics = None
    monkeypatch.setitem(LOSSES, "plain", plain)
    assert not hasattr(find_loss("dpo+plain", "", LOSSES), "statistics")
    assert set(find_loss("kto_pair+plain", "", LOSSES).statistics(Batch().ratio(LOGPS), LOGPS, Batch())) == {
        (0, "chosen"), (0, "rejected")}


def test_options_go_to_whom_they_name():
    loss = find_loss("simpo+0.5*cpo", "gamma_ratio=0.5,cpo.nll=0.25,simpo.nll=0.125", LOSSES)
    assert options_bound(loss, "nll") == [0.125, 0.25] and options_bound(loss, "gamma_ratio") == [0.5]
    assert options_bound(loss, "nll_over") == ["sequence"] and options_bound(LOSSES["dpo"], "margin") == [False]


def test_parts_are_logged_as_the_table_calls_them(monkeypatch):
    """Several names of one function are several losses."""
    monkeypatch.setitem(LOSSES, "rpo", partial(LOSSES["dpo"], nll=1.0))
    monkeypatch.setitem(LOSSES, "again", LOSSES["tdpo2"])
    inherit_attributes(LOSSES)
    batch = Batch()
    batch.terms, batch.means = {"kl": torch.rand(6)}, {}
    loss_P, metrics = find_loss("dpo+0.5*rpo+tdpo2+again", "", LOSSES)(batch.ratio(LOGPS), LOGPS, batch,
                                                                      TrainConfig(beta=B))
    parts = [metrics[f"loss_{name}"] for name in ("dpo", "rpo", "tdpo2", "again")]
    torch.testing.assert_close(loss_P, parts[0] + 0.5 * parts[1] + parts[2] + parts[3])
    assert {"kl_chosen", "kl_chosen_again"} <= metrics.keys()


def test_a_name_with_a_plus_is_a_name(monkeypatch):
    monkeypatch.setitem(LOSSES, "dpo+nll", LOSSES["hinge"])
    assert find_loss(" dpo+nll", "", LOSSES) is LOSSES["hinge"]


def parse(*argv) -> TrainConfig:
    return parse_config(TrainConfig, ["--model", "toy", *argv], "test", settings_of_loss)


def test_beta_and_settings_are_the_first_ones():
    """A second loss brings its own options alone; what is given stands above both."""
    assert parse("--loss", "simpo+0.1*dpo").beta == 2.0 and parse("--loss", "dpo+0.1*simpo").beta == 0.3
    config = parse("--loss", "simpo+robust", "--preset", "tuned")
    assert config.beta == 2.5 and config.loss_options == "simpo.gamma_ratio=0.55,robust.label_smoothing=0.1"
    config = parse("--loss", "dpo+robust", "--loss-options", "robust.label_smoothing=0.2")
    assert options_bound(find_loss(config.loss, config.loss_options, LOSSES), "label_smoothing") == [0.0, 0.2]


@pytest.mark.parametrize("text, options, message", [
    ("dpo+sfft", "", "--loss is dpo.sfft: 'sfft' must be one of twdpo, dpo"),
    ("dpp", "", "--loss is 'dpp': it must be one of twdpo, dpo"),
    ("dpo+x*sft", "", "'x' before sft must be a number"), ("dpo+0*sft", "", "the factor 0 of sft must be finite"),
    ("dpo+-1*sft", "", "the factor -1 of sft must be finite and > 0"), ("dpo+dpo", "", "dpo is in it twice"),
    ("dpo+", "", "'' must be one of"),
    ("dpo+hinge", "alpha=1,nlll=2", "has 'nlll=2': no loss of the sum has nlll"),
    ("simpo+cpo", "nll=1", "has 'nll=1': simpo and cpo have nll; say whose: simpo.nll=1"),
    ("simpo+cpo", "dpo.nll=1", "the losses of the sum are simpo, cpo"),
    ("simpo+cpo", "cpo.tau=1", "has 'tau=1': the options of cpo are"),
])
def test_bad_sums_are_one_message(text, options, message):
    with pytest.raises(InputError, match=message):
        find_loss(text, options, LOSSES)


def test_conflicting_norms_are_refused(monkeypatch):
    def shared(ratio_S, logps_N, batch, config):
        """A loss that wants the shorter answer's length."""
    shared.norm = "pair_min"
    monkeypatch.setitem(LOSSES, "shared", shared)
    with pytest.raises(InputError, match="twdpo normalises weights as mean1 and shared normalises weights as pair_min"):
        find_loss("twdpo+shared", "", LOSSES)


def test_the_norm_is_the_first_losss():
    """dpo takes a source's own: what twdpo would make of weights that are not of mean 1 is another loss's."""
    loss = find_loss("dpo+twdpo", "", LOSSES)
    assert bind_objective(loss, WEIGHTS["attention"], "attention").norm == "mean1"
    with pytest.raises(InputError, match="takes weights as decay gives them, none, and twdpo normalises them as mean1"):
        bind_objective(loss, WEIGHTS["decay"], "decay")
    assert bind_objective(find_loss("twdpo+dpo", "", LOSSES), WEIGHTS["decay"], "decay").norm == "mean1"


def test_a_run_of_a_sum(tmp_path, run_arguments):
    """How the batch is split changes nothing, statistics among it; each part is logged."""
    flags = {"loss": "dpo+0.5*sft+0.5*kto_pair", "weights": "decay", "max_steps": 3, "eval_every": 0,
             "loss_options": "sft.over=token"}
    train.main(run_arguments(tmp_path / "whole", packing="off", micro_batch_tokens=100_000, **flags))
    train.main(run_arguments(tmp_path / "split", packing="on", micro_batch_tokens=150, **flags))
    rows = read_rows(tmp_path / "whole")
    assert_close_rows(read_rows(tmp_path / "split"), rows)
    parts = [rows[1][f"loss_{name}"] for name in ("dpo", "sft", "kto_pair")]
    assert rows[1]["loss"] == pytest.approx(parts[0] + 0.5 * parts[1] + 0.5 * parts[2], rel=1e-5)


def test_a_sum_that_starts_is_tried_before_anything_is_loaded(tmp_path, run_arguments, capsys):
    with pytest.raises(SystemExit):
        train.main(run_arguments(tmp_path / "run", loss="dpo+exo_pair", loss_options="epsilon=0"))
    assert "--loss-options epsilon=0: " in capsys.readouterr().err
