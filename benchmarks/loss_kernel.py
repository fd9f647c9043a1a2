"""Time, memory and error of the fused op against every other way to the same token-weighted DPO loss.

    python benchmarks/loss_kernel.py                                       everything this machine can run
    python benchmarks/loss_kernel.py --heads llama-3-8b --tokens 4096,16384 --only Triton,TRL

On a GPU: bf16, heads of Llama-3-8B, Gemma-2-2B and Qwen2.5-7B, and trl#7244's public row. Without one: the CPU paths in
fp32 at small sizes. A head and token count at a time is measured, its methods in turns, round after round, and its rows
are printed and written to --out; a method that is missing or out of memory is a row too. The last line is JSON.

Columns: median of forward and of forward + backward in ms, with the 20th and 80th percentiles of the latter; the rate
that the method's own operations (6 or 8 N V D) ran at, and its share of the rate of the head's three bare matrix
products in the same run; time over that of 8 N V D at that rate; peak memory above inputs and gradients; relative
(Frobenius) error of log-probs and gradients against fp64, at the first --error-tokens tokens.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from harness import interleave, machine, peak_memory_mib, result_path, write_result
from loss_peers import Method, find_methods
from twdpo.logratio import HeadOptions, weighted_logratio_chunked

# name: (vocabulary, hidden size, softcap)
GPU_HEADS = {"llama-3-8b": (128256, 4096, None), "gemma-2-2b": (256000, 2304, 30.0), "qwen2.5-7b": (152064, 3584, None)}
CPU_HEADS = {"v32k": (32000, 512, None), "v128k": (128256, 512, None)}
PUBLIC_ROW = ("trl#7244", (151936, 4096, None), 8192)
BETA = 5e-3  # paper Table 6


def make_case(vocabulary: int, hidden: int, num_tokens: int, device: torch.device, dtype: torch.dtype):
    """(hidden_ND, head_VD, batch): targets have log-probs of all sizes, sequences are up to 512 tokens long."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)
    head_VD = normal(vocabulary, hidden) * hidden ** -0.5
    targets_N = torch.randint(0, vocabulary, (num_tokens,), generator=generator, device=device)
    strength_N = 16 * torch.rand(num_tokens, 1, generator=generator, device=device, dtype=dtype)
    hidden_ND = 2 * normal(num_tokens, hidden) + strength_N * head_VD[targets_N]
    num_sequences = max(2, 2 * round(num_tokens / 1024))
    bounds = torch.linspace(0, num_tokens, num_sequences + 1).round().long()
    weights_N = torch.rand(num_tokens, generator=generator, device=device) * 2
    batch = {"targets_N": targets_N, "ref_logps_N": -5 * torch.rand(num_tokens, generator=generator, device=device),
             "weights_N": weights_N, "seq_lens_S": bounds.diff(),
             "scale_S": torch.ones(num_sequences, device=device)}
    return hidden_ND.requires_grad_(), head_VD.requires_grad_(), batch


def loss_of(output) -> torch.Tensor:
    """The mean TwDPO loss of an op's output; a reference row's own scalar as it is."""
    if isinstance(output, torch.Tensor):
        return output
    ratio_S = output[0]
    return -F.logsigmoid(BETA * (ratio_S[0::2] - ratio_S[1::2])).mean()


def matrix_products(hidden_ND, head_VD) -> tuple[dict[str, Callable], float]:
    """(the head's three matrix products at up to 4,096 tokens: logits and both gradients; their operations in all)."""
    hidden_ND, head_VD = hidden_ND.detach()[:4096], head_VD.detach()
    logits_NV = hidden_ND @ head_VD.T
    return {
        "bare logits": lambda: torch.mm(hidden_ND, head_VD.T, out=logits_NV),
        "bare hidden gradient": lambda: logits_NV @ head_VD,
        "bare head gradient": lambda: logits_NV.T @ hidden_ND,
    }, 6 * logits_NV.numel() * head_VD.shape[1]


def relative_errors(method: Method, hidden_ND, head_VD, batch, softcap, num_tokens: int) -> dict[str, float]:
    """||ours - truth|| / ||truth|| of log-probs and both gradients of the loss, truth in fp64."""
    part = hidden_ND.detach()[:num_tokens]
    lens_S = torch.tensor([len(part) // 2, len(part) - len(part) // 2])
    batch = {name: value[:len(part)] for name, value in batch.items() if name.endswith("_N")} | {
        "seq_lens_S": lens_S, "scale_S": batch["scale_S"][:2]}
    results = []
    for dtype, op in ((torch.float64, None), (part.dtype, method.op)):
        operands = [matrix.detach().to(dtype).requires_grad_() for matrix in (part, head_VD)]
        output = (weighted_logratio_chunked(*operands, **batch, options=HeadOptions(softcap=softcap)) if op is None
                  else op(*operands, batch))
        results.append([output[1].detach(), *torch.autograd.grad(loss_of(output), operands)])
    return {name: float((ours.double() - truth).norm() / truth.norm())
            for name, truth, ours in zip(("logps", "grad_hidden", "grad_head"), *results)}


def measure(methods: list[Method], case, softcap, device: torch.device, seconds: float, error_tokens: int):
    """(a dict of figures per method, TFLOP/s of the bare matrix products)."""
    hidden_ND, head_VD, batch = case
    products, product_operations = matrix_products(hidden_ND, head_VD)
    functions: dict[str, Callable] = dict(products)
    figures: dict[str, dict[str, object]] = {}
    gradients_mib = sum(matrix.numel() * matrix.element_size() for matrix in (hidden_ND, head_VD)) / 2**20

    def forward(method: Method):
        with torch.no_grad():
            return method.op(hidden_ND, head_VD, batch)

    def forward_backward(method: Method):
        hidden_ND.grad = head_VD.grad = None
        loss_of(method.op(hidden_ND, head_VD, batch)).backward()
    for method in methods:
        figure = figures[method.name] = {}
        if method.missing:
            figure["note"] = f"missing: {method.missing}"
            continue
        try:
            forward_backward(method)  # compiles
            hidden_ND.grad = head_VD.grad = None
            figure["peak_extra_mib"] = peak_memory_mib(partial(forward_backward, method), device) - gradients_mib
            hidden_ND.grad = head_VD.grad = None
            if not method.reference_row:
                forward(method)
                figure["relative_error"] = relative_errors(method, hidden_ND, head_VD, batch, softcap, error_tokens)
                functions[f"{method.name} forward"] = partial(forward, method)
            functions[method.name] = partial(forward_backward, method)
        except torch.OutOfMemoryError:
            figure["note"] = "out of memory"
        except Exception as error:  # a peer's failure is a row, not the end of the run
            figure["note"] = f"failed: {type(error).__name__}: {str(error).split(chr(10))[0][:150]}"
        hidden_ND.grad = head_VD.grad = None
    times = interleave(functions, device, seconds)
    rate = product_operations / (sum(statistics.median(times[name]) for name in products) * 1e-3) / 1e12
    for method in methods:
        figure = figures[method.name]
        if method.name not in functions:
            continue
        if not method.reference_row:  # those compute gradients in their forward pass: it has no time of its own
            figure["forward_ms"] = statistics.median(times[f"{method.name} forward"])
        ordered = sorted(times[method.name])
        median = statistics.median(ordered)
        operations = hidden_ND.numel() * head_VD.shape[0]
        figure |= {"forward_backward_ms": median, "p20_ms": ordered[int(0.2 * len(ordered))],
                   "p80_ms": ordered[int(0.8 * len(ordered))], "rounds": len(ordered),
                   "tflops": method.operations * operations / median / 1e9}
        figure |= {"share_of_matrix_rate": figure["tflops"] / rate,
                   "times_8nvd": median / (8 * operations / rate / 1e9)}
    return figures, rate


HEADER = (f"{'head':11} {'tokens':>6} {'method':36} {'fwd ms':>9} {'fwd+bwd ms':>11} {'20..80 %':>19} {'TFLOP/s':>8} "
          f"{'of rate':>7} {'x 8NVD':>6} {'extra MiB':>9}  error: logps / dX / dW")


def show(row: dict) -> str:
    start = f"{row['head']:11} {row['tokens']:6} {row['method']:36} "
    if "note" in row:
        return start + row["note"]
    forward = f"{row['forward_ms']:9.2f}" if "forward_ms" in row else f"{'-':>9}"
    errors = " / ".join(f"{value:.1e}" for value in row.get("relative_error", {}).values()) or "another loss"
    return (f"{start}{forward} {row['forward_backward_ms']:11.2f} {row['p20_ms']:9.2f}..{row['p80_ms']:8.2f} "
            f"{row['tflops']:8.3g} {row['share_of_matrix_rate']:7.0%} {row['times_8nvd']:6.2f} "
            f"{row['peak_extra_mib']:9.0f}  {errors}")


def rows_of_other_calls(path: Path, report: dict) -> list[dict]:
    """Rows that earlier calls wrote to `path` with the same machine and versions and that this one did not measure."""
    if not path.exists():
        return []
    old = json.loads(path.read_text(encoding="utf-8"))
    if [old["machine"] | {"date": ""}, old["dtype"]] != [report["machine"] | {"date": ""}, report["dtype"]]:
        return []
    measured = [[row[name] for name in ("head", "tokens", "method")] for row in report["rows"]]
    return [row for row in old["rows"] if [row[name] for name in ("head", "tokens", "method")] not in measured]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--heads", help="comma-separated; all that fit the device by default, and 'public' on a GPU")
    parser.add_argument("--tokens", help="comma-separated token counts; 1k,4k,16k,64k on a GPU, 256,1k,2k without")
    parser.add_argument("--only", help="comma-separated: methods whose name contains one of these")
    parser.add_argument("--seconds", type=float, default=1.5, help="time for each method, of a case's rounds")
    parser.add_argument("--error-tokens", type=int, default=512, help="tokens of the comparison with fp64")
    parser.add_argument("--out", type=Path, help="JSON file; benchmarks/results/<device>/loss_kernel.json by default. "
                        "Its rows of other heads, tokens and methods stay, if machine and versions are the same")
    flags = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    heads = GPU_HEADS if device.type == "cuda" else CPU_HEADS
    tokens = (1024, 4096, 16384, 65536) if device.type == "cuda" else (256, 1024, 2048)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if flags.tokens:
        tokens = tuple(map(int, flags.tokens.split(",")))
    if min(*tokens, flags.error_tokens) < 2:
        parser.error("--tokens and --error-tokens must be at least 2: a pair has two sequences")
    if flags.only and not any(part in method.name for method in find_methods(device, None)
                              for part in flags.only.split(",")):
        parser.error(f"--only {flags.only}: no method's name contains that; there are "
                     + "; ".join(method.name for method in find_methods(device, None)))
    cases = [(name, shape, count) for name, shape in heads.items() for count in tokens]
    if device.type == "cuda":
        cases.append(PUBLIC_ROW)
    if flags.heads:
        wanted = flags.heads.replace("public", PUBLIC_ROW[0]).split(",")
        if unknown := set(wanted) - {name for name, *_ in cases}:
            parser.error(f"--heads {','.join(unknown)}: it must be of {', '.join(dict.fromkeys(c[0] for c in cases))}")
        cases = [case for case in cases if case[0] in wanted]
    out = flags.out or result_path(device, "loss_kernel.json")
    report = {"machine": machine(device), "dtype": str(dtype).removeprefix("torch."), "rows": []}
    print(", ".join(f"{name} {value}" for name, value in report["machine"].items()))
    if device.type != "cuda":
        print("No GPU here: the CPU paths, fp32, at small sizes. Nothing below says how the Triton kernel performs.")
    print(HEADER)
    for name, (vocabulary, hidden, softcap), num_tokens in cases:
        methods = [method for method in find_methods(device, softcap)
                   if not flags.only or any(part in method.name for part in flags.only.split(","))]
        case = make_case(vocabulary, hidden, num_tokens, device, dtype)
        figures, rate = measure(methods, case, softcap, device, flags.seconds, flags.error_tokens)
        del case
        torch._dynamo.reset()
        print(f"{name:11} {num_tokens:6} V {vocabulary:,} D {hidden:,}: the three bare matrix products run at "
              f"{rate:.3g} TFLOP/s")
        for method in methods:
            row = {"head": name, "vocabulary": vocabulary, "hidden": hidden, "tokens": num_tokens,
                   "method": method.name + (" (reference row)" if method.reference_row else ""),
                   "matrix_tflops": rate} | figures[method.name]
            print(show(row), flush=True)
            report["rows"].append(row)
        write_result(out, report | {"rows": report["rows"] + rows_of_other_calls(out, report)})
    print(f"written to {out}")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
