"""Inputs of a run, checked before any weights are loaded: model, pairs in tokens, and what loss and source need."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from twdpo.chat import Chat, describe_end
from twdpo.config import TrainConfig
from twdpo.data_files import BadRow
from twdpo.dataset import Dataset, load_dataset, settle_bad_rows, split_by_prompt
from twdpo.dist import Process
from twdpo.examples import tokenize_all
from twdpo.files import hash_file, hash_json
from twdpo.flags import InputError
from twdpo.forms import Reading
from twdpo.leave_out import leave_out, leave_out_massless, reads_reference
from twdpo.logps import example_key
from twdpo.loss_sum import options_bound
from twdpo.models.source import Model, check_length, check_vocabulary, describe_date, open_model
from twdpo.objective import Objective
from twdpo.plugins import name_of, split_paths
from twdpo.printed import check_templated
from twdpo.rows import RowOptions, global_batch, num_steps
from twdpo.tokens import Example
from twdpo.weights import WeightContext

ALIGNMENT_SAMPLE = 256  # pairs that the printed shares of moved mass are of


@dataclass(frozen=True)
class Inputs:
    """The model, and every pair in its tokens.

    held_out_sets: by the names of --eval-data, "" of one that has none. data, eval_data: names that find them again.
    """

    model: Model
    train: list[Example]
    held_out_sets: dict[str, list[Example]]
    data: str
    eval_data: str
    data_fingerprint: str

    @property
    def held_out(self) -> list[Example]:
        """Of all sets."""
        return [example for part in self.held_out_sets.values() for example in part]

    @property
    def evaluated(self) -> dict[str, list[Example]]:
        """The held-out sets that hold something."""
        return {name: part for name, part in self.held_out_sets.items() if part}

    @property
    def examples(self) -> list[Example]:
        return self.train + self.held_out

    def steps(self, config: TrainConfig) -> int:
        """Optimizer steps of the run."""
        return num_steps(len(self.train), config.batch_size, config.epochs, config.max_steps)

    def first_epoch(self, config: TrainConfig) -> list[list[int]]:
        """The global batches that the run touches first, of indices into `train`; later epochs reuse their pairs."""
        most = math.ceil(len(self.train) / config.batch_size)
        return [global_batch(step, len(self.train), config.batch_size, config.seed)
                for step in range(min(self.steps(config), most))]

    def used(self, config: TrainConfig) -> list[Example]:
        """The training pairs that the run touches, and the held-out ones. (All pairs while it is open which of them
        have weights: without some, a run that is shorter than an epoch touches others.)"""
        if "massless" in config.left_out:
            return self.examples
        return [self.train[pair] for batch in self.first_epoch(config) for pair in batch] + self.held_out

    def without(self, keys: Iterable[int]) -> "Inputs":
        """Without the pairs of these keys."""
        keys = set(keys)
        train, *parts = ([example for example in part if example.pair.key not in keys]
                         for part in (self.train, *self.held_out_sets.values()))
        return replace(self, train=train, held_out_sets=dict(zip(self.held_out_sets, parts)))

    def refuse_empty(self, config: TrainConfig, took: Mapping[str, int]) -> None:
        """Raise InputError when no pair is left to train on, or in a set of --eval-data. took: what was left out."""
        why = f": --leave-out took {', '.join(f'{count} ({kind})' for kind, count in took.items())}" if took else ""
        if not self.train:
            raise InputError(f"--data {config.data}: no pair is left to train on{why}")
        for name, part in self.held_out_sets.items():
            if config.eval_data and not part:
                raise InputError(f"--eval-data {config.eval_data}: no pair of {name or 'it'} is left{why}")


def check_inputs(config: TrainConfig, process: Process, run_dir: Path, needs: "list[Need]") -> Inputs:
    """Read and check all pairs, as text, then as tokens, then by what is needed of them. Raises InputError before
    anything is loaded. All ranks."""
    dataset = load_dataset(config.data, config.eval_data, config.eval_fraction > 0, Reading.of(config), config.seed)
    for line in dataset.report.lines():
        process.print(line)
    total_rows = len(dataset.train) + len(dataset.held_out) + len(dataset.bad_rows)
    if not config.skip_bad_rows:
        settle_bad_rows(dataset.bad_rows, False, run_dir, total_rows)
    model = open_model(config.model or "toy", process, config.chat_template, templated=config.templated,
                       apart=config.align == "edits", date=config.date)
    if model.printed_date:
        process.print(describe_date(model))
    train, held_out_sets, bad = prepare_examples(config, dataset, model.chat, process)
    train, held_out_sets, took = leave_out(config, train, held_out_sets, process)
    inputs = Inputs(model, train, held_out_sets, dataset.data, dataset.eval_data, dataset.fingerprint)
    for need in needs if train else ():
        unfit = {row.where: row for row in need.check(config, inputs)}
        inputs = inputs.without(example.pair.key for example in inputs.examples if example.pair.where in unfit)
        bad += unfit.values()
    process.on_main(lambda: settle_bad_rows(dataset.bad_rows + bad, config.skip_bad_rows, run_dir, total_rows))
    inputs.refuse_empty(config, took)
    longest = max(example.longest for example in inputs.examples)
    process.print(f"{len(inputs.train)} pairs to train on, {len(inputs.held_out)} held out; longest sequence: "
                  f"{longest} tokens")
    check_vocabulary(inputs.examples, model)
    if warning := check_length("the longest sequence (--max-length)", longest, model.config):
        process.print(warning)
    return inputs


def prepare_examples(config: TrainConfig, dataset: Dataset, chat: Chat, process: Process):
    """(training examples, held-out examples by set, bad rows): the held-out split, then tokens."""
    train_pairs, held_out_sets = dataset.train, dataset.held_out_sets
    if config.eval_fraction > 0 and not dataset.held_out and not config.eval_data:
        train_pairs, held_out_pairs = split_by_prompt(dataset.train, config.eval_fraction, config.seed)
        held_out_sets = {"": held_out_pairs}
    if line := check_templated(chat, dataset.train + dataset.held_out):
        process.print(line)
    results, all_bad = [], []
    parts = [("tokenise", train_pairs)] + [(f"tokenise held-out {name}".strip(), pairs)
                                           for name, pairs in held_out_sets.items()]
    for name, pairs in parts:
        examples, bad, counts = tokenize_all(chat, pairs, config.max_length, config.max_prompt_length, process, name)
        for what, count in counts.items():  # what was cut or done apart
            process.print(f"{what}: {count}") if count else None
        results.append(examples)
        all_bad += bad
    process.print(describe_end(chat))
    return results[0], dict(zip(held_out_sets, results[1:])), all_bad


def settle_massless(config: TrainConfig, objective: Objective, inputs: Inputs, context: WeightContext, process: Process,
                    has_policy: bool = False) -> Inputs:
    """Count the used pairs that have an answer without any weight; the inputs, without them if asked for. All ranks.

    has_policy: called twice, it acts as soon as all that the source reads is there.
    """
    if objective.is_online or reads_reference(objective) != has_policy:
        return inputs
    used = inputs.used(config)
    keys = leave_out_massless(config, objective, used, len(used) - len(inputs.held_out), context, process)
    left = inputs.without(keys) if keys else inputs
    left.refuse_empty(config, {"massless": len(inputs.examples) - len(left.examples)})
    return left


def check_pair_numbers(objective: Objective, inputs: Inputs, process: Process) -> None:
    """Say which weights and margins the data give pairs. Raises InputError for a loss that is to read margins where
    there are none."""
    pairs = [example.pair for example in inputs.examples]
    set_margins = [value for value in options_bound(objective.loss, "margin") if isinstance(value, bool)]
    reads_margins = any(set_margins)  # where it is a number it is another option
    for name, values, default in (("weights", [pair.weight for pair in pairs], 1.0),
                                  ("margins", [pair.margin for pair in pairs], 0.0)):
        if any(value != default for value in values):
            process.print(f"{name} of pairs: {min(values):g} to {max(values):g}, mean {sum(values) / len(values):g}")
        elif name == "margins" and reads_margins:
            raise InputError("--loss-options has margin=on and no pair has a margin: name the column that holds it "
                             "with --columns margin=COLUMN")
    if set_margins and not reads_margins and any(pair.margin for pair in pairs):
        process.print(f"{name_of(objective.loss)} does not read margins without --loss-options margin=on")


# ----------------------------------------------------------------------------------------------------------------------
# What losses and sources need

class Need:
    """What a loss or a source reads beside the pairs and the policy. One that needs no preparation is this itself."""

    def __init__(self, process: Process, objective: Objective):
        self.process, self.objective = process, objective

    def check(self, config: TrainConfig, inputs: Inputs) -> list[BadRow]:
        """Rows that it can't be had for. Raises InputError. Before any weights are loaded. All ranks."""
        return []

    def prepare(self, config: TrainConfig, inputs: Inputs) -> Inputs:
        """Make it, before the policy is loaded; the inputs, without pairs that turn out to be of no use. All ranks."""
        return inputs

    def prepare_with_policy(self, config: TrainConfig, inputs: Inputs, policy, rows: RowOptions) -> None:
        """Make it with the policy as it starts. All ranks."""

    def provide(self) -> dict[str, object]:
        """Fields of WeightContext."""
        return {}

    def settings(self) -> dict[str, object]:
        """Settings that it has settled, for config.json."""
        return {}

    def identity(self) -> dict[str, str]:
        """Fingerprints of what the settings only name: a resumed run must be made from the same. All ranks."""
        return {}


def run_identity(config: TrainConfig, inputs: Inputs, needs: list[Need], process: Process) -> dict[str, str]:
    """Fingerprints of what the settings only name: a resumed run must be made from the same. All ranks."""
    of_needs = [need.identity() for need in needs]
    model = inputs.model.fingerprint

    def identify() -> dict[str, str]:
        pairs = [[example_key(example) for example in part] for part in (inputs.train, *inputs.held_out_sets.values())]
        files = [hash_file(Path(path)) for path in split_paths(config.imports)]
        identity = {"the pairs (or their tokens)": hash_json(pairs), "the model": model,
                    "the files of --import": hash_json(files)}
        numbers = [[example.pair.weight, example.pair.margin] for example in inputs.examples]
        if any(number != [1.0, 0.0] for number in numbers):
            identity["the weights or margins of pairs"] = hash_json(numbers)
        return identity
    identity = process.on_main(identify)
    for each in of_needs:
        identity |= each
    return identity
