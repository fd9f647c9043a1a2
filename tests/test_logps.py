"""Log-probs of frozen models: right numbers, only what is missing is computed, damage is repaired."""

import numpy as np
import pytest
import torch
from precision_of_tests import InDouble, assert_as_exact
from transformers import AutoModelForCausalLM

from twdpo.chat import Chat
from twdpo.dataset import load_dataset
from twdpo.logps import logps_directory, response_logps
from twdpo.models.policy import load_policy
from twdpo.models.source import load_tokenizer
from twdpo.rows import RowOptions, evaluation_batches
from twdpo.tokens import tokenize_pairs


@pytest.fixture
def examples(toy_model):
    pairs = load_dataset("toy", "").train[:9]
    return tokenize_pairs(Chat(load_tokenizer(toy_model, "")), pairs, 200, 100)[0]


def test_cached_log_probs_are_those_of_plain_forwards(toy_model, process, examples, tmp_path, capsys):
    policy = load_policy(toy_model, torch.float32, process)
    plain, exact = (AutoModelForCausalLM.from_pretrained(toy_model) for _ in range(2))
    exact = exact.double()

    def plain_logps(model, example, response) -> torch.Tensor:
        ids, start = np.concatenate([example.prompt_ids, response.ids]), len(example.prompt_ids)
        with torch.no_grad():
            logps_TV = model(torch.from_numpy(ids).long()[None]).logits[0].log_softmax(-1)
        return logps_TV[range(start - 1, len(ids) - 1), ids[start:]]
    batches = evaluation_batches(len(examples), 4)
    logps = response_logps(policy, process, examples, batches, RowOptions(False, 300), tmp_path)
    assert logps.keys() == {example.pair.key for example in examples}
    for example in examples:
        for response, values in zip((example.chosen, example.rejected), logps[example.pair.key]):
            plain_N = plain_logps(plain, example, response)
            with InDouble():
                exact_N = plain_logps(exact, example, response)
            assert_as_exact(torch.from_numpy(values), plain_N, exact_N)
    assert "0 of 9 pairs cached" in capsys.readouterr().out
    again = response_logps(policy, process, examples, batches, RowOptions(False, 300), tmp_path)
    assert "9 of 9 pairs cached" in capsys.readouterr().out
    assert all((first == second).all() for pair in logps for first, second in zip(logps[pair], again[pair]))


def test_what_is_cached_is_kept_and_the_rest_added(toy_model, process, examples, tmp_path, capsys):
    policy = load_policy(toy_model, torch.float32, process)
    few = response_logps(policy, process, examples, [[0, 1]], RowOptions(False, 300), tmp_path)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.5)  # another policy: new values can be told from cached ones
    more = response_logps(policy, process, examples, evaluation_batches(9, 4), RowOptions(True, 10_000), tmp_path)
    assert "2 of 9 pairs cached" in capsys.readouterr().out and len(more) == 9
    assert len(few) == 2 and all((few[key][0] == more[key][0]).all() for key in few)
    other = response_logps(policy, process, examples, [[0, 1]], RowOptions(False, 300), tmp_path / "other")
    assert not np.allclose(other[min(other)][0], more[min(other)][0], atol=0.1)
    assert len(list(tmp_path.glob("logps-*.safetensors"))) == 2


def test_a_damaged_cache_file_is_computed_again(toy_model, process, examples, tmp_path, capsys):
    policy = load_policy(toy_model, torch.float32, process)
    batches = evaluation_batches(9, 9)
    whole = response_logps(policy, process, examples, batches, RowOptions(False, 300), tmp_path)
    (path,) = tmp_path.glob("logps-*.safetensors")
    path.write_bytes(path.read_bytes()[:50])
    again = response_logps(policy, process, examples, batches, RowOptions(False, 300), tmp_path)
    assert "is damaged" in capsys.readouterr().out
    assert all((first == second).all() for pair in whole for first, second in zip(whole[pair], again[pair]))


def test_the_cache_is_named_by_weights_dtype_and_device(tmp_path):
    names = {logps_directory(tmp_path, model, dtype, torch.device(device), packs, False) for model in ("a", "b")
             for dtype in (torch.float32, torch.bfloat16) for device in ("cpu", "meta") for packs in (False, True)}
    assert len(names) == 16
