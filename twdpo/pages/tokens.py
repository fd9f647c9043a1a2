"""Shaded tokens: the pieces of an answer that a page shows, as HTML and as a picture."""

import html
import re
from collections.abc import Iterable
from dataclasses import dataclass

SIDES = ("chosen", "rejected")
DARKEST, MOST_OPAQUE = 5.0, 0.85  # n a of the darkest shade, and its opacity
WIDTH, MARGIN, COLUMNS, CHARACTER, LINE = 920, 18, 52, 8.0, 22  # of the picture: pixels, but for COLUMNS of an answer

REASONING, MARK, ANSWER, TEMPLATE, END = "reasoning", "reasoning mark", "answer", "template", "end of turn"
CUT, UNJUDGED = "cut", "not judged"  # text without tokens
CLASSES = {REASONING: "reasoning", MARK: "reasoning template", ANSWER: "", TEMPLATE: "template", END: "template",
           CUT: "cut", UNJUDGED: "cut"}
KINDS = {  # in the words of a page's key
    REASONING: "slanted: what a reasoning model thinks before it answers",
    MARK: "slanted, dotted line below: what the template puts around thinking",
    ANSWER: "a token of the answer itself",
    TEMPLATE: "dotted line below: of the chat template, within the answer",
    END: "dotted line below: what ends the turn, trained like the answer",
    CUT: "struck through: cut off before training (--max-length); it has no weight, and the loss does not see it",
    UNJUDGED: "struck through: of the answer, but no token of it was judged (--judge-max-length)",
}
KEY = ("n\u00b7a: what the loss multiplies a token's log-ratio by; 1 is what every token has in plain DPO (where the "
       "loss takes means over tokens: n times its share)")


@dataclass(frozen=True)
class Piece:
    """Tokens that are shown as one: one, or those that hold a character together; or text without a token. weights:
    n a of each, if known."""

    text: str
    kind: str
    ids: tuple[int, ...]
    weights: tuple[float, ...] | None

    @property
    def weight(self) -> float | None:
        """Their mean, so that tokens of one character are no darker than others."""
        return sum(self.weights) / len(self.weights) if self.weights else None


@dataclass(frozen=True)
class ShownAnswer:
    """An answer's tokens, and in words how it ends and what of it is not trained."""

    side: str
    pieces: list[Piece]
    ids: list[int]
    remarks: list[str]


def visible(text: str) -> str:
    """What can't be seen is spelled out, but for spaces; a line break is marked, and stays."""
    return "".join("\u21b5\n" if letter == "\n" else letter if letter.isprintable()
                   else letter.encode("unicode_escape").decode() for letter in text)


def opacity(ratio: float) -> float:
    """Of the shade of n a."""
    return min(ratio / DARKEST, 1) * MOST_OPAQUE


# ----------------------------------------------------------------------------------------------------------------------
# On a page

TOKENS_STYLE = """
:root { --mark: 205, 82, 26; }
@media (prefers-color-scheme: dark) { :root { --mark: 196, 74, 20; } }
article h2 { margin: 0 0 .4rem; font-size: 1rem; overflow-wrap: anywhere; }
article h3 { font-size: .85rem; margin: 0 0 .3rem; color: var(--soft); font-weight: 600; overflow-wrap: anywhere; }
.answer { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--panel); border-radius: 6px;
          padding: .7rem; }
.answer span, .shades span { background: rgba(var(--mark), var(--a, 0)); border-radius: 3px; }
.answer span:hover, .at { outline: 2px solid var(--ink); }
.answer:focus-visible { outline: 2px solid var(--soft); outline-offset: 2px; }
.shades span { padding: .1rem .5rem; margin-right: .2rem; color: var(--ink); white-space: nowrap; }
.answer .template { border-bottom: 2px dotted var(--soft); }
.answer .reasoning { font-style: italic; border-top: 1px solid var(--soft); }
.answer .cut { text-decoration: line-through; color: var(--soft); }
#foot { position: sticky; bottom: 0; padding: .5rem 0; background: var(--paper); border-top: 1px solid var(--line);
        overflow-wrap: anywhere; font-size: .9rem; }
#foot[hidden] { display: none; } #foot label { display: inline-block; max-width: 100%; margin-right: 1rem; }
#foot select { font: inherit; max-width: 100%; }
"""
# What is shown of a token that is pointed at, for those that tap, and for keys: an answer is one stop of Tab.
TOKENS_SCRIPT = """
const foot = document.getElementById("foot"), line = foot.querySelector("output");
let at = null;
function say() {
  if (!at) return;
  const answer = at.parentElement, ratio = /n\u00b7a (\\S+)$/.exec(at.title), n = Number(answer.dataset.n);
  line.textContent = "\u201c" + at.textContent + "\u201d: " + answer.dataset.side + ", " + at.title +
    (ratio ? ", a = " + (ratio[1] / n).toPrecision(3) + " (n = " + n + ")" : "");
}
function go(token) {
  if (at) at.classList.remove("at");
  at = token;
  at.classList.add("at");
  at.scrollIntoView({block: "nearest"});
  say();
}
document.addEventListener("click", event => {
  const token = event.target.closest(".answer > span");
  if (token) go(token);
});
document.addEventListener("keydown", event => {
  const answer = document.activeElement.closest(".answer"), tokens = answer ? [...answer.children] : [];
  const steps = {ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity};
  if (!tokens.length || !(event.key in steps)) return;
  event.preventDefault();
  const place = tokens.indexOf(at);
  go(tokens[Math.max(0, Math.min(tokens.length - 1, place < 0 ? 0 : place + steps[event.key]))]);
});
foot.hidden = false;
"""


def render_answer(answer: ShownAnswer) -> str:
    """An answer, shaded."""
    return (f'<div class="answer" tabindex="0" role="group" aria-label="{answer.side}" data-side="{answer.side}" '
            f'data-n="{len(answer.ids)}">{"".join(map(render_piece, answer.pieces))}</div>')


def render_piece(piece: Piece) -> str:
    """A token, or those of one character; or text without a token."""
    style = "" if piece.weight is None else f' style="--a:{opacity(piece.weight):.3f}"'
    about = ", ".join(filter(None, [piece.kind, piece.ids and f"id {spell_ids(piece)}",
                                    piece.weights and f"n\u00b7a {spell_weights(piece)}"]))
    kind = CLASSES[piece.kind] and f' class="{CLASSES[piece.kind]}"'
    return f'<span{kind}{style} title="{html.escape(about)}">{html.escape(visible(piece.text))}</span>'


def spell_weights(piece: Piece) -> str:
    return " ".join(f"{weight:.4g}" for weight in piece.weights or ())


def spell_ids(piece: Piece) -> str:
    return " ".join(map(str, piece.ids))


def render_key(kinds: Iterable[str], has_weights: bool = True) -> str:
    """What shades mean, and what marks of these kinds of tokens."""
    samples = "".join(f'<span style="--a:{opacity(ratio):.3f}">{words}</span>' for ratio, words in (
        (0, "0"), (0.5, "0.5"), (1, "1: plain DPO"), (2, "2"), (3, "3"), (DARKEST, f"{DARKEST:g} and more")))
    shades = f'<p class="note shades">{html.escape(KEY)}. Its shades: {samples}</p>' if has_weights else ""
    shown = [kind for kind in KINDS if kind in kinds]
    marks = "".join(f"<dt>{kind}</dt><dd>{KINDS[kind]}</dd>" for kind in shown)
    return f'{shades}<dl>{marks}<dt>&#8629;</dt><dd>a line break</dd></dl>'


def render_foot(chooser: str = "", script: str = "") -> str:
    """The line that shows a tapped token's figures, with what else is to stand there; nothing without scripts."""
    return (f'<div id="foot" hidden>{chooser}<output aria-live="polite">Tap a token for its figures; or Tab to an '
            f"answer, then arrow keys.</output></div><script>{TOKENS_SCRIPT}{script}</script>")


# ----------------------------------------------------------------------------------------------------------------------
# The picture

def draw_pairs(shown: list[tuple[str, list[ShownAnswer]]]) -> str:
    """SVG: (prompt, both answers) of pairs as on the page, on paper of its own, so that it can be read on any
    background. What is of the template or was cut is left out."""
    parts, top = [], MARGIN
    for prompt, answers in shown:
        drawn, top = draw_text(prompt, MARGIN, top, 2 * COLUMNS, "soft")
        parts.append(drawn)
        bottoms = []
        for left, answer in zip((MARGIN, (WIDTH + MARGIN) / 2), answers):
            pieces = [piece for piece in answer.pieces if piece.kind in (ANSWER, REASONING)]
            cut = ", cut" if any(piece.kind in (CUT, UNJUDGED) for piece in answer.pieces) else ""
            count = sum(len(piece.ids) for piece in pieces)
            head, below = draw_text(f"{answer.side}, {count} tokens{cut}", left, top + 6, COLUMNS, "soft")
            drawn, bottom = draw_text("".join(piece.text for piece in pieces), left, below, COLUMNS, "ink",
                                      list(shades_of(pieces)))
            parts += [head, drawn]
            bottoms.append(bottom)
        top = max(bottoms) + 20
    legend, height = draw_text("n\u00b7a, weight times number of tokens: 0", MARGIN, top, COLUMNS, "soft")
    parts += [legend, f'<rect x="{MARGIN + 38 * CHARACTER:.0f}" y="{top + 3}" width="{12 * CHARACTER:.0f}" height="16" '
                      'fill="url(#shades)"/>']
    parts.append(draw_text(f"{DARKEST:.0f} and more; 1 everywhere in plain DPO", MARGIN + 51 * CHARACTER, top, COLUMNS,
                           "soft")[0])
    style = ("text{font:13px ui-monospace,Menlo,Consolas,'DejaVu Sans Mono',monospace;white-space:pre}"
             ".ink{fill:#1b1b1f}.soft{fill:#6b6a66}.shade{fill:#c54a14}")
    ends = "".join(f'<stop offset="{place}" stop-color="#c54a14" stop-opacity="{opacity(DARKEST * place)}"/>'
                   for place in (0, 1))
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height + MARGIN}" role="img" '
            f'aria-label="answers shaded by token weight"><style>{style}</style>'
            f'<defs><linearGradient id="shades">{ends}</linearGradient></defs>'
            f'<rect width="100%" height="100%" rx="8" fill="#fdfdfb"/>{"".join(parts)}</svg>\n')


def shades_of(pieces: list[Piece]) -> Iterable[tuple[int, int, float]]:
    """(start, end, opacity) in the characters of all pieces together, spaces before a token left out."""
    end = 0
    for piece in pieces:
        end += len(piece.text)
        if piece.weight is not None:
            yield end - len(piece.text.lstrip()), end, opacity(piece.weight)


def draw_text(text: str, left: float, top: float, columns: int, style: str, shades: Iterable[tuple] = ()
              ) -> tuple[str, float]:
    """(SVG of a text in lines of at most so many characters, shades [start, end, opacity] behind it; where it ends)."""
    parts = []
    for start, end in break_lines(text, columns):
        for first, last, dark in shades:
            first, last = max(first, start), min(last, end)
            if first < last and dark >= 0.01:
                parts.append(f'<rect class="shade" x="{left + (first - start) * CHARACTER:.0f}" y="{top + 1:.0f}" '
                             f'width="{(last - first) * CHARACTER:.0f}" height="{LINE - 2}" rx="3" '
                             f'fill-opacity="{dark:.2f}"/>')
        line = "".join(letter if letter.isprintable() else " " for letter in text[start:end])
        for word in re.finditer(r"\S+", line):  # each has its place and length, so that shades fit whatever the font
            parts.append(f'<text class="{style}" x="{left + word.start() * CHARACTER:.0f}" y="{top + 16:.0f}" '
                         f'textLength="{len(word[0]) * CHARACTER:.0f}" lengthAdjust="spacingAndGlyphs">'
                         f'{html.escape(word[0])}</text>')
        top += LINE
    return "".join(parts), top


def break_lines(text: str, columns: int) -> list[tuple[int, int]]:
    """(start, end) of lines of at most `columns` characters, broken after spaces and line breaks if there are any."""
    lines, start = [], 0
    while start < len(text):
        end = min(start + columns, len(text))
        if (found := text.find("\n", start, end)) >= 0:
            end = found + 1
        elif end < len(text):
            end = text.rfind(" ", start, end) + 1 or end
        lines.append((start, end))
        start = end
    return lines


