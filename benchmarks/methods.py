"""Every loss and weight source on the toy, where it is known which words decide.

    python benchmarks/methods.py                         the headline: half an hour on two cores
    python benchmarks/methods.py --parts all             and the control, judges, sources and losses (by their cells'
                                                         cost four hours: not run as a whole yet)
    python benchmarks/methods.py --parts sources --sources decay,tis --seeds 3

Parts, each compared with `twdpo` on uniform weights, the same pairs and the same order, seed by seed:
    headline   confounded filler: of a training pair's filler sentences nine in ten go with its preference, which they
               have nothing to do with. Tested on pairs where they say nothing (neutral) and where they go against it as
               often (reversed). Sources: the judge's attention, that times surprise, and two controls: `oracle` weighs
               the planted words alone, `shuffled` permutes the attention within each answer
    control    the same on the plain toy, whose filler says nothing from the start
    judges     attention of other judges, with the sink fix and without: two more seeds of the toy's training, early
               steps of it, and one made without the probe; trained first, under --out/judges
    sources    the other weight sources, with `twdpo`, confounded
    losses     the other losses, with uniform weights, confounded

Every arm starts from the toy's model and trains on 256 pairs in batches of 16 at a constant rate; it is measured after
4, 8, 16, 32 and 64 steps, and its figures are those of the best step on 256 neutral validation pairs: the one with the
lowest loss (DPO's, unweighted, with the beta that suits the margins best) of those with a mean margin of two nats.
Beta and the learning rate of an arm are searched for on validation pairs of a seed of their own: 16 tries, the same for
all, each the untried setting that is nearest to the best so far (steps of a factor 3 and 2), so that the best has its
neighbours tried. A seed draws the pairs of training, of validation (prompts known to the toy's model) and of test
(1,024 pairs with questions that it never saw), and the order. Differences to uniform weights are paired by seed, with
95 % intervals.

Figures, on test pairs but for lift: accuracy, by the margin of all tokens; planted, by that of planted words alone;
signal, mean margin of planted words over the standard deviation of the margin of all else; drift of filler, mean
|log pi - log pi_ref|, nats a token; what 128 sampled answers hold: good slot words, sentences of the grammar, tokens,
answers that end; lift, the weights' mass on planted words over their share of the tokens of training answers.

tis, sepo and cdpo compare the toy's model after a few steps on chosen answers with it after as many on rejected ones,
of other pairs; attention_contrast takes off the attention on the pair without a question. `verbalized` is left out: the
toy can't write scores. Finished cells are kept and not run again, whatever machine they come from: those under
benchmarks/results/cpu/methods/, which --record adds to, and those of --out. The last line is JSON.
"""
import argparse
import atexit
import dataclasses
import functools
import json
import multiprocessing
import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

import methods_lab
from harness import ROOT, machine, whole_number
from methods_lab import Arm, Lab, arm_config, arm_loss, train_arm
from methods_pages import write_pages
from methods_report import NAMES, best_tried, describe
from twdpo import dist
from twdpo.files import hash_json, make_directory, write_atomic, write_json
from twdpo.losses import LOSSES
from twdpo.models.source import TOY_MODEL, fingerprint_model
from twdpo.objective import made_up_batch
from twdpo.plugins import stated
from twdpo.toy import train as toy_train
from twdpo.weights import WEIGHTS

VERSION = 4  # raise it when figures change: finished cells of another version are run again
RECORDED = ROOT / "benchmarks/results/cpu/methods"
SEARCH_SEED, TRIES = 1000, 16
BETA_STEP, LR_STEP, LR_START = 3.0, 2.0, 1.25e-4
HEADLINE = ("uniform", "attention", "attention_surprise", "oracle", "shuffled")
# Of the toy's training: a name, what it is trained with, the steps after which it is kept. Seed 1's lift rises from 1.5
# at step 75 to 9 at 200 and 18 at 700, its share of right verdicts from half to all.
JUDGES = {"seed-1": (("--seed", "1"), (75, 100, 150, 200, 700)), "seed-2": (("--seed", "2"), (75, 100, 700)),
          "no-probe": (("--seed", "0", "--no-probe"), (700,))}
LAB: list[Lab] = []  # of this process


def open_lab(judges: Path) -> None:
    """In each process, before its first arm."""
    torch.set_num_threads(1)  # arms run side by side
    LAB.append(Lab(judges))
    atexit.register(close_lab)


def close_lab() -> None:
    """Leave the process group and delete the lab's folder."""
    while LAB:
        shutil.rmtree(LAB.pop().folder, ignore_errors=True)
        dist.stop()


# ----------------------------------------------------------------------------------------------------------------------
# Cells: one training run each, in a file of its own until they are recorded

def cell_key(arm: Arm) -> str:
    """What a cell's figures depend on, but for rounding."""
    sizes = [getattr(methods_lab, name) for name in (
        "NUM_PAIRS", "BATCH", "STEPS", "VALIDATION", "TEST", "WRITTEN", "MOST_TOKENS", "AUXILIARY", "AUXILIARY_STEPS",
        "AUXILIARY_LR", "WORLDS", "LEARNED")]
    return hash_json([VERSION, toy_fingerprint(), sizes, dataclasses.asdict(arm), arm_config(arm).beta])[:16]


@functools.cache
def toy_fingerprint() -> str:
    return fingerprint_model(TOY_MODEL)


def read_cells(folder: Path) -> dict[str, dict]:
    """Finished cells by their keys, but for those of other versions: of cells.jsonl, and of the files in cells/."""
    path = folder / "cells.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    lines += [each.read_text(encoding="utf-8") for each in sorted((folder / "cells").glob("*.json"))]
    return {cell["key"]: cell for cell in map(json.loads, lines)
            if cell["arm"]["loss"] in LOSSES and cell["key"] == cell_key(Arm(**cell["arm"]))}


def record(cells: list[dict], folder: Path) -> None:
    """Write cells.jsonl with these cells beside those that it has."""
    kept = read_cells(folder) | {cell["key"]: cell for cell in cells}
    lines = sorted(json.dumps(cell, separators=(",", ":")) for cell in kept.values())
    write_atomic(make_directory(folder, "--record") / "cells.jsonl",
                 lambda temporary: temporary.write_text("".join(line + "\n" for line in lines), "utf-8"))


def run_cell(arm: Arm, done: dict[str, dict], out: Path) -> dict:
    """A cell as it was finished, or run now."""
    key = cell_key(arm)
    if key not in done:
        parent = multiprocessing.parent_process()
        if parent and not parent.is_alive():  # killed: its workers would go on for ever
            raise SystemExit(1)
        cell = {"arm": dataclasses.asdict(arm), "key": key} | rounded(train_arm(LAB[0], arm))
        done[key] = cell | {"machine": machine(torch.device("cpu"))}
        write_json(out / "cells" / f"{key}.json", done[key])
    return done[key]


def rounded(value):
    """Figures with five digits: what is kept of them in files that are committed."""
    if isinstance(value, dict):
        return {name: rounded(each) for name, each in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


# ----------------------------------------------------------------------------------------------------------------------
# An arm's setting

def search(arm: Arm, tries: int, done: dict[str, dict], out: Path) -> list[dict]:
    """Cells of all settings that were tried for an arm: after the first always the untried one nearest to the best."""
    arm, cells, tried = replace(arm, seed=SEARCH_SEED, tests="none"), [], set()
    betas = 1 if reads_beta(arm.loss) else 0
    while len(tried) < tries:
        best = best_tried(cells)["arm"] if cells else {"factor": 1.0, "lr": LR_START}
        place = next(place for place in ring(best, betas) if place not in tried)
        tried.add(place)
        cells.append(run_cell(replace(arm, factor=place[0], lr=place[1]), done, out))
    return cells


def ring(best: dict, betas: int):
    """(factor, lr) around the best, the nearest first. betas: 0 for a loss that does not read beta."""
    reach = range(-TRIES, TRIES + 1)
    around = [(i, j) for i in (reach if betas else (0,)) for j in reach]
    for i, j in sorted(around, key=lambda move: (move[0] ** 2 + move[1] ** 2, move)):
        yield float(f"{best['factor'] * BETA_STEP ** i:.4g}"), float(f"{best['lr'] * LR_STEP ** j:.4g}")


def reads_beta(loss_name: str) -> bool:
    """Whether a loss depends on beta."""
    ratio_S = torch.tensor([-1.0, -3.0, -2.0, -3.0])
    batch = made_up_batch(stated(LOSSES[loss_name], "terms", ()))
    batch.means = dict.fromkeys(("chosen", "rejected"), torch.zeros(()))
    values = [arm_loss(loss_name, config)(ratio_S, ratio_S, batch, config)[0]
              for config in (arm_config(Arm(loss=loss_name, factor=factor)) for factor in (1.0, 2.0))]
    return not torch.equal(*values)


# ----------------------------------------------------------------------------------------------------------------------
# Parts

def arms_of(part: str, losses: list[str], sources: list[str]) -> list[Arm]:
    """The arms of a part, uniform weights first. losses, sources: those that are wanted; empty: all."""
    if part in ("headline", "control"):
        world = "confounded" if part == "headline" else "plain"
        return [Arm(world=world, source=name, tests="all") for name in HEADLINE]
    arms = [Arm(tests="all")]
    if part == "judges":
        judges = ["", *(f"{name}/step-{step}" for name, (_, steps) in JUDGES.items() for step in steps)]
        arms += [Arm(source="attention", judge=judge, sink_k=sink_k, tests="chosen")
                 for judge in judges for sink_k in (1, 0)]
    if part == "sources":
        names = [name for name in WEIGHTS if name not in (*HEADLINE, "verbalized")]
        arms += [Arm(source=name, tests="chosen") for name in sources or names]
    if part == "losses":
        arms += [Arm(loss=name, tests="chosen") for name in losses or LOSSES if name != "twdpo"]
    return [replace(arm, tests="all") if arm.source in HEADLINE and not arm.judge and arm.sink_k and arm.loss == "twdpo"
            else arm for arm in arms]


def chosen_names(text: str, known: list[str], what: str) -> list[str]:
    """Names separated by commas. Raises ValueError for an unknown one."""
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if unknown := set(names) - set(known):
        raise ValueError(f"{what} has {min(unknown)!r}: choose from {', '.join(known)}")
    return names


def make_judges(folder: Path) -> None:
    """Train the judges that are not there yet, one after the other."""
    for name, (flags, steps) in JUDGES.items():
        if not all((folder / name / f"step-{step}" / "model.safetensors").exists() for step in steps):
            toy_train.main(["--out", str(folder / name), *flags, "--keep", ",".join(map(str, steps))])


class Workers:
    """Functions called in several processes with a lab each, or in this one."""

    def __init__(self, jobs: int, judges: Path):
        self.pool = None
        if jobs == 1:
            open_lab(judges)
        else:
            self.pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), open_lab, (judges,))

    def run(self, function: Callable, calls: list[tuple], what: str) -> list:
        """What each call returns, in their order; with a bar."""
        results: dict[int, object] = {}
        with tqdm(total=len(calls), desc=what, unit="task", mininterval=5) as bar:
            if self.pool is None:
                for place, call in enumerate(calls):
                    results[place] = function(*call)
                    bar.update()
            else:
                futures = {self.pool.submit(function, *call): place for place, call in enumerate(calls)}
                for future in as_completed(futures):
                    results[futures[future]] = future.result()
                    bar.update()
        return [results[place] for place in range(len(calls))]

    def close(self) -> None:
        close_lab()
        if self.pool:
            self.pool.shutdown(cancel_futures=True)


def run_seed(seed: int, arms: list[Arm], done: dict[str, dict], out: Path) -> list[dict]:
    """All arms on one seed, whose pairs are made once."""
    return [run_cell(replace(arm, seed=seed), done, out) for arm in arms]


def run_part(part: str, arms: list[Arm], seeds: int, tries: int, workers: Workers, done: dict[str, dict], out: Path
             ) -> list[dict]:
    """All cells of a part: first the search of every arm, then every seed."""
    searches = workers.run(search, [(arm, tries, done, out) for arm in arms], f"{part}: settings")
    done.update((cell["key"], cell) for cells in searches for cell in cells)
    settled = []
    for arm, cells in zip(arms, searches):
        best = best_tried(cells)["arm"]
        settled.append(replace(arm, factor=best["factor"], lr=best["lr"]))
    finals = workers.run(run_seed, [(seed, settled, done, out) for seed in range(seeds)], f"{part}: seeds")
    done.update((cell["key"], cell) for cells in finals for cell in cells)
    return [cell for cells in (*searches, *finals) for cell in cells]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--parts", default="headline",
                        help=f"of {', '.join(NAMES)}, separated by commas; or all (default: %(default)s)")
    parser.add_argument("--losses", default="", help="of the part losses, names in LOSSES, by commas; empty: all")
    parser.add_argument("--sources", default="", help="of the part sources, names in WEIGHTS, by commas; empty: all")
    parser.add_argument("--seeds", type=whole_number(1), default=10, help="how many (default: %(default)s)")
    parser.add_argument("--tries", type=whole_number(1), default=TRIES,
                        help="settings tried for an arm (default: %(default)s)")
    parser.add_argument("--jobs", type=whole_number(1), default=2,
                        help="processes of one thread each (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/methods",
                        help="folder of the finished cells, the tables and the plot (default: runs/methods)")
    parser.add_argument("--record", action="store_true", help="add the cells to benchmarks/results/cpu/methods too")
    flags = parser.parse_args(argv)
    try:
        parts = chosen_names(flags.parts, [*NAMES, "all"], "--parts")
        parts = [part for part in NAMES if part in parts or "all" in parts]
        losses = chosen_names(flags.losses, list(LOSSES), "--losses")
        sources = chosen_names(flags.sources, [name for name in WEIGHTS if name != "verbalized"], "--sources")
        make_directory(flags.out / "cells", "--out")
    except ValueError as error:
        parser.error(str(error))
    if "judges" in parts:
        make_judges(flags.out / "judges")
    done, cells = read_cells(RECORDED) | read_cells(flags.out), []
    workers = Workers(flags.jobs, flags.out / "judges")
    try:
        for part in parts:
            found = run_part(part, arms_of(part, losses, sources), flags.seeds, flags.tries, workers, done, flags.out)
            cells += found
            print(describe(part, found), flush=True)
    finally:
        workers.close()
    cells = list({cell["key"]: cell for cell in cells}.values())
    for folder in [flags.out] + [RECORDED] * flags.record:
        if folder == RECORDED:
            record(cells, folder)
            cells = list(read_cells(folder).values())
        write_pages(cells, folder)
        print(f"written to {folder}")
    print(json.dumps({"cells": len(cells), "parts": parts}))


if __name__ == "__main__":
    main()
