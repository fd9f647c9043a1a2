"""The two loops that train_step.py compares, each run in a process of its own: this project's and TRL's.

Both print what they are doing as they go, and return seconds of each step, of the reference pass, and the last step's
loss and gradient norm.
"""
# ruff: noqa: E402 - train.py is no part of the installed package: its folder must be known first

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # train.py

from train import Run, train_step
from twdpo import dist
from twdpo.batch import collate, plan_micro_batches
from twdpo.chat import Chat
from twdpo.config import TrainConfig
from twdpo.dataset import load_dataset
from twdpo.log import StageClock
from twdpo.logps import response_logps
from twdpo.losses import LOSSES
from twdpo.models.memory import flops, model_cost, peak_tflops
from twdpo.models.policy import build_policy, load_policy, settle_packing
from twdpo.models.source import load_model_config, load_tokenizer
from twdpo.objective import bind_objective
from twdpo.pairs import Pair
from twdpo.rows import RowOptions, global_batch
from twdpo.tokens import tokenize_pairs
from twdpo.weights import WEIGHTS, WeightContext

LR, BETA = 1e-6, 0.1
MANY = 1 << 40  # steps of a schedule whose first ones are all at the peak, as TRL's constant one
STARTED = time.perf_counter()


def progress(text: str) -> None:
    print(f"{time.perf_counter() - STARTED:6.1f} s: {text}", flush=True)


def run_ours(work: Path, flags: argparse.Namespace, options: dict[str, object]) -> dict[str, object]:
    """`train.py`'s own functions: reference pass, then steps."""
    process = dist.start()
    checkpointing = options["checkpointing"]
    config = TrainConfig(model=str(work / "model"), data=str(work / "pairs.jsonl"), loss="dpo", beta=BETA, lr=LR,
                         warmup_ratio=0.0, batch_size=flags.pairs)
    dtype = torch.bfloat16 if process.device.type == "cuda" else torch.float32
    pairs: list[Pair] = load_dataset(config.data, "").train
    examples, bad, _ = tokenize_pairs(Chat(load_tokenizer(work / "model", "")), pairs, flags.max_length,
                                      flags.max_length - 16)
    assert len(examples) == len(pairs) and not bad
    batches = [global_batch(step, len(examples), flags.pairs, config.seed) for step in range(flags.steps)]
    order = [pair for batch in batches for pair in batch]
    examples = [example for _, example in sorted(zip(order, examples), key=lambda item: item[0])]  # in the file's order
    if flags.shape == "20m":
        policy = load_policy(work / "model", dtype, process, checkpointing, 1, flags.compile)
    else:
        policy = build_policy(load_model_config(work / "model"), dtype, process, checkpointing, 1, flags.compile)
        policy.to_empty(device=process.device)
        policy.model.initialize_weights()
    progress(f"{sum(parameter.numel() for parameter in policy.parameters()) / 1e9:.2f} B parameters made")
    rows = RowOptions(settle_packing(policy, "auto", examples, process), flags.tokens)
    started = time.perf_counter()
    logps = response_logps(policy, process, examples, batches, rows, work / "reference" / str(os.getpid()))
    reference_seconds = (time.perf_counter() - started) / len(examples)
    progress(f"reference pass of {len(examples)} pairs: {reference_seconds * len(examples):.2f} s")
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LR, weight_decay=0.0, fused=True)
    run = Run(config, process, bind_objective(LOSSES["dpo"], WEIGHTS["uniform"], "uniform"), None, examples, {},
              WeightContext(config, logps={"reference": logps}), policy, optimizer, rows, MANY,
              StageClock(flags.profile, process.device))
    cost = model_cost(policy.model.config, dtype, flags.max_length, rows.packs, measure_layers=False)
    seconds, done, tokens, parts = [], [], [], {}
    for batch_pairs in batches:
        started = time.perf_counter()
        row = train_step(run)
        if process.device.type == "cuda":
            torch.cuda.synchronize()  # sync
        seconds.append(time.perf_counter() - started)
        (plan,) = plan_micro_batches(batch_pairs, examples, 1, rows)
        micro_batches = [collate(each, examples, batch_pairs, packs=rows.packs) for each in plan]
        done.append(sum(flops(cost, batch) for batch in micro_batches))
        tokens.append(sum(batch.input_ids_RT.numel() for batch in micro_batches))
        progress(f"step {len(seconds)} of {flags.steps}: {seconds[-1]:.2f} s, {tokens[-1]:,} tokens, loss "
                 f"{row['loss']:.4f}")
        parts = {name: row[name] for name in row if name.endswith("_share")}
    figures = {"reference_seconds_a_pair": reference_seconds, "step_seconds": seconds, "loss": float(row["loss"]),
               "gradient_norm": float(row["grad_norm"]), "tokens_a_step": statistics.mean(tokens),
               "micro_batch_tokens": flags.tokens} | parts
    if process.device.type == "cuda":
        rate = statistics.median(work / time for work, time in list(zip(done, seconds))[1:]) / 1e12
        figures["tflops"] = rate
        if peak := peak_tflops(process.device):
            figures["mfu"] = rate / peak
    return figures


def run_trl(work: Path, flags: argparse.Namespace, options: dict[str, object]) -> dict[str, object]:
    """TRL's DPOTrainer over the same pairs in the same order, --trl-pairs of them in a micro-batch."""
    import datasets
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer
    seconds, log = [], {}

    class Times(TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.started = time.perf_counter()

        def on_step_end(self, *_, **__):
            seconds.append(time.perf_counter() - self.started)
            progress(f"step {len(seconds)} of {flags.steps}: {seconds[-1]:.2f} s")

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
        with torch.device("cuda" if cuda else "cpu"):
            return AutoModelForCausalLM.from_config(LlamaConfig.from_pretrained(work / "model"), dtype=torch.float32)
    precomputes = options.get("precompute_ref_log_probs", False)
    config = DPOConfig(output_dir=str(work / "trl"), per_device_train_batch_size=flags.trl_pairs,
                       gradient_accumulation_steps=flags.pairs // flags.trl_pairs, learning_rate=LR, beta=BETA,
                       max_steps=flags.steps, lr_scheduler_type="constant", logging_steps=1, report_to=[],
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
                  flags.trl_pairs)
        built = time.perf_counter() - started
    progress("trainer built" + (f", reference pass: {built:.2f} s" if precomputes else ""))
    trainer.train()
    return {"reference_seconds_a_pair": built / len(rows) if precomputes else 0.0, "step_seconds": seconds,
            "loss": log["loss"], "gradient_norm": log["grad_norm"]}
