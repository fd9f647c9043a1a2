"""What the memory plan and the operations of a step count of a reference beside the policy."""

from dataclasses import replace

import pytest
import torch
from reference_of_tests import dpo_kl
from test_plan import COST, GPUS, example

import train
from twdpo.batch import collate
from twdpo.config import TrainConfig
from twdpo.flags import InputError
from twdpo.losses import LOSSES
from twdpo.models import memory
from twdpo.models.memory import flops, most_tokens, plan_memory
from twdpo.objective import bind_objective
from twdpo.rows import MicroBatch
from twdpo.weights import WEIGHTS


@pytest.mark.parametrize("place, cost, machine, expected", [
    ("memory", COST, (2, 0), 2 * (1000 / 2 + 250)),  # its shards; its head, gathered
    ("memory", COST, (8, 4), 2 * (1000 / 4 + 250)),
    ("memory", COST, (1, 0), 2 * (1000 + 250)),
    ("memory", replace(COST, compute_bytes=4), (1, 0), 4 * 1000),  # nothing is gathered
    ("disk", COST, (2, 0), 2 * (250 / 2 + 250)),  # the head alone
    ("disk", COST, (1, 0), 2 * 250),
])
def test_plan_by_hand(place, cost, machine, expected):
    world_size, shards = machine
    without, plan = (plan_memory(cost, world_size, 1 << 20, "full", shards=shards, reference=each)
                     for each in ("", place))
    assert "frozen reference" not in without and plan["frozen reference"] == expected
    hidden = (1 << 20) * 8 * cost.compute_bytes
    assert plan["layers and fused op"] - without["layers and fused op"] == hidden
    assert plan["peak"] - without["peak"] == expected + hidden


def test_the_plan_counts_a_second_forward_and_the_gradients_that_wait_for_the_first():
    """As much as a micro-batch's activations again, and every gradient whole in the compute dtype."""
    plain, plan = (plan_memory(COST, 2, 1000, "full", reference=each) for each in ("memory", "anchors"))
    more = plan["anchors' forward"] - plan_memory(COST, 2, 0, "full", reference="anchors")["anchors' forward"]
    assert plan["peak"] - plain["peak"] == plan["anchors' forward"] == more + 2 * COST.params
    assert more == pytest.approx(1000 * (COST.num_layers * COST.hidden_size * 2 + COST.saved_bytes / COST.num_layers
                                         + COST.working_bytes))
    objective = bind_objective(LOSSES["tidpo"], WEIGHTS["uniform"], "uniform")
    assert objective.place_of_reference(TrainConfig()) == "anchors"


def test_a_run_plans_with_it(monkeypatch, toy_model, capsys):
    """Fewer tokens fit beside it, by the flags and by the loss."""
    large = replace(COST, saved_bytes=1e6, params=4 * 10**9, layers_params=33 * 10**8, head_params=6 * 10**8)
    gpu = type("Properties", (), {"total_memory": 44 * 2**30})()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    monkeypatch.setattr(memory, "model_cost", lambda *_: large)
    monkeypatch.setitem(LOSSES, "dpo_kl", dpo_kl)
    tokens, printed = [], []
    for loss, place in (("dpo", "memory"), ("dpo_kl", "disk"), ("dpo_kl", "memory")):
        config = TrainConfig(loss=loss, ref_states=place, checkpointing="none")
        objective = bind_objective(LOSSES[loss], WEIGHTS["uniform"], "uniform")
        tokens.append(memory.settle_memory(config, None, torch.bfloat16, GPUS, objective.place_of_reference(config))[1])
        train.main(["--model", str(toy_model), "--plan", "--loss", loss, "--ref-states", place])
        printed.append("frozen reference" in capsys.readouterr().out)
    assert tokens[0] > tokens[1] > tokens[2] == most_tokens(large, 2, 44.0, "none", reference="memory") > 0
    assert printed == [False, True, True]
    gpu.total_memory = 30 * 2**30
    with pytest.raises(InputError, match="to try, or --ref-states disk, without a second model"):
        memory.settle_memory(config, None, torch.bfloat16, GPUS, "memory")


def test_operations_by_hand():
    """A third of the policy's for the reference's forward; with hidden states on disk, of the head alone."""
    batch = collate(MicroBatch((0,)), [example(3, 2, 4)], [0])
    layers, head = 6 * 400 * 12 + 12 * 32 * (25 + 49) / 2, 6 * 250 * 6
    assert flops(COST, batch) == layers + head
    assert flops(COST, batch, "disk") == pytest.approx(layers + 8 * 250 * 6)
    assert flops(COST, batch, "memory") == pytest.approx((layers + head) * 4 / 3)
