"""What benchmarks share: time in turns, peak memory, lengths of real pairs, the machine, and where results go.

Results go to `runs/benchmarks/<device>/`, which git ignores, or with --record to `benchmarks/results/<device>/`, which
is committed; --out names another file.
"""

import argparse
import ctypes
import importlib.metadata
import json
import math
import platform
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from statistics import NormalDist

import torch

from twdpo.files import write_json

ROOT = Path(__file__).resolve().parent.parent
# Median tokens of a prompt, a chosen and a rejected answer, and how far lengths spread (standard deviation of their
# logarithm). 32 pairs are 22,500 tokens with each prompt once.
MEDIAN_LENGTHS, LENGTH_SPREAD = (128, 247, 220), 0.6


@contextmanager
def cudnn(on: bool) -> Iterator[None]:
    """Inside this context torch may pick cuDNN's attention, or may not."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(on)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def milliseconds(function, device: torch.device) -> float:
    """Time of one run."""
    if device.type == "cuda":
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        function()
        events[1].record()
        torch.cuda.synchronize()  # sync
        return events[0].elapsed_time(events[1])
    begin = time.perf_counter()
    function()
    return 1e3 * (time.perf_counter() - begin)


def interleave(functions: dict[str, Callable], device: torch.device, seconds: float, deadline: float = math.inf
               ) -> dict[str, list[float]]:
    """Milliseconds of every function, round after round, so that a busy moment of the machine falls on all of them.

    At least three rounds, or until `seconds` a function are over. After the first none is begun that would not be over
    by `deadline` (of time.perf_counter) if it took as long as the one before.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    started = now = time.perf_counter()
    rounds, took = 0, 0.0
    while not rounds or (now + took < deadline and (
            rounds < 3 or (now - started < seconds * len(functions) and rounds < 50))):
        for name, function in functions.items():
            times[name].append(milliseconds(function, device))
        now, took = time.perf_counter(), time.perf_counter() - now
        rounds += 1
    return times


def spread(times: list[float]) -> tuple[float, float]:
    """20th and 80th percentile."""
    ordered = sorted(times)
    return ordered[int(0.2 * len(ordered))], ordered[int(0.8 * len(ordered))]


def quiet_failure(error: Exception) -> str:
    """A row's note for a way that failed: what, in a line."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return f"failed: {type(error).__name__}: {str(error).split(chr(10))[0][:150]}"


def real_lengths(num_pairs: int, seed: int = 0) -> list[tuple[int, int, int]]:
    """Tokens of prompt, chosen and rejected answer of made-up pairs: log-normal, as lengths of real ones are.

    Every 32 pairs in turn hold the same lengths in another order: 22,500 tokens, each prompt once.
    """
    rng = random.Random(seed)
    quantiles = [NormalDist().inv_cdf((place + 0.5) / 32) for place in range(32)]

    def lengths(median: int) -> list[int]:
        values = [max(4, round(median * math.exp(LENGTH_SPREAD * value))) for value in quantiles]
        return [length for _ in range(-(-num_pairs // 32)) for length in rng.sample(values, 32)]
    return list(zip(*map(lengths, MEDIAN_LENGTHS)))[:num_pairs]


def peak_memory_mib(function, device: torch.device) -> float:
    """Peak memory of one run above what was there before, MiB. On the CPU of resident memory, in a Linux process."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    ctypes.CDLL(None).malloc_trim(0)  # freed memory goes back to the system
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _status_mib("VmRSS")
    function()
    return _status_mib("VmHWM") - before


def _status_mib(field: str) -> float:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)]
    return int(line.split()[1]) / 1024


def machine(device: torch.device) -> dict[str, str]:
    """What the figures were measured on, and with."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        models = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                  if line.startswith("model name")]
        name = f"{models[0] if models else platform.processor()}, {torch.get_num_threads()} threads"
    return {"device": name, "torch": torch.__version__, "triton": installed_version("triton"),
            "python": platform.python_version(), "date": date.today().isoformat()}


def installed_version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def print_machine(report: dict) -> None:
    print(", ".join(f"{name} {value}" for name, value in report["machine"].items()), flush=True)


def device_folder(device: torch.device) -> str:
    """A kind of device as a folder's name."""
    return torch.cuda.get_device_name(device).lower().replace(" ", "-") if device.type == "cuda" else "cpu"


def whole_number(least: int) -> Callable[[str], int]:
    """An argparse type."""
    def convert(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from None
        if number < least:
            raise argparse.ArgumentTypeError(f"{text!r} must be at least {least}")
        return number
    return convert


def whole_numbers(least: int) -> Callable[[str], list[int]]:
    """An argparse type: comma-separated, each once."""
    return lambda text: list(dict.fromkeys(map(whole_number(least), text.split(","))))


def amount(text: str) -> float:
    """An argparse type: a finite number, 0 or more."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number, 0 or more")
    return number


def _file(text: str) -> Path:
    if Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder: it must be a file")
    return Path(text)


def add_output_flags(parser: argparse.ArgumentParser, name: str) -> None:
    parser.add_argument("--out", type=_file, help=f"JSON file; runs/benchmarks/<device>/{name} by default")
    parser.add_argument("--record", action="store_true",
                        help=f"write benchmarks/results/<device>/{name}, which is committed")


def output_path(flags: argparse.Namespace, device: torch.device, name: str) -> Path:
    """Where the flags of `add_output_flags` say that results go."""
    folder = ROOT / ("benchmarks/results" if flags.record else "runs/benchmarks") / device_folder(device)
    return flags.out or folder / name


def finish(out: Path, report: dict) -> None:
    """Write the report and end standard output with it."""
    write_result(out, report)
    print(f"written to {out}")
    print(json.dumps(report))


def write_result(out: Path, report: dict) -> None:
    write_json(out, report)


class Report:
    """A benchmark's JSON file: written at every row, so that whatever ends a call leaves the rows that it has.

    head: what all rows share; rows of an earlier call stay when theirs is the same but for the date. keys: what names
    a row. ratios: figures that a row has when there is something to compare with; one without does not take the place
    of one with. extra: what goes into the file beside them and is not compared.
    """

    def __init__(self, path: Path, head: dict, keys: tuple[str, ...], ratios: tuple[str, ...] = (), **extra):
        self.path, self.head, self.keys, self.ratios, self.extra = path, head, keys, ratios, extra
        self.rows: list[dict] = []
        self.earlier = self._read_earlier()

    def add(self, row: dict) -> None:
        self.rows.append(row)
        self.write()

    def write(self) -> None:
        figures = {self._name(row): row for row in self.earlier if "note" not in row}
        rows = [row for row in self.rows if self._replaces(row, figures.get(self._name(row), {}))]
        names = {self._name(row) for row in rows}
        rows += [row for row in self.earlier if self._name(row) not in names]
        write_json(self.path, self.head | self.extra | {"rows": rows})

    def finish(self) -> None:
        """Ends standard output with the rows of this call, as one line of JSON."""
        self.write()
        print(f"written to {self.path}")
        print(json.dumps(self.head | self.extra | {"rows": self.rows}))

    def _replaces(self, row: dict, old: dict) -> bool:
        """What was left out or failed this time, or is compared with less, does not take the place of a figure."""
        return not old or "note" not in row and all(ratio in row for ratio in self.ratios if ratio in old)

    def _name(self, row: dict) -> tuple:
        return tuple(row.get(key) for key in self.keys)

    def _read_earlier(self) -> list[dict]:
        if not self.path.exists():
            return []
        old = json.loads(self.path.read_text(encoding="utf-8"))

        def without_date(report: dict) -> dict:
            head = {key: report.get(key) for key in self.head}
            return head | {"machine": (head["machine"] or {}) | {"date": ""}}
        return old["rows"] if without_date(old) == without_date(self.head) else []
