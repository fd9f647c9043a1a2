"""Tokens with their characters: one tokenisation with offsets, truncation.

A rendered conversation is tokenised in one call, so that its ids are those of `apply_chat_template(tokenize=True)`.
Only text of the data that spells a special token is tokenised apart, so that no row can end a turn.
Character spans count from the start of the answer as the row gives it, so they mean the same for every tokenizer.
"""

import re
from collections import Counter
from dataclasses import dataclass

import numpy as np

from twdpo.chat import Answer, Chat, Piece, printed_answers, prompt_pieces
from twdpo.data_files import BadRow
from twdpo.flags import InputError
from twdpo.pairs import Pair


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


@dataclass(frozen=True)
class Response:
    """The tokens y of one answer as the policy is trained on it, n = len(ids).

    ids: int32, the answer's tokens, then the end of the turn unless the answer was cut.
    spans_N2: int32, characters of the row's answer that each token covers; empty where it covers none, as for the end
    of the turn (at the end of the text).
    content_N: bool, tokens of the answer; the others are the template's.
    num_reasoning: how many first tokens are a reasoning model's thinking and the marks around it.
    """

    ids: np.ndarray
    spans_N2: np.ndarray
    content_N: np.ndarray
    is_cut: bool = False
    num_reasoning: int = 0


@dataclass(frozen=True)
class Example:
    """A pair in the policy's tokens."""

    pair: Pair
    prompt_ids: np.ndarray
    chosen: Response
    rejected: Response
    prompt_is_cut: bool = False

    @property
    def together(self) -> int:
        """Tokens of both sequences with the prompt counted once, as in a packed row."""
        return len(self.prompt_ids) + len(self.chosen.ids) + len(self.rejected.ids)

    @property
    def longest(self) -> int:
        """Tokens of the longer of its two sequences."""
        return len(self.prompt_ids) + max(len(self.chosen.ids), len(self.rejected.ids))


def tokenize_pairs(chat: Chat, pairs: list[Pair], max_length: int, max_prompt_length: int, progress=iter
                   ) -> tuple[list[Example], list[BadRow], Counter]:
    """Pairs -> examples in the policy's tokens, rows that have none, and counts of what was cut or done apart.

    Prompts keep BOS and their last tokens, `max_prompt_length` in all; responses keep the first tokens that
    `max_length` leaves them.
    """
    pattern, specials = special_pattern(chat.tokenizer), special_ids(chat.tokenizer)
    examples, bad, counts = [], [], Counter()
    for pair in progress(pairs):
        try:
            examples.append(tokenize_pair(chat.tokenizer, pair, pattern, specials, max_length, max_prompt_length,
                                          counts))
        except ValueError as error:
            bad.append(BadRow(pair.where, str(error), pair.to_row()))
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
    prompt_is_cut = len(prompt_ids) > max_prompt_length
    if prompt_is_cut:
        bos = prompt_ids[:1] if prompt_ids[:1] == [tokenizer.bos_token_id] else []
        prompt_ids = bos + prompt_ids[len(prompt_ids) - max_prompt_length + len(bos):]
    responses = []
    for side, tail, answer in zip(("chosen", "rejected"), tails, answers):
        response = cut_response(tokenizer, specials, *tail, answer, max_length - len(prompt_ids))
        counts[f"{side} answers cut"] += response.is_cut
        responses.append(response)
    return Example(pair, np.array(prompt_ids, dtype=np.int32), *responses, prompt_is_cut)


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
    response_ids, is_cut = ids[:stop] + tail, False
    if len(response_ids) > budget:
        response_ids, spans_N2, is_cut = response_ids[:min(stop, budget)], spans_N2[:min(stop, budget)], True
    return Response(np.array(response_ids, dtype=np.int32), spans_N2.astype(np.int32),
                    np.arange(len(response_ids)) < stop, is_cut)
