"""metrics.jsonl, the console line and wandb: the same rows in three places; and the summary at the end."""

import json
import math
from pathlib import Path

from twdpo.config import InputError, TrainConfig, to_json
from twdpo.dist import Process
from twdpo.files import write_atomic


class Log:
    """metrics.jsonl, the console line and, when asked for, wandb: the same rows. Only the first process writes."""

    def __init__(self, run_dir: Path, step: int, wandb_run, process: Process):
        """Cut metrics.jsonl back to `step`, which a resumed run goes on from; 0 empties it.

        wandb_run: what `start_wandb` returned.
        """
        self.process, self.file, self.wandb = process, None, wandb_run
        if not process.is_main:
            return
        path = run_dir / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if step and path.exists() else []
        kept = [line for line in lines if row_step(line) <= step]
        write_atomic(path, lambda temporary: temporary.write_text("".join(line + "\n" for line in kept), "utf-8"))
        self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - appended and flushed each step

    def write(self, row: dict[str, float]) -> dict[str, float]:
        """Log one row; undefined values are left out."""
        row = {name: value for name, value in row.items() if math.isfinite(value)}
        if self.file:
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()
        if self.wandb:
            self.wandb.log(row, step=row["step"])
        self.process.print(format_row(row))
        return row

    def close(self) -> None:
        if self.file:
            self.file.close()
        if self.wandb:
            self.wandb.finish()


def start_wandb(config: TrainConfig, run_dir: Path):
    """A run of the wandb project that --wandb names, or None. Raises InputError, before a run has cost anything."""
    if not config.wandb:
        return None
    try:
        import wandb
    except ImportError as error:
        raise InputError("--wandb needs the wandb package: pip install wandb") from error
    try:
        return wandb.init(project=config.wandb, config=to_json(config), dir=run_dir, name=run_dir.name)
    except wandb.errors.Error as error:
        raise InputError(f"--wandb {config.wandb}: {error}. WANDB_MODE=offline needs no account") from error


def row_step(line: str) -> float:
    """The step of a line of metrics.jsonl; infinity for one that a kill left incomplete."""
    try:
        return json.loads(line)["step"]
    except ValueError:
        return math.inf


def format_row(row: dict[str, float]) -> str:
    """A row on one line; a held-out mean with its standard error."""
    parts = [f"step {row['step']}"]
    for name, value in row.items():
        if name != "step" and not name.endswith("_stderr"):
            error = row.get(f"{name}_stderr")
            parts.append(f"{name} {value:.4g}" + (f" ± {error:.2g}" if error is not None else ""))
    return " | ".join(parts)


def summarize(run_dir: Path) -> str:
    """The end of a run: held-out figures of the untrained and the trained policy, and where things are."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if "eval/loss" in row]
    lines = []
    if rows:
        first, last = rows[0], rows[-1]
        lines.append(f"held out ({last['eval/pairs']} pairs)" + f"step {first['step']}".rjust(22)
                     + f"step {last['step']}".rjust(24))
        for name in last:
            if name.startswith("eval/") and not name.endswith("_stderr") and name != "eval/pairs":
                cells = [f"{row[name]:.4f} ± {row.get(name + '_stderr', math.nan):.4f}" if name in row else "-"
                         for row in (first, last)]
                lines.append(f"  {name.removeprefix('eval/'):28}" + "".join(cell.rjust(24) for cell in cells))
    for name, what in (("final", "the policy"), ("best", "the policy of lowest held-out loss"),
                       ("metrics.jsonl", "one row a step and an evaluation"), ("config.json", "all settings")):
        if (run_dir / name).exists():
            lines.append(f"{run_dir / name}: {what}")
    return "\n".join(lines)
