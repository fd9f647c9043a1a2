"""Train a policy with token-weighted DPO: pairs -> judge -> weights -> reference log-probs -> TwDPO -> checkpoint.

    torchrun train.py                                            the toy: no network, no GPU, under a minute
    torchrun train.py --model meta-llama/Meta-Llama-3-8B-Instruct                              one GPU
    torchrun --nproc_per_node 8 train.py --model MODEL --data pairs.jsonl                      one node
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 train.py --model MODEL

`python train.py` runs the same code in one process. Folders of --output-dir and --cache-dir are shared by all nodes.
"""

import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from twdpo.batch import Outputs, PairBatch, collate, plan_micro_batches
from twdpo.checkpoint import export_model, load_checkpoint, save_checkpoint
from twdpo.config import TrainConfig, parse_config
from twdpo.dist import Process, check_copies, clip_gradients, name_of_dtype, pick_dtype
from twdpo.divergence import explain_step, refuse_not_finite
from twdpo.files import hash_json
from twdpo.flags import InputError, to_json
from twdpo.inputs import Need, check_inputs, check_pair_numbers, run_identity, settle_massless
from twdpo.log import Log, StageClock, lowest_loss, start_wandb, summarize
from twdpo.losses import LOSSES
from twdpo.metrics import (
    Totals,
    add_totals,
    describe_first_margin,
    means,
    pair_metrics,
    standard_errors,
    sum_over_processes,
    to_host,
    token_metrics,
)
from twdpo.models.build import check_architecture
from twdpo.models.generate import sample_answers
from twdpo.models.memory import ModelCost, model_cost, plan_for, settle_memory, throughput
from twdpo.models.policy import Policy, load_policy, make_optimizer, settle_packing
from twdpo.models.source import Model
from twdpo.needs import open_context, open_needs
from twdpo.objective import TOKEN_STATS, Objective, find_objective, forward, list_objectives, settings_of_loss
from twdpo.pages.run import write_curves
from twdpo.pages.show import show, write_run_pairs
from twdpo.pages.weights import write_run_weights
from twdpo.rows import RowOptions, evaluation_batches, global_batch
from twdpo.run_folder import (
    describe_origin,
    describe_resume,
    drop_later_checkpoints,
    open_run,
    start_run,
    write_environment,
)
from twdpo.script import StopSignals, run_script
from twdpo.tokens import Example
from twdpo.toy.planted import add_planted, source_lift
from twdpo.weights import WEIGHTS, WeightContext

SAMPLED_TOKENS = 128  # most tokens of an answer of --sample


def main(argv: list[str] | None = None) -> None:
    """Run with a command line (default: sys.argv). Raises SystemExit on a user's error."""
    before = dict(LOSSES), dict(WEIGHTS)
    try:
        run_script("train.py", lambda: parse_config(TrainConfig, argv, __doc__.split("\n")[0], settings_of_loss,
                                                    list_objectives), train, describe_resume)
    finally:  # what --import added is this run's
        for table, old in zip((LOSSES, WEIGHTS), before):
            table.clear()
            table.update(old)


def train(config: TrainConfig, process: Process) -> None:
    """The whole run. All ranks."""
    if config.plan:
        process.print(plan_for(config, process))
        return
    if config.show:
        show(config, process)
        return
    run = prepare(config, process)
    log = Log(run.folder, run.step, run.wandb, process)
    run.best_eval_loss = process.on_main(lambda: lowest_loss(run.folder))
    if run.held_out and run.step == 0:
        evaluate_and_sample(run, log)
    progress = process.progress(total=run.steps, initial=run.step, desc="train", unit="step")
    with StopSignals() as signals, progress as bar:
        while run.step < run.steps:
            row = log.write(train_step(run))
            bar.set_postfix_str(f"loss {row['loss']:.3f}, accuracy {row['reward_accuracy']:.2f}", refresh=False)
            bar.update(1)
            if run.held_out and run.is_due(config.eval_every):
                keep_best(run, evaluate_and_sample(run, log))
            stops = run.step < run.steps and process.largest(signals.seen)  # of one process is of all
            if stops or config.save_every and run.is_due(config.save_every):
                log.sync()
                refuse_not_finite(run.policy, run.step, process)
                save_checkpoint(run.folder, run.step, run.policy, run.optimizer, run.origin, process, config.keep_last)
            if stops:
                log.close()
                process.print(f"stopped by signal {stops}{describe_resume()}")
                return
    finish(run, log)


@dataclass
class Run:
    """A run as it stands: what it is made of, and how far it has come."""

    config: TrainConfig  # every setting as it was settled
    process: Process
    objective: Objective
    model: Model  # that the policy starts from
    train: list[Example]
    held_out: dict[str, list[Example]]  # by the names of --eval-data, "" of a set that has none; no set is empty
    context: WeightContext  # what weight sources may read
    policy: Policy
    optimizer: torch.optim.Optimizer
    rows: RowOptions
    steps: int
    clock: StageClock
    folder: Path = Path()
    origin: dict[str, object] | None = None  # run_id, settings, and fingerprints of what these name
    wandb: object = None  # on the first process, with --wandb
    cost: ModelCost | None = None  # with --profile
    step: int = 0  # steps done
    best_eval_loss: float = math.inf  # of the evaluations after a step

    @property
    def is_planted(self) -> bool:
        """Whether it is known which words of held-out answers decide."""
        return self.config.data == "toy" and not self.config.eval_data

    def is_due(self, every: int) -> bool:
        """Whether something is to be done after so many steps (0: after none of them), and after the last."""
        return self.step == self.steps or (every > 0 and self.step % every == 0)


def prepare(config: TrainConfig, process: Process) -> Run:
    """All that the loop needs. Every user's error ends here, those of the data before any weights are loaded.

    All ranks.
    """
    objective = find_objective(config, process)
    needs = open_needs(config, objective, process)
    config = replace(config, weights=config.weights or objective.source_name)
    check_copies(config.replicate, process.world_size)
    config, opened = open_run(config, process)
    folder = opened.path
    dtype = pick_dtype(config.dtype, process.device)
    describe_start(config, objective, folder, dtype, process)
    inputs = check_inputs(config, process, folder, needs)
    check_pair_numbers(objective, inputs, process)
    model = inputs.model
    check_architecture(model.config, config.head_cache_gib)
    checkpointing, budget = settle_memory(config, model.config, dtype, process, objective.place_of_reference(config))
    process.print(f"micro-batches of {budget} tokens, checkpointing {checkpointing}")
    config = replace(config, model=model.name, date=model.printed_date or config.date, data=inputs.data,
                     eval_data=inputs.eval_data, checkpointing=checkpointing, micro_batch_tokens=budget,
                     dtype=name_of_dtype(dtype))
    wandb_runs: list = []  # one on the first process, none elsewhere
    process.on_main(lambda: wandb_runs.append(start_wandb(config, folder)))
    for need in needs:
        inputs = need.prepare(config, inputs)
    inputs = settle_massless(config, objective, inputs, open_context(config, needs), process)
    policy = load_policy(model.folder, dtype, process, checkpointing, config.replicate, config.compile,
                         config.head_cache_gib)
    rows = RowOptions(settle_packing(policy, config.packing, inputs.used(config), process), budget)
    process.print("rows are packed" if rows.packs else "rows are plain: one sequence each, padded")
    config = settle(config, needs, rows)
    process.on_main(lambda: start_run(config, opened))
    for need in needs:
        need.prepare_with_policy(config, inputs, policy, rows)
    context = open_context(config, needs)
    settle_massless(config, objective, inputs, context, process, has_policy=True)
    optimizer = make_optimizer(policy, config.lr, config.weight_decay)
    if wandb_runs and wandb_runs[0]:
        wandb_runs[0].config.update(to_json(config), allow_val_change=True)  # as they were settled
    run = Run(config, process, objective, model, inputs.train, inputs.evaluated, context, policy, optimizer, rows,
              inputs.steps(config), StageClock(config.profile, process.device), folder,
              describe_origin(config, opened, run_identity(config, inputs, needs, process)),
              wandb_runs[0] if wandb_runs else None)
    if not any(learning_rate(step, run.steps, config) for step in range(run.steps)):
        process.print("the learning rate is 0 in every step: warmup begins at 0 and there is nothing after it; "
                      "--warmup-ratio 0 leaves it out")
    if config.profile:
        run.cost = model_cost(model.config, dtype, config.max_length, measure_layers=False)
    if checkpoint := opened.checkpoint:
        run.step = load_checkpoint(checkpoint, policy, optimizer, run.origin["identity"], process)
        process.on_main(lambda: drop_later_checkpoints(folder, run.step))
        process.print(f"resumed from {checkpoint} at step {run.step} of {run.steps}")
    held_out = {name: hash_json([each.pair.key for each in examples]) for name, examples in run.held_out.items()}
    process.on_main(lambda: write_environment(folder, run.step, process, {"held_out": held_out}))
    process.on_main(lambda: write_run_pairs(folder, inputs, config, objective, run.context))
    if config.sample and not run.held_out:
        process.print("--sample: there are no held-out prompts to answer")
    return run


def describe_start(config: TrainConfig, objective: Objective, folder: Path, dtype: torch.dtype, process: Process
                   ) -> None:
    """A line that says what starts."""
    options = f" ({config.loss_options})" if config.loss_options else ""
    process.print(f"preset {config.preset}; loss {config.loss}{options}, weights {objective.source_name}, beta "
                  f"{config.beta}; {process.world_size} process(es) on {process.device.type}, compute "
                  f"{name_of_dtype(dtype)}; output in {folder}")


def settle(config: TrainConfig, needs: list[Need], rows: RowOptions) -> TrainConfig:
    """The settings as config.json holds them: with what the run found for those that were left to it."""
    settled = {name: value for need in needs for name, value in need.settings().items()}
    return replace(config, packing="on" if rows.packs else "off", **settled)


# ----------------------------------------------------------------------------------------------------------------------
# A training step

def train_step(run: Run) -> dict[str, float]:
    """One optimizer step: its row of metrics.jsonl. All ranks.

    Raises InputError before the optimizer moves when the loss or the gradient is not finite.
    """
    config, policy, clock = run.config, run.policy, run.clock
    started, totals = time.perf_counter(), {}
    pairs = global_batch(run.step, len(run.train), config.batch_size, config.seed)
    with clock("data"):
        batches = micro_batches(run, run.train, pairs)
    with clock("forward"):
        batches = with_means(run, batches)
    for number, batch in enumerate(batches, 1):
        policy.set_requires_gradient_sync(not config.no_sync or number == len(batches))
        with clock("forward"):
            loss_P, _ = run_pairs(run, batch, totals)
        # Divided by the pairs of the global batch, so accumulation and world size change nothing.
        with clock("backward"):
            ((loss_P * batch.coefficient_P).sum() / batch.pair_count).backward()
    figures = to_host(sum_over_processes(totals, run.process.device))  # sync, all ranks
    row = means(figures)
    grad_norm = clip_gradients(policy.parameters(), config.max_grad_norm)  # sync, all ranks
    if not (math.isfinite(row["loss"]) and math.isfinite(grad_norm)):
        why = explain_step(batches, lambda batch: run_pairs(run, batch, {}), run.step + 1, run.process)  # all ranks
        raise InputError(f"step {run.step + 1}: loss {row['loss']}, gradient norm {grad_norm}; the weights are those "
                         f"of step {run.step}. {why}")
    lr = learning_rate(run.step, run.steps, config)
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    with clock("optimizer"):
        run.optimizer.step()
        run.optimizer.zero_grad()
    if run.step == 0 and run.objective.has_reference:
        run.process.print(describe_first_margin(figures, run.config.dtype))
    run.step += 1
    row |= {"grad_norm": grad_norm, "lr": lr} | throughput(
        run.process, batches, len(pairs), started, run.cost, run.objective.place_of_reference(config))
    return {"step": run.step} | row | clock.shares()


def micro_batches(run: Run, examples: list[Example], pairs: list[int]) -> list[PairBatch]:
    """This process's part of a global batch, on the device; with weights, but for an online source's."""
    plan = plan_micro_batches(pairs, examples, run.process.world_size, run.rows)[run.process.rank]
    batches = [collate(each, examples, pairs, run.context.logps.get("reference"), run.rows.packs) for each in plan]
    if not run.objective.is_online:
        batches = [run.objective.weigh(batch, run.context) for batch in batches]
    return [batch.to(run.process.device) for batch in batches]


@torch.no_grad()
def with_means(run: Run, batches: list[PairBatch]) -> list[PairBatch]:
    """The micro-batches with what a loss's `statistics` are on average over the global batch; as they are for a loss
    without. All ranks."""
    statistics = run.objective.statistics
    if statistics is None:
        return batches
    totals: Totals = {}
    for batch in batches:
        outputs = forward(run.policy, batch, run.objective, run.context, run.config)
        add_totals(totals, statistics(outputs.ratio_S, outputs.logps_N, outputs.batch), batch.coefficient_P)
    totals = sum_over_processes(totals, run.process.device)  # all ranks
    values = {name: (total[0] / total[2]).float() for name, total in totals.items()}
    return [replace(batch, means=values) for batch in batches]


def run_pairs(run: Run, batch: PairBatch, totals: Totals) -> tuple[torch.Tensor, Outputs]:
    """Forward one micro-batch: its losses [P], times the weights of the data, and the policy's outputs; its metrics are
    added to `totals`. All ranks."""
    config, objective = run.config, run.objective
    outputs = forward(run.policy, batch, objective, run.context, config)
    ratio_S, logps_N, batch, *_ = outputs
    loss_P, extra = objective.loss(ratio_S, logps_N, batch, config)
    loss_P = loss_P * batch.pair_weights_P
    metrics = pair_metrics(loss_P, extra, ratio_S, logps_N, batch, config.beta, objective.has_reference)
    if config.token_stats:
        metrics |= token_metrics(batch, TOKEN_STATS)
    add_totals(totals, metrics, batch.coefficient_P)
    return loss_P, outputs


def learning_rate(step: int, steps: int, config: TrainConfig) -> float:
    """Linear warmup from 0, then cosine to 0; `step` counts from 0, so that the first of a warmup moves nothing: as
    transformers' get_cosine_schedule_with_warmup."""
    warmup = math.ceil(config.warmup_ratio * steps)
    if step < warmup:
        return config.lr * step / warmup
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation, and the end

@torch.no_grad()
def evaluate(run: Run) -> dict[str, float]:
    """One pass over all held-out pairs: an evaluation row of metrics.jsonl. All ranks.

    `eval/` has the figures of the first set, `eval/NAME/` those of each that has a name.
    """
    row: dict[str, float] = {}
    for name, examples in run.held_out.items():
        figures = evaluate_set(run, examples, f"evaluate {name}".strip())
        for prefix in ["eval/"] * (not row) + [f"eval/{name}/"] * bool(name):
            row |= {prefix + figure: value for figure, value in figures.items()}
    return {"step": run.step} | row


def evaluate_set(run: Run, examples: list[Example], what: str) -> dict[str, float]:
    """Means of the metrics over one held-out set, and their standard errors. All ranks."""
    totals: Totals = {}
    batches = evaluation_batches(len(examples), run.config.batch_size)
    for pairs in run.process.progress(batches, desc=what, unit="batch", leave=False):
        for batch in with_means(run, micro_batches(run, examples, pairs)):
            _, outputs = run_pairs(run, batch, totals)
            if run.is_planted:
                add_planted(totals, outputs, run.objective.has_reference, with_lift=run.objective.is_online)
    figures = to_host(sum_over_processes(totals, run.process.device))  # sync, all ranks
    row = means(figures) | {f"{name}_stderr": value for name, value in standard_errors(figures).items()}
    if run.is_planted and not run.objective.is_online:
        row["planted_lift"], _ = source_lift(run.objective.source, examples, run.context)
    return row | {"pairs": len(examples)}


def sample(run: Run) -> tuple[list[Example], list[str]]:
    """The first examples that are held out, each prompt once, and the policy's answers to their prompts. All ranks."""
    examples = list({example.pair.messages: example for example in first_set(run)}.values())[:run.config.sample]
    return examples, sample_answers(run.policy, run.model.chat, examples, SAMPLED_TOKENS) if examples else []


def first_set(run: Run) -> list[Example]:
    """The held-out set that best/, samples and the page of weights are of."""
    return next(iter(run.held_out.values()), [])


def evaluate_and_sample(run: Run, log: Log) -> dict[str, float]:
    """A row of metrics.jsonl, which is returned, and rows of samples.jsonl. All ranks."""
    row = log.write(evaluate(run))
    examples, answers = sample(run)
    if examples:
        log.write_samples(run.step, [example.pair for example in examples], answers)
    return row


def keep_best(run: Run, row: dict[str, float]) -> None:
    """Write best/ when an evaluation after a step has the lowest loss so far (`log.best_evaluation`). All ranks."""
    if (loss := row.get("eval/loss", math.inf)) < run.best_eval_loss:
        run.best_eval_loss = loss
        export(run, "best", row)


def export(run: Run, name: str, evaluation: dict[str, float] | None = None) -> None:
    """Write a Hugging Face model into the run's folder. All ranks."""
    export_model(run.folder / name, run.policy, run.model.tokenizer, run.model.folder, run.config.save_dtype,
                 run.process, evaluation)


def finish(run: Run, log: Log) -> None:
    """The final model, the pages, the summary. All ranks."""
    process = run.process
    refuse_not_finite(run.policy, run.step, process)
    export(run, "final")
    log.close()
    process.on_main(lambda: write_run_weights(run.folder / "weights", first_set(run), run.objective, run.context,
                                              run.model.chat))
    process.on_main(lambda: write_curves(run.folder))
    process.print(summarize(run.folder))


if __name__ == "__main__":
    main()
