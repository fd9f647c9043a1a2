"""Anchors: drawn exactly, whatever batch they are drawn in; their log-probs against plain forwards; whole runs."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from runs_of_tests import assert_close_rows, read_rows
from templates_of_tests import TEMPLATES, byte_tokenizer
from transformers import AutoModelForCausalLM

import train
from twdpo import needs
from twdpo.batch import collate
from twdpo.chat import Chat
from twdpo.config import TrainConfig
from twdpo.dataset import load_dataset
from twdpo.inputs import Inputs
from twdpo.models.anchor import Draw, with_anchor, write_anchors
from twdpo.models.generate import continuations, turn_ends, with_end
from twdpo.models.policy import load_policy
from twdpo.models.reference import load_reference, response_logps_of
from twdpo.models.source import load_tokenizer
from twdpo.objective import bind_objective, find_objective, forward
from twdpo.rows import MicroBatch
from twdpo.tokens import tokenize_pairs
from twdpo.weights import WEIGHTS, WeightContext

ANCHORED = """
import torch
from twdpo.losses import LOSSES, dpo

def anchored(ratio_S, logps_N, batch, config):
    \"\"\"DPO, and the mean square of the anchors' log-ratios, of which 1 is taken: it moves from the start.\"\"\"
    loss_P, metrics = dpo(ratio_S, logps_N, batch, config)
    d_M = batch.anchor.logps_M - batch.anchor.ref_logps_M
    parts = d_M.split(batch.anchor.seq_lens_P.tolist())
    drift_P = torch.stack([(part - 1).square().mean() for part in parts])
    first_P = torch.stack([part[0] for part in batch.anchor.logps_M.detach().split(batch.anchor.seq_lens_P.tolist())])
    return loss_P + 0.1 * drift_P, metrics | {"drift": drift_P, "anchor_first": first_P}

anchored.needs = ("ref", "anchor")
LOSSES["anchored"] = anchored
"""


@pytest.fixture
def chat(toy_model) -> Chat:
    return Chat(load_tokenizer(toy_model, ""))


@pytest.fixture
def examples(chat):
    return tokenize_pairs(chat, load_dataset("toy", "").train[:5], 200, 100)[0]


def test_tokens_are_drawn_as_often_as_they_are_likely():
    """Numbers that lie evenly in [0, 1) find each token in its share of them; one that is ruled out never."""
    probs_V = torch.tensor([0.125, 0.0, 0.5, 0.25, 0.0, 0.125, 0.0])
    even_P = (torch.arange(64, dtype=torch.float64) + 0.5) / 64
    scores_PV = probs_V.log().expand(64, -1)
    drawn_PV = Draw(even_P[:, None], 3)(torch.zeros(64, 3), scores_PV)
    assert ((drawn_PV == 0).sum(dim=1) == 1).all() and (drawn_PV.isneginf().sum(dim=1) == 6).all()
    assert (drawn_PV == 0).sum(dim=0).tolist() == [8, 0, 32, 16, 0, 8, 0]
    last = Draw(torch.full((1, 1), 1 - 2**-53, dtype=torch.float64), 3)(torch.zeros(1, 3), scores_PV[:1])
    assert last.argmax() == 5


def test_an_anchor_is_the_pair_s_own(toy_model, process, chat, examples):
    """Alone, among others, in another order; torch's own generator is not asked."""
    policy = load_policy(toy_model, torch.float32, process)
    state = torch.get_rng_state()
    together = write_anchors(policy, examples, chat, 7, 12)
    assert torch.equal(torch.get_rng_state(), state) and policy.training
    assert len({len(example.prompt_ids) for example in examples}) > 1
    assert write_anchors(policy, examples[::-1], chat, 7, 12) == together[::-1]
    assert [write_anchors(policy, [example], chat, 7, 12)[0] for example in examples] == together
    assert write_anchors(policy, examples, chat, 8, 12) != together
    again = [replace(examples[0], pair=example.pair) for example in examples]  # one prompt, several pairs
    assert len(set(map(tuple, write_anchors(policy, again, chat, 7, 12)))) > 2
    ends = turn_ends(chat)[0]
    assert all(1 <= len(ids) <= 12 and not set(ids[:-1]) & set(ends) for ids in together)


def test_one_ends_with_the_end_of_its_turn(chat, monkeypatch):
    """One token; without any it is whole."""
    (end, *_), _ = turn_ends(chat)
    word = chat.tokenizer("the", add_special_tokens=False)["input_ids"][0]
    assert with_end(chat, [word, end, word, 0]) == [word, end] and with_end(chat, [end, end]) == [end]
    assert with_end(chat, [word, word]) == [word, word]


@pytest.mark.parametrize("question", ["good\n", "good"], ids=["begun by the prompt", "never"])
def test_one_ends_with_a_text_that_its_prompt_may_begin(question, monkeypatch):
    """What ends sooner than its neighbour has no padding of it, whatever its first token is after."""
    tokenizer = byte_tokenizer(TEMPLATES["chatml"], False)
    monkeypatch.setattr("twdpo.models.generate.turn_ends", lambda chat: ([1], "\nUSER:"))
    rows = [tokenizer(text, add_special_tokens=False).input_ids for text in (question, question)]
    texts = [tokenizer(text, add_special_tokens=False).input_ids for text in ("USER:", "well. well. well. well.")]

    def generate(input_ids, stopping_criteria, generation_config, **options):
        """As transformers': a row that has ended is padded."""
        ids, running_P = input_ids, torch.ones(2, dtype=torch.bool)
        for place in range(len(texts[1])):
            written_P = torch.tensor([text[place] if place < len(text) else 7 for text in texts])
            ids = torch.cat([ids, torch.where(running_P, written_P, 0)[:, None]], dim=1)
            running_P &= ~stopping_criteria(ids, None)
        return ids
    model = torch.nn.Linear(1, 1)
    found = continuations(model, SimpleNamespace(tokenizer=tokenizer), rows, len(texts[1]), generate)
    if question == "good\n":
        assert found == texts
    else:
        assert found[1] == texts[1] and len(found[0]) == len(found[1])


@pytest.mark.parametrize("packs", [True, False])
def test_log_probs_and_their_gradient_are_those_of_plain_forwards(packs, toy_model, process, chat, examples):
    """One backward pass through pairs and anchors, against plain autograd."""
    exec(ANCHORED, {})  # noqa: S102
    loss, config = find_objective(TrainConfig(loss="anchored"), process).loss, TrainConfig()
    policy, reference = (load(toy_model, torch.float32, process) for load in (load_policy, load_reference))
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.mul_(1.05)
    batch = collate(MicroBatch((0, 1, 2)), examples, [0, 1, 2], packs=packs)
    answers = [[5, 9, 7], [11], [30, 31]]
    objective = bind_objective(loss, WEIGHTS["uniform"], "uniform")

    def make(policy, run, batch):
        return with_anchor(policy, run, batch, lambda policy, examples: answers,
                           lambda anchors: response_logps_of(reference, anchors))
    outputs = forward(policy, batch, objective, WeightContext(config, passes=(make,)), config)
    anchor = outputs.batch.anchor
    assert batch.anchor is None and anchor.seq_lens_P.tolist() == [3, 1, 2]
    plain, frozen = (AutoModelForCausalLM.from_pretrained(toy_model) for _ in range(2))
    frozen.load_state_dict(reference.model.state_dict())

    def logps_of(model) -> torch.Tensor:
        parts = []
        for example, answer in zip(examples, answers):
            ids = torch.tensor([*example.prompt_ids, *answer])
            logps_TV = model(ids[None]).logits[0].log_softmax(dim=-1)
            first = len(example.prompt_ids)
            parts += [logps_TV[place - 1, ids[place]] for place in range(first, len(ids))]
        return torch.stack(parts)
    expected_M, expected_ref_M = logps_of(plain), logps_of(frozen)
    torch.testing.assert_close(anchor.logps_M, expected_M, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(anchor.ref_logps_M, expected_ref_M, rtol=1e-4, atol=1e-4)
    assert not anchor.ref_logps_M.requires_grad
    (outputs.logps_N.sum() + (anchor.logps_M ** 2).sum()).backward()
    whole = torch.cat([plain(torch.tensor([*example.prompt_ids, *side.ids])[None].long()).logits[0].log_softmax(dim=-1)[
        np.arange(len(example.prompt_ids) - 1, len(example.prompt_ids) + len(side.ids) - 1), side.ids]
        for example in examples[:3] for side in (example.chosen, example.rejected)])
    (whole.sum() + (expected_M ** 2).sum()).backward()
    for name in ("model.norm.weight", "model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"):
        ours, theirs = policy.model.get_parameter(name).grad, plain.get_parameter(name).grad
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm() > 0, name


def test_a_prompt_without_room_is_a_bad_row_and_little_room_is_said(process, chat, examples, monkeypatch, capsys):
    model = SimpleNamespace(config=None, chat=chat)
    inputs = Inputs(model, examples, {}, "", "", "")
    need = needs.Anchors(process, None)
    longest = max(len(example.prompt_ids) for example in examples)
    monkeypatch.setattr(needs, "context_length", lambda config: longest)
    found = need.check(TrainConfig(), inputs)
    assert [row.where for row in found] == [example.pair.where for example in examples
                                            if len(example.prompt_ids) == longest]
    assert f"its prompt of {longest} tokens leaves no room for an anchor in the model's context" in found[0].reason
    monkeypatch.setattr(needs, "context_length", lambda config: longest + 3)
    need.prepare(TrainConfig(), inputs)
    assert need.max_new_tokens == 3 and "anchors have up to 3 tokens, not 64" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------------------
# Whole runs

@pytest.fixture
def flags(tmp_path, monkeypatch) -> list[str]:
    monkeypatch.setattr("twdpo.needs.ANCHOR_TOKENS", 8)
    (tmp_path / "anchored.py").write_text(ANCHORED)
    return ["--import", str(tmp_path / "anchored.py"), "--loss", "anchored", "--lr", "1e-4"]


def test_everything_at_once_loads_one_reference(tmp_path, run_arguments, flags, monkeypatch):
    """Anchors, the reference's distributions and input gradients; a resumed run goes on as the whole one."""
    calls, load = [], needs.load_reference
    monkeypatch.setattr(needs, "load_reference", lambda *args: (calls.append(args), load(*args))[1])
    (tmp_path / "kl.py").write_text(ANCHORED.replace('"ref", "anchor")', '"ref", "anchor", "ref_states")\n'
                                                     'anchored.terms = ("kl",)'))
    arguments = [*run_arguments(tmp_path / "run", max_steps=3, save_every=2, weights="tidpo", dtype="bfloat16",
                                checkpointing="full", micro_batch_tokens=150), *flags]
    arguments[arguments.index("--import") + 1] = str(tmp_path / "kl.py")
    train.main(arguments)
    assert len(calls) == 1
    rows = read_rows(tmp_path / "run")
    train.main([*arguments, "--resume", str(tmp_path / "run" / "checkpoints" / "step-0000002")])
    assert_close_rows(read_rows(tmp_path / "run"), rows)
