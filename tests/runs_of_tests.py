"""What tests of whole runs of train.py share: pairs and flags of a small one; the rows of metrics.jsonl, compared."""

import json
import math
from collections.abc import Callable
from pathlib import Path

from twdpo.toy.grammar import toy_rows

MEASURED = ("tokens_per_s", "pairs_per_s", "peak_memory_gib", "peak_reserved_gib")


def read_rows(run_dir: Path) -> list[dict]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in MEASURED} for row in rows]


def assert_close_rows(rows: list[dict], others: list[dict]) -> None:
    """The same run, summed in another order: close before the optimizer has moved, less so after. AdamW makes a whole
    step of a gradient that is nothing but rounding, however small, and rounding is the processor's. What a split could
    get wrong (a mean for a sum, a pair left out) shows by percents."""
    assert len(rows) == len(others)
    for row, other in zip(rows, others):
        assert row.keys() == other.keys()
        moved = row["step"] > 1 or row["step"] == 1 and "eval/loss" in row
        tolerance = 3e-4 if moved else 3e-5
        for name in row:
            assert math.isclose(row[name], other[name], rel_tol=tolerance, abs_tol=tolerance), (row["step"], name)


def write_pairs(path: Path) -> Path:
    """Nineteen toy pairs, one of them far longer than any micro-batch budget of the tests."""
    rows = toy_rows()[0][:18]
    long_answer = " ".join(row["chosen"] for row in rows[:4])
    rows.append({"prompt": "say a lot", "chosen": long_answer, "rejected": rows[5]["rejected"]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def small_run(model: Path, pairs: Path, cache: Path) -> Callable[..., list[str]]:
    """A function that gives the flags of a small run of train.py into a folder."""
    def make(output_dir, **flags) -> list[str]:
        flags = {"model": model, "data": pairs, "cache_dir": cache, "judge_prompt": "short", "max_length": 256,
                 "max_prompt_length": 64, "batch_size": 3, "max_steps": 6, "lr": 1e-3, "warmup_ratio": 0, "beta": 0.1,
                 "eval_every": 3, "eval_fraction": 0.2, "save_every": 0, "output_dir": output_dir} | flags
        return [part for name, value in flags.items() for part in ("--" + name.replace("_", "-"), str(value))]
    return make
