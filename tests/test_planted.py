"""What is known of the toy's answers, and the figures made of it, by hand."""

import shutil

import pytest
import torch
from runs_of_tests import read_rows
from transformers import AutoTokenizer

import train
from twdpo.batch import Outputs, collate
from twdpo.chat import Chat
from twdpo.config import TrainConfig
from twdpo.forms import parse_row
from twdpo.metrics import means, to_host
from twdpo.rows import MicroBatch
from twdpo.tokens import tokenize_pairs
from twdpo.toy.planted import add_planted, content_tokens, filler_drift, planted_lift, planted_tokens, source_lift
from twdpo.weights import WEIGHTS, WeightContext

ROW = {"prompt": "Hello.", "chosen": "Your question is wise. Set a small goal.", "rejected": "Your question is dull."}


@pytest.fixture(scope="module")
def batch(toy_model):
    examples, _, _ = tokenize_pairs(Chat(AutoTokenizer.from_pretrained(toy_model)), [parse_row("x", ROW)], 100, 50)
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


def test_answers_that_lost_their_planted_word_are_left_out(toy_model):
    """Cut to three tokens, before the word; the rejected answer is its word alone."""
    row = ROW | {"rejected": "wise"}
    examples, _, _ = tokenize_pairs(Chat(AutoTokenizer.from_pretrained(toy_model)), [parse_row("x", row)], 9, 6)
    (example,) = examples
    assert example.chosen.content_N.sum() == 3
    lift, share = source_lift(WEIGHTS["uniform"], examples, WeightContext(TrainConfig()))
    assert lift == pytest.approx(1) and share == pytest.approx(1)


def test_accuracy_is_told_apart_by_kind(toy_model):
    """A tone pair that is right, a topic pair that is wrong; one without filler adds no drift."""
    rows = [ROW, {"prompt": "Tell me of the tide.", "chosen": "Much depends on the sail here.",
                  "rejected": "Much depends on the oven here."}, ROW | {"chosen": "wise", "rejected": "dull"}]
    examples, _, _ = tokenize_pairs(Chat(AutoTokenizer.from_pretrained(toy_model)),
                                    [parse_row(str(number), row) for number, row in enumerate(rows)], 100, 50)
    batch = collate(MicroBatch((0, 1, 2)), examples, [0, 1, 2])
    batch.coefficient_P[2] = 1.0
    gains = torch.zeros(len(batch.targets_N))
    starts = [0, *batch.seq_lens_S.cumsum(0).tolist()]
    gains[starts[0]], gains[starts[3]] = 0.3, 0.6  # the tone pair's chosen answer, the topic pair's rejected one
    totals: dict = {}
    add_planted(totals, Outputs(torch.zeros(6), gains, batch, {}), True)
    figures = means(to_host(totals))
    assert figures["reward_accuracy_tone"] == 0.75 and figures["reward_accuracy_topic"] == 0  # the third is a tie
    drift = (0.3 / 13 + 0.6 / 12) / 2
    assert figures["filler_drift"] == pytest.approx(drift, rel=1e-5)


def test_drift_is_that_of_filler_alone(batch):
    """Nine and four filler tokens moved by 0.1 and 0.4, either way; planted words and the end of the turn by more."""
    logps_N = torch.full((17,), -0.1)
    logps_N[11:] = 0.4
    logps_N[[3, 14, 10, 16]] = 50.0
    assert filler_drift(logps_N, torch.zeros(17), batch).tolist() == pytest.approx([(9 * 0.1 + 4 * 0.4) / 13])


def last_evaluation(run_dir) -> tuple[dict, dict]:
    first, last = (row for row in read_rows(run_dir) if "eval/pairs" in row)
    return first, last


@pytest.mark.slow
def test_evaluations_of_the_toy_know_its_kinds(tmp_path, toy_run, toy_flags):
    """Accuracies of tone and topic make up the whole; filler drifts; a page shows the judge's attention. The lift is
    that before the first token is reset, and of a loss without a reference too, whose batches hold none."""
    first, last = last_evaluation(toy_run)
    assert (last["eval/reward_accuracy_tone"] + last["eval/reward_accuracy_topic"]) / 2 == pytest.approx(
        last["eval/reward_accuracy"])  # 64 pairs each
    assert first["eval/filler_drift"] == 0 < last["eval/filler_drift"]
    assert last["eval/planted_lift"] == first["eval/planted_lift"] > 2
    assert (toy_run / "weights/weights.html").exists()
    shutil.copytree(toy_run, tmp_path / "run")
    flags = [*toy_flags, "--weights", "attention_surprise"]
    train.main([*flags, "--output-dir", str(tmp_path / "run"), "--overwrite"])
    _, pinned = last_evaluation(tmp_path / "run")
    assert "attention_surprise" in (tmp_path / "run/weights/weights.html").read_text()  # not the other source's
    train.main([*flags, "--output-dir", str(tmp_path / "free"), "--loss", "simpo", "--sink-k", "0"])
    _, free = last_evaluation(tmp_path / "free")
    assert free["eval/planted_lift"] == pinned["eval/planted_lift"] > 2 and "eval/filler_drift" not in free
