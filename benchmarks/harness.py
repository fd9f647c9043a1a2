"""What benchmarks share: time in turns, peak memory, the machine, and where results go."""

import ctypes
import importlib.metadata
import json
import platform
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch

from twdpo.files import write_json


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


def interleave(functions: dict[str, Callable], device: torch.device, seconds: float) -> dict[str, list[float]]:
    """Milliseconds of every function, round after round, so that a busy moment of the machine falls on all of them."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    started, rounds = time.perf_counter(), 0
    while rounds < 3 or (time.perf_counter() - started < seconds * len(functions) and rounds < 50):
        for name, function in functions.items():
            times[name].append(milliseconds(function, device))
        rounds += 1
    return times


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


def finish(out: Path, report: dict) -> None:
    """Write the report and end standard output with it."""
    write_result(out, report)
    print(f"written to {out}")
    print(json.dumps(report))


def write_result(out: Path, report: dict) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, report)


def result_path(device: torch.device, name: str) -> Path:
    """`benchmarks/results/<device>/<name>`."""
    folder = "cpu"
    if device.type == "cuda":
        folder = torch.cuda.get_device_name(device).lower().replace(" ", "-")
    return Path(__file__).resolve().parent / "results" / folder / name
