"""Whole runs of train.py on a handful of pairs: the same numbers however the work is split, killed or resumed."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models_of_tests import MODELS_WITHOUT_THE_INTERFACE
from processes_of_tests import run_and_die
from runs_of_tests import MEASURED, assert_close_rows, read_rows
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import extract
import train
from twdpo.toy.grammar import toy_rows

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def arguments(run_arguments):
    return run_arguments


@pytest.fixture(scope="module")
def pairs_file(run_pairs) -> Path:
    return run_pairs


@pytest.mark.slow
def test_two_processes_and_small_micro_batches_change_no_loss(tmp_path, arguments):
    """Three pairs a step on two processes, one giant pair among them, 8 steps. Gradient norms are compared as well:
    AdamW would hide a gradient that is averaged, or summed, over processes by mistake."""
    train.main(arguments(tmp_path / "one", max_steps=8, eval_every=7, micro_batch_tokens=100_000))
    train.main(arguments(tmp_path / "split", max_steps=8, eval_every=7, micro_batch_tokens=150))
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "train.py",
                    *arguments(tmp_path / "two", max_steps=8, eval_every=7, micro_batch_tokens=250)],
                   cwd=ROOT, check=True, capture_output=True, timeout=300)
    expected = read_rows(tmp_path / "one")
    assert len(expected) == 1 + 8 + 2  # before the first step, after 7 and the last
    assert_close_rows(read_rows(tmp_path / "split"), expected)
    assert_close_rows(read_rows(tmp_path / "two"), expected)


@pytest.mark.slow
def test_packed_and_plain_rows_give_the_same_run(tmp_path, arguments, capsys):
    """The first margin is 0 to the last bit, with reference log-probs from micro-batches of the same shape: its own."""
    for packing in ("on", "off", "auto"):
        train.main(arguments(tmp_path / packing, packing=packing, micro_batch_tokens=300, cache_dir=tmp_path / "cache"))
    assert_close_rows(read_rows(tmp_path / "on"), read_rows(tmp_path / "off"))
    assert read_rows(tmp_path / "auto") == read_rows(tmp_path / "on")
    assert json.loads((tmp_path / "auto/config.json").read_text())["packing"] == "on"
    assert capsys.readouterr().out.count("max |margin| at step 0: 0\n") == 3


@pytest.mark.slow
@pytest.mark.parametrize("packing", ["on", "off"])
def test_activations_computed_again_change_nothing(packing, tmp_path, arguments, monkeypatch):
    """Both layers, or one of them, run once more in the backward pass, and the rows are the same to the last bit."""
    from transformers.models.llama.modeling_llama import LlamaMLP
    calls, original = [], LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: calls.append(torch.is_grad_enabled()) or original(self, x))
    counts = []
    for checkpointing in ("none", "full", "selective", "attention"):
        calls.clear()
        train.main(arguments(tmp_path / checkpointing, checkpointing=checkpointing, packing=packing))
        counts.append(sum(calls))
        assert read_rows(tmp_path / checkpointing) == read_rows(tmp_path / "none")
    assert counts == [counts[0], 2 * counts[0], 1.5 * counts[0], 2 * counts[0]]


def test_reducing_on_the_last_micro_batch_only_changes_nothing(tmp_path, arguments):
    train.main(arguments(tmp_path / "every", micro_batch_tokens=150))
    train.main([*arguments(tmp_path / "last", micro_batch_tokens=150), "--no-sync"])
    assert_close_rows(read_rows(tmp_path / "last"), read_rows(tmp_path / "every"))


KILLS = {
    "first step": ("train.train_step", 1),
    "middle": ("train.train_step", 4),
    "before a save": ("train.save_checkpoint", 2),
    "during a save": ("twdpo.checkpoint.sync", 5),
    "during best": ("train.export_model", 2),
    "at the end": ("train.summarize", 1),
}
KILLED = {"save_every": 2, "eval_every": 2, "keep_last": 2, "max_steps": 6, "micro_batch_tokens": 200}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, run_arguments) -> Path:
    run_dir = tmp_path_factory.mktemp("uninterrupted") / "run"
    train.main(run_arguments(run_dir, **KILLED))
    return run_dir


@pytest.mark.slow
@pytest.mark.parametrize("place", KILLS)
def test_killed_and_resumed_run_equals_one_that_never_stopped(place, tmp_path, uninterrupted, arguments):
    run_dir = tmp_path / "run"
    run_and_die("train", arguments(run_dir, **KILLED), *KILLS[place])
    with open(run_dir / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "lo')  # a line that the kill cut
    train.main([*arguments(run_dir, **KILLED), "--resume"])
    assert read_rows(run_dir) == read_rows(uninterrupted)
    for name in ("final", "best"):
        model = Path(name) / "model.safetensors"
        assert (run_dir / model).read_bytes() == (uninterrupted / model).read_bytes()
    assert sorted(path.name for path in (run_dir / "checkpoints").glob("*")) == ["step-0000004", "step-0000006"]


@pytest.mark.slow
def test_resume_without_the_cache_is_the_same_run(tmp_path, arguments):
    flags = {"save_every": 2, "micro_batch_tokens": 200}
    train.main(arguments(tmp_path / "whole", cache_dir=tmp_path / "other", **flags))
    cache = tmp_path / "cache"
    run_and_die("train", arguments(tmp_path / "run", cache_dir=cache, **flags), *KILLS["middle"])
    for path in cache.rglob("*.safetensors"):
        path.unlink()
    train.main([*arguments(tmp_path / "run", cache_dir=cache, **flags), "--resume"])
    assert read_rows(tmp_path / "run") == read_rows(tmp_path / "whole")


@pytest.mark.slow
def test_a_kill_during_the_reference_pass_loses_nothing(tmp_path, arguments, plain_run):
    argv = arguments(tmp_path / "run", cache_dir=tmp_path / "cache")
    run_and_die("train", argv, "twdpo.logps.write_cache", 2)  # the training pairs are cached, the held-out ones not
    train.main([*argv, "--resume"])
    assert read_rows(tmp_path / "run") == read_rows(plain_run)


def test_a_run_is_not_overwritten_or_resumed_by_accident(tmp_path, arguments, capsys):
    train.main(arguments(tmp_path / "run", max_steps=1))
    for extra, word in ((), "--overwrite"), (("--resume", "--lr", "0.5"), "--lr"):
        with pytest.raises(SystemExit) as stopped:
            train.main([*arguments(tmp_path / "run", max_steps=1), *extra])
        assert stopped.value.code == 2
        assert word in capsys.readouterr().err
    train.main([*arguments(tmp_path / "run", max_steps=1), "--overwrite"])


def fails(argv: list[str], message: str, capsys) -> None:
    """The command ends with code 2 and one message that holds `message`."""
    with pytest.raises(SystemExit) as stopped:
        train.main(argv)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and message in error and "Traceback" not in error


def test_overwrite_deletes_nothing_before_the_new_input_is_checked(tmp_path, arguments, capsys):
    run_dir = tmp_path / "run"
    train.main(arguments(run_dir, max_steps=1))
    before = sorted(path.name for path in run_dir.iterdir())
    fails([*arguments(run_dir, data="typo.jsonl"), "--overwrite"], "no such file", capsys)
    assert sorted(path.name for path in run_dir.iterdir()) == before
    train.main([*arguments(run_dir, max_steps=2), "--overwrite"])
    # What started it stands in config.json, but not that it was to overwrite.
    train.main(["--config", str(run_dir / "config.json"), "--resume"])
    assert read_rows(run_dir)[-1]["step"] == 2


def test_resume_refuses_other_pairs_under_the_same_name(tmp_path, arguments, pairs_file, capsys):
    copy = tmp_path / "pairs.jsonl"
    copy.write_text(pairs_file.read_text())
    argv = arguments(tmp_path / "run", data=copy, max_steps=2, save_every=1)
    train.main(argv)
    copy.write_text("".join(json.dumps(row) + "\n" for row in toy_rows()[0][30:50]))
    fails([*argv, "--resume"], "since then the pairs (or their tokens), the token weights changed", capsys)


@pytest.mark.slow
def test_resume_from_an_earlier_checkpoint_gives_the_later_ones_up(tmp_path, arguments, plain_run):
    argv = arguments(tmp_path / "run", save_every=2, keep_last=0, cache_dir=tmp_path / "cache")
    train.main(argv)
    checkpoints = tmp_path / "run/checkpoints"
    # It dies before its first save, and is resumed again: not from the step 6 of the branch that was given up.
    run_and_die("train", [*argv, "--resume", str(checkpoints / "step-0000002")], "twdpo.checkpoint.state_tensors", 2)
    assert [path.name for path in sorted(checkpoints.glob("step-*"))] == ["step-0000002"]
    train.main([*argv, "--resume"])
    assert read_rows(tmp_path / "run") == read_rows(plain_run)


def test_resume_may_ask_for_token_stats(tmp_path, arguments, capsys):
    train.main(arguments(tmp_path / "run", max_steps=2, save_every=1))
    train.main([*arguments(tmp_path / "run", max_steps=2, save_every=1), "--resume", "--token-stats"])


def test_resume_of_a_damaged_run_is_one_message(tmp_path, arguments, capsys):
    argv = arguments(tmp_path / "run", max_steps=1, save_every=1)
    train.main(argv)
    (tmp_path / "run/checkpoints/step-0000001/manifest.json").write_text("{}")
    fails([*argv, "--resume"], "manifest.json has no digest, files", capsys)


@pytest.mark.slow
def test_a_cache_that_a_kill_or_a_disk_damaged_is_mended(tmp_path, arguments, capsys):
    argv = arguments(tmp_path / "run", cache_dir=tmp_path / "cache", max_steps=2)
    train.main(argv)
    expected = read_rows(tmp_path / "run")
    (folder,) = (tmp_path / "cache/weights").iterdir()
    shard = next(folder.glob("shard-*"))
    shard.write_bytes(shard.read_bytes()[:200])
    train.main([*argv, "--overwrite"])
    assert f"{shard} is damaged" in capsys.readouterr().out and read_rows(tmp_path / "run") == expected
    for path in folder.iterdir():
        path.unlink()
    (folder / ".meta.json.123.tmp").write_text("{")  # what a kill leaves of the first file
    train.main([*argv, "--overwrite"])
    assert read_rows(tmp_path / "run") == expected


def test_metrics_and_model_of_a_run(tmp_path, arguments, capsys):
    run_dir = tmp_path / "run"
    train.main(arguments(run_dir, cache_dir=tmp_path / "cache"))
    printed = capsys.readouterr().out
    assert "max |margin| at step 0: 0" in printed
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6]
    wanted = {"step", "loss", "reward_accuracy", "reward_margin", "weighted_reward_accuracy", "weighted_reward_margin",
              "reward_chosen", "reward_rejected", "weighted_reward_chosen", "weighted_reward_rejected", "kl",
              "grad_norm", "lr", *MEASURED} - {"peak_reserved_gib"}  # a GPU's
    assert all(row.keys() == wanted for row in steps)
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    evaluations = [row for row in rows if "eval/loss" in row]
    assert [row["step"] for row in evaluations] == [0, 3, 6]
    assert evaluations[0]["eval/reward_accuracy"] == 0.5
    assert {"eval/reward_accuracy", "eval/reward_accuracy_stderr", "eval/reward_margin"} <= evaluations[-1].keys()
    model = AutoModelForCausalLM.from_pretrained(run_dir / "final")
    start = AutoModelForCausalLM.from_pretrained(json.loads((run_dir / "config.json").read_text())["model"])
    assert model.dtype == start.dtype and model.state_dict().keys() == start.state_dict().keys()
    assert not torch.equal(model.get_input_embeddings().weight, start.get_input_embeddings().weight)
    assert AutoTokenizer.from_pretrained(run_dir / "final").chat_template
    assert (run_dir / "best/model.safetensors").is_file()


def test_token_stats_are_logged_and_change_nothing(tmp_path, arguments, toy_model):
    train.main([*arguments(tmp_path / "stats", max_steps=2), "--token-stats"])
    train.main(arguments(tmp_path / "plain", max_steps=2))
    rows, plain = read_rows(tmp_path / "stats"), read_rows(tmp_path / "plain")
    vocabulary = AutoModelForCausalLM.from_pretrained(toy_model).config.vocab_size
    for row, other in zip(rows, plain, strict=True):
        prefix = "eval/" if "eval/loss" in row else ""
        # The toy's random start knows nothing yet: near the uniform distribution's entropy.
        assert 0.8 * math.log(vocabulary) < row[f"{prefix}token_entropy"] <= math.log(vocabulary)
        assert 0 <= row[f"{prefix}token_top1"] < 0.2
        assert {name: value for name, value in row.items() if "token_" not in name} == other


@pytest.mark.slow
def test_extraction_is_reused_until_a_judge_setting_changes(tmp_path, arguments, capsys):
    own_cache = tmp_path / "cache"
    outputs = []
    for number, extra in enumerate(([], [], ["--judge-query", "verdict"])):
        train.main([*arguments(tmp_path / str(number), cache_dir=own_cache, max_steps=1), *extra])
        outputs.append(capsys.readouterr().out)
    assert "to extract" in outputs[0] and "nothing to extract" not in outputs[0]
    assert "nothing to extract" in outputs[1]
    assert "nothing to extract" not in outputs[2]


def test_uniform_twdpo_is_dpo(tmp_path, arguments):
    train.main(arguments(tmp_path / "twdpo", loss="twdpo", weights="uniform"))
    train.main(arguments(tmp_path / "dpo", loss="dpo"))
    assert_close_rows(read_rows(tmp_path / "twdpo"), read_rows(tmp_path / "dpo"))


@pytest.mark.slow
def test_weights_folder_of_extract_is_used(tmp_path, arguments, toy_model, pairs_file, plain_run):
    extract.main(["--model", str(toy_model), "--data", str(pairs_file), "--judge-prompt", "short",
                  "--out", str(tmp_path / "weights")])
    train.main(arguments(tmp_path / "folder", weights=tmp_path / "weights"))
    assert_close_rows(read_rows(tmp_path / "folder"), read_rows(plain_run))  # judged in another order


@pytest.fixture(scope="module")
def exported(tmp_path_factory, toy_model, pairs_file) -> Path:
    """A folder with rows.jsonl, an export, and the weights file w. To be read only."""
    folder = tmp_path_factory.mktemp("exported")
    extract.main(["--model", str(toy_model), "--data", str(pairs_file), "--judge-prompt", "short", "--layers", "all",
                  "--rollout", "--out", str(folder / "w"), "--export", str(folder / "rows.jsonl")])
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("layer", ["1", "1,2", "1+2", "rollout"])
def test_exported_columns_train_like_the_folder(layer, tmp_path, arguments, exported, capsys):
    for name in ("w", "rows.jsonl"):
        train.main(arguments(tmp_path / f"run-{name}", weights=exported / name, layer=layer, max_steps=2))
    assert_close_rows(read_rows(tmp_path / "run-w"), read_rows(tmp_path / "run-rows.jsonl"))
    train.main(arguments(tmp_path / "run-own", layer=layer, max_steps=2))  # extracted by train.py itself
    assert_close_rows(read_rows(tmp_path / "run-w"), read_rows(tmp_path / "run-own"))
    assert "of the mass copied" in capsys.readouterr().out


def test_verbalized_scores_train(tmp_path, arguments, monkeypatch, capsys):
    """Scores of every word of every answer but those of one pair, which is left out and counted."""
    from twdpo.judge import verbalize
    rows = toy_rows()[0]

    def canned(model, chat, prompts, max_new_tokens):
        texts = [chat.tokenizer.decode(ids) for ids in prompts]
        answers = [next(row[side] for row in rows for side in ("chosen", "rejected") if row[side] in text)
                   if "say a lot" not in text else "" for text in texts]
        return [json.dumps([[word, 1 + len(word) % 5] for word in answer.split()]) for answer in answers]
    monkeypatch.setattr(verbalize, "generate", canned)
    train.main(arguments(tmp_path / "run", weights="verbalized", max_steps=2))
    assert "1 of 19 pairs have answers of which less than 90 %" in capsys.readouterr().out
    train.main(arguments(tmp_path / "uniform", weights="uniform", loss="twdpo", max_steps=2))
    losses = [[row["loss"] for row in read_rows(tmp_path / name) if "loss" in row] for name in ("run", "uniform")]
    assert losses[0] != losses[1]


def test_the_preset_authors_trains(tmp_path, arguments, capsys):
    train.main([*arguments(tmp_path / "run", max_steps=2), "--preset", "authors", "--judge-cut", "common"])
    assert "preset authors" in capsys.readouterr().out
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert (config["align"], config["unseen"], config["multiplier"]) == ("edits", "zero", "judged")
    assert config["judge_cut"] == "common" and config["renormalize"] is False


def test_length_normalize_drops_the_length(tmp_path, arguments):
    train.main([*arguments(tmp_path / "plain"), "--weights", "uniform"])
    train.main([*arguments(tmp_path / "normed"), "--weights", "uniform", "--length-normalize"])
    plain, normed = read_rows(tmp_path / "plain"), read_rows(tmp_path / "normed")
    assert abs(normed[-1]["eval/weighted_reward_margin"]) < abs(plain[-1]["eval/weighted_reward_margin"])


def test_own_loss_and_source_from_a_file(tmp_path, arguments):
    """The README's example, as it stands there, for ten steps."""
    (example,) = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    (tmp_path / "mine.py").write_text(example)
    train.main([*arguments(tmp_path / "run", max_steps=10), "--import", str(tmp_path / "mine.py"), "--loss",
                "squared_hinge", "--weights", "rising", "--loss-options", "edge=2"])
    rows = read_rows(tmp_path / "run")
    assert rows[0]["eval/loss"] == pytest.approx(4.0, abs=1e-6) and rows[1]["active"] == 1.0
    assert rows[-2]["step"] == 10 and rows[-2]["loss"] < 4.0


@pytest.mark.parametrize("flags, message", [
    (["--loss", "nope"], "--loss is 'nope'"),
    (["--weights", "nope"], "--weights is 'nope'"),
    (["--model", "nowhere/at/all"], "nowhere/at/all"),
    (["--data", "missing.jsonl"], "missing.jsonl"),
    (["--layer", "9"], "9"),
    (["--import", "missing.py"], "missing.py"),
    (["--resume", "missing"], "missing"),
    (["--judge-prompt", "missing.txt"], "missing.txt"),
    (["--output-dir", __file__], "the folder can't be made"),
    (["--cache-dir", __file__], "the folder can't be made"),
    (["--eval-data", os.devnull + ".jsonl"], "no such file"),
    (["--judge-max-length", "10"], "pairs.jsonl:1: a judge input of 10 tokens"),
    (["--seed", "-1"], "--seed is -1"),
    (["--data", os.devnull + ".jsonl"], "no such file"),
    (["--output-dir", "/proc"], "can't be made or written to"),
    (["--chat-template", sys.executable], "it can't be read as text"),
])
def test_bad_input_is_one_message_and_no_traceback(flags, message, tmp_path, arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        train.main([*arguments(tmp_path / "run"), *flags])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not (tmp_path / "run/config.json").exists()  # so the mended command needs no --overwrite


@pytest.mark.parametrize("name", MODELS_WITHOUT_THE_INTERFACE)
def test_a_policy_that_would_look_ahead_is_refused(name, tmp_path, arguments, toy_model, capsys):
    """Architectures whose attention is not reached: given no mask, one attends to what comes after."""
    tokenizer = AutoTokenizer.from_pretrained(toy_model)
    config = AutoConfig.for_model(name, vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2,
                                  num_attention_heads=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    fails(arguments(tmp_path / "run", model=tmp_path / "model", loss="dpo"), "AttentionInterface", capsys)


def test_pairs_without_stored_weights_are_left_out_when_bad_rows_may_be(tmp_path, arguments, toy_model, pairs_file,
                                                                        capsys):
    """What extract.py skipped, train.py can skip: with the same flag, and counted."""
    few = tmp_path / "few.jsonl"
    few.write_text("".join(pairs_file.read_text().splitlines(keepends=True)[:12]))
    extract.main(["--model", str(toy_model), "--data", str(few), "--judge-prompt", "short", "--out",
                  str(tmp_path / "w")])
    argv = arguments(tmp_path / "run", weights=tmp_path / "w", max_steps=1)
    fails(argv, "pairs have no weights in", capsys)
    train.main([*argv, "--skip-bad-rows", "--overwrite"])
    assert "7 of 19 rows can't be used" in capsys.readouterr().out
    assert len((tmp_path / "run/rejected_rows.jsonl").read_text().splitlines()) == 7


def test_a_tokenizer_of_another_model_is_refused(tmp_path, arguments, toy_model, capsys):
    tokenizer = AutoTokenizer.from_pretrained(toy_model)
    config = AutoConfig.for_model("llama", vocab_size=300, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                  num_attention_heads=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    fails(arguments(tmp_path / "run", model=tmp_path / "model", loss="dpo"), "its model has 300 embeddings", capsys)


def test_one_pair_is_trained_on_and_nothing_held_out(tmp_path, arguments):
    row = toy_rows()[0][0]
    (tmp_path / "one.jsonl").write_text(json.dumps(row))
    train.main(arguments(tmp_path / "run", data=tmp_path / "one.jsonl", max_steps=2))
    assert [row["step"] for row in read_rows(tmp_path / "run")] == [1, 2]


def test_a_loss_that_is_not_finite_stops_before_the_optimizer(tmp_path, arguments, capsys):
    (tmp_path / "bad.py").write_text(
        "from twdpo.losses import LOSSES\n"
        "def nan(ratio_S, logps_N, batch, config):\n"
        "    return ratio_S[0::2] * float('nan'), {}\n"
        "LOSSES['nan'] = nan\n")
    argv = [*arguments(tmp_path / "run", eval_fraction=0), "--import", str(tmp_path / "bad.py"), "--loss", "nan",
            "--weights", "uniform"]
    fails(argv, "is not finite, its log-probabilities are: lower --beta", capsys)
