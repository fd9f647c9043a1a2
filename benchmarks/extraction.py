"""Time and memory of the judge pass against its limit and against the plain way.

    python benchmarks/extraction.py                              this machine's default shape, 1,024 and 4,096 tokens
    python benchmarks/extraction.py --lengths 1024 --pairs 16    more pairs at once

`ours` is what extract.py runs for both rounds of a pair: packed rows, shared beginnings, one fp32 row on the last
layer, the head at one position. The limit is a bare forward of the same trunk over the same rows, with SDPA and
nothing captured; beside it transformers' own SDPA, each round alone. `eager` is one round at a time with
output_attentions=True. The model is a random Llama: 8 layers, d 512 and V 32,000 on a CPU, the shape of Llama-3-8B on
a GPU. All ways are timed in turns, round after round; memory is the peak above the model. The last line is JSON.
"""

import argparse
import copy
import statistics
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from harness import finish, interleave, machine, peak_memory_mib, result_path
from twdpo.models.attention import ATTENTION_NAME, JudgeCapture, judge_forward, rollout_rows
from twdpo.models.build import decoder_layers
from twdpo.rows import pack

SHAPES = {
    "cpu": dict(num_hidden_layers=8, hidden_size=512, intermediate_size=1376, num_attention_heads=8,
                num_key_value_heads=8, vocab_size=32000),
    "cuda": dict(num_hidden_layers=32, hidden_size=4096, intermediate_size=14336, num_attention_heads=32,
                 num_key_value_heads=8, vocab_size=128256),
}
PREAMBLE, END = 249, 60  # tokens around the answers: the paper's prompt and a median question in Llama-3's tokens


def make_pairs(num_pairs: int, length: int, vocabulary: int) -> list[list[np.ndarray]]:
    """Both rounds of each pair, `length` tokens each: a common beginning, two answers in both orders, an end."""
    rng = np.random.default_rng(0)
    pairs = []
    for _ in range(num_pairs):
        begin, end = rng.integers(3, vocabulary, PREAMBLE), rng.integers(3, vocabulary, END)
        first, second = np.array_split(rng.integers(3, vocabulary, length - PREAMBLE - END), 2)
        pairs.append([np.concatenate([begin, *order, end]).astype(np.int32)
                      for order in ((first, second), (second, first))])
    return pairs


@torch.no_grad()
def judge(model, rows, rollout: bool) -> None:
    """Both rounds of every pair, as extract.py does it."""
    last = model.config.num_hidden_layers - 1
    for row in rows:
        capture = JudgeCapture(row, frozenset([last]), keep=rollout, final_layer=last)
        hidden_SD = judge_forward(model.get_decoder(), capture, last + 1, decoder_layers(model)[last])
        model.get_output_embeddings()(hidden_SD).float().log_softmax(dim=-1)
        torch.cat(capture.rows[last]).cpu()
        if rollout:
            torch.cat(rollout_rows(capture)).cpu()


@torch.no_grad()
def trunk(model, rows) -> None:
    """The limit: the same tokens through the same layers, nothing else."""
    for row in rows:
        capture = JudgeCapture(row, frozenset())
        judge_forward(model.get_decoder(), capture, model.config.num_hidden_layers)


@torch.no_grad()
def plain_trunk(model, pairs, device) -> None:
    """What transformers does with each round alone."""
    for ids in (ids for pair in pairs for ids in pair):
        model.get_decoder()(torch.from_numpy(ids).long()[None].to(device), use_cache=False)


@torch.no_grad()
def eager(model, pairs, device) -> None:
    """One round at a time, all maps of all layers."""
    for ids in (ids for pair in pairs for ids in pair):
        output = model(torch.from_numpy(ids).long()[None].to(device), output_attentions=True, use_cache=False)
        output.attentions[-1][0, :, -1].float().mean(dim=0).cpu()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--lengths", default="1024,4096", help="tokens of one judge input, comma-separated")
    parser.add_argument("--pairs", type=int, default=1, help="pairs in a batch; eager takes them one by one")
    parser.add_argument("--seconds", type=float, default=5.0, help="time for each way, of a length's rounds")
    parser.add_argument("--out", type=Path, help="JSON file; benchmarks/results/<device>/extraction.json by default")
    flags = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    config = LlamaConfig(**SHAPES[device.type], max_position_embeddings=1 << 14)
    with torch.device(device):  # a config each: a model keeps the one it is given, and the attention's name in it
        models = {name: AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype,
                                                         attn_implementation=name).eval()
                  for name in (ATTENTION_NAME, "sdpa", "eager")}
    report = {"machine": machine(device), "dtype": str(dtype).removeprefix("torch."), "shape": SHAPES[device.type],
              "rows": []}
    print(", ".join(f"{name} {value}" for name, value in report["machine"].items()))
    print(f"{'tokens':>6} {'way':24} {'s a pair':>9} {'20..80 %':>17} {'pairs/s':>8} {'x limit':>8} {'x eager':>8} "
          f"{'extra MiB':>9} {'of eager':>8}")
    for length in map(int, flags.lengths.split(",")):
        pairs = make_pairs(flags.pairs, length, config.vocab_size)
        rows = [pack(pairs)]
        ours = models[ATTENTION_NAME]
        ways = {"ours": partial(judge, ours, rows, False), "ours, with rollout": partial(judge, ours, rows, True),
                "limit: bare trunk": partial(trunk, ours, rows),
                "bare trunk, rounds apart": partial(plain_trunk, models["sdpa"], pairs, device),
                "eager, output_attentions": partial(eager, models["eager"], pairs, device)}
        for way in ways.values():
            way()  # warms up
        memory = {name: peak_memory_mib(way, device) for name, way in ways.items()}
        times = interleave(ways, device, flags.seconds)
        medians = {name: statistics.median(values) for name, values in times.items()}
        for name, values in times.items():
            ordered = sorted(value / flags.pairs / 1e3 for value in values)
            row = {"tokens": length, "way": name, "seconds_a_pair": medians[name] / flags.pairs / 1e3,
                   "p20": ordered[int(0.2 * len(ordered))], "p80": ordered[int(0.8 * len(ordered))],
                   "rounds": len(values), "over_limit": medians[name] / medians["limit: bare trunk"],
                   "speed_over_eager": medians["eager, output_attentions"] / medians[name],
                   "peak_extra_mib": memory[name],
                   "memory_over_eager": memory[name] / memory["eager, output_attentions"]}
            report["rows"].append(row)
            print(f"{length:6} {name:24} {row['seconds_a_pair']:9.3f} {row['p20']:8.3f}..{row['p80']:7.3f} "
                  f"{1 / row['seconds_a_pair']:8.2f} {row['over_limit']:8.2f} {row['speed_over_eager']:8.2f} "
                  f"{row['peak_extra_mib']:9.0f} {row['memory_over_eager']:8.3f}", flush=True)
    finish(flags.out or result_path(device, "extraction.json"), report)


if __name__ == "__main__":
    main()
