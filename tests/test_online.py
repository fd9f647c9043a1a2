"""A source on hidden states, and a loss on the entropy, from files outside the package (those of docs/methods.md)."""

import re
from pathlib import Path

import pytest
import torch
from processes_of_tests import run_ranks
from runs_of_tests import assert_close_rows, read_rows
from transformers import AutoModelForCausalLM

import train
from twdpo.batch import collate
from twdpo.chat import Chat
from twdpo.config import TrainConfig
from twdpo.dataset import load_dataset
from twdpo.losses import LOSSES, dpo
from twdpo.models.policy import load_policy
from twdpo.models.source import load_tokenizer
from twdpo.objective import bind_objective, forward
from twdpo.rows import MicroBatch
from twdpo.tokens import tokenize_pairs
from twdpo.weights import WEIGHTS, WeightContext

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = {name: code for code, name in
            re.findall(r"^```python\n(# (\w+)\.py\n.*?)^```$", (ROOT / "docs/methods.md").read_text("utf-8"),
                       re.MULTILINE | re.DOTALL)}
WAYS = {"packed": {"packing": "on", "micro_batch_tokens": 100_000},
        "plain": {"packing": "off", "micro_batch_tokens": 100_000},
        "accumulated": {"packing": "on", "micro_batch_tokens": 150}}


@pytest.fixture
def flags(tmp_path) -> list[str]:
    """Both examples, from files."""
    for name in ("novelty", "entropy_bonus"):
        (tmp_path / f"{name}.py").write_text(EXAMPLES[name])
    return ["--import", f"{tmp_path / 'novelty.py'},{tmp_path / 'entropy_bonus.py'}", "--loss", "dpo_entropy",
            "--loss-options", "bonus=0.5", "--weights", "novelty"]


def test_ten_steps_packed_plain_and_accumulated_are_one_run(tmp_path, run_arguments, flags):
    for name, more in WAYS.items():
        train.main([*run_arguments(tmp_path / name, max_steps=10, eval_every=9, **more), *flags])
    packed = read_rows(tmp_path / "packed")
    assert len(packed) == 1 + 10 + 2 and all("entropy_chosen" in row for row in packed[1:9])
    for name in ("plain", "accumulated"):
        assert_close_rows(read_rows(tmp_path / name), packed)


@pytest.mark.slow
def test_ten_steps_on_two_processes_are_those_of_one(tmp_path, run_arguments, flags):
    """With recomputation, so that hidden states are those of the forward and not of the second one."""
    arguments = {"max_steps": 10, "eval_every": 9, "micro_batch_tokens": 250, "checkpointing": "full"}
    train.main([*run_arguments(tmp_path / "one", **arguments), *flags])
    run_ranks("train", [*run_arguments(tmp_path / "two", **arguments), *flags])
    assert_close_rows(read_rows(tmp_path / "two"), read_rows(tmp_path / "one"))


def test_it_runs_in_bfloat16_shards_and_with_statistics(tmp_path, run_arguments, flags):
    """Of one process in bf16 the parameters are sharded; kto_pair runs each batch forward twice."""
    train.main([*run_arguments(tmp_path / "bf16", max_steps=2, dtype="bfloat16"), *flags])
    argv = [*run_arguments(tmp_path / "kto", max_steps=2, micro_batch_tokens=150), *flags[:2], "--weights", "novelty"]
    train.main([*argv, "--loss", "kto_pair"])
    for name in ("bf16", "kto"):
        assert [row["step"] for row in read_rows(tmp_path / name) if "grad_norm" in row] == [1, 2]


@pytest.mark.slow
def test_the_toy_says_where_the_weights_lay(tmp_path, run_cache, flags):
    """The lift is of the weights that were used: another one after a step, as the policy is another."""
    train.main([*flags, "--cache-dir", str(run_cache), "--max-steps", "2", "--lr", "1e-2", "--warmup-ratio", "0",
                "--output-dir", str(tmp_path / "run")])
    lifts = [row["eval/planted_lift"] for row in read_rows(tmp_path / "run") if "eval/pairs" in row]
    assert all(lift > 0 for lift in lifts) and lifts[0] != lifts[-1]


@pytest.fixture
def batch(toy_model):
    examples, _, _ = tokenize_pairs(Chat(load_tokenizer(toy_model, "")), load_dataset("toy", "").train[:3], 200, 100)
    return collate(MicroBatch((0, 1, 2)), examples, [0, 1, 2])


def run_examples() -> None:
    for code in EXAMPLES.values():
        exec(code, {})  # noqa: S102


def test_weights_are_those_of_the_hidden_states_that_predict_the_tokens(toy_model, process, batch):
    """Against the plain model's own hidden states; the batch that went in keeps none of it."""
    run_examples()
    policy, config = load_policy(toy_model, torch.float32, process).eval(), TrainConfig()
    objective = bind_objective(LOSSES["twdpo"], WEIGHTS["novelty"], "novelty")
    assert objective.is_online
    outputs = forward(policy, batch, objective, WeightContext(config), config)
    model = AutoModelForCausalLM.from_pretrained(toy_model)
    weights = []
    for example in batch.examples:
        for side in (example.chosen, example.rejected):
            ids = torch.tensor([*example.prompt_ids, *side.ids]).long()[None]
            first = len(example.prompt_ids)
            with torch.no_grad():
                hidden_TD = model.model(ids).last_hidden_state[0, first - 1:-1]
            raw_T = 1 - torch.cosine_similarity(hidden_TD, hidden_TD.mean(dim=0, keepdim=True), dim=-1) + 0.05
            weights.append(raw_T / raw_T.sum())
    torch.testing.assert_close(outputs.batch.weights_N, torch.cat(weights), atol=1e-5, rtol=1e-3)
    assert outputs.batch.hidden_ND is None and torch.equal(outputs.batch.scale_S, batch.seq_lens_S.float())
    assert not outputs.batch.weights_N.requires_grad and (batch.weights_N == 1).all()


def test_the_entropy_moves_the_policy(toy_model, process, batch):
    """The gradient of the bonus alone, against plain autograd on full logits."""
    run_examples()
    policy, config = load_policy(toy_model, torch.float32, process).eval(), TrainConfig()
    objective = bind_objective(LOSSES["dpo_entropy"], WEIGHTS["uniform"], "uniform")
    outputs = forward(policy, objective.weigh(batch, WeightContext(config)), objective, WeightContext(config), config)
    loss_P, metrics = objective.loss(outputs.ratio_S, outputs.logps_N, outputs.batch, config)
    plain_P, _ = dpo(outputs.ratio_S, outputs.logps_N, outputs.batch, config)
    torch.testing.assert_close(loss_P, plain_P - 0.01 * metrics["entropy_chosen"])
    (ours,) = torch.autograd.grad(metrics["entropy_chosen"].sum(), [policy.model.model.norm.weight])
    model = AutoModelForCausalLM.from_pretrained(toy_model)
    entropies = []
    for example in batch.examples:
        ids = torch.tensor([*example.prompt_ids, *example.chosen.ids]).long()[None]
        logits_TV = model(ids).logits[0, len(example.prompt_ids) - 1:-1]
        entropies.append(torch.distributions.Categorical(logits=logits_TV).entropy().mean())
    torch.testing.assert_close(metrics["entropy_chosen"], torch.stack(entropies), atol=1e-4, rtol=1e-4)
    (expected,) = torch.autograd.grad(sum(entropies), [model.model.norm.weight])
    assert (ours - expected).norm() <= 1e-3 * expected.norm() > 0


SPREAD = """
import torch
from twdpo.losses import LOSSES, dpo

def dpo_spread(ratio_S, logps_N, batch, config):
    \"\"\"DPO, and the mean square of the hidden states of chosen answers.\"\"\"
    loss_P, _ = dpo(ratio_S, logps_N, batch, config)
    parts = batch.hidden_ND.float().square().mean(dim=-1).split(batch.seq_lens_S.tolist())
    spread_P = torch.stack([part.mean() for part in parts[0::2]])
    return loss_P + spread_P, {"spread": spread_P}

dpo_spread.needs = ("ref", "hidden")
LOSSES["dpo_spread"] = dpo_spread
"""


def test_a_loss_may_need_hidden_states_with_their_gradient(toy_model, process, batch):
    """Against plain autograd, beside a source that knows nothing of them."""
    exec(SPREAD, {})  # noqa: S102
    policy, config = load_policy(toy_model, torch.float32, process).eval(), TrainConfig()
    objective = bind_objective(LOSSES["dpo_spread"], WEIGHTS["uniform"], "uniform")
    assert not objective.is_online
    outputs = forward(policy, objective.weigh(batch, WeightContext(config)), objective, WeightContext(config), config)
    _, metrics = objective.loss(outputs.ratio_S, outputs.logps_N, outputs.batch, config)
    (ours,) = torch.autograd.grad(metrics["spread"].sum(), [policy.model.model.norm.weight])
    model, spreads = AutoModelForCausalLM.from_pretrained(toy_model), []
    for example in batch.examples:
        ids = torch.tensor([*example.prompt_ids, *example.chosen.ids]).long()[None]
        hidden_TD = model.model(ids).last_hidden_state[0, len(example.prompt_ids) - 1:-1]
        spreads.append(hidden_TD.square().mean())
    (expected,) = torch.autograd.grad(sum(spreads), [model.model.norm.weight])
    assert (ours - expected).norm() <= 1e-3 * expected.norm() > 0


def test_runs_of_a_loss_on_hidden_states_are_one_run(tmp_path, run_arguments):
    (tmp_path / "spread.py").write_text(SPREAD)
    for name, more in WAYS.items():
        train.main([*run_arguments(tmp_path / name, max_steps=3, weights="decay", **more), "--import",
                    str(tmp_path / "spread.py"), "--loss", "dpo_spread"])
    for name in ("plain", "accumulated"):
        assert_close_rows(read_rows(tmp_path / name), read_rows(tmp_path / "packed"))


@pytest.mark.parametrize("code, message", [
    ("WEIGHTS['novelty'] = lambda batch, context: [1.0]", "gives a list: it must be a tensor"),
    ("WEIGHTS['novelty'] = lambda batch, context: batch.weights_N[:, None]", "weights of shape"),
    ("WEIGHTS['novelty'] = lambda batch, context: batch.weights_N.sum()", "weights of shape ()"),
    ("WEIGHTS['novelty'] = lambda batch, context: batch.weights_N * 1j", "gives a torch.complex64"),
    ("LOSSES['dpo_entropy'] = lambda ratio_S, *_, bonus=1.0: (ratio_S[::2], {'mean': 0.0})",
     "returns something else than"),
    ("WEIGHTS['novelty'].needs = ('gradients',)", "'gradients' is none of scores, attention"),
    ("LOSSES['dpo_entropy'].terms = ('logits',)", "dpo_entropy.terms is ('logits',): it must be a tuple of entropy"),
    ("LOSSES['dpo_entropy'].needs = ('attention',)", "dpo_entropy.needs is ('attention',): a loss can need "),
])
def test_what_is_not_there_is_one_message(code, message, tmp_path, run_arguments, flags, capsys):
    (tmp_path / "more.py").write_text("from twdpo.losses import LOSSES\nfrom twdpo.weights import WEIGHTS\n" + code)
    flags = [flags[0], f"{flags[1]},{tmp_path / 'more.py'}", *flags[2:]]
    with pytest.raises(SystemExit):
        train.main([*run_arguments(tmp_path / "run"), *flags])
    assert message in capsys.readouterr().err
