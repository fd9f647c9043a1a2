"""Accepted rows, bad rows with their place and reason, and the held-out split."""

import json

import pytest

from twdpo.dataset import load_dataset, settle_bad_rows, split_by_prompt
from twdpo.flags import InputError
from twdpo.forms import parse_row
from twdpo.pairs import Pair

USER, ANSWER, OTHER = ({"role": "user", "content": "why"}, {"role": "assistant", "content": "so"},
                       {"role": "assistant", "content": "no"})
EXPECTED = (("user", "why"),), "so", "no"


@pytest.mark.parametrize("row", [
    {"prompt": "why", "chosen": "so", "rejected": "no", "messages": [USER], "score": 3},
    {"chosen": [USER, ANSWER], "rejected": [USER, OTHER]},
    {"prompt": "why", "chosen": [USER, ANSWER], "rejected": [USER, OTHER]},
    {"prompt": [USER], "chosen": [ANSWER], "rejected": [OTHER]},
    {"prompt": "why", "chosen": [ANSWER], "rejected": [OTHER]},
])
def test_accepted_rows(row):
    pair = parse_row("x:1", row)
    assert (pair.messages, pair.chosen, pair.rejected) == EXPECTED
    assert parse_row("y:7", pair.to_row()).key == pair.key  # the same pair elsewhere has the same key


@pytest.mark.parametrize("row, reason", [
    ([], "must be an object"),
    ({"prompt": "why", "chosen": "so"}, "no column rejected"),
    ({"prompt": 3, "chosen": "so", "rejected": "no"}, "prompt must be a string or a list of messages.*, not a number"),
    ({"chosen": "so", "rejected": "no"}, "no column prompt"),
    ({"prompt": "why", "chosen": " ", "rejected": "no"}, "chosen is empty"),
    ({"prompt": "", "chosen": "so", "rejected": "no"}, "prompt is empty"),
    ({"prompt": "why", "chosen": "so", "rejected": [OTHER]}, "chosen is a string and rejected a list: both must be"),
    ({"chosen": [USER], "rejected": [USER, OTHER]}, "not the assistant's"),
    ({"chosen": [ANSWER], "rejected": [OTHER]}, "no column prompt"),
    ({"chosen": [USER, ANSWER], "rejected": [USER, USER, OTHER]}, "differ before the last answer"),
    ({"chosen": [USER, ANSWER, ANSWER], "rejected": [USER, ANSWER, OTHER]}, "the assistant's own"),
    ({"prompt": "why", "chosen": [{"role": "assistant", "content": [1]}], "rejected": [OTHER]}, "must be a string"),
    ({"prompt": "why", "chosen": [{"content": "so"}], "rejected": [OTHER]}, "has no role"),
    ({"prompt": "why", "chosen": [], "rejected": [OTHER]}, "not empty"),
    ({"prompt": "why", "chosen": "\ud800", "rejected": "no"}, "surrogates not allowed"),
])
def test_bad_rows_have_a_reason(row, reason):
    with pytest.raises(ValueError, match=reason):
        parse_row("x:1", row)


def test_lines_are_counted_and_none_is_dropped(tmp_path):
    good = json.dumps({"prompt": "why", "chosen": "so", "rejected": "no"})
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(f"{good}\n\n{{\"prompt\"\n{good}\n".encode() + b"\xff\xfe\n" + json.dumps([1]).encode())
    dataset = load_dataset(str(path), "")
    assert [pair.where for pair in dataset.train] == [f"{path}:1", f"{path}:4"]
    assert [bad.where for bad in dataset.bad_rows] == [f"{path}:3", f"{path}:5", f"{path}:6"]
    listed = tmp_path / "pairs.json"
    listed.write_text(f"[{good}, 5]")
    dataset = load_dataset(str(listed), "")
    assert dataset.train[0].where == f"{listed}:1" and dataset.bad_rows[0].where == f"{listed}:2"


def test_bad_rows_stop_the_run_or_are_written(tmp_path, capsys):
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(["nonsense"] * 12))
    bad = load_dataset(str(path), "").bad_rows
    with pytest.raises(InputError) as stopped:
        settle_bad_rows(bad, False, tmp_path, 12)
    assert "12 of 12" in str(stopped.value) and f"{path}:10: not JSON" in str(stopped.value)
    assert f"{path}:11" not in str(stopped.value)
    with pytest.raises(InputError, match="No row is left"):
        settle_bad_rows(bad, True, tmp_path, 12)
    settle_bad_rows(bad, True, tmp_path, 13)
    rows = [json.loads(line) for line in (tmp_path / "rejected_rows.jsonl").read_text().splitlines()]
    assert len(rows) == 12 and rows[11]["where"] == f"{path}:12" and rows[0]["row"] == "nonsense"
    settle_bad_rows([], True, tmp_path, 13)
    assert not (tmp_path / "rejected_rows.jsonl").exists()  # it was of another run


@pytest.mark.parametrize("text, message", [("{}", "JSON list"), ("[", "not JSON")])
def test_files_that_hold_no_rows(text, message, tmp_path):
    (tmp_path / "pairs.json").write_text(text)
    with pytest.raises(InputError, match=message):
        load_dataset(str(tmp_path / "pairs.json"), "")
    with pytest.raises(InputError, match="no such file"):
        load_dataset(str(tmp_path / "missing.jsonl"), "")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(InputError, match="it holds no pair"):
        load_dataset(str(tmp_path / "empty.jsonl"), "")


def test_lists_within_lists_are_a_bad_row(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("[" * 100_000 + "\n")
    assert "not JSON" in load_dataset(str(path), "").bad_rows[0].reason


def make_pairs(num_prompts: int = 60) -> list[Pair]:
    return [Pair((("user", f"prompt {number}"),), f"yes {answer}", "no", f"x:{number}") for number in range(num_prompts)
            for answer in range(number % 4 + 1)]


def test_rows_of_a_prompt_never_straddle_the_split():
    pairs = make_pairs()
    train, held_out = split_by_prompt(pairs, 0.1, seed=1)
    assert sorted(pair.key for pair in train + held_out) == sorted(pair.key for pair in pairs)
    assert not {pair.messages for pair in train} & {pair.messages for pair in held_out}
    assert 0.1 * len(pairs) <= len(held_out) < 0.1 * len(pairs) + 4


def test_the_split_depends_on_seed_and_text_alone():
    pairs = make_pairs()
    held_out = {pair.key for pair in split_by_prompt(pairs, 0.1, seed=1)[1]}
    assert {pair.key for pair in split_by_prompt(pairs[::-1], 0.1, seed=1)[1]} == held_out
    assert {pair.key for pair in split_by_prompt(pairs, 0.1, seed=2)[1]} != held_out


def test_own_test_split_and_eval_data(tmp_path):
    assert len(load_dataset("toy", "").held_out) > 100
    assert load_dataset("toy", "", with_held_out=False).held_out == []
    path = tmp_path / "held.jsonl"
    path.write_text(json.dumps({"prompt": "why", "chosen": "so", "rejected": "no"}))
    assert [pair.where for pair in load_dataset("toy", str(path)).held_out] == [f"{path}:1"]
