"""Time, memory and error of the fused op against every other way to the same token-weighted DPO loss.

    python benchmarks/loss_kernel.py                                       everything this machine can run
    python benchmarks/loss_kernel.py --heads llama-3-8b --tokens 4096,16384 --only Triton,TRL

On a GPU: bf16, heads of Llama-3-8B, Gemma-2-2B and Qwen2.5-7B, and trl#7244's public row. Without one: the CPU paths in
fp32 at small sizes. A call takes --minutes at most (8 on a GPU, 3 without), shared out over heads and token counts, two
shares for the first; what does not fit is a row that says so. A row is printed and written when its method is measured.
The last line is JSON.

How methods are compared: each is timed in turns with the head's three bare matrix products and with twdpo's own op,
round after round, so a busy or hot moment falls on all of them. Compare methods by `x ours` and `x 8NVD`: milliseconds
of two rows are of two moments. A first call, compilation included, can't be interrupted: what torch.compile compiles
comes last, and a method whose first call took longer than --compile-limit is a row that says so, is not timed, and is
left out of what follows.

Errors are relative (Frobenius) to fp64, which is made once a head and token count, and of the loss of the first
--error-tokens tokens: the rest has weight 0 there, so that a method sees one shape and compiles once.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

from harness import (
    Report,
    add_output_flags,
    amount,
    interleave,
    machine,
    output_path,
    peak_memory_mib,
    print_machine,
    quiet_failure,
    spread,
    whole_number,
    whole_numbers,
)
from loss_peers import Method, call_kl, call_plain, find_methods
from twdpo.logratio import HeadOptions, weighted_logratio_chunked, weighted_logratio_spec

# name: (vocabulary, hidden size, softcap)
GPU_HEADS = {"llama-3-8b": (128256, 4096, None), "gemma-2-2b": (256000, 2304, 30.0), "qwen2.5-7b": (152064, 3584, None)}
CPU_HEADS = {"v32k": (32000, 512, None), "v128k": (128256, 512, None)}
PUBLIC_ROW = ("trl#7244", (151936, 4096, None), 8192)
TOKENS = {"cuda": (4096, 16384, 1024, 65536), "cpu": (256, 1024)}  # the most worthwhile first
ERROR_TOKENS, MINUTES = {"cuda": 512, "cpu": 128}, {"cuda": 8.0, "cpu": 3.0}
CALLS = 7  # of forward and backward that a method takes, turns of others included, when there is time for one round
BETA = 5e-3  # paper Table 6


class Case(NamedTuple):
    """One head at one token count."""

    head: str
    vocabulary: int
    hidden: int
    softcap: float | None
    tokens: int

    @property
    def nvd(self) -> int:
        return self.tokens * self.vocabulary * self.hidden


class Operands(NamedTuple):
    """A case's tensors, and what every method's first call is compared with."""

    hidden_ND: torch.Tensor
    head_VD: torch.Tensor
    batch: dict[str, torch.Tensor]
    error_batch: dict[str, torch.Tensor]
    # fp64, by with_kl: log-probs and hidden gradient of the first tokens, head gradient
    truth: dict[bool, list[torch.Tensor]]


def prepare(case: Case, device: torch.device, error_tokens: int) -> Operands:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    hidden_ND, head_VD, batch = make_case(case.vocabulary, case.hidden, case.tokens, device, dtype)
    few = min(error_tokens, case.tokens)
    weights_N = batch["weights_N"].clone()
    weights_N[few:] = 0
    two = {"scale_S": batch["scale_S"][:2]}
    error_batch = batch | two | {"weights_N": weights_N, "seq_lens_S": torch.tensor([few // 2, case.tokens - few // 2])}
    first = {name: value[:few] for name, value in batch.items() if name.endswith("_N")} | two | {
        "seq_lens_S": torch.tensor([few // 2, few - few // 2]),
        "ref_states": (batch["ref_states"][0][:few].double(), batch["ref_states"][1].double(), None)}
    # The specification makes all logits at once: on a CPU that is too much memory.
    op = weighted_logratio_spec if device.type == "cuda" else weighted_logratio_chunked
    operands = [matrix.detach().double().requires_grad_() for matrix in (hidden_ND[:few], head_VD)]
    truth = {}
    for with_kl, call in ((False, call_plain), (True, call_kl)):
        output = call(op, HeadOptions(softcap=case.softcap), *operands, first)
        truth[with_kl] = [output[1].detach(), *torch.autograd.grad(loss_of(output), operands)]
    return Operands(hidden_ND, head_VD, batch, error_batch, truth)


def make_case(vocabulary: int, hidden: int, num_tokens: int, device: torch.device, dtype: torch.dtype):
    """(hidden_ND, head_VD, batch): targets have log-probs of all sizes, sequences are up to 512 tokens long, and the
    reference is near the policy."""
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
    near_VD = head_VD + 0.1 * hidden ** -0.5 * normal(vocabulary, hidden)
    batch["ref_states"] = hidden_ND + 0.3 * normal(num_tokens, hidden), near_VD, None
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


def relative_errors(method: Method, operands: Operands) -> dict[str, float]:
    """||its own - truth|| / ||truth|| of log-probs and both gradients of the loss; one call."""
    matrices = operands.hidden_ND, operands.head_VD
    output = method.op(*matrices, operands.error_batch)
    results = [output[1].detach(), *torch.autograd.grad(loss_of(output), matrices)]
    errors = {}
    for name, truth, own in zip(("logps", "grad_hidden", "grad_head"), operands.truth[method.with_kl], results):
        errors[name] = float((own[:len(truth)] - truth).norm() / truth.norm())
    return errors


def forward(method: Method, operands: Operands):
    with torch.no_grad():
        return method.op(*operands[:3])


def forward_backward(method: Method, operands: Operands) -> None:
    operands.hidden_ND.grad = operands.head_VD.grad = None
    loss_of(method.op(*operands[:3])).backward()


def measure(method: Method, ours: Method | None, operands: Operands, seconds: float, deadline: float,
            compile_limit: float) -> dict[str, object]:
    """A row's figures, or why there are none. ours: what it is timed in turns with. deadline: of interleave."""
    device = operands.hidden_ND.device
    started, row = time.perf_counter(), {}
    if method.reference_row:
        forward_backward(method, operands)
    else:
        row["relative_error"] = relative_errors(method, operands)
    if device.type == "cuda":
        torch.cuda.synchronize()  # sync
    row["first_call_s"] = time.perf_counter() - started
    if row["first_call_s"] > compile_limit:
        return row | {"note": f"the first call, compilation included, took {row['first_call_s']:.0f} s, over the limit "
                              f"of {compile_limit:g} s: not timed"}
    operands.hidden_ND.grad = operands.head_VD.grad = None
    run = partial(forward_backward, method, operands)
    gradients = sum(matrix.numel() * matrix.element_size() for matrix in operands[:2])
    row["peak_extra_mib"] = peak_memory_mib(run, device) - gradients / 2**20
    products, product_operations = matrix_products(*operands[:2])
    functions: dict[str, Callable] = products | {"forward and backward": run}
    if not method.reference_row:  # those compute gradients in their forward pass: it has no time of its own
        functions["forward"] = partial(forward, method, operands)
        functions["forward"]()
    if ours is not None and ours is not method:
        functions["ours"] = partial(forward_backward, ours, operands)
    times = interleave(functions, device, seconds / len(functions), deadline)
    medians = {name: statistics.median(values) for name, values in times.items()}
    rate = product_operations / sum(medians[name] for name in products) / 1e9
    median, operations = medians["forward and backward"], operands.hidden_ND.numel() * len(operands.head_VD)
    p20, p80 = spread(times["forward and backward"])
    tflops = method.operations * operations / median / 1e9
    if "forward" in medians:
        row["forward_ms"] = medians["forward"]
    if ours is not None:
        row["ours_ms"] = medians.get("ours", median)  # in the same turns
        row["over_ours"] = median / row["ours_ms"]
    return row | {"forward_backward_ms": median, "p20_ms": p20, "p80_ms": p80,
                  "rounds": len(times["forward and backward"]), "matrix_tflops": rate, "tflops": tflops,
                  "share_of_matrix_rate": tflops / rate, "times_8nvd": median * rate * 1e9 / (8 * operations)}


class Session:
    """One call of this script: its time, and what it has learnt of the methods so far."""

    def __init__(self, flags: argparse.Namespace, device: torch.device, report: Report):
        self.flags, self.device, self.report = flags, device, report
        self.deadline = time.perf_counter() + 60 * flags.minutes
        self.pace = 0.0  # seconds for each of N V D, of the slowest method
        self.first_calls: dict[str, float] = {}  # seconds; of what compiles
        self.too_slow: set[str] = set()

    def run_case(self, case: Case, share_end: float) -> None:
        """All methods at one case; share_end: when it should be over."""
        methods = [method for method in find_methods(self.device, case.softcap) if not method.missing
                   and (case.softcap is None or method.takes_softcap) and is_wanted(method, self.flags.only)]
        print(f"\n{case.head}: V {case.vocabulary:,}, D {case.hidden:,}, {case.tokens:,} tokens", flush=True)
        operands, ours, left_out, unprepared = None, {}, {}, ""  # ours: by with_kl, the first of twdpo
        for place, method in enumerate(methods):
            row = {"head": case.head, "vocabulary": case.vocabulary, "hidden": case.hidden, "tokens": case.tokens,
                   "method": method.name + (" (reference row)" if method.reference_row else "")}
            row |= {"with_kl": True} if method.with_kl else {}
            note = unprepared or self.why_left_out(method, case, place and share_end)
            if not note and operands is None:
                operands, note = self.try_prepare(case)
                unprepared = note
            if note:
                left_out.setdefault(note, []).append(method.name)
                self.report.add(row | {"note": f"left out: {note}"})
                continue
            if method.name.startswith("twdpo"):
                ours.setdefault(method.with_kl, method)
            row |= self.try_method(method, ours.get(method.with_kl), operands, share_end, len(methods) - place)
            if "forward_backward_ms" in row:
                self.pace = max(self.pace, row["forward_backward_ms"] / 1e3 / case.nvd)
            elif ours.get(method.with_kl) is method:
                del ours[method.with_kl]
            print(show(row), flush=True)
            self.report.add(row)
        for note, names in left_out.items():
            print(f"  left out, as {note}: {'; '.join(names)}", flush=True)

    def why_left_out(self, method: Method, case: Case, share_end: float) -> str:
        """Why a method gets no turn, or nothing. share_end: 0 for a case's first method."""
        now = time.perf_counter()
        expected = CALLS * self.pace * case.nvd
        if method.compiles:
            expected += self.first_calls.get(method.name, 2 * self.flags.compile_limit)
        if method.name in self.too_slow:
            return f"its first call took over {self.flags.compile_limit:g} s before"
        if now + expected > self.deadline:
            return f"it does not fit the {self.flags.minutes:g} minutes"
        if share_end and now > share_end:
            return f"this head and token count had its share of the {self.flags.minutes:g} minutes"
        return ""

    def try_prepare(self, case: Case) -> tuple[Operands | None, str]:
        """(a case's operands, why there are none)."""
        try:
            return prepare(case, self.device, self.flags.error_tokens), ""
        except Exception as error:  # too much memory, for one: the end of this case, not of the run
            note = f"there is no fp64 to compare with: {quiet_failure(error)}"
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return None, note

    def try_method(self, method: Method, ours: Method | None, operands: Operands, share_end: float, methods_left: int
                   ) -> dict[str, object]:
        seconds = max(0.0, min(self.flags.seconds, (share_end - time.perf_counter()) / methods_left))
        try:
            row = measure(method, ours, operands, seconds, self.deadline, self.flags.compile_limit)
            self.first_calls[method.name] = row["first_call_s"]
            if row["first_call_s"] > self.flags.compile_limit:
                self.too_slow.add(method.name)
        except Exception as error:  # a peer's failure is a row, not the end of the run
            row = {"note": quiet_failure(error)}
        operands.hidden_ND.grad = operands.head_VD.grad = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return row


def is_wanted(method: Method, only: str) -> bool:
    return not only or any(part in method.name for part in only.split(","))


HEADER = (f"{'':39}{'forward':>9} {'forward and':>11} {'20 to 80 %':>18} {'TFLOP/s':>8} {'share of':>9} "
          f"{'x 8NVD':>7} {'x ours':>7} {'MiB':>7}  error against fp64:\n"
          f"{'':39}{'ms':>9} {'backward ms':>11} {'of rounds':>18} {'':>8} {'bare rate':>9} "
          f"{'':>7} {'':>7} {'extra':>7}  log-probs, dX, dW")
LEGEND = """\
bare rate: of the head's three bare matrix products in the same turns. x 8NVD: time over that of 8 N V D operations at
that rate. x ours: over twdpo's first row of the same loss, with KL or without, in the same turns. MiB extra: peak
memory beyond inputs and gradients."""


def show(row: dict) -> str:
    start = f"  {row['method']:37}"
    if "note" in row:
        return f"{start}{row['note']}"
    forward = f"{row['forward_ms']:9.2f}" if "forward_ms" in row else f"{'-':>9}"
    errors = " ".join(f"{value:.1e}" for value in row.get("relative_error", {}).values()) or "another loss"
    ours = f"{row['over_ours']:7.2f}" if "over_ours" in row else f"{'-':>7}"
    return (f"{start}{forward} {row['forward_backward_ms']:11.2f} {row['p20_ms']:8.2f}..{row['p80_ms']:8.2f} "
            f"{row['tflops']:8.3g} {row['share_of_matrix_rate']:9.0%} {row['times_8nvd']:7.2f} {ours} "
            f"{row['peak_extra_mib']:7.0f}  {errors}")


def conclusion(rows: list[dict]) -> str:
    """What the rows say, for a person: of the first head and token count, and how many others it holds for."""
    cases: dict[tuple, list[dict]] = {}
    for row in rows:
        if "forward_backward_ms" in row and "relative_error" in row and not row.get("with_kl"):
            cases.setdefault((row["head"], row["tokens"]), []).append(row)
    if not cases:
        return "Nothing was measured."
    fastest = {key: min(group, key=lambda row: row.get("over_ours", row["times_8nvd"])) for key, group in cases.items()}
    (head, tokens), group = next(iter(cases.items()))
    best, ours = fastest[head, tokens], next((row for row in group if row["method"].startswith("twdpo")), None)

    def figures(time_ms: float, row: dict) -> str:
        return f"{time_ms:.2f} ms forward and backward, {row['peak_extra_mib']:.0f} MiB extra"
    text = (f"{head} at {tokens:,} tokens: the fastest of {len(group)} is {best['method']} "
            f"({figures(best['forward_backward_ms'], best)})")
    if ours is None:
        return text + "; twdpo was not measured."
    if best is not ours:
        text += f"; {ours['method']} takes {1 / best['over_ours']:.2f} times as long ({figures(best['ours_ms'], ours)})"
    wins = sum(row["method"].startswith("twdpo") for row in fastest.values())
    return f"{text}. twdpo is the fastest at {wins} of {len(cases)} heads and token counts."


def parse(argv: list[str] | None, device: torch.device) -> tuple[argparse.Namespace, list[Case]]:
    """(flags, cases, the most worthwhile first)."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    kind = device.type
    parser.add_argument("--heads", help="comma-separated; all that fit the device by default, and 'public' on a GPU")
    parser.add_argument("--tokens", type=whole_numbers(2), default=",".join(map(str, TOKENS[kind])),
                        help="comma-separated token counts")
    parser.add_argument("--only", default="", help="comma-separated: methods whose name contains one of these")
    parser.add_argument("--minutes", type=amount, default=MINUTES[kind], help="the longest that it may take")
    parser.add_argument("--seconds", type=amount, default=1.5, help="the most time for a method's turns")
    parser.add_argument("--compile-limit", type=amount, default=30.0, metavar="SECONDS",
                        help="a method whose first call takes longer is not timed")
    parser.add_argument("--error-tokens", type=whole_number(2), default=ERROR_TOKENS[kind],
                        help="tokens compared with fp64; a pair has two sequences, so at least 2")
    add_output_flags(parser, "loss_kernel.json")
    flags = parser.parse_args(argv)
    heads = GPU_HEADS if kind == "cuda" else CPU_HEADS
    names = [method.name for method in find_methods(device, None)]
    if flags.only and not any(part in name for name in names for part in flags.only.split(",")):
        parser.error(f"--only {flags.only}: no method's name contains that; there are {'; '.join(names)}")
    cases = [Case(name, *shape, count) for count in flags.tokens for name, shape in heads.items()]
    if kind == "cuda":
        cases.insert(len(heads), Case(PUBLIC_ROW[0], *PUBLIC_ROW[1], PUBLIC_ROW[2]))
    if flags.heads:
        wanted = flags.heads.replace("public", PUBLIC_ROW[0]).split(",")
        if unknown := set(wanted) - {case.head for case in cases}:
            known = ", ".join(dict.fromkeys(case.head for case in cases))
            parser.error(f"--heads {','.join(unknown)}: it must be of {known}")
        cases = [case for case in cases if case.head in wanted]
    return flags, cases


def main(argv: list[str] | None = None) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    flags, cases = parse(argv, device)
    methods = [method for method in find_methods(device, None) if is_wanted(method, flags.only)]
    missing = {method.name: method.missing for method in methods if method.missing}
    dtype = "bfloat16" if device.type == "cuda" else "float32"
    report = Report(output_path(flags, device, "loss_kernel.json"), {"machine": machine(device), "dtype": dtype},
                    ("head", "tokens", "method"), ("over_ours",), missing=missing)
    print_machine(report.head)
    if device.type != "cuda":
        print("No GPU here: the CPU paths, fp32, at small sizes. Nothing below says how the Triton kernel performs.")
    for name, why in missing.items():
        print(f"not here: {name}: {why}")
    if softcapped := [case.head for case in cases if case.softcap is not None]:
        print(f"take no softcap, so not at {', '.join(dict.fromkeys(softcapped))}: "
              + "; ".join(method.name for method in methods if not method.takes_softcap and not method.missing))
    print(f"{len(cases)} heads and token counts, {len(methods) - len(missing)} methods each: at most "
          f"{flags.minutes:g} minutes.\n{LEGEND}\n\n{HEADER}", flush=True)
    session = Session(flags, device, report)
    for place, case in enumerate(cases):
        now = time.perf_counter()
        share = 1 / (len(cases) - place) if place else 2 / (len(cases) + 1)
        session.run_case(case, now + (session.deadline - now) * share)
        torch._dynamo.reset()
    print(f"\n{conclusion(report.rows)}")
    report.finish()


if __name__ == "__main__":
    main()
