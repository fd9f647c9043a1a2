"""How the entry points end: one line, whatever ends them; and what must not end them at all."""

import contextlib
import errno
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from processes_of_tests import CONTEXT, TIMEOUT
from runs_of_tests import read_rows

import extract
import train
from twdpo.script import Patient, StopSignals, find_full_disk, run_script

ROOT = Path(__file__).resolve().parent.parent
PLAIN = {"loss": "dpo", "weights": "uniform", "eval_every": 0, "save_every": 0}


def start_process(argv: list[str], *, script: str = "train.py", **options) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, script, *argv], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, **options)


def run_and_signal(script: str, argv: list[str], function: str, number: int, sent: int, errors) -> None:
    """In a child: SCRIPT.main(argv), which gets a signal at that call, from 1, of a function: "module.name"."""
    import importlib
    module, name = function.rsplit(".", 1)
    original, calls = getattr(importlib.import_module(module), name), []

    def replacement(*args, **kwargs):
        calls.append(None)
        if len(calls) == number:
            os.kill(os.getpid(), sent)
        return original(*args, **kwargs)
    setattr(importlib.import_module(module), name, replacement)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's job in the background ignores it
    with contextlib.redirect_stderr(io.StringIO()) as printed, contextlib.redirect_stdout(printed):
        try:
            importlib.import_module(script).main(argv)
        finally:
            errors.put(printed.getvalue())


def signalled(script: str, argv: list[str], function: str, number: int, sent: int) -> tuple[int, str]:
    """(exit code, what was printed)."""
    errors = CONTEXT.SimpleQueue()
    child = CONTEXT.Process(target=run_and_signal, args=(script, argv, function, number, sent, errors))
    child.start()
    printed = errors.get()
    child.join(TIMEOUT)
    return child.exitcode, printed


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_at_the_next_step(sent, tmp_path, run_arguments):
    argv = run_arguments(tmp_path / "run", **PLAIN)
    train.main(run_arguments(tmp_path / "whole", **PLAIN))
    code, printed = signalled("train", argv, "train.train_step", 3, sent)
    assert code == 0 and "--resume goes on from step-0000003" in printed
    assert not (tmp_path / "run/final").exists()
    train.main([*argv, "--resume"])
    assert read_rows(tmp_path / "run") == read_rows(tmp_path / "whole")
    # In the last step there is nothing to go on with: the run ends as ever.
    code, _ = signalled("train", run_arguments(tmp_path / "last", **PLAIN), "train.train_step", 6, sent)
    assert code == 0 and (tmp_path / "last/final").exists()


def test_a_second_signal_is_obeyed():
    heard = []
    before = signal.signal(signal.SIGUSR1, lambda *_: heard.append("outside"))
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGUSR1)
            assert signals.seen == signal.SIGUSR1 and not heard
            os.kill(os.getpid(), signal.SIGUSR1)
            assert heard == ["outside"]
        os.kill(os.getpid(), signal.SIGUSR1)
        assert len(heard) == 2
    finally:
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize("function, line", [
    ("train.train_step", "; --output-dir OUT --resume goes on from step-0000002"),
    ("twdpo.inputs.load_dataset", "; nothing was trained yet: the same command begins anew"),
])
def test_an_interruption_is_one_line(function, line, tmp_path, run_arguments):
    argv = run_arguments(tmp_path / "run", **PLAIN | {"save_every": 2})
    code, printed = signalled("train", argv, function, 4 if "step" in function else 1, signal.SIGINT)
    lines = [each for each in printed.splitlines() if "interrupted" in each]
    assert code == 130 and lines[-1].startswith("train.py: interrupted" + line.replace("OUT", str(tmp_path / "run")))
    assert "Traceback" not in printed and printed.rstrip().endswith(lines[-1])


def test_an_interrupted_extraction_says_how_it_goes_on(tmp_path, toy_model, run_pairs):
    argv = ["--model", str(toy_model), "--data", str(run_pairs), "--judge-prompt", "short", "--out", str(tmp_path)]
    code, printed = signalled("extract", argv, "twdpo.judge.extraction.write_shard", 1, signal.SIGINT)
    assert code == 130 and "extract.py: interrupted; the same command goes on where it was" in printed


# ----------------------------------------------------------------------------------------------------------------------
# A full disk

def test_a_full_disk_is_found_among_the_causes():
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/x/y")
    assert find_full_disk(full) == "/x/y can't be written: No space left on device"
    try:
        try:
            raise full
        except OSError as error:
            raise RuntimeError("in a collective") from error
    except RuntimeError as error:
        assert "/x/y" in find_full_disk(error)
    assert find_full_disk(RuntimeError("a\nI/O error: File too large (os error 27)")).endswith("(os error 27)")
    assert not find_full_disk(ValueError("x")) and not find_full_disk(OSError(errno.EACCES, "denied"))


LIMITED = """
import resource, sys
import train
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
train.main(sys.argv[2:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("most_bytes", [0, 500, 3000, 20_000, 60_000, 200_000])
def test_files_that_may_not_grow_end_a_run_with_one_line(most_bytes, tmp_path, run_arguments):
    """What stands for a full disk without a disk: at every size another file is the first that is too large."""
    argv = run_arguments(tmp_path / "run", **PLAIN | {"save_every": 1, "max_steps": 2, "cache_dir": tmp_path / "cache"})
    process = start_process([LIMITED, str(most_bytes), *argv], script="-c")
    _, error = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 2 and "Traceback" not in error, error
    assert error.splitlines()[-1].startswith("train.py: error: ") and "File too large" in error.splitlines()[-1]
    if (tmp_path / "run/config.json").exists():
        train.main([*argv, "--resume"])
    else:
        train.main(argv)
    assert [row["step"] for row in read_rows(tmp_path / "run")][-1] == 2


def test_no_home_is_one_message(tmp_path, run_arguments, monkeypatch, capsys):
    def no_home(self):
        raise RuntimeError("Could not determine home directory.")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "expanduser", no_home)
    argv = run_arguments(tmp_path / "run", max_steps=1)
    place = argv.index("--cache-dir")
    with pytest.raises(SystemExit):
        train.main([*argv[:place], *argv[place + 2:]])
    assert "nobody's home folder is known here" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------------------
# Output

def test_a_terminal_without_signs_ends_no_run(tmp_path, run_arguments):
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    argv = run_arguments(tmp_path / "run", **PLAIN | {"max_steps": 1, "eval_every": 1})
    process = start_process(argv, env=environment)
    printed, error = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, error
    assert " +- " in printed


def test_a_reader_that_goes_ends_no_run(tmp_path, run_arguments):
    process = start_process(run_arguments(tmp_path / "run", **PLAIN | {"max_steps": 2}), bufsize=1)
    process.stdout.readline()
    process.stdout.close()
    process.stderr.close()
    assert process.wait(TIMEOUT) == 0 and (tmp_path / "run/final/model.safetensors").exists()


def test_what_is_written_to_nobody_is_dropped():
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream:
        patient = Patient(stream)
        assert patient.write("x" * 100_000) == 100_000
        patient.flush()
        patient.write("y")
        assert patient.fileno() == stream.fileno()


def test_streams_are_as_before(capsys):
    before = sys.stdout, sys.stderr
    run_script("x", lambda: None, lambda config, process: process.print("said"))
    assert (sys.stdout, sys.stderr) == before and capsys.readouterr().out == "said\n"


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["--nonsense"], ["--help"], ["--lr"]])
def test_processes_say_what_the_command_line_is_once(flags):
    result = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
                             "train.py", *flags], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (result.stdout + result.stderr).count("[FLAG VALUE ...]") == 1
    assert (result.returncode == 0) == (flags == ["--help"])


# ----------------------------------------------------------------------------------------------------------------------
# Numbers that are not finite

LOSSES = """
import torch
from twdpo.losses import LOSSES
def bad(ratio_S, logps_N, batch, config):
    loss_P = ratio_S[1::2] - ratio_S[0::2]
    where = torch.tensor([example.pair.where.endswith(":7") for example in batch.examples])
    return loss_P.masked_fill(where, float("inf")), {}
def steep(ratio_S, logps_N, batch, config):
    loss_P = ratio_S[1::2] - ratio_S[0::2]
    return loss_P + (loss_P - loss_P.detach()).abs().sqrt(), {}
LOSSES |= {"bad": bad, "steep": steep}
"""


@pytest.mark.parametrize("loss, message", [("bad", ":7 is not finite, its log-probabilities are: lower --beta"),
                                           ("steep", "every pair is finite, the gradient is not: lower --lr")])
def test_a_step_that_is_not_finite_names_its_pair(loss, message, tmp_path, run_arguments, capsys):
    (tmp_path / "bad.py").write_text(LOSSES)
    argv = run_arguments(tmp_path / "run", **PLAIN | {"loss": loss, "eval_fraction": 0, "max_steps": 9})
    with pytest.raises(SystemExit) as stopped:
        train.main([*argv, "--import", str(tmp_path / "bad.py")])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and message in error and "the weights are those of step" in error
    assert not (tmp_path / "run/final").exists()


def test_weights_that_are_not_finite_are_not_saved(tmp_path, run_arguments, capsys):
    for steps, message in ((1, "step 1 made weights that are not finite, and nothing of them is saved"),
                           (2, "log-probabilities of ")):
        argv = run_arguments(tmp_path / "run", **PLAIN | {"max_steps": steps, "lr": 3e38, "eval_fraction": 0})
        with pytest.raises(SystemExit):
            train.main([*argv, "--overwrite", "--save-every", str(steps)])
        assert message in capsys.readouterr().err
        assert not (tmp_path / "run/final").exists() and not list((tmp_path / "run").glob("checkpoints/*"))


# ----------------------------------------------------------------------------------------------------------------------
# Files that someone has changed

def test_rows_that_are_none_are_dropped_with_a_word(tmp_path, run_arguments, capsys):
    argv = run_arguments(tmp_path / "run", **PLAIN | {"save_every": 1, "max_steps": 2, "sample": 1, "eval_every": 1})
    train.main(argv)
    for name in ("metrics.jsonl", "samples.jsonl"):
        path = tmp_path / "run" / name
        path.write_text(path.read_text().replace('"step"', '"rtep"', 1))
    capsys.readouterr()
    train.main([*argv, "--resume"])
    printed = capsys.readouterr().out
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert f"{tmp_path / 'run' / name}, line 1: " in printed


def test_rejected_rows_are_strict_json(tmp_path, run_arguments, run_pairs, capsys):
    rows = run_pairs.read_text().splitlines()
    bad = ['{"prompt": "x", "chosen": NaN, "rejected": ["y", Infinity]}',
           json.dumps({"prompt": [{"role": "us\ud800er", "content": "x"}], "chosen": "a", "rejected": "b"})]
    (tmp_path / "rows.jsonl").write_text("\n".join([*bad, *rows]))
    train.main([*run_arguments(tmp_path / "run", **PLAIN | {"data": tmp_path / "rows.jsonl", "max_steps": 1}),
                "--skip-bad-rows"])
    found = [json.loads(line, parse_constant=lambda name: pytest.fail(name))
             for line in (tmp_path / "run/rejected_rows.jsonl").read_text().splitlines()]
    assert [row["row"]["chosen"] for row in found] == ["nan", "a"] and "surrogates not allowed" in found[1]["reason"]


def test_extract_ends_like_train(tmp_path, toy_model, run_pairs, capsys, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "shard")
    monkeypatch.setattr("twdpo.judge.extraction.write_shard", full)
    with pytest.raises(SystemExit) as stopped:
        extract.main(["--model", str(toy_model), "--data", str(run_pairs), "--judge-prompt", "short", "--out",
                      str(tmp_path / "w")])
    assert stopped.value.code == 2
    assert "extract.py: error: shard can't be written: No space left on device" in capsys.readouterr().err
