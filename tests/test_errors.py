"""A user's error is one message, and leaves nothing behind."""

import subprocess
import sys
from pathlib import Path

import pytest

import extract
import train
from twdpo.files import check_directory

ROOT = Path(__file__).resolve().parent.parent
LLAMA = "meta-llama/Meta-Llama-3-8B-Instruct"


@pytest.mark.parametrize("main, out", [(train.main, "--output-dir"), (extract.main, "--out")])
def test_without_the_hub_extra_the_papers_run_says_what_to_install(main, out, tmp_path, monkeypatch, capsys):
    """The data set was never typed: the message says where it comes from. No empty folder stays."""
    monkeypatch.setitem(sys.modules, "datasets", None)  # importing it raises ImportError
    with pytest.raises(SystemExit) as stopped:
        main(["--model", LLAMA, out, str(tmp_path / "run")])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1
    assert "--data princeton-nlp/llama3-ultrafeedback (what the paper trains on" in error
    assert "pip install -e '.[hub]'" in error and not (tmp_path / "run").exists()


@pytest.mark.parametrize("flags", [["--data", "missing.jsonl"], ["--lr", "-1"], ["--loss", "nothing"]])
def test_an_error_leaves_no_folder(flags, tmp_path, toy_model, capsys):
    with pytest.raises(SystemExit):
        train.main(["--model", str(toy_model), "--data", "toy", *flags, "--output-dir", str(tmp_path / "a/run")])
    assert capsys.readouterr().err.startswith("train.py: error: ") and not (tmp_path / "a").exists()


def test_a_folder_is_checked_without_being_made(tmp_path):
    (tmp_path / "file").write_text("")
    check_directory(tmp_path / "new/folder", "--out")
    assert not (tmp_path / "new").exists()
    for path in (tmp_path / "file", tmp_path / "file/below"):
        with pytest.raises(ValueError, match="--out .*: the folder can't be made or written to"):
            check_directory(path, "--out")


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["--lr", "-1"], ["--data", "missing.jsonl"], ["--replicate", "3"]],
                         ids=["command line", "first process", "all processes"])
def test_processes_say_it_once(flags, tmp_path, toy_model):
    """An error of the command line, of the first process alone, and one that all of them find."""
    argv = ["--model", str(toy_model), "--data", "toy", *flags, "--output-dir", str(tmp_path / "run")]
    result = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
                             "train.py", *argv], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode and result.stderr.count("train.py: error: ") == 1
    assert flags[0] in result.stderr.split("train.py: error: ")[1].splitlines()[0] or flags[1] in result.stderr
