"""Weights and margins of pairs: what the data say a pair is worth reaches the loss, and nothing else."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from models_of_tests import build
from processes_of_tests import run_ranks
from runs_of_tests import assert_close_rows, read_rows
from test_packing import EXAMPLES

import train
from twdpo import dataset, inputs
from twdpo.batch import collate
from twdpo.config import TrainConfig
from twdpo.flags import InputError
from twdpo.losses import LOSSES
from twdpo.models.attention import ATTENTION_NAME
from twdpo.models.policy import Policy
from twdpo.objective import bind_objective, find_objective
from twdpo.plugins import bind_options
from twdpo.rows import MicroBatch, RowOptions
from twdpo.weights import WEIGHTS, WeightContext


def worth(number: int, weight: float = 1.0, margin: float = 0.0):
    """An example whose row has a weight and a margin."""
    example = EXAMPLES[number]
    return replace(example, pair=replace(example.pair, weight=weight, margin=margin))


@pytest.fixture
def run():
    config = TrainConfig(loss="dpo", beta=0.5)
    policy = Policy(build("llama", ATTENTION_NAME))
    objective = bind_objective(LOSSES["dpo"], WEIGHTS["uniform"], "uniform")
    return train.Run(config, None, objective, None, [], {}, WeightContext(config), policy, None, RowOptions(True, 1000),
                     1, None)


def gradient(run, examples, packs: bool = True) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(the gradient of one step on these pairs, its totals), as train_step has it."""
    pairs, totals = list(range(len(examples))), {}
    batch = run.objective.weigh(collate(MicroBatch(tuple(pairs)), examples, pairs, packs=packs), run.context)
    loss_P, _ = train.run_pairs(run, batch, totals)
    loss = (loss_P * batch.coefficient_P).sum() / batch.pair_count
    grads = torch.autograd.grad(loss, list(run.policy.parameters()), allow_unused=True)
    return torch.cat([grad.flatten() for grad in grads if grad is not None]), totals


def assert_same_gradient(ours: torch.Tensor, expected: torch.Tensor) -> None:
    """But for rounding, which of one element may be large beside it, and is small beside the whole."""
    assert (ours - expected).norm() <= 1e-4 * expected.norm()


@pytest.mark.parametrize("packs", [True, False], ids=["packed", "plain"])
def test_a_weight_of_two_is_the_pair_twice(run, packs):
    """Divided by the pairs that are there: two of them, or three."""
    twice, _ = gradient(run, [EXAMPLES[0], EXAMPLES[0], EXAMPLES[1]], packs)
    weighed, totals = gradient(run, [worth(0, 2.0), EXAMPLES[1]], packs)
    assert_same_gradient(2 * weighed, 3 * twice)
    alone, _ = gradient(run, [EXAMPLES[1]], packs)
    without, _ = gradient(run, [worth(0, 0.0), EXAMPLES[1]], packs)
    assert_same_gradient(2 * without, alone)
    assert (weighed - without).norm() > 0.1 * weighed.norm()


def test_the_logged_loss_is_the_one_that_is_optimised_and_other_metrics_count_pairs(run):
    _, plain = gradient(run, [EXAMPLES[0], EXAMPLES[1]])
    _, weighed = gradient(run, [worth(0, 3.0), worth(1, 0.0)])
    losses = [gradient(run, [EXAMPLES[number]])[1]["loss"][0] for number in range(2)]
    torch.testing.assert_close(weighed["loss"][0], 3 * losses[0], rtol=1e-5, atol=1e-6)
    assert plain.keys() == weighed.keys()
    for name in plain.keys() - {"loss"}:
        assert torch.equal(plain[name], weighed[name]), name


def test_weights_of_one_change_no_bit(run):
    """Against a step that knows nothing of them."""
    pairs = list(range(len(EXAMPLES)))
    batch = run.objective.weigh(collate(MicroBatch(tuple(pairs)), EXAMPLES, pairs, packs=True), run.context)
    outputs = train.forward(run.policy, batch, run.objective, run.context, run.config)
    loss_P, _ = run.objective.loss(outputs.ratio_S, outputs.logps_N, outputs.batch, run.config)
    grads = torch.autograd.grad(loss_P.sum() / len(pairs), list(run.policy.parameters()), allow_unused=True)
    ours, totals = gradient(run, EXAMPLES)
    assert torch.equal(ours, torch.cat([grad.flatten() for grad in grads if grad is not None]))
    assert totals["loss"][0] == loss_P.double().sum()


# ----------------------------------------------------------------------------------------------------------------------
# Margins

@pytest.mark.parametrize("name", ["dpo", "twdpo"])
def test_a_margin_is_subtracted_where_it_is_asked_for(name):
    batch = collate(MicroBatch((0, 1)), [worth(0, margin=0.5), worth(1, margin=2.0)], [0, 1])
    ratio_S = torch.tensor([3.0, 1.0, -1.0, 4.0])
    config = TrainConfig(beta=0.25)
    with_margin, without = (bind_options(LOSSES[name], options, "")(ratio_S, None, batch, config)[0]
                            for options in ("margin=on", ""))
    torch.testing.assert_close(with_margin, -F.logsigmoid(torch.tensor([0.5 - 0.5, -1.25 - 2.0])))
    torch.testing.assert_close(without, -F.logsigmoid(torch.tensor([0.5, -1.25])))


def test_a_margin_of_positions_is_refused(process):
    config = TrainConfig(loss="dpo", loss_options="margin=on,over=positions")
    with pytest.raises(InputError, match="margin=on is not read: a pair's margin is one of sums"):
        find_objective(config, process)
    find_objective(replace(config, loss_options="margin=on"), process)


def test_margins_that_nobody_reads_or_gives_are_said(process, capsys):
    plain = inputs.Inputs(None, EXAMPLES, {}, "", "", "")
    graded = replace(plain, train=[worth(0, margin=1.0), worth(1, weight=3.0)])
    objectives = [find_objective(TrainConfig(loss="dpo", loss_options=options), process)
                  for options in ("", "margin=on")]
    inputs.check_pair_numbers(objectives[0], plain, process)
    assert capsys.readouterr().out == ""
    inputs.check_pair_numbers(objectives[0], graded, process)
    printed = capsys.readouterr().out
    assert "weights of pairs: 1 to 3, mean 2\nmargins of pairs: 0 to 1, mean 0.5\n" in printed
    assert "dpo does not read margins without --loss-options margin=on" in printed
    inputs.check_pair_numbers(objectives[1], graded, process)
    assert "does not read" not in capsys.readouterr().out
    with pytest.raises(InputError, match="no pair has a margin: name the column"):
        inputs.check_pair_numbers(objectives[1], plain, process)


def test_a_loss_may_have_a_margin_of_its_own(process):
    def own(ratio_S, logps_N, batch, config, *, margin: float = 1.0):
        return margin - ratio_S[0::2], {}
    plain = inputs.Inputs(None, EXAMPLES, {}, "", "", "")
    objective = find_objective(TrainConfig(loss="dpo"), process)
    inputs.check_pair_numbers(replace(objective, loss=bind_options(own, "margin=2", "")), plain, process)


# ----------------------------------------------------------------------------------------------------------------------
# Whole runs, of data whose rows have weights and margins

def graded_dataset(*args, **kwargs):
    """The data set, with weights from 0 to 2 and margins by the pairs' content."""
    loaded = dataset.load_dataset(*args, **kwargs)
    return replace(loaded, train=[replace(pair, weight=pair.key % 3, margin=0.1 * (pair.key % 5))
                                  for pair in loaded.train])


GRADED = {"loss": "dpo", "loss_options": "margin=on", "max_steps": 4, "eval_every": 3}


@pytest.fixture
def graded(monkeypatch):
    monkeypatch.setattr(inputs, "load_dataset", graded_dataset)


@pytest.mark.slow
def test_micro_batches_and_processes_change_nothing(tmp_path, run_arguments, graded):
    train.main(run_arguments(tmp_path / "one", **GRADED))
    expected = read_rows(tmp_path / "one")
    train.main(run_arguments(tmp_path / "split", **GRADED, micro_batch_tokens=150))
    assert_close_rows(read_rows(tmp_path / "split"), expected)
    run_ranks("train", run_arguments(tmp_path / "two", **GRADED, micro_batch_tokens=250),
              constants={"twdpo.inputs.load_dataset": graded_dataset})
    assert_close_rows(read_rows(tmp_path / "two"), expected)
    train.main(run_arguments(tmp_path / "margins", **GRADED | {"loss_options": ""}))
    assert read_rows(tmp_path / "margins")[1]["loss"] != expected[1]["loss"]


def test_resume_refuses_other_weights(tmp_path, run_arguments, monkeypatch, capsys):
    argv = run_arguments(tmp_path / "run", loss="dpo", max_steps=1, save_every=1)
    train.main(argv)
    assert "the weights" not in (tmp_path / "run/checkpoints/step-0000001/manifest.json").read_text()
    monkeypatch.setattr(inputs, "load_dataset", graded_dataset)
    with pytest.raises(SystemExit):
        train.main([*argv, "--resume"])
    assert "since then the weights or margins of pairs changed" in capsys.readouterr().err


def test_held_out_pairs_are_weighed_too(tmp_path, run_arguments, graded):
    """Before the first step every pair's loss is log 2: the mean is that of the weights."""
    train.main(run_arguments(tmp_path / "run", loss="dpo", max_steps=1))
    first = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[0])
    assert first["eval/loss_stderr"] > 0 and first["eval/reward_accuracy"] == 0.5
    mean_weight = first["eval/loss"] / torch.log(torch.tensor(2.0)).item()
    assert mean_weight * first["eval/pairs"] == pytest.approx(round(mean_weight * first["eval/pairs"]), abs=1e-4)
    assert round(mean_weight * first["eval/pairs"]) != first["eval/pairs"]
