"""benchmarks/train_step.py, and gpu.sh with its table, on what a CPU can show of them."""

import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import attention
import extraction
import gpu_table
import harness
import loss_kernel
import online_costs
import train_step
from twdpo import dist
from twdpo.chat import Chat
from twdpo.forms import parse_row
from twdpo.models.source import load_tokenizer
from twdpo.tokens import tokenize_pairs

ROOT = Path(__file__).resolve().parent.parent
CUDA = torch.device("cuda")
FIGURES = {"reference_seconds_a_pair": 0.5, "step_seconds": [9.0, 2.0, 4.0], "peak_gib": 3.0, "loss": 0.69,
           "gradient_norm": 1.0, "tokens_a_step": 80.0}


def last_line(text: str) -> dict:
    return json.loads(text.strip().splitlines()[-1])


def read(path: Path) -> list[dict]:
    return json.loads(path.read_text())["rows"]


# --- train_step.py


def test_32_made_up_pairs_are_22500_tokens(toy_model):
    """Each prompt once, in the tokens that train_step.py trains on by default."""
    flags, _ = train_step.parse([])
    rows = [parse_row(str(place), row) for place, row in enumerate(train_step.make_pairs(flags, 64))]
    chat = Chat(load_tokenizer(toy_model, ""))
    examples, bad, _ = tokenize_pairs(chat, rows, flags.max_length, flags.max_length - 16)
    assert not bad
    for part in (examples[:32], examples[32:]):
        tokens = sum(len(example.prompt_ids) + len(example.chosen.ids) + len(example.rejected.ids) for example in part)
        assert tokens == pytest.approx(22_500, rel=0.01)


@pytest.mark.slow
def test_our_way_runs(monkeypatch, tmp_path, capsys):
    """The child's side, on a tiny model."""
    monkeypatch.setitem(train_step.SHAPES, "20m", dict(
        num_hidden_layers=2, hidden_size=16, intermediate_size=16, num_attention_heads=2, num_key_value_heads=1))
    monkeypatch.setattr(train_step, "VOCABULARY", 1024)
    arguments = ["--pairs", "2", "--steps", "2", "--max-length", "128"]
    train_step.prepare(train_step.parse(arguments)[0], "20m", tmp_path)
    for way in ("ours", "ours, checkpointing"):
        try:
            train_step.main([*arguments, "--way", way, "--work", str(tmp_path)])
        finally:
            dist.stop()
        result = json.loads((tmp_path / "result.json").read_text())
        assert len(result["step_seconds"]) == 2 and result["loss"] == pytest.approx(0.693, abs=0.01)
        assert result["gradient_norm"] > 0 and result["peak_gib"] > 0 and 4 < result["tokens_a_step"] < 512
    printed = capsys.readouterr().out
    assert printed.count("step 1 of 2: ") == printed.count("reference pass of 4 pairs: ") == 2


def test_a_childs_progress_passes_through(monkeypatch, tmp_path, capsys):
    program = tmp_path / "child.py"
    program.write_text("import pathlib, sys\n"
                       "work, way = (sys.argv[sys.argv.index(f'--{name}') + 1] for name in ('work', 'way'))\n"
                       "print('step 1 of 2'); print('an error', file=sys.stderr)\n"
                       "way == 'fails' and sys.exit(3)\n"
                       "pathlib.Path(work, 'result.json').write_text('{\"loss\": 1}')\n")
    monkeypatch.setattr(train_step, "__file__", str(program))
    assert train_step.run_child("ours", ["--pairs", "1"], "20m", tmp_path) == {"loss": 1}
    assert train_step.run_child("fails", [], "20m", tmp_path) == {"note": "failed: an error"}
    assert capsys.readouterr().out == "    step 1 of 2\n" * 2


@pytest.fixture
def children(monkeypatch, tmp_path):
    """Children are not started: `answer(name, shape)` says what they found. Results go below tmp_path."""
    monkeypatch.setattr(train_step, "prepare", lambda flags, shape, work: None)
    monkeypatch.setattr(train_step, "missing_peer", lambda: "")
    monkeypatch.setattr(harness, "ROOT", tmp_path)

    def set_answer(answer) -> Path:
        monkeypatch.setattr(train_step, "run_child", lambda name, arguments, shape, work: answer(name, shape))
        return tmp_path / "runs/benchmarks/cpu/train_step.json"
    return set_answer


def test_rows_are_written_as_ways_end(children, capsys):
    def answer(name, shape):
        if name == "TRL, checkpointing":
            raise KeyboardInterrupt
        return {"note": "missing: trl"} if name == "TRL" else FIGURES
    out = children(answer)
    with pytest.raises(KeyboardInterrupt):
        train_step.main(["--rounds", "1"])
    rows = {row["way"]: row for row in read(out)}
    assert list(rows) == ["ours", "ours, checkpointing", "TRL", "TRL, precomputed"]
    assert rows["TRL"] == {"model": "20m", "way": "TRL", "micro_batch": "4 pairs", "note": "missing: trl"}
    assert rows["ours"]["step_seconds"] == 3.0 and rows["ours"]["pairs_per_s"] == pytest.approx(1 / (3 / 4 + 0.5))
    assert not (out.parents[3] / "benchmarks").exists()


def test_rounds_go_over_all_ways_and_the_end_says_what_the_rows_say(children, capsys):
    asked = []

    def answer(name, shape):
        asked.append(name)
        slower = 3.0 if name == "TRL" else 1.0
        return FIGURES | {"step_seconds": [slower * seconds for seconds in FIGURES["step_seconds"]],
                          "peak_gib": 3.0 * slower}
    children(answer)
    train_step.main(["--only", "ours,TRL", "--rounds", "2", "--checkpointing", "none"])
    ways = ["ours", *train_step.TRL]
    assert asked == ways * 2
    printed = capsys.readouterr().out
    report = last_line(printed)
    assert [row["way"] for row in report["rows"]] == ways and report["shapes"].keys() == {"20m"}
    ours, trl = report["rows"][:2]
    assert ours["steps"] == 4 and ours["ours_faster"] == 1.0 and trl["ours_memory"] == pytest.approx(1 / 3)
    assert trl["ours_faster"] == ours["pairs_per_s"] / trl["pairs_per_s"]
    fastest = max(report["rows"][1:], key=lambda row: row["pairs_per_s"])
    ratio = ours["pairs_per_s"] / fastest["pairs_per_s"]
    assert (f"20m, fastest of ours: ours, {ours['step_seconds']:.2f} s a step of 80 tokens, 3.0 GiB at the peak; "
            f"{ratio:.1f} times the pairs a second of {fastest['way']}") in printed


def test_a_missing_peer_is_said_once_and_its_ways_are_not_started(children, monkeypatch, capsys):
    asked = []
    out = children(lambda name, shape: asked.append(name) or FIGURES)
    monkeypatch.setattr(train_step, "missing_peer", lambda: "missing: no such peer")
    train_step.main(["--checkpointing", "none", "--rounds", "2"])
    assert asked == ["ours"] * 2
    printed = capsys.readouterr().out
    assert sum("no such peer" in line for line in printed.splitlines()) == 1 + 1  # the last line is JSON
    assert [row["way"] for row in read(out) if row.get("note") == "missing: no such peer"] == list(train_step.TRL)


def test_rows_of_other_micro_batches_stay_and_those_of_another_length_do_not(children, capsys):
    out = children(lambda name, shape: FIGURES)
    flags = ["--only", "ours", "--checkpointing", "none", "--rounds", "1"]
    for tokens in ("64", "128"):
        train_step.main([*flags, "--tokens", tokens])
    assert [row["micro_batch"] for row in read(out)] == ["128 tokens", "64 tokens"]
    train_step.main([*flags, "--tokens", "64", "--max-length", "128"])
    assert [row["micro_batch"] for row in read(out)] == ["64 tokens"]


def test_the_other_shape_runs_when_the_first_could_not(children, capsys):
    children(lambda name, shape: {"note": "out of memory"} if shape == "llama-3-8b" else FIGURES)
    flags = ["--shape", "llama-3-8b", "--else-shape", "llama-3.2-1b", "--only", "ours", "--checkpointing", "full"]
    train_step.main(flags)
    first, second = last_line(capsys.readouterr().out)["rows"]
    assert (first["model"], first["note"]) == ("llama-3-8b", "out of memory")
    assert second["model"] == "llama-3.2-1b" and second["step_seconds"] == 3.0
    children(lambda name, shape: FIGURES)
    train_step.main(flags)
    assert [row["model"] for row in last_line(capsys.readouterr().out)["rows"]] == ["llama-3-8b"]


@pytest.mark.slow
def test_what_can_not_fit_is_a_row_and_the_least_memory_comes_first():
    """The 8B step on cards of 80 and 141 GB, by the memory plan."""
    flags, ways = train_step.parse(["--shape", "llama-3-8b", "--tokens", "16384"])
    cost = train_step.model_cost(train_step.model_config("llama-3-8b"), torch.bfloat16, flags.max_length)
    small, large = (train_step.plan_ways(ways, cost, gib, flags) for gib in (79.1, 139.8))
    assert list(large)[:2] == ["ours, checkpointing", "ours"] and list(small)[2:] == list(train_step.TRL)
    assert all(row["note"].startswith("does not fit by the memory plan: ") for row in small.values())
    assert [name for name, row in large.items() if "note" not in row] == [
        "ours, checkpointing", "TRL, precomputed", "TRL, precomputed, checkpointing"]
    flags, _ = train_step.parse(["--ignore-plan", "--tokens", "16384"])
    assert not any("note" in row for row in train_step.plan_ways(ways, cost, 79.1, flags).values())


@pytest.mark.parametrize("flags, message", [
    (["--steps", "1"], "at least 2"), (["--only", "nobody"], "no way's name"),
    (["--checkpointing", "x"], "invalid choice"), (["--pairs", "6", "--trl-pairs", "4"], "multiple"),
    (["--max-length", "-1"], "at least 32"), (["--tokens", "x"], "no whole number"),
])
def test_bad_flags_are_one_message(flags, message, capsys):
    with pytest.raises(SystemExit):
        train_step.main(flags)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("script, flags, message", [
    ("extraction", ["--lengths", "abc"], "no whole number"), ("extraction", ["--lengths", "100"], "at least 311"),
    ("extraction", ["--pairs", "-1"], "at least 0"), ("kernel_resources", ["--tile", "1,2"], "five whole numbers"),
    ("kernel_resources", ["--capability", "x"], "no compute capability"),
    ("kernel_resources", ["--terms", "nope"], "there are entropy, top1"),
])
def test_bad_flags_of_others_are_one_message(script, flags, message, capsys):
    module = importlib.import_module(script)
    with pytest.raises(SystemExit):
        module.main(flags)
    assert message in capsys.readouterr().err


def test_compiled_ways_have_names_of_their_own():
    _, ways = train_step.parse(["--only", "ours", "--compile", "--checkpointing", "none", "full", "selective"])
    assert list(ways) == ["ours, compiled", "ours, checkpointing, compiled", "ours, checkpointing selective, compiled"]


# --- extraction.py


def test_transformers_attention_is_timed_without_cudnn():
    model = SimpleNamespace(device=torch.device("cpu"), get_decoder=lambda: lambda *_, use_cache: seen.append(
        torch.backends.cuda.cudnn_sdp_enabled()))
    seen: list[bool] = []
    with harness.cudnn(True):
        extraction.plain_trunk(model, extraction.equal_pairs(1, 330, 99))
    assert seen == [False, False]


# --- gpu.sh


GPU_SH = str(ROOT / "benchmarks/gpu.sh")


def gpu_sh(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", GPU_SH, *arguments], capture_output=True, text=True, env=os.environ | environment)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="it would run")
def test_without_a_gpu_it_says_what_it_would_run(tmp_path):
    """Exit code 2, nothing written; every command's flags are ones that the script takes."""
    ran = gpu_sh("6", PYTHON=sys.executable, OUT=str(tmp_path / "out"))
    assert ran.returncode == 2 and "finds no GPU" in ran.stdout and not (tmp_path / "out").exists()
    lines = [line.strip() for line in ran.stdout.splitlines()[1:]]
    assert [line.split(",")[0] for line in lines] == list(gpu_table.PARTS)
    limits = [int(line.split("at most ")[1].split(" s:")[0]) for line in lines]
    assert sum(limits) == 360 and all(limit >= 20 for limit in limits)
    parsers = {"loss_kernel.py": lambda flags: loss_kernel.parse(flags, CUDA),
               "attention.py": lambda flags: attention.parse(flags, CUDA),
               "extraction.py": lambda flags: extraction.parse(flags, CUDA), "train_step.py": train_step.parse,
               "online_costs.py": online_costs.parse}
    parsed = 0
    for line in lines:
        command = line.split(f"{sys.executable} ")[1]
        for name, parse in parsers.items():
            if command.startswith(f"benchmarks/{name} "):
                parse(command.split()[1:])
                parsed += 1
    assert parsed == 6


STUB = """#!/bin/bash
case "$*" in
    *gpu_table.py*) exec "$REAL" "$@" ;;
    *"import sys, torch"*) exit "${FOUND:-0}" ;;
    *"import datasets, trl"*) echo "no trl" >&2; exit 1 ;;
esac
[ "${HANG:-}" ] && { echo "hangs"; sleep 300; }
[ "${FAIL:-}" ] && exit 3
case "$*" in
    "-m pytest"*) echo "FAILED tests/test_gpu.py::test_x"; echo "== 1 failed, 35 passed in 71.20s =="; exit 1 ;;
    *loss_kernel.py*) echo "no row yet"; setsid sleep 300 & echo $! > "$STRAGGLER"; sleep 60 ;;
    *attention.py*) echo '{"rows": [{"way": "ours", "note": "out of memory"}]}' > "${@: -1}" ;;
    *extraction.py*) kill -9 $$ ;;
    *train_step.py*|*online_costs.py*) exit 3 ;;
    "train.py --output-dir"*)
        mkdir -p "$3" && echo '{"step": 64, "eval/reward_accuracy": 0.97}' > "$3/metrics.jsonl" ;;
esac
"""


@pytest.fixture
def stub(tmp_path) -> dict[str, str]:
    """The environment with a stand-in for Python that finds a GPU."""
    (tmp_path / "python").write_text(STUB)
    (tmp_path / "python").chmod(0o755)
    return {"PYTHON": str(tmp_path / "python"), "OUT": str(tmp_path / "out"), "REAL": sys.executable,
            "STRAGGLER": str(tmp_path / "straggler")}


def ends_of(folder: Path) -> dict[str, str]:
    return {row["part"]: row["status"] for row in gpu_table.read_rows(folder / "parts.jsonl")}


@pytest.mark.slow
def test_a_part_that_fails_or_hangs_does_not_hold_up_the_others(tmp_path, stub):
    """Nor does a process that it leaves behind with its output open: that one is there when all is over."""
    ran = gpu_sh("0.5", **stub)
    os.kill(int((tmp_path / "straggler").read_text()), signal.SIGKILL)
    assert ran.returncode == 0, ran.stderr
    assert ends_of(tmp_path / "out") == {
        "tests": "failed: exit code 1", "op": "ended by its limit", "step": "failed: exit code 3", "attention": "ok",
        "extraction": "killed: exit code 137", "online": "failed: exit code 3", "toy": "ok",
        "trl": "left out: trl and datasets can't be imported"}
    table = (tmp_path / "out/table.txt").read_text()
    assert ran.stdout.endswith(table) and table.startswith(f"results in {tmp_path / 'out'}\n")
    assert "1 failed, 35 passed in 71.20s" in table and ran.stdout.count("no row yet") == 1
    assert "FAILED tests/test_gpu.py::test_x" in table and "held-out accuracy 0.970" in table
    assert table.count("it left no result") == 4 and "ours: out of memory" in table
    again = gpu_sh("0.5", **stub)
    assert again.returncode == 2 and "holds an earlier run" in again.stderr and not again.stdout


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_stops_the_part_and_all_others(tmp_path, stub, name):
    with subprocess.Popen(["bash", GPU_SH], stdout=subprocess.PIPE, text=True, env=os.environ | stub | {"HANG": "1"},
                          preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)) as script:
        for line in script.stdout:
            if line == "hangs\n":
                break
        script.send_signal(getattr(signal, name))
        rest = script.stdout.read()
    assert script.returncode == 130 and ends_of(tmp_path / "out") == {"tests": "stopped"}
    assert rest.count("not reached") == len(gpu_table.PARTS) - 1


def test_its_exit_code_says_when_no_part_succeeded(tmp_path, stub):
    assert gpu_sh("0.5", **stub, FAIL="1").returncode == 1
    assert ends_of(tmp_path / "out")["toy"] == "failed: exit code 3"


@pytest.mark.parametrize("arguments", [["abc"], ["--help"], ["0"], ["0.0"], ["-1"], ["nan"], ["5", "6"], [""]])
def test_minutes_that_are_none_are_answered_with_the_usage(arguments, stub):
    ran = gpu_sh(*arguments, **stub, FOUND="3")
    # An empty argument is as good as none: the default.
    assert ran.returncode == 2 and ("usage: " in ran.stderr) == (arguments != [""])


def test_a_python_of_no_use_is_not_a_missing_gpu(tmp_path, stub):
    for python, message in (("nowhere", "no program"), ("false", "can't import torch")):
        ran = gpu_sh(**stub | {"PYTHON": python})
        assert ran.returncode == 2 and message in ran.stderr and "finds no GPU" not in ran.stdout + ran.stderr
    ran = subprocess.run(["bash", GPU_SH], capture_output=True, text=True, cwd=tmp_path,
                         env=os.environ | stub | {"PYTHON": "./python", "FOUND": "3"})
    assert f"{tmp_path / 'python'} finds no GPU" in ran.stdout


def test_the_table_is_one_screen_of_what_is_there(tmp_path, capsys):
    def write(name: str, rows: list[dict], **more) -> None:
        (tmp_path / name).write_text(json.dumps({"machine": {"device": "NVIDIA X"}, "rows": rows} | more))
    gpu_table.main([str(tmp_path)])
    assert capsys.readouterr().out.count("not reached") == len(gpu_table.PARTS)
    op = {"head": "llama-3-8b", "tokens": 4096, "forward_backward_ms": 26.5, "times_8nvd": 1.02, "peak_extra_mib": 208}
    write("loss_kernel.json", [op | {"method": "twdpo, Triton"}, op | {"method": "TRL", "over_ours": 1.08},
                               {"head": "llama-3-8b", "tokens": 4096, "method": "z", "note": "x" * 300}],
          missing={"Liger": "can't be imported"})
    step = {"model": "llama-3-8b", "way": "ours, checkpointing", "step_seconds": 3.72, "pairs_per_s": 8.1, "mfu": 0.282,
            "peak_gib": 131.5, "reserved_gib": 138.2, "planned_gib": 133.9}
    write("train_step.json", [{"model": "llama-3-8b", "way": "ours", "note": "does not fit"}, step])
    write("attention.json", [{"way": "ours", "first_ms_40_lengths": 3.0, "first_ms_one_length": 2.0, "ratio": 1.5}])
    write("extraction.json", [{"tokens": 868, "way": "ours", "seconds_a_pair": 0.05, "first_seconds_a_pair": 0.4,
                               "over_limit": 0.99, "peak_extra_mib": 819}])
    (tmp_path / "toy-metrics.jsonl").write_text('{"step": 0, "eval/reward_accuracy": 0.5}\n{"step": 64, '
                                                '"eval/reward_accuracy": 0.977, "eval/planted_lift": 11.28}\n{"step"')
    (tmp_path / "parts.jsonl").write_text('{"part": "op", "status": "ok", "seconds": 70, "limit": 75}\n')
    gpu_table.main([str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [f"results in {tmp_path}", "device NVIDIA X"]
    assert max(map(len, lines)) <= gpu_table.WIDTH and len(lines) <= 50
    for line in ("the fused op:             70 of 75 s: ok",
                 "  llama-3-8b, 4,096 tokens: twdpo, Triton: 26.50 ms, 1.02 x 8NVD, 1.00 x ours, 208 MiB",
                 "  llama-3-8b, 4,096 tokens: TRL: 26.50 ms, 1.02 x 8NVD, 1.08 x ours, 208 MiB",
                 "  not here: Liger: can't be imported", "  llama-3-8b: ours: does not fit",
                 "  llama-3-8b: ours, checkpointing: 3.72 s a step, 8.1 pairs/s, MFU 28.2%, 131.5 GiB (138.2 reserved, "
                 "133.9 planned)",
                 "  ours: first time 3.0 ms for 40 lengths, 2.0 for one: 1.50 x",
                 "  868 tokens: ours: 0.050 s a pair (first call 0.400), 0.99 x bare trunk, 819 MiB",
                 "  step 64: held-out accuracy 0.977, planted lift 11.28"):
        assert line in lines, line
    (tmp_path / "attention.json").write_text('{"rows": [')
    (tmp_path / "extraction.json").write_text("[]")
    gpu_table.main([str(tmp_path)])
    printed = capsys.readouterr().out
    assert "\nattention.json can't be read: " in printed and "\nextraction.json holds no report\n" in printed
    assert "TRL: 26.50 ms" in printed
    with pytest.raises(SystemExit):
        gpu_table.main([str(tmp_path / "nowhere")])
