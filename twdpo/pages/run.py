"""The page of a run, report.html: its curves, held-out figures and sampled answers; it needs no network."""

import html
import json
import math
from collections.abc import Iterable
from pathlib import Path

from twdpo.files import write_atomic
from twdpo.log import format_mean, held_out_names, row_of_set
from twdpo.pages.style import STYLE

# Title, then (what a line is called, its name in a step row). Evaluations are drawn from eval/NAME.
CHARTS = (
    ("Loss", (("loss", "loss"),)),
    ("Reward accuracy", (("unweighted", "reward_accuracy"), ("weighted", "weighted_reward_accuracy"))),
    ("Reward margin", (("unweighted", "reward_margin"), ("weighted", "weighted_reward_margin"))),
    ("Rewards", (("chosen", "reward_chosen"), ("rejected", "reward_rejected"))),
    ("KL from the reference, nats a token", (("KL", "kl"),)),
    ("Gradient norm", (("norm", "grad_norm"),)),
    ("Learning rate", (("lr", "lr"),)),
    ("Tokens a second", (("tokens", "tokens_per_s"),)),
)
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 420, 230, 52, 10, 12, 26  # of a chart, in its own units
MOST_POINTS = 400  # of a line; longer ones show means of neighbours

CURVES_STYLE = """
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 360px), 1fr)); gap: 1rem 1.6rem; }
figure { margin: 0; min-width: 0; } figcaption { font-weight: 600; font-size: .92rem; }
figure svg { width: 100%; height: auto; display: block; }
.legend { color: var(--soft); font-size: .8rem; margin-left: .6rem; font-weight: 400; }
.legend i { display: inline-block; width: 1.1em; height: 0; border-top: 3px solid; vertical-align: .25em;
            margin: 0 .3em 0 .6em; }
svg text { fill: var(--soft); font: 11px system-ui, sans-serif; } svg .grid { stroke: var(--line); }
svg polyline { fill: none; stroke-width: 1.4; stroke-linejoin: round; }
:root { --first: #b4480f; --second: #2a63b0; }
@media (prefers-color-scheme: dark) { :root { --first: #ff9a52; --second: #7fb2ff; } }
.first { stroke: var(--first); color: var(--first); } .second { stroke: var(--second); color: var(--second); }
circle.first { fill: var(--first); } circle.second { fill: var(--second); }
polyline.held { stroke-width: 1; stroke-dasharray: 4 3; }
.answers td { white-space: pre-wrap; overflow-wrap: anywhere; text-align: left; vertical-align: top; }
"""


def write_curves(run_dir: Path) -> None:
    """Write report.html from the run's config.json, metrics.jsonl and samples.jsonl."""
    rows = read_lines(run_dir / "metrics.jsonl")
    page = render_run(run_dir.name, json.loads((run_dir / "config.json").read_text(encoding="utf-8")), rows,
                      read_lines(run_dir / "samples.jsonl"), (run_dir / "pairs.html").exists())
    write_atomic(run_dir / "report.html", lambda temporary: temporary.write_text(page, encoding="utf-8"))


def read_lines(path: Path) -> list[dict]:
    """A file of JSON lines; one that is not there is empty."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def render_run(name: str, config: dict[str, object], rows: list[dict], samples: list[dict], has_pairs: bool = False
               ) -> str:
    """The page of a run, from its settings, the rows of metrics.jsonl and of samples.jsonl. has_pairs: whether
    pairs.html stands beside it."""
    steps = [row for row in rows if "eval/pairs" not in row]
    held_out = [row for row in rows if "eval/pairs" in row]
    charts = "".join(render_chart(title, lines, steps, held_out) for title, lines in CHARTS)
    what = f"{config['loss']} on {config['model'] or 'the toy'}, data {config['data']}; {len(steps)} steps"
    names = held_out_names(held_out[-1]) if held_out else []
    if held_out:
        which = f" of {names[0]}" if names[0] else ""
        what += f"; held out: {held_out[-1]['eval/pairs']} pairs{which}, dots, with one standard error"
    pairs = ' <a href="pairs.html">The first pairs, as they are trained</a>.' if has_pairs else ""
    settings = "".join(f"<tr><td>{html.escape(key)}</td><td>{html.escape(json.dumps(value))}</td></tr>"
                       for key, value in config.items() if value != "")
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(name)}</title><style>{STYLE}{CURVES_STYLE}</style></head><body>
<h1>{html.escape(name)}</h1>
<p class="note">{html.escape(what)}.{pairs}</p>
<div class="charts">{charts}</div>
{"".join(held_out_section(name, held_out) for name in names)}
{answers_table(samples)}
<details><summary>Settings</summary><div class="scroll"><table>{settings}</table></div></details>
</body></html>
"""


def render_chart(title: str, lines: Iterable[tuple[str, str]], steps: list[dict], held_out: list[dict]) -> str:
    """One chart as SVG: a line of the steps, dots with standard errors of the evaluations; "" without any value."""
    drawn = []
    for label, name in lines:
        line = thin([(row["step"], row[name]) for row in steps if name in row])
        dots = [(row["step"], row[f"eval/{name}"], row.get(f"eval/{name}_stderr", 0.0))
                for row in held_out if f"eval/{name}" in row]
        if line or dots:
            drawn.append((label, line, dots))
    if not drawn:
        return ""
    xs = [point[0] for _, line, dots in drawn for point in (*line, *dots)]
    ys = [y for _, line, _ in drawn for _, y in line]
    ys += [edge for _, _, dots in drawn for _, y, error in dots for edge in (y - error, y + error)]
    ticks_x, ticks_y = nice_ticks(min(xs), max(xs), 5, least=1.0), nice_ticks(min(ys), max(ys), 5)
    low_x, high_x = min(xs), max(max(xs), min(xs) + 1)
    low_y, high_y = min(ticks_y[0], min(ys)), max(ticks_y[-1], max(ys))

    def place_x(x: float) -> float:
        return LEFT + (x - low_x) / (high_x - low_x) * (WIDTH - LEFT - RIGHT)

    def place_y(y: float) -> float:
        return HEIGHT - BOTTOM - (y - low_y) / (high_y - low_y) * (HEIGHT - TOP - BOTTOM)

    parts = []
    for y, label in zip(ticks_y, format_ticks(ticks_y)):
        place = place_y(y)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{place:.1f}" y2="{place:.1f}"/>'
                     f'<text x="{LEFT - 6}" y="{place + 4:.1f}" text-anchor="end">{label}</text>')
    for x, label in zip(ticks_x, format_ticks(ticks_x)):
        if low_x <= x <= high_x:
            parts.append(f'<text x="{place_x(x):.1f}" y="{HEIGHT - 8}" text-anchor="middle">{label}</text>')
    for style, (label, line, dots) in zip(("first", "second"), drawn):
        if len(line) == 1:
            (x, y), = line
            parts.append(f'<circle class="{style}" cx="{place_x(x):.1f}" cy="{place_y(y):.1f}" r="2"/>')
        if len(line) > 1:
            points = " ".join(f"{place_x(x):.1f},{place_y(y):.1f}" for x, y in line)
            parts.append(f'<polyline class="{style}" points="{points}"/>')
        if len(dots) > 1:
            points = " ".join(f"{place_x(x):.1f},{place_y(y):.1f}" for x, y, _ in dots)
            parts.append(f'<polyline class="{style} held" points="{points}"/>')
        for x, y, error in dots:
            parts.append(f'<line class="{style}" x1="{place_x(x):.1f}" x2="{place_x(x):.1f}" '
                         f'y1="{place_y(y - error):.1f}" y2="{place_y(y + error):.1f}"/><circle class="{style}" '
                         f'cx="{place_x(x):.1f}" cy="{place_y(y):.1f}" r="3.2"><title>step {x}, held out, {label}: '
                         f"{y:.5g} &#177; {error:.2g}</title></circle>")
    legend = "".join(f'<i class="{style}"></i>{html.escape(label)}' for style, (label, *_) in
                     zip(("first", "second"), drawn)) if len(drawn) > 1 else ""
    return (f'<figure><figcaption>{html.escape(title)}<span class="legend">{legend}</span></figcaption>'
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)} by step">'
            f'{"".join(parts)}</svg></figure>')


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
    """With as many decimals as tell them apart: `10,000`, `0.25`, `1e-06`."""
    if max(map(abs, ticks)) < 1e-3:
        return [f"{value:.3g}" for value in ticks]
    for decimals in range(12):
        labels = [f"{value:,.{decimals}f}" for value in ticks]
        if all(abs(float(label.replace(",", "")) - value) < 1e-9 + 1e-6 * abs(ticks[1] - ticks[0])
               for label, value in zip(labels, ticks)):
            break
    return labels


def held_out_section(name: str, held_out: list[dict]) -> str:
    """Figures of one held-out set; of a named one its curves too."""
    rows = [row_of_set(row, name) for row in held_out]
    if not name:
        return f"<h2>Held out</h2>{figures_table(rows)}"
    charts = "".join(render_chart(title, lines, [], rows) for title, lines in CHARTS)
    return (f"<h2>Held out: {html.escape(name)} ({rows[-1]['eval/pairs']} pairs)</h2>"
            f'<div class="charts">{charts}</div>{figures_table(rows)}')


def figures_table(held_out: list[dict]) -> str:
    """Held-out figures of the first and the last evaluation, and of the one of lowest loss."""
    best = min(held_out, key=lambda row: row.get("eval/loss", math.inf))
    shown = {"first": held_out[0], "lowest loss": best, "last": held_out[-1]}
    head = "".join(f"<th>{name} (step {row['step']})</th>" for name, row in shown.items())
    names = [name for name in held_out[-1] if name.startswith("eval/") and not name.endswith("_stderr")
             and name != "eval/pairs"]
    body = "".join(f"<tr><td>{html.escape(name.removeprefix('eval/'))}</td>"
                   + "".join(f"<td>{format_mean(row, name)}</td>" for row in shown.values()) + "</tr>"
                   for name in names)
    return f'<div class="scroll"><table><tr><th></th>{head}</tr>{body}</table></div>'


def answers_table(samples: list[dict]) -> str:
    """Sampled answers, a prompt after the other, by step."""
    if not samples:
        return ""
    parts = []
    for prompt in dict.fromkeys(sample["prompt"] for sample in samples):
        rows = "".join(f"<tr><td>{sample['step']}</td><td>{html.escape(sample['answer'])}</td></tr>"
                       for sample in samples if sample["prompt"] == prompt)
        parts.append(f'<article><div class="prompt">{html.escape(prompt)}</div><table class="answers">'
                     f"<tr><th>step</th><th></th></tr>{rows}</table></article>")
    return f"<h2>What the policy answers</h2>{''.join(parts)}"
