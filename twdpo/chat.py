"""Chat template: conversations as it prints them, what it does with their turns, and what ends one."""

import json
import os
import re
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date, datetime
from functools import cached_property
from pathlib import Path

import jinja2

from twdpo.flags import InputError
from twdpo.pairs import Pair

Message = dict[str, object]  # role, content, and what else of it a template may print
RENDER_SECONDS = 10  # most of one rendering
THINK, THINK_END = "<think>", "</think>"


def today() -> str:
    """YYYY-MM-DD, local time."""
    return date.today().isoformat()


@dataclass(frozen=True)
class Chat:
    """A tokenizer, and what is known of its chat template; made once, handed on.

    templated: texts of the data hold the template's marks already (--templated). end_ids: what ends an answer by the
    model's generation config. apart: answers are tokenised apart from their prompts, as TRL does (--align edits).
    date: that a template prints which asks for today's (YYYY-MM-DD).
    """

    tokenizer: object
    templated: bool = False
    end_ids: frozenset[int] = frozenset()
    apart: bool = False
    date: str = field(default_factory=today)  # fixed: a run may last over midnight

    @cached_property
    def prints_date(self) -> bool:
        """Whether the template may print the date, so that tokens depend on it."""
        return "strftime_now" in str(self.tokenizer.chat_template)

    @cached_property
    def template(self) -> str:
        """The tokenizer's template, with a clock that stands still."""
        return freeze_clock(self.date) * self.prints_date + self.tokenizer.chat_template

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of the tokenizer's special tokens."""
        ids = {id for id, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        return frozenset(ids | set(self.tokenizer.all_special_ids))

    @cached_property
    def special_pattern(self) -> re.Pattern:
        """Matches text that spells a special token; marks of thinking, which can't end a turn, are none."""
        specials = {str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        specials |= set(self.tokenizer.all_special_tokens)
        specials -= {THINK, THINK_END}
        return re.compile("|".join(map(re.escape, sorted(specials, key=len, reverse=True))) or r"(?!)")

    @cached_property
    def opens_with_bos(self) -> bool:
        """Whether the tokenizer puts its BOS before a text."""
        bos = self.tokenizer.bos_token_id
        return bos is not None and self.tokenizer("x").input_ids[:1] == [bos]

    @cached_property
    def endings(self) -> dict[str, str]:
        """What was found to end a turn, by the text that the template prints after an answer."""
        return {}

    @cached_property
    def habits(self) -> dict[tuple[str, ...], "Habit"]:
        """What the template does with conversations, by the roles of their turns."""
        return {}


@dataclass(frozen=True)
class Habit:
    """What the template does with conversations of some roles.

    printed: how often it prints the text of each turn before the answer. lead: what it prints between the generation
    prompt and a plain answer; lack: what the generation prompt goes on with after all that stands before such an
    answer. Each is None when the one does not begin with the other.
    """

    printed: tuple[int, ...]
    lead: str | None
    lack: str | None


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


# ----------------------------------------------------------------------------------------------------------------------
# Rendering

def freeze_clock(day: str) -> str:
    """Jinja text that puts a macro in the place of transformers' `strftime_now`: as at the beginning of that day."""
    # %- leaves out zeros in front; %% goes last, as a character that no format has.
    values = {"%%": "\ue000"} | {f"%{sign}{letter}": datetime.fromisoformat(day).strftime(f"%{sign}{letter}")
                                 for letter in "aAbBcdfGHIjmMpSuUVwWxXyY" for sign in ("", "-")}
    replaced = "".join(f"|replace({json.dumps(old)}, {json.dumps(new)})" for old, new in values.items())
    # The empty expression keeps a line break that the template begins with: behind a block it would be dropped.
    return ("{% macro strftime_now(format) %}{{ format" + replaced
            + '|replace("\ue000", "%") }}{% endmacro %}{{ "" }}')


def messages_of(pair: Pair) -> tuple[list[Message], dict[str, Message], object]:
    """(turns before the answers, the message of either answer by side, tools or None), as templates take them."""
    row = pair.to_row()
    return row["prompt"], {side: row[side][0] for side in ("chosen", "rejected")}, row.get("tools")


def render(chat: Chat, messages: list[Message], tools: object = None, generation_prompt: bool = False) -> str:
    """The conversation as the chat template prints it. Raises ValueError when the template refuses it."""
    try:
        with time_limit(RENDER_SECONDS):
            return chat.tokenizer.apply_chat_template(messages, tools=tools, tokenize=False,
                                                      add_generation_prompt=generation_prompt,
                                                      chat_template=chat.template)
    except jinja2.TemplateError as error:
        cure = "; --fold-system puts the system turn into the user's" if messages[0]["role"] == "system" else ""
        raise ValueError(f"the chat template refuses the conversation: {error}{cure}") from error
    except Exception as error:  # noqa: BLE001 - a template is a program, and may do anything
        raise ValueError(f"the chat template fails on the conversation: {type(error).__name__}: {error}") from error


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError when what is inside takes longer. In the main thread alone; elsewhere it does nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_) -> None:
        raise TimeoutError(f"it takes more than {seconds:g} s")
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def mark(place: int) -> str:
    """Text that stands for the text of a turn, and that no data holds by chance."""
    return f"\ue000{place}\ue001"


def template_pieces(chat: Chat, messages: list[Message], open_turns: Iterable[int], tools: object = None,
                    generation_prompt: bool = False) -> list[str]:
    """The rendered conversation cut where the texts of `open_turns` stand: fixed text around every one of them.

    Found by rendering marks in their place, so text that looks like a part of the template can't mislead it.
    """
    open_turns = sorted(open_turns)
    marked = [message | {"content": mark(place)} if place in open_turns else message
              for place, message in enumerate(messages)]
    rest, fixed = render(chat, marked, tools, generation_prompt), []
    for place in open_turns:
        if rest.count(mark(place)) != 1:
            raise ValueError(f"the chat template prints turn {place + 1} of the conversation "
                             f"{rest.count(mark(place))} times")
        before, rest = rest.split(mark(place))
        fixed.append(before)
    return [*fixed, rest]


def habit_of(chat: Chat, messages: list[Message], tools: object) -> Habit:
    """What the template does with conversations like this one; found once for those of equal roles."""
    roles = tuple(message["role"] for message in messages)
    plain = tools is None and all(len(message) == 2 for message in messages)
    if plain and roles in chat.habits:
        return chat.habits[roles]
    marked = [message | {"content": mark(place)} for place, message in enumerate(messages)]
    answer = mark(len(messages))
    before = render(chat, [*marked, {"role": "assistant", "content": answer}], tools).partition(answer)[0]
    opened = render(chat, marked, tools, generation_prompt=True)
    habit = Habit(tuple(before.count(mark(place)) for place in range(len(messages))),
                  before[len(opened):] if before.startswith(opened) else None,
                  opened[len(before):] if opened.startswith(before) else None)
    if plain:
        chat.habits[roles] = habit
    return habit


# ----------------------------------------------------------------------------------------------------------------------
# The end of a turn

def end_of_turn(chat: Chat, after: str) -> str:
    """The text that ends a turn, of what the template prints after an answer; "" when only the eos token does.

    What stands after an answer whether or not a turn follows counts first, then what stands after the last one, then
    how the next turn begins (`### Instruction:`); of each the text up to its first special token (or token that ends
    generation), else all of it but white space at its end.
    """
    if after not in chat.endings:
        turns = [{"role": role, "content": "x"} for role in ("user", "assistant", "user")]
        try:
            between = template_pieces(chat, turns, [1, 2])[1]
        except ValueError:  # it refuses the next turn, so it shows nothing
            between = ""
        always = after if between.startswith(after) else re.sub(r"\S*$", "", os.path.commonprefix([after, between]))
        ends = (first_end(chat, text) or text.rstrip() for text in (always, after, between))
        chat.endings[after] = next(filter(None, ends), "")
    return chat.endings[after]


def first_end(chat: Chat, text: str) -> str:
    """The text up to its first special token, or token that ends generation; "" without one."""
    tokens = [chat.tokenizer.decode([id]) for id in chat.end_ids]
    found = [match.end() for match in [chat.special_pattern.search(text)] if match]
    found += [text.index(token) + len(token) for token in tokens if token.strip() and token in text]
    return text[:min(found, default=0)]


def plain_end(chat: Chat) -> str:
    """What ends a turn of the plainest conversation; "" when the tokenizer's template has nothing or refuses it."""
    try:
        turns = [{"role": role, "content": "x"} for role in ("user", "assistant")]
        return end_of_turn(chat, template_pieces(chat, turns, [1])[1])
    except ValueError:
        return ""


def describe_end(chat: Chat) -> str:
    """A line that says what ends a turn."""
    ends = [repr(end) if end else f"the tokenizer's eos {chat.tokenizer.eos_token!r}, which the chat template does not "
            "print" for end in dict.fromkeys(chat.endings.values())]
    return f"a turn ends with {' or '.join(ends)}" if ends else ""
