"""What a sequence length that was not seen before costs attention, forward and backward.

    python benchmarks/attention.py                one layer of Llama-3-8B's attention on a GPU, a small one elsewhere
    python benchmarks/attention.py --trials 5

Packed rows give every sequence a length of its own. Two rows of as many tokens but for 2 % at most, 40 sequences each:
all of one length, and of 40 lengths; no length ever came before in the process. Each row is run for the first time and
once more, after a warm-up of other lengths; the trials take turns in which row comes first, and one before them does
not count. Three ways:

- ours: the layer as a training step runs it, a packed row through twdpo.models.attention, cuDNN off
- SDPA by sequence, cuDNN off: torch's scaled_dot_product_attention, one call a sequence, attention alone
- SDPA by sequence: the same with the backend that torch picks (cuDNN on a Hopper card; it plans every new shape)

The ratio that counts: the first time of 40 lengths over the first time of 40 sequences of one length. The layer's MLP
is cut to a width of 64: its time is not attention's. The last line is JSON.
"""

import argparse
import statistics
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, LlamaConfig

from harness import (
    Report,
    add_output_flags,
    cudnn,
    machine,
    milliseconds,
    output_path,
    print_machine,
    quiet_failure,
)
from twdpo.models.attention import ATTENTION_NAME, Layout, run_decoder
from twdpo.rows import pack

SEQUENCES = 40
SHAPES = {
    "cuda": dict(hidden_size=4096, num_attention_heads=32, num_key_value_heads=8),
    "cpu": dict(hidden_size=128, num_attention_heads=4, num_key_value_heads=2),
}
MEAN_TOKENS = {"cuda": 500, "cpu": 300}
TRIALS = {"cuda": 2, "cpu": 3}
OURS, WITHOUT, PICKED = WAYS = "ours", "SDPA by sequence, cuDNN off", "SDPA by sequence"


def new_lengths(mean: int, trial: int, trials: int) -> dict[str, list[int]]:
    """Lengths of the sequences of three rows; no two trials of `trials` have one in common, nor have a trial's rows.

    The row of 40 lengths has `mean` on average, that of one length is at most trials / 2 from it; the warm-up has two
    lengths.
    """
    # Distances from the mean: the least are for rows of one length, then of two, then of 40.
    one = mean + (trial + 1) // 2 * (-1) ** trial
    far = trials // 2 + 1 + trial
    distances = [trials // 2 + 1 + trials * (place + 1) + trial for place in range(SEQUENCES // 2)]
    return {"warm-up": [mean - far, mean + far] * (SEQUENCES // 2), "one_length": [one] * SEQUENCES,
            "40_lengths": [mean + sign * distance for distance in distances for sign in (-1, 1)]}


def build_layer(device: torch.device, dtype: torch.dtype):
    """A decoder of one layer."""
    config = LlamaConfig(**SHAPES[device.type], num_hidden_layers=1, intermediate_size=64, vocab_size=256,
                         max_position_embeddings=8192)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=ATTENTION_NAME).get_decoder()


def packed_layer(decoder, lengths: list[int]) -> Callable[[], None]:
    """Forward and backward of one packed row; its tensors are made before."""
    row = pack([[np.arange(length, dtype=np.int32) % 256] for length in lengths])
    ids_1T, positions_1T = (torch.from_numpy(part).long()[None].to(decoder.device)
                            for part in (row.input_ids_T, row.positions_T))

    def run() -> None:
        hidden_1TD = run_decoder(decoder, ids_1T, positions_1T, Layout(row.ranges))
        hidden_1TD.backward(torch.ones_like(hidden_1TD))
        decoder.zero_grad()
    return run


def sdpa_by_sequence(device: torch.device, dtype: torch.dtype, lengths: list[int]) -> Callable[[], None]:
    """Forward and backward of torch's attention alone, a call a sequence."""
    shape = SHAPES[device.type]
    size = shape["hidden_size"] // shape["num_attention_heads"]
    heads = [shape["num_attention_heads"], shape["num_key_value_heads"], shape["num_key_value_heads"]]
    operands = [torch.randn(1, count, sum(lengths), size, device=device, dtype=dtype, requires_grad=True)
                for count in heads]

    def run() -> None:
        parts = zip(*(operand.split(lengths, dim=2) for operand in operands))
        outputs = [F.scaled_dot_product_attention(*part, is_causal=True, enable_gqa=True) for part in parts]
        output_1HTD = torch.cat(outputs, dim=2)
        torch.autograd.grad(output_1HTD, operands, torch.ones_like(output_1HTD))
    return run


def measure(build: Callable[[list[int]], Callable], device: torch.device, rows_of_trials: list[dict[str, list[int]]]
            ) -> dict[str, object]:
    """Milliseconds, medians over the trials but the first, which is a rehearsal."""
    times: dict[str, list[float]] = {f"{turn}_ms_{name}": [] for name in ("40_lengths", "one_length")
                                     for turn in ("first", "again")}
    for trial, rows in enumerate(rows_of_trials):
        warm_up = build(rows["warm-up"])
        for name in ("40_lengths", "one_length")[::-1 if trial % 2 else 1]:
            warm_up()
            run = build(rows[name])
            for turn in ("first", "again"):
                if device.type == "cuda":
                    torch.cuda.synchronize()  # sync
                times[f"{turn}_ms_{name}"].append(milliseconds(run, device))
    row: dict[str, object] = {name: statistics.median(values[1:]) for name, values in times.items()}
    return row | {"ratio": row["first_ms_40_lengths"] / row["first_ms_one_length"], "trials": len(rows_of_trials) - 1}


HEADER = (f"{'':30}{'40 lengths, ms':^22}{'one length, ms':^22}{'ratio of the':>14}\n"
          f"{'':30}{'first time':>11}{'again':>11}{'first time':>11}{'again':>11}{'first times':>14}")


def show(row: dict) -> str:
    if "note" in row:
        return f"{row['way']:30}{row['note']}"
    figures = (row[f"{turn}_ms_{name}"] for name in ("40_lengths", "one_length") for turn in ("first", "again"))
    return f"{row['way']:30}" + "".join(f"{figure:11.2f}" for figure in figures) + f"{row['ratio']:14.2f}"


def parse(argv: list[str] | None, device: torch.device) -> tuple[argparse.Namespace, list[str], list[dict]]:
    """(flags, ways, the lengths of all their trials)."""
    ways = list(WAYS) if device.type == "cuda" else [OURS, PICKED]
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--trials", type=int, default=TRIALS[device.type], help="of each way")
    add_output_flags(parser, "attention.json")
    flags = parser.parse_args(argv)
    number = (flags.trials + 1) * len(ways)
    lengths = [new_lengths(MEAN_TOKENS[device.type], trial, number) for trial in range(number)]
    if flags.trials < 1 or min(length for rows in lengths for row in rows.values() for length in row) < 1:
        parser.error(f"--trials {flags.trials}: there must be at least 1, and so few that no length comes twice")
    return flags, ways, lengths


def main(argv: list[str] | None = None) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    flags, ways, lengths = parse(argv, device)
    mean = MEAN_TOKENS[device.type]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    head = {"machine": machine(device), "dtype": str(dtype).removeprefix("torch."), "shape": SHAPES[device.type],
            "sequences": SEQUENCES, "tokens_a_sequence": mean}
    report = Report(output_path(flags, device, "attention.json"), head, ("way",))
    print_machine(head)
    print(f"{SEQUENCES} sequences of about {mean} tokens in a row, {dtype}, forward and backward: about a minute\n"
          f"\n{HEADER}", flush=True)
    decoder = build_layer(device, dtype)

    def ours(lengths: list[int]) -> Callable:
        return packed_layer(decoder, lengths)

    def sdpa(lengths: list[int]) -> Callable:
        return sdpa_by_sequence(device, dtype, lengths)
    for place, name in enumerate(ways):
        try:
            with cudnn(name == PICKED):
                row = {"way": name} | measure(ours if name == OURS else sdpa, device, lengths[place::len(ways)])
        except Exception as error:  # a way's failure is a row, not the end of the run
            row = {"way": name, "note": quiet_failure(error)}
        print(show(row), flush=True)
        report.add(row)
    if "ratio" in report.rows[0]:
        print(f"\nours: the first time 40 sequences of 40 new lengths take {report.rows[0]['ratio']:.2f} times as long "
              "as 40 of one new length.")
    report.finish()


if __name__ == "__main__":
    main()
