"""What tests of whole runs of train.py share: the rows of metrics.jsonl, compared."""

import json
import math
from pathlib import Path

MEASURED = ("tokens_per_s", "pairs_per_s", "peak_memory_gib")


def read_rows(run_dir: Path) -> list[dict]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in MEASURED} for row in rows]


def assert_close_rows(rows: list[dict], others: list[dict], tolerance: float = 2e-5) -> None:
    assert len(rows) == len(others)
    for row, other in zip(rows, others):
        assert row.keys() == other.keys()
        for name in row:
            assert math.isclose(row[name], other[name], rel_tol=tolerance, abs_tol=tolerance), (row["step"], name)
