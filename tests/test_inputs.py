"""What a run needs is found once: each model is opened and hashed once, each need checked before weights are loaded."""

import json
import shutil

import pytest
import torch

import extract
import train
from twdpo import needs
from twdpo.config import TrainConfig
from twdpo.losses import LOSSES
from twdpo.models import policy, source
from twdpo.objective import bind_objective
from twdpo.toy.grammar import toy_rows
from twdpo.weights import WEIGHTS


@pytest.fixture
def other_model(toy_model, tmp_path):
    """Another model of the same tokenizer."""
    from transformers import AutoModelForCausalLM
    shutil.copytree(toy_model, tmp_path / "other")
    model = AutoModelForCausalLM.from_pretrained(toy_model)
    for parameter in model.parameters():
        parameter.data += 0.01 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "other")
    return tmp_path / "other"


@pytest.mark.parametrize("second", ["the policy's start", "named", "left out"])
def test_each_model_is_hashed_once(second, tmp_path, run_arguments, toy_model, other_model, monkeypatch):
    hashed, original = [], source.fingerprint_model
    monkeypatch.setattr(source, "fingerprint_model", lambda folder: hashed.append(folder) or original(folder))
    models = {"the policy's start": f"{other_model},{toy_model}", "named": f"{other_model}, {other_model}",
              "left out": str(other_model)}[second]
    train.main(run_arguments(tmp_path / "run", weights="tis", loss="dpo", aux_model=models, max_steps=1))
    assert sorted(hashed) == sorted([toy_model, other_model])


@pytest.mark.parametrize("flags, message", [
    (["--weights", "tis"], "--aux-model is ''"),
    (["--weights", "attention", "--layer", "9"], "--layer is '9': the model has layers 1 to 2"),
    (["--judge-heads", "7"], "--judge-heads is '7'"),
    (["--weights", "verbalized", "--aux-model", "x"], "the weight source reads no such model"),
])
def test_needs_are_checked_before_weights_are_loaded(flags, message, tmp_path, run_arguments, monkeypatch, capsys):
    def fails(*_, **__):
        raise AssertionError("weights were loaded")
    monkeypatch.setattr(policy, "load_shards", fails)
    monkeypatch.setattr("twdpo.judge.judge.load_judge", fails)
    with pytest.raises(SystemExit):
        train.main([*run_arguments(tmp_path / "run"), *flags])
    assert message in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_needs_of_loss_and_source_are_united_in_the_order_they_are_made(process):
    def open_names(loss: str, name: str) -> list[type]:
        objective = bind_objective(LOSSES[loss], WEIGHTS[name], name)
        return [type(need) for need in needs.open_needs(TrainConfig(aux_model="x" if name == "tis" else ""), objective,
                                                         process)]
    assert open_names("twdpo", "attention") == [needs.Attention, needs.Reference]
    assert open_names("simpo", "uniform") == []
    assert open_names("simpo", "attention_surprise") == [needs.Attention, needs.Reference]
    assert open_names("dpo", "tis") == [needs.Auxiliary, needs.Reference]
    assert open_names("simpo", "verbalized") == [needs.Scores]


@pytest.mark.slow
def test_a_held_out_row_that_is_left_out_takes_no_training_row_with_it(tmp_path, run_cache, capsys):
    """The toy's rows of both splits have the same numbers."""
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in toy_rows()[0]))
    extract.main(["--model", "toy", "--data", str(path), "--judge-prompt", "short", "--out", str(tmp_path / "w")])
    train.main(["--weights", str(tmp_path / "w"), "--skip-bad-rows", "--max-steps", "1", "--cache-dir", str(run_cache),
                "--output-dir", str(tmp_path / "run")])
    assert "512 pairs to train on, 0 held out" in capsys.readouterr().out


@pytest.mark.parametrize("source", ["tis", "attention", "uniform"])
def test_no_row_that_is_left_is_one_message(source, tmp_path, run_arguments, toy_model, capsys):
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps({"prompt": "", "chosen": "a", "rejected": "b"}) + "\n")
    aux = {"aux_model": toy_model} if source == "tis" else {}
    with pytest.raises(SystemExit) as stopped:
        train.main([*run_arguments(tmp_path / "run", data=path, weights=source, loss="dpo", **aux), "--skip-bad-rows"])
    assert stopped.value.code == 2 and "1 of 1 rows can't be used" in capsys.readouterr().err
