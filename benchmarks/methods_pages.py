"""The pages of benchmarks/methods.py: methods.md, and methods.svg with the learning curves."""

import html
import math
from pathlib import Path

from methods_lab import NUM_PAIRS, STEPS, TEST, WORLDS
from methods_report import NAMES, arms_in, curve, curve_table, part_table, sentences, written_table
from twdpo.files import make_directory, write_atomic

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 430, 340, 46, 132, 36, 40  # of a panel of the plot, pixels
COLORS = ("#1f5fa8", "#c54a14", "#a8781f", "#2f7d4f", "#7a4fa3")


def draw_curves(cells: list[dict]) -> str:
    """SVG: accuracy by steps with 95 % bands, a panel a set of test pairs, arms named at their ends."""
    panels = [(f"{NAMES[part]}: {where} test pairs" if part == "headline" else f"{NAMES[part]}: test pairs",
               [(arm.arm["source"], curve(arm, where)) for arm in arms_in(part, cells)])
              for part, where in (("headline", "reversed"), ("headline", "neutral"), ("control", "neutral"))]
    panels = [(title, [line for line in lines if line[1]]) for title, lines in panels]
    panels = [(title, lines) for title, lines in panels if lines]
    edges = [edge for _, lines in panels for _, points in lines for mean, half in points
             for edge in (mean - min(half, mean), mean + min(half, 1 - mean))]
    low = math.floor(min(edges, default=0.5) * 10) / 10
    parts = [draw_panel(title, lines, panel * WIDTH, low) for panel, (title, lines) in enumerate(panels)]
    style = ("text{font:12px system-ui,sans-serif;fill:#55534e}.title{font-size:13px;font-weight:600;fill:#1b1b1f}"
             ".grid{stroke:#e3e1da}polyline{fill:none;stroke-width:2}polygon{opacity:.14}")
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH * max(1, len(panels))} {HEIGHT}" role="img" '
            f'aria-label="accuracy by training steps"><style>{style}</style><rect width="100%" height="100%" '
            f'fill="#fdfdfb"/>{"".join(parts)}</svg>\n')


def draw_panel(title: str, lines: list[tuple[str, list[tuple[float, float]]]], shift: float, low: float) -> str:
    """One panel; lines: (name, (mean, half the band) after each of STEPS)."""
    def place_x(place: int) -> float:
        return shift + LEFT + place / (len(STEPS) - 1) * (WIDTH - LEFT - RIGHT)

    def place_y(value: float) -> float:
        return HEIGHT - BOTTOM - (min(max(value, low), 1.0) - low) / (1.0 - low) * (HEIGHT - TOP - BOTTOM)
    parts = [f'<text x="{shift + LEFT}" y="20" class="title">{html.escape(title)}</text>']
    for tick in range(round(low * 10), 11):
        y = place_y(tick / 10)
        parts.append(f'<line x1="{place_x(0):.1f}" x2="{place_x(len(STEPS) - 1):.1f}" y1="{y:.1f}" y2="{y:.1f}" '
                     f'class="grid"/><text x="{shift + LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick / 10:.1f}'
                     "</text>")
    for place, steps in enumerate(STEPS):
        parts.append(f'<text x="{place_x(place):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{steps}</text>')
    middle = (place_x(0) + place_x(len(STEPS) - 1)) / 2
    parts.append(f'<text x="{middle:.1f}" y="{HEIGHT - 6}" text-anchor="middle">steps of training</text>')
    ends = sorted((place_y(points[-1][0]), number) for number, (_, points) in enumerate(lines))
    label_y = {}
    for y, number in ends:  # names stand apart, whatever their lines do
        label_y[number] = max(y + 4, max(label_y.values(), default=-math.inf) + 14)
    over = max(label_y.values(), default=0) - (HEIGHT - BOTTOM + 4)
    for number, (name, points) in enumerate(lines):
        color, steps = COLORS[number % len(COLORS)], range(len(points))
        band = [(place_x(place), place_y(points[place][0] + points[place][1])) for place in steps]
        band += [(place_x(place), place_y(points[place][0] - points[place][1])) for place in reversed(steps)]
        middle = " ".join(f"{place_x(place):.1f},{place_y(points[place][0]):.1f}" for place in steps)
        parts.append(f'<polygon fill="{color}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in band)}"/>'
                     f'<polyline stroke="{color}" points="{middle}"/>'
                     f'<text x="{place_x(len(STEPS) - 1) + 8:.1f}" y="{label_y[number] - max(over, 0):.1f}" '
                     f'style="fill:{color}">{html.escape(name)}</text>')
    return "".join(parts)


def render(cells: list[dict]) -> str:
    """methods.md: every part that there are cells of."""
    parts = ["# The methods on the toy",
             f"Made by `benchmarks/methods.py` from the cells beside this page. {NUM_PAIRS} training pairs, {TEST:,} "
             f"test pairs a seed; confounded: {WORLDS['confounded']:.0%} of the filler sentences of training pairs. "
             "Mean over seeds ± half the 95 % interval; differences are paired by seed; (edge): the best setting has a "
             "neighbour that was not tried."]
    for part, title in NAMES.items():
        if table := part_table(part, cells):
            parts.append(f"## {title}\n\n{table}")
            parts += sentences(part, cells)
            if part in ("headline", "control"):
                parts += [f"Accuracy by steps:\n\n{curve_table(part, cells)}",
                          f"What the policy writes:\n\n{written_table(part, cells)}"]
    return "\n\n".join(parts) + "\n"


def write_pages(cells: list[dict], folder: Path) -> None:
    """Write methods.md and methods.svg."""
    make_directory(folder, "--out")
    for name, text in (("methods.md", render(cells)), ("methods.svg", draw_curves(cells))):
        write_atomic(folder / name, lambda temporary, text=text: temporary.write_text(text, "utf-8"))
