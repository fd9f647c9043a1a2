"""Time and memory of the judge pass against its limit and against the plain way.

    python benchmarks/extraction.py                              this machine's default shape, 1,024 and 4,096 tokens
    python benchmarks/extraction.py --lengths 1024 --pairs 16    more pairs at once
    python benchmarks/extraction.py --ragged                     inputs as long as those of real pairs, new in each call

`ours` is what extract.py runs for both rounds of a pair: packed rows, shared beginnings, one fp32 row on the last
layer, the head at one position. The limit is a bare forward of the same trunk over the same rows, with SDPA and
nothing captured; beside it transformers' own SDPA, each round alone, without cuDNN, which plans anew for every new
length. `eager` is one round at a time with
output_attentions=True. The model is a random Llama: 8 layers, d 512 and V 32,000 on a CPU, the shape of Llama-3-8B on
a GPU.

Each way is timed in turns with ours, round after round, and its row printed and written at once; ratios are of times in
the same turns. With --ragged no call gets an input as long as one of an earlier call, in the first 48 calls of the
process, as in a pass over real pairs: where a length that was not seen before costs something, it shows. What stays:
the tokens in all, but for an odd pair's up to 48 more or fewer, the preamble, and that a pair's two rounds are equally
long; inputs of one call may be. Memory is the peak above the model. The last line is JSON.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from harness import (
    Report,
    add_output_flags,
    amount,
    cudnn,
    interleave,
    machine,
    output_path,
    peak_memory_mib,
    print_machine,
    quiet_failure,
    real_lengths,
    spread,
    whole_number,
    whole_numbers,
)
from twdpo.models.attention import ATTENTION_NAME, JudgeCapture, judge_forward, rollout_rows
from twdpo.models.build import decoder_layers
from twdpo.rows import PackedRow, common_beginning, fill_rows, pack

SHAPES = {
    "cpu": dict(num_hidden_layers=8, hidden_size=512, intermediate_size=1376, num_attention_heads=8,
                num_key_value_heads=8, vocab_size=32000),
    "cuda": dict(num_hidden_layers=32, hidden_size=4096, intermediate_size=14336, num_attention_heads=32,
                 num_key_value_heads=8, vocab_size=128256),
}
PREAMBLE, END = 249, 60  # tokens around the answers: the paper's prompt and a median question in Llama-3's tokens
ROW_TOKENS = 1 << 14
NEW_CALLS = 48  # with --ragged, before lengths come again; a GPU's default needs 37
RAGGED_PAIRS = {"cpu": 2, "cuda": 32}
MINUTES = {"cpu": 8.0, "cuda": 4.0}
Pairs = list[list[np.ndarray]]  # both rounds of each pair


def make_pairs(answers: list[tuple[int, int]], vocabulary: int) -> Pairs:
    """Both rounds of each pair: a common beginning, two answers in both orders, an end. answers: their lengths."""
    rng = np.random.default_rng(0)
    pairs = []
    for lengths in answers:
        begin, end = rng.integers(3, vocabulary, PREAMBLE), rng.integers(3, vocabulary, END)
        first, second = (rng.integers(3, vocabulary, length) for length in lengths)
        pairs.append([np.concatenate([begin, *order, end]).astype(np.int32)
                      for order in ((first, second), (second, first))])
    return pairs


def equal_pairs(num_pairs: int, length: int, vocabulary: int) -> Pairs:
    """Every judge input has `length` tokens."""
    half = (length - PREAMBLE - END) // 2
    return make_pairs([(half, length - PREAMBLE - END - half)] * num_pairs, vocabulary)


def ragged_pairs(num_pairs: int, call: int, vocabulary: int) -> Pairs:
    """Judge inputs about as long as those of real pairs; no length of one call is of another of NEW_CALLS.

    Lengths are multiples of a step, and further by what no other call has, up and down by turns.
    """
    step, distance = 2 * NEW_CALLS + 1, call % NEW_CALLS + 1
    answers = []
    for place, (_, chosen, rejected) in enumerate(real_lengths(num_pairs)):
        middle = step * round((PREAMBLE + chosen + rejected + END) / step)
        both = middle + (distance if (place + call) % 2 else -distance) - PREAMBLE - END
        first = round(both * chosen / (chosen + rejected))
        answers.append((first, both - first))
    return make_pairs(answers, vocabulary)


def packed_rows(pairs: Pairs) -> list[PackedRow]:
    """As extract.py fills them."""
    lengths = [sum(map(len, pair)) - common_beginning(pair) for pair in pairs]
    return [pack([pairs[place] for place in row]) for row in fill_rows(lengths, ROW_TOKENS)]


@torch.no_grad()
def judge(model, pairs: Pairs, rollout: bool) -> None:
    """Both rounds of every pair, as extract.py does it."""
    last = model.config.num_hidden_layers - 1
    for row in packed_rows(pairs):
        capture = JudgeCapture(row, frozenset([last]), keep=rollout, final_layer=last)
        hidden_SD = judge_forward(model.get_decoder(), capture, last + 1, decoder_layers(model)[last])
        model.get_output_embeddings()(hidden_SD).float().log_softmax(dim=-1)
        torch.cat(capture.rows[last]).cpu()
        if rollout:
            torch.cat(rollout_rows(capture)).cpu()


@torch.no_grad()
def trunk(model, pairs: Pairs) -> None:
    """The limit: the same tokens through the same layers, nothing else."""
    for row in packed_rows(pairs):
        capture = JudgeCapture(row, frozenset())
        judge_forward(model.get_decoder(), capture, model.config.num_hidden_layers)


@torch.no_grad()
def plain_trunk(model, pairs: Pairs) -> None:
    """What transformers does with each round alone."""
    with cudnn(False):
        for ids in itertools.chain(*pairs):
            model.get_decoder()(torch.from_numpy(ids).long()[None].to(model.device), use_cache=False)


@torch.no_grad()
def eager(model, pairs: Pairs) -> None:
    """One round at a time, all maps of all layers."""
    for ids in itertools.chain(*pairs):
        output = model(torch.from_numpy(ids).long()[None].to(model.device), output_attentions=True, use_cache=False)
        output.attentions[-1][0, :, -1].float().mean(dim=0).cpu()


OURS, LIMIT, EAGER = "ours", "limit: bare trunk", "eager, output_attentions"
WAYS = {  # with the attention that the model then has
    OURS: (partial(judge, rollout=False), ATTENTION_NAME),
    LIMIT: (trunk, ATTENTION_NAME),
    EAGER: (eager, "eager"),
    "bare trunk, rounds apart": (plain_trunk, "sdpa"),
    "ours, with rollout": (partial(judge, rollout=True), ATTENTION_NAME),
}


def bind(model, name: str, draw: Callable[[], Pairs]) -> Callable[[], None]:
    """A way as a function of nothing. draw: gives the pairs of each call."""
    way, attention = WAYS[name]

    def run() -> None:
        if model.config._attn_implementation != attention:
            model.set_attn_implementation(attention)
        way(model, draw())
    return run


def measure(ways: dict[str, Callable], name: str, num_pairs: int, device, seconds: float, deadline: float) -> dict:
    """One way's figures, timed in turns with ours; a note if a call as long as the one before would be too late."""
    def first_call() -> None:
        ways[name]()
        if device.type == "cuda":
            torch.cuda.synchronize()  # sync
    took = []
    for call in (first_call, partial(peak_memory_mib, ways[name], device)):
        started = time.perf_counter()
        memory = call()
        took.append(time.perf_counter() - started)
        if started + 2 * took[-1] > deadline:
            return {"note": f"left out: no time for more after {len(took)} of its calls, {took[-1]:.1f} s the last"}
    first = took[0]
    times = interleave({each: ways[each] for each in dict.fromkeys((OURS, name))}, device, seconds, deadline)
    median = statistics.median(times[name])
    p20, p80 = (value / num_pairs / 1e3 for value in spread(times[name]))
    return {"seconds_a_pair": median / num_pairs / 1e3, "p20": p20, "p80": p80, "rounds": len(times[name]),
            "first_seconds_a_pair": first / num_pairs, "over_ours": median / statistics.median(times[OURS]),
            "peak_extra_mib": memory}


def add_ratios(rows: list[dict]) -> None:
    """What can be compared so far of the rows of one set of inputs: with the limit, and with eager attention."""
    measured = {row["way"]: row for row in rows if "note" not in row}
    limit, slow = measured.get(LIMIT), measured.get(EAGER)
    for row in measured.values():
        if limit:
            row["over_limit"] = row["over_ours"] / limit["over_ours"]
        if slow:
            row["speed_over_eager"] = slow["over_ours"] / row["over_ours"]
            if slow["peak_extra_mib"] > 0:
                row["memory_over_eager"] = row["peak_extra_mib"] / slow["peak_extra_mib"]


HEADER = (f"{'tokens':>6} {'way':25} {'s a pair':>9} {'20 to 80 %':>17} {'first call':>10} {'x ours':>7} "
          f"{'MiB extra':>9}\n{'':42} {'of rounds':>17} {'s a pair':>10}")


def show(row: dict) -> str:
    start = f"{row['tokens']:6} {row['way']:25} "
    if "note" in row:
        return start + row["note"]
    return (f"{start}{row['seconds_a_pair']:9.3f} {row['p20']:8.3f}..{row['p80']:7.3f} "
            f"{row['first_seconds_a_pair']:10.3f} {row['over_ours']:7.2f} {row['peak_extra_mib']:9.0f}")


def conclusion(rows: list[dict]) -> str:
    """What the rows of one set of inputs say, for a person."""
    measured = {row["way"]: row for row in rows if "note" not in row}
    if OURS not in measured:
        return f"{rows[0]['tokens']:,} tokens: ours was not measured."
    ours = measured[OURS]
    tokens = f"{ours['tokens']:,} tokens" + (" on average" if ours.get("ragged") else "")
    text = f"{tokens}: {ours['seconds_a_pair']:.3f} s a pair"
    if "over_limit" in ours:
        text += f", {ours['over_limit']:.2f} times the bare trunk"
    if "speed_over_eager" in ours:
        text += f", {ours['speed_over_eager']:.1f} times as fast as eager attention"
    if "memory_over_eager" in ours:
        text += f" with {ours['memory_over_eager']:.3f} of its extra memory"
    return text + "."


def run_set(model, report: Report, draw: Callable[[], Pairs], named: dict, flags, deadline: float) -> list[dict]:
    """All ways over one kind of inputs, `named` in their rows."""
    ways = {name: bind(model, name, draw) for name in WAYS}
    rows: list[dict] = []
    for name in ways:
        row = named | {"way": name}
        if time.perf_counter() > deadline:
            row["note"] = f"left out: it does not fit the {flags.minutes:g} minutes"
        else:
            try:
                row |= measure(ways, name, named["pairs"], model.device, flags.seconds, deadline)
            except Exception as error:  # a way's failure is a row, not the end of the run
                row["note"] = quiet_failure(error)
            if model.device.type == "cuda":
                torch.cuda.empty_cache()
        rows.append(row)
        add_ratios(rows)
        print(show(row), flush=True)
        report.add(row)
    return rows


def parse(argv: list[str] | None, device: torch.device) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--lengths", type=whole_numbers(PREAMBLE + END + 2), default="1024,4096",
                        help="tokens of one judge input, comma-separated")
    parser.add_argument("--ragged", action="store_true", help="lengths of real pairs instead")
    parser.add_argument("--pairs", type=whole_number(0), default=0, help="pairs in a call; eager takes them one by one "
                        f"(default: 1; with --ragged {RAGGED_PAIRS[device.type]})")
    parser.add_argument("--seconds", type=amount, default=5.0, help="time for each way, and for ours in its turns")
    parser.add_argument("--minutes", type=amount, default=MINUTES[device.type], help="when no further way is begun")
    add_output_flags(parser, "extraction.json")
    flags = parser.parse_args(argv)
    flags.pairs = flags.pairs or (RAGGED_PAIRS[device.type] if flags.ragged else 1)
    return flags


def main(argv: list[str] | None = None) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    flags = parse(argv, device)
    deadline = time.perf_counter() + 60 * flags.minutes
    dtype, shape = torch.bfloat16 if device.type == "cuda" else torch.float32, SHAPES[device.type]
    report = Report(output_path(flags, device, "extraction.json"),
                    {"machine": machine(device), "dtype": str(dtype).removeprefix("torch."), "shape": shape},
                    ("tokens", "way", "ragged", "pairs"), ("over_limit", "speed_over_eager", "memory_over_eager"))
    print_machine(report.head)
    print(f"at most about {flags.minutes:g} minutes\n{HEADER}", flush=True)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**shape, max_position_embeddings=1 << 14), dtype=dtype,
                                                 attn_implementation=ATTENTION_NAME).eval()
    vocabulary, num_pairs = shape["vocab_size"], flags.pairs
    sets = []
    if flags.ragged:
        calls = itertools.count()
        tokens = round(np.mean([len(ids) for pair in ragged_pairs(num_pairs, 0, vocabulary) for ids in pair]))
        sets.append((lambda: ragged_pairs(num_pairs, next(calls), vocabulary), {"tokens": tokens, "ragged": True}))
    else:
        for length in flags.lengths:
            pairs = equal_pairs(num_pairs, length, vocabulary)
            sets.append((lambda pairs=pairs: pairs, {"tokens": length}))
    ends = [conclusion(run_set(model, report, draw, named | {"pairs": num_pairs}, flags, deadline))
            for draw, named in sets]
    print("\n" + "\n".join(ends))
    if flags.ragged and next(calls) > NEW_CALLS:
        print(f"After {NEW_CALLS} calls the lengths came again.")
    report.finish()


if __name__ == "__main__":
    main()
