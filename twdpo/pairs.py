"""Preference pairs, and the forms of rows that they are read from.

Accepted rows: {prompt: str, chosen: str, rejected: str}; {prompt?, chosen: messages, rejected: messages} with whole
conversations; {prompt: messages, chosen: [assistant], rejected: [assistant]}. Other columns are ignored.
"""

from dataclasses import dataclass
from functools import cached_property

from twdpo.files import hash_to_int64


@dataclass(frozen=True)
class Pair:
    """One preference: the conversation before the answer as (role, text) turns, and its two answers as given."""

    messages: tuple[tuple[str, str], ...]
    chosen: str
    rejected: str
    where: str  # FILE:LINE, for messages to the user; neither it nor weight and margin are part of the identity
    extras: str = ""  # JSON of what a template may print beside texts (tools, calls); empty for nearly all
    weight: float = 1.0  # multiplies the pair's loss
    margin: float = 0.0  # for losses that ask for one

    @cached_property
    def key(self) -> int:
        """64-bit content key, which names the pair in weights files and caches."""
        return hash_to_int64([self.messages, self.chosen, self.rejected, *filter(None, [self.extras])])

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
