"""Train a policy with token-weighted DPO: pairs -> judge -> weights -> reference log-probs -> TwDPO -> checkpoint.

    torchrun train.py                                            the toy: no network, no GPU, about a minute
    torchrun train.py --model meta-llama/Meta-Llama-3-8B-Instruct                              one GPU
    torchrun --nproc_per_node 8 train.py --model MODEL --data pairs.jsonl                      one node
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 train.py --model MODEL

`python train.py` runs the same code in one process. Folders of --output-dir and --cache-dir are shared by all nodes.
"""

import math
import resource
import time
from dataclasses import replace

import torch

from twdpo.attention import packed
from twdpo.auxiliary import auxiliary_logps, find_aux_models
from twdpo.batch import PairBatch, collate, plan_micro_batches, set_weights
from twdpo.chat import Example
from twdpo.checkpoint import (
    drop_later_checkpoints,
    export_model,
    load_checkpoint,
    open_run,
    save_checkpoint,
    start_run,
)
from twdpo.config import InputError, TrainConfig, parse_config
from twdpo.curves import write_curves
from twdpo.dist import Process, clip_gradients, run_script, sum_over_processes
from twdpo.generate import sample_answers
from twdpo.inputs import check_inputs, fill_weights, leave_out_unscored, open_context, run_identity
from twdpo.log import Log, StageClock, start_wandb, summarize
from twdpo.losses import LOSSES, needs_reference
from twdpo.metrics import Totals, add_totals, largest, means, pair_metrics, standard_errors, token_metrics
from twdpo.model import (
    cache_directory,
    check_architecture,
    load_model_config,
    load_policy,
    pick_dtype,
    settle_packing,
)
from twdpo.objective import find_objective, list_objectives, settings_of_loss
from twdpo.plan import GIB, ModelCost, flops, model_cost, peak_tflops, plan_for, settle_memory
from twdpo.planted import add_planted, source_lift
from twdpo.reference import reference_directory, reference_logps
from twdpo.report import write_report
from twdpo.rows import RowOptions, evaluation_batches, global_batch, num_steps
from twdpo.weights import WEIGHTS, source_needs
from twdpo.weights_file import WeightsFile

SAMPLED_TOKENS = 128  # most tokens of an answer of --sample


def main(argv: list[str] | None = None) -> None:
    """Run with a command line (default: sys.argv). Raises SystemExit on a user's error."""
    before = dict(LOSSES), dict(WEIGHTS)
    try:
        run_script("train.py", lambda: parse_config(TrainConfig, argv, __doc__.split("\n")[0], list_objectives(),
                                                    settings_of_loss), train)
    finally:  # what --import added is this run's
        for table, old in zip((LOSSES, WEIGHTS), before):
            table.clear()
            table.update(old)


def train(config: TrainConfig, process: Process) -> None:
    """The whole run. All ranks."""
    if config.plan:
        process.print(plan_for(config, process))
        return
    loss, source, source_name, weights_path = find_objective(config, process)
    if process.world_size % config.replicate:
        raise InputError(f"--replicate is {config.replicate}: {process.world_size} processes can't hold as many equal "
                         "copies")
    config, run_dir, checkpoint = open_run(config, process)
    cache = cache_directory(config)
    dtype = pick_dtype(config.dtype, process.device)
    options = f" ({config.loss_options})" if config.loss_options else ""
    process.print(f"preset {config.preset}; loss {config.loss}{options}, weights {source_name}, beta {config.beta}; "
                  f"{process.world_size} process(es) on {process.device.type}, compute "
                  f"{str(dtype).removeprefix('torch.')}; output in {run_dir}")

    needs = source_needs(source)
    inputs = check_inputs(config, process, run_dir, needs, weights_path)
    aux_models = find_aux_models(config, needs, inputs, process)
    if "scores" in needs:
        inputs = leave_out_unscored(config, inputs, weights_path, process)
    train_examples, held_out = inputs.train, inputs.held_out
    check_architecture(load_model_config(inputs.model_dir), config.checkpointing.replace("auto", "none"))
    checkpointing, budget = settle_memory(config, load_model_config(inputs.model_dir), dtype, process)
    process.print(f"micro-batches of {budget} tokens, checkpointing {checkpointing}")

    # What the run will touch: the batches of its first epoch (later ones reuse their pairs), and the held-out pairs.
    steps = num_steps(len(train_examples), config.batch_size, config.epochs, config.max_steps)
    first_epoch = [global_batch(step, len(train_examples), config.batch_size, config.seed)
                   for step in range(min(steps, math.ceil(len(train_examples) / config.batch_size)))]
    held_out_batches = evaluation_batches(len(held_out), config.batch_size)
    used = [train_examples[pair] for batch in first_epoch for pair in batch] + held_out
    wandb_runs: list = []  # one on the first process, none elsewhere
    process.on_main(lambda: wandb_runs.append(start_wandb(config, run_dir)))
    process.on_main(lambda: start_run(config, run_dir))

    inputs = fill_weights(config, inputs, used, process)
    context = open_context(config, inputs, used, process)
    context = replace(context, aux=auxiliary_logps(config, needs, aux_models, used, budget, process))
    identity = process.on_main(lambda: run_identity(config, inputs, context, aux_models))

    policy = load_policy(inputs.model_dir, dtype, process, checkpointing, config.replicate, config.compile)
    rows = RowOptions(settle_packing(policy, config.packing, used, process), budget)
    config = replace(config, packing="on" if rows.packs else "off")
    process.on_main(lambda: start_run(replace(config, overwrite=False), run_dir))  # config.json holds the outcome
    process.print("rows are packed" if rows.packs else "rows are plain: one sequence each, padded")
    train_logps = held_out_logps = None
    if needs_reference(loss) or "ref" in needs:
        directory = reference_directory(cache, inputs.fingerprint, dtype, process.device, rows.packs,
                                        config.compile)
        train_logps = reference_logps(policy, process, train_examples, first_epoch, rows, directory)
        held_out_logps = reference_logps(policy, process, held_out, held_out_batches, rows, directory)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True)

    def micro_batches(examples: list[Example], pairs: list[int], logps) -> list[PairBatch]:
        """This process's part of a global batch, with weights, on the device."""
        plan = plan_micro_batches(pairs, examples, process.world_size, rows)[process.rank]
        batches = [collate(micro_batch, examples, pairs, logps, rows.packs) for micro_batch in plan]
        return [set_weights(batch, source, loss, context).to(process.device) for batch in batches]

    is_planted = config.data == "toy" and not config.eval_data  # it is known which words decide

    def evaluate(step: int) -> dict[str, float]:
        """One pass over the held-out pairs: an evaluation row of metrics.jsonl. All ranks."""
        totals: Totals = {}
        with torch.no_grad():
            for pairs in process.progress(held_out_batches, desc="evaluate", unit="batch", leave=False):
                for batch in with_means(policy, micro_batches(held_out, pairs, held_out_logps), loss, process):
                    run_pairs(policy, batch, loss, config, totals)
                    if is_planted:
                        add_planted(totals, policy, batch, needs_reference(loss))
        totals = sum_over_processes(totals, process.device)
        row = {f"eval/{name}": value for name, value in means(totals).items()}
        row |= {f"eval/{name}_stderr": value for name, value in standard_errors(totals).items()}
        if is_planted:
            row["eval/planted_lift"], _ = source_lift(source, held_out, context, held_out_logps)
        return {"step": step} | row | {"eval/pairs": len(held_out)}

    def sample(step: int) -> None:
        """The policy's answers to the first held-out prompts, into samples.jsonl. All ranks."""
        examples = list({example.pair.messages: example for example in held_out}.values())[:config.sample]
        if examples:
            answers = sample_answers(policy, inputs.tokenizer, examples, SAMPLED_TOKENS)
            log.write_samples(step, [example.pair for example in examples], answers)

    def export(name: str) -> None:
        """Write a Hugging Face model into the run's folder. All ranks."""
        export_model(run_dir / name, policy, inputs.tokenizer, inputs.model_dir, config.save_dtype, process)

    step, progress = 0, {"best_eval_loss": None}
    if checkpoint:
        step, progress = load_checkpoint(checkpoint, policy, optimizer, identity, process)
        process.on_main(lambda: drop_later_checkpoints(run_dir, step))
        process.print(f"resumed from {checkpoint} at step {step} of {steps}")
    log = Log(run_dir, step, wandb_runs[0] if wandb_runs else None, process)
    clock = StageClock(config.profile, process.device)
    cost = None
    if config.profile:
        cost = model_cost(load_model_config(inputs.model_dir), dtype, config.max_length, measure_layers=False)
    if config.sample and not held_out:
        process.print("--sample: there are no held-out prompts to answer")
    if held_out and step == 0:
        log.write(evaluate(0))
        sample(0)
    with process.progress(total=steps, initial=step, desc="train", unit="step") as bar:
        while step < steps:
            started = time.perf_counter()
            pairs = global_batch(step, len(train_examples), config.batch_size, config.seed)
            with clock("data"):
                batches = micro_batches(train_examples, pairs, train_logps)
            lr = learning_rate(step, steps, config)
            row, totals = train_step(policy, optimizer, batches, loss, config, lr, step + 1, process, clock)
            if step == 0 and needs_reference(loss):
                process.print(describe_first_margin(totals, dtype))
            step += 1
            row |= throughput(batches, len(pairs), started, process, cost)
            log.write({"step": step} | row | clock.shares())
            bar.set_postfix_str(f"loss {row['loss']:.3f}, accuracy {row['reward_accuracy']:.2f}", refresh=False)
            bar.update(1)
            last = step == steps
            if held_out and (last or (config.eval_every and step % config.eval_every == 0)):
                row = evaluate(step)
                log.write(row)
                sample(step)
                best = progress["best_eval_loss"]
                if math.isfinite(row["eval/loss"]) and (best is None or row["eval/loss"] < best):
                    progress["best_eval_loss"] = row["eval/loss"]
                    export("best")
            if config.save_every and (last or step % config.save_every == 0):
                save_checkpoint(run_dir, step, policy, optimizer, progress, identity, process, config.keep_last)
    export("final")
    log.close()
    process.on_main(lambda: write_curves(run_dir))
    if held_out and source is WEIGHTS["attention"] and isinstance(inputs.weights_file, WeightsFile):
        pairs = [example.pair for example in held_out]
        process.on_main(lambda: write_report(run_dir / "weights", inputs.weights_file, pairs, inputs.tokenizer,
                                             config.rounds, config.sink_k, config.sink_k_min, min_count=10,
                                             num_shown=24, seed=config.seed))
    process.print(summarize(run_dir))


def train_step(policy, optimizer, batches: list[PairBatch], loss, config: TrainConfig, lr: float, step: int,
               process: Process, clock: StageClock) -> tuple[dict[str, float], Totals]:
    """One optimizer step over this process's micro-batches: (row, totals) of the global batch. All ranks.

    Raises FloatingPointError before the optimizer moves when the loss or the gradient is not finite.
    """
    totals: Totals = {}
    with clock("forward"):
        batches = with_means(policy, batches, loss, process)
    for number, batch in enumerate(batches, 1):
        policy.set_requires_gradient_sync(not config.no_sync or number == len(batches))
        with clock("forward"):
            loss_P = run_pairs(policy, batch, loss, config, totals)
        # Divided by the pairs of the global batch, so accumulation and world size change nothing.
        with clock("backward"), packed(batch.ranges):  # layers may be computed again
            ((loss_P * batch.coefficient_P).sum() / batch.pair_count).backward()
    totals = sum_over_processes(totals, process.device)  # all ranks
    row = means(totals)  # sync
    grad_norm = clip_gradients(policy.parameters(), config.max_grad_norm)  # sync, all ranks
    if not (math.isfinite(row["loss"]) and math.isfinite(grad_norm)):
        raise FloatingPointError(f"step {step}: loss {row['loss']}, gradient norm {grad_norm}; the weights are those "
                                 f"of step {step - 1}. Lower --lr or --beta, or try --dtype float32")
    for group in optimizer.param_groups:
        group["lr"] = lr
    with clock("optimizer"):
        optimizer.step()
        optimizer.zero_grad()
    return row | {"grad_norm": grad_norm, "lr": lr}, totals


@torch.no_grad()
def with_means(policy, batches: list[PairBatch], loss, process: Process) -> list[PairBatch]:
    """The micro-batches with what a loss's `statistics` are on average over the global batch; as they are for a loss
    without. All ranks."""
    if not hasattr(loss, "statistics"):
        return batches
    totals: Totals = {}
    for batch in batches:
        ratio_S, logps_N = policy(batch)
        add_totals(totals, loss.statistics(ratio_S, logps_N, batch), batch.coefficient_P)
    totals = sum_over_processes(totals, process.device)  # all ranks
    values = {name: (total[0] / total[2]).float() for name, total in totals.items()}
    return [replace(batch, means=values) for batch in batches]


def run_pairs(policy, batch: PairBatch, loss, config: TrainConfig, totals: Totals) -> torch.Tensor:
    """Forward one micro-batch: its losses [P]; its metrics are added to `totals`. All ranks."""
    ratio_S, logps_N, *stats = policy(batch, ("entropy", "top1") if config.token_stats else ())
    loss_P, extra = loss(ratio_S, logps_N, batch, config)
    metrics = pair_metrics(loss_P, extra, ratio_S, logps_N, batch, config.beta, needs_reference(loss))
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


def throughput(batches: list[PairBatch], num_pairs: int, started: float, process: Process, cost: ModelCost | None
               ) -> dict[str, float]:
    """Rates over all processes since `started`, and the peak memory of one process; with the model's cost also TFLOP/s
    and MFU of one process, copies that keep it in step not counted. All ranks."""
    tokens = sum(process.gather(sum(batch.num_tokens for batch in batches)))
    seconds = time.perf_counter() - started
    if process.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # kilobytes on Linux
    row = {"tokens_per_s": tokens / seconds, "pairs_per_s": num_pairs / seconds, "peak_memory_gib": peak / GIB}
    if cost:
        done = sum(flops(cost, batch) for batch in batches if batch.coefficient_P.any())  # sync
        row["tflops"] = sum(process.gather(done)) / process.world_size / seconds / 1e12
        if peak_rate := peak_tflops(process.device):
            row["mfu"] = row["tflops"] / peak_rate
    return row


if __name__ == "__main__":
    main()
