"""The optimiser: its rate in each step, and what decays."""

import pytest
import torch
from models_of_tests import MODELS, build
from runs_of_tests import read_rows
from transformers import Trainer, get_cosine_schedule_with_warmup

import train
from twdpo.config import TrainConfig
from twdpo.models.attention import ATTENTION_NAME
from twdpo.models.policy import Policy, load_policy, make_optimizer


@pytest.mark.parametrize("steps, ratio", [(10, 0.1), (10, 0.25), (64, 0.1), (7, 0.0), (5, 1.0), (1, 0.0), (1, 0.1)])
def test_rates_are_those_of_transformers_scheduler(steps, ratio):
    config = TrainConfig(lr=0.5, warmup_ratio=ratio)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    scheduler = get_cosine_schedule_with_warmup(optimizer, -(-int(ratio * 100) * steps // 100), steps)
    for step in range(steps):
        assert train.learning_rate(step, steps, config) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-15)
        optimizer.step()
        scheduler.step()


def test_a_run_that_moves_nothing_says_so(tmp_path, run_arguments, capsys):
    train.main(run_arguments(tmp_path / "run", loss="dpo", max_steps=1, eval_fraction=0, warmup_ratio=0.1))
    assert "the learning rate is 0 in every step" in capsys.readouterr().out
    train.main(run_arguments(tmp_path / "two", loss="dpo", max_steps=2, eval_fraction=0, warmup_ratio=0.1))
    assert "the learning rate is 0 in every step" not in capsys.readouterr().out
    assert [row["lr"] for row in read_rows(tmp_path / "two")] == [0, 1e-3]


@pytest.mark.parametrize("name", MODELS)
def test_what_decays_is_what_decays_in_transformers_trainer(name):
    model = build(name, ATTENTION_NAME)
    decaying, others = make_optimizer(Policy(model), 1.0, 0.1).param_groups
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    expected = set(Trainer.get_decay_parameter_names(None, model)) & set(names.values())  # a tied head has two names
    assert {names[id(parameter)] for parameter in decaying["params"]} == expected
    assert {names[id(parameter)] for parameter in others["params"]} == set(names.values()) - expected


def test_shards_decay_alike(toy_model, process):
    """Without a gradient all that moves is what decays."""
    policy = load_policy(toy_model, torch.bfloat16, process)  # sharded, of one process
    before = {name: parameter.full_tensor().detach().clone() for name, parameter in policy.named_parameters()}
    optimizer = make_optimizer(policy, 1.0, 0.1)
    for parameter in policy.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in policy.named_parameters():
        factor = 1.0 if "norm" in name else 0.9
        torch.testing.assert_close(parameter.full_tensor(), factor * before[name], msg=name)
