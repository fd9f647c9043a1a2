"""Input gradients of the policy, against plain autograd on each sequence alone, and the source `tidpo` made of them."""

import math

import numpy as np
import pytest
import torch
from models_of_tests import MODELS, build, build_double
from precision_of_tests import InDouble, assert_exact
from processes_of_tests import run_ranks
from runs_of_tests import assert_close_rows, read_rows
from test_online import WAYS
from test_packing import EXAMPLES

import train
from twdpo.batch import collate
from twdpo.flags import InputError
from twdpo.models.attention import ATTENTION_NAME
from twdpo.models.attribution import input_gradients
from twdpo.models.build import decoder_layers, enable_checkpointing
from twdpo.models.policy import Policy
from twdpo.plugins import bind_options
from twdpo.rows import MicroBatch
from twdpo.weights import WEIGHTS

MICRO_BATCH = MicroBatch((0, 1, 2, 3))


def plain_gradients(model) -> list[torch.Tensor]:
    """Of each sequence of EXAMPLES, by a forward of it alone from its embeddings."""
    found = []
    for example in EXAMPLES:
        for side in (example.chosen, example.rejected):
            ids = torch.from_numpy(np.concatenate([example.prompt_ids, side.ids])).long()[None].to(model.device)
            leaf_1TD = model.get_input_embeddings()(ids).detach().requires_grad_()
            target = model(inputs_embeds=leaf_1TD).logits[0, -1].max()
            found.append(torch.autograd.grad(target, leaf_1TD)[0][0].abs().sum(dim=-1))
    return found


def batch_of(packs: bool):
    return collate(MICRO_BATCH, EXAMPLES, [0, 1, 2, 3], packs=packs)


@pytest.mark.parametrize("name", MODELS)
def test_they_are_those_of_each_sequence_alone(name):
    """Packed rows too, where both sequences of a pair share tokens and two pairs have equal first answer tokens."""
    plain, policy = build_double(name, "eager"), Policy(build_double(name, ATTENTION_NAME))
    with InDouble():
        expected = plain_gradients(plain)
        for packs in (True, False):
            found = input_gradients(policy, batch_of(packs))
            assert len(found) == len(expected) == 8
            for ours, theirs in zip(found, expected):
                assert not ours.requires_grad
                assert_exact(ours, theirs, f"packed: {packs}")


@pytest.mark.parametrize("checkpointing", ["none", "full", "selective", "attention"])
def test_gradients_of_parameters_stay_as_they_are(checkpointing):
    """Those that earlier micro-batches left, and those that are none; with recomputation, inside no_grad."""
    model = build("llama", ATTENTION_NAME).train()
    enable_checkpointing(decoder_layers(model), checkpointing)
    policy, expected = Policy(model), plain_gradients(build("llama", "eager"))
    for start in (None, 1.5):
        for parameter in policy.parameters():
            parameter.grad = None if start is None else torch.full_like(parameter, start)
        with torch.no_grad():
            found = input_gradients(policy, batch_of(True))
        for ours, theirs in zip(found, expected):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
        for parameter in policy.parameters():
            assert parameter.grad is None if start is None else (parameter.grad == start).all()


# ----------------------------------------------------------------------------------------------------------------------
# The source

class Importance:
    """What the source reads of a batch: gradients of prompt and response."""

    def __init__(self, *parts: tuple[list[float], list[float]]):
        self.input_gradients = tuple(torch.tensor(prompt + response) for prompt, response in parts)
        self.seq_lens_S = torch.tensor([len(response) for _, response in parts])


def weights_of(batch: Importance, options: str = "") -> list[list[float]]:
    raw_N = bind_options(WEIGHTS["tidpo"], options, "--weights-options")(batch, None)
    return [part.tolist() for part in raw_N.split(batch.seq_lens_S.tolist())]


def test_weights_by_hand():
    """Paper: sum-1 gradients beside a peak-1 prior over the response. Code: all of mean 1 over prompt and response."""
    batch = Importance(([3.0], [1.0, 0.0, 3.0]), ([8.0, 8.0], [2.0]))
    three, one = weights_of(batch)
    side = 0.3 * math.exp(-0.5 * (1 / 0.75) ** 2)
    assert three == pytest.approx([0.7 * 0.25 + side, 0.3, 0.7 * 0.75 + side]) and one == pytest.approx([1.0])
    assert weights_of(batch, "sigma_div=2,lam=0")[0] == pytest.approx([math.exp(-2 / 9), 1.0, math.exp(-2 / 9)])
    three, one = weights_of(batch, "lam=0.2,sigma_div=8,prior=sum1,scope=all")
    prior = [math.exp(-0.5 * place ** 2) for place in (-1.5, -0.5, 0.5, 1.5)]  # sigma is 1, not 4 / 8
    shares = [0.2 * share + 0.8 * value / sum(prior) for share, value in zip((3 / 7, 1 / 7, 0, 3 / 7), prior)]
    assert three == pytest.approx([4 * value for value in shares[1:]])
    prior = [math.exp(-0.5 * place ** 2) for place in (-1, 0, 1)]
    assert one == pytest.approx([3 * (0.2 * 2 / 18 + 0.8 * prior[2] / sum(prior))])


def test_the_codes_weights_over_the_response_have_mean_one():
    batch = Importance(([3.0], [1.0, 0.0, 3.0, 7.0, 0.5]), ([8.0, 8.0], [2.0]))
    for part in weights_of(batch, "prior=sum1"):
        assert sum(part) == pytest.approx(len(part))


def test_gradients_of_zero_are_shared_out_evenly():
    (part,) = weights_of(Importance(([1.0], [0.0, 0.0])), "lam=1")
    assert part == [0.5, 0.5]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_gradients_that_are_not_finite_are_not_taken_for_even_ones(value):
    """So that what checks the weights of a source stops the run."""
    (part,) = weights_of(Importance(([1.0], [value, 1.0])), "lam=1")
    assert not all(map(math.isfinite, part))


@pytest.mark.parametrize("options, message", [("lam=1.5", "lam=1.5: the share of the gradients must be in"),
                                              ("sigma_div=0", "sigma_div=0.0: it must be above 0")])
def test_options_out_of_range_are_one_message(options, message):
    with pytest.raises(InputError, match=message):
        weights_of(Importance(([1.0], [1.0])), options)


# ----------------------------------------------------------------------------------------------------------------------
# Whole runs

PRIOR = """
import torch
from twdpo.weights import WEIGHTS

def prior(batch, context):
    \"\"\"What tidpo with lam=0 is, without a pass.\"\"\"
    return torch.cat([torch.exp(-0.5 * ((torch.arange(num) - (num - 1) / 2) * 4 / num).square())
                      for num in batch.seq_lens_S.tolist()])

prior.norm = "none"
WEIGHTS["prior"] = prior
"""


def test_packed_plain_accumulated_and_recomputed_are_one_run(tmp_path, run_arguments):
    """kto_pair runs each batch forward twice; lr is high, so that weights follow the policy."""
    ways = WAYS | {"recomputed": WAYS["packed"] | {"checkpointing": "full"}}
    for name, more in ways.items():
        train.main([*run_arguments(tmp_path / name, max_steps=3, **more), "--loss", "dpo", "--weights", "tidpo"])
    for name in ("plain", "accumulated", "recomputed"):
        assert_close_rows(read_rows(tmp_path / name), read_rows(tmp_path / "packed"))


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["--no-sync"], ["--no-sync", "--dtype", "bfloat16"]], ids=" ".join)
def test_shards_gradients_are_those_without_the_pass(flags, tmp_path, run_arguments):
    """Two processes, several micro-batches of each: the same weights with the pass and without."""
    (tmp_path / "prior.py").write_text(PRIOR)
    arguments = {"max_steps": 3, "micro_batch_tokens": 100, "batch_size": 8, "checkpointing": "selective"}
    run_ranks("train", [*run_arguments(tmp_path / "with", **arguments), *flags, "--loss", "dpo", "--weights", "tidpo",
                        "--weights-options", "lam=0"])
    run_ranks("train", [*run_arguments(tmp_path / "without", **arguments), *flags, "--loss", "dpo", "--weights",
                        "prior", "--import", str(tmp_path / "prior.py")])
    assert_close_rows(read_rows(tmp_path / "with"), read_rows(tmp_path / "without"))
