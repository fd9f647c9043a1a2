"""Anchors: an answer a pair that the policy writes as it is, and its log-probs under policy and reference.

A pair's anchor depends on the run's seed, the pair and the policy alone: not on the pairs beside it, on padding or on
the number of processes. What a model draws at random would: so each pair has random numbers of its own, and the token
that they choose is the only one left.

Legend: P pairs, M tokens of their anchors, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from twdpo.batch import Anchor, Outputs, PairBatch, SequenceBatch, lay_out
from twdpo.chat import Chat
from twdpo.models.generate import continuations, with_end, writing
from twdpo.models.policy import Policy
from twdpo.tokens import Example

# Of TI-DPO's code.
ANCHOR_TOKENS = 64  # most tokens of an anchor
TEMPERATURE, TOP_K, TOP_P = 0.8, 50, 0.95


def with_anchor(policy: Policy, run: Callable[[PairBatch], Outputs], batch: PairBatch, write: Callable,
                reference_logps: Callable[[SequenceBatch], torch.Tensor]) -> Outputs:
    """run(batch), whose outputs' batch holds `anchor`, with gradient where grad is enabled. All ranks.

    write: gives the pairs' anchors, as tokens. reference_logps: gives the reference's log-probs of sequences.
    """
    anchors = lay_out([(example.prompt_ids, np.array(ids, np.int32))
                       for example, ids in zip(batch.examples, write(policy, batch.examples))],  # all ranks
                      batch.packs, 1).to(batch.input_ids_RT.device)
    ref_logps_M = reference_logps(anchors)  # all ranks
    # Not inside the batch that goes into the pairs' forward: since torch 2.13 FSDP2 looks for gradients in dataclasses
    # too, and would hang the end of the root's backward pass on the anchors'.
    outputs = run(batch)
    logps_M = policy(anchors).logps_N  # all ranks
    return outputs._replace(batch=replace(outputs.batch, anchor=Anchor(logps_M, ref_logps_M, anchors.seq_lens_S)))


def write_anchors(policy: Policy, examples: list[Example], chat: Chat, seed: int, max_new_tokens: int
                  ) -> list[list[int]]:
    """An anchor to each example's prompt, in tokens: at least one, at most `max_new_tokens`, the end of the turn
    among them where it is reached. All ranks."""
    prompts = [example.prompt_ids.tolist() for example in examples]
    uniform_PM = torch.from_numpy(np.stack([np.random.default_rng([seed, example.pair.key % 2**64])
                                            .random(max_new_tokens) for example in examples]))
    draw = Draw(uniform_PM.to(next(policy.model.parameters()).device), max(map(len, prompts)))
    processors = [TemperatureLogitsWarper(TEMPERATURE), TopKLogitsWarper(TOP_K), TopPLogitsWarper(TOP_P), draw]
    with writing(policy.model):
        rows = continuations(policy.model, chat, prompts, max_new_tokens, policy.generate,
                             synced_gpus=dist.get_world_size() > 1, logits_processor=LogitsProcessorList(processors))
    return [with_end(chat, ids) for ids in rows]


class Draw(LogitsProcessor):
    """Leaves one token a row, drawn from the distribution by a given number in [0, 1): exact sampling.

    The number is looked up among the tokens by their ids, so that what rounding does to a probability, or to the order
    of two, moves the borders a little and no more.
    """

    def __init__(self, uniform_PM: torch.Tensor, prompt_tokens: int):
        """uniform_PM: fp64, of each new token. prompt_tokens: of the prompts, padding counted."""
        self.uniform_PM, self.prompt_tokens = uniform_PM, prompt_tokens

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        cumulative_PV = scores.softmax(dim=-1, dtype=torch.float64).cumsum(dim=-1)
        uniform_P1 = self.uniform_PM[:, input_ids.shape[1] - self.prompt_tokens, None]
        drawn_P1 = (cumulative_PV <= uniform_P1 * cumulative_PV[:, -1:]).sum(dim=-1, keepdim=True)
        return torch.full_like(scores, float("-inf")).scatter(1, drawn_P1, 0.0)
