"""Charts of pages: what changes by step, as SVG that needs no network and no script.

A training line is thin; held-out values are marks with one standard error, and from three evaluations on a line through
them. What is drawn together has a number, and so its colour, mark and dashes.
"""

import html
import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from twdpo.metrics import meaning

WIDTH, HEIGHT, RIGHT, TOP, BOTTOM = 400, 244, 22, 18, 40  # of a chart, in its own units
LETTER, LINE = 7, 12  # at most the width of a digit; the height of a name
MOST_POINTS = 400  # of a training line; longer ones show means of neighbours
MOST_MARKS = 60  # of a held-out line; more of them would hide it
LEAST_FOR_A_LINE = 3  # evaluations: a line through two would look like a fit

LIGHT = ("#b4480f", "#2a63b0", "#1d7440", "#8a3ab0", "#0a6b80", "#ad2062", "#6b6300", "#4a4a55")
DARK = ("#ff9a52", "#7fb2ff", "#6fd08c", "#cf9bff", "#4fc9dc", "#ff8fc0", "#d6cf4a", "#c6c6d0")
DASHES = ("", "7 3", "2 2.5", "9 3 2 3", "14 4", "5 2 1 2 1 2", "4 4", "1 3")
MARKS = ("M-3.3 0a3.3 3.3 0 1 0 6.6 0a3.3 3.3 0 1 0-6.6 0z", "M-3-3h6v6h-6z", "M0-4.2l4.2 4.2-4.2 4.2-4.2-4.2z",
         "M0-4.2l4 7h-8z", "M0 4.2l4-7h-8z", "M-4-1.4h2.6v-2.6h2.8v2.6h2.6v2.8h-2.6v2.6h-2.8v-2.6h-2.6z",
         "M-3.8-2l1.8-1.8 2 2 2-2 1.8 1.8-2 2 2 2-1.8 1.8-2-2-2 2-1.8-1.8 2-2z",
         "M-4.2 0l2.1-3.6h4.2l2.1 3.6-2.1 3.6h-4.2z")

CHART_STYLE = """
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 360px), 1fr)); gap: 1.4rem 1.6rem; }
figure { margin: 0; min-width: 0; } figcaption { font-weight: 600; font-size: .92rem; }
figure svg { width: 100%; height: auto; display: block; }
.what { color: var(--soft); font-size: .8rem; line-height: 1.45; font-weight: 400; margin: .1rem 0 .3rem; }
.key { font-size: .85rem; margin: .8rem 0; padding: 0; list-style: none; }
.key li { display: inline-block; margin-right: 1.2rem; } .runs li { display: block; }
.key svg { display: inline-block; width: 34px; height: 16px; vertical-align: -3px; }
svg text { fill: var(--soft); font: 12px system-ui, sans-serif; } svg .grid { stroke: var(--line); }
svg path { stroke-width: .8; } svg .train { fill: none; stroke-width: 1; opacity: .55; stroke-linejoin: round; }
svg .held { fill: none; stroke-width: 1.9; stroke-linejoin: round; } svg .error { stroke-width: 1.2; }
svg .best { stroke: var(--soft); stroke-dasharray: 2 3; }
svg .ring { fill: none; stroke: var(--ink); stroke-width: 1.2; }
""" + "".join(f"""
:root {{ --series-{number}: {light}; }}
@media (prefers-color-scheme: dark) {{ :root {{ --series-{number}: {dark}; }} }}
.s{number} {{ stroke: var(--series-{number}); }} path.s{number} {{ fill: var(--series-{number}); }}
svg text.s{number} {{ stroke: none; font-weight: 600; fill: var(--series-{number}); }}
""" for number, (light, dark) in enumerate(zip(LIGHT, DARK)))


@dataclass(frozen=True)
class Series:
    """What is drawn in one colour."""

    label: str
    number: int  # below len(LIGHT)
    line: list[tuple[float, float]]  # training: step, value
    dots: list[tuple[float, float, float]] = field(default_factory=list)  # held out: step, mean, standard error
    best: float | None = None  # the step whose mark has a ring
    end: str = ""  # stands beside the last value

    @classmethod
    def of(cls, name: str, steps: list[dict], held_out: list[dict], label: str, number: int, best: float | None,
           end: str = "") -> "Series":
        """What rows of steps and of evaluations hold of a figure."""
        return cls(label, number, [(row["step"], row[name]) for row in steps if name in row],
                   [(row["step"], row[f"eval/{name}"], row.get(f"eval/{name}_stderr", 0.0)) for row in held_out
                    if f"eval/{name}" in row], best, end)


class Scale:
    """Where values stand in a chart that holds them all."""

    def __init__(self, drawn: list[Series]):
        xs = [point[0] for series in drawn for point in (*series.line, *series.dots)]
        ys = [y for series in drawn for _, y in series.line]
        ys += [edge for series in drawn for _, y, error in series.dots for edge in (y - error, y + error)]
        self.ticks_x, self.ticks_y = nice_ticks(min(xs), max(xs), 5, least=1.0), nice_ticks(min(ys), max(ys), 5)
        self.low_x, self.high_x = min(xs), max(max(xs), min(xs) + 1)
        self.left = 12 + LETTER * max(map(len, format_ticks(self.ticks_y)))
        self.low_y, self.high_y = min(self.ticks_y[0], min(ys)), max(self.ticks_y[-1], max(ys))

    def x(self, value: float) -> float:
        return self.left + (value - self.low_x) / (self.high_x - self.low_x) * (WIDTH - self.left - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.low_y) / (self.high_y - self.low_y) * (HEIGHT - TOP - BOTTOM)

    def line(self, points: Iterable[tuple[float, float]], style: str) -> str:
        places = " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in points)
        return f'<polyline class="{style}" points="{places}"/>'


def render_chart(title: str, what: str, drawn: list[Series], best: float | None = None) -> str:
    """One chart as a figure; "" without any value.

    what: HTML that says what is drawn. best: a step that is marked from top to bottom.
    """
    drawn = [series for series in drawn if series.line or series.dots]
    if not drawn:
        return ""
    scale = Scale(drawn)
    parts = [draw_axes(scale)]
    if best is not None and scale.low_x <= best <= scale.high_x:
        parts.append(draw_best(scale, best))
    parts += [draw_series(scale, series) for series in drawn]
    parts.append(draw_ends(scale, drawn))
    labels = [series for series in drawn if series.label]
    legend = "".join(f"<li>{draw_sample(series.number, bool(series.dots), not is_dotted(series))} "
                     f"{html.escape(series.label)}</li>" for series in labels) if len(labels) > 1 else ""
    return (f'<figure><figcaption>{html.escape(title)}</figcaption><div class="what">{what}</div>'
            + (f'<ul class="key">{legend}</ul>' if legend else "")
            + f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)} by step">'
              f'{"".join(parts)}</svg></figure>')


def explain(lines: Iterable[tuple[str, str]]) -> str:
    """What the lines of a chart are, (label, name in metrics.jsonl), as HTML."""
    return "<br>".join(f"<b>{html.escape(name)}</b>{': ' if meaning(name) else ''}{html.escape(meaning(name))}"
                       for _, name in lines)


def is_dotted(series: Series) -> bool:
    """Whether its evaluations are too few for a line."""
    return 0 < len(series.dots) < LEAST_FOR_A_LINE


def draw_axes(scale: Scale) -> str:
    """Grid, ticks, and what stands below."""
    parts = []
    for y, label in zip(scale.ticks_y, format_ticks(scale.ticks_y)):
        place = scale.y(y)
        parts.append(f'<line class="grid" x1="{scale.left}" x2="{WIDTH - RIGHT}" y1="{place:.1f}" y2="{place:.1f}"/>'
                     f'<text x="{scale.left - 6}" y="{place + 4:.1f}" text-anchor="end">{label}</text>')
    for x, label in zip(scale.ticks_x, format_ticks(scale.ticks_x)):
        if scale.low_x <= x <= scale.high_x:
            parts.append(f'<text x="{scale.x(x):.1f}" y="{HEIGHT - 22}" text-anchor="middle">{label}</text>')
    middle = (scale.left + WIDTH - RIGHT) / 2
    return "".join(parts) + f'<text x="{middle:.1f}" y="{HEIGHT - 5}" text-anchor="middle">step</text>'


def draw_best(scale: Scale, step: float) -> str:
    """A line at the best step, with its name."""
    x = scale.x(step)
    anchor = "start" if x < scale.left + 30 else "end" if x > WIDTH - RIGHT - 30 else "middle"
    return (f'<line class="best" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 4}" y2="{HEIGHT - BOTTOM}"/>'
            f'<text x="{x:.1f}" y="{TOP - 7}" text-anchor="{anchor}">best: {step:g}</text>')


def draw_series(scale: Scale, series: Series) -> str:
    """Its line of steps, then its evaluations."""
    style, dots, parts = f"s{series.number}", series.dots, []
    line = thin(series.line)
    if len(line) == 1:
        (x, y), = line
        parts.append(f'<path class="{style}" d="{MARKS[0]}" transform="translate({scale.x(x):.1f} {scale.y(y):.1f}) '
                     'scale(.6)"/>')
    if len(line) > 1:
        parts.append(scale.line(line, f"{style} train"))
    if dots and not is_dotted(series):
        dashes = f'stroke-dasharray="{DASHES[series.number]}" ' if DASHES[series.number] else ""
        held = scale.line([(x, y) for x, y, _ in dots], f"{style} held")
        parts.append(held.replace("<polyline ", f"<polyline {dashes}"))
    for x, y, error in dots[::math.ceil(len(dots) / MOST_MARKS) or 1]:
        parts.append(f'<line class="{style} error" x1="{scale.x(x):.1f}" x2="{scale.x(x):.1f}" '
                     f'y1="{scale.y(y - error):.1f}" y2="{scale.y(y + error):.1f}"/>'
                     f'<path class="{style}" d="{MARKS[series.number]}" transform="translate({scale.x(x):.1f} '
                     f'{scale.y(y):.1f})"><title>step {x:g}, held out{", " * bool(series.label)}'
                     f"{html.escape(series.label)}: {y:.5g} &#177; {error:.2g}</title></path>")
    parts += [f'<circle class="ring" cx="{scale.x(x):.1f}" cy="{scale.y(y):.1f}" r="6"/>'
              for x, y, _ in dots if x == series.best]
    return "".join(parts)


def draw_ends(scale: Scale, drawn: list[Series]) -> str:
    """Names at the ends of lines, moved apart where they would lie on each other."""
    ends: dict[float, list[tuple]] = {}  # by step
    for series in drawn:
        x, y = (series.dots or series.line)[-1][:2]
        ends.setdefault(x, []).append((scale.y(y), series.end, series.number))
    parts = []
    for x, names in ends.items():
        places: list[float] = []
        for number, (y, _, _) in enumerate(sorted(names)):
            lowest = HEIGHT - BOTTOM - LINE * (len(names) - 1 - number)  # that leaves room for those below
            places.append(min(max(y, places[-1] + LINE if places else TOP), lowest))
        parts += [f'<text class="s{number}" x="{scale.x(x) + 8:.1f}" y="{y + 4:.1f}">{html.escape(end)}</text>'
                  for y, (_, end, number) in zip(places, sorted(names)) if end]
    return "".join(parts)


def draw_sample(number: int, has_marks: bool = True, has_line: bool = True) -> str:
    """What a series looks like, for a key: its held-out marks and line, or training's line."""
    style, dashes = ("held", DASHES[number]) if has_marks else ("train", "")
    line = (f'<polyline class="s{number} {style}" points="1,8 33,8"'
            + (f' stroke-dasharray="{dashes}"' if dashes else "") + "/>")
    mark = f'<path class="s{number}" d="{MARKS[number]}" transform="translate(17 8)"/>'
    return draw_icon(line * has_line + mark * has_marks)


def chart_key(num_evaluations: int, best: str) -> str:
    """What lines, marks, bars and rings are, as an HTML list; what is not drawn is left out.

    best: what shows the best step.
    """
    bar = '<line class="s0 error" x1="17" x2="17" y1="1" y2="15"/>'
    mark = f'<path class="s0" d="{MARKS[0]}" transform="translate(17 8)"/>'
    items = [("thin line: training, the pairs of that step", draw_sample(0, False))]
    if num_evaluations:
        line = '<polyline class="s0 held" points="1,8 33,8"/>' if num_evaluations >= LEAST_FOR_A_LINE else ""
        items.append((f"{'thick line and ' if line else ''}marks: held-out pairs, bars: one standard error",
                      draw_icon(line + bar + mark)))
    if best:
        lines = ('<line class="best" x1="17" x2="17" y1="0" y2="16"/>' * ("line" in best)
                 + '<circle class="ring" cx="17" cy="8" r="6"/>')
        items.append((f"{best}: the best step, of lowest held-out loss", draw_icon(mark + lines)))
    return f'<ul class="key">{"".join(f"<li>{sample} {text}</li>" for text, sample in items)}</ul>'


def draw_icon(parts: str) -> str:
    """A small picture in a key."""
    return f'<svg viewBox="0 0 34 16" aria-hidden="true">{parts}</svg>'


def thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most MOST_POINTS points, means of neighbours."""
    size = math.ceil(len(points) / MOST_POINTS) or 1
    groups = [points[start:start + size] for start in range(0, len(points), size)]
    return [tuple(sum(values) / len(group) for values in zip(*group)) for group in groups]


def nice_ticks(low: float, high: float, count: int, least: float = 0.0) -> list[float]:
    """Round numbers that span [low, high], about `count` of them, at least `least` apart."""
    if high <= low:
        high = low + (abs(low) or 1.0)
    rough = max((high - low) / count, least)
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= rough)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [0.0 if number == 0 else number * step for number in range(first, last + 1)]


def format_ticks(ticks: list[float]) -> list[str]:
    """With as many digits as tell them apart: `10,000`, `0.25`, `1.25e-6`, `2e30`."""
    write = write_plain if 1e-3 <= max(map(abs, ticks)) < 1e9 else write_power
    for digits in range(12):
        labels = [write(value, digits) for value in ticks]
        if all(abs(float(label.replace(",", "")) - value) <= 1e-6 * abs(ticks[1] - ticks[0])
               for label, value in zip(labels, ticks)):
            break
    return labels


def write_plain(value: float, digits: int) -> str:
    return f"{value:,.{digits}f}"


def write_power(value: float, digits: int) -> str:
    """Without zeros that say nothing: `1.5e-6`, `2e30`, `0`."""
    mantissa, _, power = f"{value:.{digits}e}".partition("e")
    return f"{mantissa.rstrip('0').rstrip('.') if digits else mantissa}e{int(power)}" if value else "0"
