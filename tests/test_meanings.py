"""The lines that say what a figure is: every name that is logged has one."""

import pytest
import torch
from test_losses import B
from test_vocabulary_losses import KL, LOGPS, anchored

import train
from twdpo.config import TrainConfig
from twdpo.log import read_rows
from twdpo.losses import LOSSES
from twdpo.metrics import MEANINGS, meaning


def names_of(run_dir) -> set[str]:
    """All names of metrics.jsonl, without the sets' names and the standard errors."""
    names = {name.rpartition("/")[2] for row in read_rows(run_dir / "metrics.jsonl") for name in row}
    return {name for name in names if not name.endswith("_stderr")} - {"step"}


@pytest.mark.slow
def test_every_name_that_a_run_of_the_toy_logs_has_a_line(toy_run):
    names = names_of(toy_run)
    assert len(names) > 15 and {"filler_drift", "planted_lift", "tokens_per_s", "pairs"} <= names
    assert not [name for name in names if not meaning(name)]


def test_every_name_that_a_run_logs_with_all_its_switches_has_a_line(tmp_path, run_arguments):
    train.main([*run_arguments(tmp_path / "run", max_steps=1, loss="simpo+0.5*dpo"), "--token-stats", "--profile"])
    names = names_of(tmp_path / "run")
    assert {"token_top1", "tflops", "data_share", "average_margin", "loss_simpo"} <= names
    assert not [name for name in names if not meaning(name)]
    assert meaning("eval/loss_simpo") == "the loss simpo alone, a term of the sum"


@pytest.mark.parametrize("name", LOSSES)
def test_every_figure_of_a_shipped_loss_has_a_line(name):
    batch = anchored(kl=KL, reverse_kl=KL, collision=KL)
    batch.means = {"chosen": torch.tensor(0.5), "rejected": torch.tensor(0.5)}
    logps_N = LOGPS.double()
    _, metrics = LOSSES[name](batch.ratio(logps_N), logps_N, batch, TrainConfig(beta=B))
    assert not [each for each in metrics if not meaning(each)]


def test_a_sums_figures_say_whose_they_are_and_a_forks_have_no_line():
    assert meaning("eval/kl_chosen_tdpo2") == MEANINGS["kl_chosen"] + " (of tdpo2)"
    assert [meaning(name) for name in ("active", "loss_scale", "kl_chosen_mine", "of/loss")] == [""] * 4
    assert all(0 < len(line) < 160 and line[-1] != "." for line in MEANINGS.values())
