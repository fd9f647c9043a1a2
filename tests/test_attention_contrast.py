"""attention_contrast: what the judge looks at under its prompt and not under another; by hand, and in whole runs."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from processes_of_tests import run_ranks
from runs_of_tests import assert_close_rows, read_rows

import extract
import train
from twdpo.config import TrainConfig
from twdpo.tokens import Response
from twdpo.weights import WEIGHTS, WeightContext
from twdpo.weights_file import JudgedAnswer, write_meta

OTHER = ("Which answer is longer?\n\nQuestion: {question}\n\nAnswer A: {answer_a}\n\nAnswer B: {answer_b}\n\n"
         "Longer answer:\n")


def letters(num_tokens: int) -> Response:
    """A response of one-character tokens and the end of the turn."""
    spans = [(place, place + 1) for place in range(num_tokens)] + [(num_tokens, num_tokens)]
    ids = np.arange(len(spans), dtype=np.int32)
    return Response(ids, np.array(spans, dtype=np.int32), ids < num_tokens)


def judged(*masses: float) -> JudgedAnswer:
    """One-character judge tokens of the same ids, both rounds equal."""
    places = np.arange(len(masses), dtype=np.int32)
    return JudgedAnswer(places, np.stack([places, places + 1], axis=1), np.array([[masses] * 2], dtype=np.float32))


def weigh(first, second, num_tokens: int = 4, **changes) -> list[float]:
    """Raw weights of an answer of `num_tokens` letters; the rejected one is the same."""
    response, pair = letters(num_tokens), SimpleNamespace(key=3)
    batch = SimpleNamespace(examples=[SimpleNamespace(pair=pair, chosen=response, rejected=response)])
    context = WeightContext(TrainConfig(**{"sink_k": 0} | changes), {3: (first, first)}, {3: (second, second)})
    raw_N = WEIGHTS["attention_contrast"](batch, context, against="x")
    both = raw_N.view(2, -1)
    assert torch.equal(both[0], both[1])
    return both[0].tolist()


def test_the_difference_by_hand():
    """Shares 0.1, 0.4, 0.3, 0.2 and 0.4, 0.1, 0.2, 0.3: what is more is 0.3 and 0.1, of 4/5; the end keeps 1/5."""
    assert weigh(judged(1, 4, 3, 2), judged(8, 2, 4, 6)) == pytest.approx([0, 0.6, 0.2, 0, 0.2])


def test_without_renormalisation_the_sum_is_what_a_cut_has_left():
    """Half of the first one's mass lies on a letter that training does not have."""
    assert weigh(judged(1, 4, 3, 2, 10), judged(8, 2, 4, 6), renormalize=False) == pytest.approx([0, 0.3, 0.1, 0, 0.1])


def test_pins_of_either_keep_their_share_and_take_no_part():
    """The sink is the first token, the other judge did not see the last letter: each is normalised over the three
    between, to 1/6, 1/2, 1/3 and 1/2, 1/4, 1/4; what is more is 1/4 and 1/12, of 3/6."""
    assert weigh(judged(5, 1, 3, 2, 9), judged(1, 2, 1, 1), 5, sink_k=1, sink_k_min=4) == pytest.approx(
        [1 / 6, 0, 3 / 8, 1 / 8, 1 / 6, 1 / 6])


def test_an_answer_without_more_anywhere_has_no_weight():
    """The same attention twice, whatever its sum; and uniform weights once it is normalised."""
    assert weigh(judged(1, 4, 3, 2), judged(2, 8, 6, 4)) == [0, 0, 0, 0, 0]
    assert weigh(judged(5), judged(7), 1, sink_k=1, sink_k_min=1) == [0.5, 0.5]  # all of it is pinned


@pytest.fixture
def other(tmp_path):
    """The file of another judge prompt."""
    (tmp_path / "other.txt").write_text(OTHER)
    return tmp_path / "other.txt"


@pytest.fixture
def arguments(run_arguments, other):
    def make(folder, against=other, **flags) -> list[str]:
        return run_arguments(folder, weights="attention_contrast", weights_options=f"against={against}", **flags)
    return make


def test_packed_plain_and_accumulated_are_one_run_that_uniform_weights_are_not(tmp_path, arguments, run_arguments):
    for name, more in (("packed", {"packing": "on", "micro_batch_tokens": 100_000}), ("plain", {"packing": "off"}),
                       ("accumulated", {"packing": "on", "micro_batch_tokens": 150})):
        train.main(arguments(tmp_path / name, **more))
    for name in ("plain", "accumulated"):
        assert_close_rows(read_rows(tmp_path / name), read_rows(tmp_path / "packed"))
    train.main(run_arguments(tmp_path / "uniform", weights="uniform"))
    assert read_rows(tmp_path / "uniform")[2] != read_rows(tmp_path / "packed")[2]


def test_a_prompt_and_the_folder_that_it_is_extracted_to_are_one_run(tmp_path, arguments, other, toy_model, run_pairs):
    extract.main(["--model", str(toy_model), "--data", str(run_pairs), "--judge-prompt", str(other), "--out",
                  str(tmp_path / "weights")])
    for name, against in (("prompt", other), ("folder", tmp_path / "weights")):
        train.main(arguments(tmp_path / name, against, max_steps=2))
    assert read_rows(tmp_path / "folder") == read_rows(tmp_path / "prompt")


def test_the_judges_own_prompt_leaves_no_weight_and_that_is_said(tmp_path, arguments, capsys):
    train.main(arguments(tmp_path / "run", "short", max_steps=1))
    printed = capsys.readouterr().out
    assert "have an answer without any weight: it counts as uniform" in printed
    assert "judge of against=: position consistency" in printed


def test_a_resume_goes_on_with_the_same_attention_alone(tmp_path, arguments, other, capsys):
    argv = arguments(tmp_path / "run", save_every=2)
    train.main(argv)
    rows = read_rows(tmp_path / "run")
    train.main([*argv, "--resume", str(tmp_path / "run/checkpoints/step-0000004")])
    assert read_rows(tmp_path / "run") == rows
    other.write_text(OTHER.replace("longer", "shorter"))
    with pytest.raises(SystemExit):
        train.main([*argv, "--resume"])
    assert "the attention of against=" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_are_one_run(tmp_path, arguments):
    flags = {"micro_batch_tokens": 250, "max_steps": 3}
    train.main(arguments(tmp_path / "one", cache_dir=tmp_path / "a", **flags))
    run_ranks("train", arguments(tmp_path / "two", cache_dir=tmp_path / "b", **flags))
    assert_close_rows(read_rows(tmp_path / "two"), read_rows(tmp_path / "one"))


def test_attention_of_other_pairs_is_refused(tmp_path, arguments, other, toy_model, run_pairs, capsys):
    few = tmp_path / "few.jsonl"
    few.write_text("".join(run_pairs.read_text().splitlines(keepends=True)[:3]))
    extract.main(["--model", str(toy_model), "--data", str(few), "--judge-prompt", str(other), "--out",
                  str(tmp_path / "weights")])
    with pytest.raises(SystemExit):
        train.main(arguments(tmp_path / "run", tmp_path / "weights"))
    assert "pairs have no weights in" in capsys.readouterr().err


@pytest.mark.parametrize("options, message", [
    ([], "attention_contrast needs --weights-options against=VALUE"),
    (["--weights-options", "against="], "attention_contrast needs --weights-options against=VALUE"),
    (["--weights-options", "against=nowhere.txt"], "--weights-options against=nowhere.txt: --judge-prompt is "),
    (["--weights-options", "against=short", "--layer", "9"], "--layer is '9'"),
    (["--weights-options", "against=SCORES"], "it holds scores: extract attention without --verbalized"),
])
def test_bad_input_is_one_message(options, message, tmp_path, run_arguments, capsys):
    write_meta(tmp_path / "scores", {"source": "verbalized", "layers": []})
    options = [option.replace("SCORES", str(tmp_path / "scores")) for option in options]
    with pytest.raises(SystemExit):
        train.main([*run_arguments(tmp_path / "run", weights="attention_contrast"), *options])
    assert message in capsys.readouterr().err
