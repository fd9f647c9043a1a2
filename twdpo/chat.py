"""Chat template: the conversation as it prints it, and where the texts of the turns stand there."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import jinja2

from twdpo.flags import InputError
from twdpo.pairs import Pair

Piece = tuple[str, bool]  # (text, whether it comes from the data: then it may not spell special tokens)


@dataclass(frozen=True)
class Chat:
    """A tokenizer, and what is known of its chat template; made once, handed on.

    templated: texts of the data hold the template's marks already (--templated). end_ids: what ends an answer by the
    model's generation config.
    """

    tokenizer: object
    templated: bool = False
    end_ids: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Answer:
    """An answer as the chat template prints it: `text` begins at character `start` of the answer in the row."""

    text: str
    start: int


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
