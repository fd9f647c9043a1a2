"""Micro-batches as tensors. The label shift happens here, once: after this file index n is a response token everywhere.

Legend: P pairs, S = 2P sequences (2i chosen, 2i+1 rejected), R rows (S plain ones, or one packed row) of T tokens, N
response tokens of all sequences one after another.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import NamedTuple

import numpy as np
import torch

from twdpo.dist import send
from twdpo.rows import MicroBatch, Ranges, RowOptions, pack, plan_packed_rows, plan_rows
from twdpo.tokens import Example
from twdpo.weights import Logps


class RefStates(NamedTuple):
    """What the reference's distributions at the response tokens are made of, frozen, in the compute dtype."""

    hidden_ND: torch.Tensor  # what predicts the response tokens
    head_VD: torch.Tensor
    bias_V: torch.Tensor | None


class Anchor(NamedTuple):
    """An answer a pair that the policy wrote as it is, and its log-probs. M tokens of all of them, end to end."""

    logps_M: torch.Tensor  # under the policy, with gradient
    ref_logps_M: torch.Tensor
    seq_lens_P: torch.Tensor  # int64 on the CPU


@dataclass
class SequenceBatch:
    """Sequences in rows, as a model reads them. Tensors live on the compute device, but for seq_lens_S, which stays on
    the CPU so that splitting by sequence never waits for the device."""

    input_ids_RT: torch.Tensor  # int64; plain rows are padded on the right
    positions_RT: torch.Tensor  # int64, of each token in its own sequence
    ranges: Ranges  # of each sequence in R*T, prompt and response: see twdpo.rows.PackedRow
    packs: bool  # whether the row is a packed one
    predict_N: torch.Tensor  # int64, index into R*T of the position whose output predicts response token n
    targets_N: torch.Tensor  # int64, the response tokens
    ref_logps_N: torch.Tensor  # fp32, 0 when the loss needs no reference
    weights_N: torch.Tensor  # fp32, as the op receives them
    scale_S: torch.Tensor  # fp32
    seq_lens_S: torch.Tensor  # int64 on the CPU, n = |y|
    # For terms that compare distributions; while the policy's forward runs.
    ref_states: RefStates | None = field(default=None, kw_only=True)

    def to(self, device: torch.device) -> "SequenceBatch":
        """A copy on `device`."""
        moved = {item.name: send(getattr(self, item.name), device) for item in fields(self)
                 if isinstance(getattr(self, item.name), torch.Tensor) and item.name != "seq_lens_S"}
        return replace(self, **moved)


@dataclass
class PairBatch(SequenceBatch):
    """One micro-batch: both sequences of each pair, and what is of pairs."""

    examples: list[Example]
    pair_weights_P: torch.Tensor  # fp32, of the data: what each pair's loss is multiplied with
    margins_P: torch.Tensor  # fp32, of the data, for losses that read them
    coefficient_P: torch.Tensor  # fp32, 1, or 0 in a copy
    is_copy: bool  # of another micro-batch, which only keeps the processes in step
    pair_count: int  # pairs of the global batch
    chosen_tokens: int  # response tokens of its chosen answers
    averaged: bool = False  # whether ratios are of one token already: divided by |y|, or means over what is selected
    means: Mapping[str, torch.Tensor] = field(default_factory=dict)  # over its pairs, for losses that have `statistics`
    terms: Mapping[str, torch.Tensor] = field(default_factory=dict)  # [N] each, for losses that have `terms`
    hidden_ND: torch.Tensor | None = None  # what predicts the response tokens; of a source without gradient
    logps_N: torch.Tensor | None = None  # of the policy as it is, without gradient, for sources
    # Of each sequence, [prompt and response tokens] fp32: |d target / d embedding|_1 (twdpo.models.attribution).
    input_gradients: tuple[torch.Tensor, ...] | None = None
    anchor: Anchor | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens that count towards throughput: no padding, no copies."""
        prompts = sum(2 * len(example.prompt_ids) for example in self.examples)
        return 0 if self.is_copy else sum(self.seq_lens_S.tolist()) + prompts


class Outputs(NamedTuple):
    """Of the policy's forward. (A tuple: FSDP2 must find its tensors.)"""

    ratio_S: torch.Tensor
    logps_N: torch.Tensor
    batch: PairBatch  # with the weights that were used
    terms: dict[str, torch.Tensor]  # what the op was asked for beside log-probs, [N] each
    hidden_ND: torch.Tensor | None = None  # with gradient, when they were asked for


def plan_micro_batches(pairs: list[int], examples: list[Example], world_size: int, rows: RowOptions
                       ) -> list[list[MicroBatch]]:
    """Micro-batches of every rank for one global batch of pairs, named by their index into `examples`."""
    if rows.packs:
        return plan_packed_rows(pairs, {pair: examples[pair].together for pair in pairs}, world_size, rows.token_budget)
    return plan_rows(pairs, {pair: examples[pair].longest for pair in pairs}, world_size, rows.token_budget)


def collate(micro_batch: MicroBatch, examples: list[Example], pairs: list[int],
            ref_logps: Mapping[int, Logps] | None = None, packs: bool = False) -> PairBatch:
    """Tensors of one micro-batch on the CPU, weights uniform.

    pairs: of the global batch that it is a part of. ref_logps: reference log-probs of the response tokens by the pair's
    key, or None (then 0). packs: one packed row, in which both sequences of a pair share their common beginning,
    instead of plain rows.
    """
    selected = [examples[pair] for pair in micro_batch.pairs]
    laid = lay_out([(example.prompt_ids, response.ids) for example in selected
                    for response in (example.chosen, example.rejected)], packs, 2)
    if ref_logps is not None:
        laid.ref_logps_N = torch.from_numpy(np.concatenate([side for example in selected
                                                            for side in ref_logps[example.pair.key]])).float()
    return PairBatch(
        **{item.name: getattr(laid, item.name) for item in fields(laid)}, examples=selected,
        pair_weights_P=torch.tensor([example.pair.weight for example in selected], dtype=torch.float32),
        margins_P=torch.tensor([example.pair.margin for example in selected], dtype=torch.float32),
        coefficient_P=torch.full((len(selected),), float(micro_batch.real)), is_copy=not micro_batch.real,
        pair_count=len(pairs), chosen_tokens=sum(len(examples[pair].chosen.ids) for pair in pairs))


def lay_out(sequences: list[tuple[np.ndarray, np.ndarray]], packs: bool, group: int) -> SequenceBatch:
    """(prompt, response) token ids as rows on the CPU: no reference, weights uniform. No response is empty.

    group: so many neighbours share their common beginning in a packed row.
    """
    rows = [np.concatenate(sequence) for sequence in sequences]
    if packs:
        row = pack([rows[place:place + group] for place in range(0, len(rows), group)])
        input_ids_RT = torch.from_numpy(row.input_ids_T).long()[None]
        positions_RT = torch.from_numpy(row.positions_T).long()[None]
        ranges = row.ranges
    else:
        input_ids_RT = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(each).long() for each in rows],
                                                       batch_first=True)
        positions_RT = torch.arange(input_ids_RT.shape[1]).expand(input_ids_RT.shape)
        starts = range(0, input_ids_RT.numel(), input_ids_RT.shape[1])
        ranges = tuple(((start, start + len(each)),) for start, each in zip(starts, rows))
    # The label shift: the token at position t is predicted by the output at position t - 1.
    predict_N = torch.from_numpy(np.concatenate([place[len(prompt) - 1:len(prompt) - 1 + len(response)] for place,
                                                 (prompt, response) in zip(places_of(ranges), sequences)]))
    targets_N = torch.from_numpy(np.concatenate([response for _, response in sequences])).long()  # some are read-only
    return SequenceBatch(input_ids_RT, positions_RT, ranges, packs, predict_N, targets_N, torch.zeros(len(targets_N)),
                         torch.ones(len(targets_N)), torch.ones(len(sequences)),
                         torch.tensor([len(response) for _, response in sequences]))


def places_of(ranges: Ranges) -> list[np.ndarray]:
    """Of each sequence, the places of its tokens in R*T, int64."""
    return [np.concatenate([np.arange(*piece) for piece in pieces]) for pieces in ranges]
