"""Chat template, and tokens with their characters: one tokenisation with offsets, truncation.

A rendered conversation is tokenised in one call, so that its ids are those of `apply_chat_template(tokenize=True)`.
Only text of the data that spells a special token is tokenised apart, so that no row can end a turn.
Character spans count from the start of the answer as the row gives it, so they mean the same for every tokenizer.
"""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import jinja2
import numpy as np

from twdpo.config import InputError
from twdpo.pairs import BadRow, Pair

Piece = tuple[str, bool]  # (text, whether it comes from the data: then it may not spell special tokens)


@dataclass(frozen=True)
class Answer:
    """An answer as the chat template prints it: `text` begins at character `start` of the answer in the row."""

    text: str
    start: int


@dataclass(frozen=True)
class Response:
    """The tokens y of one answer as the policy is trained on it, n = len(ids).

    ids: int32, content tokens, then the end of the turn unless the answer was cut.
    spans_N2: characters of the row's answer that each token covers; empty at the end of the text for the end of turn.
    num_content: how many of the tokens are content.
    """

    ids: np.ndarray
    spans_N2: np.ndarray
    num_content: int


@dataclass(frozen=True)
class Example:
    """A pair in the policy's tokens."""

    pair: Pair
    prompt_ids: np.ndarray
    chosen: Response
    rejected: Response

    @property
    def together(self) -> int:
        """Tokens of both sequences with the prompt counted once, as in a packed row."""
        return len(self.prompt_ids) + len(self.chosen.ids) + len(self.rejected.ids)

    @property
    def longest(self) -> int:
        """Tokens of the longer of its two sequences."""
        return len(self.prompt_ids) + max(len(self.chosen.ids), len(self.rejected.ids))


def set_chat_template(tokenizer, path: str) -> None:
    """Use the template in `path`, if one is given. Raises InputError when there is none at all."""
    if path:
        try:
            tokenizer.chat_template = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--chat-template {path}: it can't be read as text ({error})") from error
    if not tokenizer.chat_template:
        raise InputError(f"the tokenizer of {tokenizer.name_or_path} has no chat template: give one with "
                         "--chat-template FILE")
    if not tokenizer.is_fast:
        raise InputError(f"the tokenizer of {tokenizer.name_or_path} is not a fast one (tokenizer.json): it has no "
                         "character offsets")


def render(tokenizer, messages: Iterable[tuple[str, str]], generation_prompt: bool = False) -> str:
    """The conversation as the chat template prints it. Raises ValueError when the template refuses it."""
    turns = [{"role": role, "content": text} for role, text in messages]
    try:
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=generation_prompt)
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template refuses the conversation: {error}") from error


def template_pieces(tokenizer, messages: list[tuple[str, str]], open_turns: Iterable[int],
                    generation_prompt: bool = False) -> list[str]:
    """The rendered conversation cut where the texts of `open_turns` stand: fixed text around every one of them.

    Found by rendering marks in their place, so text that looks like a part of the template can't mislead it.
    """
    marks = {turn: f"\ue000{turn}\ue001" for turn in open_turns}
    marked = [(role, marks.get(turn, text)) for turn, (role, text) in enumerate(messages)]
    rest, fixed = render(tokenizer, marked, generation_prompt), []
    for turn in sorted(marks):
        if rest.count(marks[turn]) != 1:
            raise ValueError(f"the chat template prints turn {turn + 1} of the conversation {rest.count(marks[turn])} "
                             "times")
        before, rest = rest.split(marks[turn])
        fixed.append(before)
    return [*fixed, rest]


def printed_text(tokenizer, messages: list[tuple[str, str]], turn: int, before: str, after: str) -> str:
    """What the template prints of one turn's text (some trim it), given the fixed text around it."""
    text = render(tokenizer, messages)
    if not text.startswith(before) or not text[len(before):].endswith(after):
        raise ValueError("the chat template changes what it prints around turn "
                         f"{turn + 1} with its text; the answer can't be told from the template")
    return text[len(before):len(text) - len(after)]


def printed_answers(tokenizer, pair: Pair) -> tuple[str, str, tuple[Answer, Answer]]:
    """(template text before an answer, after it, both answers). Raises ValueError when an answer is not printed."""
    last = len(pair.messages)
    before, after = template_pieces(tokenizer, [*pair.messages, ("assistant", "")], [last])
    answers = []
    for side, given in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        text = printed_text(tokenizer, [*pair.messages, ("assistant", given)], last, before, after)
        if not given.strip():  # --empty-answers space: a space to score even where the template trims it away
            answers.append(Answer(given, 0))
            continue
        start = given.find(text)
        if start < 0 or not text.strip():
            raise ValueError(f"the chat template prints {side} as {text!r:.60}, which is not a part of it")
        answers.append(Answer(text, start))
    return before, after, tuple(answers)


def special_pattern(tokenizer) -> re.Pattern:
    """Matches text that spells one of the tokenizer's special tokens."""
    specials = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    specials |= set(tokenizer.all_special_tokens)
    return re.compile("|".join(map(re.escape, sorted(specials, key=len, reverse=True))) or r"(?!)")


def special_ids(tokenizer) -> set[int]:
    """Ids of the tokenizer's special tokens."""
    ids = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return ids | set(tokenizer.all_special_ids)


def encode(tokenizer, texts: list[str]) -> list[tuple[list[int], np.ndarray]]:
    """Each text in one call, special tokens recognised and none added: (ids, spans_T2)."""
    if not texts:
        return []
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return [(ids, np.array(offsets, dtype=np.int64).reshape(-1, 2))
            for ids, offsets in zip(encoded["input_ids"], encoded["offset_mapping"])]


def encode_pieces(tokenizer, pieces: list[Piece]) -> tuple[list[int], np.ndarray]:
    """Each piece apart; text of the data never becomes a special token. Spans count from the start of all pieces."""
    all_ids, all_spans, start = [], [np.zeros((0, 2), dtype=np.int64)], 0
    for text, from_data in pieces:
        if text:
            encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False,
                                split_special_tokens=from_data)
            all_ids += encoded["input_ids"]
            all_spans.append(np.array(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2) + start)
        start += len(text)
    return all_ids, np.concatenate(all_spans)


def overlapping(spans_T2: np.ndarray, start: int, end: int) -> tuple[int, int]:
    """The range [first, stop) of tokens from the first to the last that overlap the characters [start, end)."""
    hit = np.flatnonzero((spans_T2[:, 0] < end) & (spans_T2[:, 1] > start))
    return (int(hit[0]), int(hit[-1]) + 1) if len(hit) else (0, 0)


def tokenize_pairs(tokenizer, pairs: list[Pair], max_length: int, max_prompt_length: int, progress=iter
                   ) -> tuple[list[Example], list[BadRow], Counter]:
    """Pairs -> examples in the policy's tokens, rows that have none, and counts of what was cut or done apart.

    Prompts keep BOS and their last tokens, `max_prompt_length` in all; responses keep the first tokens that
    `max_length` leaves them.
    """
    pattern, specials = special_pattern(tokenizer), special_ids(tokenizer)
    examples, bad, counts = [], [], Counter()
    for pair in progress(pairs):
        try:
            examples.append(tokenize_pair(tokenizer, pair, pattern, specials, max_length, max_prompt_length, counts))
        except ValueError as error:
            bad.append(BadRow(pair.where, str(error), pair.to_row()))
    counts["answers equal"] = sum(pair.chosen == pair.rejected for pair in pairs)
    return examples, bad, counts


def tokenize_pair(tokenizer, pair: Pair, pattern: re.Pattern, specials: set[int], max_length: int,
                  max_prompt_length: int, counts: Counter) -> Example:
    """One pair -> Example. Raises ValueError with the reason when it can't be."""
    before, after, answers = printed_answers(tokenizer, pair)
    if any(pattern.search(text) for text in (*(text for _, text in pair.messages), pair.chosen, pair.rejected)):
        counts["rows that spell a special token, tokenised in pieces"] += 1
        prompt_ids, _ = encode_pieces(tokenizer, prompt_pieces(tokenizer, pair, before))
        tails = [encode_pieces(tokenizer, [(answer.text, True), (after, False)]) for answer in answers]
    else:
        wholes = encode(tokenizer, [before + answer.text + after for answer in answers])
        if num_prompt := find_prompt(before, wholes):
            prompt_ids = wholes[0][0][:num_prompt]
            tails = [(ids[num_prompt:], spans_T2[num_prompt:] - len(before)) for ids, spans_T2 in wholes]
        else:
            counts["rows whose prompt and answer merge, tokenised apart"] += 1
            [(prompt_ids, _)] = encode(tokenizer, [before])
            tails = encode(tokenizer, [answer.text + after for answer in answers])
    if len(prompt_ids) > max_prompt_length:
        counts["prompts cut"] += 1
        bos = prompt_ids[:1] if prompt_ids[:1] == [tokenizer.bos_token_id] else []
        prompt_ids = bos + prompt_ids[len(prompt_ids) - max_prompt_length + len(bos):]
    responses = []
    for side, tail, answer in zip(("chosen", "rejected"), tails, answers):
        response = cut_response(tokenizer, specials, *tail, answer, max_length - len(prompt_ids))
        counts[f"{side} answers cut"] += response.num_content == len(response.ids)
        responses.append(response)
    return Example(pair, np.array(prompt_ids, dtype=np.int32), *responses)


def find_prompt(before: str, wholes: list[tuple[list[int], np.ndarray]]) -> int:
    """How many tokens of both sequences are the prompt `before`; 0 when a token holds both prompt and answer.

    White space at the end of the prompt may go with the answer: some tokenizers join it to the first word.
    """
    for end in (len(before), len(before.rstrip())):
        firsts = [int(np.argmax(spans_T2[:, 1] > end)) for _, spans_T2 in wholes]
        whole = all(not before[spans_T2[first, 0]:].strip() for (_, spans_T2), first in zip(wholes, firsts))
        if whole and wholes[0][0][:firsts[0]] == wholes[1][0][:firsts[1]]:
            return firsts[0]
    return 0


def prompt_pieces(tokenizer, pair: Pair, before: str) -> list[Piece]:
    """The prompt cut into template text and the texts of its turns, the latter marked as data."""
    messages = [*pair.messages, ("assistant", "x")]
    fixed = template_pieces(tokenizer, messages, range(len(messages)))
    pieces: list[Piece] = []
    for turn in range(len(pair.messages)):
        around = template_pieces(tokenizer, messages, [turn])
        pieces += [(fixed[turn], False), (printed_text(tokenizer, messages, turn, *around), True)]
    pieces.append((fixed[len(pair.messages)], False))
    if "".join(text for text, _ in pieces) != before:
        raise ValueError("it spells a special token and the chat template changes with the text of its turns: the "
                         "prompt can't be told from the template")
    return pieces


def cut_response(tokenizer, specials: set[int], ids: list[int], spans_T2: np.ndarray, answer: Answer, budget: int
                 ) -> Response:
    """y: the content tokens and the first special token after them (the end of the turn), at most `budget` tokens.

    ids, spans_T2: tokens from the first of the answer on, with characters counted from the answer's start. A template
    that prints no special token after the answer gets the tokenizer's eos; what it prints after the end of the turn is
    left out.
    """
    stop = int(np.flatnonzero(spans_T2[:, 0] < len(answer.text))[-1]) + 1
    after = next((place for place in range(stop, len(ids)) if ids[place] in specials), None)
    if after is not None:
        tail = ids[stop:after + 1]
    elif tokenizer.eos_token_id is not None:
        tail = [tokenizer.eos_token_id]
    else:
        raise InputError(f"the chat template of {tokenizer.name_or_path} prints no special token after an answer and "
                         "the tokenizer has no eos token: nothing would end a turn")
    content = np.clip(spans_T2[:stop], 0, len(answer.text))
    spans_N2 = np.concatenate([content, np.full((len(tail), 2), len(answer.text))]) + answer.start
    response_ids, num_content = ids[:stop] + tail, stop
    if len(response_ids) > budget:
        num_content = min(num_content, budget)
        response_ids, spans_N2 = response_ids[:num_content], spans_N2[:num_content]
    return Response(np.array(response_ids, dtype=np.int32), spans_N2.astype(np.int32), num_content)
