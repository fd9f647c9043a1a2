"""The page of several runs, their curves over each other.

    python -m twdpo.pages.compare RUN RUN ... [--out FILE.html]
"""

import argparse
import dataclasses
import html
import json
import math
from dataclasses import dataclass
from pathlib import Path

from twdpo.config import TrainConfig
from twdpo.files import write_atomic
from twdpo.flags import GROUPS, InputError, key_name
from twdpo.log import (
    best_evaluation,
    describe_best,
    evaluations,
    figure_names,
    held_out_names,
    read_rows,
    row_of_set,
    shown_evaluations,
)
from twdpo.pages.charts import CHART_STYLE, LIGHT, Series, chart_key, draw_sample, explain, render_chart
from twdpo.pages.run import FIGURES_STYLE, all_charts, mean_cell, name_cell
from twdpo.pages.style import render_document
from twdpo.run_folder import ENVIRONMENT

MOST_NAMED = 3  # settings in a run's name
SETTINGS = {key_name(field): field.metadata for field in dataclasses.fields(TrainConfig)}
OBJECTIVE = {"loss", "loss_options", "weights", "weights_options", "beta", "length_normalize"}  # what a loss is of
JUDGED = {"layer", "sink_k", "sink_k_min", "unseen", "renormalize", "multiplier", "align", "sink_on",
          *(name for name in SETTINGS if name.startswith("judge_"))}  # and, where weights are not uniform


@dataclass(frozen=True)
class ComparedRun:
    """What a run's folder holds of it."""

    folder: str  # as it was given
    letter: str
    config: dict[str, object]
    rows: list[dict[str, float]]
    held_out: dict[str, str]  # fingerprint of the pairs of each held-out set; empty where that is not known

    @property
    def number(self) -> int:
        return ord(self.letter) - ord("A")


def main(argv: list[str] | None = None) -> None:
    """Run with a command line (default: sys.argv). Raises SystemExit on a user's error."""
    parser = argparse.ArgumentParser(prog="python -m twdpo.pages.compare", allow_abbrev=False,
                                     description="Several runs on one page: curves, settings, held-out figures.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder that train.py wrote")
    parser.add_argument("--out", default="compare.html", metavar="FILE.html", help="the page [compare.html]")
    flags = parser.parse_args(argv)
    try:
        runs, out = read_runs(flags.runs), Path(flags.out)
        if out.is_dir():
            raise InputError(f"--out {out}: a folder stands there; name a file")
        page = render_comparison(runs)
        write_atomic(out, lambda temporary: temporary.write_text(page, encoding="utf-8"))
    except (InputError, OSError) as error:
        parser.exit(2, f"compare: error: {error}\n")
    print(f"{out}: {len(runs)} runs")


def read_runs(folders: list[str]) -> list[ComparedRun]:
    """Raises InputError for what is no run, is damaged or twice there, and for one run or too many."""
    if len(folders) < 2:
        raise InputError(f"{folders[0]} alone can't be compared: name two runs or more (a run's own page is its "
                         "report.html)")
    if len(folders) > len(LIGHT):
        raise InputError(f"{len(folders)} runs: at most {len(LIGHT)} can be told apart on a page")
    places = [Path(folder).resolve() for folder in folders]
    if twice := next((folder for folder, place in zip(folders, places) if places.count(place) > 1), ""):
        raise InputError(f"{twice} is named twice")
    return [read_run(folder, chr(ord("A") + number)) for number, folder in enumerate(folders)]


def read_run(folder: str, letter: str) -> ComparedRun:
    """Raises InputError when the folder holds no run, none that has begun, or a damaged one."""
    path = Path(folder)
    if not (path / "config.json").is_file():
        raise InputError(f"{folder} is no run: there is no config.json in it")
    config, starts = read_json(path / "config.json", dict), read_json(path / ENVIRONMENT, list)
    rows = read_rows(path / "metrics.jsonl")
    if not rows:
        raise InputError(f"{folder} has no metrics yet: its metrics.jsonl holds no row")
    for step, name, value in ((row["step"], *item) for row in rows for item in row.items()):
        if type(value) not in (int, float) or not math.isfinite(value):
            raise InputError(f"{path / 'metrics.jsonl'}: {name} of step {step!r} is {value!r:.40}, no number")
    held_out = starts[-1].get("held_out", {}) if starts and isinstance(starts[-1], dict) else {}
    return ComparedRun(folder, letter, config, rows, held_out)


def read_json(path: Path, kind: type) -> dict | list:
    """A file of a run; an empty value where it is not there. Raises InputError."""
    if not path.exists():
        return kind()
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error})") from error
    if not isinstance(value, kind):
        raise InputError(f"{path} holds a {type(value).__name__}, not a {kind.__name__}")
    return value


def changed_keys(runs: list[ComparedRun]) -> list[str]:
    """Settings that are not the same in all runs, but for those of hardware and output, and the run's own name."""
    free = {name for name, metadata in SETTINGS.items() if metadata.get("free")} | {"run_id"}
    keys = dict.fromkeys(key for run in runs for key in run.config if key not in free)
    return [key for key in keys if len({json.dumps(run.config.get(key)) for run in runs}) > 1]


def show(value: object) -> str:
    """A setting as text."""
    return "-" if value in ("", None) else str(value)


def name_of(run: ComparedRun, keys: list[str]) -> str:
    """A run by what differs in its settings, the objective's first, and its folder. What a run settles by itself
    follows from them."""
    groups = ["objective", "steps", *GROUPS]
    asked = sorted((key for key in keys if "settled" not in SETTINGS.get(key, {})),
                   key=lambda key: groups.index(SETTINGS.get(key, {}).get("group", groups[-1])))
    parts = [f"{key} {show(run.config.get(key))}" for key in asked[:MOST_NAMED]]
    return ", ".join(parts + ["..."] * (len(asked) > MOST_NAMED)) + " " * bool(asked) + f"({run.folder})"


def render_comparison(runs: list[ComparedRun]) -> str:
    """The page."""
    keys = changed_keys(runs)
    items = "".join(f"<li>{draw_sample(run.number)} <b>{run.letter}</b> "
                    + html.escape("; ".join(filter(None, [name_of(run, keys), describe_best(run.rows)]))) + "</li>"
                    for run in runs)
    remarks = "".join(f'<p class="note">{html.escape(text)}</p>' for text in list_remarks(runs, keys))
    names = list(dict.fromkeys(name for run in runs for row in evaluations(run.rows)[-1:] for name in
                               held_out_names(row)))
    others = "".join(f"<h2>{html.escape(title_of(name))}</h2>{charts_of(runs, name, False)}" for name in names[1:])
    num_evaluations = max(len(evaluations(run.rows)) for run in runs)
    return render_document(f"{len(runs)} runs", CHART_STYLE + FIGURES_STYLE, f"""
<ul class="key runs">{items}</ul>
{remarks}
<h2>Curves{f': {html.escape(names[0])}' if names and names[0] else ''}</h2>
{chart_key(num_evaluations, "ring" if any(best_evaluation(run.rows) for run in runs) else "")}
{charts_of(runs, names[0] if names else "", True)}
{others}
{settings_table(runs, keys)}
{"".join(figures_table(runs, name) for name in names)}""")


def list_remarks(runs: list[ComparedRun], keys: list[str]) -> list[str]:
    """What keeps runs from being compared."""
    remarks = []
    silent = [run.letter for run in runs if not evaluations(run.rows)]
    if silent:
        remarks.append(f"No evaluation: {', '.join(silent)}. Only training is drawn there.")
    groups: list[list[ComparedRun]] = []
    for run in (run for run in runs if evaluations(run.rows)):
        group = next((group for group in groups if not any(differ_in_pairs(run, other) for other in group)), None)
        groups.append([run]) if group is None else group.append(run)
    if len(groups) > 1:
        remarks.append("The held-out pairs differ, so these figures are not of the same pairs: "
                       + "; ".join(", ".join(run.letter for run in group) for group in groups) + ".")
    told = OBJECTIVE | (set() if all(run.config.get("weights") == "uniform" for run in runs) else JUDGED)
    if objective := [key for key in keys if key in told]:
        differ = "differs" if len(objective) == 1 else "differ"
        remarks.append(f"loss is what each run optimises, and {', '.join(objective)} {differ}: one run's loss is not "
                       "to be set against another's. The unweighted reward_accuracy can be.")
    return remarks


def differ_in_pairs(first: ComparedRun, second: ComparedRun) -> bool:
    """Whether two runs are known to have held out other pairs: by fingerprints, or by the sets' names and sizes where a
    run has none."""
    if first.held_out and second.held_out:
        return first.held_out != second.held_out
    counts = [{name: row_of_set(last, name)["eval/pairs"] for name in held_out_names(last)}
              for last in (evaluations(run.rows)[-1] for run in (first, second))]
    return counts[0] != counts[1]


def title_of(name: str) -> str:
    """Of what is shown of a held-out set."""
    return f"Held out: {name}" if name else "Held out"


def charts_of(runs: list[ComparedRun], name: str, is_first: bool) -> str:
    """A chart of each figure, all runs in it; training lines beside the first held-out set."""
    rows = {run.letter: [row_of_set(row, name) for row in evaluations(run.rows) if name in held_out_names(row)]
            for run in runs}
    steps = {run.letter: [row for row in run.rows if "eval/pairs" not in row] if is_first else [] for run in runs}
    every = [row for each in (*rows.values(), *steps.values()) for row in each]
    charts = []
    for title, lines in all_charts(every, []):
        for label, figure in lines:
            drawn = []
            for run in runs:
                best = shown_evaluations(run.rows).get("best", {}).get("step")
                drawn.append(Series.of(figure, steps[run.letter], rows[run.letter], "", run.number, best, run.letter))
            charts.append(render_chart(f"{title}, {label}" if label else title, explain([(label, figure)]), drawn))
    return f'<div class="charts">{"".join(charts)}</div>'


def settings_table(runs: list[ComparedRun], keys: list[str]) -> str:
    """What differs in the settings, and how far the runs have come."""
    cells = {key: [show(run.config.get(key)) for run in runs] for key in keys}
    cells["steps done"] = [str(run.rows[-1]["step"]) for run in runs]
    head = "".join(f"<th>{run.letter}</th>" for run in runs)
    body = "".join(f"<tr><td>{html.escape(key)}</td>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>"
                   for key, row in cells.items())
    return (f'<h2>Settings that differ</h2><p class="note">Those of hardware and output are left out.</p>'
            f'<div class="scroll"><table><tr><th></th>{head}</tr>{body}</table></div>')


def figures_table(runs: list[ComparedRun], name: str) -> str:
    """Held-out figures of a set, the runs under each other: at the start, at the best step, at the last one."""
    shown = {run.letter: {what: row_of_set(row, name) for what, row in shown_evaluations(run.rows).items()}
             for run in runs if any(name in held_out_names(row) for row in evaluations(run.rows)[-1:])}
    columns = [what for what in ("start", "best", "last") if any(what in rows for rows in shown.values())]
    figures = dict.fromkeys(each for rows in shown.values() for row in rows.values() for each in figure_names(row))
    lines = []
    for figure in ("step", *figures):
        for place, (letter, rows) in enumerate(shown.items()):
            what = name_cell(figure, len(shown)) if place == 0 else ""
            cells = [f"<td>{rows.get(column, {}).get('step', '-')}</td>" if figure == "step" else
                     mean_cell(rows.get(column, {}), figure) for column in columns]
            lines.append(f'<tr>{what}<td class="run">{letter}</td>{"".join(cells)}</tr>')
    head = "".join(f"<th>{column}</th>" for column in columns)
    return (f"<h2>{html.escape(title_of(name))}</h2>"
            '<p class="note">&#177; is one standard error over the held-out pairs. A run of another seed may differ by '
            f'more.</p><div class="scroll"><table class="figures"><tr><th></th><th>run</th>{head}</tr>{"".join(lines)}'
            "</table></div>")


if __name__ == "__main__":
    main()
