"""The page of a run, report.html: its curves, held-out figures and sampled answers; it needs no network."""

import html
import json
from collections.abc import Iterable
from pathlib import Path

from twdpo.files import write_atomic
from twdpo.log import (
    best_evaluation,
    describe_best,
    evaluations,
    figure_names,
    format_mean,
    held_out_names,
    read_rows,
    row_of_set,
    shown_evaluations,
)
from twdpo.metrics import meaning
from twdpo.pages.charts import CHART_STYLE, LEAST_FOR_A_LINE, Series, chart_key, explain, render_chart
from twdpo.pages.style import render_document
from twdpo.run_folder import ENVIRONMENT
from twdpo.weights import WEIGHTS, source_needs

# Title, then (what a line is called, its name in a step row). Evaluations are drawn from eval/NAME.
CHARTS = (
    ("Loss", (("", "loss"),)),
    ("Reward accuracy", (("unweighted", "reward_accuracy"), ("weighted", "weighted_reward_accuracy"))),
    ("Reward margin", (("unweighted", "reward_margin"), ("weighted", "weighted_reward_margin"))),
    ("Rewards", (("chosen", "reward_chosen"), ("rejected", "reward_rejected"))),
    ("Weighted rewards", (("chosen", "weighted_reward_chosen"), ("rejected", "weighted_reward_rejected"))),
    ("KL from the reference, nats a token", (("", "kl"),)),
    ("Gradient norm", (("", "grad_norm"),)),
    ("Learning rate", (("", "lr"),)),
    ("Tokens a second", (("", "tokens_per_s"),)),
)
# Logged, and in no chart of their own.
UNDRAWN = {"step", "pairs", "pairs_per_s", "peak_memory_gib", "peak_reserved_gib", "tflops", "mfu", "data_share",
           "forward_share", "backward_share", "optimizer_share"}

FIGURES_STYLE = """
td.run { text-align: left; }
td .what { display: block; min-width: 14em; max-width: 44em; }
@media (max-width: 720px) { .figures td, .figures th { white-space: normal; padding-right: .4rem; font-size: .85rem; }
                            .figures .name { overflow-wrap: anywhere; } td .what { min-width: 7em; } }
"""
RUN_STYLE = FIGURES_STYLE + """
.answers td { white-space: pre-wrap; overflow-wrap: anywhere; text-align: left; vertical-align: top; }
table.wide td { white-space: normal; overflow-wrap: anywhere; text-align: left; vertical-align: top; }
table.wide td:first-child { color: var(--soft); overflow-wrap: normal; }
summary { cursor: pointer; margin: 2rem 0 .6rem; }
"""


def write_curves(run_dir: Path) -> None:
    """Write report.html from what stands in the run's folder."""
    environment = run_dir / ENVIRONMENT
    starts = json.loads(environment.read_text(encoding="utf-8")) if environment.exists() else []
    page = render_run(run_dir.resolve().name, json.loads((run_dir / "config.json").read_text(encoding="utf-8")),
                      read_rows(run_dir / "metrics.jsonl"), read_rows(run_dir / "samples.jsonl"), starts,
                      {name for name in ("best", "pairs.html", "weights/weights.html") if (run_dir / name).exists()})
    write_atomic(run_dir / "report.html", lambda temporary: temporary.write_text(page, encoding="utf-8"))


def render_run(name: str, config: dict[str, object], rows: list[dict], samples: list[dict], starts: Iterable[dict] = (),
               beside: Iterable[str] = ()) -> str:
    """The page of a run, from its settings, the rows of metrics.jsonl and of samples.jsonl, the starts of
    environment.json, and what of best/, pairs.html and weights/weights.html stands beside it."""
    steps, held_out = [row for row in rows if "eval/pairs" not in row], evaluations(rows)
    shown = shown_evaluations(rows)
    best = shown["best"]["step"] if "best" in shown else None
    names = held_out_names(held_out[-1]) if held_out else []
    drawn = "".join(render_chart(title, explain(lines), make_series(lines, steps, held_out, best), best)
                    for title, lines in all_charts(rows, names))
    settings = "".join(f"<tr><td>{html.escape(key)}</td><td>{html.escape(json.dumps(value))}</td></tr>"
                       for key, value in config.items() if value != "")
    return render_document(name, CHART_STYLE + RUN_STYLE, f"""
{introduction(rows, set(beside))}
{about_table(config, max((row["step"] for row in steps), default=0), starts)}
<h2>Curves</h2>
{chart_key(len(held_out), 'ring and dotted line' * (best is not None))}
<div class="charts">{drawn}</div>
{"".join(held_out_section(name, held_out, shown, name == names[0]) for name in names)}
{answers_table(samples)}
<details><summary>Settings</summary><table class="wide">{settings}</table></details>""")


def introduction(rows: list[dict], beside: set[str]) -> str:
    """What the page is of, in sentences; which step is best; what else there is to read."""
    held_out, sentences = evaluations(rows), []
    if held_out:
        names = held_out_names(held_out[-1])
        which = f" of {names[0]}" if names[0] else ""
        sentences.append(f"Held out: {held_out[-1]['eval/pairs']} pairs{which}, which training does not see.")
    if sentence := describe_best(rows):
        sentences.append(f"{sentence[0].upper()}{sentence[1:]}.")
    if "best" in beside and (best := best_evaluation(rows)):
        sentences.append(f"best/ holds the policy of step {best['step']}.")
    if 0 < len(held_out) < LEAST_FOR_A_LINE:
        sentences.append("So few evaluations are no curve: --eval-every N makes one every N steps.")
    if not held_out:
        sentences.append("There was no evaluation: the lines are of training alone.")
    links = [f'<a href="{path}">{text}</a>' for path, text in
             (("pairs.html", "the first pairs, as they are trained"),
              ("weights/weights.html", "the token weights on held-out answers")) if path in beside]
    return (f'<p class="note">{html.escape(" ".join(sentences))}</p>'
            + (f"<p>See {' and '.join(links)}.</p>" if links else ""))


def about_table(config: dict[str, object], num_steps: int, starts: Iterable[dict]) -> str:
    """What was trained on what, how, when and with which versions."""
    def with_options(name: str) -> str:
        options = config.get(f"{name}_options")
        return f"{config.get(name, '')}{f' ({options})' if options else ''}"

    weights = config.get("weights")
    of_judge = weights not in WEIGHTS or "attention" in source_needs(WEIGHTS[weights])
    layer = f", judge's layer {config.get('layer')}" if of_judge else ""
    rows = [("model", config.get("model") or "toy"), ("data", config.get("data")),
            ("held-out data", config.get("eval_data")), ("loss", with_options("loss")),
            ("token weights", with_options("weights") + layer),
            ("training", ", ".join(f"{text} {config[name]}" for text, name in
                                   (("beta", "beta"), ("learning rate", "lr"), ("pairs a step", "batch_size"),
                                    ("seed", "seed")) if name in config) + f", steps {num_steps}")]
    for start in starts:
        what = f"resumed at step {start['step']}" if start["step"] else "started"
        versions = ", ".join(f"{name} {start[name]}" for name in ("python", "torch", "transformers", "triton", "twdpo")
                             if name in start)
        commit = f"; code at commit {start['commit']}" if start.get("commit") else ""
        rows.append((what, f"{start['date']}; {start['processes']} process{'es' * (start['processes'] > 1)} on "
                           f"{start['device']}; "
                           f"{versions}{commit}"))
    return '<table class="wide">' + "".join(f"<tr><td>{key}</td><td>{html.escape(str(value))}</td></tr>"
                                            for key, value in rows if value) + "</table>"


def all_charts(rows: list[dict], sets: list[str]) -> list[tuple[str, tuple[tuple[str, str], ...]]]:
    """CHARTS, and one for each other figure that is logged."""
    drawn = {name for _, lines in CHARTS for _, name in lines} | UNDRAWN
    prefixes = tuple(f"eval/{name}/" for name in sets if name)
    found = dict.fromkeys(name.removeprefix("eval/") for row in rows for name in row
                          if not (name.endswith("_stderr") or name.startswith(prefixes)))
    return [*CHARTS, *((name, (("", name),)) for name in found if name not in drawn)]


def make_series(lines: Iterable[tuple[str, str]], steps: list[dict], held_out: list[dict], best: float | None
                ) -> list[Series]:
    """Of each line of a chart what is logged of it."""
    return [Series.of(name, steps, held_out, label, number, best) for number, (label, name) in enumerate(lines)]


def held_out_section(name: str, held_out: list[dict], shown: dict[str, dict], is_first: bool) -> str:
    """Figures of one held-out set; of all but the first, which is drawn above, its curves too."""
    rows = [row_of_set(row, name) for row in held_out]
    table = figures_table({what: row_of_set(row, name) for what, row in shown.items()})
    if is_first:
        return f"<h2>Held out{f': {html.escape(name)}' if name else ''} ({rows[-1]['eval/pairs']} pairs)</h2>{table}"
    best = shown["best"]["step"] if "best" in shown else None
    charts = "".join(render_chart(title, explain(lines), make_series(lines, [], rows, best), best)
                     for title, lines in all_charts(rows, []))
    return (f"<h2>Held out: {html.escape(name)} ({rows[-1]['eval/pairs']} pairs)</h2>"
            f'<p class="note">The best step is that of the first set.</p>{table}<div class="charts">{charts}</div>')


def figures_table(shown: dict[str, dict]) -> str:
    """Held-out figures of the start, the best and the last evaluation."""
    head = "".join(f"<th>{name} (step&nbsp;{row['step']})</th>" for name, row in shown.items())
    *_, last = shown.values()
    body = "".join(f"<tr>{name_cell(name)}{''.join(mean_cell(row, name) for row in shown.values())}</tr>"
                   for name in figure_names(last))
    return f'<div class="scroll"><table class="figures"><tr><th></th>{head}</tr>{body}</table></div>'


def name_cell(name: str, rows: int = 1) -> str:
    """A figure's name and what it is, beside so many rows."""
    breakable = html.escape(name.removeprefix("eval/")).replace("_", "_<wbr>")
    return (f'<td class="name" rowspan="{rows}">{breakable}'
            f'<span class="what">{html.escape(meaning(name))}</span></td>')


def mean_cell(row: dict[str, float], name: str) -> str:
    """A held-out mean with its standard error."""
    return f"<td>{format_mean(row, name).replace('± ', '±&nbsp;')}</td>"


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
