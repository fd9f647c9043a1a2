"""Logs of a run: metrics.jsonl, the console line and wandb, the same rows; sampled answers; the clock of --profile;
the summary at the end."""

import json
import math
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from twdpo.config import TrainConfig
from twdpo.dist import Process
from twdpo.files import write_atomic
from twdpo.flags import InputError, to_json
from twdpo.pairs import Pair, show_question


class Log:
    """metrics.jsonl, the console line and, when asked for, wandb: the same rows. Only the first process writes."""

    def __init__(self, run_dir: Path, step: int, wandb_run, process: Process):
        """Cut metrics.jsonl back to `step`, which a resumed run goes on from; 0 empties it.

        wandb_run: what `start_wandb` returned.
        """
        self.process, self.wandb = process, wandb_run
        self.file = self.samples = None
        if process.is_main:
            self.file = open_cut_back(run_dir / "metrics.jsonl", step)
            if missing := missing_steps(run_dir / "metrics.jsonl", step):
                print(f"warning: {run_dir / 'metrics.jsonl'} lacks the rows of {describe_steps(missing)} of the {step} "
                      "steps before this start: its curves have a gap there; what is trained is not affected")
            self.samples_path = run_dir / "samples.jsonl"
            if self.samples_path.exists():
                self.samples = open_cut_back(self.samples_path, step)

    def write(self, row: dict[str, float]) -> dict[str, float]:
        """Log one row; undefined values are left out."""
        row = {name: value for name, value in row.items() if math.isfinite(value)}
        if self.file:
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()
        if self.wandb:
            self.wandb.log(row, step=row["step"])
        for name in held_out_names(row) or [""]:
            self.process.print((f"{name}: " if name else "") + format_row(row_of_set(row, name)))
        return row

    def write_samples(self, step: int, pairs: list[Pair], answers: list[str]) -> None:
        """Add the policy's answers after `step` steps to samples.jsonl; print the first."""
        if self.process.is_main:
            self.samples = self.samples or open_cut_back(self.samples_path, 0)
            for pair, answer in zip(pairs, answers):
                prompt = show_question(pair, "conversation")
                self.samples.write(json.dumps({"step": step, "prompt": prompt, "answer": answer}) + "\n")
            self.samples.flush()
        self.process.print(f"step {step} | the policy's answer to {pairs[0].messages[-1][1]!r:.60}: "
                           f"{answers[0]!r:.200}")

    def sync(self) -> None:
        """All rows so far are on the disk: a checkpoint stands on them."""
        for file in filter(None, (self.file, self.samples)):
            os.fsync(file.fileno())

    def close(self) -> None:
        for file in filter(None, (self.file, self.samples)):
            file.close()
        if self.wandb:
            self.wandb.finish()


def open_cut_back(path: Path, step: int):
    """A file of JSON lines, open for appending, without the rows after `step`; 0 empties it. A line that is no row is
    dropped with a word, but for a last one that a kill cut off."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if step and path.exists() else []
    for number, line in enumerate(lines[:-1], 1):
        if row_step(line) == math.inf:
            print(f"warning: {path}, line {number}: {line!r:.80} is no row of a run: dropped")
    kept = [line for line in lines if row_step(line) <= step]
    write_atomic(path, lambda temporary: temporary.write_text("".join(line + "\n" for line in kept), "utf-8"))
    return open(path, "a", encoding="utf-8")


def missing_steps(path: Path, step: int) -> list[int]:
    """The steps up to `step` that have no row of training."""
    found = {row["step"] for row in read_rows(path) if "loss" in row}
    return [number for number in range(1, step + 1) if number not in found]


def describe_steps(steps: list[int]) -> str:
    """Ascending numbers as spans: `3, 5 to 9`."""
    spans: list[list[int]] = []
    for step in steps:
        if spans and step == spans[-1][1] + 1:
            spans[-1][1] = step
        else:
            spans.append([step, step])
    return ", ".join(f"{first} to {last}" if last > first else str(first) for first, last in spans)


class StageClock:
    """Seconds spent in each stage of a training step; does nothing unless it is on. On a GPU each stage is waited for.
    """

    def __init__(self, on: bool, device: torch.device):
        self.on, self.device = on, device
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        started = self._now()
        yield
        if self.on:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + self._now() - started

    def _now(self) -> float:
        if self.on and self.device.type == "cuda":
            torch.cuda.synchronize()  # sync
        return time.perf_counter()

    def shares(self) -> dict[str, float]:
        """The share of each stage in all of them, then start anew."""
        total = sum(self.seconds.values())
        shares = {f"{stage}_share": seconds / total for stage, seconds in self.seconds.items()}
        self.seconds = {}
        return shares


def start_wandb(config: TrainConfig, run_dir: Path):
    """A run of the wandb project that --wandb names, or None. Raises InputError, before a run has cost anything."""
    if not config.wandb:
        return None
    try:
        import wandb
    except ImportError as error:
        raise InputError("--wandb needs the wandb package: pip install wandb") from error
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        return wandb.init(project=config.wandb, config=to_json(config), dir=run_dir, name=run_dir.name)
    except wandb.errors.Error as error:
        with suppress(OSError):  # it holds something
            run_dir.rmdir()
        raise InputError(f"--wandb {config.wandb}: {error}. WANDB_MODE=offline needs no account") from error


def row_step(line: str) -> float:
    """The step of a line of metrics.jsonl; infinity for one that is no row, as a kill leaves it."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return math.inf
    return step if type(step) is int else math.inf


def held_out_names(row: dict[str, float]) -> list[str]:
    """The held-out sets that a row has figures of: [""] when they have no name, [] for a step's row. A set's count of
    pairs is an int; a mean is none, so that a fork may call a metric NAME/pairs."""
    names = [name.split("/")[1] for name, value in row.items()
             if re.fullmatch(r"eval/[^/]+/pairs", name) and type(value) is int]
    return names or [""] * ("eval/pairs" in row)


def row_of_set(row: dict[str, float], name: str) -> dict[str, float]:
    """The row as it would be with this held-out set alone, without a name."""
    if not name:
        return row
    prefix = f"eval/{name}/"
    return {"step": row["step"]} | {f"eval/{key.removeprefix(prefix)}": value for key, value in row.items()
                                    if key.startswith(prefix)}


def format_row(row: dict[str, float]) -> str:
    """A row on one line, without the rewards that margins are made of; a held-out mean with its standard error."""
    parts = [f"step {row['step']}"]
    for name, value in row.items():
        if name != "step" and not name.endswith(("_stderr", "_chosen", "_rejected")):
            error = row.get(f"{name}_stderr")
            parts.append(f"{name} {value:.4g}" + (f" ± {error:.2g}" if error is not None else ""))
    return " | ".join(parts)


def format_mean(row: dict[str, float], name: str) -> str:
    """A held-out mean with its standard error, where there is one (of two pairs and more)."""
    if name not in row:
        return "-"
    error = row.get(f"{name}_stderr")
    return f"{row[name]:.4f}" + (f" ± {error:.4f}" if error is not None else "")


def read_rows(path: Path) -> list[dict]:
    """The rows of a file of JSON lines; one that is not there is empty. Raises InputError for a line that is no row,
    but for a last one that a kill cut off."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    if lines and row_step(lines[-1]) == math.inf:
        lines.pop()
    for number, line in enumerate(lines, 1):
        if row_step(line) == math.inf:
            raise InputError(f"{path}, line {number}: {line!r:.80} is no row of a run; put back the file as it was "
                             "written")
    return [json.loads(line) for line in lines]


def evaluations(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    """The rows of evaluations."""
    return [row for row in rows if "eval/pairs" in row]


def best_evaluation(rows: list[dict[str, float]]) -> dict[str, float] | None:
    """What is called best everywhere: of the evaluations after a step (step 0 is the start) the first one of lowest
    loss, of the first held-out set if there are several; None without any."""
    return min((row for row in rows if row["step"] > 0 and "eval/loss" in row), key=lambda row: row["eval/loss"],
               default=None)


def lowest_loss(run_dir: Path) -> float:
    """Of the evaluations after a step that metrics.jsonl holds; infinity without any."""
    return (best_evaluation(read_rows(run_dir / "metrics.jsonl")) or {}).get("eval/loss", math.inf)


def shown_evaluations(rows: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Of a run's evaluations those that a table shows, by what they are called: start, best and last."""
    found = evaluations(rows)
    shown = {"start": next((row for row in found if row["step"] == 0), None), "best": best_evaluation(found),
             "last": found[-1] if found and found[-1]["step"] > 0 else None}
    return {name: row for name, row in shown.items() if row}


def describe_best(rows: list[dict[str, float]]) -> str:
    """A sentence on which step is best; "" without an evaluation after a step."""
    shown = shown_evaluations(rows)
    if "last" not in shown:
        return ""
    if "best" not in shown:
        return "no step is best: no held-out loss after a step is a number"
    best, start = shown["best"], shown.get("start", {}).get("eval/loss", math.inf)
    name = held_out_names(best)[0]
    lowest = f"the lowest held-out loss{f' of {name}' if name else ''}"
    if start > best["eval/loss"]:
        return f"best: step {best['step']}, {lowest}"
    return (f"no step was better than the start, whose held-out loss is {start:.4f}: {lowest} after it is "
            f"{best['eval/loss']:.4f}, at step {best['step']}")


def figure_names(row: dict[str, float]) -> list[str]:
    """The names of an evaluation's figures that a table shows, with eval/ before each."""
    return [name for name in row if name.startswith("eval/") and not name.endswith("_stderr") and name != "eval/pairs"]


def summarize(run_dir: Path) -> str:
    """The end of a run: held-out figures of the start, the best and the last step, and where things are."""
    rows = read_rows(run_dir / "metrics.jsonl")
    shown = shown_evaluations(rows)
    lines = []
    for set_name in held_out_names(shown["last"]) if "last" in shown else ():
        columns = {f"{name} (step {row['step']})": row_of_set(row, set_name) for name, row in shown.items()}
        last = row_of_set(shown["last"], set_name)
        title = f"held out{', ' * bool(set_name)}{set_name} ({last['eval/pairs']} pairs)"
        lines.append(f"{title:30}" + "".join(name.rjust(20) for name in columns))
        lines += [f"  {name.removeprefix('eval/'):28}" + "".join(format_mean(row, name).rjust(20)
                                                               for row in columns.values())
                  for name in figure_names(last)]
    lines += filter(None, [describe_best(rows)])
    for name, what in (("final", "the policy"), ("best", "the policy at the best step"),
                       ("metrics.jsonl", "one row a step and an evaluation"),
                       ("samples.jsonl", "answers that the policy wrote"),
                       ("report.html", "the curves as a page"),
                       ("pairs.html", "the first pairs as they are trained, as a page"),
                       ("weights/weights.html", "the token weights on held-out answers, as a page"),
                       ("config.json", "all settings")):
        path = run_dir / name
        if path.is_dir() or path.exists() and path.stat().st_size:
            lines.append(f"{run_dir / name}: {what}")
    return "\n".join(lines)
