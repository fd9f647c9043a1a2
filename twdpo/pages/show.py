"""--show, and the pairs.html of a run: the first pairs, tokenised and weighed as training would do it."""

import itertools
import os
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np

from twdpo.batch import collate
from twdpo.config import TrainConfig
from twdpo.dataset import settle_bad_rows
from twdpo.dist import Process, pick_dtype
from twdpo.files import check_directory
from twdpo.inputs import Inputs, Need, check_inputs
from twdpo.models.memory import settle_memory
from twdpo.needs import NEEDS, open_context, open_needs
from twdpo.objective import Objective, find_objective
from twdpo.pages.pairs import ShownPair, describe_pair, format_pairs, write_page
from twdpo.rows import MicroBatch
from twdpo.tokens import Example
from twdpo.weights import WeightContext, source_needs

RUN_PAIRS = 8  # on a run's page


def show(config: TrainConfig, process: Process) -> None:
    """--show: print the first pairs as they would be trained, and write a page of them, OUT/show/show.html (without
    --output-dir runs/show/show.html). No model is loaded unless the weight source needs one. All ranks."""
    objective = find_objective(config, process)
    ahead = replace(objective, needs=frozenset(source_needs(objective.source)))
    needs = open_needs(config, ahead, process)
    config = replace(config, weights=config.weights or objective.source_name)
    folder = check_directory(Path(config.output_dir or "runs") / "show", "--output-dir")
    inputs = first_pairs(check_inputs(config, process, folder, []), config, config.show)
    context = None
    if is_weighed_ahead(objective):
        inputs, context = prepare_weights(config, process, inputs, needs)
    else:
        process.print(f"the weights of {objective.source_name} are made while training: none are shown")

    def write() -> str:
        shown = describe_pairs(inputs, objective, context)
        write_page(folder / "show.html", f"The first {len(shown)} pairs", objective.source_name, shown)
        colours = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        return format_pairs(shown, colours)
    process.print(process.on_main(write))
    process.print(f"{folder / 'show.html'}: the same as a page")


def write_run_pairs(folder: Path, inputs: Inputs, config: TrainConfig, objective: Objective, context: WeightContext
                    ) -> None:
    """pairs.html in a run's folder: its first training pairs, with their weights unless those are made in a forward."""
    shown = describe_pairs(first_pairs(inputs, config, RUN_PAIRS), objective, None if objective.is_online else context)
    write_page(folder / "pairs.html", "The first pairs of the run", objective.source_name, shown, "report.html")


def first_pairs(inputs: Inputs, config: TrainConfig, count: int) -> Inputs:
    """The first training pairs, in the order of the data, of those that the run touches; none held out."""
    touched: Iterable[int] = range(len(inputs.train))
    if inputs.steps(config) * config.batch_size < len(inputs.train):
        touched = sorted(pair for batch in inputs.first_epoch(config) for pair in batch)
    return replace(inputs, train=[inputs.train[pair] for pair in itertools.islice(touched, count)], held_out_sets={})


def is_weighed_ahead(objective: Objective) -> bool:
    """Whether the weights can be made without the policy."""
    return not objective.is_online and all(NEEDS[name].prepare_with_policy is Need.prepare_with_policy
                                           for name in source_needs(objective.source))


def prepare_weights(config: TrainConfig, process: Process, inputs: Inputs, needs: list[Need]
                    ) -> tuple[Inputs, WeightContext]:
    """What the source needs, made for these pairs alone as a run makes it; the pairs that have it. All ranks."""
    if needs:
        _, budget = settle_memory(config, inputs.model.config, pick_dtype(config.dtype, process.device), process)
        config = replace(config, model=inputs.model.name, micro_batch_tokens=budget, epochs=1, max_steps=0)
    for need in needs:
        if bad := need.check(config, inputs):
            unfit = {row.where for row in bad}
            left = inputs.without(example.pair.key for example in inputs.train if example.pair.where in unfit)
            if not config.skip_bad_rows or not left.train:
                settle_bad_rows(bad, False, Path(), len(inputs.train))
            inputs = left
    for need in needs:
        inputs = need.prepare(config, inputs)
    return inputs, open_context(config, needs)


def describe_pairs(inputs: Inputs, objective: Objective, context: WeightContext | None) -> list[ShownPair]:
    """The training pairs, with weights if there is a context to make them in. Raises InputError for bad weights."""
    chat = inputs.model.chat
    return [describe_pair(chat, example, token_weights(example, objective, context) if context else (None, None))
            for example in inputs.train]


def token_weights(example: Example, objective: Objective, context: WeightContext) -> tuple[np.ndarray, ...]:
    """n a_t of both answers, fp32 [N] each: what the loss multiplies log-ratios by; n times that where it averages."""
    batch = objective.weigh(collate(MicroBatch((0,)), [example], [0], context.logps.get("reference")), context)
    factors_S = batch.scale_S * (batch.seq_lens_S if batch.averaged else 1)
    return tuple((weights_N * factor).numpy() for weights_N, factor in
                 zip(batch.weights_N.split(batch.seq_lens_S.tolist()), factors_S))
