"""Pairs that can't teach: each kind is counted aloud, and left out when --leave-out names it."""

import json
from dataclasses import replace

import pytest
import torch
from processes_of_tests import run_ranks
from runs_of_tests import assert_close_rows, read_rows
from tokenizers_of_tests import TRIMMED, byte_level

import train
from twdpo.chat import Chat
from twdpo.config import TrainConfig
from twdpo.flags import InputError
from twdpo.leave_out import is_equal, leave_out, leave_out_massless
from twdpo.losses import LOSSES
from twdpo.objective import bind_objective
from twdpo.pairs import Pair
from twdpo.tokens import tokenize_pairs
from twdpo.weights import WeightContext


def pair(prompt: str, chosen: str = "Hello there, friend!", rejected: str = "lazy dog", place: int = 1) -> Pair:
    return Pair((("user", prompt),), chosen, rejected, f"pairs.jsonl:{place}")


TRAIN = {
    "plain": pair("Question: what?"),
    "equal": pair("A or B.", "Hello there", "Hello there"),
    "equal after the cut": pair("A or B?", "Hello there, friend! " * 20 + "yes", "Hello there, friend! " * 20 + "no"),
    "cut": pair("The quick brown fox jumps over the lazy dog. " * 3),
    "duplicate": pair("Question: what?", place=9),
    "leak": pair("Answer: A"),
    "another answer": pair("Question: what?", "Hello"),
}
HELD_OUT = {"a": {"plain": pair("Answer: A", "Hello"), "equal": pair("jumps", "Hello", "Hello")},
            "b": {"plain": pair("Answer: A", "Hello"), "repeat": pair("Answer: A", "Hello", place=2)}}


@pytest.fixture(scope="module")
def chat() -> Chat:
    return Chat(byte_level(TRIMMED))


def examples(chat, pairs: dict[str, Pair], max_length: int = 50):
    found, bad, _ = tokenize_pairs(chat, list(pairs.values()), max_length, 25)
    assert not bad
    return found


def settled(chat, kinds: str, process, **limits) -> tuple[list[str], list[int], dict]:
    """(names of the training pairs that stay, how many of each held-out set, what was taken)."""
    names = {given.where + given.messages[0][1] + given.chosen: name for name, given in TRAIN.items()}
    sets = {name: examples(chat, pairs, **limits) for name, pairs in HELD_OUT.items()}
    train_left, sets, took = leave_out(TrainConfig(leave_out=kinds), examples(chat, TRAIN, **limits), sets, process)
    kept = [names[each.pair.where + each.pair.messages[0][1] + each.pair.chosen] for each in train_left]
    return kept, [len(part) for part in sets.values()], dict(took)


def test_every_kind_is_counted_and_kept_unless_it_is_named(chat, process, capsys):
    assert settled(chat, "", process) == ([*TRAIN], [2, 2], {})
    assert capsys.readouterr().out.splitlines() == [
        "3 pairs (1 held out) have two answers of the same tokens, kept (--leave-out equal leaves them out)",
        "1 pairs have a prompt that was cut, kept (--leave-out cut leaves them out)",
        "2 pairs (1 held out) are repeats of an earlier one, kept (--leave-out duplicate leaves them out)",
        "1 pairs to train on have a prompt that is held out too, kept (--leave-out leak leaves them out)",
    ]


@pytest.mark.parametrize("kinds, gone, sets, took", [
    ("equal", {"equal", "equal after the cut"}, [1, 2], {"equal": 3}),
    ("cut", {"cut"}, [2, 2], {"cut": 1}),
    ("duplicate", {"duplicate"}, [2, 1], {"duplicate": 2}),
    ("leak", {"leak"}, [2, 2], {"leak": 1}),
    ("empty", set(), [2, 2], {}),
    ("equal, duplicate,leak", {"equal", "equal after the cut", "duplicate", "leak"}, [1, 1],
     {"equal": 3, "duplicate": 2, "leak": 1}),
])
def test_what_is_named_is_left_out_and_nothing_else(kinds, gone, sets, took, chat, process, capsys):
    kept, sizes, taken = settled(chat, kinds, process)
    assert (set(TRAIN) - set(kept), sizes, taken) == (gone, sets, took)
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.endswith(", left out")] == lines[:len(took)]


def test_an_answer_of_which_the_cut_leaves_nothing(chat, process, capsys):
    """A template whose own tokens take all that is left of an answer's room."""
    found = examples(chat, {"x": TRAIN["plain"]})
    found[0].rejected.content_N[:] = False
    kept, _, took = leave_out(TrainConfig(leave_out="empty"), found, {}, process)
    assert not kept and took == {"empty": 1}
    assert capsys.readouterr().out == "1 pairs have an answer of which the cut left nothing, left out\n"
    assert leave_out(TrainConfig(), found, {}, process)[0] == found


def test_ends_of_turns_tell_no_answers_apart(chat):
    (found,) = examples(chat, {"x": TRAIN["equal"]})
    cut = replace(found.chosen, ids=found.chosen.ids[:-1], content_N=found.chosen.content_N[:-1])
    assert is_equal(found) and is_equal(replace(found, chosen=cut))
    assert not is_equal(*examples(chat, {"x": TRAIN["plain"]}))


def test_an_unknown_kind_is_one_message():
    with pytest.raises(InputError, match="--leave-out has 'equals': the kinds are equal, empty, cut, "):
        TrainConfig(leave_out="cut,equals")


# ----------------------------------------------------------------------------------------------------------------------
# No mass

def quoted(batch, context) -> torch.Tensor:
    """Weighs answers that begin with a capital letter alone."""
    return torch.cat([torch.full(side.ids.shape, float(text[0].isupper())) for example in batch.examples
                      for text, side in zip((example.pair.chosen, example.pair.rejected),
                                            (example.chosen, example.rejected))])


@pytest.fixture
def three(chat):
    """Of the second pair and of the third, a held-out one, an answer has no weight."""
    return examples(chat, {"1": pair("one", "Hello", "There"), "2": pair("two", "Hello", "there"),
                           "3": pair("three", "hello", "There")})


def massless(three, process, norm: str, **flags) -> set[int]:
    quoted.norm, config = norm, TrainConfig(**flags)
    objective = bind_objective(LOSSES["dpo"], quoted, "quoted")
    return leave_out_massless(config, objective, three, 2, WeightContext(config), process)


@pytest.mark.parametrize("norm, flags, done", [
    ("mean1", {}, "as uniform"), ("pair_min", {}, "as uniform"), ("selected_mean", {}, "as uniform"),
    ("none", {}, "nothing"), ("none", {"length_normalize": True}, "nothing"),
])
def test_an_answer_without_weights_is_counted_with_what_becomes_of_it(norm, flags, done, three, process, capsys):
    assert massless(three, process, norm, **flags) == set()
    assert capsys.readouterr().out == ("2 pairs (1 held out) have an answer without any weight: it counts "
                                       f"{done}, kept (--leave-out massless leaves them out)\n")


def test_pairs_with_an_answer_without_weights_are_left_out(three, process, capsys):
    assert massless(three, process, "mean1", leave_out="massless") == {each.pair.key for each in three[1:]}
    assert capsys.readouterr().out == "2 pairs (1 held out) have an answer without any weight, left out\n"
    assert massless(three[:1], process, "mean1", leave_out="massless") == set() and not capsys.readouterr().out


SOURCE = """
import torch
from twdpo.weights import WEIGHTS

def quoted(batch, context):
    weights = [float("a" in text[:1]) + torch.zeros(len(side.ids)) for example in batch.examples for text, side in
               ((example.pair.chosen, example.chosen), (example.pair.rejected, example.rejected))]
    return torch.cat(weights)

def referenced(batch, context):
    return quoted(batch, context) * batch.ref_logps_N.abs()

referenced.needs = ("ref",)

def online(batch, context):
    return batch.hidden_ND[:, 0].abs()

online.needs = ("hidden",)
WEIGHTS |= {"quoted": quoted, "referenced": referenced, "online": online}
"""
ROWS = [{"prompt": f"say {number}", "chosen": f"a yes {number}", "rejected": f"a no {number}"} for number in range(8)]
UNQUOTED = [row | {"rejected": row["rejected"][2:]} for row in ROWS[:3]]


@pytest.fixture
def arguments(tmp_path, run_arguments):
    """Flags of a run on eleven pairs, three of which give `quoted` nothing to weigh."""
    (tmp_path / "quoted.py").write_text(SOURCE)
    for name, rows in (("pairs", [*ROWS, *UNQUOTED]), ("good", ROWS), ("unquoted", UNQUOTED)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(name: str, **flags) -> list[str]:
        flags = {"loss": "twdpo", "weights": "quoted", "data": tmp_path / "pairs.jsonl", "eval_fraction": 0,
                 "max_steps": 4, "import": tmp_path / "quoted.py"} | flags
        return run_arguments(tmp_path / name, **flags)
    return make


def test_a_run_without_massless_pairs_is_that_of_the_others(tmp_path, arguments, capsys):
    """Four steps of three pairs are an epoch of eleven pairs, and more than one of eight."""
    train.main(arguments("with"))
    assert "3 pairs have an answer without any weight: it counts as uniform, kept" in capsys.readouterr().out
    train.main(arguments("without", leave_out="massless"))
    assert "3 pairs have an answer without any weight, left out" in capsys.readouterr().out
    train.main(arguments("good", data=tmp_path / "good.jsonl"))
    assert "without any weight" not in capsys.readouterr().out
    assert read_rows(tmp_path / "without") == read_rows(tmp_path / "good") != read_rows(tmp_path / "with")


def test_a_short_run_takes_other_pairs_in_the_place_of_those_left_out(tmp_path, arguments, capsys):
    """What the source needs is made of all pairs then: which of them the run touches is not known before."""
    train.main(arguments("run", leave_out="massless", max_steps=2))
    train.main(arguments("good", data=tmp_path / "good.jsonl", max_steps=2))
    assert read_rows(tmp_path / "run") == read_rows(tmp_path / "good")


@pytest.mark.slow
def test_two_processes_leave_the_same_out(tmp_path, arguments):
    train.main(arguments("one", leave_out="massless"))
    run_ranks("train", arguments("two", leave_out="massless"))
    assert_close_rows(read_rows(tmp_path / "two"), read_rows(tmp_path / "one"))


def test_sources_that_need_the_policy_are_counted_when_it_is_there_or_not_at_all(arguments, capsys):
    train.main(arguments("referenced", weights="referenced"))
    assert capsys.readouterr().out.count("3 pairs have an answer without any weight: it counts as uniform, kept") == 1
    train.main(arguments("online", weights="online", max_steps=1))
    assert "can't be counted before the run: the weight source online reads the policy as" in capsys.readouterr().out
    for name, what in (("referenced", "reference log-probs"), ("online", "the policy as it is in each step")):
        with pytest.raises(SystemExit):
            train.main(arguments("refused", weights=name, leave_out="massless"))
        assert f"the weight source {name} reads {what}, so which pairs" in capsys.readouterr().err


def test_when_nothing_is_left_the_error_says_what_took_it(tmp_path, arguments, capsys):
    good, unquoted = (tmp_path / f"{name}.jsonl" for name in ("good", "unquoted"))
    for data, eval_data, kinds, message in (
            (unquoted, "", "massless", "no pair is left to train on: --leave-out took 3 (massless)"),
            (unquoted, good, "cut,leak", "no pair is left to train on: --leave-out took 3 (leak)"),
            (good, f"a={good},b={unquoted}", "massless", "no pair of b is left: --leave-out took 3 (massless)")):
        with pytest.raises(SystemExit):
            train.main(arguments("run", data=data, eval_data=eval_data, leave_out=kinds,
                                 eval_fraction=0.01 if eval_data else 0))
        assert message in capsys.readouterr().err and not (tmp_path / "run/config.json").exists()


def test_a_split_by_prompt_leaks_nothing_and_a_file_may(tmp_path, arguments, capsys):
    train.main(arguments("split", eval_fraction=0.3, max_steps=1))
    assert "held out too" not in capsys.readouterr().out
    train.main(arguments("file", eval_fraction=0.3, max_steps=1, eval_data=tmp_path / "unquoted.jsonl",
                         leave_out="leak"))
    printed = capsys.readouterr().out
    assert "6 pairs to train on have a prompt that is held out too, left out\n" in printed
    assert "5 pairs to train on, 3 held out" in printed
