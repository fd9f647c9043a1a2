"""The row plan: every pair once, equal counts for every process, budgets kept; a pure function."""

import numpy as np
import pytest

from twdpo.rows import common_beginning, evaluation_batches, fill_rows, global_batch, num_steps, pack, plan_rows


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


def test_packed_rows_share_the_beginning_of_a_group():
    """[1 2 3 | 4 5 | 6] and [7 8]: the second sequence of the first group takes 1 2 3 from the first."""
    groups = [[np.array([1, 2, 3, 4, 5]), np.array([1, 2, 3, 6])], [np.array([7, 8])]]
    row = pack(groups)
    assert row.input_ids_T.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert row.positions_T.tolist() == [0, 1, 2, 3, 4, 3, 0, 1]
    assert row.ranges == (((0, 5),), ((0, 3), (5, 6)), ((6, 8),))
    apart = pack(groups, share=False)
    assert apart.input_ids_T.tolist() == [1, 2, 3, 4, 5, 1, 2, 3, 6, 7, 8]
    for packed in (row, apart):
        sequences = [np.concatenate([packed.input_ids_T[first:stop] for first, stop in ranges]).tolist()
                     for ranges in packed.ranges]
        assert sequences == [ids.tolist() for group in groups for ids in group]


def test_every_packed_sequence_keeps_its_last_token():
    same = np.array([1, 2, 3])
    assert common_beginning([same, same]) == 2 and common_beginning([same, same[:1]]) == 0
    assert common_beginning([same, np.array([4, 2, 3])]) == 0
    assert pack([[same, same]]).ranges == (((0, 3),), ((0, 2), (3, 4)))


def test_rows_are_filled_longest_first_within_the_budget():
    assert fill_rows([3, 9, 4, 12, 2], 10) == [[3], [1], [2, 0, 4]]
    assert fill_rows([5, 5], 0) == [[0], [1]] and fill_rows([], 10) == []
