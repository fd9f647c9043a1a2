"""The weights file: what extract.py writes, resumes, refuses; and what is read back."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from precision_of_tests import InDouble, assert_as_exact
from processes_of_tests import run_and_die, run_ranks
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import extract
from twdpo.chat import Chat
from twdpo.dataset import load_dataset
from twdpo.dist import Process
from twdpo.flags import InputError
from twdpo.judge import extraction, judge
from twdpo.judge.prompt import JUDGE_PROMPTS, JudgeInputs
from twdpo.toy.grammar import toy_rows
from twdpo.weights_file import WeightsFile, shard_paths, write_shard

SMALL_SHARDS = {"twdpo.judge.extraction.PAIRS_PER_SHARD": 2}


@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in toy_rows()[0][:7]))
    return path


@pytest.fixture(autouse=True, scope="module")
def small_shards():
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name, value in SMALL_SHARDS.items():
            monkeypatch.setattr(name, value)
        yield


@pytest.fixture(scope="module")
def arguments(toy_model, pairs_file):
    def make(out, *extra) -> list[str]:
        return ["--model", str(toy_model), "--data", str(pairs_file), "--judge-prompt", "short", "--layers", "1,2",
                "--out", str(out), *extra]
    return make


@pytest.fixture(scope="module")
def whole(arguments, small_shards, tmp_path_factory) -> Path:
    """The weights file of `arguments` alone. To be read only."""
    out = tmp_path_factory.mktemp("whole") / "w"
    extract.main(arguments(out))
    return out


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_stored_attention_is_that_of_the_whole_maps(whole, toy_model, pairs_file):
    model = AutoModelForCausalLM.from_pretrained(toy_model, attn_implementation="eager")
    tokenizer = AutoTokenizer.from_pretrained(toy_model)
    inputs = JudgeInputs(Chat(tokenizer), JUDGE_PROMPTS["short"], 512)
    for layer in (1, 2):
        weights_file = WeightsFile(whole, str(layer))
        for pair in load_dataset(str(pairs_file), "").train:
            judged = inputs.build(pair)
            for turn in (0, 1):
                with torch.no_grad():
                    output = model(torch.from_numpy(judged.input_ids[turn]).long()[None], output_attentions=True)
                row = output.attentions[layer - 1][0, :, -1].mean(0)
                for side, answer in enumerate(weights_file[pair.key]):
                    first, stop = judged.ranges[turn][side]
                    np.testing.assert_allclose(answer.attention_LRJ[0, turn], row[first:stop], atol=1e-6)
                    assert (answer.ids_J == judged.ids[side]).all()
                    text = getattr(pair, ("chosen", "rejected")[side])
                    assert answer.spans_J2.min() == 0 and answer.spans_J2.max() == len(text)


@pytest.mark.slow
def test_layers_heads_and_rollout_of_one_pass_are_those_of_passes_of_their_own(tmp_path, arguments, pairs_file):
    extract.main(arguments(tmp_path / "all", "--rollout"))
    extract.main(arguments(tmp_path / "first", "--layers", "1"))
    extract.main(arguments(tmp_path / "one", "--judge-heads", "1"))
    extract.main(arguments(tmp_path / "other", "--judge-heads", "2,3,4"))
    for pair in load_dataset(str(pairs_file), "").train:
        layers = {layer: WeightsFile(tmp_path / "all", layer)[pair.key][0].attention_LRJ
                  for layer in ("1", "2", "rollout", "last")}
        assert (layers["last"] == layers["2"]).all() and not np.allclose(layers["rollout"], layers["2"], atol=1e-4)
        np.testing.assert_allclose(WeightsFile(tmp_path / "first")[pair.key][0].attention_LRJ, layers["1"], atol=1e-7)
        heads = [WeightsFile(tmp_path / name)[pair.key][0].attention_LRJ for name in ("one", "other")]
        np.testing.assert_allclose((heads[0] + 3 * heads[1]) / 4, layers["2"], atol=1e-6)


def test_the_final_layer_does_all_but_its_attention_at_the_last_positions(tmp_path, arguments, monkeypatch, pairs_file):
    """Unless that changes the hidden states, as in a layer that mixes tokens elsewhere too."""
    from transformers.models.llama.modeling_llama import LlamaMLP
    shapes, original = [], LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: shapes.append(x.shape[1]) or original(self, x))
    extract.main(arguments(tmp_path / "short"))
    assert min(shapes[-2:]) < 10 and max(shapes[-2:]) > 100

    def mixes_tokens(self, x):
        shapes.append(x.shape[1])
        return original(self, x + x.mean(dim=1, keepdim=True) * (x.shape[1] > 2))
    monkeypatch.setattr(LlamaMLP, "forward", mixes_tokens)
    extract.main(arguments(tmp_path / "whole"))
    assert min(shapes[-2:]) > 50


def test_layers_may_be_named_in_any_way_and_twice(tmp_path, arguments, pairs_file):
    extract.main(arguments(tmp_path / "w", "--layers", "1, 2"))
    assert WeightsFile(tmp_path / "w", "2, 1,02").layers == ["2", "1"] == WeightsFile(tmp_path / "w", "2+1").layers
    with pytest.raises(InputError, match=r"--layer is '1,1\+2': layers are separated by commas"):
        WeightsFile(tmp_path / "w", "1,1+2")
    with pytest.raises(SystemExit):
        extract.main(arguments(tmp_path / "empty", "--layers", ""))
    assert not (tmp_path / "empty").exists()


def test_the_forward_stops_after_the_last_wanted_layer(tmp_path, arguments, monkeypatch, capsys):
    """Without the model's last layer there is no verdict to store, and nothing is said of it."""
    seen = []
    original = judge.judge_forward
    monkeypatch.setattr(judge, "judge_forward", lambda decoder, capture, num_layers, final_layer:
                        seen.append((num_layers, len(decoder.layers)))
                        or original(decoder, capture, num_layers, final_layer))
    extract.main(arguments(tmp_path / "w", "--layers", "1"))
    assert set(seen) == {(1, 1)} and "position consistency" not in capsys.readouterr().out
    assert WeightsFile(tmp_path / "w").verdict_statistics([]) == {}


def test_a_model_that_packing_changes_is_judged_input_by_input(tmp_path, arguments, monkeypatch, pairs_file, whole,
                                                               capsys):
    monkeypatch.setattr(judge.JudgePass, "check_packing", lambda self: False)
    extract.main(arguments(tmp_path / "alone"))
    assert "judge inputs run one by one" in capsys.readouterr().out
    for pair in load_dataset(str(pairs_file), "").train:
        np.testing.assert_allclose(WeightsFile(whole)[pair.key][1].attention_LRJ,
                                   WeightsFile(tmp_path / "alone")[pair.key][1].attention_LRJ, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("rope", [
    {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
    {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 100,
     "short_factor": [1.0] * 4, "long_factor": [3.0, 2.0, 1.5, 1.0]}])
def test_rotary_embeddings_that_adapt_do_not_remember(rope, tmp_path, arguments, toy_model, pairs_file):
    """Their frequencies depend on the longest input so far: rows must not depend on what was judged before."""
    tokenizer = AutoTokenizer.from_pretrained(toy_model)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                         num_attention_heads=4, max_position_embeddings=100, rope_parameters=rope,
                         initializer_range=0.3)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [json.loads(line) for line in pairs_file.read_text().splitlines()]
    rows[0]["chosen"] = " ".join(row["chosen"] for row in rows)
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = arguments(tmp_path / "w", "--model", str(tmp_path / "model"), "--data", str(tmp_path / "pairs.jsonl"),
                     "--judge-max-length", "900")
    extract.main(argv)
    whole = contents(tmp_path / "w")
    for path in shard_paths(tmp_path / "w")[1:]:
        path.unlink()
    extract.main(argv)
    assert contents(tmp_path / "w") == whole
    pair = load_dataset(str(tmp_path / "pairs.jsonl"), "").train[-1]
    judged = JudgeInputs(Chat(tokenizer), JUDGE_PROMPTS["short"], 900).build(pair)
    first, stop = judged.ranges[0][0]

    def last_row(model) -> torch.Tensor:
        with torch.no_grad():
            output = model(torch.from_numpy(judged.input_ids[0]).long()[None], output_attentions=True)
        return output.attentions[-1][0, :, -1, first:stop].mean(0)
    plain, exact = (AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="eager")
                    for _ in range(2))
    exact = exact.double()
    with InDouble():
        exact_J = last_row(exact)
    ours_J = torch.from_numpy(WeightsFile(tmp_path / "w")[pair.key][0].attention_LRJ[0, 0])
    assert_as_exact(ours_J, last_row(plain), exact_J)
    assert exact_J.max() > 0.01  # far above what the bound lets pass


def test_a_killed_extraction_resumes_to_the_same_bytes(tmp_path, arguments, monkeypatch, whole, capsys):
    written = []

    def dies_at_the_third(path, arrays, meta):
        if len(written) == 2:
            path.with_name(f".{path.name}.1.tmp").write_bytes(b"half")
            raise KeyboardInterrupt
        written.append(path)
        write_shard(path, arrays, meta)
    monkeypatch.setattr(extraction, "write_shard", dies_at_the_third)
    with pytest.raises(SystemExit):
        extract.main(arguments(tmp_path / "killed"))
    monkeypatch.setattr(extraction, "write_shard", write_shard)
    assert len(shard_paths(tmp_path / "killed")) == 2
    extract.main(arguments(tmp_path / "killed"))
    assert "4 of 7 pairs stored" in capsys.readouterr().out
    after = {name: data for name, data in contents(tmp_path / "killed").items() if not name.endswith(".tmp")}
    assert after == contents(whole)
    extract.main(arguments(tmp_path / "killed"))
    assert "nothing to extract" in capsys.readouterr().out


@pytest.mark.slow
def test_two_processes_share_the_shards_and_write_the_same_bytes(tmp_path, arguments):
    """With shards of one judge: one process runs along while the other has work."""
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in toy_rows()[0][:5]))
    extract.main(arguments(tmp_path / "one", "--data", str(path)))
    run_ranks("extract", arguments(tmp_path / "two", "--data", str(path), "--judge-sharding", "on"),
              constants=SMALL_SHARDS)
    assert len(shard_paths(tmp_path / "two")) == 3
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_a_process_whose_sharded_judge_fails_tells_the_others(tmp_path, arguments, monkeypatch, capsys):
    """Two rounds of states as the other process would send them: it works, then it has failed."""
    others, seen = [judge.WORKS] * 5 + [judge.FAILED], []
    monkeypatch.setattr(Process, "largest", lambda self, state: seen.append(state) or max(state, others[len(seen) - 1]))
    with pytest.raises(SystemExit):
        extract.main(arguments(tmp_path / "other", "--judge-sharding", "on"))
    assert "another process found its part of the judge's input unfit" in capsys.readouterr().err
    assert seen == [judge.WORKS] * 6
    others[-1] = judge.WORKS
    seen.clear()
    judge_rows = judge.JudgePass.judge_rows

    def fails(self, groups):
        judge_rows(self, groups)
        raise InputError("not finite")
    monkeypatch.setattr(judge.JudgePass, "judge_rows", fails)
    with pytest.raises(SystemExit):
        extract.main(arguments(tmp_path / "own", "--judge-sharding", "on"))
    assert "not finite" in capsys.readouterr().err and seen[-1] == judge.FAILED


@pytest.mark.parametrize("extra", [("--layers", "1"), ("--judge-query", "verdict", "--rollout"),
                                   ("--judge-attention", "eager"), ("--judge-dtype", "bfloat16")])
def test_a_sharded_judge_gives_the_same_bytes(extra, tmp_path, arguments, monkeypatch):
    sharded, original = [], judge.load_shards
    monkeypatch.setattr(judge, "load_shards", lambda judge, *rest: sharded.append(
        {parameter.dtype for parameter in judge.parameters()}) or original(judge, *rest))
    extract.main(arguments(tmp_path / "whole", *extra))
    assert not sharded
    extract.main(arguments(tmp_path / "sharded", *extra, "--judge-sharding", "on"))
    assert sharded == [{torch.bfloat16 if "bfloat16" in extra else torch.float32}]
    assert contents(tmp_path / "whole") == contents(tmp_path / "sharded")


@pytest.mark.slow
def test_a_sigkill_in_the_middle_of_a_write_resumes_to_the_same_bytes(tmp_path, arguments, whole):
    out = tmp_path / "killed"
    run_and_die("extract", arguments(out), "os.replace", 3, SMALL_SHARDS)  # after meta.json and one shard
    assert len(shard_paths(out)) == 1 and list(out.glob(".shard*.tmp"))
    extract.main(arguments(out))
    left = {name: data for name, data in contents(out).items() if not name.startswith(".")}
    assert left == contents(whole)


@pytest.mark.parametrize("extra, word", [(["--judge-query", "verdict"], "query"), (["--layers", "2"], "layers"),
                                         (["--judge-max-length", "300"], "max_judge_length"), (["--rollout"], "layers"),
                                         (["--judge-heads", "1"], "heads"), (["--model", "OTHER"], "model"),
                                         (["--judge-prompt", "PROMPT"], "judge_prompt"), (["--data", "OTHER"], "data"),
                                         (["--chat-template", "TEMPLATE"], "tokenizer")])
def test_another_extraction_is_refused_and_says_what_differs(extra, word, tmp_path, arguments, toy_model, whole,
                                                             capsys):
    if extra[1:] == ["OTHER"] and extra[0] == "--model":
        shutil.copytree(toy_model, tmp_path / "model")
        model = AutoModelForCausalLM.from_pretrained(toy_model)
        model.lm_head.weight.data[0] += 1
        model.save_pretrained(tmp_path / "model")
        extra = ["--model", str(tmp_path / "model")]
    elif extra[0] == "--data":
        (tmp_path / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in toy_rows()[0][7:12]))
        extra = ["--data", str(tmp_path / "other.jsonl")]
    elif extra[0] == "--judge-prompt":
        (tmp_path / "prompt.txt").write_text(JUDGE_PROMPTS["short"] + " Now")
        extra = ["--judge-prompt", str(tmp_path / "prompt.txt")]
    elif extra[0] == "--chat-template":
        template = AutoTokenizer.from_pretrained(toy_model).chat_template
        (tmp_path / "template.jinja").write_text(template + " ")
        extra = ["--chat-template", str(tmp_path / "template.jinja")]
    shutil.copytree(whole, tmp_path / "w")
    with pytest.raises(SystemExit) as stopped:
        extract.main(arguments(tmp_path / "w", *extra))
    assert stopped.value.code == 2 and f"{word}: was" in capsys.readouterr().err
    assert contents(tmp_path / "w") == contents(whole)


def test_the_verdict_token_as_query_reads_another_row(tmp_path, arguments, pairs_file, whole):
    extract.main(arguments(tmp_path / "verdict", "--judge-query", "verdict"))
    key = load_dataset(str(pairs_file), "").train[0].key
    first, second = WeightsFile(whole)[key][0], WeightsFile(tmp_path / "verdict")[key][0]
    assert not np.allclose(first.attention_LRJ, second.attention_LRJ, rtol=1e-3)


def test_eager_gives_the_same_rows(tmp_path, arguments, pairs_file, whole):
    extract.main(arguments(tmp_path / "eager", "--judge-attention", "eager"))
    for pair in load_dataset(str(pairs_file), "").train:
        for ours, theirs in zip(WeightsFile(whole)[pair.key], WeightsFile(tmp_path / "eager")[pair.key]):
            np.testing.assert_allclose(ours.attention_LRJ, theirs.attention_LRJ, atol=1e-6)


def test_bad_rows_stop_before_the_model_or_are_left_out(tmp_path, arguments, pairs_file, capsys):
    path = tmp_path / "bad.jsonl"
    path.write_text(pairs_file.read_text() + "{}\n")
    with pytest.raises(SystemExit) as stopped:
        extract.main(arguments(tmp_path / "w", "--data", str(path)))
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and f"{path}:8: no column chosen" in error and "Traceback" not in error
    extract.main(arguments(tmp_path / "w", "--data", str(path), "--skip-bad-rows"))
    assert (tmp_path / "w/rejected_rows.jsonl").exists() and len(shard_paths(tmp_path / "w")) == 4


def test_a_folder_of_something_else_is_refused(tmp_path, arguments, capsys):
    (tmp_path / "w").mkdir()
    (tmp_path / "w/notes.txt").write_text("mine")
    with pytest.raises(SystemExit):
        extract.main(arguments(tmp_path / "w"))
    assert "neither empty nor a weights file" in capsys.readouterr().err


def test_verdict_statistics_by_hand(whole):
    """Rounds of two pairs: A then A (the chosen one, then the rejected one: inconsistent, half right), and B then A
    (the rejected one twice: consistent, wrong). Consistency 1/2, agreement 1/4."""
    weights_file = WeightsFile(whole)
    keys = list(weights_file._verdicts)[:2]
    weights_file._verdicts[keys[0]] = np.array([[-0.1, -3.0], [-0.1, -3.0]])
    weights_file._verdicts[keys[1]] = np.array([[-3.0, -0.1], [-0.1, -3.0]])
    assert weights_file.verdict_statistics(keys) == {"position consistency": 0.5, "agreement with the label": 0.25}
