"""Preference pairs: read, validated, some held out; bad rows.

Accepted rows: {prompt: str, chosen: str, rejected: str}; {prompt?, chosen: messages, rejected: messages} with whole
conversations; {prompt: messages, chosen: [assistant], rejected: [assistant]}. Other columns are ignored.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from twdpo.config import PAPER_DATA, InputError
from twdpo.files import hash_json, hash_to_int64, write_atomic
from twdpo.toy.grammar import toy_rows

TRAIN_SPLITS = ("train_prefs", "train")
TEST_SPLITS = ("test_prefs", "test")


@dataclass(frozen=True)
class Pair:
    """One preference: the conversation before the answer as (role, text) turns, and its two answers as given."""

    messages: tuple[tuple[str, str], ...]
    chosen: str
    rejected: str
    where: str  # FILE:LINE, for messages to the user; not part of the pair's identity

    @cached_property
    def key(self) -> int:
        """64-bit content key, which names the pair in weights files and caches."""
        return hash_to_int64([self.messages, self.chosen, self.rejected])

    def to_row(self) -> dict[str, object]:
        """The pair as an accepted row."""
        prompt = [{"role": role, "content": text} for role, text in self.messages]
        return {"prompt": prompt} | {side: [{"role": "assistant", "content": getattr(self, side)}]
                                     for side in ("chosen", "rejected")}


def show_question(pair: Pair, what: str) -> str:
    """What the judge sees of the conversation: a single user turn as plain text, else `role: text` blocks; of `first`
    the first user turn alone."""
    if what == "first":
        return next((text for role, text in pair.messages if role == "user"), pair.messages[0][1])
    if len(pair.messages) == 1:
        return pair.messages[0][1]
    return "\n\n".join(f"{role}: {text}" for role, text in pair.messages)


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used, and why."""

    where: str
    reason: str
    row: object


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


def load_dataset(data: str, eval_data: str, with_held_out: bool = True, empty_answers: str = "refuse") -> Dataset:
    """All pairs of a data source, and those of `eval_data` or of the source's own test split. Raises InputError.

    empty_answers: as the flag says.
    """
    train, bad = parse_rows(*read_rows(data, TRAIN_SPLITS), empty_answers)
    if not train and not bad:
        raise InputError(f"--data {data}: it holds no pair")
    held_out: list[Pair] = []
    if with_held_out and eval_data:
        held_out, bad_held_out = parse_rows(*read_rows(eval_data, TEST_SPLITS + TRAIN_SPLITS), empty_answers)
        if not held_out and not bad_held_out:
            raise InputError(f"--eval-data {eval_data}: it holds no pair")
        bad = bad + bad_held_out
    elif with_held_out and has_test_split(data):
        held_out, bad_held_out = parse_rows(*read_rows(data, TEST_SPLITS), empty_answers)
        bad = bad + bad_held_out
    return Dataset(train, held_out, bad, resolved_name(data), resolved_name(eval_data))


def has_test_split(data: str) -> bool:
    """Whether the data source has a test split of its own."""
    if data == "toy" or Path(data).is_file():
        return data == "toy"
    return any(name in load_hub_splits(data) for name in TEST_SPLITS)


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


def resolved_name(data: str) -> str:
    """A hub id with the revision that was loaded, where the library says it; other names as they are."""
    if data in ("", "toy") or Path(data).exists():
        return data
    for split in load_hub_splits(data).values():
        for address in split.info.download_checksums or {}:  # hf://datasets/ID@REVISION/FILE
            if match := re.search(r"@([0-9a-f]{40})/", address):
                return f"{data.partition('@')[0]}@{match[1]}"
    return data


def parse_rows(rows: list[tuple[str, object]], bad: list[BadRow], empty_answers: str
               ) -> tuple[list[Pair], list[BadRow]]:
    """Rows -> pairs; every row ends up in one of the two lists."""
    pairs, bad = [], list(bad)
    for where, row in rows:
        try:
            pairs.append(parse_row(where, row, empty_answers))
        except ValueError as error:
            bad.append(BadRow(where, str(error), row))
    return pairs, bad


def parse_row(where: str, row: object, empty_answers: str = "refuse") -> Pair:
    """One row -> Pair. Raises ValueError with the reason."""
    if not isinstance(row, dict):
        raise ValueError(f"a row must be an object with prompt, chosen and rejected, not {type(row).__name__}")
    for column in ("chosen", "rejected"):
        if column not in row:
            raise ValueError(f"no column {column!r}; the row has {', '.join(map(repr, row)) or 'none'}")
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    if isinstance(chosen, str) and isinstance(rejected, str):
        if not isinstance(prompt, str):
            raise ValueError(f"prompt must be a string when chosen and rejected are, not {type(prompt).__name__}")
        messages, answers = (("user", prompt),), (chosen, rejected)
    else:
        before_w, answer_w = split_conversation("chosen", chosen)
        before_l, answer_l = split_conversation("rejected", rejected)
        if before_w != before_l:
            raise ValueError("the conversations of chosen and rejected differ before the last answer")
        answers = (answer_w, answer_l)
        if before_w:
            messages = before_w
        elif isinstance(prompt, list):
            messages = parse_messages("prompt", prompt)
        elif isinstance(prompt, str):
            messages = (("user", prompt),)
        else:
            raise ValueError("chosen holds an answer alone and there is no prompt")
    if messages[-1][0] == "assistant":
        raise ValueError("the turn before the answers is the assistant's own")
    if empty_answers == "space":
        answers = tuple(text if text.strip() else " " for text in answers)
    for column, text in (*(("prompt", text) for _, text in messages[-1:]), *zip(("chosen", "rejected"), answers)):
        if not text.strip() and (column == "prompt" or empty_answers == "refuse"):
            raise ValueError(f"{column} is empty")
    for text in (*(text for _, text in messages), *answers):
        text.encode("utf-8")  # a lone surrogate raises UnicodeEncodeError, which is a ValueError
    return Pair(messages, *answers, where)


def split_conversation(column: str, value: object) -> tuple[tuple[tuple[str, str], ...], str]:
    """Messages -> (turns before the last one, text of the last one, the assistant's)."""
    messages = parse_messages(column, value)
    if messages[-1][0] != "assistant":
        raise ValueError(f"the last message of {column} is the {messages[-1][0]}'s, not the assistant's")
    return messages[:-1], messages[-1][1]


def parse_messages(column: str, value: object) -> tuple[tuple[str, str], ...]:
    """[{role, content}, ...] -> ((role, text), ...)."""
    if not isinstance(value, list) or not value:
        raise ValueError(f"{column} must be a string or a list of messages that is not empty, not {value!r:.80}")
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f"a message of {column} has no role: {message!r:.80}")
        if not isinstance(message.get("content"), str):
            raise ValueError(f"the content of a message of {column} must be a string: {message!r:.80}")
    return tuple((message["role"], message["content"]) for message in value)


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
