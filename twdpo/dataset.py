"""All pairs of a run: read, some held out, bad rows reported or left out."""

import hashlib
import json
import math
import re
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
    exists,
    is_path,
    parse_sources,
    read_rows,
    resolved_name,
    with_test_split,
)
from twdpo.files import hash_json, write_atomic
from twdpo.flags import InputError
from twdpo.forms import AS_NAMED, Reading, Report, read_pairs
from twdpo.pairs import Pair


@dataclass(frozen=True)
class Dataset:
    """Pairs to train on, held-out pairs that the data brings along, and the rows that can't be used.

    held_out_sets: by the names of --eval-data, in its order; "" of a set that has none. data, eval_data: names that
    find them again, a hub id with its revision. report: what rows were read as.
    """

    train: list[Pair]
    held_out_sets: dict[str, list[Pair]]
    bad_rows: list[BadRow]
    data: str
    eval_data: str
    report: Report

    @property
    def held_out(self) -> list[Pair]:
        """Of all sets."""
        return [pair for part in self.held_out_sets.values() for pair in part]

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the content of all pairs."""
        return hash_json([pair.key for pair in self.train + self.held_out])


def load_dataset(data: str, eval_data: str, with_held_out: bool = True, reading: Reading = AS_NAMED,
                 seed: int = TrainConfig.seed) -> Dataset:
    """All pairs of the sources of --data, and those of --eval-data or of the sources' own test splits. Raises
    InputError.

    reading: how rows become pairs. seed: draws the shares of sources.
    """
    sources = parse_sources(data)
    train, bad, report = read_pairs(read_rows(sources, TRAIN_SPLITS, seed), reading)
    if not train and not bad:
        raise InputError(f"--data {data}: it holds no pair")
    sets = parse_eval_data(eval_data)
    held_out_sets: dict[str, list[Pair]] = {}

    def read_set(name: str, source: str, rows: Iterable[Row]) -> None:
        nonlocal bad, report
        held_out_sets[name], more, read_as = read_pairs(rows, reading)
        bad, report = bad + more, report + read_as
        if eval_data and not held_out_sets[name] and not more:
            raise InputError(f"--eval-data {eval_data}: {source if name else 'it'} holds no pair")

    if with_held_out and eval_data:
        for name, source in sets.items():
            read_set(name, source, read_rows(parse_sources(source, "--eval-data"), TEST_SPLITS + TRAIN_SPLITS, seed))
    elif with_held_out and (tested := with_test_split(sources)):
        read_set("", data, read_rows(tested, TEST_SPLITS, seed))
    report.check(reading)
    eval_data = ",".join((f"{name}=" if name else "") + resolved_name(source) for name, source in sets.items())
    return Dataset(train, held_out_sets, bad, resolved_name(data), eval_data, report)


def parse_eval_data(text: str) -> dict[str, str]:
    """--eval-data -> the source of each held-out set by its name: `a=x.jsonl,y.jsonl,b=z.jsonl` are two sets, the first
    of two files; one without names is called "". A path that is there is never taken for a name. Raises InputError.
    """
    if not text or exists(text):
        return {"": text}
    sources: dict[str, str] = {}
    last = ""
    for part in map(str.strip, text.split(",")):
        name, is_named, source = (piece.strip() for piece in part.partition("="))
        if not is_named or is_path(part):  # with a split and a share behind it or without
            sources[last] = f"{sources[last]},{part}" if last in sources else part
            continue
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise InputError(f"--eval-data has {part!r}: no such file, and {name!r} can't name a held-out set "
                             "(NAME=FILE, the name of letters, digits, _ and -)")
        if name in sources:
            raise InputError(f"--eval-data names two sets {name!r}: files of one set stand behind its name, by commas")
        if "" in sources:
            raise InputError(f"--eval-data {text}: {sources['']!r} has no name and {name!r} has one; name all sets")
        if not source:
            raise InputError(f"--eval-data has {part!r}: no file behind the name")
        sources[last := name] = source
    return sources


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


def strict_json(value: object) -> str:
    """JSON that every reader takes: text of what it has no form for (dates and bytes, which .parquet may hold, and
    numbers that are not finite)."""
    try:
        return json.dumps(value, default=str, allow_nan=False)
    except ValueError:
        return json.dumps(without_nan(value), default=str, allow_nan=False)


def without_nan(value: object) -> object:
    """With "nan" and "inf" as text."""
    if isinstance(value, dict):
        return {name: without_nan(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


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
    lines = [strict_json({"where": bad.where, "reason": bad.reason, "row": bad.row}) + "\n" for bad in bad_rows]
    write_atomic(path, lambda temporary: temporary.write_text("".join(lines), encoding="utf-8"))
    print(f"{message}\nThey are left out and stand in {path}.")
