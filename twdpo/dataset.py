"""All pairs of a run: read, some held out, bad rows reported or left out."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from twdpo.config import TrainConfig
from twdpo.data_files import (
    TEST_SPLITS,
    TRAIN_SPLITS,
    BadRow,
    Row,
    parse_sources,
    read_rows,
    resolved_name,
    with_test_split,
)
from twdpo.files import hash_json, write_atomic
from twdpo.flags import InputError
from twdpo.pairs import Pair, parse_row


@dataclass(frozen=True)
class Dataset:
    """Pairs to train on, held-out pairs that the data brings along, and the rows that can't be used.

    data, eval_data: names that find them again, a hub id with its revision.
    """

    train: list[Pair]
    held_out: list[Pair]
    bad_rows: list[BadRow]
    data: str
    eval_data: str

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the content of all pairs."""
        return hash_json([pair.key for pair in self.train + self.held_out])


def load_dataset(data: str, eval_data: str, with_held_out: bool = True, empty_answers: str = "refuse",
                 seed: int = TrainConfig.seed) -> Dataset:
    """All pairs of the sources of --data, and those of --eval-data or of the sources' own test splits. Raises
    InputError.

    empty_answers: as the flag says. seed: draws the shares of sources.
    """
    sources = parse_sources(data)
    train, bad = parse_rows(read_rows(sources, TRAIN_SPLITS, seed), empty_answers)
    if not train and not bad:
        raise InputError(f"--data {data}: it holds no pair")
    held_out: list[Pair] = []
    if with_held_out and eval_data:
        rows = read_rows(parse_sources(eval_data, "--eval-data"), TEST_SPLITS + TRAIN_SPLITS, seed)
        held_out, bad_held_out = parse_rows(rows, empty_answers)
        if not held_out and not bad_held_out:
            raise InputError(f"--eval-data {eval_data}: it holds no pair")
        bad = bad + bad_held_out
    elif with_held_out:
        held_out, bad_held_out = parse_rows(read_rows(with_test_split(sources), TEST_SPLITS), empty_answers)
        bad = bad + bad_held_out
    return Dataset(train, held_out, bad, resolved_name(data), resolved_name(eval_data))


def parse_rows(rows: Iterable[Row], empty_answers: str) -> tuple[list[Pair], list[BadRow]]:
    """Rows -> pairs; every row ends up in one of the two lists."""
    pairs, bad = [], []
    for item in rows:
        if isinstance(item, BadRow):
            bad.append(item)
            continue
        where, row = item
        try:
            pairs.append(parse_row(where, row, empty_answers))
        except ValueError as error:
            bad.append(BadRow(where, str(error), row))
    return pairs, bad


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
    lines = [json.dumps({"where": bad.where, "reason": bad.reason, "row": bad.row}, default=str) + "\n"
             for bad in bad_rows]  # str: of dates and bytes, which .parquet may hold
    write_atomic(path, lambda temporary: temporary.write_text("".join(lines), encoding="utf-8"))
    print(f"{message}\nThey are left out and stand in {path}.")
