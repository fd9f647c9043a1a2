"""Where the host would wait for the device in a training step: tensors on `meta` have no values, so reading one is an
error, and a copy to them that is not marked non_blocking is noticed. tests/test_gpu.py counts on a GPU."""

from dataclasses import replace

import pytest
import torch
from models_of_tests import build
from test_packing import EXAMPLES
from torch.utils._python_dispatch import TorchDispatchMode

import train
from twdpo import logratio
from twdpo.batch import Anchor, RefStates, collate
from twdpo.config import TrainConfig
from twdpo.losses import LOSSES
from twdpo.models.attention import ATTENTION_NAME
from twdpo.models.policy import Policy
from twdpo.objective import bind_objective
from twdpo.rows import MicroBatch, RowOptions
from twdpo.weights import WEIGHTS, WeightContext

META = torch.device("meta")


class NoWaits(TorchDispatchMode):
    """Raises where a tensor is copied to `meta` in a way that waits on a GPU. (Reading one raises by itself.)"""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and args[0].device.type == "cpu":
            goes = torch.device(kwargs.get("device") or "cpu").type == "meta"
            if goes and not kwargs.get("non_blocking"):
                raise RuntimeError(f"a copy of {tuple(args[0].shape)} is waited for")
        return func(*args, **kwargs)


def stand_ins(policy, run, batch):
    """Of what is made around the policy's forward, on `meta`: a reference's distributions, an answer a pair."""
    head_VD = policy.model.get_output_embeddings().weight.detach()
    states = RefStates(head_VD.new_empty(len(batch.targets_N), head_VD.shape[1]), head_VD, None)
    lens_P = torch.arange(1, len(batch.examples) + 1)
    logps_M = torch.empty(int(lens_P.sum()), device=META, requires_grad=True)
    return run(replace(batch, ref_states=states, anchor=Anchor(logps_M, logps_M.detach(), lens_P)))


def made_run(loss: str, **flags) -> train.Run:
    config = TrainConfig(loss=loss, beta=0.1, **flags)
    objective = bind_objective(LOSSES[loss], WEIGHTS["uniform"], "uniform")
    policy = Policy(build("llama", ATTENTION_NAME).to(META, torch.bfloat16))  # with the attention of a GPU
    process = type("Process", (), {"device": META, "world_size": 1, "rank": 0})()
    return train.Run(config, process, objective, None, EXAMPLES, {}, WeightContext(config, passes=(stand_ins,)),
                     policy, None, RowOptions(True, 1000), 1, None)


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """No process group: totals are those of this process."""
    monkeypatch.setattr(train, "sum_over_processes", lambda totals, device: totals)


def step(run: train.Run, packs: bool) -> None:
    """Of train_step all that comes before its marked syncs, for one micro-batch."""
    batch = collate(MicroBatch((0, 1, 2, 3)), EXAMPLES, [0, 1, 2, 3], packs=packs)
    batch = run.objective.weigh(batch, run.context)
    totals = {}
    with NoWaits():
        (batch,) = train.with_means(run, [batch.to(META)])
        loss_P, _ = train.run_pairs(run, batch, totals)
        ((loss_P * batch.coefficient_P).sum() / batch.pair_count).backward()
        assert batch.num_tokens and all(total.device == META for total in totals.values())


@pytest.mark.parametrize("packs", [True, False], ids=["packed", "plain"])
@pytest.mark.parametrize("loss", LOSSES)
def test_no_loss_waits(loss, packs):
    step(made_run(loss), packs)


def test_a_step_with_statistics_of_tokens_does_not_wait():
    step(made_run("twdpo", token_stats=True), True)


def test_waits_are_noticed(monkeypatch):
    """The test above can fail: on a read, on a copy."""
    def reads(ratio_S, logps_N, batch, config):
        return LOSSES["dpo"](ratio_S, logps_N, batch, config)[0] * ratio_S.sum().item(), {}

    def copies(ratio_S, logps_N, batch, config):
        return LOSSES["dpo"](ratio_S, logps_N, batch, config)[0] * batch.seq_lens_S.to(ratio_S).sum(), {}
    for loss, message in ((reads, "meta"), (copies, "is waited for")):
        monkeypatch.setitem(LOSSES, "waits", loss)
        with pytest.raises(RuntimeError, match=message):
            step(made_run("waits"), True)


def test_sums_in_one_operation_equal_sums_by_sequence():
    values = torch.randn(9, dtype=torch.float64, requires_grad=True)
    for lens in ([3, 0, 5, 1], [9], [0, 9, 0]):
        lens_S, upstream = torch.tensor(lens), torch.randn(len(lens), dtype=torch.float64)
        found = []
        for function in (logratio.segment_sum, logratio.segment_sum_at_once):
            sums_S = function(values, lens_S)
            found.append((sums_S.detach(), torch.autograd.grad(sums_S, values, upstream)[0]))
        torch.testing.assert_close(*found)
