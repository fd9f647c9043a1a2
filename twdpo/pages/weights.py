"""What token weights look like: the paper's statistics of them, and a page and a picture of them on real answers.

Tables 1 and 2, the first tokens' shares before the sink fix (section 3), and Appendix B's delta = max_t |n a_t - 1|.
Legend: J judge tokens of one answer, L stored layers.
"""

import html
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from twdpo.files import make_directory, write_atomic, write_json
from twdpo.pages.style import STYLE
from twdpo.pairs import Pair
from twdpo.postprocess import average_rounds, pin_and_share
from twdpo.weights_file import JudgedAnswer, WeightsFile

SIDES = ("chosen", "rejected")
MOST_WEIGHTED = 10
DARKEST = 5.0  # n a of the darkest shade
WIDTH, MARGIN, COLUMNS, CHARACTER, LINE = 920, 18, 52, 8.0, 22  # of the picture: pixels, but for COLUMNS of an answer


def fixed_weights(mass_J: np.ndarray, sink_k: int, sink_k_min: int) -> np.ndarray:
    """Normalised mass with the sink fix on the judge's own tokens (paper section 2.6), [J]."""
    return pin_and_share(mass_J, np.arange(len(mass_J)) < (sink_k if len(mass_J) >= sink_k_min else 0))


def describe_weights(weights_file: WeightsFile, pairs: list[Pair], tokenizer, rounds: str, sink_k: int,
                     sink_k_min: int, min_count: int) -> dict[str, object]:
    """All statistics, as JSON: figures by side, the most weighted tokens, a row a layer.

    Figures and tokens are of the last numbered layer in `weights_file`. Averages are over answers.
    """
    shown = shown_layer(weights_file.layers)
    sides: dict[str, dict[str, list[float]]] = {side: defaultdict(list) for side in SIDES}
    totals: dict[str, Counter] = {side: Counter() for side in SIDES}
    counts: dict[str, Counter] = {side: Counter() for side in SIDES}
    layers = [defaultdict(list) for _ in weights_file.layers]
    for pair in pairs:
        for side, answer in zip(SIDES, weights_file[pair.key]):
            if not len(answer.ids_J):
                continue
            describe_layers(answer, rounds, layers)
            mass_J = average_rounds(answer.attention_LRJ[shown], rounds)
            weights_J = fixed_weights(mass_J, sink_k, sink_k_min)
            figures = sides[side]
            for name, value in (("std", weights_J.std()), ("max", weights_J.max()), ("length", len(weights_J)),
                                ("delta", np.abs(len(weights_J) * weights_J - 1).max())):
                figures[name].append(float(value))
            for place in range(min(3, len(mass_J))):
                figures[f"share of token {place + 1} before the sink fix"].append(float(mass_J[place]))
            for id, weight in zip(answer.ids_J.tolist(), weights_J.tolist()):
                totals[side][id] += weight
                counts[side][id] += 1
    tokens = {side: most_weighted(totals[side], counts[side], tokenizer, min_count) for side in SIDES}
    return {
        "pairs": len(pairs),
        "sides": {side: {name: float(np.mean(values)) for name, values in figures.items()}
                  for side, figures in sides.items()},
        "most_weighted_tokens": tokens,
        "min_count": min_count,
        "layers": [{"layer": name} | {key: float(np.mean(values)) for key, values in figures.items()}
                   for name, figures in zip(weights_file.layers, layers)],
        "verdicts": weights_file.verdict_statistics([pair.key for pair in pairs]),
    }


def shown_layer(layers: list[str]) -> int:
    """The place of the last numbered layer; of the rollout when there is nothing else."""
    return max((place for place, name in enumerate(layers) if name.isdigit()), default=len(layers) - 1)


def describe_layers(answer: JudgedAnswer, rounds: str, layers: list[dict[str, list[float]]]) -> None:
    """Add one answer's figures to every layer's."""
    for attention_RJ, figures in zip(answer.attention_LRJ, layers):
        mass_J = average_rounds(attention_RJ, rounds)
        figures["attention on the answer"].append(float(attention_RJ.sum(axis=1).mean()))
        figures["share of token 1"].append(float(mass_J[0]))
        figures["std"].append(float(mass_J.std()))
        spread = attention_RJ.std(axis=1)
        if len(attention_RJ) == 2 and (spread > 0).all():
            figures["correlation of the rounds"].append(float(np.corrcoef(attention_RJ)[0, 1]))


def most_weighted(totals: Counter, counts: Counter, tokenizer, min_count: int) -> list[dict[str, object]]:
    """Tokens that occur at least `min_count` times, by mean weight (paper Table 2)."""
    means = {id: totals[id] / count for id, count in counts.items() if count >= min_count}
    first = sorted(means, key=lambda id: (-means[id], id))[:MOST_WEIGHTED]
    return [{"token": tokenizer.decode([id]), "id": id, "weight": means[id], "count": counts[id]} for id in first]


def format_report(report: dict[str, object]) -> str:
    """The statistics as text."""
    lines = [f"token weights of {report['pairs']} pairs" + "".join(
        f"; {name} {value:.3f}" for name, value in report["verdicts"].items())]
    names = list(dict.fromkeys(name for side in SIDES for name in report["sides"][side]))
    lines.append(f"{'(mean over answers)':36}" + "".join(f"{side:>12}" for side in SIDES))
    for name in names:
        lines.append(f"{name:36}" + "".join(f"{report['sides'][side].get(name, float('nan')):12.4f}" for side in SIDES))
    for side in SIDES:
        tokens = report["most_weighted_tokens"][side]
        listed = ", ".join(f"{token['token']!r} {token['weight']:.4f}" for token in tokens)
        lines.append(f"most weighted in {side} (seen {report['min_count']} times or more): {listed or 'none'}")
    columns = list(dict.fromkeys(name for layer in report["layers"] for name in layer if name != "layer"))
    lines.append(f"{'layer':>10}" + "".join(f"{name:>28}" for name in columns))
    for layer in report["layers"]:
        lines.append(f"{layer['layer']:>10}" + "".join(f"{layer.get(name, float('nan')):28.4f}" for name in columns))
    return "\n".join(lines)


def write_report(directory: Path, weights_file: WeightsFile, pairs: list[Pair], tokenizer, rounds: str, sink_k: int,
                 sink_k_min: int, min_count: int, num_shown: int, seed: int) -> str:
    """Write report.json, weights.html and weights.svg into `directory`; the statistics as text."""
    make_directory(directory, "--report")
    report = describe_weights(weights_file, pairs, tokenizer, rounds, sink_k, sink_k_min, min_count)
    write_json(directory / "report.json", report)
    texts = [pair for pair in pairs if not pair.answers_call]  # others' texts are not what was judged
    chosen = np.random.default_rng(seed).permutation(len(texts))[:num_shown]
    shown = [texts[place] for place in sorted(chosen.tolist())]
    page = render_page(report, weights_file, shown, rounds, sink_k, sink_k_min)
    picture = draw_pairs(weights_file, shown[:1] + shown[1:][-1:], rounds, sink_k, sink_k_min)
    for name, text in (("weights.html", page), ("weights.svg", picture)):
        write_atomic(directory / name, lambda temporary, text=text: temporary.write_text(text, encoding="utf-8"))
    return format_report(report)


def render_page(report: dict[str, object], weights_file: WeightsFile, pairs: list[Pair], rounds: str, sink_k: int,
                sink_k_min: int) -> str:
    """A page that needs no network: answers shaded by weight, chosen and rejected side by side, and the statistics."""
    articles, shown = [], shown_layer(weights_file.layers)
    for number, pair in enumerate(pairs, 1):
        panels = []
        for side, answer, weights_J in shown_answers(weights_file, pair, rounds, sink_k, sink_k_min):
            panels.append(f'<div><h3>{side}, {len(weights_J)} tokens</h3><div class="answer">'
                          + shade(getattr(pair, side), answer.spans_J2, weights_J) + "</div></div>")
        prompt = "\n\n".join(f"{role}: {text}" for role, text in pair.messages)
        articles.append(f'<article id="pair-{number}"><div class="prompt">{html.escape(prompt)}</div>'
                        f'<div class="sides">{"".join(panels)}</div></article>')
    verdicts = "".join(f", {html.escape(name)} {value:.3f}" for name, value in report["verdicts"].items())
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Token weights</title><style>{STYLE}</style></head><body>
<h1>Token weights</h1>
<p class="note">{report['pairs']} pairs{verdicts}. {len(pairs)} of them are shown below, shaded by n&middot;a, a token's
weight times the number of tokens: <span class="scale"></span> 0 to 5 and more; 1 is what every token has in plain DPO.
Point at a token for its weight. The weights are those of layer {html.escape(weights_file.layers[shown])}, after the
sink fix.</p>
<div class="tables">
{statistics_table(report)}
{"".join(tokens_table(report, side) for side in SIDES)}
</div>
{layers_table(report)}
<h2>Pairs</h2>
{"".join(articles)}
</body></html>
"""


def shown_answers(weights_file: WeightsFile, pair: Pair, rounds: str, sink_k: int, sink_k_min: int
                  ) -> list[tuple[str, JudgedAnswer, np.ndarray]]:
    """(side, judged answer, its weights [J] in the layer that is shown) of both sides."""
    shown = shown_layer(weights_file.layers)
    return [(side, answer, fixed_weights(average_rounds(answer.attention_LRJ[shown], rounds), sink_k, sink_k_min))
            for side, answer in zip(SIDES, weights_file[pair.key])]


def shaded_spans(spans_J2: np.ndarray, weights_J: np.ndarray) -> list[list]:
    """[start, end, weight] of what is shaded as one, in characters: a character of several tokens once, with their
    weights together."""
    shown: list[list] = []
    for (start, end), weight in zip(spans_J2.tolist(), weights_J.tolist()):
        if shown and end <= shown[-1][1]:
            shown[-1][2] += weight
        else:
            shown.append([max(start, shown[-1][1]) if shown else start, end, weight])
    return shown


def opacity(ratio: float) -> float:
    """Of the shade of n a."""
    return min(ratio / DARKEST, 1) * 0.85


def shade(text: str, spans_J2: np.ndarray, weights_J: np.ndarray) -> str:
    """The answer with each judge token in a span whose opacity is its weight; text no token covers stays plain."""
    parts, place = [], 0
    for start, end, weight in shaded_spans(spans_J2, weights_J):
        ratio = len(weights_J) * weight
        parts.append(html.escape(text[place:start]))
        token = html.escape(json.dumps(text[start:end], ensure_ascii=False))
        parts.append(f'<span style="--a:{opacity(ratio):.3f}" title="{token}  a = {weight:.5f}, '
                     f'n&middot;a = {ratio:.2f}">{html.escape(text[start:end])}</span>')
        place = end
    return "".join(parts) + html.escape(text[place:])


# ----------------------------------------------------------------------------------------------------------------------
# The picture

def draw_pairs(weights_file: WeightsFile, pairs: list[Pair], rounds: str, sink_k: int, sink_k_min: int) -> str:
    """SVG: pairs as on the page, on paper of its own, so that it can be read on any background."""
    parts, top = [], MARGIN
    for pair in pairs:
        prompt, top = draw_text("\n".join(text for _, text in pair.messages), MARGIN, top, 2 * COLUMNS, "soft")
        parts.append(prompt)
        bottoms = []
        answers = shown_answers(weights_file, pair, rounds, sink_k, sink_k_min)
        for left, (side, answer, weights_J) in zip((MARGIN, (WIDTH + MARGIN) / 2), answers):
            head, below = draw_text(f"{side}, {len(weights_J)} tokens", left, top + 6, COLUMNS, "soft")
            text = getattr(pair, side)
            shades = [(end - len(text[start:end].lstrip()), end, opacity(len(weights_J) * weight))
                      for start, end, weight in shaded_spans(answer.spans_J2, weights_J)]
            drawn, bottom = draw_text(text, left, below, COLUMNS, "ink", shades)
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


# ----------------------------------------------------------------------------------------------------------------------
# Tables of the page

def statistics_table(report: dict[str, object]) -> str:
    names = list(dict.fromkeys(name for side in SIDES for name in report["sides"][side]))
    rows = "".join(f"<tr><td>{html.escape(name)}</td>" + "".join(
        f"<td>{report['sides'][side].get(name, float('nan')):.4f}</td>" for side in SIDES) + "</tr>" for name in names)
    return (f'<div class="scroll"><h2>Weights (mean over answers)</h2><table><tr><th></th><th>chosen</th>'
            f"<th>rejected</th></tr>{rows}</table></div>")


def tokens_table(report: dict[str, object], side: str) -> str:
    rows = "".join(f"<tr><td><code>{html.escape(json.dumps(token['token'], ensure_ascii=False))}</code></td>"
                   f"<td>{token['weight']:.4f}</td><td>{token['count']}</td></tr>"
                   for token in report["most_weighted_tokens"][side])
    rows = rows or f"<tr><td>no token occurs {report['min_count']} times</td><td></td><td></td></tr>"
    return (f'<div class="scroll"><h2>Most weighted in {side}</h2><table><tr><th>token</th><th>mean weight</th>'
            f"<th>count</th></tr>{rows}</table></div>")


def layers_table(report: dict[str, object]) -> str:
    columns = list(dict.fromkeys(name for layer in report["layers"] for name in layer if name != "layer"))
    head = "".join(f"<th>{html.escape(name)}</th>" for name in columns)
    rows = "".join(f"<tr><td>{html.escape(layer['layer'])}</td>" + "".join(
        f"<td>{layer.get(name, float('nan')):.4f}</td>" for name in columns) + "</tr>" for layer in report["layers"])
    return f'<h2>Layers</h2><div class="scroll"><table><tr><th>layer</th>{head}</tr>{rows}</table></div>'
