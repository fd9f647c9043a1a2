"""The columns of the paper's authors: token ids and weights of every pair in one .jsonl, written and read.

    {chosen,rejected}_tokens            ids of the answer's judge tokens
    {chosen,rejected}_weights_31        their weights by layer, counted from 0 (31 is layer 32); each list sums to 1
    {chosen,rejected}_weights_attention_rollout
    cr_last_token, rc_last_token        the judge's likeliest token, chosen first and rejected first

A row holds its input columns too, so that a file of such rows is data and weights at once.
"""

import difflib
import json
import re
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import numpy as np

from twdpo.data_files import BadRow, Row, read_file
from twdpo.files import hash_file, write_atomic
from twdpo.flags import InputError
from twdpo.forms import AS_NAMED, Reading, parse_row
from twdpo.postprocess import average_rounds
from twdpo.tokens import encode
from twdpo.weights_file import ROLLOUT, JudgedAnswer, WeightsFile, pick_layers

SIDES = ("chosen", "rejected")
ROLLOUT_COLUMN = "attention_rollout"
COMPARED = 1 << 20  # tokens times tokens that difflib may compare
MOST_RUNS, NEARBY = 1000, 32  # runs of one answer; tokens between two of them
COLUMN = re.compile(r"(chosen|rejected)_(tokens|weights_(\d+|attention_rollout))|(cr|rc)_last_token")
CONTEXTS = (("", ""), ("\n", "\n"), ("\n", "\n<"), (" ", "\n"))  # what stands around an answer in a judge prompt


def column_of(layer: str) -> str:
    """The suffix of a layer's column: 1-based `32` or `rollout` -> `31`, `attention_rollout`."""
    return ROLLOUT_COLUMN if layer == ROLLOUT else str(int(layer) - 1)


def export_columns(path: Path, rows: Iterable[Row], weights_file: WeightsFile, tokenizer, rounds: str,
                   reading: Reading) -> tuple[int, int]:
    """Write one row per row of the data, in order: (rows, those with null lists because they were not judged).

    weights_file: opened with all its layers (`weights_file.layers` names them). rounds: as the flag says.
    reading: as the run's.
    """
    count = missing = 0

    def write(temporary: Path) -> None:
        nonlocal count, missing
        with open(temporary, "w", encoding="utf-8") as file:
            for item in rows:
                where, row = (item.where, {"unreadable": item.row}) if isinstance(item, BadRow) else item
                columns = row_columns(where, row, weights_file, tokenizer, rounds, reading)
                count, missing = count + 1, missing + (columns["chosen_tokens"] is None)
                given = row if isinstance(row, dict) else {"row": row}
                given = {name: value for name, value in given.items() if not COLUMN.fullmatch(name)}
                file.write(json.dumps(given | columns, default=str) + "\n")  # str: of dates and bytes

    write_atomic(path, write)
    return count, missing


def row_columns(where: str, row: object, weights_file: WeightsFile, tokenizer, rounds: str, reading: Reading
                ) -> dict[str, object]:
    """The columns of one row; null lists when it is not stored."""
    try:
        key = parse_row(where, row, reading.of_texts).key
    except ValueError:
        key = None
    stored = key is not None and key in weights_file
    columns: dict[str, object] = {}
    for number, side in enumerate(SIDES):
        answer = weights_file[key][number] if stored else None
        columns[f"{side}_tokens"] = answer.ids_J.tolist() if answer else None
        for place, layer in enumerate(weights_file.layers):
            columns[f"{side}_weights_{column_of(layer)}"] = (
                average_rounds(answer.attention_LRJ[place], rounds).tolist() if answer else None)
    top_tokens = weights_file.top_tokens(key) if stored else None
    for turn, name in enumerate(("cr_last_token", "rc_last_token")):
        columns[name] = tokenizer.decode([top_tokens[turn]]) if top_tokens is not None else None
    return columns


class WeightsColumns:
    """A file of exported rows, opened for reading like a weights file; both rounds are one here."""

    def __init__(self, path: str | Path, layer: str, tokenizer, reading: Reading = AS_NAMED):
        """layer: as the flag says. tokenizer: whose ids the file holds. reading: as the run's. Raises InputError."""
        self.directory = Path(path)
        rows = list(read_file(self.directory))
        if bad := next((row for row in rows if isinstance(row, BadRow)), None):
            raise InputError(f"{bad.where}: {bad.reason}")
        names = {name for _, row in rows if isinstance(row, dict) and row.get("chosen_tokens") for name in row}
        if not names:
            raise InputError(f"{path}: no row holds chosen_tokens: it was not written by extract.py --export")
        self.layers = pick_columns(path, names, layer)
        self.meta = {"layers": self.layers, "sha256": hash_file(self.directory)}
        self._answers: dict[int, tuple[JudgedAnswer, JudgedAnswer]] = {}
        for where, row in rows:
            if isinstance(row, dict) and row.get("chosen_tokens"):
                try:
                    pair = parse_row(where, row, reading.of_texts)
                    if pair.answers_call:
                        raise ValueError("an answer calls tools: take the folder that extract.py writes")
                    self._answers[pair.key] = tuple(read_answer(row, side, self.layers, tokenizer, getattr(pair, side))
                                                    for side in SIDES)
                except KeyError as error:
                    raise InputError(f"{where}: it has no column {error}, other rows have") from error
                except (ValueError, TypeError, OverflowError) as error:
                    raise InputError(f"{where}: its weights can't be read ({error})") from error

    def __contains__(self, key: int) -> bool:
        return key in self._answers

    def __getitem__(self, key: int) -> tuple[JudgedAnswer, JudgedAnswer]:
        """The chosen and the rejected answer of a pair."""
        return self._answers[key]

    @property
    def has_verdicts(self) -> bool:
        """No: the columns hold the judge's likeliest tokens, not its verdicts."""
        return False

    def verdict_statistics(self, keys: list[int]) -> dict[str, float]:
        """Empty: there are none."""
        return {}


def pick_columns(path: str | Path, names: set[str], layer: str) -> list[str]:
    """The layers that --layer names of those that rows of these columns hold, 1-based. Raises InputError."""
    names = [name.removeprefix("chosen_weights_") for name in names if name.startswith("chosen_weights_")]
    numbers = sorted(int(name) + 1 for name in names if name.isdigit())
    stored = list(map(str, numbers)) + [ROLLOUT] * (ROLLOUT_COLUMN in names)
    return pick_layers(layer, stored, path)


def read_answer(row: dict[str, object], side: str, layers: list[str], tokenizer, answer: str) -> JudgedAnswer:
    """One answer's ids, spans and weights. Raises ValueError."""
    ids_J = np.array(row[f"{side}_tokens"], dtype=np.int32)
    weights = [row[f"{side}_weights_{column_of(layer)}"] for layer in layers]
    if any(len(each) != len(ids_J) for each in weights):
        raise ValueError(f"{side} has {len(ids_J)} tokens and {', '.join(str(len(each)) for each in weights)} weights")
    weights_LJ = np.array(weights, dtype=np.float32)
    if not len(ids_J) or ids_J.min() < 0:
        raise ValueError(f"{side}_tokens is empty or holds a number that is no token")
    if not (np.isfinite(weights_LJ).all() and (weights_LJ >= 0).all()):
        raise ValueError(f"{side} has weights that are negative or not finite")
    return JudgedAnswer(ids_J, token_spans(tokenizer, ids_J, answer), weights_LJ[:, None])


def token_spans(tokenizer, ids_J: np.ndarray, answer: str) -> np.ndarray:
    """The characters of the answer that its judge tokens cover, int32 [J, 2]. Raises ValueError.

    The answer is tokenised again, with what may stand around it in a prompt; where no surroundings give the same
    tokens, those that agree keep their characters and the others share what lies between.
    """
    if not answer.strip():  # --empty-answers space: whatever white space its tokens spell is the answer
        return np.full((len(ids_J), 2), (0, len(answer)), dtype=np.int32)
    for text in dict.fromkeys((answer, answer.strip())):
        for before, after in CONTEXTS:
            found, spans_T2 = encode(tokenizer, [before + text + after])[0]
            spans_T2 = np.clip(spans_T2 - len(before), 0, len(text)) + answer.find(text)
            if (place := find_run(found, ids_J)) >= 0:
                return spans_T2[place:place + len(ids_J)].astype(np.int32)
    spans_J2 = np.full((len(ids_J), 2), -1, dtype=np.int32)
    for place, own, size in common_runs(found, ids_J.tolist()):
        spans_J2[own:own + size] = spans_T2[place:place + size]
    known = spans_J2[:, 0] >= 0
    if known.sum() < 0.5 * len(ids_J):
        raise ValueError(f"its tokens spell {tokenizer.decode(ids_J.tolist())!r:.60}, which is no part of the answer; "
                         "--weights-tokenizer must be the one that made them")
    places = np.arange(len(ids_J))
    before = np.maximum.accumulate(np.where(known, places, -1))
    after = np.minimum.accumulate(np.where(known, places, len(ids_J))[::-1])[::-1]
    starts = np.where(before >= 0, spans_J2[before, 1], 0)
    ends = np.where(after < len(ids_J), spans_J2[np.minimum(after, len(ids_J) - 1), 0], len(answer))
    spans_J2[~known] = np.stack([starts, ends], axis=1)[~known]
    return np.stack([spans_J2[:, 0], np.maximum(spans_J2[:, 0], spans_J2[:, 1])], axis=1)


def find_run(ids_T: np.ndarray | list[int], ids_J: np.ndarray) -> int:
    """Where ids stand within others, in one run; -1: nowhere."""
    (whole, run), place = (np.asarray(ids, dtype=np.int32).tobytes() for ids in (ids_T, ids_J)), -1
    while (place := whole.find(run, place + 1)) >= 0:
        if place % 4 == 0:
            return place // 4
    return -1


def common_runs(ids: list[int], own: list[int]) -> list[tuple[int, int, int]]:
    """(place in `ids`, place in `own`, length) of runs that both have, in order: what difflib finds, and of much text,
    which it would compare for minutes, runs that begin near the end of the one before."""
    if len(ids) * len(own) <= COMPARED:
        return difflib.SequenceMatcher(None, ids, own, autojunk=False).get_matching_blocks()
    runs, place, own_place = [], 0, 0
    for _ in range(MOST_RUNS):
        step = next(((i, total - i) for total in range(NEARBY) for i in range(total + 1)
                     if ids[place + i:place + i + 4] == own[own_place + total - i:own_place + total - i + 4]), None)
        if step is None or place + step[0] >= len(ids) or own_place + step[1] >= len(own):
            break
        place, own_place = place + step[0], own_place + step[1]
        length = next((k for k, (one, other) in enumerate(zip(islice(ids, place, None), islice(own, own_place, None)))
                       if one != other), min(len(ids) - place, len(own) - own_place))
        runs.append((place, own_place, length))
        place, own_place = place + length, own_place + length
    return runs
