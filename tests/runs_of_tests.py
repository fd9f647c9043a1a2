"""What tests of whole runs of train.py share: the rows of metrics.jsonl, compared."""

import json
import math
from pathlib import Path

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
