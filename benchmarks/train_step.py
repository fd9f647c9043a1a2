"""Training steps of DPO: this project's loop against TRL's DPOTrainer, same model, pairs and settings.

    python benchmarks/train_step.py --data pairs.jsonl --tokenizer FOLDER     on real pairs, in real tokens
    python benchmarks/train_step.py                                           on made-up pairs
    python benchmarks/train_step.py --only ours,precomputed                   ways whose name contains one of these
    python benchmarks/train_step.py --only ours --checkpointing selective --compile
    python benchmarks/train_step.py --shape llama-3-8b --only ours            does it fit a GPU, and at what MFU

Plain DPO with uniform weights, since TRL has no token weights; AdamW; fp32 on a CPU, bf16 compute on fp32 parameters on
a GPU. Made-up pairs are as long as real ones: 32 of them are 22,500 tokens, within 1 %, with each prompt once.

Every way runs in a process of its own, round after round, over the same pairs in the same order; it shows its progress,
and its row is written when it ends. A pair's time is the median step's plus its share of the reference pass (TRL
without precomputed log-probs does that in its steps; the first step of a process is left out). Memory is the process's
peak, parameters, gradients and optimizer included. `loss` and `gradient norm` are those of the last step: equal numbers
mean equal work.

On a GPU ours also gives TFLOP/s and MFU, and the model is random and never written. Ours come in the order of their
memory, the least first. What can't fit by the memory plan is a row that says so, and is not tried without
--ignore-plan; of TRL only parameters, gradients, Adam and the reference are planned for. The last line is JSON.
"""

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from harness import (
    Report,
    add_output_flags,
    installed_version,
    machine,
    output_path,
    print_machine,
    real_lengths,
    whole_number,
)
from train_step_ways import run_ours, run_trl
from twdpo.dataset import load_dataset
from twdpo.models.memory import CHECKPOINTING, GIB, RESERVED_GIB, ModelCost, model_cost, plan_memory
from twdpo.toy.grammar import toy_rows
from twdpo.toy.train import build_tokenizer

SHAPES = {
    # 20.5 M parameters in the layers, 65.7 M in the head, and as many in the embedding.
    "20m": dict(num_hidden_layers=8, hidden_size=512, intermediate_size=1152, num_attention_heads=8,
                num_key_value_heads=4),
    "llama-3.2-1b": dict(num_hidden_layers=16, hidden_size=2048, intermediate_size=8192, num_attention_heads=32,
                         num_key_value_heads=8),
    "llama-3-8b": dict(num_hidden_layers=32, hidden_size=4096, intermediate_size=14336, num_attention_heads=32,
                       num_key_value_heads=8),
}
VOCABULARY = 128256
WORDS_A_TOKEN, TEMPLATE_TOKENS = 0.865, 3  # of the made-up words in the toy's tokenizer
OURS = {"none": "ours", "full": "ours, checkpointing"}
TRL = {
    "TRL": {},
    "TRL, precomputed": {"precompute_ref_log_probs": True},
    "TRL, checkpointing": {"gradient_checkpointing": True},
    "TRL, precomputed, checkpointing": {"precompute_ref_log_probs": True, "gradient_checkpointing": True},
    "TRL, Liger": {"use_liger_kernel": True},
}


def ways_of(flags: argparse.Namespace) -> dict[str, dict[str, object]]:
    """All ways that --checkpointing and --compile ask for, with their options."""
    compiled = ", compiled" if flags.compile else ""
    ours = {OURS.get(choice, f"ours, checkpointing {choice}") + compiled: {"checkpointing": choice}
            for choice in flags.checkpointing}
    return ours | TRL


def make_pairs(flags: argparse.Namespace, number: int) -> list[dict[str, str]]:
    """Rows of --data, evenly spaced, or of random words in lengths that real ones have."""
    if flags.data:
        pairs = load_dataset(flags.data, "").train
        pairs = pairs[::max(1, len(pairs) // number)][:number]
        return [{"prompt": pair.messages[-1][1], "chosen": pair.chosen, "rejected": pair.rejected} for pair in pairs]
    rng = random.Random(0)
    words = " ".join(row["chosen"] for row in toy_rows()[0]).split()

    def text(num_tokens: int) -> str:
        return " ".join(rng.choices(words, k=max(2, round(WORDS_A_TOKEN * (num_tokens - TEMPLATE_TOKENS)))))
    return [dict(zip(("prompt", "chosen", "rejected"), map(text, lengths))) for lengths in real_lengths(number)]


def model_config(shape: str) -> LlamaConfig:
    return LlamaConfig(**SHAPES[shape], vocab_size=VOCABULARY, max_position_embeddings=8192, rope_theta=500000.0)


def prepare(flags: argparse.Namespace, shape: str, work: Path, with_weights: bool = False) -> None:
    """Write model, tokenizer and pairs that every way reads; of a large model only its config, unless with_weights."""
    tokenizer = AutoTokenizer.from_pretrained(flags.tokenizer) if flags.tokenizer else build_tokenizer()
    config = model_config(shape)
    config.bos_token_id, config.eos_token_id = None, tokenizer.eos_token_id
    torch.manual_seed(0)
    if with_weights or shape == "20m":
        AutoModelForCausalLM.from_config(config).save_pretrained(work / "model")
    else:
        config.save_pretrained(work / "model")
    tokenizer.save_pretrained(work / "model")
    rows = make_pairs(flags, flags.steps * flags.pairs)
    if len(rows) < flags.steps * flags.pairs:
        raise SystemExit(f"--data {flags.data} has {len(rows)} pairs, {flags.steps * flags.pairs} are needed")
    (work / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def planned_gib(name: str, options: dict[str, object], cost: ModelCost, num_tokens: int) -> float:
    """Ours: the peak by the plan. TRL: what it holds whatever it computes: fp32 parameters, gradients, two moments of
    Adam, and the reference unless its log-probs come first."""
    if not name.startswith("TRL"):
        return plan_memory(cost, 1, num_tokens, options["checkpointing"])["peak"] / GIB
    return (16 if options.get("precompute_ref_log_probs") else 20) * cost.params / GIB


def plan_ways(ways: dict[str, dict], cost: ModelCost, memory_gib: float, flags: argparse.Namespace
              ) -> dict[str, dict[str, object]]:
    """Of each way, what its row says beforehand: the plan, a note if it does not fit. Ours first, by their memory."""
    rows: dict[str, dict[str, object]] = {}
    plans = {name: planned_gib(name, options, cost, flags.tokens) for name, options in ways.items()}
    for name in sorted(ways, key=lambda name: (1, 0) if name.startswith("TRL") else (0, plans[name])):
        planned = plans[name]
        rows[name] = {} if name.startswith("TRL") else {"planned_gib": planned}
        if planned + RESERVED_GIB > memory_gib and not flags.ignore_plan:
            rows[name]["note"] = f"does not fit by the memory plan: {planned:.1f} GiB of {memory_gib:.1f}"
    return rows


def run_way(name: str, work: Path, flags: argparse.Namespace) -> dict[str, object]:
    """One way in this process; a way that can't run is a row that says why."""
    options = ways_of(flags)[name]
    try:
        figures = (run_trl if name.startswith("TRL") else run_ours)(work, flags, options)
    except ImportError as error:
        return {"note": f"missing: {error}"}
    except torch.OutOfMemoryError:
        return {"note": "out of memory"}
    if torch.cuda.is_available():
        return figures | {"peak_gib": torch.cuda.max_memory_allocated() / GIB,
                          "reserved_gib": torch.cuda.max_memory_reserved() / GIB}
    return figures | {"peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


def run_child(name: str, arguments: list[str], shape: str, work: Path) -> dict[str, object]:
    """One way in a process of its own; what it prints is shown as it comes."""
    result = work / "result.json"
    result.unlink(missing_ok=True)
    environment = os.environ | {"HF_HOME": str(work / "home"), "TQDM_DISABLE": "1"}
    command = [sys.executable, __file__, *arguments, "--shape", shape, "--way", name, "--work", str(work)]
    with open(work / "errors.txt", "w+", encoding="utf-8") as errors:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment) as child:
            for line in child.stdout:
                print(f"    {line.rstrip()}", flush=True)
        errors.seek(0)
        text = errors.read().strip()
    if child.returncode or not result.exists():
        print(text, file=sys.stderr)
        return {"note": f"failed: {(text.splitlines() or [f'exit code {child.returncode}'])[-1]}"}
    return json.loads(result.read_text(encoding="utf-8"))


def summarize(runs: list[dict[str, object]], num_pairs: int) -> dict[str, object]:
    """A row's figures from the rounds of one way."""
    note = next((run["note"] for run in runs if "note" in run), None)
    if note:
        return {"note": note}
    steps = [seconds for run in runs for seconds in run["step_seconds"][1:]]
    reference = statistics.median(run["reference_seconds_a_pair"] for run in runs)
    row = {"pairs_per_s": 1 / (statistics.median(steps) / num_pairs + reference),
           "step_seconds": statistics.median(steps), "reference_seconds_a_pair": reference,
           "fastest_step": min(steps), "slowest_step": max(steps), "steps": len(steps),
           "peak_gib": max(run["peak_gib"] for run in runs)}
    return row | {key: value for key, value in runs[-1].items() if key not in row}


def add_ratios(rows: list[dict[str, object]]) -> None:
    """Each way's ratios to ours without recomputation, or to the first of ours."""
    measured = [row for row in rows if row["way"].startswith("ours") and "note" not in row]
    ours = next((row for row in measured if "checkpointing" not in row["way"]), measured[0] if measured else None)
    for row in rows:
        if ours and "note" not in row:
            row |= {"ours_faster": ours["pairs_per_s"] / row["pairs_per_s"],
                    "ours_memory": ours["peak_gib"] / row["peak_gib"]}


HEADER = (f"{'way':34} {'pairs a':>8} {'ours is':>8} {'seconds':>8} {'reference':>10} {'peak GiB:':>9} {'':>8} {'':>8} "
          f"{'ours':>6} {'loss':>9} {'gradient':>9}\n"
          f"{'':34} {'second':>8} {'faster':>8} {'a step':>8} {'s a pair':>10} {'allocated':>9} {'reserved':>8} "
          f"{'planned':>8} {'takes':>6} {'':>9} {'norm':>9}")


def show(row: dict[str, object]) -> str:
    if "note" in row:
        return f"{row['way']:34} {row['note']}"

    def ratio(name: str) -> str:
        return f"{row[name]:.2f}x" if name in row else "-"

    def gib(name: str) -> str:
        return f"{row[name]:.2f}" if name in row else "-"
    return (f"{row['way']:34} {row['pairs_per_s']:8.3f} {ratio('ours_faster'):>8} {row['step_seconds']:8.2f} "
            f"{row['reference_seconds_a_pair']:10.3f} {row['peak_gib']:9.2f} {gib('reserved_gib'):>8} "
            f"{gib('planned_gib'):>8} {ratio('ours_memory'):>6} {row['loss']:9.5f} {row['gradient_norm']:9.4f}"
            + (f"  {row['tflops']:.0f} TFLOP/s" if "tflops" in row else "")
            + (f", MFU {row['mfu']:.1%}" if "mfu" in row else ""))


def conclusion(rows: list[dict[str, object]]) -> str:
    """What the rows say, for a person: the fastest of ours, against the fastest of TRL's."""
    measured = sorted((row for row in rows if "note" not in row), key=lambda row: row["step_seconds"])
    ours = next((row for row in measured if row["way"].startswith("ours")), None)
    trl = min((row for row in measured if row["way"].startswith("TRL")), default=None,
              key=lambda row: -row["pairs_per_s"])
    if not ours:
        return "None of our ways was measured."
    text = (f"{ours['model']}, fastest of ours: {ours['way']}, {ours['step_seconds']:.2f} s a step of "
            f"{ours['tokens_a_step']:,.0f} tokens, {ours['peak_gib']:.1f} GiB at the peak")
    if "mfu" in ours:
        text += f", MFU {ours['mfu']:.1%}"
    if trl:
        text += (f"; {ours['pairs_per_s'] / trl['pairs_per_s']:.1f} times the pairs a second of {trl['way']}, with "
                 f"{ours['peak_gib'] / trl['peak_gib']:.2f} of its memory")
    return text + "."


def micro_batch(name: str, flags: argparse.Namespace) -> str:
    """What a way takes at once."""
    return f"{flags.trl_pairs} pairs" if name.startswith("TRL") else f"{flags.tokens} tokens"


def missing_peer() -> str:
    """Why TRL can't run here, or nothing."""
    try:
        import datasets  # noqa: F401
        from trl import DPOTrainer  # noqa: F401
    except ImportError as error:
        return f"missing: {error}"
    return ""


def run_shape(shape: str, ways: dict[str, dict], missing: str, arguments: list[str], flags: argparse.Namespace,
              report: Report) -> list[dict[str, object]]:
    """Rows of one model; each is written when its way ends. missing: why TRL's ways have no turn, or nothing."""
    planned: dict[str, dict[str, object]] = {name: {} for name in ways}
    if torch.cuda.is_available():
        cost = model_cost(model_config(shape), torch.bfloat16, flags.max_length)
        planned = plan_ways(ways, cost, torch.cuda.get_device_properties(0).total_memory / GIB, flags)
    report.extra.setdefault("shapes", {})[shape] = SHAPES[shape] | {"vocab_size": VOCABULARY}
    rows = {name: {"model": shape, "way": name, "micro_batch": micro_batch(name, flags)} | row
            for name, row in planned.items()}
    for row in rows.values():
        if missing and row["way"].startswith("TRL"):
            row["note"] = missing
        elif "note" in row:
            print(show(row), flush=True)
    done = [row for row in rows.values() if "note" in row]
    for row in done:
        report.add(row)
    runs: dict[str, list] = {name: [] for name, row in rows.items() if "note" not in row}
    with tempfile.TemporaryDirectory() as folder:
        if runs:
            prepare(flags, shape, Path(folder))
        for number in range(flags.rounds):
            for name in runs:
                print(f"{shape}, round {number + 1} of {flags.rounds}: {name}", flush=True)
                runs[name].append(run_child(name, arguments, shape, Path(folder)))
                rows[name] |= summarize(runs[name], flags.pairs)
                if number == 0:
                    done.append(rows[name])
                    report.rows.append(rows[name])
                add_ratios(done)
                report.write()
                print(show(rows[name]), flush=True)
    return done


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, dict[str, dict]]:
    """(flags, the ways that they ask for)."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default="", help="pairs in a .jsonl file; empty: random words")
    parser.add_argument("--tokenizer", default="", help="folder with tokenizer and chat template; empty: the toy's")
    parser.add_argument("--shape", default="llama-3.2-1b" if cuda else "20m", choices=SHAPES)
    parser.add_argument("--else-shape", choices=SHAPES, help="what runs when none of our ways could")
    parser.add_argument("--only", default="", help="comma-separated: ways whose name contains one of these")
    parser.add_argument("--pairs", type=int, default=32 if cuda else 4, help="pairs a step")
    parser.add_argument("--steps", type=int, default=8 if cuda else 4, help="steps of a round, the first not timed")
    parser.add_argument("--rounds", type=int, default=1 if cuda else 2)
    parser.add_argument("--tokens", type=whole_number(1), default=16384 if cuda else 4096,
                        help="ours: tokens of a micro-batch")
    parser.add_argument("--trl-pairs", type=whole_number(0), default=0, help="TRL: pairs of a micro-batch (default: 4)")
    parser.add_argument("--max-length", type=whole_number(32), default=2048)
    parser.add_argument("--checkpointing", nargs="+", choices=CHECKPOINTING,
                        default=CHECKPOINTING if cuda else ["none", "full"], help="ours: a way each")
    parser.add_argument("--compile", action="store_true", help="ours: torch.compile")
    parser.add_argument("--profile", action="store_true", help="ours: shares of forward, backward, optimizer as well")
    parser.add_argument("--ignore-plan", action="store_true", help="try what does not fit by the memory plan")
    add_output_flags(parser, "train_step.json")
    parser.add_argument("--way", help=argparse.SUPPRESS)  # of a child process
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    flags = parser.parse_args(argv)
    if min(flags.steps, flags.rounds + 1) < 2 or flags.pairs < 1:
        parser.error("--steps must be at least 2 (the first is not timed), --rounds and --pairs at least 1")
    flags.trl_pairs = flags.trl_pairs or min(4, flags.pairs)
    if flags.pairs % flags.trl_pairs:
        parser.error(f"--pairs {flags.pairs} must be a multiple of --trl-pairs {flags.trl_pairs}")
    ways = {name: options for name, options in ways_of(flags).items()
            if not flags.only or any(part in name for part in flags.only.split(","))}
    if not ways:
        parser.error(f"--only {flags.only}: no way's name contains that; there are {'; '.join(ways_of(flags))}")
    return flags, ways


def main(argv: list[str] | None = None) -> None:
    flags, ways = parse(argv)
    if flags.way:
        result = run_way(flags.way, flags.work, flags)
        (flags.work / "result.json").write_text(json.dumps(result), encoding="utf-8")
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    head = {"machine": machine(device) | {name: installed_version(name) for name in ("transformers", "trl")},
            "pairs_a_step": flags.pairs, "max_length": flags.max_length,
            "data": Path(flags.data).name or "random words", "tokenizer": Path(flags.tokenizer).name or "the toy's"}
    report = Report(output_path(flags, device, "train_step.json"), head, ("model", "way", "micro_batch"),
                    ("ours_faster", "ours_memory"))
    print_machine(head)
    missing = missing_peer() if any(name.startswith("TRL") for name in ways) else ""
    if missing:
        print(f"not here: TRL, so none of its ways: {missing}", flush=True)
    arguments = sys.argv[1:] if argv is None else argv
    rows = run_shape(flags.shape, ways, missing, arguments, flags, report)
    if flags.else_shape and not any("step_seconds" in row for row in rows if row["way"].startswith("ours")):
        print(f"{flags.shape} did not run here: {flags.else_shape} instead", flush=True)
        rows = run_shape(flags.else_shape, ways, missing, arguments, flags, report)
    print(f"\n{HEADER}")
    for row in report.rows:
        if not missing or row.get("note") != missing:  # it was said at the top
            print(show(row))
    print(f"\n{conclusion(rows)}")
    report.finish()


if __name__ == "__main__":
    main()
