"""Packed rows give the log-probs and gradients of plain ones, on architectures that differ where it matters."""

import numpy as np
import pytest
import torch
from models_of_tests import MODELS, build_double
from precision_of_tests import InDouble, assert_exact

from twdpo.batch import collate, plan_micro_batches
from twdpo.flags import InputError
from twdpo.models.attention import ATTENTION_NAME
from twdpo.models.policy import Policy, load_policy, settle_packing
from twdpo.pairs import Pair
from twdpo.rows import MicroBatch, RowOptions, common_beginning, plan_packed_rows
from twdpo.tokens import Example, Response


def example(number: int, prompt: int, chosen: int, rejected: int, alike: int = 0) -> Example:
    """A pair of so many tokens; both answers begin with `alike` equal ones."""
    rng = np.random.default_rng(number)

    def response(length: int) -> Response:
        ids = np.concatenate([np.arange(5, 5 + alike), rng.integers(3, 97, length - alike)]).astype(np.int32)
        return Response(ids, np.zeros((length, 2), np.int32), np.ones(length, bool))
    pair = Pair((("user", "x"),), f"chosen {number}", "rejected", f"x:{number}")
    return Example(pair, rng.integers(3, 97, prompt).astype(np.int32), response(chosen), response(rejected))


EXAMPLES = [example(0, 9, 12, 5), example(1, 3, 8, 20, alike=4), example(2, 6, 1, 1), example(3, 15, 4, 4, alike=3)]


def run(policy, packs: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(log-probs, gradients of all parameters) for an uneven upstream gradient."""
    policy.zero_grad()
    logps_N = policy(collate(MicroBatch((0, 1, 2, 3)), EXAMPLES, [0, 1, 2, 3], packs=packs)).logps_N
    (logps_N * torch.linspace(-1, 1, len(logps_N), dtype=logps_N.dtype)).sum().backward()
    return logps_N.detach(), {name: parameter.grad.clone() for name, parameter in policy.named_parameters()
                              if parameter.grad is not None}


@pytest.mark.parametrize("name", MODELS)
def test_packed_rows_equal_plain_ones(name):
    policy = Policy(build_double(name, ATTENTION_NAME))
    with InDouble():
        (plain_N, plain_grads), (packed_N, packed_grads) = run(policy, False), run(policy, True)
    assert_exact(packed_N, plain_N)
    assert plain_grads.keys() == packed_grads.keys() and len(plain_grads) > 5
    for parameter, grad in packed_grads.items():
        assert_exact(grad, plain_grads[parameter], parameter)


def test_a_packed_row_holds_each_beginning_once():
    plain, packed = (collate(MicroBatch((0, 1, 2, 3)), EXAMPLES, [0, 1, 2, 3], packs=packs) for packs in (False, True))
    alike = [common_beginning([np.concatenate([each.prompt_ids, side.ids]) for side in (each.chosen, each.rejected)])
             - len(each.prompt_ids) for each in EXAMPLES]
    assert alike[1] >= 4 and alike[3] >= 3
    assert packed.input_ids_RT.shape == (1, sum(each.together - same for each, same in zip(EXAMPLES, alike)))
    assert plain.input_ids_RT.shape == (8, 23)
    for batch in (plain, packed):
        assert torch.equal(batch.targets_N, plain.targets_N)
        before = batch.input_ids_RT.flatten()[batch.predict_N]
        expected = [token for example in EXAMPLES for side in (example.chosen, example.rejected)
                    for token in (example.prompt_ids[-1], *side.ids[:-1])]
        assert before.tolist() == expected  # what stands before each response token


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("budget", [10, 60, 1000])
def test_packed_plan(world_size, budget):
    """Every pair once, budgets kept but by a lone pair, the same number of rows on every rank."""
    lengths = {number: 5 + 7 * number % 40 for number in range(20, 33)}
    plan = plan_packed_rows(list(lengths), lengths, world_size, budget)
    assert plan == plan_packed_rows(list(lengths), lengths, world_size, budget)
    assert len({len(rank) for rank in plan}) == 1 and len(plan) == world_size
    real = [micro_batch.pairs for rank in plan for micro_batch in rank if micro_batch.real]
    assert sorted(pair for pairs in real for pair in pairs) == sorted(lengths)
    assert all(len(pairs) == 1 or sum(lengths[pair] for pair in pairs) <= budget for pairs in real)
    copies = [micro_batch for rank in plan for micro_batch in rank if not micro_batch.real]
    assert len(copies) < world_size


def test_plans_by_rows():
    packed = plan_micro_batches([0, 1, 2, 3], EXAMPLES, 1, RowOptions(True, 1000))[0]
    assert packed == [MicroBatch((0, 1, 2, 3))]
    assert len(plan_micro_batches([0, 1, 2, 3], EXAMPLES, 1, RowOptions(False, 60))[0]) > 1


def test_packing_is_checked_at_the_start(toy_model, process, monkeypatch, capsys):
    policy = load_policy(toy_model, torch.float32, process)
    assert settle_packing(policy, "auto", EXAMPLES, process) and settle_packing(policy, "on", EXAMPLES, process)
    assert not settle_packing(policy, "off", EXAMPLES, process)
    monkeypatch.setattr("twdpo.models.attention.packed_attention", lambda query, key, value, ranges, options: query)
    assert not settle_packing(policy, "auto", EXAMPLES, process)
    assert "packed rows change log-probs" in capsys.readouterr().out
    with pytest.raises(InputError, match="--packing on: packed rows change log-probs"):
        settle_packing(policy, "on", EXAMPLES, process)
