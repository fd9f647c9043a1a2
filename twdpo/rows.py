"""The row plan: which pairs share a micro-batch on which process. Pure functions of numbers; no tensors, no process.

Plain rows: every sequence (prompt + one answer) is a row of its own, padded on the right to the longest of its
micro-batch. Attention is causal and padding stands after every real token, so plain rows need no attention mask.
A packed row holds several sequences end to end, without padding; those of a group share their common beginning.

A pair is named by its index in the list of examples; its length is the tokens of its longer sequence.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Ranges = tuple[tuple[tuple[int, int], ...], ...]  # of a row's sequences: the [first, stop) pieces of each, in its order


@dataclass(frozen=True)
class MicroBatch:
    """Pairs that run together on one process. `real` is False for a copy that only keeps the processes in step:
    it runs forward and backward, with coefficient zero."""

    pairs: tuple[int, ...]
    real: bool = True


@dataclass(frozen=True)
class PackedRow:
    """Sequences end to end; ranges[s] makes up sequence s."""

    input_ids_T: np.ndarray  # int32
    positions_T: np.ndarray  # int32, of each token in its own sequence
    ranges: Ranges


@dataclass(frozen=True)
class RowOptions:
    """How micro-batches are made: packed rows or plain ones, and the most tokens in one, padding counted."""

    packs: bool
    token_budget: int


def num_steps(num_pairs: int, batch_size: int, epochs: int, max_steps: int) -> int:
    """Optimizer steps of a run; `max_steps` > 0 overrides `epochs`. The last batch of an epoch may be smaller."""
    return max_steps or epochs * math.ceil(num_pairs / batch_size)


def global_batch(step: int, num_pairs: int, batch_size: int, seed: int) -> list[int]:
    """Pairs of step `step` (0-based), over all processes: a new seeded order of all pairs each epoch."""
    epoch, place = divmod(step, math.ceil(num_pairs / batch_size))
    order = np.random.default_rng([seed, epoch]).permutation(num_pairs)
    return order[place * batch_size:(place + 1) * batch_size].tolist()


def plan_rows(pairs: list[int], lengths: Mapping[int, int] | Sequence[int], world_size: int, token_budget: int
              ) -> list[list[MicroBatch]]:
    """Micro-batches of every rank for one global batch; each rank gets the same number (FSDP2 calls are collective).

    lengths: tokens of each pair's longer sequence, by pair. token_budget: most tokens in a micro-batch,
    padding counted; a pair longer than it goes alone.
    """
    # Longest first, so that rows of one micro-batch are of like length; the index breaks ties.
    order = sorted(pairs, key=lambda pair: (-lengths[pair], pair))
    most_pairs = math.ceil(len(order) / world_size)  # no process idles while another holds two pairs that could part
    groups: list[list[int]] = []
    for pair in order:
        last = groups[-1] if groups else []
        if last and len(last) < most_pairs and 2 * (len(last) + 1) * lengths[last[0]] <= token_budget:
            last.append(pair)
        else:
            groups.append([pair])
    micro_batches = [MicroBatch(tuple(group)) for group in groups]
    copy = MicroBatch((order[-1],), real=False)
    micro_batches += [copy] * (-len(micro_batches) % world_size)
    return [micro_batches[rank::world_size] for rank in range(world_size)]


def plan_packed_rows(pairs: list[int], lengths: Mapping[int, int] | Sequence[int], world_size: int, token_budget: int
                     ) -> list[list[MicroBatch]]:
    """As `plan_rows` for packed rows, one a micro-batch, without padding. lengths: tokens of a pair there, by pair."""
    # No process idles while another holds what could be parted.
    share = math.ceil(sum(lengths[pair] for pair in pairs) / world_size)
    groups = fill_rows([lengths[pair] for pair in pairs], min(token_budget, share))
    micro_batches = [MicroBatch(tuple(sorted(pairs[place] for place in group))) for group in groups]
    copy = MicroBatch((min(pairs, key=lambda pair: (lengths[pair], pair)),), real=False)
    micro_batches += [copy] * (-len(micro_batches) % world_size)
    return [micro_batches[rank::world_size] for rank in range(world_size)]


def evaluation_batches(num_pairs: int, batch_size: int) -> list[list[int]]:
    """All pairs in order, in global batches."""
    return [list(range(start, min(start + batch_size, num_pairs))) for start in range(0, num_pairs, batch_size)]


def pack(groups: Iterable[Sequence[np.ndarray]], share: bool = True) -> PackedRow:
    """Lay the sequences of all groups into one row. With `share` the common beginning of a group's sequences stands
    once; each keeps at least its last token to itself.

    groups: of each, token ids of its sequences, none of them empty.
    """
    pieces, positions, ranges = [], [], []
    place = 0
    for group in groups:
        shared = common_beginning(group) if share and len(group) > 1 else 0
        first = place
        for number, ids in enumerate(group):
            own = ids[shared if number else 0:]
            pieces.append(own)
            positions.append(np.arange(len(ids) - len(own), len(ids)))
            before = ((first, first + shared),) if number and shared else ()
            ranges.append((*before, (place, place + len(own))))
            place += len(own)
    return PackedRow(np.concatenate(pieces).astype(np.int32), np.concatenate(positions).astype(np.int32), tuple(ranges))


def common_beginning(sequences: Sequence[np.ndarray]) -> int:
    """How many first tokens all sequences have in common, less than the length of the shortest."""
    most = min(map(len, sequences)) - 1
    equal = np.all([sequences[0][:most] == ids[:most] for ids in sequences[1:]], axis=0)
    return most if equal.all() else int(np.argmin(equal))


def fill_rows(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Indices into `lengths` by packed row, longest first, each put into the first row with room; what is longer than
    the budget goes alone."""
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        place = next((place for place, left in enumerate(room) if left >= lengths[index]), len(rows))
        if place == len(rows):
            rows.append([])
            room.append(token_budget)
        rows[place].append(index)
        room[place] -= lengths[index]
    return rows
