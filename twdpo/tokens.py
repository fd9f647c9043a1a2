"""Tokens with their characters: one tokenisation with offsets, truncation.

A rendered conversation is tokenised in one call, so that its ids are those of `apply_chat_template(tokenize=True)`.
Only text of the data that spells a special token is tokenised apart, so that no row can end a turn.
Character spans count from the start of the answer as the row gives it, so they mean the same for every tokenizer.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np

from twdpo.chat import Chat
from twdpo.data_files import BadRow
from twdpo.flags import InputError
from twdpo.pairs import Pair
from twdpo.printed import Piece, Printed, PrintedAnswer, print_pair, prompt_pieces


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
    examples, bad, counts = [], [], Counter()
    for pair in progress(pairs):
        try:
            examples.append(tokenize_pair(chat, pair, max_length, max_prompt_length, counts))
        except ValueError as error:
            bad.append(BadRow(pair.where, str(error), pair.to_row()))
    return examples, bad, counts


def tokenize_pair(chat: Chat, pair: Pair, max_length: int, max_prompt_length: int, counts: Counter) -> Example:
    """One pair -> Example. Raises ValueError with the reason when it can't be."""
    printed, tokenizer = print_pair(chat, pair), chat.tokenizer
    counts.update(printed.notes)
    prompt_ids, tails = tokenize_printed(chat, pair, printed, counts)
    prompt_is_cut = len(prompt_ids) > max_prompt_length
    if prompt_is_cut:
        bos = prompt_ids[:1] if prompt_ids[:1] == [tokenizer.bos_token_id] else []
        prompt_ids = bos + prompt_ids[len(prompt_ids) - max_prompt_length + len(bos):]
    responses = []
    for side, tail, answer in zip(("chosen", "rejected"), tails, printed.answers):
        responses.append(make_response(chat, *tail, answer, printed.end, max_length - len(prompt_ids)))
        counts[f"{side} answers cut"] += responses[-1].is_cut
    return Example(pair, np.array(prompt_ids, dtype=np.int32), *responses, prompt_is_cut)


def tokenize_printed(chat: Chat, pair: Pair, printed: Printed, counts: Counter
                     ) -> tuple[list[int], list[tuple[list[int], np.ndarray]]]:
    """(ids of the prompt, ids and spans of what follows it for either answer, characters counted from there)."""
    tokenizer, pattern, end = chat.tokenizer, chat.special_pattern, printed.end
    texts = (pair.extras, *(text for _, text in pair.messages), pair.chosen, pair.rejected)
    if not chat.templated and any(map(pattern.search, texts)):
        counts["rows that spell a special token, tokenised in pieces"] += 1
        return (encode_pieces(tokenizer, prompt_pieces(chat, pair, printed.prompt))[0],
                [encode_pieces(tokenizer, [*answer_pieces(answer), (end, False)]) for answer in printed.answers])
    prompt, texts = printed.prompt, [answer.text + end for answer in printed.answers]
    wholes = [] if chat.apart else encode(tokenizer, [prompt + text for text in texts])
    if num_prompt := find_prompt(prompt, wholes):
        prompt_ids = wholes[0][0][:num_prompt]
        tails = [(ids[num_prompt:], spans_T2[num_prompt:] - len(prompt)) for ids, spans_T2 in wholes]
    else:
        prompt_ids, tails = tokenize_apart(tokenizer, prompt, texts, wholes)
        counts["answers that merge with the prompt, tokenised apart"] += sum(
            ids[:len(prompt_ids)] != prompt_ids for ids, _ in wholes)
    for place, ((_, spans_T2), answer) in enumerate(zip(tails, printed.answers)):
        stops_T = spans_T2[:, 1]
        if end and not ((stops_T > answer.pieces[0][0]) & (stops_T <= len(answer.text))).any():
            # All that is copied of the answer merges with what ends the turn.
            counts["answers that merge with the end of the turn, tokenised apart"] += 1
            lead = prompt[len(prompt) + int(spans_T2[:, 0].min(initial=0)):]  # white space that went with the answer
            ids, spans_T2 = encode_pieces(tokenizer, [(lead + answer.text, False), (end, False)])
            tails[place] = ids, spans_T2 - len(lead)
    return prompt_ids, tails


def answer_pieces(answer: PrintedAnswer) -> list[Piece]:
    """What follows the prompt as text of the data and, between it, of the template."""
    pieces, stop = [], 0
    for place, _, length in answer.pieces:
        pieces += [(answer.text[stop:place], False), (answer.text[place:place + length], True)]
        stop = place + length
    return [*pieces, (answer.text[stop:], False)]


def tokenize_apart(tokenizer, before: str, texts: list[str], wholes: list[tuple[list[int], np.ndarray]]
                   ) -> tuple[list[int], list[tuple[list[int], np.ndarray]]]:
    """As `tokenize_printed`, of a prompt `before` and either text after it, each by itself; but for those of the whole
    sequences `wholes`, if given, that begin with the prompt's own tokens."""
    ways = [(encode(tokenizer, [before[:stop]])[0][0], stop)
            for stop in dict.fromkeys((len(before), len(before.rstrip())))]
    prompt_ids, stop = next(((own, stop) for own, stop in ways if any(ids[:len(own)] == own for ids, _ in wholes)),
                            ways[0])
    num_prompt, tails = len(prompt_ids), []
    for place, (apart_ids, apart_T2) in enumerate(encode(tokenizer, [before[stop:] + text for text in texts])):
        if wholes and wholes[place][0][:num_prompt] == prompt_ids:
            ids, spans_T2 = wholes[place]
            tails.append((ids[num_prompt:], spans_T2[num_prompt:] - len(before)))
        else:
            tails.append((apart_ids, apart_T2 - (len(before) - stop)))
    return prompt_ids, tails


def find_prompt(before: str, wholes: list[tuple[list[int], np.ndarray]]) -> int:
    """How many tokens of both sequences are the prompt `before`; 0 when a token of one holds both prompt and answer.

    White space at the end of the prompt may go with the answer: some tokenizers join it to the first word.
    """
    for end in (len(before), len(before.rstrip())):
        firsts = [int(np.argmax(spans_T2[:, 1] > end)) for _, spans_T2 in wholes]
        whole = all(not before[spans_T2[first, 0]:].strip() for (_, spans_T2), first in zip(wholes, firsts))
        if wholes and whole and wholes[0][0][:firsts[0]] == wholes[1][0][:firsts[1]]:
            return firsts[0]
    return 0


def make_response(chat: Chat, ids: list[int], spans_T2: np.ndarray, answer: PrintedAnswer, end: str, budget: int
                  ) -> Response:
    """y: the tokens of the answer and of the end of the turn, at most `budget`; a cut answer loses its whole end.

    ids, spans_T2: what follows the prompt, with characters counted from the start of `answer.text`. A token that
    reaches past the answer belongs to the end of the turn, though it may cover the answer's last characters.
    """
    length = len(answer.text)
    row_C = np.full(length, -1)  # the place in the row's answer of each character, -1 for the template's
    for place, start, num in answer.pieces:
        row_C[place:place + num] = np.arange(start, start + num)
    copied = np.flatnonzero(row_C >= 0)
    before_C = np.concatenate([[0], np.cumsum(row_C >= 0)])  # copied characters before each place
    first_N, stop_N = np.clip(spans_T2, 0, length).T
    left_N, right_N = before_C[first_N], before_C[stop_N]
    # A token of no copied character stands before the next one, or at the end.
    bounds = np.append(row_C[copied], row_C[copied[-1]] + 1)
    spans_N2 = np.stack([bounds[left_N], bounds[left_N]], axis=1)
    covers_N = right_N > left_N
    spans_N2[covers_N, 1] = bounds[right_N[covers_N] - 1] + 1
    # White space of the prompt that a tokenizer joins to the answer covers nothing of it, and is written with it.
    joined_N = (first_N == stop_N) & (first_N < length) & (row_C[np.minimum(first_N, length - 1)] >= 0)
    content_N = (covers_N | joined_N) & (spans_T2[:, 1] <= length)
    if not end:
        if chat.tokenizer.eos_token_id is None:
            raise InputError(f"the chat template of {chat.tokenizer.name_or_path} prints nothing after an answer and "
                             "the tokenizer has no eos token: nothing would end a turn")
        ids, content_N = [*ids, chat.tokenizer.eos_token_id], np.append(content_N, False)
        spans_N2 = np.concatenate([spans_N2, [[bounds[-1], bounds[-1]]]])
    is_cut, num = len(ids) > budget, len(ids)
    if is_cut:
        num = min(int(np.flatnonzero(content_N)[-1]) + 1, budget)
    num_reasoning = min(int((spans_T2[:, 1] <= answer.rest).sum()), num) if answer.rest else 0
    return Response(np.array(ids[:num], dtype=np.int32), spans_N2[:num].astype(np.int32), content_N[:num], is_cut,
                    num_reasoning)
