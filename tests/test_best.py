"""One meaning of "best": the page, the console and best/ name the same step, on a resume too."""

import json
import re

import pytest

import train
from twdpo.log import best_evaluation, describe_best, read_rows, shown_evaluations
from twdpo.run_folder import code_commit

LOSSES = {2: 0.9, 4: 0.6, 6: 0.6, 8: 0.7}  # of the evaluations


def make_rows(losses) -> list[dict]:
    return [{"step": step, "eval/loss": loss, "eval/pairs": 3} for step, loss in losses.items()]


def test_the_start_is_no_candidate_and_the_first_of_equals_is_best():
    rows = [*make_rows({0: 0.5} | LOSSES), {"step": 9, "loss": 0.1}]
    shown = shown_evaluations(rows)
    assert {name: row["step"] for name, row in shown.items()} == {"start": 0, "best": 4, "last": 8}
    assert describe_best(rows) == ("no step was better than the start, whose held-out loss is 0.5000: the lowest "
                                   "held-out loss after it is 0.6000, at step 4")
    assert describe_best(make_rows({0: 0.7} | LOSSES)) == "best: step 4, the lowest held-out loss"
    assert describe_best(make_rows(LOSSES)) == "best: step 4, the lowest held-out loss"  # a run that began elsewhere
    assert describe_best(make_rows({0: 0.5})) == "" and best_evaluation(make_rows({0: 0.5})) is None
    lost = [{"step": 1, "eval/pairs": 3}]  # its loss was no number
    assert describe_best(lost).startswith("no step is best") and "best" not in shown_evaluations(lost)


def evaluated(monkeypatch, losses: dict[int, float]) -> None:
    """Evaluations of these losses."""
    original = train.evaluate
    monkeypatch.setattr(train, "evaluate", lambda run: original(run) | {"eval/loss": losses[run.step]})


def check_best(folder, step: int, printed: str) -> None:
    """All that says what is best says this step."""
    rows = read_rows(folder / "metrics.jsonl")
    assert json.loads((folder / "best/evaluation.json").read_text()) == best_evaluation(rows)
    assert best_evaluation(rows)["step"] == step
    assert f"best (step {step})" in printed and f"{folder / 'best'}: the policy at the best step" in printed
    page = (folder / "report.html").read_text()
    assert f"<th>best (step&nbsp;{step})</th>" in page and f"best/ holds the policy of step {step}." in page
    assert f">best: {step}</text>" in page


def test_page_console_and_folder_agree(tmp_path, run_arguments, monkeypatch, capsys):
    """Where the start was better too; the policy in best/ is that of its step."""
    flags = {"loss": "dpo", "max_steps": 8, "eval_every": 2, "eval_fraction": 0.2}
    evaluated(monkeypatch, {0: 0.1} | LOSSES)
    train.main(run_arguments(tmp_path / "run", **flags))
    printed = capsys.readouterr().out
    check_best(tmp_path / "run", 4, printed)
    assert "\nno step was better than the start, whose held-out loss is 0.1000" in printed
    evaluated(monkeypatch, {0: 0.1, 2: 0.3, 4: 0.2, 6: 0.5, 8: 0.9})
    kept = []
    original = train.keep_best
    monkeypatch.setattr(train, "keep_best", lambda run, row: original(run, row) or kept.append(
        {name: value.clone() for name, value in run.policy.state_dict().items()} if run.step == 4 else None))
    train.main(run_arguments(tmp_path / "again", **flags))
    from safetensors.torch import load_file
    stored = load_file(tmp_path / "again/best/model.safetensors")
    (at_4,) = filter(None, kept)
    name = next(name for name in stored if "q_proj" in name)
    assert stored[name].equal(at_4[f"model.{name}"].to(stored[name].dtype))


def test_a_resume_goes_on_with_the_best_so_far(tmp_path, run_arguments, monkeypatch, capsys):
    """Killed after step 6; a better evaluation before the checkpoint stays best, one of the branch that is given up
    does not."""
    argv = run_arguments(tmp_path / "run", loss="dpo", max_steps=8, eval_every=2, save_every=4)
    losses = {0: 0.9, 2: 0.4, 4: 0.8, 6: 0.3, 8: 0.35}
    evaluated(monkeypatch, losses)
    original, calls = train.train_step, []
    def die(run):
        calls.append(run.step)
        if run.step == 6:
            raise KeyboardInterrupt
        return original(run)
    monkeypatch.setattr(train, "train_step", die)
    with pytest.raises(SystemExit):
        train.main(argv)
    assert json.loads((tmp_path / "run/best/evaluation.json").read_text())["step"] == 6
    monkeypatch.setattr(train, "train_step", original)
    losses |= {6: 0.7, 8: 0.6}  # as another device may have it
    capsys.readouterr()
    train.main([*argv, "--resume"])
    printed = capsys.readouterr().out
    assert "--resume: best comes after the step that the run goes on from: removed" in printed
    assert "best (step 2)" in printed and not (tmp_path / "run/best").exists() and "best: the policy" not in printed
    assert "best/ holds" not in (tmp_path / "run/report.html").read_text()
    losses |= {6: 0.7, 8: 0.1}
    train.main([*argv, "--resume", str(tmp_path / "run/checkpoints/step-0000004")])
    check_best(tmp_path / "run", 8, capsys.readouterr().out)


def test_a_run_keeps_with_what_it_was_made(tmp_path, run_arguments, plain_run, capsys):
    (start,) = json.loads((plain_run / "environment.json").read_text())
    assert start["step"] == 0 and start["processes"] == 1 and start["device"] == "CPU"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", start["date"]) and start["torch"] and start["transformers"]
    assert re.fullmatch(r"([0-9a-f]{7,}(-dirty)?)?", start["commit"]) and [*start["held_out"]] == [""]
    assert f"torch {start['torch']}" in (plain_run / "report.html").read_text()
    argv = run_arguments(tmp_path / "run", max_steps=3, save_every=1, keep_last=3)
    train.main(argv)
    for number in (2, 1):
        train.main([*argv, "--resume", str(tmp_path / f"run/checkpoints/step-000000{number}")])
        starts = json.loads((tmp_path / "run/environment.json").read_text())
        assert [each["step"] for each in starts] == [0, number]  # what a resume from before gave up is gone
    assert "resumed at step 1" in (tmp_path / "run/report.html").read_text()


def test_the_commit_is_that_of_the_project_alone(tmp_path, monkeypatch):
    """A folder inside another project's checkout, and one without git, have none."""
    from twdpo import run_folder
    monkeypatch.setattr(run_folder, "ROOT", tmp_path)
    assert code_commit() == ""
    (tmp_path / ".git").mkdir()
    assert code_commit() == ""  # git finds no repository there
    monkeypatch.setenv("PATH", "")
    assert code_commit() == ""
