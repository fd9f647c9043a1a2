"""Train a policy with token-weighted DPO: pairs -> judge -> weights -> reference log-probs -> TwDPO -> checkpoint.

    torchrun train.py                                            the toy: no network, no GPU, about a minute
    torchrun train.py --model meta-llama/Meta-Llama-3-8B-Instruct                              one GPU
    torchrun --nproc_per_node 8 train.py --model MODEL --data pairs.jsonl                      one node
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 train.py --model MODEL

`python train.py` runs the same code in one process. Folders of --output-dir and --cache-dir are shared by all nodes.
"""

import importlib.util
import math
import resource
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from twdpo.attention import ROLLOUT
from twdpo.batch import PairBatch, collate, set_weights
from twdpo.chat import Example, tokenize_pairs
from twdpo.checkpoint import (
    drop_later_checkpoints,
    export_model,
    load_checkpoint,
    open_run,
    save_checkpoint,
    start_run,
)
from twdpo.columns import WeightsColumns
from twdpo.config import InputError, TrainConfig, parse_config
from twdpo.dist import Process, run_script, sum_over_processes
from twdpo.extraction import (
    check_judge_inputs,
    describe_extraction,
    describe_scores,
    extract_attention,
    extract_scores,
    open_judge_inputs,
    stored_pairs,
)
from twdpo.files import hash_file, hash_json
from twdpo.judge import JudgeInputs
from twdpo.log import Log, start_wandb, summarize
from twdpo.losses import LOSSES, needs_reference
from twdpo.metrics import Totals, add_totals, largest, means, pair_metrics, standard_errors, token_metrics
from twdpo.model import (
    cache_directory,
    check_length,
    find_model,
    fingerprint_model,
    load_model_config,
    load_policy,
    load_tokenizer,
    pick_dtype,
)
from twdpo.pairs import BadRow, Dataset, load_dataset, settle_bad_rows, split_by_prompt
from twdpo.reference import example_key, reference_directory, reference_logps
from twdpo.rows import evaluation_batches, global_batch, num_steps, plan_rows
from twdpo.verbalized import ScoresFile, describe_left_out
from twdpo.weights import WEIGHTS, WeightContext, alignment_shares, check_covered, find_source
from twdpo.weights_file import WeightsFile

ALIGNMENT_SAMPLE = 256  # pairs that the printed shares of moved mass are of


def main(argv: list[str] | None = None) -> None:
    """Run with a command line (default: sys.argv). Raises SystemExit on a user's error."""
    run_script("train.py", lambda: parse_config(TrainConfig, argv, __doc__.split("\n")[0]), train)


def train(config: TrainConfig, process: Process) -> None:
    """The whole run. All ranks."""
    import_files(config.imports)
    if config.loss not in LOSSES:
        raise InputError(f"--loss is {config.loss!r}: it must be one of {', '.join(LOSSES)}")
    loss = LOSSES[config.loss]
    source, weights_path = find_source(loss, config)
    config, run_dir, checkpoint = open_run(config, process)
    cache = cache_directory(config)
    budget = config.micro_batch_tokens or (16384 if process.device.type == "cuda" else 4096)
    dtype = pick_dtype(config.dtype, process.device)
    process.print(f"preset {config.preset}; loss {config.loss}, weights {source}; {process.world_size} process(es) on "
                  f"{process.device.type}, compute {str(dtype).removeprefix('torch.')}; micro-batches of {budget} "
                  f"tokens; output in {run_dir}")

    needs = getattr(WEIGHTS[source], "needs", ())
    extracts = "attention" in needs and not weights_path
    inputs = check_inputs(config, process, run_dir, needs, weights_path)
    if "scores" in needs:
        inputs = leave_out_unscored(config, inputs, weights_path, process)
    train_examples, held_out = inputs.train, inputs.held_out

    # What the run will touch: the batches of its first epoch (later ones reuse their pairs), and the held-out pairs.
    steps = num_steps(len(train_examples), config.batch_size, config.epochs, config.max_steps)
    first_epoch = [global_batch(step, len(train_examples), config.batch_size, config.seed)
                   for step in range(min(steps, math.ceil(len(train_examples) / config.batch_size)))]
    held_out_batches = evaluation_batches(len(held_out), config.batch_size)
    used = [train_examples[pair] for batch in first_epoch for pair in batch] + held_out
    wandb_runs: list = []  # one on the first process, none elsewhere
    process.on_main(lambda: wandb_runs.append(start_wandb(config, run_dir)))
    process.on_main(lambda: start_run(config, run_dir))

    if extracts:
        weights_path = weights_directory(config, inputs.meta)
        extract_attention(config, inputs.meta, weights_path, [example.pair for example in used], inputs.judge_inputs,
                          inputs.model_dir, inputs.tokenizer, process)
        inputs = replace(inputs, weights_file=WeightsFile(weights_path, config.layer))
    context = open_context(config, inputs, used, process)
    identity = process.on_main(lambda: run_identity(config, inputs, context))

    policy = load_policy(inputs.model_dir, dtype, process)
    train_logps = held_out_logps = None
    if needs_reference(loss):
        directory = reference_directory(cache, inputs.fingerprint, dtype, process.device)
        train_logps = reference_logps(policy, process, train_examples, first_epoch, budget, directory)
        held_out_logps = reference_logps(policy, process, held_out, held_out_batches, budget, directory)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=config.lr, weight_decay=config.weight_decay,
                                  fused=process.device.type == "cuda")

    def micro_batches(examples: list[Example], pairs: list[int], logps) -> list[PairBatch]:
        """This process's part of a global batch, with weights, on the device."""
        lengths = [example.longest for example in examples]
        plan = plan_rows(pairs, lengths, process.world_size, budget)[process.rank]
        batches = [collate(micro_batch, examples, len(pairs), logps) for micro_batch in plan]
        return [set_weights(batch, source, loss, context).to(process.device) for batch in batches]

    def evaluate(step: int) -> dict[str, float]:
        """One pass over the held-out pairs: an evaluation row of metrics.jsonl. All ranks."""
        totals: Totals = {}
        with torch.no_grad():
            for pairs in process.progress(held_out_batches, desc="evaluate", unit="batch", leave=False):
                for batch in micro_batches(held_out, pairs, held_out_logps):
                    run_pairs(policy, batch, loss, config, totals)
        totals = sum_over_processes(totals, process.device)
        row = {f"eval/{name}": value for name, value in means(totals).items()}
        row |= {f"eval/{name}_stderr": value for name, value in standard_errors(totals).items()}
        return {"step": step} | row | {"eval/pairs": len(held_out)}

    def export(name: str) -> None:
        """Write a Hugging Face model into the run's folder. All ranks."""
        export_model(run_dir / name, policy, inputs.tokenizer, inputs.model_dir, config.save_dtype, process)

    step, progress = 0, {"best_eval_loss": None}
    if checkpoint:
        step, progress = load_checkpoint(checkpoint, policy, optimizer, identity, process)
        process.on_main(lambda: drop_later_checkpoints(run_dir, step))
        process.print(f"resumed from {checkpoint} at step {step} of {steps}")
    log = Log(run_dir, step, wandb_runs[0] if wandb_runs else None, process)
    if held_out and step == 0:
        log.write(evaluate(0))
    with process.progress(total=steps, initial=step, desc="train", unit="step") as bar:
        while step < steps:
            started = time.perf_counter()
            pairs = global_batch(step, len(train_examples), config.batch_size, config.seed)
            batches = micro_batches(train_examples, pairs, train_logps)
            lr = learning_rate(step, steps, config)
            row, totals = train_step(policy, optimizer, batches, loss, config, lr, step + 1, process)
            if step == 0 and needs_reference(loss):
                process.print(describe_first_margin(totals, dtype))
            step += 1
            log.write({"step": step} | row | throughput(batches, len(pairs), started, process))
            bar.update(1)
            last = step == steps
            if held_out and (last or (config.eval_every and step % config.eval_every == 0)):
                row = evaluate(step)
                log.write(row)
                if progress["best_eval_loss"] is None or row["eval/loss"] < progress["best_eval_loss"]:
                    progress["best_eval_loss"] = row["eval/loss"]
                    export("best")
            if config.save_every and (last or step % config.save_every == 0):
                save_checkpoint(run_dir, step, policy, optimizer, progress, identity, process, config.keep_last)
    export("final")
    log.close()
    process.print(summarize(run_dir))


def train_step(policy, optimizer, batches: list[PairBatch], loss, config: TrainConfig, lr: float, step: int,
               process: Process) -> tuple[dict[str, float], Totals]:
    """One optimizer step over this process's micro-batches: (row, totals) of the global batch. All ranks.

    Raises FloatingPointError before the optimizer moves when the loss or the gradient is not finite.
    """
    totals: Totals = {}
    for number, batch in enumerate(batches, 1):
        policy.set_requires_gradient_sync(not config.no_sync or number == len(batches))
        loss_P = run_pairs(policy, batch, loss, config, totals)
        # Divided by the pairs of the global batch, so accumulation and world size change nothing.
        ((loss_P * batch.coefficient_P).sum() / batch.pair_count).backward()
    totals = sum_over_processes(totals, process.device)  # all ranks
    row = means(totals)  # sync
    max_norm = config.max_grad_norm or math.inf
    grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), max_norm).full_tensor().item()  # sync, all ranks
    if not (math.isfinite(row["loss"]) and math.isfinite(grad_norm)):
        raise FloatingPointError(f"step {step}: loss {row['loss']}, gradient norm {grad_norm}; the weights are those "
                                 f"of step {step - 1}. Lower --lr or --beta, or try --dtype float32")
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    return row | {"grad_norm": grad_norm, "lr": lr}, totals


def run_pairs(policy, batch: PairBatch, loss, config: TrainConfig, totals: Totals) -> torch.Tensor:
    """Forward one micro-batch: its losses [P]; its metrics are added to `totals`. All ranks."""
    ratio_S, logps_N, *stats = policy(batch, config.token_stats)
    loss_P, extra = loss(ratio_S, logps_N, batch, config)
    metrics = pair_metrics(loss_P, extra, ratio_S, logps_N, batch, config.beta)
    if stats:
        metrics |= token_metrics(*stats, batch)
    add_totals(totals, metrics, batch.coefficient_P)
    return loss_P


def describe_first_margin(totals: Totals, dtype: torch.dtype) -> str:
    """Before the first update policy and reference are one model: their largest margin, a warning if it is not 0."""
    margin = max(largest(totals)[name] for name in ("reward_margin", "weighted_reward_margin"))
    text = f"max |margin| at step 0: {margin:.3g}"
    limit = 1e-4 if dtype == torch.float32 else 1e-2
    if margin <= limit:
        return text
    return (f"warning: {text}, above {limit}: the reference log-probs are not those of the policy that starts; delete "
            "the reference cache")


def learning_rate(step: int, steps: int, config: TrainConfig) -> float:
    """Linear warmup, then cosine to 0; `step` counts from 0."""
    warmup = math.ceil(config.warmup_ratio * steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


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
    dataset = load_dataset(config.data, config.eval_data, with_held_out=config.eval_fraction > 0)
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
        meta = describe_extraction(config, "" if rollout else config.layer, "--layer", rollout, model_dir, fingerprint,
                                   tokenizer, dataset.fingerprint, process.device)
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
    return WeightsColumns(path, config.layer, other or tokenizer)


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


def open_context(config: TrainConfig, inputs: Inputs, used: list[Example], process: Process) -> WeightContext:
    """What weight sources may read; it must cover the pairs that are used. Raises InputError."""
    for stored in filter(None, (inputs.weights_file, inputs.scores)):
        check_covered(stored, used)
    if inputs.weights_file:
        figures = inputs.weights_file.verdict_statistics([example.pair.key for example in used])
        if figures:
            process.print("judge: " + ", ".join(f"{name} {value:.3f}" for name, value in figures.items()))
        sample = used[:ALIGNMENT_SAMPLE]
        shares = alignment_shares(sample, inputs.weights_file, config.rounds)
        process.print(f"judge tokens to training tokens ({len(sample)} pairs): "
                      + ", ".join(f"{share:.1%} of the mass {name}" for name, share in shares.items()))
    return WeightContext(config, inputs.weights_file, inputs.scores)


def run_identity(config: TrainConfig, inputs: Inputs, context: WeightContext) -> dict[str, str]:
    """Fingerprints of what the settings only name: a resumed run must be made from the same."""
    pairs = [[example_key(example) for example in part] for part in (inputs.train, inputs.held_out)]
    identity = {"the pairs (or their tokens)": hash_json(pairs), "the model": inputs.fingerprint,
                "the files of --import": hash_json([hash_file(Path(path)) for path in split_paths(config.imports)])}
    for stored in filter(None, (context.attention, context.scores)):
        identity["the token weights"] = hash_json(stored.meta)
    return identity


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


def import_files(paths: str) -> None:
    """Run the files of --import, which add to LOSSES or WEIGHTS. Raises InputError for one that is not there."""
    for path in split_paths(paths):
        if not Path(path).is_file():
            raise InputError(f"--import {path}: no such file")
        spec = importlib.util.spec_from_file_location(f"twdpo_import_{Path(path).stem}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)


def split_paths(paths: str) -> list[str]:
    """The files of --import."""
    return [path for path in paths.split(",") if path]


def throughput(batches: list[PairBatch], num_pairs: int, started: float, process: Process) -> dict[str, float]:
    """Rates over all processes since `started`, and the peak memory of one process. All ranks."""
    tokens = sum(process.gather(sum(batch.num_tokens for batch in batches)))
    seconds = time.perf_counter() - started
    if process.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # kilobytes on Linux
    return {"tokens_per_s": tokens / seconds, "pairs_per_s": num_pairs / seconds, "peak_memory_gib": peak / 2**30}


if __name__ == "__main__":
    main()
