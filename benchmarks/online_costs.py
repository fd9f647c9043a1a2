"""What it costs to read the policy, or whole distributions, in a training step: that of `dpo`, uniform weights, is 1.

    python benchmarks/online_costs.py                               on made-up pairs, of the lengths of real ones
    python benchmarks/online_costs.py --only otpo,selective
    python benchmarks/online_costs.py --data pairs.jsonl --tokenizer FOLDER --shape llama-3.2-1b

Every way is a run that `train.prepare` made, with its reference and what else it needs. They train one policy, a step
each in turns on the same pairs, so that a busy moment falls on all. `times dpo` is the median of the rounds' ratios,
with the 20th and 80th percentile. `source` is the share of a step's time that the weight source itself takes (of `otpo`
the transport), from one more step with a wait for the device before and after it. `extra MiB` is a step's peak above
what was there before it, so without a reference in memory. fp32 on a CPU, bf16 on fp32 parameters on a GPU. A way whose
loss or source is not there is a row that says so. The last line is JSON.
"""
# ruff: noqa: E402 - train.py is no part of the installed package: its folder must be known first

import argparse
import contextlib
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial, wraps
from pathlib import Path
from unittest.mock import patch

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # train.py

import train
import train_step
from harness import (
    Report,
    add_output_flags,
    amount,
    interleave,
    machine,
    output_path,
    peak_memory_mib,
    print_machine,
    quiet_failure,
    spread,
    whole_number,
)
from twdpo import dist
from twdpo.config import TrainConfig
from twdpo.losses import LOSSES
from twdpo.weights import WEIGHTS

BASE = "dpo, uniform"
WAYS: dict[str, dict[str, str]] = {
    BASE: {"loss": "dpo", "weights": "uniform"},
    "otpo": {"loss": "dpo", "weights": "otpo"},
    "otpo, reg 0.1": {"loss": "dpo", "weights": "otpo", "weights_options": "reg=0.1"},
    "selective": {"loss": "dpo", "weights": "selective"},
    "wpo": {"loss": "wpo", "weights": "uniform"},
    "tdpo2, reference in memory": {"loss": "tdpo2", "weights": "uniform", "ref_states": "memory"},
    "tdpo2, reference on disk": {"loss": "tdpo2", "weights": "uniform", "ref_states": "disk"},
    "tidpo, weights alone": {"loss": "dpo", "weights": "tidpo"},
    "tidpo, with its triplets": {"loss": "tidpo", "weights": "tidpo"},
}
MANY = 1_000_000  # steps of a schedule whose first ones are all at the peak
BATCHES = 4  # different ones


def missing(way: dict[str, str]) -> str:
    """What of a way is not in the tables, or nothing."""
    absent = [f"no {kind} {name}" for kind, name, table in (("loss", way["loss"], LOSSES),
                                                           ("source", way["weights"], WEIGHTS)) if name not in table]
    return " and ".join(absent)


def make_run(name: str, flags: argparse.Namespace, work: Path, process: dist.Process, first: train.Run | None
             ) -> train.Run:
    """A run of this way, before its first step; its policy and optimizer are those of the first run."""
    config = TrainConfig(model=str(work / "model"), data=str(work / "pairs.jsonl"), cache_dir=str(work / "cache"),
                         output_dir=str(work / name), eval_fraction=0.0, batch_size=flags.pairs, max_steps=MANY,
                         warmup_ratio=0.0, beta=0.1, max_length=flags.max_length,
                         max_prompt_length=flags.max_length - 16, micro_batch_tokens=flags.tokens,
                         checkpointing=flags.checkpointing, save_every=0, **WAYS[name])
    with contextlib.redirect_stdout(sys.stderr), contextlib.ExitStack() as stack:
        if first:  # it need not be read and checked again
            stack.enter_context(patch.object(train, "load_policy", lambda *_: first.policy))
            stack.enter_context(patch.object(train, "settle_packing", lambda *_: first.rows.packs))
        run = train.prepare(config, process)
    run.optimizer = first.optimizer if first else run.optimizer
    run.step = 1  # what is said of a policy that has not moved is not meant for these
    return run


def source_share(run: train.Run, steps: int = 1) -> float:
    """The share of the time of steps that the source takes, with a wait before and after it."""
    source, spent = run.objective.source, []

    def wait() -> float:
        if run.process.device.type == "cuda":
            torch.cuda.synchronize()  # sync
        return time.perf_counter()

    @wraps(source)
    def timed(batch, context):
        started = wait()
        raw_N = source(batch, context)
        spent.append(wait() - started)
        return raw_N
    objective, run.objective = run.objective, replace(run.objective, source=timed)
    started = wait()
    for _ in range(steps):
        train.train_step(run)
    total, run.objective = wait() - started, objective
    return sum(spent) / total


def make_rows(names: list[str], flags: argparse.Namespace, work: Path, process: dist.Process, report: Report
              ) -> dict[str, train.Run]:
    """The runs of ways that can run; what can't is a row."""
    runs: dict[str, train.Run] = {}
    for name in names:
        note = missing(WAYS[name])
        if not note:
            try:
                runs[name] = make_run(name, flags, work, process, runs.get(BASE))
            except torch.OutOfMemoryError as error:
                note = quiet_failure(error)
        print(f"{name}: {note or 'ready'}", flush=True)
        if note:
            report.add({"model": flags.shape, "way": name, "micro_batch": f"{flags.tokens} tokens", "note": note})
    return runs


def measure(runs: dict[str, train.Run], flags: argparse.Namespace, report: Report, deadline: float) -> None:
    """A row each."""
    device = runs[BASE].process.device
    steps: dict[str, Callable] = {name: partial(train.train_step, run) for name, run in runs.items()}
    steps[BASE]()  # makes the optimizer's state
    extra = {name: peak_memory_mib(step, device) for name, step in steps.items()}
    print("steps in turns", flush=True)
    times = interleave(steps, device, flags.seconds, deadline)
    for name, run in runs.items():
        ratios = [own / base for own, base in zip(times[name], times[BASE])]
        low, high = spread(ratios)
        row = {"model": flags.shape, "way": name, "micro_batch": f"{flags.tokens} tokens", "rounds": len(ratios),
               "step_seconds": statistics.median(times[name]) / 1e3, "times_dpo": statistics.median(ratios),
               "times_dpo_low": low, "times_dpo_high": high, "extra_mib": extra[name]}
        if run.objective.is_online:
            row["source_share"] = source_share(run)
        report.add(row)


HEADER = f"{'way':28} {'seconds a step':>14} {'times dpo':>10} {'(20 to 80 %)':>14} {'source':>7} {'extra MiB':>10}"


def show(row: dict[str, object]) -> str:
    if "note" in row:
        return f"{row['way']:28} {row['note']}"
    share = f"{row['source_share']:.1%}" if "source_share" in row else "-"
    between = f"{row['times_dpo_low']:.2f} to {row['times_dpo_high']:.2f}"
    return (f"{row['way']:28} {row['step_seconds']:14.3f} {row['times_dpo']:10.2f} {between:>14} {share:>7} "
            f"{row['extra_mib']:10,.0f}")


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """(flags, the ways that they ask for, `dpo` first)."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default="", help="pairs in a .jsonl file; empty: random words")
    parser.add_argument("--tokenizer", default="", help="folder with tokenizer and chat template; empty: the toy's")
    parser.add_argument("--shape", default="llama-3.2-1b" if cuda else "20m", choices=train_step.SHAPES)
    parser.add_argument("--only", default="", help="comma-separated: ways whose name contains one of these")
    parser.add_argument("--pairs", type=whole_number(1), default=32 if cuda else 4, help="pairs a step")
    parser.add_argument("--tokens", type=whole_number(1), default=16384 if cuda else 4096, help="of a micro-batch")
    parser.add_argument("--max-length", type=whole_number(32), default=2048)
    parser.add_argument("--checkpointing", default="full" if cuda else "none", choices=train_step.CHECKPOINTING)
    parser.add_argument("--seconds", type=amount, default=20.0, help="of steps a way; three steps at least")
    parser.add_argument("--minutes", type=amount, help="no round is begun that would not be over by then; default: any")
    add_output_flags(parser, "online_costs.json")
    flags = parser.parse_args(argv)
    names = [name for name in WAYS if name != BASE
             and (not flags.only or any(part in name for part in flags.only.split(",")))]
    if not names:
        parser.error(f"--only {flags.only}: no way's name contains that; there are {'; '.join(WAYS)}")
    flags.steps = BATCHES  # train_step.prepare writes pairs for so many
    return flags, [BASE, *names]


def main(argv: list[str] | None = None) -> None:
    flags, names = parse(argv)
    deadline = time.perf_counter() + 60 * flags.minutes if flags.minutes else math.inf
    process = dist.start()
    try:
        head = {"machine": machine(process.device), "pairs_a_step": flags.pairs, "max_length": flags.max_length,
                "checkpointing": flags.checkpointing, "data": Path(flags.data).name or "random words",
                "tokenizer": Path(flags.tokenizer).name or "the toy's"}
        report = Report(output_path(flags, process.device, "online_costs.json"), head, ("model", "way", "micro_batch"))
        print_machine(head)
        with tempfile.TemporaryDirectory() as folder:
            train_step.prepare(flags, flags.shape, Path(folder), with_weights=True)
            measure(make_rows(names, flags, Path(folder), process, report), flags, report, deadline)
    finally:
        dist.stop()
    print(f"\n{HEADER}")
    for row in report.rows:
        print(show(row))
    report.finish()


if __name__ == "__main__":
    main()
