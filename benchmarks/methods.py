"""Every loss and weight source on the toy, where it is known which words decide: one budget, one table.

    python benchmarks/methods.py                                          all of them: about an hour on two cores
    python benchmarks/methods.py --losses twdpo --sources attention,oracle --pairs 64 --seeds 2
    python benchmarks/methods.py --sources attention_surprise             what is finished is kept under --out

Losses are trained with uniform weights, sources with `twdpo` (mean 1, so that sources differ in where their mass lies
and not in how much it is); give both --losses and --sources and each goes with each. Every arm starts from the toy's
model and takes the same steps on the same pairs, half of them about tone and half about topic. Its beta is the one of
--betas (times the loss's own default, 0.3 where it has none) with the best accuracy on validation pairs, chosen for
each number of pairs on the first seed; a seed draws the training pairs and their order.

Figures, on pairs that no arm trains on, but for the lift:
    accuracy      share of pairs whose chosen answer gains more log-probability than the rejected one
    drift         mean |log pi - log pi_ref| (nats) on filler tokens
    key_margin    by how much the good slot word gains on the bad one (nats), in answers of the planted sentence alone
    planted_lift  the weights' mass on planted tokens over their share of the content tokens, of training answers,
                  before the first token is reset; uniform is 1
    seconds       median time of a step
Two sources here are controls: `oracle` weighs the planted words alone, `shuffled` permutes the judge's attention within
each answer. tis, sepo and cdpo compare the toy's model after a few steps on chosen answers with it after as many on
rejected ones, of other pairs; attention_contrast takes off the attention on the pair without a question. `verbalized`
is left out: the toy can't write scores. --out holds the finished cells, and of the last call methods.json, methods.md
and the plot methods.svg. The last line is JSON.
"""
import argparse
import atexit
import html
import json
import math
import multiprocessing
import shutil
import statistics
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch
from tqdm import tqdm

import methods_lab
from harness import finish, machine
from methods_lab import Lab, arm_config, arm_loss, train_arm
from twdpo import dist
from twdpo.files import hash_json, make_directory, write_atomic, write_json
from twdpo.flags import to_json
from twdpo.losses import LOSSES
from twdpo.models.source import TOY_MODEL, fingerprint_model
from twdpo.objective import made_up_batch
from twdpo.plugins import stated
from twdpo.toy.grammar import all_prompts
from twdpo.weights import WEIGHTS

ROOT = Path(__file__).resolve().parent.parent
VERSION = 1  # raise it when figures change: finished cells of another version are run again
MEASURES = ("accuracy", "drift", "key_margin", "planted_lift", "seconds")
LAB: list[Lab] = []  # of this process


def open_lab(num_pairs: int) -> None:
    """In each process, before its first arm."""
    torch.set_num_threads(1)  # arms run side by side
    LAB.append(Lab(num_pairs))
    atexit.register(close_lab)


def close_lab() -> None:
    """Leave the process group and delete the lab's folder."""
    while LAB:
        shutil.rmtree(LAB.pop().folder, ignore_errors=True)
        dist.stop()


def run_group(loss_name: str, source_name: str, num_pairs: int, seeds: int, factors: list[float], num_drawn: int,
              out: Path) -> list[dict]:
    """Rows of all seeds with the beta that is best for the first; finished cells are read, not run.

    num_drawn: pairs of a seed, of which the first `num_pairs` are taken.
    """
    setting = [VERSION, fingerprint_model(TOY_MODEL), torch.__version__, methods_lab.STEPS, methods_lab.BATCH,
               methods_lab.EVALUATED, methods_lab.NEUTRAL, methods_lab.AUXILIARY, num_drawn]

    def cell(seed: int, factor: float) -> dict:
        key = hash_json([*setting, to_json(arm_config(loss_name, factor))])[:12]
        path = out / f"{loss_name}-{source_name}-{num_pairs}-{seed}-{factor:g}-{key}.json"
        if not path.exists():
            parent = multiprocessing.parent_process()
            if parent and not parent.is_alive():  # killed: its workers would go on for ever
                raise SystemExit(1)
            write_json(path, train_arm(LAB[0], loss_name, source_name, num_pairs, seed, factor))
        return json.loads(path.read_text(encoding="utf-8"))
    factors = factors if reads_beta(loss_name) else [1.0]
    tried = {factor: cell(0, factor) for factor in factors}
    # Of equal accuracies the largest beta, which stays nearest to the reference.
    best = max(factors, key=lambda factor: (tried[factor]["validation_accuracy"], factor))
    rows = []
    for seed in range(seeds):
        figures = cell(seed, best)
        rows.append({"loss": loss_name, "source": source_name, "pairs": num_pairs, "seed": seed,
                     "beta": figures["beta"]} | {name: figures[name] for name in MEASURES})
    return rows


def reads_beta(loss_name: str) -> bool:
    """Whether a loss depends on beta."""
    ratio_S = torch.tensor([-1.0, -3.0, -2.0, -3.0])
    batch = made_up_batch(stated(LOSSES[loss_name], "terms", ()))
    batch.means = dict.fromkeys(("chosen", "rejected"), torch.zeros(()))
    values = [arm_loss(loss_name, config)(ratio_S, ratio_S, batch, config)[0]
              for config in (arm_config(loss_name, factor) for factor in (1.0, 2.0))]
    return not torch.equal(*values)


def choose_arms(losses: str, sources: str) -> list[tuple[str, str]]:
    """(loss, source) of every arm. Raises ValueError for an unknown name."""
    known = [name for name in WEIGHTS if name != "verbalized"]
    chosen = []
    for text, names, what in ((losses, list(LOSSES), "--losses"), (sources, known, "--sources")):
        wanted = [name.strip() for name in text.split(",") if name.strip()]
        if unknown := set(wanted) - set(names):
            raise ValueError(f"{what} has {min(unknown)!r}: choose from {', '.join(names)}")
        chosen.append(list(dict.fromkeys(wanted)))
    if all(chosen):
        return [(loss, source) for loss in chosen[0] for source in chosen[1]]
    if chosen[0]:
        return [(loss, "uniform") for loss in chosen[0]]
    if chosen[1]:
        return [("twdpo", source) for source in chosen[1]]
    return [*(("twdpo", source) for source in known), *((loss, "uniform") for loss in LOSSES if loss != "twdpo")]


def summarize(rows: list[dict]) -> list[dict]:
    """Mean and standard deviation over seeds of each (loss, source, pairs), in the order of the rows."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["loss"], row["source"], row["pairs"]), []).append(row)
    return [{"loss": loss, "source": source, "pairs": pairs, "beta": group[0]["beta"]}
            | {name: statistics.fmean(row[name] for row in group) for name in MEASURES}
            | {f"{name}_sd": statistics.stdev([row[name] for row in group]) if len(group) > 1 else 0.0
               for name in MEASURES}
            for (loss, source, pairs), group in groups.items()]


def format_table(rows: list[dict]) -> str:
    """One line an arm and number of pairs; mean and spread (standard deviation over seeds)."""
    lines = [f"{'loss':13} {'weights':19} {'pairs':>5} {'beta':>6} {'accuracy':>13} {'drift':>13} {'key margin':>13} "
             f"{'lift':>6} {'s a step':>8}"]
    for row in sorted(summarize(rows), key=lambda row: row["pairs"]):  # stable
        cells = [f"{row[name]:.3f} ±{row[name + '_sd']:.3f}" for name in ("accuracy", "drift", "key_margin")]
        lines.append(f"{row['loss']:13} {row['source']:19} {row['pairs']:5} {row['beta']:6.3g} "
                     + " ".join(f"{cell:>13}" for cell in cells)
                     + f" {row['planted_lift']:6.2f} {row['seconds']:8.3f}")
    return "\n".join(lines)


def markdown_table(rows: list[dict]) -> str:
    """One line an arm: the lift, then accuracy, drift and key margin by number of pairs, mean ± standard deviation."""
    summary = summarize(rows)
    sizes = sorted({row["pairs"] for row in summary})
    shown = (("accuracy", "accuracy"), ("drift", "drift"), ("key margin", "key_margin"))
    heads = [f"{title}, {size:,} pairs" if size == sizes[0] else f"{size:,}" for title, _ in shown for size in sizes]
    lines = ["| loss | weights | lift | " + " | ".join(heads) + " |", "|---" * (3 + len(heads)) + "|"]
    for loss, source in dict.fromkeys((row["loss"], row["source"]) for row in summary):
        arm = {row["pairs"]: row for row in summary if (row["loss"], row["source"]) == (loss, source)}
        cells = [f"{arm[size][name]:.3f} ± {arm[size][name + '_sd']:.3f}" for _, name in shown for size in sizes]
        lift = statistics.fmean(row["planted_lift"] for row in arm.values())
        lines.append(f"| `{loss}` | `{source}` | {lift:.1f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw_plot(rows: list[dict]) -> str:
    """SVG: accuracy against drift, a panel a number of pairs; sources by name, other losses as grey dots."""
    width, height, left, bottom, top, names = 560, 400, 52, 44, 34, 150
    summary = summarize(rows)
    sizes = sorted({row["pairs"] for row in summary})
    low_y = min(row["accuracy"] for row in summary) - 0.02
    high_x = max(row["drift"] for row in summary) * 1.08
    parts = []
    for panel, size in enumerate(sizes):
        def x_of(drift: float, panel=panel) -> float:
            return panel * width + left + (drift / high_x) ** 0.5 * (width - left - names)

        def y_of(accuracy: float) -> float:
            return height - bottom - (accuracy - low_y) / (1.005 - low_y) * (height - bottom - top)
        parts.append(f'<text x="{panel * width + left}" y="20" class="title">{size:,} pairs, accuracy</text>')
        for tick in [number / 20 for number in range(21) if low_y <= number / 20]:
            parts.append(f'<line x1="{panel * width + left}" x2="{(panel + 1) * width - names}" y1="{y_of(tick):.1f}" '
                         f'y2="{y_of(tick):.1f}" class="grid"/><text x="{panel * width + left - 6}" '
                         f'y="{y_of(tick) + 4:.1f}" text-anchor="end">{tick:.2f}</text>')
        for tick in (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2, 4):
            if tick <= high_x:
                parts.append(f'<text x="{x_of(tick):.1f}" y="{height - bottom + 18}" text-anchor="middle">{tick:g}'
                             "</text>")
        parts.append(f'<text x="{panel * width + (left + width - names) / 2}" y="{height - 6}" text-anchor="middle">'
                     "drift on filler (nats a token)</text>")
        label_y, label_x = float(top), (panel + 1) * width - names + 12
        for row in sorted((row for row in summary if row["pairs"] == size), key=lambda row: -row["accuracy"]):
            is_source = row["loss"] == "twdpo"
            kind = ("control" if row["source"] in ("uniform", "oracle", "shuffled") else "source") if is_source \
                else "loss"
            x, y = x_of(row["drift"]), y_of(row["accuracy"])
            name = row["source"] if is_source else f"{row['loss']}, {row['source']}"
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{4.5 if is_source else 3}" class="{kind}"><title>'
                         f"{html.escape(name)}: accuracy {row['accuracy']:.3f} ± {row['accuracy_sd']:.3f}, drift "
                         f"{row['drift']:.3f} ± {row['drift_sd']:.3f}</title></circle>")
            if is_source:  # names stand in a column, each with a line to its dot
                label_y = max(label_y + 14, y)
                parts.append(f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{label_x - 3}" y2="{label_y - 4:.1f}" '
                             f'class="{kind}"/><text x="{label_x}" y="{label_y:.1f}" class="{kind}">'
                             f"{html.escape(name)}</text>")
    style = ("text{font:12px system-ui,sans-serif;fill:#55534e}.title{font-size:14px;fill:#1b1b1f}.grid{stroke:#e3e1da}"
             "circle.source{fill:#c54a14}text.source{fill:#c54a14}circle.control{fill:#1f5fa8}text.control{fill:#1f5fa8}"
             "circle.loss{fill:#b4b2ab}line.source{stroke:#c54a14;opacity:.35}line.control{stroke:#1f5fa8;opacity:.35}")
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width * len(sizes)} {height}" role="img" '
            f'aria-label="accuracy against drift"><style>{style}</style><rect width="100%" height="100%" '
            f'fill="#fdfdfb"/>{"".join(parts)}</svg>\n')


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--losses", default="", help="names in LOSSES, separated by commas; empty: see above")
    parser.add_argument("--sources", default="", help="names in WEIGHTS, or oracle, shuffled; empty: see above")
    parser.add_argument("--pairs", default="64,256,1024", help="numbers of training pairs (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="how many (default: %(default)s)")
    parser.add_argument("--betas", default="0.3,1,3", help="factors of the loss's beta to try (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="processes of one thread each (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/methods",
                        help="folder of the finished cells, the table and the plot (default: runs/methods)")
    flags = parser.parse_args(argv)
    try:
        sizes = sorted({int(text) for text in flags.pairs.split(",")})
        factors = sorted({float(text) for text in flags.betas.split(",")})
        arms = choose_arms(flags.losses, flags.sources)
        if min(sizes) < 1 or not all(0 < factor < math.inf for factor in factors) or flags.seeds < 1 or flags.jobs < 1:
            raise ValueError("--pairs, --betas, --seeds and --jobs must be positive, and finite")
        limit = len(all_prompts()) - methods_lab.num_held_out()
        if max(sizes) > limit:
            raise ValueError(f"--pairs {max(sizes)}: the grammar has {limit} prompts for training pairs")
        cells = make_directory(flags.out / "cells", "--out")
    except ValueError as error:
        parser.error(str(error))
    # The largest sets first, so that no long group starts last.
    groups = [(loss, source, size) for size in reversed(sizes) for loss, source in arms]
    rows: dict[tuple, list[dict]] = {}
    context = multiprocessing.get_context("spawn")
    # Always drawn for as many, so that a cell does not depend on what else was asked for.
    num_pairs = max(methods_lab.DRAWN, *sizes)
    bar = tqdm(total=len(groups), desc="methods", unit="arm", mininterval=5)
    if flags.jobs == 1:
        open_lab(num_pairs)
        try:
            for group in groups:
                rows[group] = run_group(*group, flags.seeds, factors, num_pairs, cells)
                bar.update()
        finally:
            close_lab()
    else:
        with ProcessPoolExecutor(min(flags.jobs, len(groups)), context, open_lab, (num_pairs,)) as pool:
            rest = flags.seeds, factors, num_pairs, cells
            futures = {pool.submit(run_group, *group, *rest): group for group in groups}
            for future in as_completed(futures):
                rows[futures[future]] = future.result()
                bar.update()
    bar.close()
    ordered = [row for size in sizes for loss, source in arms for row in rows[loss, source, size]]
    print(format_table(ordered))
    for name, text in (("methods.md", markdown_table(ordered) + "\n"), ("methods.svg", draw_plot(ordered))):
        write_atomic(flags.out / name, lambda temporary, text=text: temporary.write_text(text, "utf-8"))
    report = {"machine": machine(torch.device("cpu")), "steps": methods_lab.STEPS,
              "batch_size": methods_lab.BATCH, "lr": methods_lab.LR, "rows": ordered}
    finish(flags.out / "methods.json", report)


if __name__ == "__main__":
    main()
