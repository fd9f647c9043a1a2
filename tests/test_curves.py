"""report.html of a run: what it draws, what it escapes, and that it needs nothing from elsewhere."""

import json
import re

import pytest

from twdpo.pages.run import MOST_POINTS, format_ticks, nice_ticks, render_chart, render_run, thin, write_curves

STEPS = [{"step": step, "loss": 0.7 - 0.01 * step, "reward_margin": 0.1 * step, "grad_norm": 1.0, "lr": 1e-6}
         for step in range(1, 11)]
HELD_OUT = [{"step": step, "eval/loss": loss, "eval/loss_stderr": 0.01, "eval/pairs": 5}
            for step, loss in ((0, 0.69), (5, 0.5), (10, 0.6))]
CONFIG = {"loss": "twdpo", "model": "", "data": "toy", "beta": 0.1, "wandb": "", "packing": "<on>", "sink_k": 0,
          "renormalize": False}


def test_a_page_holds_the_curves_and_figures_and_nothing_from_elsewhere(tmp_path):
    samples = [{"step": step, "prompt": "say <b>", "answer": f"answer & {step}"} for step in (0, 10)]
    for name, rows in (("metrics.jsonl", STEPS + HELD_OUT), ("samples.jsonl", samples)):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    write_curves(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert not re.search(r"<script|<link|src=|https?://", page)
    assert re.findall(r"<figcaption>(.*?)<", page) == ["Loss", "Reward margin", "Gradient norm", "Learning rate"]
    assert page.count("<circle") == 3 and "held out: 5 pairs" in page and "twdpo on the toy" in page
    assert "say &lt;b&gt;" in page and "answer &amp; 10" in page and "&lt;on&gt;" in page and "wandb" not in page
    assert "<td>sink_k</td><td>0</td>" in page and "<td>renormalize</td><td>false</td>" in page
    assert [cell in page for cell in ("first (step 0)", "lowest loss (step 5)", "last (step 10)")] == [True] * 3
    assert "0.5000 ± 0.0100" in page


def test_a_run_without_evaluation_or_samples_has_a_page():
    page = render_run("x", CONFIG, STEPS, [])
    assert "Held out" not in page and "answers" not in page.split("</style>")[1] and page.count("<polyline") == 4


def test_one_step_and_one_held_out_pair_have_marks_and_no_nan():
    page = render_run("x", CONFIG, STEPS[:1], [])
    assert page.count("<circle") == 4
    page = render_run("x", CONFIG, [*STEPS[:1], {"step": 1, "eval/loss": 0.5, "eval/pairs": 1}], [])
    assert "<td>0.5000</td>" in page and "nan" not in page.split("</style>")[1]


def test_points_stand_where_their_values_say():
    chart = render_chart("Loss", (("loss", "loss"),), [{"step": 0, "loss": 0.0}, {"step": 10, "loss": 1.0}], [])
    (points,) = re.findall(r'<polyline class="first" points="(.*?)"', chart)
    (x0, y0), (x1, y1) = ([float(number) for number in point.split(",")] for point in points.split())
    ticks = dict(re.findall(r'y="([\d.]+)" text-anchor="end">([\d.]+)<', chart))
    places = {float(value): float(place) - 4 for place, value in ticks.items()}
    assert x0 < x1 and y0 == pytest.approx(places[0.0], abs=0.1) and y1 == pytest.approx(places[1.0], abs=0.1)


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
    assert format_ticks([0.0, 5e-7, 1e-6]) == ["0", "5e-07", "1e-06"] and format_ticks([-2.0, 0.0]) == ["-2", "0"]
    assert len(set(format_ticks(nice_ticks(0.6931471, 0.6931474, 5)))) >= 4
    assert nice_ticks(1, 1, 5, least=1.0) == [1.0, 2.0]
