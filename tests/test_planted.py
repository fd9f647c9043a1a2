"""What is known of the toy's answers, and the figures made of it, by hand."""

import math

import pytest
import torch
from runs_of_tests import read_rows
from transformers import AutoTokenizer

import train
from twdpo.batch import collate
from twdpo.chat import tokenize_pairs
from twdpo.pairs import parse_row
from twdpo.planted import content_tokens, filler_drift, planted_lift, planted_tokens
from twdpo.rows import MicroBatch

ROW = {"prompt": "Hello.", "chosen": "Your question is wise. Set a small goal.", "rejected": "Your question is dull."}


@pytest.fixture(scope="module")
def batch(toy_model):
    examples, _, _ = tokenize_pairs(AutoTokenizer.from_pretrained(toy_model), [parse_row("x", ROW)], 100, 50)
    return collate(MicroBatch((0,)), examples, [0])


def test_the_slot_word_is_planted_and_the_end_of_turn_is_no_content(batch):
    """Eleven tokens of the chosen answer and six of the rejected one, the end of the turn the last of each."""
    assert batch.seq_lens_S.tolist() == [11, 6]
    assert planted_tokens(batch).nonzero().flatten().tolist() == [3, 14]
    assert (~content_tokens(batch)).nonzero().flatten().tolist() == [10, 16]


def test_lift_by_hand(batch):
    """Uniform weights: 1. Half the mass on the planted token of ten: 5; of five: 2.5. No mass: 1."""
    lift_S, share_S = planted_lift(torch.ones(17), batch)
    assert lift_S.tolist() == pytest.approx([1, 1]) and share_S.tolist() == pytest.approx([0.1, 0.2])
    raw_N = torch.zeros(17)
    raw_N[[3, 4, 14, 13]] = 2.0
    raw_N[[10, 16]] = 100.0  # the end of the turn does not count
    lift_S, share_S = planted_lift(raw_N, batch)
    assert lift_S.tolist() == pytest.approx([5, 2.5]) and share_S.tolist() == pytest.approx([0.5, 0.5])
    raw_N[:10] = 0
    assert planted_lift(raw_N, batch)[0].tolist() == pytest.approx([1, 2.5])


def test_drift_is_that_of_filler_alone(batch):
    """Nine and four filler tokens moved by 0.1 and 0.4, either way; planted words and the end of the turn by more."""
    logps_N = torch.full((17,), -0.1)
    logps_N[11:] = 0.4
    logps_N[[3, 14, 10, 16]] = 50.0
    assert filler_drift(logps_N, torch.zeros(17), batch).tolist() == pytest.approx([(9 * 0.1 + 4 * 0.4) / 13])


def test_evaluations_of_the_toy_know_its_kinds(tmp_path, run_cache):
    """Accuracies of tone and topic make up the whole; weights of attention are lifted, uniform ones not."""
    flags = ["--cache-dir", str(run_cache), "--max-steps", "2", "--lr", "1e-4", "--save-every", "0"]
    train.main([*flags, "--output-dir", str(tmp_path / "run")])
    first, last = (row for row in read_rows(tmp_path / "run") if "eval/pairs" in row)
    assert (last["eval/reward_accuracy_tone"] + last["eval/reward_accuracy_topic"]) / 2 == pytest.approx(
        last["eval/reward_accuracy"])  # 64 pairs each
    assert first["eval/filler_drift"] == 0 < last["eval/filler_drift"]
    assert last["eval/planted_lift"] > 2 and (tmp_path / "run/weights/weights.html").exists()
    train.main([*flags, "--output-dir", str(tmp_path / "plain"), "--weights", "uniform", "--loss", "simpo"])
    *_, last = (row for row in read_rows(tmp_path / "plain") if "eval/pairs" in row)
    assert math.isclose(last["eval/planted_lift"], 1, rel_tol=1e-6) and "eval/filler_drift" not in last
    assert not (tmp_path / "plain/weights").exists()
