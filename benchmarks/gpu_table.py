"""What benchmarks/gpu.sh left in a folder, as a table of one screen.

    python benchmarks/gpu_table.py runs/gpu-20261128-101500

A line a part: how it ended, its seconds, and what it showed; what is not there, can't be read, or was cut off, is said.
"""

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path

WIDTH = 130


def read_json(path: Path) -> dict:
    """A report, empty if there is none; of what can't be read no more than `unreadable`, a line that says so."""
    try:
        report = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        return report if isinstance(report, dict) else {"unreadable": f"{path.name} holds no report"}
    except (OSError, ValueError) as error:
        return {"unreadable": f"{path.name} can't be read: {error}"}


def read_rows(path: Path) -> list[dict]:
    """Of a .jsonl file; a last line that was cut off is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def of_tests(folder: Path) -> list[str]:
    log = folder / "tests.log"
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    wrong = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return [line.strip("= ") for line in lines if re.search(r"\d+ (passed|failed|error)", line)][-1:] + wrong[:4]


def of_op(folder: Path) -> list[str]:
    report = read_json(folder / "loss_kernel.json")
    lines = [f"{row['head']}, {row['tokens']:,} tokens: {row['method']}: " + (row.get("note") or (
        f"{row['forward_backward_ms']:.2f} ms, {row['times_8nvd']:.2f} x 8NVD, {row.get('over_ours', 1):.2f} x ours, "
        f"{row['peak_extra_mib']:.0f} MiB")) for row in report.get("rows", ())]
    return lines + [f"not here: {name}: {why}" for name, why in report.get("missing", {}).items()]


def of_steps(folder: Path, name: str) -> list[str]:
    lines = []
    for row in read_json(folder / f"{name}.json").get("rows", ()):
        text = row.get("note")
        if not text:
            text = f"{row['step_seconds']:.2f} s a step, {row['pairs_per_s']:.1f} pairs/s"
            text += f", MFU {row['mfu']:.1%}" if "mfu" in row else ""
            text += f", {row['peak_gib']:.1f} GiB"
            more = [f"{row[f'{name}_gib']:.1f} {name}" for name in ("reserved", "planned") if f"{name}_gib" in row]
            text += f" ({', '.join(more)})" if more else ""
        lines.append(f"{row['model']}: {row['way']}: {text}")
    return lines


def of_attention(folder: Path) -> list[str]:
    return [f"{row['way']}: " + (row.get("note") or (
        f"first time {row['first_ms_40_lengths']:.1f} ms for 40 lengths, {row['first_ms_one_length']:.1f} for one: "
        f"{row['ratio']:.2f} x")) for row in read_json(folder / "attention.json").get("rows", ())]


def of_extraction(folder: Path) -> list[str]:
    lines = []
    for row in read_json(folder / "extraction.json").get("rows", ()):
        text = row.get("note")
        if not text:
            text = f"{row['seconds_a_pair']:.3f} s a pair (first call {row['first_seconds_a_pair']:.3f})"
            text += f", {row['over_limit']:.2f} x bare trunk" if "over_limit" in row else ""
            text += f", {row['peak_extra_mib']:.0f} MiB"
        lines.append(f"{row['tokens']:,} tokens: {row['way']}: {text}")
    return lines


def of_toy(folder: Path) -> list[str]:
    rows = [row for row in read_rows(folder / "toy-metrics.jsonl") if "eval/reward_accuracy" in row]
    if not rows:
        return []
    text = f"step {rows[-1]['step']}: held-out accuracy {rows[-1]['eval/reward_accuracy']:.3f}"
    lift = rows[-1].get("eval/planted_lift")
    return [text + (f", planted lift {lift:.2f}" if lift is not None else "")]


def of_online(folder: Path) -> list[str]:
    return [f"{row['way']}: " + (row.get("note") or f"{row['times_dpo']:.2f} x dpo's step" + (
        f", the source {row['source_share']:.1%}" if "source_share" in row else ""))
        for row in read_json(folder / "online_costs.json").get("rows", ())]


PARTS: dict[str, tuple[str, Callable[[Path], list[str]]]] = {
    "tests": ("GPU tests", of_tests),
    "op": ("the fused op", of_op),
    "step": ("a training step", lambda folder: of_steps(folder, "train_step")),
    "attention": ("new lengths", of_attention),
    "extraction": ("extraction, real lengths", of_extraction),
    "online": ("what reads the policy", of_online),
    "toy": ("the default run", of_toy),
    "trl": ("TRL at 1B", lambda folder: of_steps(folder, "trl")),
}


def table(folder: Path) -> str:
    ends = {row["part"]: row for row in read_rows(folder / "parts.jsonl")}
    reports = [read_json(path) for path in sorted(folder.glob("*.json"))]
    machine = next((report["machine"] for report in reports if "machine" in report), {})
    lines = [", ".join(f"{name} {value}" for name, value in machine.items()) or "no benchmark wrote a result"]
    lines += [report["unreadable"] for report in reports if "unreadable" in report]
    for part, (title, details) in PARTS.items():
        end = ends.get(part)
        took = f"{end['seconds']} of {end['limit']} s: {end['status']}" if end else "not reached"
        found = details(folder)
        lines.append(f"{title + ':':26}{took}" + ("" if found or not end or end["status"].startswith("left out")
                                                  else "; it left no result"))
        lines += ["  " + line for line in found]
    lines = [line if len(line) <= WIDTH else line[:WIDTH - 3] + "..." for line in lines]
    return "\n".join([f"results in {folder}", *lines])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="what gpu.sh wrote")
    folder = parser.parse_args(argv).folder
    if not folder.is_dir():
        parser.error(f"{folder} is no folder")
    print(table(folder))


if __name__ == "__main__":
    main()
