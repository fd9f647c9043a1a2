"""Logs of a run: metrics.jsonl, the console line and wandb, the same rows; sampled answers; the clock of --profile;
the summary at the end."""

import json
import math
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

    def close(self) -> None:
        for file in filter(None, (self.file, self.samples)):
            file.close()
        if self.wandb:
            self.wandb.finish()


def open_cut_back(path: Path, step: int):
    """A file of JSON lines, open for appending, without the rows after `step`; 0 empties it."""
    lines = path.read_text(encoding="utf-8").splitlines() if step and path.exists() else []
    kept = [line for line in lines if row_step(line) <= step]
    write_atomic(path, lambda temporary: temporary.write_text("".join(line + "\n" for line in kept), "utf-8"))
    return open(path, "a", encoding="utf-8")


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
    """The step of a line of metrics.jsonl; infinity for one that a kill left incomplete."""
    try:
        return json.loads(line)["step"]
    except ValueError:
        return math.inf


def held_out_names(row: dict[str, float]) -> list[str]:
    """The held-out sets that a row has figures of: [""] when they have no name, [] for a step's row."""
    names = [name.split("/")[1] for name in row if re.fullmatch(r"eval/[^/]+/pairs", name)]
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


def summarize(run_dir: Path) -> str:
    """The end of a run: held-out figures of the untrained and the trained policy, and where things are."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if "eval/pairs" in row]
    lines = []
    for set_name in held_out_names(rows[-1]) if rows else ():
        first, last = (row_of_set(row, set_name) for row in (rows[0], rows[-1]))
        lines.append(f"held out{', ' * bool(set_name)}{set_name} ({last['eval/pairs']} pairs)"
                     + f"step {first['step']}".rjust(22) + f"step {last['step']}".rjust(24))
        for name in last:
            if name.startswith("eval/") and not name.endswith("_stderr") and name != "eval/pairs":
                cells = [format_mean(row, name) for row in (first, last)]
                lines.append(f"  {name.removeprefix('eval/'):28}" + "".join(cell.rjust(24) for cell in cells))
    for name, what in (("final", "the policy"), ("best", "the policy of lowest held-out loss"),
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
