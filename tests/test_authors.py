"""--preset authors in training: what each trained token is multiplied with, against what their trainer does."""

import json
from pathlib import Path

import pytest
import torch
from test_columns import make_model
from test_weights import weights_of_the_authors
from tokenizers_of_tests import sentencepiece_like
from transformers import AutoTokenizer

import extract
import train
from twdpo.losses import LOSSES

INST = ("{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% else %}{{ m.content }}</s>{% endif %}{% endfor %}")


def trained_weights(directory: Path, rows: list[dict], folder: Path) -> tuple[dict, list[dict]]:
    """(ids of trained answers and what their log-ratios are multiplied with, by answers and side; the export)."""
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ["--model", str(directory), "--data", str(folder / "pairs.jsonl"), "--preset", "authors"]
    extract.main([*argv, "--out", str(folder / "w"), "--export", str(folder / "rows.jsonl")])
    found = {}

    def spy(ratio_S, logps_N, batch, config):
        lens = batch.seq_lens_S.tolist()
        answers = [(example.pair.chosen, example.pair.rejected, side) for example in getattr(batch, "examples", ())
                   for side in ("chosen", "rejected")]
        for answer, ids, weights, scale in zip(answers, batch.targets_N.split(lens), batch.weights_N.split(lens),
                                               batch.scale_S):
            found[answer] = ids.tolist(), (scale * weights).double()
        return ratio_S[0::2], {}
    spy.norm = "mean1"
    LOSSES["spy"] = spy
    train.main([*argv, "--weights", str(folder / "w"), "--loss", "spy", "--max-steps", "1", "--batch-size",
                str(len(rows)), "--eval-fraction", "0", "--save-every", "0", "--output-dir", str(folder / "run")])
    return found, [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


def compare_with_their_trainer(directory: Path, rows: list[dict], folder: Path) -> list[bool]:
    """Of each answer, whether its first token has no weight; all weights are compared."""
    found, exported = trained_weights(directory, rows, folder)
    tokenizer, first_is_nothing = AutoTokenizer.from_pretrained(directory), []
    for row in exported:
        for side in ("chosen", "rejected"):
            # The answer by itself, as the template prints it, and TRL's end of it once more.
            ids = tokenizer(row[side] + "</s>", add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
            tokens, weights = row[f"{side}_tokens"], row[f"{side}_weights_1"]
            expected = len(tokens) * torch.from_numpy(weights_of_the_authors([weights, weights], tokens, ids))
            ours, multipliers = found[row["chosen"], row["rejected"], side]
            assert ours == ids[:-1]
            torch.testing.assert_close(multipliers, expected[:-1], atol=1e-5, rtol=1e-5)
            first_is_nothing.append(multipliers[0].item() == 0)
    return first_is_nothing


def test_the_first_token_of_a_sentencepiece_answer_has_no_weight(tmp_path):
    """In their trainer it has a space mark, which the judge's token, after a line break, has not."""
    rows = [{"prompt": f"what of {number}?", "chosen": f"{number} foxes jump over the lazy dog.",
             "rejected": f"The quick {number}, what?"} for number in range(3)]
    directory = make_model(tmp_path / "model", sentencepiece_like(INST))
    assert all(compare_with_their_trainer(directory, rows, tmp_path))


@pytest.mark.slow
def test_most_first_tokens_of_real_answers_have_no_weight_with_mistral(shared, tmp_path):
    lines = (shared / "pairs/permissive_train.jsonl").read_text().splitlines()[::40]
    rows = [{name: json.loads(line)[name] for name in ("prompt", "chosen", "rejected")} for line in lines]
    rows = [row for row in rows if len(row["chosen"]) + len(row["rejected"]) < 1500]
    directory = make_model(tmp_path / "model", AutoTokenizer.from_pretrained(shared / "tokenizers/mistral-v1"))
    first_is_nothing = compare_with_their_trainer(directory, rows, tmp_path)
    assert sum(first_is_nothing) > 0.7 * len(first_is_nothing)
