"""All pairs of a run: read, some held out, bad rows reported or left out."""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from twdpo.data_files import TEST_SPLITS, TRAIN_SPLITS, BadRow, has_test_split, read_rows, resolved_name
from twdpo.files import hash_json, write_atomic
from twdpo.flags import InputError
from twdpo.forms import AS_NAMED, Reading, Report, read_pairs
from twdpo.pairs import Pair


@dataclass(frozen=True)
class Dataset:
    """Pairs to train on, held-out pairs that the data brings along, and the rows that can't be used.

    data, eval_data: names that find them again, a hub id with its revision. report: what rows were read as.
    """

    train: list[Pair]
    held_out: list[Pair]
    bad_rows: list[BadRow]
    data: str
    eval_data: str
    report: Report

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the content of all pairs."""
        return hash_json([pair.key for pair in self.train + self.held_out])


def load_dataset(data: str, eval_data: str, with_held_out: bool = True, reading: Reading = AS_NAMED) -> Dataset:
    """All pairs of a data source, and those of `eval_data` or of the source's own test split. Raises InputError.

    reading: how rows become pairs.
    """
    rows, broken = read_rows(data, TRAIN_SPLITS)
    train, bad, report = read_pairs([*broken, *rows], reading)
    if not train and not bad:
        raise InputError(f"--data {data}: it holds no pair")
    held_out: list[Pair] = []
    if with_held_out and (eval_data or has_test_split(data)):
        rows, broken = read_rows(eval_data or data, TEST_SPLITS + TRAIN_SPLITS if eval_data else TEST_SPLITS)
        held_out, bad_held_out, report_held_out = read_pairs([*broken, *rows], reading)
        if eval_data and not held_out and not bad_held_out:
            raise InputError(f"--eval-data {eval_data}: it holds no pair")
        bad, report = bad + bad_held_out, report + report_held_out
    report.check(reading)
    return Dataset(train, held_out, bad, resolved_name(data), resolved_name(eval_data), report)


def split_by_prompt(pairs: list[Pair], fraction: float, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Hold out about `fraction` of the pairs, all rows of a prompt on one side; the order of the file is kept.

    At least one prompt stays to train on, so the pairs of a single prompt give an empty held-out part.
    """
    groups: dict[tuple, int] = {}
    for pair in pairs:
        groups[pair.messages] = groups.get(pair.messages, 0) + 1
    # A prompt's place depends on the seed and its own text alone, so adding rows moves no other prompt.
    order = sorted(groups, key=lambda messages: hashlib.sha256(json.dumps([seed, messages]).encode()).digest())
    held_out, taken = set(), 0
    for messages in order[:-1]:
        if taken >= fraction * len(pairs):
            break
        held_out.add(messages)
        taken += groups[messages]
    return ([pair for pair in pairs if pair.messages not in held_out],
            [pair for pair in pairs if pair.messages in held_out])


def settle_bad_rows(bad_rows: list[BadRow], skip: bool, directory: Path, total: int) -> None:
    """Stop with the first ten bad rows, or write all of them to `directory/rejected_rows.jsonl`.

    Raises InputError unless `skip`; also when no row of `total` is left. Without bad rows an older file is removed.
    """
    path = Path(directory) / "rejected_rows.jsonl"
    if not bad_rows:
        path.unlink(missing_ok=True)
        return
    shown = "\n".join(f"  {bad.where}: {bad.reason}" for bad in bad_rows[:10])
    message = f"{len(bad_rows)} of {total} rows can't be used:\n{shown}" + ("\n  ..." if len(bad_rows) > 10 else "")
    if not skip:
        raise InputError(message + "\nMend them, or leave them out with --skip-bad-rows.")
    if len(bad_rows) == total:
        raise InputError(f"{message}\nNo row is left.")
    lines = [json.dumps({"where": bad.where, "reason": bad.reason, "row": bad.row}) + "\n" for bad in bad_rows]
    write_atomic(path, lambda temporary: temporary.write_text("".join(lines), encoding="utf-8"))
    print(f"{message}\nThey are left out and stand in {path}.")
