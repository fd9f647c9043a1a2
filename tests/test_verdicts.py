"""What the judge's two verdicts on each pair say of it, and weights that go by them (verdicts=consistent)."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
from runs_of_tests import assert_close_rows, read_rows

import extract
import train
from twdpo.config import TrainConfig
from twdpo.weights import WeightContext, by_verdicts
from twdpo.weights_file import WeightsFile, describe_verdicts, warn_of_verdicts, wilson_interval

FOR_A, FOR_B = (-0.1, -3.0), (-3.0, -0.1)


def judged_as(*letters: str) -> tuple[WeightsFile, list[int]]:
    """(a weights file without attention, its keys): the letters that rounds 0 and 1 of each pair name."""
    stored = object.__new__(WeightsFile)
    stored._verdicts = {key: np.array([FOR_A if letter == "A" else FOR_B for letter in both])
                        for key, both in enumerate(letters)}
    return stored, list(stored._verdicts)


def test_the_interval_by_hand():
    """Wilson 1927: none of 12 up to z^2 / (12 + z^2), 8 of 10 from 0.490 to 0.943; at 0 and 1 it has a width."""
    assert wilson_interval(0, 12) == pytest.approx((0, 3.8415 / 15.8415), abs=1e-4)
    assert wilson_interval(0.8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    low, high = wilson_interval(0.3, 40)
    assert wilson_interval(0.7, 40) == pytest.approx((1 - high, 1 - low))


def test_a_judge_that_names_one_letter_is_warned_of():
    """Both rounds A: the verdicts are for different answers. Four such pairs are enough: none of 4 goes up to 0.490."""
    warning = warn_of_verdicts(*judged_as("AA", "AA", "AA", "AA"))
    assert "for 100% of the pairs it names the same letter in both orders (A in 100% of all verdicts)" in warning
    assert "extract.py --model JUDGE" in warning and "verdicts=consistent" in warning
    assert "(B in 95% of all verdicts)" in warn_of_verdicts(*judged_as(*["BB"] * 9, "BA"))


@pytest.mark.parametrize("letters", [["AA"] * 3, ["AA"] * 5 + ["AB"] * 5, ["BA"] * 20])
def test_a_judge_that_may_compare_is_not(letters):
    assert not warn_of_verdicts(*judged_as(*letters))


def test_the_line_has_the_interval():
    assert describe_verdicts(*judged_as("AA", "AB")) == (
        "position consistency 0.500 (95 % interval 0.095 to 0.905), agreement with the label 0.750")
    assert describe_verdicts(*judged_as()) == warn_of_verdicts(*judged_as()) == ""


def test_pairs_whose_verdicts_differ_are_left_uniform():
    """The second pair of three; each answer by its own length. With `any` all stay as they are."""
    stored, keys = judged_as("AB", "AA", "BA")
    batch = SimpleNamespace(examples=[SimpleNamespace(pair=SimpleNamespace(key=key)) for key in keys])
    weights = [np.array([0.75, 0.25]), np.array([1.0]), np.array([0.75, 0.25]), np.array([0.0, 0.0, 1.0, 0.0]),
               np.array([1.0]), np.array([0.125, 0.875])]
    context = WeightContext(TrainConfig(), stored)
    assert by_verdicts(weights, batch, context, "consistent").tolist() == [
        0.75, 0.25, 1, 0.5, 0.5, 0.25, 0.25, 0.25, 0.25, 1, 0.125, 0.875]
    assert by_verdicts(weights, batch, context, "any").tolist() == np.concatenate(weights).tolist()


@pytest.fixture
def verdicts(monkeypatch):
    """verdicts(share): of each file's pairs, about this share are consistent."""
    def give(share: float) -> None:
        monkeypatch.setattr(WeightsFile, "is_consistent", lambda self, keys: np.array(
            [key % 1000 < 1000 * share for key in keys]))
    return give


@pytest.mark.parametrize("source, options", [("attention", ""), ("attention_surprise", ""),
                                             ("attention_contrast", "against=OTHER,")])
def test_without_a_consistent_pair_all_are_uniform_and_that_is_said(source, options, tmp_path, run_arguments, verdicts,
                                                                    capsys):
    verdicts(0)
    (tmp_path / "other.txt").write_text("{question}\n{answer_a}\n{answer_b}\n")
    options = options.replace("OTHER", str(tmp_path / "other.txt"))
    train.main(run_arguments(tmp_path / "run", weights=source, weights_options=options + "verdicts=consistent"))
    printed = capsys.readouterr().out
    counts = re.search(r"(\d+) pairs to train on, (\d+) held out", printed)
    everything, held_out = int(counts[1]) + int(counts[2]), counts[2]
    assert f"verdicts=consistent: {everything} of {everything} pairs ({held_out} held out) are left uniform" in printed
    assert "warning: so are all pairs to train on" in printed and "does not compare" not in printed
    train.main(run_arguments(tmp_path / "uniform", weights="uniform"))
    assert_close_rows(read_rows(tmp_path / "run"), read_rows(tmp_path / "uniform"))


def test_with_consistent_pairs_alone_nothing_changes(tmp_path, run_arguments, verdicts, plain_run, capsys):
    verdicts(1)
    train.main(run_arguments(tmp_path / "run", weights_options="verdicts=consistent"))
    assert "verdicts=consistent: 0 of 19 pairs are left uniform" in capsys.readouterr().out
    assert read_rows(tmp_path / "run") == read_rows(plain_run)
    assert (tmp_path / "run/weights/weights.html").exists()


def test_extraction_and_run_warn(tmp_path, run_arguments, toy_model, run_pairs, monkeypatch, capsys):
    monkeypatch.setattr(WeightsFile, "names_a", lambda self, keys: np.ones((len(keys), 2), dtype=bool))
    extract.main(["--model", str(toy_model), "--data", str(run_pairs), "--judge-prompt", "short", "--out",
                  str(tmp_path / "weights")])
    printed = capsys.readouterr().out
    assert "position consistency 0.000 (95 % interval 0.000 to 0.168)" in printed
    assert "warning: this judge does not compare" in printed
    train.main(run_arguments(tmp_path / "run", weights=tmp_path / "weights", max_steps=1))
    assert "warning: this judge does not compare" in capsys.readouterr().out


@pytest.mark.parametrize("weights, why", [
    ("attention", "--layer 1 ends before the verdicts"), ("weights", "weights holds none"),
    ("columns.jsonl", "columns.jsonl holds none")])
def test_weights_without_verdicts_are_refused(weights, why, tmp_path, run_arguments, toy_model, run_pairs, capsys):
    if weights != "attention":
        extract.main(["--model", str(toy_model), "--data", str(run_pairs), "--judge-prompt", "short", "--layers", "1",
                      "--out", str(tmp_path / "weights"), "--export", str(tmp_path / "columns.jsonl")])
        weights = tmp_path / weights
    with pytest.raises(SystemExit):
        train.main(run_arguments(tmp_path / "run", weights=weights, layer="1", weights_options="verdicts=consistent"))
    assert why in (error := capsys.readouterr().err) and "--weights-options verdicts=consistent needs" in error
