"""Pairs that can't teach, by kind: counted aloud, and left out when --leave-out names the kind.

Legend: N response tokens, S sequences (2i chosen, 2i+1 rejected).
"""

from collections import Counter

import numpy as np

from twdpo.batch import PairBatch, collate
from twdpo.config import TrainConfig
from twdpo.dist import Process
from twdpo.flags import InputError
from twdpo.logratio import segment_sum
from twdpo.objective import Objective
from twdpo.rows import MicroBatch
from twdpo.tokens import Example
from twdpo.weights import WeightContext, source_needs

# What "N pairs ..." says of each kind that tokens show; "massless" needs the weight source.
WHAT = {
    "equal": "have two answers of the same tokens",
    "empty": "have an answer of which the cut left nothing",
    "cut": "have a prompt that was cut",
    "duplicate": "are repeats of an earlier one",
    "leak": "to train on have a prompt that is held out too",
}
ASKED_AT_ONCE = 64  # pairs that a weight source is asked for together


def is_equal(example: Example) -> bool:
    """Whether what is left of both answers is the same tokens, the end of the turn aside."""
    return np.array_equal(*(side.ids[side.content_N] for side in (example.chosen, example.rejected)))


def is_empty(example: Example) -> bool:
    """Whether nothing is left of an answer."""
    return not all(side.content_N.any() for side in (example.chosen, example.rejected))


def mark(kind: str, examples: list[Example], held_out_prompts: set) -> list[bool]:
    """Which examples of one set are of a kind. held_out_prompts: which training pairs may not have; none for others."""
    if kind == "duplicate":
        first: dict[int, int] = {}
        return [first.setdefault(example.pair.key, place) != place for place, example in enumerate(examples)]
    tests = {"equal": is_equal, "empty": is_empty, "cut": lambda example: example.prompt_is_cut,
             "leak": lambda example: example.pair.messages in held_out_prompts}
    return [tests[kind](example) for example in examples]


def leave_out(config: TrainConfig, train: list[Example], held_out_sets: dict[str, list[Example]], process: Process
              ) -> tuple[list[Example], dict[str, list[Example]], Counter]:
    """Count the pairs of each kind but "massless" aloud; (what stays of both, how many each kind took).

    A pair counts for the first kind that takes it, and what is kept is counted of the pairs that stay.
    """
    sets, took = [train, *held_out_sets.values()], Counter()
    for kind in sorted(WHAT, key=lambda kind: kind not in config.left_out):  # stable: else as they stand
        prompts = {example.pair.messages for part in sets[1:] for example in part}
        marks = [mark(kind, part, set() if place else prompts) for place, part in enumerate(sets)]
        number, held_out = sum(map(sum, marks)), sum(map(sum, marks[1:]))
        if number:
            process.print(describe(config, kind, WHAT[kind], number, held_out))
        if kind in config.left_out:
            sets = [[example for example, is_marked in zip(*both) if not is_marked] for both in zip(sets, marks)]
            took[kind] = number
    return sets[0], dict(zip(held_out_sets, sets[1:])), +took


def describe(config: TrainConfig, kind: str, what: str, number: int, held_out: int) -> str:
    """`3 pairs (1 held out) have ..., kept (...)`."""
    done = "left out" if kind in config.left_out else f"kept (--leave-out {kind} leaves them out)"
    return f"{number} pairs{f' ({held_out} held out)' if held_out else ''} {what}, {done}"


# ----------------------------------------------------------------------------------------------------------------------
# Pairs of which the weight source gives one side no mass

def check_massless(config: TrainConfig, objective: Objective, process: Process) -> None:
    """Say where weights can't be looked at before training; raise InputError when such pairs are to be left out, which
    is done before the policy is there."""
    reads = "the policy as it is in each step" if objective.is_online else "reference log-probs"
    if "massless" in config.left_out and (objective.is_online or reads_reference(objective)):
        raise InputError(f"--leave-out massless: the weight source {objective.source_name} reads {reads}, so which "
                         "pairs it gives no mass is not known before the policy is loaded; take massless out of the "
                         "list")
    if objective.is_online:
        process.print("pairs that have an answer without any weight can't be counted before the run: the weight source "
                      f"{objective.source_name} reads {reads}")


def reads_reference(objective: Objective) -> bool:
    """Whether the source's weights are known once the policy has given its reference log-probs, and not before."""
    return "ref" in source_needs(objective.source)


def leave_out_massless(config: TrainConfig, objective: Objective, examples: list[Example], num_train: int,
                       context: WeightContext, process: Process) -> set[int]:
    """Count pairs that have an answer without any raw weight aloud; the keys of those to leave out.

    examples: those that are used, `num_train` to train on first. All ranks, each of which asks for its share.
    """
    mine, keys = examples[process.rank::process.world_size], set()
    for start in process.progress(range(0, len(mine), ASKED_AT_ONCE), desc="weights", unit="batch", leave=False):
        batch = whole_batch(mine[start:start + ASKED_AT_ONCE], context)
        sums_S = segment_sum(objective.raw_weights(batch, context), batch.seq_lens_S)
        keys |= {example.pair.key for example, sums in zip(batch.examples, sums_S.view(-1, 2).tolist()) if 0 in sums}
    keys = set().union(*process.gather(keys))  # all ranks
    found = [place for place, example in enumerate(examples) if example.pair.key in keys]
    if not found:
        return set()
    one = objective.weigh(whole_batch([examples[found[0]]], context), context)
    becomes = "as uniform" if segment_sum(one.weights_N, one.seq_lens_S).all() else "nothing"
    what = "have an answer without any weight" + f": it counts {becomes}" * ("massless" not in config.left_out)
    process.print(describe(config, "massless", what, len(found), sum(place >= num_train for place in found)))
    return keys if "massless" in config.left_out else set()


def whole_batch(examples: list[Example], context: WeightContext) -> PairBatch:
    """These pairs as one batch on the CPU."""
    pairs = list(range(len(examples)))
    return collate(MicroBatch(tuple(pairs)), examples, pairs, context.logps.get("reference") or None)
