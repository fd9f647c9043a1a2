"""docs/methods.md on focal heads: the correlation of the rounds finds the head of the toy that sees what decides."""

import json

import pytest
import torch

import extract
from twdpo.chat import Chat
from twdpo.config import TrainConfig
from twdpo.dataset import load_dataset
from twdpo.models.source import TOY_MODEL, load_tokenizer
from twdpo.tokens import tokenize_pairs
from twdpo.toy.grammar import toy_rows
from twdpo.toy.planted import source_lift
from twdpo.weights import WEIGHTS, WeightContext
from twdpo.weights_file import WeightsFile


@pytest.mark.slow
def test_the_correlation_of_the_rounds_finds_the_focal_head(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in toy_rows()[1][:48]))
    examples, _, _ = tokenize_pairs(Chat(load_tokenizer(TOY_MODEL, "")), load_dataset(str(path), "").train, 200, 100)
    correlations, lifts = [], []
    for head in (1, 2, 3, 4):
        out, report = tmp_path / f"w{head}", tmp_path / f"report{head}"
        extract.main(["--model", "toy", "--data", str(path), "--judge-prompt", "short", "--judge-heads", str(head),
                      "--out", str(out), "--report", str(report)])
        (layer,) = json.loads((report / "report.json").read_text())["layers"]
        correlations.append(layer["correlation of the rounds"])
        lifts.append(source_lift(WEIGHTS["attention"], examples, WeightContext(TrainConfig(), WeightsFile(out)))[0])
    assert correlations[1] > 0.4 > 3 * max(correlations[:1] + correlations[2:])
    assert lifts[1] > 2 * max(lifts[:1] + lifts[2:]) and torch.tensor(lifts).isfinite().all()
