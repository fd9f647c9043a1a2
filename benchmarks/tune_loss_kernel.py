"""Where the fused op's time goes on this GPU, and which tile shapes and wave sizes are fastest.

    python benchmarks/tune_loss_kernel.py                       Llama-3-8B head at 4,096 and 16,384 tokens, bf16
    python benchmarks/tune_loss_kernel.py --tokens 4096 --vocabulary 256000 --hidden 2304

Needs a GPU. First table: the parts of one forward and backward pass at the default tiles, against the time of the same
operations in bare matrix products. Second: every tile shape below, each kernel by itself, and the best tile of each.
Third: the backward pass by wave size. Everything goes to runs/benchmarks/<device>/tune_loss_kernel.json; the best
tiles belong in TILES of kernels/weighted_logratio.py. The last line is JSON.
"""

import argparse
import statistics
import sys
from dataclasses import asdict, replace
from functools import partial

import torch
from triton.runtime.errors import OutOfResources

from harness import (
    add_output_flags,
    amount,
    finish,
    interleave,
    machine,
    output_path,
    whole_number,
    whole_numbers,
    write_result,
)
from loss_kernel import make_case, matrix_products
from twdpo.kernels import weighted_logratio as kernels

SHAPES = ((128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (256, 128, 64, 8, 3), (256, 128, 64, 8, 4), (128, 128, 64, 8, 3),
          (128, 128, 64, 4, 4), (128, 128, 128, 8, 3))
TILES = [kernels.Tile(*shape, descriptors=descriptors) for descriptors in (True, False) for shape in SHAPES]
GROUPS = (4, 8, 32)  # for the best tile of each kernel; the others take the default
TIMES = {"statistics": "forward_ms", "gradient": "gradient_ms"}  # of the kernels, as Tiles names them
WAVES_MIB = (40, 80, 160, 320, 640)


class Calls:
    """Collects the launches and matrix products of one pass, to time each by itself."""

    def __init__(self):
        self.functions: dict[str, list] = {}

    def wrap(self, name: str, function):
        """A stand-in for `function` that runs it and notes the call."""
        def noted(*args, **kwargs):
            self.functions.setdefault(name, []).append(partial(function, *args, **kwargs))
            return function(*args, **kwargs)
        return noted


def passes(case, plan: kernels.Plan):
    """(forward(), backward()) of one case, without autograd."""
    hidden_ND, head_VD, batch = case
    offsets = torch.nn.functional.pad(batch["seq_lens_S"].cumsum(0), (1, 0)).to(hidden_ND.device)
    operands = hidden_ND.detach(), head_VD.detach(), None, batch["targets_N"]

    def forward():
        return kernels.forward(*operands, batch["ref_logps_N"], batch["weights_N"], offsets, batch["scale_S"], plan)
    softmax, coefficients_N = forward()[2], batch["weights_N"] / len(hidden_ND)

    def backward():
        return kernels.backward(*operands, softmax, coefficients_N, {}, None, plan, (True, True, False))
    return forward, backward


def parts(case, plan: kernels.Plan, device, seconds: float) -> dict[str, float]:
    """Median milliseconds of each part of a forward and backward pass, all its calls together."""
    calls = Calls()
    launched = ("tile_statistics_kernel", "finish_tokens_kernel", "sum_sequences_kernel", "logits_gradient_kernel")
    before = {name: getattr(kernels, name) for name in (*launched, "_set_product", "_add_product")}

    class Launcher:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return calls.wrap(self.name, before[self.name][grid])
    try:
        for name in before:
            stand_in = Launcher(name) if name in launched else calls.wrap(name, before[name])
            setattr(kernels, name, stand_in)
        for run in passes(case, plan):
            run()
    finally:
        for name, function in before.items():
            setattr(kernels, name, function)

    def run_all(functions):
        for function in functions:
            function()
    functions = {name: partial(run_all, functions) for name, functions in calls.functions.items()}
    functions |= dict(zip(("whole forward", "whole backward"), passes(case, plan)))
    return {name: statistics.median(times) for name, times in interleave(functions, device, seconds).items()}


def try_tile(case, tile: kernels.Tile, device, seconds: float) -> dict[str, object]:
    """Times of the two tile kernels with this tile; printed."""
    row: dict[str, object] = {"tile": tile}
    try:
        plan = kernels.Plan(None, None, kernels.Tiles(*3 * (tile,)), kernels.WAVE_MIB)
        times = parts(case, plan, device, seconds)
        row |= {"forward_ms": times["tile_statistics_kernel"], "gradient_ms": times["logits_gradient_kernel"]}
        operations = 2 * case[0].numel() * len(case[1]) / 1e9
        result = f"{operations / row['forward_ms']:16.0f} {operations / row['gradient_ms']:11.0f}"
    except OutOfResources as error:
        row["note"] = result = f"does not fit: {error}"
    print(f"{tile.block_n:4}x{tile.block_v}x{tile.block_d:<3} {tile.num_warps:5} {tile.num_stages:6} "
          f"{tile.group_n:5} {tile.descriptors!s:>11} {result}", flush=True)
    return row


def best_tiles(rows: list[dict[str, object]]) -> dict[str, kernels.Tile]:
    """{kernel: its fastest tile}."""
    fit = [row for row in rows if "note" not in row]
    return {kernel: min(fit, key=lambda row: row[time])["tile"] for kernel, time in TIMES.items()}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=whole_numbers(2), default="4096,16384", help="comma-separated")
    parser.add_argument("--vocabulary", type=whole_number(1), default=128256)
    parser.add_argument("--hidden", type=whole_number(1), default=4096)
    parser.add_argument("--seconds", type=amount, default=0.3, help="time for each function")
    add_output_flags(parser, "tune_loss_kernel.json")
    flags = parser.parse_args(argv)
    if not torch.cuda.is_available() or kernels.INTERPRETED:
        sys.exit("tune_loss_kernel.py times Triton kernels: it needs a GPU, and TRITON_INTERPRET unset")
    device = torch.device("cuda")
    default = kernels.default_tiles(torch.bfloat16, torch.cuda.get_device_capability())
    report: dict[str, object] = {"machine": machine(device), "vocabulary": flags.vocabulary, "hidden": flags.hidden,
                                 "parts": [], "tiles": [], "best": [], "waves": []}
    print(", ".join(f"{name} {value}" for name, value in report["machine"].items()))
    out = output_path(flags, device, "tune_loss_kernel.json")
    for num_tokens in flags.tokens:
        case = make_case(flags.vocabulary, flags.hidden, num_tokens, device, torch.bfloat16)
        nvd = num_tokens * flags.vocabulary * flags.hidden
        products, operations = matrix_products(*case[:2])
        rate = operations / sum(map(statistics.median, interleave(products, device, flags.seconds).values())) / 1e9
        print(f"\n{num_tokens} tokens; bare matrix products: {rate:.0f} TFLOP/s; 8 N V D at that rate: "
              f"{8 * nvd / rate / 1e9:.2f} ms\n{'part':28} {'ms':>8} {'TFLOP/s':>8}")
        for name, time_ms in parts(case, kernels.Plan(None, None, default, kernels.WAVE_MIB), device,
                                   flags.seconds).items():
            gemms = {"whole forward": 2, "whole backward": 6, "finish_tokens_kernel": 0, "sum_sequences_kernel": 0}
            tflops = gemms.get(name, 2) * nvd / time_ms / 1e9
            print(f"{name:28} {time_ms:8.3f} {tflops:8.0f}", flush=True)
            report["parts"].append({"tokens": num_tokens, "part": name, "ms": time_ms, "tflops": tflops,
                                    "matrix_tflops": rate})
        print(f"\n{'tile':>12} warps stages group descriptors {'forward TFLOP/s':>16} {'dZ TFLOP/s':>11}")
        rows = [try_tile(case, tile, device, flags.seconds) for tile in TILES]
        for tile in dict.fromkeys(best_tiles(rows).values()):
            rows += [try_tile(case, replace(tile, group_n=group), device, flags.seconds) for group in GROUPS]
        report["tiles"] += [row | {"tokens": num_tokens, "tile": asdict(row["tile"])} for row in rows]
        for kernel, tile in best_tiles(rows).items():
            print(f"best for {kernel}: {tile}", flush=True)
            report["best"].append({"tokens": num_tokens, "kernel": kernel, "tile": asdict(tile)})
        print(f"\n{'wave MiB':>8} {'columns':>8} {'backward ms':>12}")
        for wave_mib in WAVES_MIB:
            _, backward = passes(case, kernels.Plan(None, None, default, wave_mib))
            (times,) = interleave({"backward": backward}, device, flags.seconds).values()
            columns = kernels.wave_columns(num_tokens, flags.vocabulary, 2, wave_mib,
                                           default.gradient.block_v)
            print(f"{wave_mib:8} {columns:8} {statistics.median(times):12.2f}", flush=True)
            report["waves"].append({"tokens": num_tokens, "wave_mib": wave_mib, "columns": columns,
                                    "backward_ms": statistics.median(times)})
        del case
        write_result(out, report)
    finish(out, report)


if __name__ == "__main__":
    main()
