"""What a run is made from, known and checked before any weights are loaded: files, pairs in tokens, token weights."""

import importlib.util
import sys
import traceback
from dataclasses import dataclass, replace
from pathlib import Path

from twdpo.attention import ROLLOUT
from twdpo.chat import Example, tokenize_pairs
from twdpo.columns import WeightsColumns
from twdpo.config import InputError, TrainConfig
from twdpo.dist import Process
from twdpo.extraction import (
    check_judge_inputs,
    describe_extraction,
    extract_attention,
    open_judge_inputs,
    stored_pairs,
)
from twdpo.files import hash_file, hash_json
from twdpo.generate import describe_scores, extract_scores
from twdpo.judge import JudgeInputs
from twdpo.model import (
    cache_directory,
    check_length,
    find_model,
    fingerprint_model,
    load_model_config,
    load_tokenizer,
    pick_dtype,
)
from twdpo.pairs import BadRow, Dataset, load_dataset, settle_bad_rows, split_by_prompt
from twdpo.postprocess import alignment_shares
from twdpo.reference import example_key
from twdpo.verbalized import ScoresFile, describe_left_out
from twdpo.weights import WeightContext, check_covered
from twdpo.weights_file import WeightsFile, parse_layer

ALIGNMENT_SAMPLE = 256  # pairs that the printed shares of moved mass are of


@dataclass(frozen=True)
class Inputs:
    """What is known before any weights are loaded: the model's folder, and every pair in tokens."""

    model_dir: Path
    fingerprint: str
    tokenizer: object
    train: list[Example]
    held_out: list[Example]
    meta: dict[str, object]  # of the extraction to come; empty when there is none
    judge_inputs: JudgeInputs | None  # when there is one
    weights_file: WeightsFile | WeightsColumns | None  # that --weights names, or that was extracted
    data_fingerprint: str
    scores: ScoresFile | None = None  # for sources that need them


def check_inputs(config: TrainConfig, process: Process, run_dir: Path, needs: tuple[str, ...], weights_path: str
                 ) -> Inputs:
    """Read and check all pairs, as text and then as tokens. Raises InputError before anything is loaded. All ranks.

    needs: of the weight source. weights_path: what --weights names, "" when it is a source.
    """
    dataset = load_dataset(config.data, config.eval_data, config.eval_fraction > 0, config.empty_answers)
    total_rows = len(dataset.train) + len(dataset.held_out) + len(dataset.bad_rows)
    if not config.skip_bad_rows:
        settle_bad_rows(dataset.bad_rows, False, run_dir, total_rows)
    model_dir = find_model(config, process)
    tokenizer = load_tokenizer(model_dir, config.chat_template)
    opens = weights_path and "attention" in needs
    weights_file = open_weights(config, weights_path, tokenizer) if opens else None
    fingerprint = process.on_main(lambda: fingerprint_model(model_dir))
    train, held_out, bad = prepare_examples(config, dataset, tokenizer, process)
    meta, judge_inputs = {}, None
    if "attention" in needs and not weights_path:
        rollout = config.layer == ROLLOUT
        meta = describe_extraction(config, "" if rollout else ",".join(parse_layer(config.layer)[0]), "--layer",
                                   rollout, model_dir, fingerprint, tokenizer, dataset.fingerprint,
                                   process.device)
        judge_inputs = open_judge_inputs(config, meta, model_dir, tokenizer, process)
        stored = stored_pairs(weights_directory(config, meta), meta, process)
        pairs = [example.pair for example in train + held_out if example.pair.key not in stored]
        bad_judged = check_judge_inputs(judge_inputs, pairs, process)
        bad, unfit = bad + bad_judged, {row.where for row in bad_judged}
        train, held_out = ([example for example in part if example.pair.where not in unfit]
                           for part in (train, held_out))
    if weights_file and config.skip_bad_rows:
        bad += [BadRow(example.pair.where, f"no attention in {weights_path}", example.pair.to_row())
                for example in train + held_out if example.pair.key not in weights_file]
        train, held_out = ([example for example in part if example.pair.key in weights_file]
                           for part in (train, held_out))
    process.on_main(lambda: settle_bad_rows(dataset.bad_rows + bad, config.skip_bad_rows, run_dir, total_rows))
    if not train:
        raise InputError(f"--data {config.data}: no pair is left to train on")
    longest = max(example.longest for example in train + held_out)
    process.print(f"{len(train)} pairs to train on, {len(held_out)} held out; longest sequence: {longest} tokens")
    check_vocabulary(train + held_out, model_dir)
    if warning := check_length("the longest sequence (--max-length)", longest, load_model_config(model_dir)):
        process.print(warning)
    return Inputs(model_dir, fingerprint, tokenizer, train, held_out, meta, judge_inputs, weights_file,
                  dataset.fingerprint)


def leave_out_unscored(config: TrainConfig, inputs: Inputs, path: str, process: Process) -> Inputs:
    """Without the pairs whose answers the model scored too little of; it scores first unless `path` names scores.

    Raises InputError when none is left. All ranks.
    """
    everything = inputs.train + inputs.held_out
    directory = Path(path)
    if not path:
        meta = describe_scores(inputs.fingerprint, inputs.tokenizer, inputs.data_fingerprint,
                               pick_dtype(config.judge_dtype, process.device))
        directory = cache_directory(config) / "scores" / hash_json(meta)[:24]
        extract_scores(config, meta, directory, [example.pair for example in everything], inputs.model_dir,
                       inputs.tokenizer, process)
    scores = ScoresFile(directory)
    process.print(describe_left_out(scores, [example.pair.key for example in everything]))
    train, held_out = ([example for example in part if example.pair.key not in scores.left_out]
                       for part in (inputs.train, inputs.held_out))
    if not train:
        raise InputError("no pair is left to train on: the model's scores cover too little of every answer; use those "
                         "of another model (extract.py --verbalized, then --weights)")
    return replace(inputs, train=train, held_out=held_out, scores=scores)


def open_weights(config: TrainConfig, path: str, tokenizer) -> WeightsFile | WeightsColumns:
    """What --weights names, as a folder or as exported columns. Raises InputError."""
    if Path(path).is_dir():
        return WeightsFile(path, config.layer)
    other = load_tokenizer(Path(config.weights_tokenizer), config.chat_template) if config.weights_tokenizer else None
    return WeightsColumns(path, config.layer, other or tokenizer, config.empty_answers)


def weights_directory(config: TrainConfig, meta: dict[str, object]) -> Path:
    """Where the cache keeps the attention of an extraction."""
    return cache_directory(config) / "weights" / hash_json(meta)[:24]


def check_vocabulary(examples: list[Example], model_dir: Path) -> None:
    """Raise InputError when the tokenizer makes ids that the model has no embedding for."""
    largest = max(int(ids.max()) for example in examples
                  for ids in (example.prompt_ids, example.chosen.ids, example.rejected.ids) if len(ids))
    vocabulary = load_model_config(model_dir).get_text_config().vocab_size
    if largest >= vocabulary:
        raise InputError(f"{model_dir}: its tokenizer gives id {largest}, its model has {vocabulary} embeddings; they "
                         "don't belong together")


def prepare_examples(config: TrainConfig, dataset: Dataset, tokenizer, process: Process):
    """(training examples, held-out examples, bad rows): the held-out split, then tokens."""
    train_pairs, held_out_pairs = dataset.train, dataset.held_out
    if config.eval_fraction > 0 and not held_out_pairs and not config.eval_data:
        train_pairs, held_out_pairs = split_by_prompt(dataset.train, config.eval_fraction, config.seed)
    results = []
    for name, pairs in (("tokenise", train_pairs), ("tokenise held-out", held_out_pairs)):
        examples, bad, counts = tokenize_pairs(
            tokenizer, pairs, config.max_length, config.max_prompt_length,
            lambda items, name=name: process.progress(items, desc=name, unit="pair"))
        report_counts(counts, process)
        results.append((examples, bad))
    (train_examples, bad), (held_out, bad_held_out) = results
    return train_examples, held_out, bad + bad_held_out


def report_counts(counts: dict[str, int], process: Process) -> None:
    """Say what was cut or done apart."""
    for what, count in counts.items():
        if count:
            process.print(f"{what}: {count}")


def fill_weights(config: TrainConfig, inputs: Inputs, used: list[Example], process: Process) -> Inputs:
    """Extract the attention of the pairs that are used, if the source needs it and the cache lacks it. All ranks."""
    if not inputs.judge_inputs:
        return inputs
    directory = weights_directory(config, inputs.meta)
    extract_attention(config, inputs.meta, directory, [example.pair for example in used], inputs.judge_inputs,
                      inputs.model_dir, inputs.tokenizer, process)
    return replace(inputs, weights_file=WeightsFile(directory, config.layer))


def open_context(config: TrainConfig, inputs: Inputs, used: list[Example], process: Process) -> WeightContext:
    """What weight sources may read; it must cover the pairs that are used. Raises InputError."""
    for stored in filter(None, (inputs.weights_file, inputs.scores)):
        check_covered(stored, used)
    if inputs.weights_file:
        figures = inputs.weights_file.verdict_statistics([example.pair.key for example in used])
        if figures:
            process.print("judge: " + ", ".join(f"{name} {value:.3f}" for name, value in figures.items()))
        if config.align == "characters":
            sample = used[:ALIGNMENT_SAMPLE]
            shares = alignment_shares(sample, inputs.weights_file, config.judge_rounds)
            process.print(f"judge tokens to training tokens ({len(sample)} pairs): "
                          + ", ".join(f"{share:.1%} of the mass {name}" for name, share in shares.items()))
    return WeightContext(config, inputs.weights_file, inputs.scores)


def run_identity(config: TrainConfig, inputs: Inputs, context: WeightContext, aux_models: list[Path]
                 ) -> dict[str, str]:
    """Fingerprints of what the settings only name: a resumed run must be made from the same."""
    pairs = [[example_key(example) for example in part] for part in (inputs.train, inputs.held_out)]
    identity = {"the pairs (or their tokens)": hash_json(pairs), "the model": inputs.fingerprint,
                "the files of --import": hash_json([hash_file(Path(path)) for path in split_paths(config.imports)])}
    if aux_models:
        identity["the models of --aux-model"] = hash_json([fingerprint_model(folder) for folder in aux_models])
    for stored in filter(None, (context.attention, context.scores)):
        identity["the token weights"] = hash_json(stored.meta)
    return identity


def import_files(paths: str) -> None:
    """Run the files of --import, which add to LOSSES or WEIGHTS. Raises InputError for one that is not there."""
    for path in split_paths(paths):
        if not Path(path).is_file():
            raise InputError(f"--import {path}: no such file")
        name = f"twdpo_import_{Path(path).stem}"
        spec = importlib.util.spec_from_file_location(name, path)
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except Exception as error:  # noqa: BLE001 - whatever the user's file does
            frames = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
            line = error.lineno if isinstance(error, SyntaxError) else frames[-1] if frames else "?"
            raise InputError(f"--import {path}:{line}: {type(error).__name__}: {error}") from error


def split_paths(paths: str) -> list[str]:
    """The files of --import."""
    return [path.strip() for path in paths.split(",") if path.strip()]
