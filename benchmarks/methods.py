"""Every loss and weight source on the toy, where it is known which words decide: one budget, one table.

    python benchmarks/methods.py                                          all of them: about 45 minutes on two cores
    python benchmarks/methods.py --losses twdpo --sources attention,oracle --pairs 64 --seeds 2
    python benchmarks/methods.py --sources attention_surprise             what is finished is kept under --out

Losses are trained with uniform weights, sources with `twdpo` (mean 1, so that sources differ in where their mass lies
and not in how much it is); give both --losses and --sources and each goes with each. Every arm starts from the toy's
model and takes the same steps on the same pairs, half of them about tone and half about topic. Its beta is the one of
--betas (times the loss's own default, 0.3 where it has none) with the best accuracy on validation pairs, chosen for
each number of pairs on the first seed; a seed draws the training pairs and their order.

Figures, on held-out pairs but for the lift:
    accuracy      share of pairs whose chosen answer gains more log-probability than the rejected one
    drift         mean |log pi - log pi_ref| (nats) on filler tokens
    key_margin    by how much the good slot word gains on the bad one (nats), in answers of the planted sentence alone
    planted_lift  the weights' mass on planted tokens over their share of the content tokens, of training answers,
                  before the first token is reset; uniform is 1
    seconds       median time of a step
Two sources here are controls: `oracle` weighs the planted words alone, `shuffled` permutes the judge's attention within
each answer. tis, sepo and cdpo compare the toy's model after a few steps on chosen answers with it after as many on
rejected ones, of other pairs. `verbalized` is left out: the toy can't write scores. The last line is JSON.
"""
# ruff: noqa: E402 - train.py is no part of the installed package: its folder must be known first

import argparse
import atexit
import functools
import html
import json
import multiprocessing
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # train.py

from loss_kernel import finish, machine
from train import learning_rate, train_step
from twdpo import dist
from twdpo.auxiliary import Contrast
from twdpo.batch import PairBatch, collate, plan_micro_batches, set_weights
from twdpo.chat import Example, tokenize_pairs
from twdpo.config import PRESETS, ExtractConfig, TrainConfig
from twdpo.extraction import describe_extraction, extract_attention, open_judge_inputs
from twdpo.files import hash_json, write_atomic, write_json
from twdpo.log import StageClock
from twdpo.losses import LOSSES, needs_reference
from twdpo.metrics import pair_metrics
from twdpo.model import TOY_MODEL, Policy, fingerprint_model, load_policy, load_tokenizer
from twdpo.pairs import parse_row
from twdpo.planted import filler_drift, overlaps_planted, planted_tokens, source_lift
from twdpo.postprocess import pin_and_share
from twdpo.reference import reference_logps
from twdpo.rows import RowOptions, evaluation_batches, global_batch
from twdpo.toy import KINDS, all_prompts, draw_row
from twdpo.weights import WEIGHTS, WeightContext, attention, source_needs
from twdpo.weights_file import WeightsFile

VERSION = 1  # raise it when figures change: finished cells of another version are run again
STEPS, BATCH, LR = 60, 16, 5e-4
EVALUATED = 256  # pairs, of validation and of test each
NEUTRAL = 128  # answers without filler
DRAWN = 1024  # training pairs of a seed, of which an arm takes the first
AUXILIARY = 512  # pairs that the auxiliary models are trained on
ROWS = RowOptions(False, 4096)
MEASURES = ("accuracy", "drift", "key_margin", "planted_lift", "seconds")


def oracle(batch, context: WeightContext) -> torch.Tensor:
    """The planted words alone (a control of benchmarks/methods.py); the end of the turn keeps 1/n."""
    planted = planted_tokens(batch).numpy()
    return per_answer(batch, lambda place, content: planted[place])


def shuffled(batch, context: WeightContext) -> torch.Tensor:
    """The judge's attention, permuted within each answer (a control of benchmarks/methods.py)."""
    weights = attention(batch, context).numpy()
    keys = iter(hash_json([example.pair.key, side]) for example in batch.examples for side in (0, 1))

    def permute(place: slice, content: np.ndarray) -> np.ndarray:
        mass = weights[place].copy()
        mass[content] = np.random.default_rng(int(next(keys)[:15], 16)).permutation(mass[content])
        return mass
    return per_answer(batch, permute)


shuffled.needs = ("attention",)
WEIGHTS |= {"oracle": oracle, "shuffled": shuffled}


def per_answer(batch, mass_of) -> torch.Tensor:
    """Weights of sum 1, answer by answer, in proportion to mass_of(place in the batch, content tokens); 1/n on the end
    of the turn."""
    parts, start = [], 0
    for response in (side for example in batch.examples for side in (example.chosen, example.rejected)):
        content = np.arange(len(response.ids)) < response.num_content
        parts.append(pin_and_share(mass_of(slice(start, start + len(content)), content).astype(float), ~content))
        start += len(content)
    return torch.from_numpy(np.concatenate(parts)).float()


# ----------------------------------------------------------------------------------------------------------------------
# What every arm of a process shares

class Quiet(dist.Process):
    """A process that says nothing: several run side by side."""

    def print(self, *values) -> None:
        pass

    def progress(self, items=None, **options):
        return tqdm(items, **options | {"disable": True})


@dataclass
class Pool:
    """Pairs in tokens, with the reference's log-probs by their index."""

    examples: list[Example]
    logps: dict[int, tuple[np.ndarray, np.ndarray]]


class Lab:
    """The toy's model, and pools of pairs with what sources need of them; made when first asked for."""

    def __init__(self, num_pairs: int):
        """num_pairs: of the largest training set."""
        started = dist.start()
        self.process = Quiet(started.rank, started.world_size, torch.device("cpu"))
        self.num_pairs = num_pairs
        self.folder = Path(tempfile.mkdtemp(prefix="methods-"))
        self.tokenizer = load_tokenizer(TOY_MODEL, "")
        self.policy = load_policy(TOY_MODEL, torch.float32, self.process)
        self.start = {name: value.clone() for name, value in self.policy.state_dict().items()}
        prompts = list(all_prompts())
        random.Random(0).shuffle(prompts)
        held_out = 2 * EVALUATED + NEUTRAL + AUXILIARY
        self.held_out_prompts, self.prompts = prompts[:held_out], prompts[held_out:]
        parts = [self.held_out_prompts[place:place + EVALUATED] for place in (0, EVALUATED, 2 * EVALUATED)]
        self.validation, self.test = self.pool(parts[0], 1_000_001), self.pool(parts[1], 1_000_002)
        self.neutral = self.pool(parts[2][:NEUTRAL], 1_000_003, max_fillers=0, max_spans=1)

    def pool(self, prompts: list[str], seed: int, **limits: int) -> Pool:
        """One pair a prompt, kinds in turn. limits: of fillers and spans (twdpo.toy.draw_row)."""
        rng = random.Random(seed)
        pairs = [parse_row(f"methods:{number}", draw_row(rng, prompt, KINDS[number % 2], **limits)[1])
                 for number, prompt in enumerate(prompts)]
        examples, _, _ = tokenize_pairs(self.tokenizer, pairs, PRESETS["toy"]["max_length"],
                                        PRESETS["toy"]["max_prompt_length"])
        self.policy.load_state_dict(self.start)  # a policy that an arm has trained is lost
        return Pool(examples, self.logps(self.policy, examples, f"reference-{seed}"))

    def logps(self, model, examples: list[Example], name: str) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """Log-probs under a model, by index."""
        return reference_logps(model, self.process, examples,
                               evaluation_batches(len(examples), 64), ROWS, self.folder / name)

    @functools.cache  # noqa: B019 - lives as long as its process
    def training(self, seed: int) -> Pool:
        prompts = random.Random(seed).sample(self.prompts, self.num_pairs)
        return self.pool(prompts, seed)

    @functools.cache  # noqa: B019
    def attention(self, seed: int) -> WeightsFile:
        """The judge's attention on a seed's training pairs."""
        folder = self.folder / f"attention-{seed}"
        pairs = [example.pair for example in self.training(seed).examples]
        config = ExtractConfig(model=str(TOY_MODEL), data="toy", out=str(folder),
                               judge_prompt=PRESETS["toy"]["judge_prompt"])
        meta = describe_extraction(config, "last", "--layers", False, TOY_MODEL, fingerprint_model(TOY_MODEL),
                                   self.tokenizer, str(seed), self.process.device)
        inputs = open_judge_inputs(config, meta, TOY_MODEL, self.tokenizer, self.process)
        extract_attention(config, meta, folder, pairs, inputs, TOY_MODEL, self.tokenizer, self.process)
        return WeightsFile(folder)

    @functools.cached_property
    def auxiliary(self) -> tuple[Policy, Policy]:
        """The toy's model after a few steps of next-token training on chosen answers, and on rejected ones."""
        pool = self.pool(self.held_out_prompts[-AUXILIARY:], 1_000_004)
        models = []
        for side in (0, 1):
            model = load_policy(TOY_MODEL, torch.float32, self.process)
            optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0, fused=True)
            for step in range(STEPS):
                pairs = global_batch(step, AUXILIARY, BATCH, 0)
                for micro_batch in plan_micro_batches(pairs, pool.examples, 1, RowOptions(False, 1 << 20))[0]:
                    batch = collate(micro_batch, pool.examples, pairs)
                    _, logps_N = model(batch)
                    sides = torch.cat([part for number, part in enumerate(logps_N.split(batch.seq_lens_S.tolist()))
                                       if number % 2 == side])
                    (-sides.mean()).backward()
                optimizer.step()
                optimizer.zero_grad()
            models.append(model)
        return tuple(models)

    @functools.cache  # noqa: B019
    def auxiliary_logps(self, seed: int, name: str) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """Log-probs of a seed's training pairs under "positive", "negative" or "contrast", by the pair's key."""
        models = dict(zip(("positive", "negative"), self.auxiliary)) | {"contrast": Contrast(*self.auxiliary)}
        examples = self.training(seed).examples
        logps = self.logps(models[name], examples, f"{name}-{seed}")
        return {examples[place].pair.key: value for place, value in logps.items()}

    def context(self, seed: int, needs: tuple[str, ...], config: TrainConfig) -> WeightContext:
        """What a source may read of a seed's training pairs."""
        names = [*(("positive", "negative") if "aux" in needs else ()), *(("contrast",) if "contrast" in needs else ())]
        return WeightContext(config, self.attention(seed) if "attention" in needs else None,
                             aux={name: self.auxiliary_logps(seed, name) for name in names})


# ----------------------------------------------------------------------------------------------------------------------
# One arm

def arm_config(loss_name: str, factor: float) -> TrainConfig:
    """The settings of an arm: the toy's, the loss's own, and beta times `factor`."""
    settings = {"beta": PRESETS["toy"]["beta"]} | getattr(LOSSES[loss_name], "settings", {}).get("", {})
    settings["beta"] *= factor
    return TrainConfig(data="toy", loss=loss_name, lr=LR, batch_size=BATCH, **settings)


def train_arm(lab: Lab, loss_name: str, source_name: str, num_pairs: int, seed: int, factor: float
              ) -> dict[str, float]:
    """Train from the toy's model: the row's measures, and its accuracy on validation pairs."""
    loss, source, config = LOSSES[loss_name], WEIGHTS[source_name], arm_config(loss_name, factor)
    pool, needs = lab.training(seed), source_needs(source)
    context = lab.context(seed, needs, config)
    has_logps = needs_reference(loss) or "ref" in needs
    lab.policy.load_state_dict(lab.start)
    optimizer = torch.optim.AdamW(lab.policy.parameters(), lr=LR, weight_decay=0.0, fused=True)
    seconds = []
    for step in range(STEPS):
        started = time.perf_counter()
        pairs = global_batch(step, num_pairs, BATCH, seed)
        batches = [set_weights(collate(micro_batch, pool.examples, pairs, pool.logps if has_logps else None), source,
                               loss, context)
                   for micro_batch in plan_micro_batches(pairs, pool.examples, 1, ROWS)[0]]
        train_step(lab.policy, optimizer, batches, loss, config, learning_rate(step, STEPS, config), step + 1,
                   lab.process, StageClock(False, lab.process.device))
        seconds.append(time.perf_counter() - started)
    lift_S, _ = source_lift(source, pool.examples[:num_pairs], replace(context, config=replace(config, sink_k=0)),
                            pool.logps)
    return evaluate(lab, lab.test) | {
        "key_margin": key_margin(lab), "planted_lift": float(lift_S.mean()), "seconds": statistics.median(seconds),
        "validation_accuracy": evaluate(lab, lab.validation)["accuracy"], "beta": config.beta}


@torch.no_grad()
def evaluate(lab: Lab, pool: Pool) -> dict[str, float]:
    """accuracy and drift of the policy as it is, means over the pairs."""
    accuracies, drifts = [], []
    for batch in evaluation_rows(pool):
        ratio_S, logps_N = lab.policy(batch)
        metrics = pair_metrics(torch.zeros(len(batch.examples)), {}, ratio_S, logps_N, batch, 1.0)
        accuracies += metrics["reward_accuracy"].tolist()
        drifts += filler_drift(logps_N, batch.ref_logps_N, batch).tolist()
    return {"accuracy": statistics.fmean(accuracies), "drift": statistics.fmean(drifts)}


@torch.no_grad()
def key_margin(lab: Lab) -> float:
    """By how much the policy raises the good slot word over the bad one (nats), in answers that differ in it alone."""
    margins = []
    for batch in evaluation_rows(lab.neutral):
        _, logps_N = lab.policy(batch)
        gains = (logps_N - batch.ref_logps_N).split(batch.seq_lens_S.tolist())
        for example, chosen_N, rejected_N in zip(batch.examples, gains[0::2], gains[1::2]):
            slot = int(np.argmax(overlaps_planted(example.pair.chosen, example.chosen.spans_N2)))
            margins.append(float(chosen_N[slot] - rejected_N[slot]))
    return statistics.fmean(margins)


def evaluation_rows(pool: Pool) -> Iterator[PairBatch]:
    """All pairs of a pool, with reference log-probs and uniform weights."""
    for pairs in evaluation_batches(len(pool.examples), 64):
        for micro_batch in plan_micro_batches(pairs, pool.examples, 1, ROWS)[0]:
            yield collate(micro_batch, pool.examples, pairs, pool.logps)


# ----------------------------------------------------------------------------------------------------------------------
# All arms

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


def run_group(loss_name: str, source_name: str, num_pairs: int, seeds: int, factors: list[float], out: Path
              ) -> list[dict]:
    """Rows of all seeds with the beta that is best for the first; finished cells are read, not run."""
    key = hash_json([VERSION, fingerprint_model(TOY_MODEL), STEPS, BATCH, LR, torch.__version__])[:12]

    def cell(seed: int, factor: float) -> dict:
        path = out / f"{loss_name}-{source_name}-{num_pairs}-{seed}-{factor:g}-{key}.json"
        if not path.exists():
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
    ratio_S = torch.tensor([-1.0, -3.0])
    batch = SimpleNamespace(seq_lens_S=torch.ones(2), weights_N=torch.ones(2), scale_S=torch.ones(2), averaged=False,
                            chosen_tokens=1, pair_count=1, means=dict.fromkeys(("chosen", "rejected"), torch.zeros(())))
    values = [LOSSES[loss_name](ratio_S, ratio_S, batch, arm_config(loss_name, factor))[0] for factor in (1.0, 2.0)]
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


def draw_plot(rows: list[dict]) -> str:
    """SVG: accuracy against drift, a panel a number of pairs; sources by name, other losses as grey dots."""
    width, height, left, bottom, top = 460, 400, 52, 44, 34
    summary = summarize(rows)
    sizes = sorted({row["pairs"] for row in summary})
    low_y = min(row["accuracy"] for row in summary) - 0.02
    high_x = max(row["drift"] for row in summary) * 1.08
    parts = []
    for panel, size in enumerate(sizes):
        def x_of(drift: float, panel=panel) -> float:
            return panel * width + left + (drift / high_x) ** 0.5 * (width - left - 16)

        def y_of(accuracy: float) -> float:
            return height - bottom - (accuracy - low_y) / (1.005 - low_y) * (height - bottom - top)
        parts.append(f'<text x="{panel * width + left}" y="20" class="title">{size:,} pairs</text>')
        for tick in [number / 20 for number in range(21) if low_y <= number / 20]:
            parts.append(f'<line x1="{panel * width + left}" x2="{(panel + 1) * width - 16}" y1="{y_of(tick):.1f}" '
                         f'y2="{y_of(tick):.1f}" class="grid"/><text x="{panel * width + left - 6}" '
                         f'y="{y_of(tick) + 4:.1f}" text-anchor="end">{tick:.2f}</text>')
        for tick in (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2, 4):
            if tick <= high_x:
                parts.append(f'<text x="{x_of(tick):.1f}" y="{height - bottom + 18}" text-anchor="middle">{tick:g}'
                             "</text>")
        parts.append(f'<text x="{panel * width + (left + width) / 2}" y="{height - 6}" text-anchor="middle">'
                     "drift on filler (nats a token)</text>")
        placed: list[float] = []
        for row in sorted((row for row in summary if row["pairs"] == size), key=lambda row: -row["accuracy"]):
            is_source = row["loss"] == "twdpo"
            kind = ("control" if row["source"] in ("uniform", "oracle", "shuffled") else "source") if is_source \
                else "loss"
            x, y = x_of(row["drift"]), y_of(row["accuracy"])
            name = row["source"] if is_source else f"{row['loss']}, {row['source']}"
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{4.5 if is_source else 3}" class="{kind}"><title>'
                         f"{html.escape(name)}: accuracy {row['accuracy']:.3f} ± {row['accuracy_sd']:.3f}, drift "
                         f"{row['drift']:.3f} ± {row['drift_sd']:.3f}</title></circle>")
            if is_source:
                label_y = y + 4
                while any(abs(label_y - other) < 12 for other in placed):
                    label_y += 12
                placed.append(label_y)
                at_end = x > (panel + 0.62) * width
                parts.append(f'<text x="{x + (-8 if at_end else 8):.1f}" y="{label_y:.1f}" class="{kind}" '
                             f'text-anchor="{"end" if at_end else "start"}">{html.escape(name)}</text>')
    style = ("text{font:12px system-ui,sans-serif;fill:#55534e}.title{font-size:14px;fill:#1b1b1f}.grid{stroke:#e3e1da}"
             "circle.source{fill:#c54a14}text.source{fill:#c54a14}circle.control{fill:#1f5fa8}text.control{fill:#1f5fa8}"
             "circle.loss{fill:#b4b2ab}")
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
        if min(sizes) < 1 or min(factors) <= 0 or flags.seeds < 1 or flags.jobs < 1:
            raise ValueError("--pairs, --betas, --seeds and --jobs must be positive")
        limit = len(all_prompts()) - 2 * EVALUATED - NEUTRAL - AUXILIARY
        if max(sizes) > limit:
            raise ValueError(f"--pairs {max(sizes)}: the grammar has {limit} prompts for training pairs")
    except ValueError as error:
        parser.error(str(error))
    cells = flags.out / "cells"
    cells.mkdir(parents=True, exist_ok=True)
    # The largest sets first, so that no long group starts last.
    groups = [(loss, source, size) for size in reversed(sizes) for loss, source in arms]
    rows: dict[tuple, list[dict]] = {}
    context = multiprocessing.get_context("spawn")
    # Always drawn for as many, so that a cell does not depend on what else was asked for.
    num_pairs = max(DRAWN, *sizes)
    bar = tqdm(total=len(groups), desc="methods", unit="arm", mininterval=5)
    if flags.jobs == 1:
        open_lab(num_pairs)
        try:
            for group in groups:
                rows[group] = run_group(*group, flags.seeds, factors, cells)
                bar.update()
        finally:
            close_lab()
    else:
        with ProcessPoolExecutor(min(flags.jobs, len(groups)), context, open_lab, (num_pairs,)) as pool:
            futures = {pool.submit(run_group, *group, flags.seeds, factors, cells): group for group in groups}
            for future in as_completed(futures):
                rows[futures[future]] = future.result()
                bar.update()
    bar.close()
    ordered = [row for size in sizes for loss, source in arms for row in rows[loss, source, size]]
    print(format_table(ordered))
    write_atomic(flags.out / "methods.svg", lambda temporary: temporary.write_text(draw_plot(ordered), "utf-8"))
    report = {"machine": machine(torch.device("cpu")), "steps": STEPS, "batch_size": BATCH, "lr": LR, "rows": ordered}
    finish(flags.out / "methods.json", report)


if __name__ == "__main__":
    main()
