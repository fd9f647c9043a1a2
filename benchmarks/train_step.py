"""Training steps of DPO: this project's loop against TRL's DPOTrainer, same model, pairs and settings.

    python benchmarks/train_step.py --data pairs.jsonl --tokenizer FOLDER     on real pairs, in real tokens
    python benchmarks/train_step.py                                           on made-up pairs
    python benchmarks/train_step.py --only ours,precomputed                   ways whose name contains one of these
    python benchmarks/train_step.py --shape llama-3-8b --only ours --tokens 16384    does it fit a GPU, and at what MFU

Plain DPO with uniform weights, since TRL has no token weights; AdamW; fp32 on a CPU, bf16 compute on fp32 parameters on
a GPU. Every way runs in a process of its own, round after round, over the same pairs in the same order. A pair's time
is the median step's plus its share of the reference pass (TRL without precomputed log-probs does that in its steps; the
first step of a process is left out). Memory is the process's peak, parameters, gradients and optimizer included.
`loss` and `gradient norm` are those of the last step: equal numbers mean equal work.
On a GPU ours also gives TFLOP/s and MFU, and the model is random and never written. The last line is JSON.
"""
# ruff: noqa: E402 - train.py is no part of the installed package: its folder must be known first

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # train.py

from harness import finish, installed_version, machine, result_path
from train import Run, train_step
from twdpo import dist
from twdpo.batch import collate, plan_micro_batches
from twdpo.chat import tokenize_pairs
from twdpo.config import TrainConfig
from twdpo.log import StageClock
from twdpo.logps import response_logps
from twdpo.losses import LOSSES
from twdpo.models.memory import GIB, flops, model_cost, peak_tflops, plan_memory
from twdpo.models.policy import build_policy, load_policy, settle_packing
from twdpo.models.source import load_model_config, load_tokenizer
from twdpo.objective import bind_objective
from twdpo.pairs import Pair, load_dataset
from twdpo.rows import RowOptions, global_batch
from twdpo.toy.grammar import toy_rows
from twdpo.toy.train import build_tokenizer
from twdpo.weights import WEIGHTS, WeightContext

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
LR, BETA = 1e-6, 0.1
MANY = 1 << 40  # steps of a schedule whose first ones are all at the peak, as TRL's constant one
WAYS = {
    "ours": {},
    "ours, checkpointing": {"checkpointing": "full"},
    "TRL": {},
    "TRL, precomputed": {"precompute_ref_log_probs": True},
    "TRL, checkpointing": {"gradient_checkpointing": True},
    "TRL, precomputed, checkpointing": {"precompute_ref_log_probs": True, "gradient_checkpointing": True},
    "TRL, Liger": {"use_liger_kernel": True},
}


def make_pairs(flags, number: int) -> list[dict[str, str]]:
    """Rows of --data, evenly spaced, or of random words in lengths that real ones have."""
    if flags.data:
        pairs = load_dataset(flags.data, "").train
        pairs = pairs[::max(1, len(pairs) // number)][:number]
        return [{"prompt": pair.messages[-1][1], "chosen": pair.chosen, "rejected": pair.rejected} for pair in pairs]
    rng = random.Random(0)
    words = " ".join(row["chosen"] for row in toy_rows()[0]).split()

    def text(median: int) -> str:
        return " ".join(rng.choices(words, k=max(4, int(median * rng.lognormvariate(0, 0.6)))))
    return [{"prompt": text(120), "chosen": text(220), "rejected": text(200)} for _ in range(number)]


def prepare(flags, work: Path) -> None:
    """Write model, tokenizer and pairs that every way reads; on a GPU of the model only its config."""
    tokenizer = AutoTokenizer.from_pretrained(flags.tokenizer) if flags.tokenizer else build_tokenizer()
    config = LlamaConfig(**SHAPES[flags.shape], vocab_size=VOCABULARY, max_position_embeddings=8192,
                         rope_theta=500000.0, bos_token_id=None, eos_token_id=tokenizer.eos_token_id)
    torch.manual_seed(0)
    if flags.shape == "20m":
        AutoModelForCausalLM.from_config(config).save_pretrained(work / "model")
    else:
        config.save_pretrained(work / "model")
    tokenizer.save_pretrained(work / "model")
    rows = make_pairs(flags, flags.steps * flags.pairs)
    if len(rows) < flags.steps * flags.pairs:
        raise SystemExit(f"--data {flags.data} has {len(rows)} pairs, {flags.steps * flags.pairs} are needed")
    (work / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def run_ours(work: Path, flags, options: dict[str, object]) -> dict[str, float]:
    """`train.py`'s own functions: reference pass, then steps."""
    process = dist.start()
    checkpointing = options.get("checkpointing", "none")
    config = TrainConfig(model=str(work / "model"), data=str(work / "pairs.jsonl"), loss="dpo", beta=BETA, lr=LR,
                         warmup_ratio=0.0, batch_size=flags.pairs)
    dtype = torch.bfloat16 if process.device.type == "cuda" else torch.float32
    pairs: list[Pair] = load_dataset(config.data, "").train
    examples, bad, _ = tokenize_pairs(load_tokenizer(work / "model", ""), pairs, flags.max_length,
                                      flags.max_length - 16)
    assert len(examples) == len(pairs) and not bad
    batches = [global_batch(step, len(examples), flags.pairs, config.seed) for step in range(flags.steps)]
    order = [pair for batch in batches for pair in batch]
    examples = [example for _, example in sorted(zip(order, examples), key=lambda item: item[0])]  # in the file's order
    if flags.shape == "20m":
        policy = load_policy(work / "model", dtype, process, checkpointing)
    else:
        policy = build_policy(load_model_config(work / "model"), dtype, process, checkpointing, 1, flags.compile)
        policy.to_empty(device=process.device)
        policy.model.initialize_weights()
    rows = RowOptions(settle_packing(policy, "auto", examples, process), flags.tokens)
    started = time.perf_counter()
    logps = response_logps(policy, process, examples, batches, rows, work / "reference" / str(os.getpid()))
    reference_seconds = (time.perf_counter() - started) / len(examples)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LR, weight_decay=0.0, fused=True)
    run = Run(config, process, bind_objective(LOSSES["dpo"], WEIGHTS["uniform"], "uniform"), None, examples, [],
              WeightContext(config, logps={"reference": logps}), policy, optimizer, rows, MANY,
              StageClock(flags.profile, process.device))
    cost = model_cost(policy.model.config, dtype, flags.max_length, rows.packs)
    seconds, done, parts = [], [], {}
    for batch_pairs in batches:
        started = time.perf_counter()
        row = train_step(run)
        if process.device.type == "cuda":
            torch.cuda.synchronize()  # sync
        seconds.append(time.perf_counter() - started)
        (plan,) = plan_micro_batches(batch_pairs, examples, 1, rows)
        done.append(sum(flops(cost, collate(each, examples, batch_pairs, packs=rows.packs)) for each in plan))
        parts = {name: row[name] for name in row if name.endswith("_share")}
    figures = {"reference_seconds_a_pair": reference_seconds, "step_seconds": seconds, "loss": row["loss"],
               "gradient_norm": row["grad_norm"]} | parts
    if process.device.type == "cuda":
        rate = statistics.median(work / time for work, time in list(zip(done, seconds))[1:]) / 1e12
        planned = plan_memory(cost, 1, flags.tokens, checkpointing)["peak"] / GIB
        figures |= {"tflops": rate, "planned_gib": planned}
        if peak := peak_tflops(process.device):
            figures["mfu"] = rate / peak
    return figures


def run_trl(work: Path, flags, options: dict[str, object]) -> dict[str, float]:
    """TRL's DPOTrainer over the same pairs in the same order."""
    import datasets
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer
    seconds, log = [], {}

    class Times(TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.started = time.perf_counter()

        def on_step_end(self, *_, **__):
            seconds.append(time.perf_counter() - self.started)

        def on_log(self, args, state, control, logs=None, **_):
            log.update({name: value for name, value in logs.items() if name in ("loss", "grad_norm")})

    cuda = torch.cuda.is_available()
    if not cuda:  # hashing a dataset's functions by dill fails on some stacks
        datasets.fingerprint.Hasher.hash = classmethod(lambda cls, value: f"{id(value):x}")
    tokenizer = AutoTokenizer.from_pretrained(work / "model")
    rows = [json.loads(line) for line in (work / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]

    def turn(role: str, text: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text}]
    data = datasets.Dataset.from_list([
        {"prompt": turn("user", row["prompt"]), "chosen": turn("assistant", row["chosen"]),
         "rejected": turn("assistant", row["rejected"])} for row in rows])

    def load():
        if flags.shape == "20m":
            return AutoModelForCausalLM.from_pretrained(work / "model", dtype=torch.float32)
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(LlamaConfig.from_pretrained(work / "model"), dtype=torch.float32)
    precomputes = options.get("precompute_ref_log_probs", False)
    config = DPOConfig(output_dir=str(work / "trl"), per_device_train_batch_size=flags.pairs, learning_rate=LR,
                       beta=BETA, max_steps=flags.steps, lr_scheduler_type="constant", logging_steps=1, report_to=[],
                       save_strategy="no", bf16=cuda, use_cpu=not cuda, max_length=flags.max_length, disable_tqdm=True,
                       train_sampling_strategy="sequential",
                       **({"gradient_checkpointing": False} | options))
    started = time.perf_counter()
    trainer = DPOTrainer(load(), ref_model=None if precomputes else load(), args=config, train_dataset=data,
                         processing_class=tokenizer, callbacks=[Times()])
    built = time.perf_counter() - started  # with the reference pass, if there is one
    if precomputes:
        reference = DPOTrainer._precompute_ref_logps
        started = time.perf_counter()
        trainer._precompute_model_hash = "again"  # not from its cache
        reference(trainer, trainer.train_dataset.remove_columns(["ref_chosen_logps", "ref_rejected_logps"]), "train",
                  flags.pairs)
        built = time.perf_counter() - started
    trainer.train()
    return {"reference_seconds_a_pair": built / len(rows) if precomputes else 0.0, "step_seconds": seconds,
            "loss": log["loss"], "gradient_norm": log["grad_norm"]}


def run_way(name: str, work: Path, flags) -> dict[str, object]:
    """One way in this process; a way that can't run is a row that says why."""
    options = WAYS[name]
    try:
        figures = (run_ours if name.startswith("ours") else run_trl)(work, flags, options)
    except ImportError as error:
        return {"note": f"missing: {error}"}
    except torch.cuda.OutOfMemoryError:
        return {"note": "out of memory"}
    if torch.cuda.is_available():
        figures["peak_gib"] = torch.cuda.max_memory_allocated() / GIB
    else:
        figures["peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return figures


def summarize(name: str, runs: list[dict[str, object]], flags) -> dict[str, object]:
    """A row of the table from the rounds of one way."""
    note = next((run["note"] for run in runs if "note" in run), None)
    if note:
        return {"way": name, "note": note}
    steps = [seconds for run in runs for seconds in run["step_seconds"][1:]]
    a_pair = statistics.median(steps) / flags.pairs + statistics.median(run["reference_seconds_a_pair"] for run in runs)
    row = {"way": name, "pairs_per_s": 1 / a_pair, "step_seconds": statistics.median(steps),
           "reference_seconds_a_pair": statistics.median(run["reference_seconds_a_pair"] for run in runs),
           "fastest_step": min(steps), "slowest_step": max(steps), "steps": len(steps),
           "peak_gib": max(run["peak_gib"] for run in runs)}
    return row | {key: value for key, value in runs[-1].items() if key not in row}


def print_table(rows: list[dict[str, object]]) -> None:
    """The table; rows get their ratios to ours."""
    print(f"{'way':34} {'pairs/s':>8} {'ours is':>8} {'s a step':>9} {'reference':>10} {'peak GiB':>9} {'ours is':>8} "
          f"{'loss':>9} {'gradient':>9}")
    ours = next((row for row in rows if row["way"].startswith("ours") and "note" not in row), None)
    for row in rows:
        if "note" in row:
            print(f"{row['way']:34} {row['note']}")
            continue
        faster = memory = "-"
        if ours:
            row |= {"ours_faster": ours["pairs_per_s"] / row["pairs_per_s"],
                    "ours_memory": ours["peak_gib"] / row["peak_gib"]}
            faster, memory = f"{row['ours_faster']:.2f}x", f"{row['ours_memory']:.2f}x"
        print(f"{row['way']:34} {row['pairs_per_s']:8.3f} {faster:>8} {row['step_seconds']:9.2f} "
              f"{row['reference_seconds_a_pair']:10.3f} {row['peak_gib']:9.2f} {memory:>8} "
              f"{row['loss']:9.5f} {row['gradient_norm']:9.4f}"
              + (f"  {row['tflops']:.0f} TFLOP/s" if "tflops" in row else "")
              + (f", MFU {row['mfu']:.1%}" if "mfu" in row else ""))


def main(argv: list[str] | None = None) -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default="", help="pairs in a .jsonl file; empty: random words")
    parser.add_argument("--tokenizer", default="", help="folder with tokenizer and chat template; empty: the toy's")
    parser.add_argument("--shape", default="llama-3.2-1b" if cuda else "20m", choices=SHAPES)
    parser.add_argument("--only", default="", help="comma-separated: ways whose name contains one of these")
    parser.add_argument("--pairs", type=int, default=32 if cuda else 4, help="pairs a step")
    parser.add_argument("--steps", type=int, default=8 if cuda else 4, help="steps of a round, the first not timed")
    parser.add_argument("--rounds", type=int, default=1 if cuda else 2)
    parser.add_argument("--tokens", type=int, default=16384 if cuda else 4096, help="ours: tokens of a micro-batch")
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--profile", action="store_true", help="ours: shares of forward, backward, optimizer as well")
    parser.add_argument("--compile", action="store_true", help="ours: torch.compile, of shapes that are not written")
    parser.add_argument("--out", type=Path, help="JSON file; benchmarks/results/<device>/train_step.json by default")
    parser.add_argument("--way", help=argparse.SUPPRESS)  # of a child process
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    flags = parser.parse_args(argv)
    if flags.way:
        print(json.dumps(run_way(flags.way, flags.work, flags)))
        return
    names = [name for name in WAYS if not flags.only or any(part in name for part in flags.only.split(","))]
    if min(flags.steps, flags.rounds + 1) < 2 or flags.pairs < 1:
        parser.error("--steps must be at least 2 (the first is not timed), --rounds and --pairs at least 1")
    if not names:
        parser.error(f"--only {flags.only}: no way's name contains that; there are {'; '.join(WAYS)}")
    device = torch.device("cuda" if cuda else "cpu")
    report = {"machine": machine(device) | {name: installed_version(name) for name in ("transformers", "trl")},
              "shape": SHAPES[flags.shape] | {"vocab_size": VOCABULARY}, "pairs_a_step": flags.pairs,
              "data": Path(flags.data).name or "random words", "rows": []}
    print(", ".join(f"{name} {value}" for name, value in report["machine"].items()))
    runs: dict[str, list] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as work:
        prepare(flags, Path(work))
        arguments = sys.argv[1:] if argv is None else argv
        for number in range(flags.rounds):
            for name in names:
                command = [sys.executable, __file__, *arguments, "--way", name, "--work", work]
                child = subprocess.run(command, capture_output=True, text=True,
                                       env=os.environ | {"HF_HOME": f"{work}/home", "TQDM_DISABLE": "1"})
                if child.returncode:
                    runs[name].append({"note": f"failed: {child.stderr.strip().splitlines()[-1]}"})
                    print(child.stderr, file=sys.stderr)
                else:
                    runs[name].append(json.loads(child.stdout.strip().splitlines()[-1]))
                print(f"round {number + 1}: {name}: " + (runs[name][-1].get("note") or "steps of " + ", ".join(
                    f"{seconds:.2f}" for seconds in runs[name][-1]["step_seconds"]) + " s"), flush=True)
    report["rows"] = [summarize(name, runs[name], flags) for name in names]
    print_table(report["rows"])
    finish(flags.out or result_path(device, "train_step.json"), report)


if __name__ == "__main__":
    main()
