"""Rows as files, folders and the hub hold them, by split; lines that are no rows."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from twdpo.config import PAPER_DATA
from twdpo.flags import InputError
from twdpo.toy.grammar import toy_rows

TRAIN_SPLITS = ("train_prefs", "train")
TEST_SPLITS = ("test_prefs", "test")


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used, and why."""

    where: str
    reason: str
    row: object


def read_rows(data: str, splits: tuple[str, ...]) -> tuple[list[tuple[str, object]], list[BadRow]]:
    """Rows of one data source as (FILE:LINE, value), and lines that are not JSON. Raises InputError."""
    if data == "toy":
        train_rows, test_rows = toy_rows()
        name, rows = ("test", test_rows) if splits[0] in TEST_SPLITS else ("train", train_rows)
        return [(f"toy[{name}]:{number}", row) for number, row in enumerate(rows, 1)], []
    path = Path(data)
    if path.is_file() and path.suffix == ".jsonl":
        return read_jsonl(path)
    if path.is_file() and path.suffix == ".json":
        try:
            rows = json.loads(path.read_text(encoding="utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: not JSON ({error})") from error
        if not isinstance(rows, list):
            raise InputError(f"{path}: it must hold a JSON list of rows, not {type(rows).__name__}")
        return [(f"{path}:{number}", row) for number, row in enumerate(rows, 1)], []
    if path.suffix in (".jsonl", ".json") and not path.exists():
        raise InputError(f"{path}: no such file")
    dataset = load_hub_splits(data)
    split = next((name for name in splits if name in dataset), None)
    if split is None:
        raise InputError(f"{data}: none of the splits {', '.join(splits)} is there; it has {', '.join(dataset)}")
    return [(f"{data}[{split}]:{number}", dict(row)) for number, row in enumerate(dataset[split], 1)], []


def read_jsonl(path: Path) -> tuple[list[tuple[str, object]], list[BadRow]]:
    """One JSON value a line; blank lines are skipped, line numbers count them."""
    rows, bad = [], []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            rows.append((f"{path}:{number}", json.loads(line.decode("utf-8-sig"))))
        except (ValueError, RecursionError) as error:  # UnicodeDecodeError, JSONDecodeError, lists in lists in ...
            bad.append(BadRow(f"{path}:{number}", f"not JSON: {error}", line.decode("utf-8", "replace")))
    return rows, bad


def load_hub_splits(data: str):
    """A local directory or file, or a hub id (`id`, `id@revision`), by the `datasets` library: rows by split name."""
    try:
        import datasets
    except ImportError as error:
        implied = data in PAPER_DATA.values()
        raise InputError(f"--data {data}{' (what the paper trains on; name your own pairs with --data FILE)' * implied}"
                         " is no .jsonl or .json file: data sets of the hub and folders need the datasets library: "
                         "pip install -e '.[hub]', or pip install datasets") from error
    try:
        repository, _, revision = (data, "", "") if Path(data).exists() else data.partition("@")
        loaded = datasets.load_dataset(repository, revision=revision or None)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise InputError(f"--data {data}: it can't be loaded as a data set ({error}). Is there a network, is "
                         "HF_HUB_OFFLINE unset, have you access? Or name pairs of your own with --data FILE") from error
    return loaded


def has_test_split(data: str) -> bool:
    """Whether the data source has a test split of its own."""
    if data == "toy" or Path(data).is_file():
        return data == "toy"
    return any(name in load_hub_splits(data) for name in TEST_SPLITS)


def resolved_name(data: str) -> str:
    """A hub id with the revision that was loaded, where the library says it; other names as they are."""
    if data in ("", "toy") or Path(data).exists():
        return data
    for split in load_hub_splits(data).values():
        for address in split.info.download_checksums or {}:  # hf://datasets/ID@REVISION/FILE
            if match := re.search(r"@([0-9a-f]{40})/", address):
                return f"{data.partition('@')[0]}@{match[1]}"
    return data
