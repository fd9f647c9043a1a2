"""Forms of rows: how prompt, chosen and rejected are found in the rows that people have, and become a pair.

docs/data.md shows each form. Nothing is guessed beyond them: --columns names what goes by another name.
"""

import json
import math
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from twdpo.config import SharedConfig
from twdpo.data_files import BadRow
from twdpo.flags import InputError
from twdpo.messages import (
    HEADER,
    HH_START,
    OF_OTHERS,
    WRITTEN,
    Turn,
    decode,
    hh_prompt,
    hh_turns,
    is_empty,
    kind_of,
    parse_history,
    parse_messages,
    refuse_media,
    type_of,
)
from twdpo.pairs import Pair

NAMES = ("prompt", "chosen", "rejected", "system", "tools", "weight", "margin")  # what --columns may name
LOOKALIKES = {  # what an error proposes for a column that is not there
    "prompt": ("question", "query", "instruction", "input", "text", "user", "ask", "messages", "conversation"),
    "chosen": ("good", "better", "preferred", "accepted", "positive", "chosen_response"),
    "rejected": ("bad", "worse", "dispreferred", "refused", "negative", "rejected_response")}

LARGEST = 1e30  # of weights and margins, which losses multiply in fp32
BY_LABEL = ("labels", "better_response_id", "safer_response_id", "winner", "preference", "answers", "ranking")


@dataclass(frozen=True)
class Reading:
    """How rows are read. columns: a name of NAMES -> the column that --columns gives for it; the rest as the flags
    say."""

    empty_answers: str = "refuse"
    columns: dict[str, str] = field(default_factory=dict)
    fold_system: bool = False
    templated: bool = False

    @classmethod
    def of(cls, config: SharedConfig) -> "Reading":
        """As the flags say. Raises InputError."""
        return cls(config.empty_answers, parse_columns(config.columns), config.fold_system, config.templated)

    @property
    def of_texts(self) -> "Reading":
        """Without what is no part of a pair's identity: rows beside the data need not hold it."""
        columns = {name: column for name, column in self.columns.items() if name not in ("weight", "margin")}
        return replace(self, columns=columns)

    def column(self, name: str, row: dict) -> str:
        """The column of this row that holds `name`: the one of --columns, where the row has it, else its own."""
        column = self.columns.get(name, name)
        return column if column in row else name


AS_NAMED = Reading()


@dataclass
class Report:
    """What rows were read as: how many in which form; which columns they have, and in how many each is not used."""

    forms: Counter = field(default_factory=Counter)
    unused: Counter = field(default_factory=Counter)
    columns: Counter = field(default_factory=Counter)

    def __add__(self, other: "Report") -> "Report":
        return Report(self.forms + other.forms, self.unused + other.unused, self.columns + other.columns)

    def check(self, reading: Reading) -> None:
        """Raise InputError for a column of --columns that no row has."""
        for name, column in reading.columns.items():
            if self.columns and column not in self.columns:
                raise InputError(f"--columns {name}={column}: no row has a column {column!r}; there are "
                                 + ", ".join(map(str, self.columns)))

    def lines(self) -> list[str]:
        """For the user: rows by form, then the columns that are not used, each once."""
        lines, total = [], self.forms.total()
        if total:
            (form, most), *others = self.forms.most_common()
            rest = "".join(f"; {count}: {other}" for other, count in others)
            lines.append(f"{most} row{'s' * (most > 1)}: {form}{rest}")
        if self.unused:
            lines.append("columns that the pairs do not use: " + ", ".join(
                name + (f" ({count} of {total} rows)" if count < total else "") for name, count in self.unused.items()))
        return lines


def parse_columns(text: str) -> dict[str, str]:
    """`prompt=question,weight=w` -> {"prompt": "question", "weight": "w"}. Raises InputError."""
    columns: dict[str, str] = {}
    for part in filter(None, text.split(",")):
        name, _, column = map(str.strip, part.partition("="))
        if name not in NAMES or not column or name in columns:
            why = "is named twice" if name in columns else f"must be NAME=COLUMN, with a NAME of {', '.join(NAMES)}"
            raise InputError(f"--columns {text}: {part.strip()!r} {why}")
        columns[name] = column
    return columns


def read_pairs(rows: Iterable[BadRow | tuple[str, object]], reading: Reading
               ) -> tuple[list[Pair], list[BadRow], Report]:
    """(FILE:LINE, row) -> pairs, rows that are none, and what they were read as; every row ends up in one of the two
    lists. Raw rows are not kept."""
    pairs, bad, report = [], [], Report()
    for item in rows:
        if isinstance(item, BadRow):
            bad.append(item)
            continue
        where, row = item
        report.columns.update(row.keys() if isinstance(row, dict) else ())
        try:
            pair, form, unused = read_row(where, row, reading)
        except ValueError as error:
            bad.append(BadRow(where, str(error), row))
        else:
            pairs.append(pair)
            report.forms[form] += 1
            report.unused.update(unused)
    return pairs, bad, report


def parse_row(where: str, row: object, reading: Reading = AS_NAMED) -> Pair:
    """One row -> Pair. Raises ValueError with the reason."""
    return read_row(where, row, reading)[0]


def read_row(where: str, row: object, reading: Reading) -> tuple[Pair, str, list[str]]:
    """One row -> (pair, form, columns and keys of messages that are not used). Raises ValueError with the reason."""
    if not isinstance(row, dict):
        raise ValueError(f"a row must be an object with prompt, chosen and rejected, not {type_of(row)}")
    refuse_media("the row", row)
    unused_keys: dict[str, None] = {}  # of messages
    columns, sides, values = find_values(row, reading)
    turns, answers, how = read_answers(row, reading, sides, values, unused_keys)
    if not turns or turns[0].role in ("assistant", "tool") or {turn.role for turn in turns} <= {"system", "assistant"}:
        # else they are whole conversations, which need no prompt
        prompt_columns, before = find_prompt(row, reading, unused_keys)
        is_led = bool(turns) and turns[0].role == "system"
        if is_led and before[0].role == "system":
            raise ValueError(f"{prompt_columns[0]} and {sides[0]} both begin with a system turn")
        turns, columns = turns[:is_led] + before + turns[is_led:], prompt_columns + columns
    turns, has_system = add_system(turns, row, reading)
    tools = read_tools(row, reading)
    beside = [reading.column(name, row) for name, there in (("system", has_system), ("tools", tools)) if there]
    if turns[-1].role == "assistant":
        raise ValueError("the turn before the answers is the assistant's own")
    if reading.empty_answers == "space":
        answers = [turn if turn.text.strip() or turn.extras else turn._replace(text=" ") for turn in answers]
    for name, turn in zip(("prompt", *sides), (turns[-1], *(answers if reading.empty_answers == "refuse" else ()))):
        if not turn.text.strip() and not turn.extras and turn.role != "tool":
            raise ValueError(f"{name} is empty")
    if reading.fold_system:  # once the prompt is known to say something itself
        turns = fold_system(turns)
    weight, margin = read_number(row, "weight", reading, 1.0), read_number(row, "margin", reading, 0.0)
    pair = make_pair(where, turns, answers, tools, weight, margin)
    used = {*columns, *beside, reading.columns.get("weight"), reading.columns.get("margin")}
    unused = [column for column, value in row.items() if column not in used and not is_empty(value)]
    form = ", ".join(columns) + how + (" with " + ", ".join(beside) if beside else "")
    return pair, form, [*unused, *unused_keys]


def make_pair(where: str, turns: list[Turn], answers: list[Turn], tools: list[dict], weight: float, margin: float
              ) -> Pair:
    """Turns -> Pair. Raises ValueError for text that is no Unicode."""
    extras = {"chosen": answers[0].extras, "rejected": answers[1].extras, "tools": tools,
              "turns": {str(place): turn.extras for place, turn in enumerate(turns) if turn.extras}}
    extras = {name: value for name, value in extras.items() if value}
    # Keys within these keep their order: templates print calls and tools in it.
    shown = json.dumps(extras, ensure_ascii=False) if extras else ""
    for text in (*(text for turn in (*turns, *answers) for text in (turn.role, turn.text)), shown):
        text.encode("utf-8")  # a lone surrogate raises UnicodeEncodeError, which is a ValueError
    return Pair(tuple((turn.role, turn.text) for turn in turns), answers[0].text, answers[1].text, where, shown,
                weight, margin)


# ----------------------------------------------------------------------------------------------------------------------
# Which columns

def find_values(row: dict, reading: Reading) -> tuple[list[str], tuple[str, str], tuple[object, object]]:
    """(columns of the answers, a name for each answer, both answers as the row has them)."""
    columns = [reading.column(side, row) for side in ("chosen", "rejected")]
    if all(row.get(column) is None for column in columns):  # tables have the columns of all rows, null here
        if isinstance(row.get("output"), list):  # instruction, input, output: [better, worse]
            if len(row["output"]) != 2:
                raise ValueError(f"output must hold two answers, the better one first; it has {len(row['output'])}")
            return ["output"], ("output[0]", "output[1]"), tuple(row["output"])
        if row.get("chosen_response") is not None and row.get("rejected_response") is not None:  # Argilla's
            columns = ["chosen_response", "rejected_response"]
    for name, column in zip(("chosen", "rejected"), columns):
        if column not in row:
            raise ValueError(missing(name, row, reading))
    return columns, tuple(columns), tuple(row[column] for column in columns)


def read_answers(row: dict, reading: Reading, sides: tuple[str, str], values: tuple[object, object], unused_keys: dict
                 ) -> tuple[list[Turn], list[Turn], str]:
    """(turns that both answers' columns hold before the answer, both answers, the form for the report)."""
    kinds = [kind_of(side, value) for side, value in zip(sides, values)]
    if kinds[0] != kinds[1]:
        raise ValueError(f"{sides[0]} is {type_of(values[0])} and {sides[1]} {type_of(values[1])}: both must be texts, "
                         "or both messages")
    if reading.templated:
        return read_templated(row, reading, sides, values)
    if kinds[0] == "messages":
        talks = [parse_messages(side, value, unused_keys) for side, value in zip(sides, values)]
        how = " as messages" if len(talks[0]) == 1 else " as conversations"
    else:
        if all(map(WRITTEN.fullmatch, values)):
            raise ValueError(written(f"{sides[0]} and {sides[1]} are"))
        talks, how = [[Turn("assistant", value, {})] for value in values], ""
        prompt = row.get(reading.column("prompt", row))
        is_hh = isinstance(prompt, str) and hh_prompt(prompt) is not None
        is_whole = is_hh or prompt is None or all(value.startswith(HH_START) for value in values)
        if is_whole and all(map(hh_turns, values)):
            talks, how = [hh_turns(value) for value in values], " as Human: and Assistant: texts"
        elif is_hh:
            talks = [[Turn("assistant", value.strip(), {})] for value in values]
            how = " after Human: and Assistant: texts"
    for side, talk in zip(sides, talks):
        if talk[-1].role != "assistant":
            raise ValueError(f"the last message of {side} is the {talk[-1].role}'s, not the assistant's")
    if talks[0][:-1] != talks[1][:-1]:
        raise ValueError(f"the conversations of {sides[0]} and {sides[1]} differ before the last answer")
    return talks[0][:-1], [talks[0][-1], talks[1][-1]], how


def read_templated(row: dict, reading: Reading, sides: tuple[str, str], values: tuple[object, object]
                   ) -> tuple[list[Turn], list[Turn], str]:
    """As `read_answers`, of texts with a template's marks; of whole conversations, and without a prompt, the prompt is
    what both have in common, up to the end of the last header of a turn there."""
    how, stop, prompt = " as templated texts", 0, row.get(reading.column("prompt", row))
    if not all(isinstance(value, str | None) for value in (*values, prompt)):
        raise ValueError("--templated takes prompt, chosen and rejected as texts, and this row has messages")
    common = os.path.commonprefix(values)
    headers = list(HEADER.finditer(common))
    if prompt is None or headers and OF_OTHERS.search(headers[0][0]):
        stop = headers[-1].end() if headers else 0
        if not stop:
            raise ValueError(f"no prompt, and {sides[0]} and {sides[1]} begin with no turn's header in common")
    answers = [Turn("assistant", value[stop:], {}) for value in values]
    return [Turn("user", common[:stop], {})] if stop else [], answers, how


def find_prompt(row: dict, reading: Reading, unused_keys: dict) -> tuple[list[str], list[Turn]]:
    """(its columns, the turns before the answers) of a row whose answers stand alone."""
    column = reading.column("prompt", row)
    if row.get(column) is not None:
        if reading.templated:
            return [column], [Turn("user", row[column], {})]
        return [column], parse_prompt(column, row[column], unused_keys)
    if row.get("conversations") is not None:
        return ["conversations"], parse_messages("conversations", row["conversations"], unused_keys)
    if row.get("instruction") is not None:
        parts = [name for name in ("instruction", "input") if not is_empty(row.get(name))]
        turns, columns = [], parts or ["instruction"]
        for name in columns:
            if not isinstance(row[name], str):
                raise ValueError(f"{name} must be a string, not {type_of(row[name])}")
        if not is_empty(row.get("history")):
            turns, columns = parse_history(row["history"]), [*columns, "history"]
        return columns, [*turns, Turn("user", "\n".join(row[name] for name in parts), {})]
    if reading.column("system", row) in row:  # Intel's, and Argilla's of it
        for name in ("question", "input"):
            if row.get(name) is not None:
                return [name], parse_prompt(name, row[name], unused_keys)
    raise ValueError(f"{column} is null" if column in row else missing("prompt", row, reading))


def parse_prompt(column: str, value: object, unused_keys: dict) -> list[Turn]:
    """A text, one of HH's with all turns, or messages."""
    if kind_of(column, value) == "messages":
        return parse_messages(column, value, unused_keys)
    if WRITTEN.fullmatch(value):
        raise ValueError(written(f"{column} is"))
    return hh_prompt(value) or [Turn("user", value, {})]


def written(what: str) -> str:
    """What to do about messages in a column of texts, of a .csv mostly: they would be trained as they are spelled."""
    return f"{what} messages written as text: give them as lists of objects, in a .jsonl or .parquet file"


def missing(name: str, row: dict, reading: Reading) -> str:
    """What to do about a column that is not there."""
    found = {}
    for other, columns in LOOKALIKES.items():
        column = next((column for column in columns if column in row), "")
        if column and reading.column(other, row) not in row:
            found[other] = column
    if label := next((column for column in BY_LABEL if column in row), ""):
        return f"no column {name}: {label} says which answer is better: make columns chosen and rejected by it first"
    if name in found:
        flags = ",".join(f"{each}={column}" for each, column in (reading.columns | found).items())
        return f"no column {name}; `{found[name]}` looks like one: --columns {flags}"
    return f"no column {name}; the row has {', '.join(map(str, row)) or 'none'}: --columns {name}=COLUMN names another"


def add_system(turns: list[Turn], row: dict, reading: Reading) -> tuple[list[Turn], bool]:
    """The turns with what the system column says as the first one; whether it says anything."""
    column = reading.column("system", row)
    system = row.get(column)
    if not isinstance(system, str | None):
        raise ValueError(f"{column} must be a string, not {type_of(system)}: it is read as a system turn")
    if system is None or not system.strip():
        return turns, False
    if turns[0].role != "system":
        return [Turn("system", system, {}), *turns], True
    if turns[0].text != system:
        raise ValueError(f"{column} says another thing than the system turn of the conversation")
    return turns, True


def fold_system(turns: list[Turn]) -> list[Turn]:
    """A system turn at the start goes before the text of the first user turn, with a blank line between."""
    if turns[0].role != "system":
        return turns
    system, *turns = turns
    place = next((place for place, turn in enumerate(turns) if turn.role == "user"), None)
    if place is None:
        raise ValueError("--fold-system: no user turn follows the system turn")
    text = "\n\n".join(filter(None, [system.text, turns[place].text]))
    return [*turns[:place], turns[place]._replace(text=text), *turns[place + 1:]]


def read_tools(row: dict, reading: Reading) -> list[dict]:
    """The tools column: a list of objects, each or all of it may be JSON text."""
    column = reading.column("tools", row)
    value = decode(row.get(column))
    tools = [] if is_empty(value) else list(map(decode, value)) if isinstance(value, list) else [value]
    if not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"{column} must be a list of objects, or one as JSON text, not {row[column]!r:.80}")
    return tools


def read_number(row: dict, name: str, reading: Reading, default: float) -> float:
    """The weight or margin of a row, if --columns names its column."""
    if name not in reading.columns:
        return default
    column = reading.columns[name]
    if column not in row:
        raise ValueError(f"no column {column}, which --columns names as {name}")
    value = row[column]
    try:
        number = float(value) if not isinstance(value, bool) else math.nan
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not 0 <= number <= LARGEST:
        shown = "null" if value is None else f"{value!r:.80}"
        raise ValueError(f"{column}, the {name}, is {shown}: it must be a finite number >= 0 (to {LARGEST:g})")
    return number
