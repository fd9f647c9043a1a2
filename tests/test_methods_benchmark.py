"""benchmarks/methods.py on a tiny budget: its controls by hand, its table, and that finished cells are kept."""

import json
import statistics
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import methods
import methods_lab
from twdpo.batch import Outputs, collate
from twdpo.chat import Chat
from twdpo.config import PRESETS, TrainConfig
from twdpo.forms import parse_row
from twdpo.losses import LOSSES
from twdpo.objective import bind_objective
from twdpo.rows import MicroBatch
from twdpo.tokens import tokenize_pairs
from twdpo.toy.planted import planted_lift, planted_tokens
from twdpo.weights import WEIGHTS, WeightContext
from twdpo.weights_file import JudgedAnswer

CONTROLS = {name: WEIGHTS.pop(name) for name in ("oracle", "shuffled")}  # other tests see the project's own sources
KEYS = {"loss", "source", "pairs", "seed", "beta", "accuracy", "drift", "key_margin", "planted_lift", "seconds"}


@pytest.fixture(autouse=True)
def controls(registries):
    WEIGHTS.update(CONTROLS)


@pytest.fixture
def tiny(monkeypatch, tmp_path, capsys):
    """main(flags) of a benchmark of two steps -> its last line."""
    for name, value in {"STEPS": 2, "EVALUATED": 8, "NEUTRAL": 6, "DRAWN": 12, "AUXILIARY": 8, "BATCH": 4}.items():
        monkeypatch.setattr(methods_lab, name, value)

    def run(*flags: str) -> list[dict]:
        methods.main([*flags, "--jobs", "1", "--out", str(tmp_path)])
        return json.loads(capsys.readouterr().out.strip().splitlines()[-1])["rows"]
    return run


@pytest.mark.slow
def test_what_reads_the_policy_in_the_step_runs(tiny):
    """Hidden states, log-probs and input gradients of the policy; the reference's distributions; what it writes."""
    flags = ["--pairs", "8", "--seeds", "1", "--betas", "1"]
    rows = tiny("--sources", "otpo,selective,tidpo", *flags) + tiny("--losses", "tdpo2,wpo,tidpo", *flags)
    assert [row["source"] for row in rows] == ["otpo", "selective", "tidpo"] + 3 * ["uniform"]
    assert all(row.keys() == KEYS and row["drift"] > 0 for row in rows)
    assert rows[0]["planted_lift"] != 1 and rows[3]["planted_lift"] == pytest.approx(1)


@pytest.mark.slow
def test_every_kind_of_source_runs_and_finished_cells_are_kept(tiny, tmp_path, monkeypatch):
    names = ["uniform", "attention_surprise", "attention_contrast", "tis", "cdpo", "oracle"]
    flags = ["--sources", ",".join(names), "--pairs", "8", "--seeds", "2", "--betas", "1,2"]
    rows = tiny(*flags)
    assert [(row["source"], row["seed"]) for row in rows] == [(name, seed) for name in names for seed in (0, 1)]
    assert all(row.keys() == KEYS and row["loss"] == "twdpo" and row["pairs"] == 8 for row in rows)
    lifts = {row["source"]: row["planted_lift"] for row in rows}
    assert lifts["uniform"] == pytest.approx(1) and lifts["oracle"] > lifts["attention_surprise"] > 2
    assert lifts["attention_surprise"] > lifts["attention_contrast"] > 1
    betas = [pytest.approx(factor * PRESETS["toy"]["beta"]) for factor in (1, 2)]
    assert all(0 < row["drift"] and 0 <= row["accuracy"] <= 1 and row["beta"] in betas for row in rows)
    for first, second in zip(rows[0::2], rows[1::2]):  # another seed, other pairs
        assert first["drift"] != second["drift"]
    assert (tmp_path / "methods.svg").read_text().count("<circle") == 6
    monkeypatch.setattr(methods, "train_arm", None)
    assert tiny(*flags) == rows
    with pytest.raises(TypeError):  # another toy beta is another arm
        monkeypatch.setitem(PRESETS["toy"], "beta", 0.5)
        tiny(*flags)
    monkeypatch.setitem(PRESETS["toy"], "beta", 0.3)
    fewer = tiny("--sources", "oracle", "--pairs", "8", "--seeds", "1", "--betas", "1,2")
    assert fewer == [row for row in rows if row["source"] == "oracle" and row["seed"] == 0]


def test_figures_are_of_the_pairs_that_they_say(tiny, tmp_path, monkeypatch):
    """Beta is chosen on validation pairs, accuracy is of test pairs."""
    monkeypatch.setattr(methods_lab, "evaluate", lambda lab, pool: {
        "accuracy": 0.25 if pool is lab.validation else 0.75 if pool is lab.test else None, "drift": 1.0})
    row, = tiny("--sources", "uniform", "--pairs", "8", "--seeds", "1", "--betas", "1")
    cell, = (tmp_path / "cells").glob("*.json")
    assert row["accuracy"] == 0.75 and json.loads(cell.read_text())["validation_accuracy"] == 0.25


def test_key_margin_is_what_the_slot_gains(tiny, monkeypatch):
    """One nat for every good slot word, half a nat off every bad one: 1.5, wherever they stand."""
    lab = methods_lab.Lab(4)
    try:
        def policy(batch):
            planted_N = planted_tokens(batch)
            sides_N = torch.arange(len(batch.seq_lens_S)).remainder(2).repeat_interleave(batch.seq_lens_S)
            return Outputs(None, batch.ref_logps_N + planted_N * torch.where(sides_N == 0, 1.0, -0.5), batch, {})
        lab.policy = policy
        assert methods_lab.key_margin(lab) == pytest.approx(1.5, abs=1e-5)
    finally:
        methods_lab.dist.stop()


def test_a_loss_without_a_reference_is_measured_against_it_all_the_same(tiny):
    row, = tiny("--losses", "simpo", "--pairs", "8", "--seeds", "1", "--betas", "1")
    assert row["source"] == "uniform" and row["drift"] > 0 and row["beta"] == 2.0


def test_what_is_chosen():
    every = methods.choose_arms("", "")
    assert {loss for loss, _ in every} == set(LOSSES) and len(every) == len(set(every))
    assert {source for _, source in every} == {*WEIGHTS, "oracle", "shuffled"} - {"verbalized"}
    assert methods.choose_arms("dpo, ipo", "decay,ld") == [(loss, source) for loss in ("dpo", "ipo")
                                                           for source in ("decay", "ld")]


@pytest.mark.parametrize("flags, message", [
    (["--losses", "none"], "--losses has 'none'"), (["--sources", "verbalized"], "--sources has 'verbalized'"),
    (["--pairs", "0"], "must be positive"), (["--pairs", "9999"], "the grammar has"), (["--seeds", "0"], "positive"),
    (["--pairs", "x"], "invalid literal"), (["--betas", "nan"], "must be positive, and finite"),
    (["--out", "/proc/here"], "can't be made or written to"),
])
def test_bad_flags_are_one_message(flags, message, capsys):
    with pytest.raises(SystemExit):
        methods.main(flags)
    assert message in capsys.readouterr().err


def test_the_best_beta_is_that_of_validation_pairs_on_the_first_seed(monkeypatch, tmp_path):
    """Ties go to the largest; test pairs have no say."""
    seen = []

    def arm(lab, loss, source, num_pairs, seed, factor):
        seen.append((seed, factor))
        return dict.fromkeys(methods.MEASURES, 1.0) | {"accuracy": 1 / factor, "beta": factor,
                                                       "validation_accuracy": {1: 0.5, 2: 0.9, 4: 0.9}[factor]}
    monkeypatch.setattr(methods, "train_arm", arm)
    monkeypatch.setattr(methods, "LAB", [None])
    rows = methods.run_group("dpo", "uniform", 8, 2, [1, 2, 4], 16, tmp_path)
    assert [row["beta"] for row in rows] == [4, 4] and seen == [(0, 1), (0, 2), (0, 4), (1, 4)]


def test_table_shows_mean_and_spread():
    rows = [{"loss": "dpo", "source": "uniform", "pairs": 64, "seed": seed, "beta": 0.1} | dict.fromkeys(
        methods.MEASURES, value) for seed, value in enumerate((0.25, 0.5, 0.75))]
    *_, last = methods.markdown_table(rows).splitlines()
    assert last == "| `dpo` | `uniform` | 0.5 | 0.500 ± 0.250 | 0.500 ± 0.250 | 0.500 ± 0.250 |"
    line = methods.format_table(rows).splitlines()[1]
    assert f"0.500 ±{statistics.stdev([0.25, 0.5, 0.75]):.3f}" in line


def test_controls_by_hand(toy_model):
    """oracle: all free mass on the planted word; shuffled: the same weights elsewhere; 1/n on the end of the turn."""
    row = {"prompt": "Hello.", "chosen": "Your question is wise. Set a small goal.",
           "rejected": "Your question is dull."}
    examples, _, _ = tokenize_pairs(Chat(AutoTokenizer.from_pretrained(toy_model)), [parse_row("x", row)], 100, 50)
    batch = collate(MicroBatch((0,)), examples, [0])
    (example,), rng = examples, np.random.default_rng(0)
    stored = {example.pair.key: [JudgedAnswer(side.ids[:-1], side.spans_N2[:-1],
                                              rng.random((1, 2, len(side.ids) - 1)).astype(np.float32))
                                 for side in (example.chosen, example.rejected)]}
    context = WeightContext(TrainConfig(sink_k=0), stored)
    oracle_N = bind_objective(LOSSES["twdpo"], methods_lab.oracle, "oracle").weigh(batch, context).weights_N
    expected = torch.zeros(17)
    expected[[3, 10, 14, 16]] = torch.tensor([10 / 11, 1 / 11, 5 / 6, 1 / 6])
    torch.testing.assert_close(oracle_N, expected)
    assert planted_lift(methods_lab.oracle(batch, context), batch)[0].tolist() == pytest.approx([10, 5])
    plain_N, shuffled_N = (source(batch, context) for source in (WEIGHTS["attention"], methods_lab.shuffled))
    assert not torch.allclose(plain_N, shuffled_N) and torch.equal(shuffled_N, methods_lab.shuffled(batch, context))
    for start, stop in ((0, 10), (11, 16)):
        torch.testing.assert_close(plain_N[start:stop].sort()[0], shuffled_N[start:stop].sort()[0])
    torch.testing.assert_close(shuffled_N[[10, 16]], torch.tensor([1 / 11, 1 / 6]))
    reset = WeightContext(TrainConfig(sink_k=1), stored)
    torch.testing.assert_close(methods_lab.shuffled(batch, reset)[[0, 10, 11, 16]],
                               torch.tensor([1 / 11, 1 / 11, 1 / 6, 1 / 6]))


def test_attention_times_surprise_by_hand(toy_model):
    """Weights in proportion to attention times -log p_ref; the end of the turn keeps 1/n."""
    row = {"prompt": "Hello.", "chosen": "Your question is wise.", "rejected": "Your question is dull."}
    examples, _, _ = tokenize_pairs(Chat(AutoTokenizer.from_pretrained(toy_model)), [parse_row("x", row)], 100, 50)
    (example,) = examples
    logps = {example.pair.key: (np.array([-1, -2, 0, -4, -1, -9], dtype=np.float32), np.full(6, -1, dtype=np.float32))}
    batch = collate(MicroBatch((0,)), examples, [0], logps)
    mass = np.array([1, 1, 5, 2, 0], dtype=np.float32)
    stored = {example.pair.key: [JudgedAnswer(side.ids[:-1], side.spans_N2[:-1], np.stack([mass, mass])[None])
                                 for side in (example.chosen, example.rejected)]}
    raw_N = WEIGHTS["attention_surprise"](batch, WeightContext(TrainConfig(sink_k=0), stored))
    product = np.array([1, 2, 0, 8, 0])
    np.testing.assert_allclose(raw_N[:5], product / product.sum() * 5 / 6, rtol=1e-5)
    np.testing.assert_allclose(raw_N[6:11], mass / mass.sum() * 5 / 6, rtol=1e-5)
    assert raw_N[5].item() == raw_N[11].item() == pytest.approx(1 / 6)
    reset_N = WEIGHTS["attention_surprise"](batch, WeightContext(TrainConfig(sink_k=1), stored))
    np.testing.assert_allclose(reset_N[:6], [1 / 6, 2 / 10 * 4 / 6, 0, 8 / 10 * 4 / 6, 0, 1 / 6], rtol=1e-5)
    objective = bind_objective(LOSSES["simpo"], WEIGHTS["attention_surprise"], "attention_surprise")
    free = objective.weigh(batch, WeightContext(TrainConfig(sink_k=0), stored))
    assert (free.ref_logps_N == 0).all()  # the loss itself has no reference
