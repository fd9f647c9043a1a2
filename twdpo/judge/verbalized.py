"""The verbalised self-judge (paper section 4.2, Fig. 7 and 8): the model splits an answer into parts and scores each.

Its output is read tolerantly, its parts are found in the answer one after another, and an answer whose tokens are not
covered well enough takes its pair out of the training (paper: 90 %). The scores' folder:

    meta.json                what they depend on
    shard-NNNNN-HASH.safetensors
                             E pairs each, J parts of all their answers (chosen, then rejected, pair by pair):
        key_E                int64 content key of the pair
        length_E2            int32 parts of chosen and rejected
        spans_J2             int32 characters of the row's answer that each part covers
        score_J              int32, 1 (filler) to 5 (critical)
        matched_E2           fp32 share of each answer's tokens that are covered by parts
"""

import ast
import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from twdpo.flags import InputError
from twdpo.stored import Damaged
from twdpo.weights_file import read_meta, read_shard, shard_paths

WHITE_SPACE = 1000  # characters of it that a part may lack, and is found all the same
MIN_MATCHED = 0.9  # paper section 4.2

SYSTEM_PROMPT = """\
You are an expert in linguistics. Given a question and a response, split the response into parts and rate the \
importance of each part relative to the user's question on a scale of 1 (filler) to 5 (critical content).

Guidelines

* Split the response into parts that are as fine-grained as possible. The split needs to be on phrase-level or \
word-level. Try not to simply split by sentences or paragraphs, as this is too coarse.
* The parts need to be a disjoint partition of the original response. When concatenated, they should cover all the \
tokens in the original response. Each part needs to be non-empty. Different parts cannot overlap with each other.
* Part M needs to contain text that immediately follow part M-1.
* For example, given a response consisting of 5 tokens (i.e., response = "t1 t2 ... t5"), (part_1="t1 t2" \
part_2="t3 t4 t5") is a legal split, (part_1="t1 t2" part_2="t4 t5") is an illegal split.

Format

* Output ONLY a JSON list of tuples in the format: [{"part_1_text", score_1}, {"part_2_text", score_2} ..., \
{"part_M_text", score_(M)}]
* The accompanied score for each part needs to be an integer from 1 to 5."""  # Fig. 7
USER_PROMPT = """\
Question: {question}

Response: {answer}"""  # Fig. 8

# A quoted text, then its score: as the next item, as the value of its own key, or of a second key. The text ends at
# the first quote that a score and a closing bracket or a comma follow, so that quotes within it need not be escaped. A
# number out of range, or a word in place of the score, ends the part all the same.
OPENING = re.compile(r"""["'\u201c\u2018]""")
CLOSING = re.compile(r"""(?<!\\)(?P<escapes>(?:\\\\)*)(?P<quote>["'\u201d\u2019])\s*[,:]\s*"""
                     r"""(?:["']?\w[\w ]*["']?\s*[:=]\s*)?(?:["']?(?P<score>-?\d+)(?:\.0)?["']?\s*(?=[\]\)\},]|$)"""
                     r"""|["'][^"'\]]{0,20}["']\s*(?=[\]\)]))""", re.DOTALL)
KEY = re.compile(r"""^\s*(?:text|part|phrase|part_\d+(?:_text)?|content|segment)["']?\s*[:=]\s*["']""")


def parse_parts(output: str) -> list[tuple[str, int]]:
    """(text, score) of every part that a model's output names, in order; what can't be read is skipped.

    Reads JSON lists, objects and tuples in either kind of quotes, code fences, text around the list, and a list that
    was cut off.
    """
    for opening, closing in ("[]", "{}"):
        first, last = output.find(opening), output.rfind(closing)
        if first < 0 or last < first or (opening == "{" and "[" in output):
            continue
        text = output[first:last + 1]
        # Objects as lists of pairs: a text may occur twice as a key. Fig. 7's own format is a Python list of sets.
        for load in (lambda text: json.loads(text, object_pairs_hook=list), ast.literal_eval):
            try:
                return read_parts(load(text))
            except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
                continue  # the next reader, and in the end the one below, which reads what it can
    parts, place = [], 0
    while opening := OPENING.search(output, place):
        closing = CLOSING.search(output, opening.end())
        if not closing:  # nor for any later opening: so the whole is read once
            break
        if closing["score"] in ("1", "2", "3", "4", "5"):
            text = output[opening.end():closing.start("quote")]
            parts.append((unescape(KEY.sub("", text)), int(closing["score"])))
        place = closing.end()
    return parts


def read_parts(value: object) -> list[tuple[str, int]]:
    """The parts of a list that a parser has read. Raises ValueError when it is no such list."""
    items = list(value.items()) if isinstance(value, dict) else value
    if not isinstance(items, (list, tuple)):
        raise ValueError(f"no list: {value!r:.40}")
    parts = [read_part(item) for item in items]
    return [part for part in parts if part is not None]


def read_part(item: object) -> tuple[str, int] | None:
    """(text, score) of `["text", 3]`, `{"text": 3}` or `{"part": "text", "score": 3}`; None when it has no score."""
    if isinstance(item, dict):
        item = list(item.items())
    if isinstance(item, (set, frozenset)):
        item = sorted(item, key=lambda member: not isinstance(member, str))
    if not isinstance(item, (list, tuple)) or not item:
        return None
    if all(isinstance(member, (list, tuple)) and len(member) == 2 for member in item):  # an object's pairs
        item = item[0] if len(item) == 1 else [value for _, value in item]
    if len(item) == 2 and isinstance(item[0], str) and (score := read_score(item[1])):
        return item[0], score
    texts = [member for member in item if isinstance(member, str) and not read_score(member)]
    scores = [score for member in item if (score := read_score(member))]
    return (texts[0], scores[0]) if len(texts) == 1 and len(scores) == 1 else None


def read_score(value: object) -> int | None:
    """1 to 5, as a number or as text; None for anything else."""
    if isinstance(value, str):
        value = value.strip().removesuffix(".0")
        return int(value) if value in ("1", "2", "3", "4", "5") else None
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return int(value) if is_number and value in (1, 2, 3, 4, 5) else None


def unescape(text: str) -> str:
    """JSON's escapes resolved; text that is no valid JSON string as it is."""
    try:
        return json.loads('"' + re.sub(r'(?<!\\)"', r'\\"', text).replace("\n", "\\n").replace("\\'", "'") + '"')
    except ValueError:
        return text


def locate_parts(answer: str, parts: list[tuple[str, int]]) -> tuple[np.ndarray, np.ndarray]:
    """(spans_J2, score_J) of the parts that are found in the answer, each after the one before.

    White space may differ. A part that is not found is skipped, so its characters have no score.
    """
    spans, scores, place = [], [], 0
    for text, score in parts:
        words = text.split()
        if not words:
            continue
        ahead = 2 * len(text) + 40  # further on it is a later occurrence of a text that the model made up here
        pattern = re.compile(r"\s*".join(map(re.escape, words)))
        match = pattern.search(answer, place, place + ahead + 2 * len(text) + WHITE_SPACE)
        if match and match.start() - place <= ahead:
            spans.append(match.span())
            scores.append(score)
            place = match.end()
    return np.array(spans, dtype=np.int32).reshape(-1, 2), np.array(scores, dtype=np.int32)


def character_scores(answer_length: int, spans_J2: np.ndarray, score_J: np.ndarray) -> np.ndarray:
    """The score of each character, float64; NaN where no part covers it."""
    scores_C = np.full(answer_length, np.nan)
    for (start, end), score in zip(spans_J2.tolist(), score_J.tolist()):
        scores_C[start:end] = score
    return scores_C


def token_scores(spans_N2: np.ndarray, scores_C: np.ndarray) -> np.ndarray:
    """The mean score of each token's characters, float64 [N]; NaN for one that no part covers."""
    scores_N = np.full(len(spans_N2), np.nan)
    for place, (start, end) in enumerate(spans_N2.tolist()):
        covered = scores_C[start:end][~np.isnan(scores_C[start:end])]
        if len(covered):
            scores_N[place] = covered.mean()
    return scores_N


def matched_share(spans_N2: np.ndarray, spans_J2: np.ndarray, answer: str) -> float:
    """Share of an answer's tokens that parts cover; tokens of white space alone count for nothing."""
    scores_C = character_scores(len(answer), spans_J2, np.ones(len(spans_J2)))
    scores_N = token_scores(spans_N2, scores_C)
    counted = [bool(answer[start:end].strip()) for start, end in spans_N2.tolist()]
    return float((~np.isnan(scores_N))[counted].mean()) if any(counted) else 0.0


def describe_left_out(scores: "ScoresFile", keys: list[int]) -> str:
    """How many of these pairs are covered too little to be used."""
    return (f"{sum(key in scores.left_out for key in keys)} of {len(keys)} pairs have answers of which less than "
            f"{MIN_MATCHED:.0%} of the tokens are scored: they are left out".replace("%", " %"))


@dataclass(frozen=True)
class ScoredAnswer:
    """Parts of one answer: spans_J2, score_J, and the share of its tokens that they cover."""

    spans_J2: np.ndarray
    score_J: np.ndarray
    matched: float


class ScoresFile:
    """A folder of scores, opened for reading. Pairs that are covered too little count as absent."""

    def __init__(self, directory: str | Path):
        """Raises InputError for a folder that can't be read."""
        self.directory, self.meta = Path(directory), read_meta(Path(directory))
        self._answers: dict[int, tuple[ScoredAnswer, ScoredAnswer]] = {}
        for path in shard_paths(self.directory):
            try:
                self._read(path)
            except Damaged as error:
                raise InputError(f"{path} is damaged ({error}): run extract.py into the same folder again, which "
                                 "replaces it") from error
        self.left_out = {key for key, sides in self._answers.items()
                         if min(each.matched for each in sides) < MIN_MATCHED}

    def _read(self, path: Path) -> None:
        arrays = read_shard(path)
        ends = np.cumsum(arrays["length_E2"].reshape(-1))[:-1]
        spans, scores = np.split(arrays["spans_J2"], ends), np.split(arrays["score_J"], ends)
        for number, key in enumerate(arrays["key_E"].tolist()):
            self._answers[key] = tuple(
                ScoredAnswer(spans[2 * number + side], scores[2 * number + side],
                             float(arrays["matched_E2"][number, side])) for side in (0, 1))

    def __contains__(self, key: int) -> bool:
        return key in self._answers and key not in self.left_out

    def __getitem__(self, key: int) -> tuple[ScoredAnswer, ScoredAnswer]:
        """The chosen and the rejected answer of a pair."""
        return self._answers[key]
