"""Whose files a start may touch: the run's own, at a moment when nobody else writes them."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from processes_of_tests import CONTEXT, run_and_die
from runs_of_tests import read_rows

import train
from twdpo.flags import InputError
from twdpo.lock import LOCK, release_locks, take_lock

PLAIN = {"loss": "dpo", "weights": "uniform", "save_every": 1, "eval_every": 0, "keep_last": 0}


@pytest.fixture(scope="module")
def run_of(tmp_path_factory, run_arguments):
    """Runs of two steps under their own settings, made once; each call copies one."""
    made = {}

    def copy(folder: Path, **flags) -> Path:
        key = tuple(sorted(flags.items()))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("runs") / "run"
            train.main(run_arguments(made[key], **PLAIN | {"max_steps": 2} | flags))
        shutil.copytree(made[key], folder)
        return folder
    return copy


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def refused(argv: list[str], message: str, capsys) -> None:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        train.main(argv)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and message in error and "Traceback" not in error


@pytest.mark.parametrize("flag", ["model", "data", "eval_data", "weights", "aux_model", "chat_template",
                                  "judge_prompt"])
def test_overwrite_deletes_nothing_that_is_read(flag, tmp_path, run_of, run_arguments, run_pairs, capsys):
    run_dir = run_of(tmp_path / "lr=1,2")
    shutil.copy(run_pairs, run_dir / "final/pairs.jsonl")
    value = run_dir / "final" if "model" in flag else run_dir / "final/pairs.jsonl"
    before = contents(run_dir)
    needs = {"weights": "tis"} if flag == "aux_model" else {}
    argv = [*run_arguments(run_dir, **PLAIN | needs), f"--{flag.replace('_', '-')}",
            f"x={value}" if flag == "eval_data" else str(value), "--overwrite"]
    refused(argv, f"--{flag.replace('_', '-')} {value} lies in what --overwrite deletes", capsys)
    assert contents(run_dir) == before


def test_a_model_inside_the_folders_that_a_run_replaces_is_refused(tmp_path, toy_model, run_arguments, capsys):
    shutil.copytree(toy_model, tmp_path / "run/best")
    argv = run_arguments(tmp_path / "run", model=tmp_path / "run/best", **PLAIN)
    refused(argv, "lies in what the run replaces", capsys)


def test_a_resume_deletes_no_other_run(tmp_path, run_of, run_arguments, capsys):
    first, second = run_of(tmp_path / "a"), run_of(tmp_path / "b", lr=2e-3)
    before = contents(second)
    argv = [*run_arguments(second, **PLAIN | {"max_steps": 2}), "--resume", str(first / "checkpoints/step-0000001")]
    refused(argv, f"--output-dir {second} holds another run", capsys)
    assert contents(second) == before


def test_a_resume_into_a_new_folder_branches_off(tmp_path, run_of, run_arguments):
    first = run_of(tmp_path / "a")
    before = contents(first)
    argv = run_arguments(tmp_path / "b", **PLAIN | {"max_steps": 2})
    train.main([*argv, "--resume", str(first / "checkpoints/step-0000001")])
    assert contents(first) == before and read_rows(tmp_path / "b") == read_rows(first)
    ids = [json.loads((path / "config.json").read_text())["run_id"] for path in (first, tmp_path / "b")]
    assert ids[0] != ids[1]
    train.main([*argv, "--resume"])  # it is a run of its own
    assert read_rows(tmp_path / "b") == read_rows(first)


def test_only_the_runs_own_names_are_its_checkpoints(tmp_path, run_of, run_arguments, capsys):
    run_dir = run_of(tmp_path / "run")
    checkpoints = run_dir / "checkpoints"
    for name in ("step-backup", "step-0000009-copy"):
        shutil.copytree(checkpoints / "step-0000001", checkpoints / name)
    argv = [*run_arguments(run_dir, **PLAIN | {"max_steps": 2, "keep_last": 1}), "--resume"]
    train.main(argv)
    assert f"resumed from {checkpoints / 'step-0000002'}" in capsys.readouterr().out
    assert (checkpoints / "step-backup/manifest.json").exists() and (checkpoints / "step-0000009-copy").exists()
    other = run_of(tmp_path / "other", lr=2e-3)
    shutil.rmtree(checkpoints / "step-0000001")
    shutil.copytree(other / "checkpoints/step-0000001", checkpoints / "step-0000001")
    refused(argv, "is of another run", capsys)


def test_settings_stand_in_the_checkpoint_too(tmp_path, run_of, run_arguments, capsys):
    run_dir = run_of(tmp_path / "run")
    before = read_rows(run_dir)
    argv = run_arguments(run_dir, **PLAIN | {"max_steps": 2})
    for text in (None, "{"):
        (run_dir / "config.json").unlink() if text is None else (run_dir / "config.json").write_text(text)
        refused([*argv, "--lr", "0.05", "--batch-size", "8", "--resume"], "--lr: was ", capsys)
        refused(argv, "holds a run", capsys)
        train.main([*argv, "--resume"])
        assert "it is written anew" in capsys.readouterr().out
        assert read_rows(run_dir) == before and json.loads((run_dir / "config.json").read_text())["max_steps"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("number", range(1, 11))
def test_a_kill_while_a_run_is_replaced_mixes_nothing(number, tmp_path, run_of, run_arguments, capsys):
    """Before each of the deletions: under the old settings the old run goes on or begins anew, under the new ones
    nothing does without --overwrite."""
    run_dir, old = run_of(tmp_path / "run"), run_of(tmp_path / "old")
    argv, new = (run_arguments(run_dir, **PLAIN | {"max_steps": 2} | extra) for extra in ({}, {"lr": 2e-3}))
    run_and_die("train", [*new, "--overwrite"], "twdpo.run_folder.discard", number)
    copy = shutil.copytree(run_dir, tmp_path / "copy")
    refused([*run_arguments(copy, **PLAIN | {"max_steps": 2, "lr": 2e-3}), "--resume"], "", capsys)
    if (run_dir / "config.json").exists():
        train.main([*argv, "--resume"])
        assert read_rows(run_dir) == read_rows(old)
        assert contents(run_dir / "final") == contents(old / "final")
    else:
        refused([*argv, "--resume"], "start anew with --overwrite", capsys)
    train.main([*new, "--overwrite"])
    assert [row["step"] for row in read_rows(run_dir)] == [0, 1, 2, 2][-len(read_rows(run_dir)):]
    assert json.loads((run_dir / "config.json").read_text())["lr"] == 2e-3


def hold(folder: Path, pipe) -> None:
    """In a child: own the folder until it is killed."""
    take_lock(folder)
    pipe.send(os.getpid())
    signal.pause()


def test_a_second_run_in_a_folder_is_refused_until_the_first_is_dead(tmp_path, run_of, run_arguments, capsys):
    run_dir = run_of(tmp_path / "run")
    before, (mine, theirs) = contents(run_dir), CONTEXT.Pipe()
    child = CONTEXT.Process(target=hold, args=(run_dir, theirs))
    child.start()
    number = mine.recv()
    argv = run_arguments(run_dir, **PLAIN | {"max_steps": 2})
    for extra in ("--resume", "--overwrite"):
        refused([*argv, extra], f"is being written to by process {number} on ", capsys)
    assert {name: text for name, text in contents(run_dir).items() if name != LOCK} == before
    child.kill()
    child.join()
    train.main([*argv, "--resume"])
    assert not (run_dir / LOCK).exists()


def test_a_lock_leaves_nothing_and_says_when_there_are_none(tmp_path, monkeypatch, capsys):
    take_lock(tmp_path / "new")
    assert (tmp_path / "new" / LOCK).exists()
    release_locks()
    assert not (tmp_path / "new").exists()
    tmp_path.joinpath("there").mkdir()
    take_lock(tmp_path / "there")
    release_locks()
    assert (tmp_path / "there").exists() and not list((tmp_path / "there").iterdir())

    def no_locks(*_):
        raise OSError(37, "No locks available")
    monkeypatch.setattr("fcntl.lockf", no_locks)
    take_lock(tmp_path / "there")
    assert "file system without locks" in capsys.readouterr().out and not list((tmp_path / "there").iterdir())
    monkeypatch.setattr("fcntl.lockf", lambda *_: (_ for _ in ()).throw(BlockingIOError(11, "busy")))
    with pytest.raises(InputError, match="is being written to by another process"):
        take_lock(tmp_path / "there")


def test_a_resume_says_which_rows_are_missing(tmp_path, run_of, run_arguments, capsys):
    run_dir = run_of(tmp_path / "run")
    rows = (run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run_dir / "metrics.jsonl").write_text("".join(row for row in rows if '"step": 1,' not in row))
    train.main([*run_arguments(run_dir, **PLAIN | {"max_steps": 2}), "--resume"])
    assert "lacks the rows of 1 of the 2 steps" in capsys.readouterr().out
