"""What pairs look like as they are trained: tokens with their weights, what was cut, the end of the turn. As text for
a terminal or a log, and as a page.

Legend: N response tokens of one answer.
"""

import html
import itertools
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from twdpo.chat import Chat
from twdpo.files import write_atomic
from twdpo.pages.style import render_document
from twdpo.pages.tokens import (
    ANSWER,
    CLASSES,
    CUT,
    END,
    KEY,
    MARK,
    REASONING,
    SIDES,
    TEMPLATE,
    TOKENS_STYLE,
    Piece,
    ShownAnswer,
    render_answer,
    render_foot,
    render_key,
    spell_ids,
    spell_weights,
    visible,
)
from twdpo.postprocess import kept_text
from twdpo.tokens import Example, Response, tokenize_pairs

NO_LIMIT = 1 << 40  # tokens
MOST_JOINED = 8  # tokens that hold a character together are looked for in so many
CUT_CHARACTER = "\u27e8byte\u27e9"  # stands for a part of a character whose other parts are not there
COLUMNS, LABEL = 100, 20  # of the text: characters of a line, and of the margin that says what tokens are
FIRST_IDS, LAST_IDS = 8, 4  # of a long list that are shown
STEPS = ((0.25, ""), (0.75, "230"), (1.5, "223"), (3.0, "216"), (5.0, "209"), (np.inf, "202"))  # n a below, its colour


@dataclass(frozen=True)
class ShownPair:
    """A pair as it is shown. num_cut: tokens that the prompt lost on the left."""

    where: str
    prompt: str
    prompt_ids: list[int]
    num_cut: int
    remarks: list[str]
    answers: list[ShownAnswer]


def describe_pair(chat: Chat, example: Example, weights: tuple[np.ndarray | None, ...]) -> ShownPair:
    """A pair, its answers' weights n a given."""
    wholes, _, _ = tokenize_pairs(chat, [example.pair], max_length=NO_LIMIT, max_prompt_length=NO_LIMIT)
    whole = wholes[0] if wholes else example
    tokenizer, pair, prompt_ids = chat.tokenizer, example.pair, example.prompt_ids.tolist()
    remarks = [f"weight {pair.weight:g}"] * (pair.weight != 1) + [f"margin {pair.margin:g}"] * (pair.margin != 0)
    answers = []
    for side, weights_N in zip(SIDES, weights):
        response = getattr(example, side)
        text, pieces = getattr(pair, side), list(split_response(tokenizer, prompt_ids[-1:], response, weights_N))
        if response.is_cut and not pair.answers_call and (left := text[kept_text(response):]):
            pieces.append(Piece(left, CUT, (), None))
        num_cut = len(getattr(whole, side).ids) - len(response.ids)
        answers.append(ShownAnswer(side, pieces, response.ids.tolist(),
                                   describe_end(response, pieces, "" if pair.answers_call else text, num_cut,
                                                chat.templated)))
    return ShownPair(pair.where, decode(tokenizer, prompt_ids), prompt_ids,
                     len(whole.prompt_ids) - len(prompt_ids), remarks, answers)


def kinds_of(response: Response) -> list[str]:
    """What each token is."""
    content = np.flatnonzero(response.content_N)
    stop = int(content[-1]) + 1 if len(content) else 0
    kinds = []
    for place, is_content in enumerate(response.content_N):
        if place < response.num_reasoning:
            kinds.append(REASONING if is_content else MARK)
        elif is_content:
            kinds.append(ANSWER)
        else:
            kinds.append(END if place >= stop and not response.is_cut else TEMPLATE)
    return kinds


def split_response(tokenizer, before: list[int], response: Response, weights_N: np.ndarray | None) -> Iterable[Piece]:
    """Its tokens with their text. before: the ids that they follow on."""
    place = 0
    for kind, run in itertools.groupby(kinds_of(response)):
        ids = response.ids[place:place + len(list(run))].tolist()
        for text, size in split_text(tokenizer, before, ids):
            piece = tuple(response.ids[place:place + size].tolist())
            weights = None if weights_N is None else tuple(weights_N[place:place + size].tolist())
            yield Piece(text, kind, piece, weights)
            place, before = place + size, list(piece)


def split_text(tokenizer, before: list[int], ids: list[int]) -> Iterable[tuple[str, int]]:
    """(text, number of tokens) of the fewest tokens each that hold whole characters."""
    place = 0
    while place < len(ids):
        for size in range(1, min(MOST_JOINED, len(ids) - place) + 1):
            text = text_after(tokenizer, before, ids[place:place + size])
            if "\ufffd" not in text:
                break
        else:
            size, text = 1, text_after(tokenizer, before, ids[place:place + 1])
        yield text.replace("\ufffd", CUT_CHARACTER), size
        before = [] if "\ufffd" in text else ids[place:place + size]
        place += size


def text_after(tokenizer, before: list[int], ids: list[int]) -> str:
    """What these tokens add to the text of those before them (some tokenizers drop a text's first space)."""
    start, whole = decode(tokenizer, before), decode(tokenizer, before + ids)
    return whole[len(start):] if whole.startswith(start) else decode(tokenizer, ids)


def decode(tokenizer, ids: list[int]) -> str:
    """Text with special tokens, as it is."""
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def describe_end(response: Response, pieces: list[Piece], text: str, num_cut: int, templated: bool) -> list[str]:
    """In words how an answer ends, and what of its text is not trained. text: "" where what the template prints is not
    known, of answers that call tools. templated: whether the text holds the end of the turn itself, and maybe the
    header, which is of the prompt."""
    spans_N2 = response.spans_N2[response.content_N]
    covered = spans_N2[spans_N2[:, 1] > spans_N2[:, 0]]
    first, last = (int(covered[:, 0].min()), int(covered[:, 1].max())) if len(covered) else (0, 0)
    if response.is_cut:
        tokens = f" ({num_cut} tokens with it)" if num_cut > 0 else ""
        characters = f", {len(text) - last} of {len(text)} characters not trained" if text else ""
        return [f"cut: no end of turn{tokens}{characters}"]
    end = [piece for piece in pieces if piece.kind == END]
    ids = " ".join(str(id) for piece in end for id in piece.ids)
    remarks = [f"the turn ends with {''.join(visible(piece.text) for piece in end)} (id {ids})" if end
               else "nothing ends the turn"]
    ending = "".join(piece.text for piece in end)
    if not text:
        return remarks
    if templated and (left := len(text[last:].removeprefix(ending).strip())):
        remarks.append(f"{left} characters after it are not trained")
    elif not templated and (left := first + len(text) - last):
        remarks.append(f"{left} of {len(text)} characters are not printed by the template")
    return remarks


def count_tokens(answer: ShownAnswer) -> str:
    """`chosen, 12 tokens, 5 of them reasoning`."""
    reasoning = sum(len(piece.ids) for piece in answer.pieces if piece.kind in (REASONING, MARK))
    return f"{answer.side}, {len(answer.ids)} tokens" + (f", {reasoning} of them reasoning" if reasoning else "")


def count_prompt(pair: ShownPair) -> str:
    """`prompt, 12 tokens, 5 more cut from its beginning`."""
    cut = f", {pair.num_cut} more cut from its beginning" if pair.num_cut else ""
    return f"prompt, {len(pair.prompt_ids)} tokens{cut}"


# ----------------------------------------------------------------------------------------------------------------------
# As text

def format_pairs(shown: list[ShownPair], colours: bool) -> str:
    """For a terminal: shaded by weight in colours, or a table of tokens and weights without any."""
    lines = []
    for number, pair in enumerate(shown, 1):
        lines += [f"pair {number}: " + ", ".join([pair.where, *pair.remarks]), f"  {count_prompt(pair)}"]
        lines += [f"    {line}" for line in visible(pair.prompt).split("\n")]
        lines.append(f"    ids {list_ids(pair.prompt_ids)}")
        for answer in pair.answers:
            lines.append("  " + "; ".join([count_tokens(answer), *map(one_line, answer.remarks)]))
            trained = [piece for piece in answer.pieces if piece.ids]
            lines += shade_text(trained) if colours else list(tabulate(trained))
            lines.append(f"    ids {list_ids(answer.ids)}")
        lines.append("")
    if colours:
        samples = zip((0.0, *(limit for limit, _ in STEPS)), STEPS)
        legend = " ".join(paint(f" {low:g} ", colour) for low, (_, colour) in samples)
        lines.append(f"shades: {legend} and more, of {KEY}. {paint('Underlined', '', '4')}: the template's tokens; "
                     f"{paint('slanted', '', '3')}: reasoning")
    else:
        lines.append(f"below tokens: {KEY}. \u2423 is a space, \u21b5 a line break")
    return "\n".join(lines)


def one_line(text: str) -> str:
    return text.replace("\u21b5\n", "\u21b5")


def list_ids(ids: list[int]) -> str:
    """All of them, or the first and the last."""
    if len(ids) <= FIRST_IDS + LAST_IDS + 1:
        return " ".join(map(str, ids))
    left = len(ids) - FIRST_IDS - LAST_IDS
    return " ".join([*map(str, ids[:FIRST_IDS]), f"[{left} more]", *map(str, ids[-LAST_IDS:])])


def tabulate(pieces: list[Piece]) -> Iterable[str]:
    """Lines of tokens, their weights below, what they are before them."""
    for kind, run in itertools.groupby(pieces, key=lambda piece: piece.kind):
        cells = [(cell_text(piece), "+".join(f"{weight:.2f}" for weight in piece.weights or ())) for piece in run]
        sizes = [max(map(columns_of, cell)) + 1 for cell in cells]
        start = 0
        while start < len(cells):
            stop = start + 1
            while stop < len(cells) and sum(sizes[start:stop + 1]) <= COLUMNS - LABEL:
                stop += 1
            for part in (0, 1):
                line = "".join(cell[part] + " " * (size - columns_of(cell[part]))
                               for cell, size in zip(cells[start:stop], sizes[start:stop]))
                label = kind if start == part == 0 else ""
                if line.strip():
                    yield f"    {label:{LABEL - 4}}{line}".rstrip()
            start = stop


def cell_text(piece: Piece) -> str:
    """A token on one line, its spaces marked."""
    return one_line(visible(piece.text)).replace(" ", "\u2423")


def columns_of(text: str) -> int:
    """Columns of a terminal that a text takes."""
    return sum(0 if unicodedata.combining(letter) else 1 + (unicodedata.east_asian_width(letter) in "WF")
               for letter in text)


def shade_text(pieces: list[Piece]) -> list[str]:
    """Lines with ANSI colours."""
    parts = []
    for piece in pieces:
        colour = "" if piece.weight is None else next(code for limit, code in STEPS if piece.weight < limit)
        styles = [code for word, code in (("reasoning", "3"), ("template", "4")) if word in CLASSES[piece.kind]]
        # A background that goes on over the end of a line would fill it.
        parts.append("\n".join(paint(line, colour, *styles) for line in visible(piece.text).split("\n")))
    return [f"    {line}" for line in "".join(parts).split("\n")]


def paint(text: str, colour: str, *styles: str) -> str:
    """Text on a background of the 256 colours ("": none), black then, so that light and dark terminals show it."""
    codes = ";".join([*styles, *([f"38;5;16;48;5;{colour}"] if colour else [])])
    return f"\x1b[{codes}m{text}\x1b[0m" if codes and text else text


# ----------------------------------------------------------------------------------------------------------------------
# As a page

PAIRS_STYLE = """
.note { overflow-wrap: anywhere; } .ids { overflow-wrap: anywhere; font-size: .8rem; color: var(--soft); }
details { margin: .4rem 0; font-size: .9rem; } summary { cursor: pointer; color: var(--soft); padding: .3rem 0; }
details .scroll { max-height: 20rem; overflow: auto; }
details th, details td { padding: .2rem .5rem .2rem 0; white-space: normal; overflow-wrap: anywhere; }
details :is(th, td):first-child { white-space: nowrap; }
details :is(th, td):nth-child(2) { text-align: left; }
"""


def write_page(path: Path, title: str, source: str, shown: list[ShownPair], home: str = "") -> None:
    """The page, in place of an older one. home: the page to link back to, if any."""
    page = render_pairs(title, source, shown, home)
    write_atomic(path, lambda temporary: temporary.write_text(page, encoding="utf-8"))


def render_pairs(title: str, source: str, shown: list[ShownPair], home: str = "") -> str:
    """A page that needs no network. source: the name of what made the weights."""
    pieces = [piece for pair in shown for answer in pair.answers for piece in answer.pieces]
    made = any(piece.weights is not None for piece in pieces)
    weights = f"Weights: {source}." if made else f"The weights of {source} are made while training: none are shown."
    back = f' <a href="{html.escape(home)}">The run.</a>' if home else ""
    return render_document(f"{title}, as they are trained", TOKENS_STYLE + PAIRS_STYLE, f"""
<p class="note">{html.escape(weights)} Every token with its id and weight is in the list below its answer.{back}</p>
{render_key({piece.kind for piece in pieces}, made)}
{"".join(render_pair(pair) for pair in shown)}
{render_foot()}""")


def render_pair(pair: ShownPair) -> str:
    """One pair, chosen and rejected side by side."""
    remarks = f'<p class="note">{html.escape(", ".join(pair.remarks))}</p>' if pair.remarks else ""
    panels = "".join(f'<div><h3>{html.escape(count_tokens(answer))}</h3>'
                     f"{render_answer(answer)}"
                     f'<p class="note">{html.escape("; ".join(map(one_line, answer.remarks)))}</p>'
                     f"{tokens_table(answer)}</div>" for answer in pair.answers)
    ids = " ".join(map(str, pair.prompt_ids))
    return (f'<article><h2>{html.escape(pair.where)}</h2>{remarks}<h3>{count_prompt(pair)}</h3>'
            f'<div class="prompt">{html.escape(visible(pair.prompt))}</div>'
            f'<details><summary>ids of the prompt</summary><p class="ids">{ids}</p></details>'
            f'<div class="sides">{panels}</div></article>')


def tokens_table(answer: ShownAnswer) -> str:
    """Every token with what it is, its id and its weight: what pointing at it shows, where nothing can point."""
    rows = "".join(f"<tr><td><code>{html.escape(cell_text(piece))}</code></td><td>{piece.kind}</td>"
                   f"<td>{spell_ids(piece)}</td><td>{spell_weights(piece)}</td></tr>"
                   for piece in answer.pieces if piece.ids)
    return ("<details><summary>tokens, ids, weights</summary><div class=\"scroll\"><table><tr><th>token</th>"
            f"<th>what</th><th>id</th><th>n&middot;a</th></tr>{rows}</table></div></details>")
