"""After a loss of power a run goes on as if nothing had happened, or says what is gone. (A sample of the states; all of
them: python -m tests.harness.)"""

import shutil

import pytest
from power_of_tests import EMPTY, Recorder
from runs_of_tests import read_rows

import train

FLAGS = {"max_steps": 3, "save_every": 1, "eval_every": 1, "keep_last": 1}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory, run_arguments):
    """(a recorded run with its judge and its caches, a copy of what it came to, its flags)."""
    root = tmp_path_factory.mktemp("power") / "root"
    argv = run_arguments(root / "run", cache_dir=root / "cache", **FLAGS)
    root.mkdir()
    with Recorder(root) as recorder:
        train.main(argv)
    return recorder, shutil.copytree(root, root.with_name("whole")), argv


def is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def goes_on(recorder: Recorder, whole, argv: list[str], state: dict, capsys) -> str:
    """What a resume of this state comes to: "whole", or what it was refused for."""
    recorder.restore(state, recorder.root)
    capsys.readouterr()
    try:
        train.main([*argv, "--resume"])
    except SystemExit as stopped:
        error = capsys.readouterr().err
        assert stopped.code == 2 and "train.py: error: " in error
        return error
    printed = capsys.readouterr().out
    if "lacks the rows" not in printed:
        assert read_rows(recorder.root / "run") == read_rows(whole / "run")
    for name in ("final/model.safetensors", "best/model.safetensors"):
        assert (recorder.root / "run" / name).read_bytes() == (whole / "run" / name).read_bytes()
    return "whole"


def test_the_recorder_knows_what_a_loss_of_power_may_leave(tmp_path):
    with Recorder(tmp_path) as recorder:
        (tmp_path / "a.tmp").write_text("new")
        (tmp_path / "a.tmp").rename(tmp_path / "a")
    left = [{name: recorder.contents[held] for name, held in state.items()} for state in recorder.states()]
    assert left == [{"a": b"new"}, {"a": b""}, {}]


@pytest.mark.slow
def test_a_run_goes_on_after_a_loss_of_power(recorded, capsys):
    recorder, whole, argv = recorded
    states = recorder.states()
    assert len(states) > 60
    lost = [state for state in states if any(held == EMPTY and not is_hidden(name) for name, held in state.items())]
    for state in lost[::len(lost) // 6 + 1] + states[::len(states) // 8]:  # those first that were not synced in time
        found = goes_on(recorder, whole, argv, state, capsys)
        assert found == "whole" or "start anew with --overwrite" in found
