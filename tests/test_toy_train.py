"""The toy's model: a smaller one made anew, and what the one in the package can do."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from twdpo.dataset import load_dataset
from twdpo.models.source import TOY_MODEL
from twdpo.toy import train as toy_train
from twdpo.toy.grammar import all_prompts, toy_rows

SMALL = ["--texts", "6", "--pairs", "4", "--hidden-size", "32", "--lr", "1e-2"]


def mean_loss(directory: Path) -> float:
    """Nats a token of held-out conversations."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    losses = []
    for pair in load_dataset("toy", "").held_out[:8]:
        ids = torch.tensor([tokenizer.apply_chat_template(
            [{"role": "user", "content": pair.messages[0][1]}, {"role": "assistant", "content": pair.chosen}],
            return_dict=False)])
        with torch.no_grad():
            losses.append(model(ids, labels=ids).loss.item())
    return sum(losses) / len(losses)


@pytest.mark.slow
def test_a_smaller_one_is_made_end_to_end(tmp_path, toy_model, monkeypatch):
    """It has learned some of the language, and its gates are there, missed ones said so."""
    monkeypatch.setattr(toy_train, "THREADS", 1)  # two wait for each other where other work runs
    small = tmp_path / "small"
    toy_train.main([*SMALL, "--steps", "30", "--out", str(small)])
    assert mean_loss(small) < mean_loss(toy_model) - 1
    gates = json.loads((small / "gates.json").read_text())
    assert gates["seed"] == 0 and gates["steps"] == 30 and gates["probe"] is True
    assert 0 <= gates["verdict_accuracy_chosen_first"] <= 1 and gates["planted_lift"] > 0
    assert not list(small.glob(".*"))
    shown = toy_train.describe_gates(gates)
    assert all(name in shown for name, _ in toy_train.GATES) and "MISSED" in shown


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bytes_and_another_one_or_no_probe_others(tmp_path, monkeypatch):
    """Three steps, two of them kept, and no gates: they are measured once the weights are written."""
    gates = json.loads((TOY_MODEL / "gates.json").read_text())
    monkeypatch.setattr(toy_train, "measure_gates", lambda *_: gates)
    weights = {}
    for name, *extra in (("first",), ("again",), ("other", "--seed", "1"), ("plain", "--no-probe")):
        toy_train.main([*SMALL, "--steps", "3", "--keep", "1,3", "--out", str(tmp_path / name), *extra])
        weights[name] = (tmp_path / name / "model.safetensors").read_bytes()
    assert weights["first"] == weights["again"] and len(set(weights.values())) == 3
    kept = {step: (tmp_path / f"first/step-{step}/model.safetensors").read_bytes() for step in (1, 3)}
    assert kept[3] == weights["first"] != kept[1] and (tmp_path / "first/step-1/tokenizer.json").exists()


def test_draws_are_new_to_the_held_out_rows(monkeypatch):
    """An answer that is drawn by chance and stands in a held-out row is drawn again."""
    draws = toy_train.Draws(toy_train.random.Random(3))
    original, drawn = toy_train.draw_row, []

    def draw_row(*arguments):
        skeletons, row = original(*arguments)
        if len(drawn) % 2 == 0:
            row = row | {"rejected": toy_rows()[1][0]["chosen"]}
        drawn.append(row)
        return skeletons, row
    monkeypatch.setattr(toy_train, "draw_row", draw_row)
    held_out = toy_rows()[1]
    assert len(draws.prompts) == len(all_prompts()) - len(held_out)
    pairs = draws.pairs(50, 0)
    answers = {row[side] for row in held_out for side in ("chosen", "rejected")}
    assert not {pair.messages[0][1] for pair in pairs} & {row["prompt"] for row in held_out}
    assert not {text for pair in pairs for text in (pair.chosen, pair.rejected)} & answers


@pytest.mark.parametrize("flags, message", [
    (["--steps", "0"], "--steps is 0: it must be >= 1"), (["--hidden-size", "20"], "--hidden-size is 20"),
    (["--lr", "0"], "--lr is 0.0"), (["--seed", str(10 ** 20)], "--seed is"),
    (["--out", "/proc/toy"], "can't be made or written to"), (["--keep", "5,701"], "--keep is '5,701'"),
])
def test_bad_input_is_one_message(flags, message, capsys):
    with pytest.raises(SystemExit):
        toy_train.main(flags)
    assert message in capsys.readouterr().err


def test_the_packaged_model_passes_its_gates(process):
    """Measured anew, and as its gates.json says."""
    recorded = json.loads((TOY_MODEL / "gates.json").read_text())
    measured = toy_train.measure_gates(TOY_MODEL, process)
    for name, limit in toy_train.GATES:
        assert measured[name] >= limit, name
        assert measured[name] == pytest.approx(recorded[name], rel=0.02), name


def test_the_package_stays_small():
    assert sum(path.stat().st_size for path in TOY_MODEL.iterdir()) <= 1.5e6
