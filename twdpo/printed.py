"""A pair as the chat template prints it: where its answers stand there, and what ends the turn.

Where an answer stands is found by rendering marks in its place. What a template prints may differ from the row's answer
by white space and by the marks around a reasoning model's thinking; anything else makes a bad row.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

from twdpo.chat import (
    THINK,
    THINK_END,
    Chat,
    Habit,
    Message,
    end_of_turn,
    first_end,
    habit_of,
    messages_of,
    plain_end,
    render,
    template_pieces,
)
from twdpo.flags import InputError
from twdpo.messages import HEADER, OF_OTHERS
from twdpo.pairs import Pair

Piece = tuple[str, bool]  # (text, whether it comes from the data: then it may not spell special tokens)
WORD = re.compile(rf"{THINK}|{THINK_END}|[^\s<]+|<|\s+")
ENDS = re.compile(r"<\|eot_id\|>|<\|im_end\|>|<end_of_turn>|<\|end\|>|</s>|<\|end_of_text\|>|<\|endoftext\|>"
                  r"|<\uff5cend\u2581of\u2581sentence\uff5c>")


@dataclass(frozen=True)
class Answer:
    """The part of a row's answer that is printed: `text` begins at character `start` of the answer in the row."""

    text: str
    start: int


@dataclass(frozen=True)
class PrintedAnswer:
    """What follows the prompt, up to the end of the turn.

    text: as the template prints it. pieces: (place in text, place in the row's answer, characters) of what is copied
    from the row, in order; between them stands text of the template. given: what the pieces span in the row. rest: the
    place in text where a reasoning model's thinking and the marks around it are over, 0 without.
    """

    text: str
    pieces: tuple[tuple[int, int, int], ...]
    given: Answer
    rest: int = 0


@dataclass(frozen=True)
class Printed:
    """A pair as the template prints it: the prompt, then either answer, then what ends the turn ("": the eos token).

    notes: what is out of the ordinary about it, to be counted and said.
    """

    prompt: str
    answers: tuple[PrintedAnswer, PrintedAnswer]
    end: str
    notes: tuple[str, ...] = ()


def print_pair(chat: Chat, pair: Pair) -> Printed:
    """Where the answers stand in what the template prints. Raises ValueError when one is not printed as it is."""
    if chat.templated:
        return print_templated(chat, pair)
    messages, answers, tools = messages_of(pair)
    last = len(messages)
    before, after = template_pieces(chat, [*messages, {"role": "assistant", "content": ""}], [last], tools)
    habit = habit_of(chat, messages, tools)
    lead = habit.lead if habit.lead and before.endswith(habit.lead) else ""
    notes = [*unprinted_turns(messages, habit), *unprinted_calls(chat, messages, tools)]
    texts, placed = [], []
    for side, answer in answers.items():
        texts.append(render(chat, [*messages, answer], tools))
        placed.append(place_answer(side, answer, texts[-1], before, after))
    if all(text.startswith(before) and pieces[0][0] >= len(before) for text, pieces in zip(texts, placed)):
        stop = len(before)
    else:  # thinking: what the generation prompt does not give, the model has to write
        stop = len(os.path.commonprefix([*texts, before[:len(before) - len(lead)]]))
        stop = min(stop, *(pieces[0][0] for pieces in placed))
    notes += differing_prompt(before, stop, lead, habit)
    end = end_of_turn(chat, after)
    printed = []
    for (side, answer), text, pieces in zip(answers.items(), texts, placed):
        row = answer["content"]
        text = text[stop:len(text) - len(after)]
        if len(answer) > 2:  # with calls: what is printed of them is the answer
            given = Answer(text[pieces[0][0] - stop:], 0)  # spans count from where it is copied
            if row.strip() and (bare(row) not in bare(text) or not prints_calls(chat, messages, answer, tools)):
                notes.append(f"{side} answers of which the chat template leaves out a part, text or a call of tools")
        elif not row.strip():  # --empty-answers space: a space to score even where the template trims it away
            text, given, pieces = row, Answer(row, 0), [(stop, 0, len(row))]
        else:
            first, (_, start, length) = pieces[0][1], pieces[-1]
            given = Answer(row[first:start + length], first)
            left_out = row[:first] + row[start + length:]
            if bare(left_out):
                notes.append(f"{side} answers of which the chat template leaves out a part, thinking for example")
        pieces = tuple((place - stop, start, length) for place, start, length in pieces)
        printed.append(PrintedAnswer(text, pieces, given, end_of_thinking(text)))
    return Printed(before[:stop], tuple(printed), end, tuple(notes))


def unprinted_turns(messages: list[Message], habit: Habit) -> list[str]:
    """Notes about turns before the answer that the template does not print."""
    cures = {"system": " (--fold-system puts it into the user's)"}
    return [f"rows whose turn {place + 1} ({message['role']}) the chat template does not print"
            + cures.get(message["role"], "") for place, (message, times) in enumerate(zip(messages, habit.printed))
            if not times and message["content"].strip()]


def differing_prompt(before: str, stop: int, lead: str, habit: Habit) -> list[str]:
    """A note about a prompt, the first `stop` characters of what stands before an answer, that is not the generation
    prompt."""
    opened = len(before) - len(lead)
    lacking = before[stop:opened] + (habit.lack or "")
    if stop == len(before) and lead.strip():
        how = f"ends in {lead!r}, which the generation prompt lacks"
    elif lacking.strip():
        how = f"lacks {lacking!r}, which the generation prompt ends in"
    elif habit.lead is habit.lack is None:
        how = "differs from the generation prompt"
    else:
        return []
    return [f"rows whose prompt {how} (--sample answers the prompt as it is trained)"]


def prints_calls(chat: Chat, before: list[Message], message: Message, tools: object, after: Sequence[Message] = ()
                 ) -> bool:
    """Whether the template prints what `message` holds beside its text."""
    plain = {"role": message["role"], "content": message["content"]}
    try:
        return render(chat, [*before, plain, *after], tools) != render(chat, [*before, message, *after], tools)
    except ValueError:  # without calls it refuses the message
        return True


def unprinted_calls(chat: Chat, messages: list[Message], tools: object) -> list[str]:
    """Notes about tools, and calls of them before the answer, that the template does not print."""
    messages, notes = [*messages, {"role": "assistant", "content": "x"}], []
    try:
        if tools is not None and render(chat, messages) == render(chat, messages, tools):
            notes.append("rows whose tools the chat template does not print")
    except ValueError:  # it refuses one of the two, so it reads them
        pass
    for place, message in enumerate(messages):
        if "tool_calls" in message and not prints_calls(chat, messages[:place], message, tools, messages[place + 1:]):
            notes.append(f"rows whose turn {place + 1} ({message['role']}) has a call of tools that the chat template "
                         "does not print")
    return notes


def place_answer(side: str, answer: Message, text: str, before: str, after: str) -> list[tuple[int, int, int]]:
    """(place in text, place in the answer, characters) of what is copied from the answer into the rendered `text`.

    before, after: what is printed around an answer without thinking. Raises ValueError.
    """
    given, stop = answer["content"], len(text) - len(after)
    opened = len(before) if text.startswith(before) else len(os.path.commonprefix([text, before]))
    if len(answer) > 2 and text.endswith(after) and text[opened:stop].strip():
        return [(opened, 0, stop - opened)]
    if text.startswith(before) and text.endswith(after) and stop >= opened:
        if not given.strip():
            if len(answer) > 2:
                raise ValueError(f"the chat template prints nothing of {side}, a call of tools")
            return [(opened, 0, len(given))]
        start = given.find(text[opened:stop])
        if start >= 0 and text[opened:stop].strip():
            return [(opened, start, stop - opened)]
    opened -= len(re.search(rf"(?:{THINK_END}\s*|{THINK}\s*)*$", text[:opened])[0])
    pieces = match_words(given, text, opened, stop) if text.endswith(after) and given.strip() else []
    if not pieces:
        raise ValueError(f"the chat template prints {side} as {text[opened:max(stop, opened)]!r:.60}, which is not a "
                         "part of it")
    return pieces


def match_words(given: str, text: str, start: int, stop: int) -> list[tuple[int, int, int]]:
    """As `place_answer`, of an answer that `text[start:stop]` equals but for white space and marks of thinking.

    Empty when it does not.
    """
    ours = [(match.start(), match[0]) for match in WORD.finditer(given)]
    theirs = [(start + match.start(), match[0]) for match in WORD.finditer(text[start:stop])]
    pieces: list[tuple[int, int, int]] = []

    def add(place: int, own: int, length: int) -> None:
        if pieces and pieces[-1][0] + pieces[-1][2] == place and pieces[-1][1] + pieces[-1][2] == own:
            place, own, length = pieces[-1][0], pieces[-1][1], pieces.pop()[2] + length
        if length:
            pieces.append((place, own, length))

    def is_free(word: str) -> bool:
        return word.isspace() or word in (THINK, THINK_END)

    left, right = 0, 0
    while left < len(ours) and right < len(theirs):
        (own, word), (place, printed) = ours[left], theirs[right]
        if word == printed or word.isspace() and printed.isspace():
            add(place, own, len(os.path.commonprefix([word, printed])))
            left, right = left + 1, right + 1
        elif is_free(printed) and not (word.isspace() and not printed.isspace()):
            right += 1
        elif is_free(word):
            left += 1
        else:
            return []
    left_over = [word for _, word in (*ours[left:], *theirs[right:])]
    return pieces if all(map(is_free, left_over)) else []


def bare(text: str) -> str:
    """Without white space and marks of thinking, which templates put elsewhere."""
    return "".join(text.replace(THINK, "").replace(THINK_END, "").split())


def end_of_thinking(text: str) -> int:
    """Where thinking, with the marks and the white space after it, is over in an answer's text; 0 without."""
    thought, mark, rest = text.partition(THINK_END)
    return len(thought) + len(mark) + len(rest) - len(rest.lstrip()) if mark else 0


def prompt_pieces(chat: Chat, pair: Pair, prompt: str) -> list[Piece]:
    """The prompt cut into template text and the texts of its turns, the latter marked as data. Raises ValueError."""
    if pair.extras and chat.special_pattern.search(pair.extras):
        raise ValueError("a tool or a call of it spells a special token: it can't be told from the template")
    messages, _, tools = messages_of(pair)
    messages = [*messages, {"role": "assistant", "content": "x"}]
    habit = habit_of(chat, messages[:-1], tools)
    shown = [place for place, times in enumerate(habit.printed) if times and messages[place]["content"]]
    fixed = template_pieces(chat, messages, [*shown, len(messages) - 1], tools)
    pieces: list[Piece] = []
    for turn, between in zip(shown, fixed):
        before, after = template_pieces(chat, messages, [turn], tools)
        text = render(chat, messages, tools)
        if not text.startswith(before) or not text[len(before):].endswith(after):
            raise ValueError(f"the chat template changes what it prints around turn {turn + 1} with its text")
        pieces += [(between, False), (text[len(before):len(text) - len(after)], True)]
    pieces.append((fixed[len(shown)], False))
    text = "".join(text for text, _ in pieces)
    if not text.startswith(prompt):
        raise ValueError("it spells a special token and the chat template changes with the text of its turns: the "
                         "prompt can't be told from the template")
    last = pieces.pop()[0]
    return [*pieces, (last[:len(last) - (len(text) - len(prompt))], False)]


# ----------------------------------------------------------------------------------------------------------------------
# Texts that are templated already

def find_mark(chat: Chat, pair: Pair) -> str:
    """The first special token or header of a known template that a pair's texts spell; "" without."""
    for text in (*(text for _, text in pair.messages), pair.chosen, pair.rejected):
        if match := HEADER.search(text) or chat.special_pattern.search(text):
            return match[0]
    return ""


def check_templated(chat: Chat, pairs: list[Pair]) -> str:
    """Raise InputError when most texts hold marks of a template, unless they may: then a line about those without."""
    marks = [(pair, text) for pair in pairs if (text := find_mark(chat, pair))]
    if chat.templated:
        return f"rows without any mark of a template (--templated): {len(pairs) - len(marks)}" * (
            len(marks) < len(pairs))
    if 2 * len(marks) > len(pairs):
        pair, text = marks[0]
        raise InputError(f"{len(marks)} of {len(pairs)} rows hold marks of a chat template ({text.strip()!r} in "
                         f"{pair.where}): the model's template would go around them again. --templated takes the texts "
                         "as they are; or give the data without marks")
    return ""


def print_templated(chat: Chat, pair: Pair) -> Printed:
    """A pair whose texts are templated: a header that both answers begin with goes with the prompt, and what the answer
    ends with ends the turn. Raises ValueError."""
    if len(pair.messages) > 1 or pair.extras:
        raise ValueError("--templated takes prompt, chosen and rejected as texts, and this row has messages")
    headers, ends, answers = [], [], []
    for side in ("chosen", "rejected"):
        row = getattr(pair, side)
        match = HEADER.match(row, len(row) - len(row.lstrip()))
        start = match.end() if match else 0
        text = row[start:]
        found = [match.start() for pattern in (ENDS, chat.special_pattern) if (match := pattern.search(text))]
        stop = min(found, default=len(text))
        headers.append(row[:start])
        ends.append(first_end(chat, text[stop:]) or (ENDS.match(text[stop:]) or [""])[0])
        answers.append(PrintedAnswer(text[:stop], ((0, start, stop),), Answer(text[:stop], start)))
        if not text[:stop].strip():
            raise ValueError(f"{side} holds marks of a template alone")
        if match := HEADER.search(text):
            raise ValueError(f"{side} holds another turn ({match[0].strip()!r}): one answer can be trained on")
        if after := without_marks(chat, text[stop:]):
            raise ValueError(f"{side} goes on after what ends its turn, with {after!r:.40}")
    if headers[0] != headers[1] or len({*filter(None, ends)}) > 1:
        raise ValueError(f"chosen and rejected are templated in two ways: {headers[0]!r} and {headers[1]!r} before, "
                         f"{ends[0]!r} and {ends[1]!r} after the answer")
    prompt, header = pair.messages[0][1], headers[0].strip()
    if header and (OF_OTHERS.search(header) or prompt.rstrip().endswith(header)):
        raise ValueError(f"chosen and rejected begin with {header!r}, "
                         + ("another's turn" if OF_OTHERS.search(header) else "which the prompt ends with already"))
    end = ends[0] or ends[1]
    notes = () if end else ("rows without an end of the turn, which is added",)
    if chat.opens_with_bos and not prompt.startswith(chat.tokenizer.bos_token):
        notes += (f"rows that do not begin with {chat.tokenizer.bos_token!r}, as the tokenizer's own texts do",)
    end = end or plain_end(chat)
    chat.endings[f"{end} of templated texts"] = end
    return Printed(prompt + headers[0], tuple(answers), end, notes)


def without_marks(chat: Chat, text: str) -> str:
    """Templated text as a judge is shown it: a line break for each mark of the template."""
    for pattern in (HEADER, ENDS, chat.special_pattern):
        text = pattern.sub("\n", text)
    return re.sub(r"\n{2,}", "\n\n", text).strip()
