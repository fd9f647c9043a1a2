"""The row plan: every pair once, equal counts for every process, budgets kept; a pure function."""

import numpy as np
import pytest

from twdpo.rows import evaluation_batches, global_batch, num_steps, plan_rows


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("num_pairs", [1, 3, 16, 33])
@pytest.mark.parametrize("budget", [1, 200, 1000, 100_000])
def test_every_pair_once_and_equal_counts(world_size, num_pairs, budget):
    lengths = np.random.default_rng(num_pairs).integers(5, 300, 100).tolist()
    pairs = list(range(50, 50 + num_pairs))
    plan = plan_rows(pairs, lengths, world_size, budget)
    assert len(plan) == world_size and len({len(rank) for rank in plan}) == 1
    real = [pair for rank in plan for micro_batch in rank if micro_batch.real for pair in micro_batch.pairs]
    assert sorted(real) == pairs
    for micro_batch in (micro_batch for rank in plan for micro_batch in rank):
        tokens = 2 * len(micro_batch.pairs) * max(lengths[pair] for pair in micro_batch.pairs)
        assert tokens <= budget or len(micro_batch.pairs) == 1
        assert set(micro_batch.pairs) <= set(pairs)
    assert plan == plan_rows(pairs, lengths, world_size, budget)
    assert plan == plan_rows(pairs[::-1], lengths, world_size, budget)  # a set of pairs, whatever its order


def test_three_pairs_on_two_processes_leave_none_idle():
    plan = plan_rows([0, 1, 2], [10, 10, 10], 2, 10_000)
    assert [[micro_batch.real for micro_batch in rank] for rank in plan] == [[True], [True]]


def test_a_process_without_a_pair_runs_a_copy():
    (first,), (second,) = plan_rows([4], [0, 0, 0, 0, 900], 2, 100)
    assert first.real and not second.real and first.pairs == second.pairs == (4,)


def test_global_batches_cover_each_epoch_once_in_a_new_order():
    def epoch(number, seed=0):
        return [pair for step in range(4 * number, 4 * number + 4) for pair in global_batch(step, 10, 3, seed)]
    assert len(global_batch(3, 10, 3, 0)) == 1 == len(global_batch(7, 10, 3, 0))  # the last batch is smaller
    assert sorted(epoch(0)) == sorted(epoch(1)) == list(range(10))
    assert epoch(0) == epoch(0) != epoch(1) and epoch(0) != epoch(0, seed=1)


def test_steps():
    assert num_steps(10, 3, 2, 0) == 8 and num_steps(10, 3, 2, 5) == 5 and num_steps(10, 3, 1, 50) == 50
    assert evaluation_batches(5, 2) == [[0, 1], [2, 3], [4]] and evaluation_batches(0, 2) == []
