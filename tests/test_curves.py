"""report.html of a run: what it draws and says, what it escapes, and that it needs nothing from elsewhere."""

import json
import re

import pytest

from twdpo.flags import InputError
from twdpo.metrics import MEANINGS
from twdpo.pages.charts import (
    DASHES,
    LETTER,
    LIGHT,
    MARKS,
    MOST_MARKS,
    MOST_POINTS,
    Series,
    chart_key,
    format_ticks,
    nice_ticks,
    render_chart,
    thin,
)
from twdpo.pages.run import render_run, write_curves

STEPS = [{"step": step, "loss": 0.7 - 0.01 * step, "reward_margin": 0.1 * step, "grad_norm": 1.0, "lr": 1e-6}
         for step in range(1, 11)]
HELD_OUT = [{"step": step, "eval/loss": loss, "eval/loss_stderr": 0.01, "eval/pairs": 5}
            for step, loss in ((0, 0.69), (5, 0.5), (10, 0.6))]
CONFIG = {"loss": "twdpo", "model": "", "data": "toy", "beta": 0.1, "wandb": "", "packing": "<on>", "sink_k": 0,
          "renormalize": False, "weights": "attention", "layer": "2", "loss_options": "nll=0.5"}
START = {"step": 0, "date": "2026-01-02 03:04 UTC", "commit": "abc123-dirty", "processes": 2, "device": "CPU <x>",
         "python": "3.12", "torch": "2.13", "held_out": {}}


def body_of(page: str) -> str:
    return page.split("</style>")[1]


def test_a_page_holds_the_curves_and_figures_and_nothing_from_elsewhere(tmp_path):
    samples = [{"step": step, "prompt": "say <b>", "answer": f"answer & {step}"} for step in (0, 10)]
    for name, rows in (("metrics.jsonl", STEPS + HELD_OUT), ("samples.jsonl", samples)):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "environment.json").write_text(json.dumps([START, START | {"step": 5}]))
    write_curves(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert not re.search(r"<script|<link|src=|https?://|@import|url\(", page)
    assert re.findall(r"<figcaption>(.*?)<", page) == ["Loss", "Reward margin", "Gradient norm", "Learning rate"]
    assert body_of(page).count("<title>step ") == 3 and "Held out: 5 pairs" in page
    assert "say &lt;b&gt;" in page and "answer &amp; 10" in page and "&lt;on&gt;" in page and "wandb" not in page
    assert "<td>sink_k</td><td>0</td>" in page and "<td>renormalize</td><td>false</td>" in page
    heads = [f"<th>{name} (step&nbsp;{step})</th>" for name, step in (("start", 0), ("best", 5), ("last", 10))]
    assert "".join(heads) in page and "0.5000 ±&nbsp;0.0100" in page and "Best: step 5, the lowest" in page
    for key, value in (("loss", "twdpo (nll=0.5)"), ("token weights", "attention, judge&#x27;s layer 2"),
                       ("data", "toy"), ("model", "toy")):
        assert f"<tr><td>{key}</td><td>{value}</td></tr>" in page
    what = "2026-01-02 03:04 UTC; 2 processes on CPU &lt;x&gt;; python 3.12, torch 2.13; code at commit abc123-dirty"
    assert f"<td>started</td><td>{what}</td>" in page and f"<td>resumed at step 5</td><td>{what}</td>" in page


def test_it_links_what_stands_beside_it():
    pages = {"pairs.html": "", "weights/weights.html": "", "best": ""}
    page = render_run("x", CONFIG, STEPS + HELD_OUT, [], [], pages)
    assert re.findall(r'href="(.*?)"', page) == ["pairs.html", "weights/weights.html"]
    assert "best/ holds the policy of step 5." in page
    page = render_run("x", CONFIG, STEPS + HELD_OUT, [])
    assert "href" not in page and "best/" not in page


def test_a_run_without_evaluation_or_samples_has_a_page():
    page = body_of(render_run("x", CONFIG, STEPS, []))
    assert "<h2>Held out" not in page and "answers" not in page and "There was no evaluation" in page
    assert page.count(' train" points') == 1 + 4 and "held-out pairs" not in page and "best" not in page


def test_one_step_and_one_held_out_pair_have_marks_and_no_nan():
    page = body_of(render_run("x", CONFIG, STEPS[:1], []))
    assert page.count("scale(.6)") == 4
    page = body_of(render_run("x", CONFIG, [*STEPS[:1], {"step": 1, "eval/loss": 0.5, "eval/pairs": 1}], []))
    assert "<td>0.5000</td>" in page and "nan" not in page


def test_two_evaluations_are_marks_and_three_are_a_curve():
    """A straight line from the start to the end would read as a fit."""
    page = body_of(render_run("x", CONFIG, STEPS + HELD_OUT[::2], []))
    assert ' held"' not in page and "--eval-every N" in page and page.count("<title>step ") == 2
    assert "marks: held-out pairs, bars: one standard error" in page and "thick line" not in page
    page = body_of(render_run("x", CONFIG, STEPS + HELD_OUT, []))
    assert page.count(' held" points') == 1 + 1 and "--eval-every" not in page and "thick line and marks" in page


def test_axes_marks_and_bars_have_names_and_the_best_step_a_line_and_a_ring():
    page = body_of(render_run("x", CONFIG, STEPS + HELD_OUT, []))
    charts = re.findall(r"<figure>.*?</figure>", page)
    assert len(charts) == 4
    for chart in charts:
        assert chart.count(">step</text>") == 1 and chart.count(">best: 5</text>") == 1
        assert chart.count('class="ring"') == ("<figcaption>Loss" in chart)
    assert page.index("ring and dotted line: the best step") < page.index("<figure>")
    assert "thin line: training" in chart_key(0, "") and "ring" not in chart_key(3, "")


def test_each_figure_is_explained_where_it_is_drawn_and_where_it_is_listed():
    rows = [row | {"eval/active": 0.5} for row in HELD_OUT]
    page = body_of(render_run("x", CONFIG, STEPS + rows, []))
    (charts, table) = page.split("<h2>Held out")
    for name in ("loss", "reward_margin", "grad_norm"):
        assert f"<b>{name}</b>: {MEANINGS[name]}" in charts
    assert MEANINGS["loss"] in table
    assert "<figcaption>active</figcaption>" in charts and "<b>active</b></div>" in charts  # a fork's own metric


def test_points_stand_where_their_values_say():
    chart = render_chart("Loss", "", [Series("", 0, [(0, 0.0), (10, 1.0)])])
    (points,) = re.findall(r'<polyline class="s0 train" points="(.*?)"', chart)
    (x0, y0), (x1, y1) = ([float(number) for number in point.split(",")] for point in points.split())
    ticks = dict(re.findall(r'y="([\d.]+)" text-anchor="end">([\d.]+)<', chart))
    places = {float(value): float(place) - 4 for place, value in ticks.items()}
    assert x0 < x1 and y0 == pytest.approx(places[0.0], abs=0.1) and y1 == pytest.approx(places[1.0], abs=0.1)


def test_names_of_large_values_and_of_line_ends_have_room():
    """The left margin grows with the longest tick; names at one step's ends lie apart and inside."""
    drawn = [Series("", number, [(1, 5e6), (2, float(number))], end="ABCDEFGH"[number]) for number in range(8)]
    chart = render_chart("x", "", drawn)
    ticks = re.findall(r'<text x="([\d.]+)" y="[\d.]+" text-anchor="end">(.*?)<', chart)
    assert ticks and all(float(x) - LETTER * len(label) >= 0 for x, label in ticks)
    ends = [float(y) for y in re.findall(r'<text class="s\d" x="[\d.]+" y="([\d.]+)">', chart)]
    assert len(ends) == 8 and all(b - a >= 11.9 for a, b in zip(ends, ends[1:])) and 0 < ends[0] and ends[-1] <= 210


def test_what_is_drawn_together_can_be_told_apart():
    assert len(set(LIGHT)) == len(set(MARKS)) == len(set(DASHES)) == 8


def test_many_evaluations_keep_their_line_and_the_best_ones_ring():
    dots = [(step, 1.0 + step, 0.1) for step in range(200)]
    chart = render_chart("x", "", [Series("", 0, [], dots, best=123)])
    assert chart.count("<title>step ") <= MOST_MARKS and chart.count('class="ring"') == 1
    (points,) = re.findall(r'held" points="(.*?)"', chart)
    assert len(points.split()) == 200


@pytest.mark.parametrize("low, high", [(0, 1), (0.5, 0.5), (-3.2, 7.9), (0, 0), (1e-7, 3e-6), (990, 1010), (-5, -4)])
def test_ticks_are_round_and_span_the_values(low, high):
    ticks = nice_ticks(low, high, 5)
    assert ticks[0] <= low + 1e-9 and ticks[-1] >= high - 1e-9 and 2 <= len(ticks) <= 8
    steps = {round((b - a) / (ticks[1] - ticks[0]), 6) for a, b in zip(ticks, ticks[1:])}
    assert steps == {1.0}


def test_long_lines_are_thinned_to_means():
    points = thin([(float(x), float(x % 2)) for x in range(1000)])
    assert len(points) <= MOST_POINTS and points[0] == (1.0, pytest.approx(1 / 3))
    assert thin([]) == [] and thin([(1.0, 2.0)]) == [(1.0, 2.0)]


def test_ticks_are_written_out_and_differ():
    assert format_ticks([8000.0, 10000.0]) == ["8,000", "10,000"] and format_ticks([0.0, 0.25]) == ["0.00", "0.25"]
    assert format_ticks([0.0, 5e-7, 1e-6]) == ["0", "5e-7", "1e-6"] and format_ticks([-2.0, 0.0]) == ["-2", "0"]
    assert format_ticks([0.0, 5e-5, 1e-4, 1.5e-4]) == ["0", "5e-5", "1e-4", "1.5e-4"]
    assert format_ticks([0.0, 1.25e-4]) == ["0", "1.25e-4"] and format_ticks([5e-4, 5.01e-4]) == ["5e-4", "5.01e-4"]
    assert format_ticks([-2e30, 0.0, 5e29]) == ["-2e30", "0", "5e29"] and max(map(len, format_ticks([0.0, 3e38]))) == 4
    assert len(set(format_ticks(nice_ticks(0.6931471, 0.6931474, 5)))) >= 4
    assert nice_ticks(1, 1, 5, least=1.0) == [1.0, 2.0]


def test_a_damaged_line_is_named_and_a_cut_last_one_is_left(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    lines = [json.dumps(row) for row in STEPS]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 11, "lo']))
    write_curves(tmp_path)
    assert ", steps 10<" in (tmp_path / "report.html").read_text()
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines[:2], "[1]", *lines[2:]]))
    with pytest.raises(InputError, match=r"metrics.jsonl, line 3: '\[1\]' is no row"):
        write_curves(tmp_path)
