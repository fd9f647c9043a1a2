"""Try to break runs for as long as you like: kills, losses of power, flipped bits, full disks, two runs at once, and
input that is anything.

    python -m tests.harness                      half an hour; every kind gets a share of it
    python -m tests.harness --minutes 5 --only kills,bits --seed 7

What must never happen: a run that ends with another result and says nothing, a traceback, a run that hangs. Each
attempt either comes to the result of the run that nothing happened to ("survived"), or is refused with one message
that says what to do ("refused", where that is allowed); everything else "fell short" and is printed with what repeats
it. The exit code is 1 if something did. Neither pytest nor the README's test command runs this; one of each kind is in
the suite.
"""
# ruff: noqa: E402 - where tests and entry points are must be known first

import argparse
import contextlib
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import fuzz_of_tests
from power_of_tests import Recorder
from processes_of_tests import CONTEXT, run_and_die
from runs_of_tests import read_rows, small_run, write_pairs

import extract
import train
from twdpo.toy.train import build_toy_model

FLAGS = {"max_steps": 4, "save_every": 1, "eval_every": 2, "keep_last": 2, "micro_batch_tokens": 200}
KILLED_IN = (  # train.py: what is called in the course of a run, and how often
    ("twdpo.files.sync", 60), ("twdpo.files.remove", 30), ("twdpo.checkpoint.sync", 20), ("train.train_step", 4),
    ("train.save_checkpoint", 4), ("train.export_model", 2), ("twdpo.judge.extraction.write_shard", 1),
    ("twdpo.logps.write_cache", 2), ("twdpo.run_folder.write_json", 2), ("train.summarize", 1),
    ("twdpo.checkpoint.state_tensors", 4), ("twdpo.checkpoint.discard", 2), ("twdpo.checkpoint.write_manifest", 4))
EXTRACTION_KILLED_IN = (("twdpo.files.sync", 8), ("twdpo.judge.extraction.write_shard", 4), ("twdpo.files.share", 4),
                        ("twdpo.weights_file.write_json", 1))


@dataclass
class Tally:
    """What became of the attempts of one kind."""

    counts: Counter = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def add(self, outcome: str, what: str) -> None:
        self.counts[outcome] += 1
        if outcome == "fell short":
            self.failures.append(what)


class Bench:
    """What all kinds share: a model, pairs, and the run that nothing happens to."""

    def __init__(self, folder: Path):
        self.folder = folder
        build_toy_model(folder / "model")
        self.pairs = write_pairs(folder / "pairs.jsonl")
        self.whole = self.fresh("whole")
        assert self.call(train.main, self.argv(self.whole)) == ("", 0)
        self.extracted = self.fresh("extracted")
        assert self.call(extract.main, self.extraction(self.extracted)) == ("", 0)

    def fresh(self, name: str) -> Path:
        """An empty place."""
        path = self.folder / name
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
        return path

    def argv(self, place: Path, **flags) -> list[str]:
        return small_run(self.folder / "model", self.pairs, place / "cache")(place / "run", **FLAGS | flags)

    def extraction(self, place: Path) -> list[str]:
        return ["--model", str(self.folder / "model"), "--data", str(self.pairs), "--judge-prompt", "short", "--layers",
                "all", "--out", str(place / "w")]

    def call(self, main: Callable, argv: list[str]) -> tuple[str, int]:
        """(a message or a traceback, exit code) of an entry point; ("", 0) when it ends well."""
        printed = io.StringIO()
        with contextlib.redirect_stdout(io.StringIO()) as self.said, contextlib.redirect_stderr(printed):
            try:
                main(argv)
            except SystemExit as stopped:
                return printed.getvalue(), int(stopped.code or 0)
            except BaseException:
                return traceback.format_exc(), 1
        return "", 0

    def resume(self, place: Path, may_refuse: bool, rows: bool = True, best: bool = True) -> str:
        """What a resume comes to, as an outcome. rows, best: whether its metrics and its best/ must be those of the
        whole run, beside final/."""
        message, code = self.call(train.main, [*self.argv(place), "--resume"])
        if code == 2 and may_refuse and "Traceback" not in message:
            return "refused"
        if code:
            return f"exit code {code}: {message}"
        if rows and "lacks the rows" not in self.said.getvalue():
            if read_rows(place / "run") != read_rows(self.whole / "run"):
                return "other metrics"
        for name in ("final", "best")[:1 + best]:
            model = f"run/{name}/model.safetensors"
            if not (place / model).exists():
                return f"no {name}/"
            if (place / model).read_bytes() != (self.whole / model).read_bytes():
                return f"another {name}/"
        return "survived"


# ----------------------------------------------------------------------------------------------------------------------
# Kinds: each yields (outcome, what repeats it) for ever or until it has nothing left

Attempts = Iterator[tuple[str, str]]


def kills(bench: Bench, rng: random.Random) -> Attempts:
    """A run is killed at some moment, resumed and killed again up to three times, and resumed."""
    while True:
        place, moments = bench.fresh("killed"), []
        for number in range(rng.choice((1, 1, 2, 3))):
            function, most = rng.choice(KILLED_IN)
            moments.append((function, rng.randint(1, most)))
            with contextlib.suppress(AssertionError):  # it ended before that moment
                run_and_die("train", [*bench.argv(place), *["--resume"] * (number > 0)], *moments[-1], quiet=True)
        yield bench.resume(place, may_refuse=False), f"killed at {moments}"


def kills_of_extraction(bench: Bench, rng: random.Random) -> Attempts:
    """The weights file of a killed and completed extraction is the same to the last byte."""
    expected = contents(bench.extracted / "w")
    while True:
        place, (function, most) = bench.fresh("killed"), rng.choice(EXTRACTION_KILLED_IN)
        number = rng.randint(1, most)
        with contextlib.suppress(AssertionError):
            run_and_die("extract", bench.extraction(place), function, number, quiet=True)
        message, code = bench.call(extract.main, bench.extraction(place))
        same = not code and contents(place / "w") == expected
        yield ("survived" if same else message or "other bytes"), f"killed at call {number} of {function}"


def kills_of_replacement(bench: Bench, rng: random.Random) -> Attempts:
    """A run is killed while it replaces another one: the old settings never go on with what is of the new ones."""
    while True:
        place = bench.fresh("replaced")
        shutil.copytree(bench.whole, place, dirs_exist_ok=True)
        number = rng.randint(1, rng.choice((13, 60)))  # the first ones are of the deletions
        new = bench.argv(place, lr=2e-3)
        with contextlib.suppress(AssertionError):
            run_and_die("train", [*new, "--overwrite"], "twdpo.files.sync", number, quiet=True)
        config = place / "run/config.json"
        lr = json.loads(config.read_text())["lr"] if config.exists() else None
        outcome = bench.resume(place, may_refuse=lr in (2e-3, None))
        if outcome == "survived" and lr == 2e-3:
            outcome = "the old settings went on with the new run"
        yield outcome, f"killed at sync {number} of an --overwrite"


def power(bench: Bench, rng: random.Random) -> Attempts:
    """Every state that a loss of power may leave of a run, and its caches, in random order."""
    place = bench.fresh("power")
    with Recorder(place) as recorder:
        assert bench.call(train.main, bench.argv(place)) == ("", 0)
    states = recorder.states()
    for number in rng.sample(range(len(states)), len(states)):
        recorder.restore(states[number], place)
        outcome = bench.resume(place, may_refuse=not any("step-" in name for name in states[number]))
        yield outcome, f"state {number} of {len(states)}"


def bits(bench: Bench, rng: random.Random) -> Attempts:
    """One bit of one file of a run or of its caches is flipped, and the run is resumed from a checkpoint before its end
    or begun anew."""
    files = [path.relative_to(bench.whole) for path in sorted(bench.whole.rglob("*"))
             if path.suffix in (".safetensors", ".json", ".jsonl") and path.parent.name not in ("final", "best")]
    files.append(Path("run/best/evaluation.json"))  # the other files of exports are results, which no run reads
    while True:
        place = bench.fresh("flipped")
        shutil.copytree(bench.whole, place, dirs_exist_ok=True)
        resumes = rng.random() < 0.5
        if resumes:
            shutil.rmtree(place / "run/checkpoints/step-0000004")
        else:
            shutil.rmtree(place / "run")
        file = rng.choice([name for name in files if (place / name).exists()])
        data = bytearray((place / file).read_bytes())
        bit = rng.randrange(8 * len(data)) if data else 0
        if data:
            data[bit // 8] ^= 1 << bit % 8
            (place / file).write_bytes(data)
        what = f"bit {bit} of {file} flipped, {'resumed' if resumes else 'begun anew'}"
        if not resumes:
            (place / "run").mkdir(exist_ok=True)
        # The figures of metrics.jsonl are nobody's input; a digit of one may have changed, and what is best with it.
        rows, best = file.name != "metrics.jsonl", file.name not in ("metrics.jsonl", "evaluation.json")
        yield bench.resume(place, may_refuse=resumes, rows=rows, best=best), what


def disks(bench: Bench, rng: random.Random) -> Attempts:
    """Files may not grow beyond some size (which a full disk looks like), then they may."""
    while True:
        place, size = bench.fresh("full"), int(10 ** rng.uniform(1, 6.3))
        child = CONTEXT.Process(target=run_limited, args=(bench.argv(place), size))
        child.start()
        child.join(300)
        if child.exitcode not in (0, 2):
            yield f"exit code {child.exitcode}", f"files of at most {size} bytes"
        else:
            yield bench.resume(place, may_refuse=False), f"files of at most {size} bytes"


def run_limited(argv: list[str], size: int) -> None:
    """In a child."""
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        train.main(argv)


def twins(bench: Bench, rng: random.Random) -> Attempts:
    """Two processes in one folder: one of them is refused, the other one's run is whole."""
    while True:
        place = bench.fresh("twins")
        children = [CONTEXT.Process(target=run_quietly, args=(bench.argv(place),)) for _ in range(2)]
        children[0].start()
        time.sleep(rng.uniform(0, 3))
        children[1].start()
        for child in children:
            child.join(300)
        codes = sorted(child.exitcode for child in children)
        outcome = bench.resume(place, may_refuse=False) if codes == [0, 2] else f"exit codes {codes}"
        yield outcome, "two runs at once"


def run_quietly(argv: list[str]) -> None:
    """In a child."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        train.main(argv)


def signals(bench: Bench, rng: random.Random) -> Attempts:
    """SIGTERM or SIGUSR1 at a random moment of a run: it saves and ends well, or dies as it may before training."""
    while True:
        place = bench.fresh("signalled")
        child = CONTEXT.Process(target=run_quietly, args=(bench.argv(place),))
        child.start()
        time.sleep(rng.uniform(0, 4))
        sent = rng.choice((signal.SIGTERM, signal.SIGUSR1))
        with contextlib.suppress(ProcessLookupError):  # it has ended
            os.kill(child.pid, sent)
        child.join(300)
        outcome = bench.resume(place, may_refuse=False)
        yield (outcome if child.exitcode in (0, -sent) else f"exit code {child.exitcode}"), f"signal {sent}"


def inputs(bench: Bench, rng: random.Random) -> Attempts:
    """Files of every kind that are read, with anything in them: taken, or refused with one message."""
    for what, main, argv in fuzz_of_tests.commands(bench, rng):
        message, code = bench.call(main, argv)
        ok = code == 0 or code == 2 and "Traceback" not in message and ": error: " in message
        yield ("survived" if ok else message or f"exit code {code}"), what


KINDS = {kind.__name__: kind for kind in (
    kills, kills_of_extraction, kills_of_replacement, power, bits, disks, twins, signals, inputs)}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file() and not path.name.endswith(".tmp")}


def run_kind(name: str, bench: Bench, seed: int, seconds: float) -> Tally:
    """Attempts of one kind until its time is over."""
    tally, end = Tally(), time.monotonic() + seconds
    for outcome, what in KINDS[name](bench, random.Random(f"{name}-{seed}")):
        known = outcome in ("survived", "refused")
        tally.add(outcome if known else "fell short", f"{what}: {outcome}")
        if not known:
            print(f"{name}: {what}:\n{outcome}", flush=True)
        if time.monotonic() > end:
            break
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=30, help="of all kinds together (default: %(default)s)")
    parser.add_argument("--only", default=",".join(KINDS), help="kinds, by commas (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=None, help="of the attempts; a random one is printed")
    flags = parser.parse_args()
    names = [name.strip() for name in flags.only.split(",")]
    if unknown := set(names) - set(KINDS):
        parser.error(f"--only has {min(unknown)!r}: choose from {', '.join(KINDS)}")
    seed = random.SystemRandom().randrange(10**6) if flags.seed is None else flags.seed
    print(f"seed {seed}", flush=True)
    tallies: dict[str, Tally] = {}
    with tempfile.TemporaryDirectory(prefix="harness-") as folder:
        bench = Bench(Path(folder).resolve())
        for name in names:
            tallies[name] = run_kind(name, bench, seed, 60 * flags.minutes / len(names))
            print_row(name, tallies[name])
    print(f"\n{'':24}{'tried':>8}{'survived':>10}{'refused':>10}{'fell short':>12}")
    for name, tally in tallies.items():
        print_row(name, tally)
    raise SystemExit(any(tally.failures for tally in tallies.values()))


def print_row(name: str, tally: Tally) -> None:
    counts = tally.counts
    print(f"{name:24}{counts.total():8}{counts['survived']:10}{counts['refused']:10}{counts['fell short']:12}",
          flush=True)


if __name__ == "__main__":
    main()
